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

OPSET, IR_VERSION = 21, 10  # the oldest that know weights of 4 bits, and scales of groups
TYPES: dict[Bits, int] = {8: TensorProto.INT8, 4: TensorProto.INT4}
Words = npt.NDArray[np.uint8 | np.int64]


class FewBits(NamedTuple):
    """A layer's weights as they are stored."""

    name: str
    bits: Bits
    rounded: Rounded


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


def shorten_names(graph: onnx.GraphProto) -> None:
    """Number the constants and what is made of them alone, and leave out the names of nodes, which are those of their
    outputs: at 1 bit a weight, names count. What the pixels become keeps its name.
    """
    numbered = dict.fromkeys(constant.name for constant in graph.initializer)
    for node in graph.node:
        if all(name in numbered for name in node.input):
            numbered |= dict.fromkeys(node.output)
    kept = {name for node in graph.node for name in node.output if name not in numbered}
    short = dict(zip(numbered, (name for name in _numbers() if name not in kept), strict=False))
    for constant in graph.initializer:
        constant.name = short[constant.name]
    for node in graph.node:
        node.ClearField("name")
        node.input[:] = [short.get(name, name) for name in node.input]
        node.output[:] = [short.get(name, name) for name in node.output]


def _numbers() -> Iterator[str]:
    """Of two characters as long as there are any: a weight takes as many bytes wherever it stands."""
    for length in count(2):
        yield from map("".join, product(string.digits + string.ascii_letters, repeat=length))


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
    powers = powers_of(levels.num)
    rest = len(words) * powers.size - sum(sizes)
    parts = [f"{weight.name}.levels" for weight in weights]
    word, power = constant(f"{prefix}.words", words), constant(f"{prefix}.powers", powers)
    if words.dtype != powers.dtype:
        yield _node("Cast", [word], f"{prefix}.wide", to=helper.np_dtype_to_tensor_dtype(powers.dtype))
        word = f"{prefix}.wide"
    base, flat = constant(f"{prefix}.base", np.array(levels.num, powers.dtype)), constant("flat", np.array([-1]))
    yield _node("Div", [word, power], f"{prefix}.shifted")  # (D, W)
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
