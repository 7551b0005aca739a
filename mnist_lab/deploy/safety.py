"""Whether a graph is safe to run: of operators that the suite writes, and of results whose sizes are known before."""

import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mnist_lab.files import MAX_VALUES
from mnist_lab.measure import EVALUATION_BATCH
from mnist_lab.runtimes import FUSED, VENDOR

# What the suite's graphs are made of, as `deploy/onnx.py` writes them and ONNX Runtime's converter changes them.
OPERATORS = {
    "Add", "ArgMax", "AveragePool", "Cast", "Concat", "Conv", "DequantizeLinear", "Div", "DynamicQuantizeLinear",
    "Expand", "Flatten", "Gather", "GatherElements", "Gemm", "MatMul", "MatMulInteger", "Max", "Mod", "Mul",
    "QuantizeLinear", "Range", "Relu", "Reshape", "ScatterElements", "Shape", "Softmax", "Split", "Squeeze", "Sub",
    "TopK", "Unsqueeze",
}  # fmt: skip
# What those are told whose results are not as large as their weights.
OF_WINDOWS = {"AveragePool": {"kernel_shape", "strides"}, "Conv": {"strides"}}
# And the one of a vendor's, as `compress/qmoe.py` writes it: what it is told, and which inputs it gets.
FUSED_SETTINGS = {
    "k", "activation_type", "normalize_routing_weights", "expert_weight_bits", "block_size", "accuracy_level",
}  # fmt: skip
FUSED_INPUTS = ([*range(8)], [*range(8), 14])  # rows, logits, then constants; and last, weights of the experts
# What may compute from constants alone: weights of few bits, several in a word, are taken apart at loading.
OF_CONSTANTS = {"Cast", "DequantizeLinear", "Div", "Gather", "Mod", "Mul", "Reshape", "Split", "Sub"}
WEIGHTS_OF_A_WORD = {TensorProto.INT64: 64, TensorProto.UINT8: 8}  # at most
ITEM_BYTES: dict[int, int] = {
    TensorProto.FLOAT: 4, TensorProto.BFLOAT16: 2, TensorProto.INT64: 8, TensorProto.INT32: 4,
    TensorProto.INT8: 1, TensorProto.UINT8: 1,
}  # fmt: skip
PACKED_BITS: dict[int, int] = {TensorProto.INT4: 4}
MAY_BE_SPARSE = {TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8}
# For each value that it stores, a sparse constant may stand for so many and be so long. That leaves room for 99.9 % of
# zeros in all but the smallest layers, while made dense none takes more than 342 times the bytes of its values and
# indices, and none makes results wider than 16 times its values.
MAX_EXPANSION = 1024
MAX_LENGTH = 16
OUTPUTS = (["logits"], ["logits", "probabilities", "class"])  # of a file as it comes, and of a copy that says more
MAX_INDICES = 2000  # constants of no more whole numbers than that are shapes, axes, counts by expert


def constant_bytes(constant: onnx.TensorProto) -> int:
    """Of a constant's values, by its shape and type; a type that the suite does not write counts as none."""
    num_values = math.prod(constant.dims)
    if constant.data_type in PACKED_BITS:
        return math.ceil(num_values * PACKED_BITS[constant.data_type] / 8)
    return num_values * ITEM_BYTES.get(constant.data_type, 0)


def is_in_proportion(dims: Collection[int], num_values: int) -> bool:
    """Whether a constant of this shape may be stored as so many values and their places."""
    return math.prod(dims) <= MAX_EXPANSION * num_values and max(dims) <= MAX_LENGTH * num_values


def check_graph(model: onnx.ModelProto) -> None:
    """Find out whether running a model could read other files, run other code, or take memory without measure.

    Raises:
        ValueError: it could.
    """
    graph = model.graph
    further = [(opset.domain, opset.version) for opset in model.opset_import if opset.domain]
    if model.functions or further not in ([], [(VENDOR, 1)]):
        raise ValueError("it has functions or operators of its own")
    if [value.name for value in graph.input] != ["pixels"] or [value.name for value in graph.output] not in OUTPUTS:
        raise ValueError("it does not take pixels and give logits")
    for constant in graph.initializer:
        _check_stored(constant)
    for sparse in graph.sparse_initializer:
        _check_sparse(sparse)
    names = [constant.name for constant in graph.initializer]
    names += [sparse.values.name for sparse in graph.sparse_initializer]
    constants = set(names)
    if len(constants) < len(names):
        raise ValueError("two of its constants have the same name")
    for node in graph.node:
        is_fused = bool(further) and (node.domain, node.op_type) == (VENDOR, FUSED)
        if not is_fused and (node.op_type not in OPERATORS or node.domain):
            raise ValueError(f"it has the operator {node.op_type}, which the suite does not write")
        if node.op_type in OF_WINDOWS and not {how.name for how in node.attribute} <= OF_WINDOWS[node.op_type]:
            raise ValueError(f"{node.name} is told what the suite does not write")
        if constants.issuperset(name for name in node.input if name):  # an optional input may be left out
            if node.op_type not in OF_CONSTANTS:
                raise ValueError(f"{node.name} computes from constants alone")
            constants.update(node.output)
    _check_sizes(graph, constants, model.opset_import)


def _check_stored(constant: onnx.TensorProto) -> None:
    """Raise ValueError unless a tensor's values lie in the graph itself, as many as its shape says, and are finite."""
    if constant.external_data or len(constant.raw_data) != constant_bytes(constant):
        raise ValueError(f"{constant.name} is not stored as its shape says")
    if not _is_finite(constant):
        raise ValueError(f"{constant.name} holds what is no finite number")


def _check_sparse(sparse: onnx.SparseTensorProto) -> None:
    """Raise ValueError unless a constant's values have one place each, in its shape, which is in proportion to them."""
    values, indices, name = sparse.values, sparse.indices, sparse.values.name
    if values.data_type not in MAY_BE_SPARSE or indices.data_type != TensorProto.INT64:
        raise ValueError(f"{name} is sparse, of types that the suite does not write so")
    _check_stored(values)
    _check_stored(indices)
    num_values = math.prod(values.dims)
    if not list(values.dims) == list(indices.dims) == [num_values]:
        raise ValueError(f"{name} has not one place for each of its values")
    if not sparse.dims or min(sparse.dims) < 1 or not is_in_proportion(sparse.dims, num_values):
        raise ValueError(f"{name} is out of proportion to the values that it stores")
    places = np.frombuffer(indices.raw_data, np.int64)
    if places[0] < 0 or places[-1] >= math.prod(sparse.dims) or not (places[1:] > places[:-1]).all():
        raise ValueError(f"{name} has values in no order, or outside its shape")


def _check_sizes(graph: onnx.GraphProto, constants: Collection[str], opsets: Iterable[onnx.OperatorSetIdProto]) -> None:
    """Raise ValueError where a result may hold more values per image than the file holds constants, or one of constants
    alone more than these.

    Each that a layer gives is one of its weights' dimensions wide, so that of sparse ones the largest counts beside
    the values stored; an MoE's K experts of an image have no more rows than all its experts have weights. Only windows,
    which share their weights, may make more of an image, up to a number that models keep to as well.
    """
    most = sum(
        math.prod(constant.dims) * WEIGHTS_OF_A_WORD.get(constant.data_type, 1) for constant in graph.initializer
    )
    most_of_constants = most + sum(math.prod(sparse.dims) for sparse in graph.sparse_initializer)
    most += sum(math.prod(sparse.values.dims) + max(sparse.dims) for sparse in graph.sparse_initializer)
    of_an_image = max(most, MAX_VALUES) if any(node.op_type in OF_WINDOWS for node in graph.node) else most
    pixels = _shape(graph.input[0], start=1)
    if pixels is None or min(pixels, default=0) < 1 or math.prod(pixels) > of_an_image:
        raise ValueError("an image may be of any size")
    sketch = helper.make_model(_sketch(graph, constants), opset_imports=list(opsets))
    inferred = onnx.shape_inference.infer_shapes(sketch, strict_mode=True, data_prop=True).graph
    shapes = {value.name: _shape(value) for value in [*inferred.value_info, *inferred.output]}
    stored = {constant.name: [*constant.dims] for constant in graph.initializer}
    stored |= {sparse.values.name: [*sparse.dims] for sparse in graph.sparse_initializer}
    for node in graph.node:
        if node.op_type == FUSED:
            _check_fused(node, shapes, stored)
        for name in filter(None, node.output):
            shape = shapes.get(name)
            size = None if shape is None else math.prod(shape)
            if size is None or size > (most_of_constants if name in constants else of_an_image * EVALUATION_BATCH):
                raise ValueError(f"{name} may be of any size")


def _shape(value: onnx.ValueInfoProto, start: int = 0) -> list[int] | None:
    """Of a tensor, from an axis on, where that is known."""
    dims = value.type.tensor_type.shape.dim[start:]
    return [dim.dim_value for dim in dims] if all(dim.HasField("dim_value") for dim in dims) else None


def _check_fused(node: onnx.NodeProto, shapes: Mapping[str, list[int] | None], stored: Mapping[str, list[int]]) -> None:
    """Raise ValueError unless the vendor's operator has all its weights from the file, and they fit what it gets.

    Its result then has the shape of its rows, and what it takes meanwhile is in proportion to its weights.
    """
    how = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if how.keys() != FUSED_SETTINGS or [place for place, name in enumerate(node.input) if name] not in FUSED_INPUTS:
        raise ValueError(f"{node.name} is told what the suite does not write")
    rows, logits, *weights_of_experts = (shapes.get(name) for name in (*node.input[:2], *node.input[14:]))
    if rows is None or logits is None or len(rows) != 2 or len(logits) != 2 or rows[0] != logits[0]:
        raise ValueError(f"{node.name} may be of any size")
    width, num_experts = rows[1], logits[1]
    if not all(isinstance(how[name], int) and how[name] > 0 for name in ("k", "expert_weight_bits", "block_size")):
        raise ValueError(f"{node.name} is told what the suite does not write")
    inside, bits = stored.get(node.input[4], [0])[-1], how["expert_weight_bits"]
    expected: list[list[float]] = []
    for inputs, outputs in ((width, inside), (inside, width)):
        expected += [[num_experts, outputs, inputs * part] for part in (bits / 8, 1 / how["block_size"])]
        expected.append([num_experts, outputs])
    if [stored.get(name) for name in node.input[2:8]] != expected:
        raise ValueError(f"{node.name} has weights that are no constants of the file, or do not fit")
    is_usual = bits in {8, 4} and 1 <= how["k"] <= num_experts and how["activation_type"] == b"relu"
    if not is_usual or weights_of_experts not in ([], [logits]):
        raise ValueError(f"{node.name} is told what the suite does not write")


def _sketch(graph: onnx.GraphProto, constants: Collection[str]) -> onnx.GraphProto:
    """A graph of the same shapes for one batch at most, from which all of them follow: without weights, and without
    what depends on how many rows an expert gets. Each is taken to get all.
    """
    sketch, kept = onnx.GraphProto(name="sketch"), {}
    pixels = sketch.input.add()
    pixels.CopyFrom(graph.input[0])
    pixels.type.tensor_type.shape.dim[0].dim_value = EVALUATION_BATCH
    sketch.output.append(helper.make_tensor_value_info(graph.output[0].name, TensorProto.FLOAT, None))
    for constant in graph.initializer:
        if constant.data_type == TensorProto.INT64 and math.prod(constant.dims) <= MAX_INDICES:
            sketch.initializer.add().CopyFrom(constant)
            kept[constant.name] = constant
        else:
            sketch.input.append(helper.make_tensor_value_info(constant.name, constant.data_type, constant.dims))
    for sparse in graph.sparse_initializer:
        values = sparse.values
        sketch.input.append(helper.make_tensor_value_info(values.name, values.data_type, sparse.dims))
    made_by = {name: node for node in graph.node for name in node.output}
    part: dict[str, set[str]] = {}  # which outputs of the Split a tensor comes from
    for node in graph.node:
        parts = {name: part.get(name, set()) for name in node.input}
        is_dispatch = node.op_type == "Split" and node.output[0] not in constants
        for name in node.output:
            part[name] = {name} if is_dispatch else set().union(*parts.values())
        same_size = node.input[:1]
        if node.op_type == "Concat" and any(parts.values()):
            if not all(len(found) == 1 for found in parts.values()) or len(part[node.output[0]]) != len(node.input):
                raise ValueError(f"{node.name} does not join what was split")
        elif node.op_type == "Range":
            same_size = _counted(node, made_by, kept)
        elif not is_dispatch and node.op_type != FUSED and not (node.op_type == "TopK" and node.input[1] not in kept):
            sketch.node.add().CopyFrom(node)
            continue
        for name in node.output:
            sketch.node.append(helper.make_node("Identity", same_size, [name]))
    return sketch


def _counted(node: onnx.NodeProto, made_by: dict[str, onnx.NodeProto], kept: dict[str, onnx.TensorProto]) -> list[str]:
    """The vector whose places a Range counts.

    Raises:
        ValueError: it counts something else.
    """
    start, end, step = node.input
    squeeze = made_by.get(end)
    shape = made_by.get(squeeze.input[0]) if squeeze is not None and squeeze.op_type == "Squeeze" else None
    by_one = [numpy_helper.to_array(kept[name]).tolist() for name in (start, step) if name in kept] == [0, 1]
    if shape is None or shape.op_type != "Shape" or not by_one:
        raise ValueError(f"{node.name} may be of any size")
    return list(shape.input)


def _is_finite(constant: onnx.TensorProto) -> bool:
    """Whether all exponents of floating-point values are below the largest, which infinity and NaN have."""
    if constant.data_type == TensorProto.FLOAT:
        return bool(np.isfinite(np.frombuffer(constant.raw_data, np.float32)).all())
    if constant.data_type == TensorProto.BFLOAT16:
        return bool((np.frombuffer(constant.raw_data, np.uint16) & 0x7F80 != 0x7F80).all())
    return True
