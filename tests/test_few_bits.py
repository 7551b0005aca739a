"""How weights of few bits are stored: standard ONNX that gives them back as they were."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny import spec

from mnist_lab.compress import few_bits as f
from mnist_lab.compress.few_bit_products import put_in
from mnist_lab.compress.few_bits import FewBits, add_weights, shorten_names, stored_bits
from mnist_lab.compress.levels import LEVELS, Bits, Rounded, Rounding
from mnist_lab.compress.weight_only import round_weight
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


def to_float(weight: FewBits) -> list[onnx.NodeProto]:
    """What a product makes of a weight."""
    if not weight.is_integer:
        return [helper.make_node("Identity", [weight.name], [f"{weight.name}.out"])]
    parts = ("int8", "zero", "scale", "float", "shift", "centred", "out")
    int8, zero, scale, floats, shift, centred, out = (f"{weight.name}.{part}" for part in parts)
    cast = helper.make_node("Cast", [int8], [floats], to=TensorProto.FLOAT)
    if weight.rounded.zeros is None:
        return [cast, helper.make_node("Mul", [floats, scale], [out])]
    return [
        cast,
        helper.make_node("Cast", [zero], [shift], to=TensorProto.FLOAT),
        helper.make_node("Sub", [floats, shift], [centred]),
        helper.make_node("Mul", [centred, scale], [out]),
    ]


def read_back(weights: list[FewBits]) -> tuple[onnx.ModelProto, dict[str, Array]]:
    shapes = {f"{w.name}.out": w.rounded.integers.shape for w in weights}
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    nodes = [node for w in weights for node in to_float(w)]
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
    dequantized = [weight.name for weight in weights if not weight.is_integer]
    assert stored_bits(model.graph) == dict.fromkeys(dequantized, bits)


def test_weights_of_different_bits_lie_side_by_side() -> None:
    weights = [FewBits(f"w{bits}", bits, draw(bits, (20, 6))) for bits in LEVELS]
    _, found = read_back(weights)
    for weight in weights:
        np.testing.assert_allclose(found[weight.name], weight.rounded.dequantize(), rtol=1e-6)


@pytest.mark.parametrize(("base", "num", "bits"), [(2, 8, 8), (3, 5, 8), (4, 4, 8), (8, 21, 63)])
def test_words_hold_as_many_digits_as_they_can(base: int, num: int, bits: int) -> None:
    assert base**num <= 2**bits < base ** (num + 1)
    words = f.to_words(np.full(2 * num - 1, base - 1), base)
    assert words.tolist() == [base**num - 1, base ** (num - 1) - 1]
    assert words.dtype == (np.uint8 if bits == 8 else np.int64)


@pytest.mark.parametrize(("bits", "expected"), [(4, 4), (3, 3.05), (2, 2), ("ternary", 1.6), (1, 1)])
def test_a_weight_takes_its_bits(bits: Bits, expected: float) -> None:
    model, _ = read_back([FewBits("w", bits, draw(bits, (1000, 300), group_size=1000))])
    constants = [c for c in model.graph.initializer if not c.name.endswith("scale")]
    assert 8 * sum(len(c.raw_data) for c in constants) / 300_000 == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("bits", "too_many"), [(2, 12), (3, 100)])
def test_constants_may_not_become_more_than_words_can_hold(bits: Bits, too_many: int) -> None:
    graph = build_onnx(build_model(FFNConfig((8,), spec(0.2, 0.3))))
    weight = graph.graph.initializer[0]
    node = next(node for node in graph.graph.node if weight.name in node.input)
    rounded = round_weight(numpy_helper.to_array(weight), Rounding(bits), None)
    num_weights = rounded.integers.size
    put_in(graph, {node.name: Rounding(bits)}, {node.name: rounded})
    check_graph(graph)
    by_name = {constant.name: constant for constant in graph.graph.initializer}
    (divide,) = (node for node in graph.graph.node if node.op_type == "Div")
    (split,) = (node for node in graph.graph.node if node.op_type == "Split")
    powers, sizes = by_name[divide.input[1]], by_name[split.input[1]]
    num_words = -(-num_weights // powers.dims[0])
    whole = helper.tensor_dtype_to_np_dtype(powers.data_type)
    powers.CopyFrom(numpy_helper.from_array(np.ones((too_many, 1), whole), powers.name))
    sizes.CopyFrom(numpy_helper.from_array(np.array([num_weights, too_many * num_words - num_weights]), sizes.name))
    if len(split.output) == 1:
        split.output.append("rest")
    with pytest.raises(ValueError, match="of any size"):
        check_graph(graph)


def test_only_products_of_a_dense_model_keep_their_names() -> None:
    graph = build_onnx(build_model(FFNConfig((8,), spec(0.2, 0.3))))
    rounding = Rounding(2, 16)
    rounded = round_weight(numpy_helper.to_array(graph.graph.initializer[0]), rounding, None)
    put_in(graph, {"fc0": rounding}, {"fc0": rounded})
    assert not any(node.name for node in graph.graph.node)
    values = {constant.name for constant in graph.graph.initializer}
    values |= {name for node in graph.graph.node for name in node.output}
    assert {name for name in values if len(name) > 2} == {"fc0.product", "logits"}
    onnx.checker.check_model(graph, full_check=True)


def test_numbers_are_never_names_that_are_kept() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("00", "y"))
    nodes = [helper.make_node("Add", names, [out]) for names, out in ((["00", "a"], "c"), (["c", "b"], "y"))]
    constants = [numpy_helper.from_array(np.full(1, value, np.float32), name) for name, value in (("a", 1), ("b", 2))]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants),
        opset_imports=[helper.make_opsetid("", f.OPSET)],
        ir_version=f.IR_VERSION,
    )
    shorten_names(model.graph)
    assert [constant.name for constant in model.graph.initializer] == ["01", "02"]
    assert onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"00": np.ones(1, np.float32)}) == [4]


def test_there_are_numbers_for_any_graph() -> None:
    graph = onnx.GraphProto(initializer=[TensorProto(name=f"constant{index}") for index in range(5000)])
    shorten_names(graph)
    assert len({constant.name for constant in graph.initializer}) == 5000


def test_halves_of_a_byte_are_what_onnx_reads() -> None:
    integers = RANDOM.integers(-8, 8, (3, 5)).astype(np.int8)
    stored = TensorProto(data_type=TensorProto.INT4, dims=(3, 5), raw_data=f.pack_int4(integers))
    assert np.array_equal(numpy_helper.to_array(stored).astype(np.int8), integers)
