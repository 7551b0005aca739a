"""How weights of few bits are stored: standard ONNX that gives them back as they were."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny import spec

from mnist_lab.compress import few_bits as f
from mnist_lab.compress.few_bits import FewBits, add_weights, stored_bits
from mnist_lab.compress.levels import LEVELS, Bits, Rounded, Rounding
from mnist_lab.compress.weight_only import put_in, round_weight
from mnist_lab.deploy.onnx import build_onnx
from mnist_lab.deploy.safety import check_graph
from mnist_lab.measure import Array
from mnist_lab.models import build_model
from mnist_lab.models.ffn import FFNConfig

RANDOM = np.random.default_rng(0)
SHAPES = {"one": (20, 6), "two": (7, 5), "three": (1, 1)}


def draw(bits: Bits, shape: tuple[int, int], *, affine: bool = False, group_size: int = 20) -> Rounded:
    levels, num_groups = LEVELS[bits], -(-shape[0] // group_size)
    integers = levels.lowest + levels.step * RANDOM.integers(0, levels.num, shape)
    scales = RANDOM.uniform(0.1, 1, (num_groups, shape[1])).astype(np.float32)
    zeros = RANDOM.integers(levels.lowest, levels.highest, scales.shape).astype(np.int8) if affine else None
    return Rounded(integers.astype(np.int8), scales, zeros, group_size)


def read_back(weights: list[FewBits]) -> tuple[onnx.ModelProto, dict[str, Array]]:
    shapes = {f"{w.name}.out": w.rounded.integers.shape for w in weights}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    nodes = [helper.make_node("Identity", [w.name], [f"{w.name}.out"]) for w in weights]
    graph = helper.make_graph(nodes, "g", [], outputs)
    add_weights(graph, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", f.OPSET)], ir_version=f.IR_VERSION)
    onnx.checker.check_model(model, full_check=True)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {})
    return model, {w.name: values for w, values in zip(weights, found, strict=True)}


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("group_size", [20, 16])
@pytest.mark.parametrize("bits", LEVELS)
def test_weights_come_back_as_they_were(bits: Bits, group_size: int, affine: bool) -> None:
    weights = [
        FewBits(name, bits, draw(bits, shape, affine=affine, group_size=min(group_size, shape[0])))
        for name, shape in SHAPES.items()
    ]
    model, found = read_back(weights)
    for weight in weights:
        np.testing.assert_allclose(found[weight.name], weight.rounded.dequantize(), rtol=1e-6)
    assert stored_bits(model.graph) == dict.fromkeys(SHAPES, bits)


def test_weights_of_different_bits_lie_side_by_side() -> None:
    weights = [FewBits(f"w{bits}", bits, draw(bits, (20, 6))) for bits in LEVELS]
    model, found = read_back(weights)
    assert stored_bits(model.graph) == {f"w{bits}": bits for bits in LEVELS}
    for weight in weights:
        np.testing.assert_allclose(found[weight.name], weight.rounded.dequantize(), rtol=1e-6)


@pytest.mark.parametrize("base", [2, 3, 4, 8])
def test_words_hold_as_many_digits_as_they_can(base: int) -> None:
    num = f.digits_per_word(base)
    assert base**num <= 2**63 < base ** (num + 1)
    digits = np.full(num + 1, base - 1)
    words = f.to_words(digits, base)
    assert words.ravel().tolist() == [base**num - 1, base - 1]


@pytest.mark.parametrize(("bits", "expected"), [(4, 4), (3, 3.05), (2, 2.07), ("ternary", 1.65), (1, 1.02)])
def test_a_weight_takes_its_bits(bits: Bits, expected: float) -> None:
    model, _ = read_back([FewBits("w", bits, draw(bits, (1000, 300), group_size=1000))])
    constants = [c for c in model.graph.initializer if not c.name.endswith("scale")]
    assert 8 * sum(len(c.raw_data) for c in constants) / 300_000 == pytest.approx(expected, abs=0.03)


def test_constants_may_not_become_more_than_words_can_hold() -> None:
    graph = build_onnx(build_model(FFNConfig((8,), spec(0.2, 0.3))))
    weight = graph.graph.initializer[0]
    node = next(node for node in graph.graph.node if weight.name in node.input)
    rounded = round_weight(numpy_helper.to_array(weight), Rounding(2), None)
    put_in(graph, {node.name: Rounding(2)}, {node.name: rounded})
    check_graph(graph)
    by_name = {constant.name: constant for constant in graph.graph.initializer}
    num_words, num_weights = by_name["b2.words"].dims[0], 784 * 8
    for name, value in (("powers", np.ones((1, 1000))), ("sizes", [num_weights, 1000 * num_words - num_weights])):
        by_name[f"b2.{name}"].CopyFrom(numpy_helper.from_array(np.array(value, np.int64), f"b2.{name}"))
    with pytest.raises(ValueError, match="of any size"):
        check_graph(graph)


def test_halves_of_a_byte_are_what_onnx_reads() -> None:
    integers = RANDOM.integers(-8, 8, (3, 5)).astype(np.int8)
    stored = TensorProto(data_type=TensorProto.INT4, dims=(3, 5), raw_data=f.pack_int4(integers))
    assert np.array_equal(numpy_helper.to_array(stored).astype(np.int8), integers)
