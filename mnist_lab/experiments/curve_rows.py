"""The rows of the curve of accuracy against bytes: pipelines from the mixture, and the small family from scratch."""

from collections.abc import Iterator

from mnist_lab.compress.distill_mixture import DistilMixture, SmallMixture
from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.qat import Quantization, TrainQuantized
from mnist_lab.experiments.pipeline import parse_pipelines
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import (
    FFN,
    MOE,
    STUDENT,
    deployed,
    small_from_scratch,
    small_student,
    static_int8,
    student_mixture,
    trained_quantized,
)
from mnist_lab.models.small import parse_shape

PIPELINES = (
    "qat 4 teacher=self",
    "qat 2 teacher=self",
    "qat ternary teacher=self",
    "qat 1 first-layer-bits=2 teacher=self",
    "neurons 0.5 teacher=self > qat 4 teacher=self",
    "neurons 0.75 teacher=self > qat 4 teacher=self",
    "experts 2 teacher=self > neurons 0.5 teacher=self > qat 4 teacher=self",
    # The same techniques in other orders.
    "neurons 0.75 > distil self > qat 4",
    "neurons 0.75 > qat 4 > distil self > round 4",
    "qat 4 > neurons 0.75 > distil self > round 4",
)
MIXTURE_WIDTHS = (32, 16)
# In 4 bits, with the graph, of 2.8, 4.0, 5.3, 7.8, 11, 22 and 41 kB: windows alone, or with a hidden layer after them.
WINDOWS = tuple(
    map(
        parse_shape,
        (
            "w8x5s2-w12x3s2-w11x3s1",
            "w10x5s2-w16x3s2-w16x3s1",
            "w12x5s2-w20x3s2-w20x3s1",
            "w16x5s2-w28x3s2-w24x3s1",
            "w20x5s2-w32x3s2-w32x3s1",
            "w24x5s2-w32x3s2-h40",
            "w24x5s2-w32x3s2-h88",
        ),
    )
)
# As fast as the INT8 student or nearly: wide strides compute little.
FAST = tuple(map(parse_shape, ("w16x7s7", "w16x4s4-w16x3s2", "w16x7s7-h32", "w8x4s4-h32")))
DENSE = tuple(map(parse_shape, ("pool2-h64-h32", "pool2-h96-h64")))  # 9.0 and 15 kB
TAUGHT = WINDOWS[:2] + WINDOWS[3:4]  # by the mixture, to see whether that helps where there is little room
# In FP32 of the sizes that the others have in 4 bits.
TINY = tuple(map(parse_shape, ("w2x5s2-w4x4s2-w5x3s2", "w4x5s2-w6x3s2-w8x3s2", "w6x5s2-w8x3s2-w12x3s2")))


def in_four_bits(trained: Row) -> Row:
    """As it is deployed, a model that learned 4 bits after its training."""
    return deployed(trained_quantized(trained, TrainQuantized(Quantization(Rounding(4)))))


def _curve() -> Iterator[Row]:
    yield from (FFN, MOE, STUDENT, *map(static_int8, (FFN, MOE, STUDENT)))
    yield from parse_pipelines(PIPELINES)
    small = [small_from_scratch(shape) for shape in (*WINDOWS, *FAST, *DENSE)]
    small += [small_student(shape) for shape in TAUGHT]
    small += [
        student_mixture(MOE, DistilMixture(student=SmallMixture(student_width=width))) for width in MIXTURE_WIDTHS
    ]
    for row in small:
        yield from (row, in_four_bits(row))
    yield from map(small_from_scratch, TINY)


CURVE = tuple(dict.fromkeys(_curve()))
