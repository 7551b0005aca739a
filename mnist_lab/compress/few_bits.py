"""Weights of few bits in a graph: a standard type where there is one of that many bits, else digits of whole numbers.

ONNX has types of 8 and of 4 bits. Of fewer bits a weight is a digit, to the base of as many levels as it may have, in a
word: 8 weights of 1 bit in a byte, 5 ternary ones, 4 of 2 bits; of 3 bits 21 in 64 bits, as a byte would hold but two.
Standard operators take the words apart when the file is loaded, for all weights of a kind at once, and from there on
they are weights of 4 bits.

Shapes: I inputs, O outputs, G groups of inputs, W words, D digits in a word.
"""

import string
from collections.abc import Iterable, Iterator, Mapping
from itertools import count, product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from mnist_lab.compress.levels import LEVELS, Bits, Int8, Levels, Rounded
from mnist_lab.runtimes import ROUTER

OPSET, IR_VERSION = 21, 10  # the oldest that know weights of 4 bits, and scales of groups
IN_FLOAT = {"Conv", "Gemm"}  # products of a small student
MAKING = {"DequantizeLinear", "Cast", "Reshape", "Split", "Mul", "Sub"}  # a weight of what is stored, or of digits
PRODUCTS = {"MatMul", "MatMulInteger"}
TYPES: dict[Bits, int] = {8: TensorProto.INT8, 4: TensorProto.INT4}
Words = npt.NDArray[np.uint8 | np.int64]


class FewBits(NamedTuple):
    """A layer's weights as they are stored."""

    name: str
    bits: Bits
    rounded: Rounded
    shape: tuple[int, ...] | None = None  # of what products in float take: (I, O), or of windows (O, channels, k, k)

    @property
    def is_float(self) -> bool:
        """Whether the engine makes floats of it when it loads the file, for a product that takes no others."""
        return self.shape is not None

    @property
    def is_integer(self) -> bool:
        """Whether products take its integers as INT8, and scales come after them: fewer than 8 bits, by output."""
        return not self.is_float and self.bits != 8 and len(self.rounded.scales) == 1

    @property
    def integers(self) -> Int8:
        """As they are stored, (I, O) or in the shape that products take."""
        is_of_windows = self.shape is not None and len(self.shape) > 2
        return self.rounded.integers.T.reshape(self.shape) if is_of_windows else self.rounded.integers

    def by_output(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One (1, O) for each output, so that it broadcasts against `integers`."""
        return values[0] if self.shape is None or len(self.shape) == 2 else values.reshape(-1, 1, 1, 1)


def word_of(base: int) -> np.dtype[np.uint8 | np.int64]:
    """Whichever takes fewer bits a digit: a byte, or 64 bits with a sign."""
    words = np.dtype(np.uint8), np.dtype(np.int64)
    return min(words, key=lambda word: word.itemsize / _digits_in(word, base))


def _digits_in(word: np.dtype[Any], base: int) -> int:
    """The largest D such that base^D - 1 is no more than a word can hold."""
    most = int(np.iinfo(word).max)
    return next(num for num in count() if base ** (num + 1) - 1 > most)


def to_words(digits: npt.NDArray[np.integer[Any]], base: int) -> Words:
    """(W,): the first W digits count least in each; the last ones are filled up with zeros."""
    powers = powers_of(base)
    filled = np.concatenate([digits.ravel().astype(np.int64), np.zeros(-digits.size % powers.size, np.int64)])
    words: Words = (filled.reshape(powers.size, -1) * powers).sum(axis=0).astype(word_of(base))
    return words


def powers_of(base: int) -> npt.NDArray[np.int32 | np.int64]:
    """(D, 1), of the type that words are taken apart in: of bytes ONNX Runtime has no quotients."""
    word = word_of(base)
    powers = [[base**place] for place in range(_digits_in(word, base))]
    return np.array(powers, np.int32 if word == np.uint8 else np.int64)


def pack_int4(integers: Int8) -> bytes:
    """Two's complement, the first in the lower half of a byte, as ONNX stores them."""
    halves = np.concatenate([integers.ravel(), np.zeros(integers.size % 2, np.int8)]).view(np.uint8) & 15
    return (halves[0::2] | (halves[1::2] << 4)).tobytes()


def add_weights(graph: onnx.GraphProto, weights: Iterable[FewBits]) -> None:
    """Put nodes before all others, and constants, that make these weights by their names; of one whose products are
    integer ones its `.int8`, beside constants `.scale` and, where it has any, `.zero`. Weights of a kind are all for
    products in float, or none.
    """
    by_bits: dict[Bits, list[FewBits]] = {}
    for weight in weights:
        by_bits.setdefault(weight.bits, []).append(weight)
    constants: dict[str, TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    for bits, own in by_bits.items():
        if bits not in TYPES:
            nodes += _unpack(bits, own, constants)
        for weight in own:
            nodes += _make(weight, constants)
    others = [*graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *others])
    graph.initializer.extend(constants.values())


def is_small_student(graph: onnx.GraphProto) -> bool:
    """Whether it pools pixels or looks through windows, and has no experts: its weights are few, and become floats."""
    return any(node.op_type in {"AveragePool", "Conv"} for node in graph.node) and not _has_router(graph)


def _has_router(graph: onnx.GraphProto) -> bool:
    return any(ROUTER in node.output for node in graph.node)


def shorten_names(graph: onnx.GraphProto) -> None:
    """Number the values, and leave out the names of nodes, which are those of their outputs: at 1 bit a weight, names
    count. What the pixels become keeps its name in a mixture, where it tells what goes to whom; elsewhere products do.
    """
    is_small, is_mixture = is_small_student(graph), _has_router(graph)
    constants = {constant.name for constant in graph.initializer}
    kept = {value.name for value in (*graph.input, *graph.output)}
    numbered = [constant.name for constant in graph.initializer]
    for node in graph.node:
        if constants.issuperset(node.input):
            constants.update(node.output)
        elif is_mixture or (node.op_type in PRODUCTS and not is_small):
            kept.update(node.output)
        numbered += (name for name in node.output if name not in kept)
    # Of two characters as long as there are any, so that a weight takes as many bytes wherever it stands.
    numbers = (name for name in _numbers(1 if is_small else 2) if name not in kept)
    short = dict(zip(numbered, numbers, strict=False))
    for constant in graph.initializer:
        constant.name = short[constant.name]
    for node in graph.node:
        node.ClearField("name")
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]


def _numbers(shortest: int) -> Iterator[str]:
    for length in count(shortest):
        yield from map("".join, product(string.digits + string.ascii_letters, repeat=length))


def stored_bits(graph: onnx.GraphProto) -> dict[str, Bits]:
    """In how many bits a graph stores weights, by their names."""
    constants = {constant.name: constant for constant in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}
    bits_of_type = {data_type: bits for bits, data_type in TYPES.items()}
    bits_of_table = {LEVELS[bits].num: bits for bits in LEVELS if bits not in TYPES}
    found: dict[str, Bits] = {}
    for node in graph.node:
        if node.op_type not in {"DequantizeLinear", "MatMulInteger", *IN_FLOAT}:
            continue
        name = weight = node.output[0] if node.op_type == "DequantizeLinear" else node.input[1]
        while name in made_by and made_by[name].op_type in MAKING:
            name = made_by[name].input[0]
        if name in constants:
            if constants[name].data_type in bits_of_type:
                found[weight] = bits_of_type[constants[name].data_type]
        elif name in made_by and made_by[name].op_type == "Gather":  # and not an activation
            found[weight] = bits_of_table[constants[made_by[name].input[0]].dims[0]]
    return found


def _make(weight: FewBits, constants: dict[str, TensorProto]) -> Iterator[onnx.NodeProto]:
    """A weight of its integers, in 4 or 8 bits `.q` or unpacked `.int8`, its scales and zero points."""
    name, (_, scales, zeros, group_size) = weight.name, weight.rounded
    in_few, unpacked, scale, zero = (f"{name}.{part}" for part in ("q", "int8", "scale", "zero"))
    is_one_group, data_type = len(scales) == 1, TYPES.get(weight.bits, TensorProto.INT4)
    if weight.bits in TYPES:
        constants[in_few] = _integer_tensor(in_few, weight.integers, data_type)
    if weight.is_float:
        yield from _make_floats(weight, in_few, unpacked, constants)
        return
    constants[scale] = numpy_helper.from_array(scales[0] if is_one_group else scales, scale)
    if zeros is not None:
        of_type = TensorProto.INT8 if weight.is_integer else data_type
        constants[zero] = _integer_tensor(zero, zeros[0] if is_one_group else zeros, of_type)
    if weight.is_integer:
        if weight.bits in TYPES:
            yield make_node("Cast", [in_few], unpacked, to=TensorProto.INT8)
        return
    if weight.bits not in TYPES:
        yield make_node("Cast", [unpacked], in_few, to=TensorProto.INT4)
    how: Mapping[str, Any] = {"axis": 1} if is_one_group else {"axis": 0, "block_size": group_size}
    yield make_node("DequantizeLinear", [in_few, scale] if zeros is None else [in_few, scale, zero], name, **how)


def _make_floats(
    weight: FewBits, in_few: str, unpacked: str, constants: dict[str, TensorProto]
) -> Iterator[onnx.NodeProto]:
    """s·(q − z), which ONNX Runtime computes when it loads the file."""
    name = weight.name
    if weight.bits in TYPES:
        yield make_node("Cast", [in_few], unpacked, to=TensorProto.FLOAT)
    if weight.rounded.zeros is not None:
        zeros = weight.by_output(weight.rounded.zeros.astype(np.float32))
        constants[f"{name}.zero"] = numpy_helper.from_array(zeros, f"{name}.zero")
        yield make_node("Sub", [unpacked, f"{name}.zero"], f"{name}.centred")
        unpacked = f"{name}.centred"
    constants[f"{name}.scale"] = numpy_helper.from_array(weight.by_output(weight.rounded.scales), f"{name}.scale")
    yield make_node("Mul", [unpacked, f"{name}.scale"], name)


def _integer_tensor(name: str, integers: Int8, data_type: int) -> TensorProto:
    raw = integers.tobytes() if data_type == TensorProto.INT8 else pack_int4(integers)
    return TensorProto(name=name, data_type=data_type, dims=integers.shape, raw_data=raw)


def _unpack(bits: Bits, weights: list[FewBits], constants: dict[str, TensorProto]) -> Iterator[onnx.NodeProto]:
    """Words -> digits -> levels of all weights of a kind, split into those of each."""
    levels, prefix = LEVELS[bits], f"b{bits}"

    def constant(name: str, value: npt.NDArray[Any]) -> str:
        constants[name] = numpy_helper.from_array(value, name)
        return name

    words = to_words(np.concatenate([digits_of(weight, levels) for weight in weights]), levels.num)
    sizes = [weight.rounded.integers.size for weight in weights]
    powers = powers_of(levels.num)
    rest = len(words) * powers.size - sum(sizes)
    parts = [f"{weight.name}.levels" for weight in weights]
    word, power = constant(f"{prefix}.words", words), constant(f"{prefix}.powers", powers)
    if words.dtype != powers.dtype:
        yield make_node("Cast", [word], f"{prefix}.wide", to=helper.np_dtype_to_tensor_dtype(powers.dtype))
        word = f"{prefix}.wide"
    base, flat = constant(f"{prefix}.base", np.array(levels.num, powers.dtype)), constant("flat", np.array([-1]))
    yield make_node("Div", [word, power], f"{prefix}.shifted")  # (D, W)
    yield make_node("Mod", [f"{prefix}.shifted", base], f"{prefix}.digits")
    yield make_node("Reshape", [f"{prefix}.digits", flat], f"{prefix}.flat")
    of_type = np.float32 if weights[0].is_float else np.int8
    table = constant(f"{prefix}.table", np.arange(levels.num, dtype=of_type) * levels.step + levels.lowest)
    yield make_node("Gather", [table, f"{prefix}.flat"], f"{prefix}.levels")
    split = constant(f"{prefix}.sizes", np.array([*sizes, rest] if rest else sizes))
    yield make_node("Split", [f"{prefix}.levels", split], *parts, *([f"{prefix}.rest"] if rest else []), axis=0)
    for weight, part in zip(weights, parts, strict=True):
        sizes_of_axes = weight.integers.shape
        shape = constant(f"shape{'x'.join(map(str, sizes_of_axes))}", np.array(sizes_of_axes))
        yield make_node("Reshape", [part, shape], f"{weight.name}.int8")  # (I, O)


def digits_of(weight: FewBits, levels: Levels) -> npt.NDArray[np.int64]:
    """Which of the levels each is, in order."""
    return (weight.integers.ravel().astype(np.int64) - levels.lowest) // levels.step


def make_node(operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes)
