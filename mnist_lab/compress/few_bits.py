"""Weights of few bits in a graph: a standard type where there is one of that many bits, else digits of whole numbers.

ONNX has types of 8 and of 4 bits. Of fewer bits a weight is a digit, to the base of as many levels as it may have, in a
word of 64 bits: 63 weights of 1 bit, 39 ternary ones, 31 of 2 bits, 21 of 3. Standard operators take the words apart
when the file is loaded, for all weights of a kind at once, and from there on they are weights of 4 bits.

Shapes: I inputs, O outputs, G groups of inputs, W words, D digits in a word.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from mnist_lab.compress.levels import LEVELS, Bits, Int8, Levels, Rounded

OPSET, IR_VERSION = 21, 10  # the oldest that know weights of 4 bits, and scales of groups
TYPES: dict[Bits, int] = {8: TensorProto.INT8, 4: TensorProto.INT4}
WORD_BITS = 63  # of 64, as words have a sign
Words = npt.NDArray[np.int64]


class FewBits(NamedTuple):
    """A layer's weights as they are stored."""

    name: str
    bits: Bits
    rounded: Rounded


def digits_per_word(base: int) -> int:
    """The largest D with base^D < 2^63."""
    return next(num - 1 for num in range(1, WORD_BITS + 2) if base**num > 2**WORD_BITS)


def to_words(digits: npt.NDArray[np.integer[Any]], base: int) -> Words:
    """(W, 1): the first digit of a word counts least; the last word is filled up with zeros."""
    powers = powers_of(base)
    filled = np.concatenate([digits.ravel().astype(np.int64), np.zeros(-digits.size % powers.size, np.int64)])
    words: Words = (filled.reshape(-1, powers.size) * powers).sum(axis=1, keepdims=True)
    return words


def powers_of(base: int) -> Words:
    """(1, D)."""
    return np.array([[base**place for place in range(digits_per_word(base))]], np.int64)


def pack_int4(integers: Int8) -> bytes:
    """Two's complement, the first in the lower half of a byte, as ONNX stores them."""
    halves = np.concatenate([integers.ravel(), np.zeros(integers.size % 2, np.int8)]).view(np.uint8) & 15
    return (halves[0::2] | (halves[1::2] << 4)).tobytes()


def add_weights(graph: onnx.GraphProto, weights: Iterable[FewBits]) -> None:
    """Put nodes before all others, and constants, that make these weights by their names."""
    by_bits: dict[Bits, list[FewBits]] = {}
    for weight in weights:
        by_bits.setdefault(weight.bits, []).append(weight)
    constants: dict[str, TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    for bits, own in by_bits.items():
        if bits not in TYPES:
            nodes += _unpack(bits, own, constants)
        for weight in own:
            nodes.append(_dequantize(weight, constants))
    others = [*graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *others])
    graph.initializer.extend(constants.values())


def stored_bits(graph: onnx.GraphProto) -> dict[str, Bits]:
    """In how many bits a graph stores weights, by their names."""
    constants = {constant.name: constant for constant in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    bits_of_type = {data_type: bits for bits, data_type in TYPES.items()}
    bits_of_table = {LEVELS[bits].num: bits for bits in LEVELS if bits not in TYPES}
    found: dict[str, Bits] = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        name = node.input[0]
        while name in made_by and made_by[name].op_type in {"Cast", "Reshape", "Split"}:
            name = made_by[name].input[0]
        if name in constants:
            found[node.output[0]] = bits_of_type[constants[name].data_type]
        elif made_by[name].op_type == "Gather":  # and not an activation
            found[node.output[0]] = bits_of_table[constants[made_by[name].input[0]].dims[0]]
    return found


def _dequantize(weight: FewBits, constants: dict[str, TensorProto]) -> onnx.NodeProto:
    name, (integers, scales, zeros, group_size) = weight.name, weight.rounded
    data_type = TYPES.get(weight.bits, TensorProto.INT4)
    inputs = [f"{name}.q", f"{name}.scale"]
    if weight.bits in TYPES:
        constants[inputs[0]] = _integer_tensor(inputs[0], integers, data_type)
    is_one_group = len(scales) == 1
    constants[inputs[1]] = numpy_helper.from_array(scales[0] if is_one_group else scales, inputs[1])
    if zeros is not None:
        inputs.append(f"{name}.zero")
        constants[inputs[2]] = _integer_tensor(inputs[2], zeros[0] if is_one_group else zeros, data_type)
    how: Mapping[str, Any] = {"axis": 1} if is_one_group else {"axis": 0, "block_size": group_size}
    return helper.make_node("DequantizeLinear", inputs, [name], name=name, **how)


def _integer_tensor(name: str, integers: Int8, data_type: int) -> TensorProto:
    raw = integers.tobytes() if data_type == TensorProto.INT8 else pack_int4(integers)
    return TensorProto(name=name, data_type=data_type, dims=integers.shape, raw_data=raw)


def _unpack(bits: Bits, weights: list[FewBits], constants: dict[str, TensorProto]) -> Iterator[onnx.NodeProto]:
    """Words -> digits -> levels of all weights of a kind, split into those of each, as weights of 4 bits."""
    levels, prefix = LEVELS[bits], f"b{bits}"

    def constant(name: str, value: npt.NDArray[Any]) -> str:
        constants[name] = numpy_helper.from_array(value, name)
        return name

    words = to_words(np.concatenate([digits_of(weight, levels) for weight in weights]), levels.num)
    sizes = [weight.rounded.integers.size for weight in weights]
    rest = len(words) * digits_per_word(levels.num) - sum(sizes)
    parts = [f"{weight.name}.levels" for weight in weights]
    word, power = constant(f"{prefix}.words", words), constant(f"{prefix}.powers", powers_of(levels.num))
    base, flat = constant(f"{prefix}.base", np.array(levels.num)), constant("flat", np.array([-1]))
    yield _node("Div", [word, power], f"{prefix}.shifted")  # (W, D)
    yield _node("Mod", [f"{prefix}.shifted", base], f"{prefix}.digits")
    yield _node("Reshape", [f"{prefix}.digits", flat], f"{prefix}.flat")
    table = constant(f"{prefix}.table", np.arange(levels.num, dtype=np.int8) * levels.step + levels.lowest)
    yield _node("Gather", [table, f"{prefix}.flat"], f"{prefix}.levels")
    split = constant(f"{prefix}.sizes", np.array([*sizes, rest] if rest else sizes))
    yield _node("Split", [f"{prefix}.levels", split], *parts, *([f"{prefix}.rest"] if rest else []), axis=0)
    for weight, part in zip(weights, parts, strict=True):
        num_inputs, num_outputs = weight.rounded.integers.shape
        shape = constant(f"shape{num_inputs}x{num_outputs}", np.array([num_inputs, num_outputs]))
        yield _node("Reshape", [part, shape], f"{weight.name}.i8")  # (I, O)
        yield _node("Cast", [f"{weight.name}.i8"], f"{weight.name}.q", to=TensorProto.INT4)


def digits_of(weight: FewBits, levels: Levels) -> npt.NDArray[np.int64]:
    """Which of the levels each is, in order."""
    return (weight.rounded.integers.ravel().astype(np.int64) - levels.lowest) // levels.step


def _node(operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes)
