"""Products of an FP32 graph, with their weights in few bits.

Of fewer than 8 bits and one scale an output, products are integer ones: rows are rounded to 8 bits as they come, and
the scales follow, as in INT8. Of 8 bits, or with a scale for each group of inputs, a weight goes through
`DequantizeLinear` into its product. ONNX Runtime makes one product of the two (`MatMulNBits`), which takes rows in
float and weights of 8 or 4 bits; it is slower at all but a few rows.

In small students nodes take more bytes than weights: these become floats when the file is loaded, for the convolutions
and products that are there already.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from mnist_lab.compress.few_bits import (
    IR_VERSION,
    OPSET,
    FewBits,
    add_weights,
    is_small_student,
    make_node,
    shorten_names,
)
from mnist_lab.compress.int8 import round_before_sorting
from mnist_lab.compress.levels import Rounded, Rounding
from mnist_lab.measure import Array

ZERO = "zero"
Plan = Mapping[str, Rounding]  # by product


def products_of(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The products with weights of an FP32 graph, by name."""
    constants = {constant.name for constant in model.graph.initializer}
    return {
        node.name: node
        for node in model.graph.node
        if node.op_type in {"Conv", "Gemm", "MatMul"} and node.input[1] in constants
    }


def weight_of(model: onnx.ModelProto, node: onnx.NodeProto) -> Array:
    """Of a product (I, O); the inputs of windows are all that one sees."""
    stored = next(constant for constant in model.graph.initializer if constant.name == node.input[1])
    weight: Array = numpy_helper.to_array(stored)
    return weight.reshape(len(weight), -1).T if node.op_type == "Conv" else weight


def put_in(model: onnx.ModelProto, plan: Plan, rounded: Mapping[str, Rounded]) -> None:
    """Replace products' weights by rounded ones, so that ONNX Runtime makes products of few bits of them, or of a small
    student's floats; in place.
    """
    graph = model.graph
    in_float = is_small_student(graph)
    shapes = {constant.name: tuple(constant.dims) for constant in graph.initializer} if in_float else {}
    weights = {
        node.name: FewBits(node.input[1], plan[node.name].bits, rounded[node.name], shapes.get(node.input[1]))
        for node in graph.node
        if node.name in plan
    }
    dequantized = not all(weight.is_integer or weight.is_float for weight in weights.values())
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        # ONNX Runtime 1.32 may join a Relu to a product in float, before it sees that its weights are dequantized.
        if node.op_type == "Relu" and dequantized:
            node.op_type = "Max"
            node.input.append(ZERO)
        replaced = node.name in weights and not in_float
        nodes += _product(node, weights[node.name]) if replaced else [node]
    gone = {weight.name for weight in weights.values()}
    constants = [constant for constant in graph.initializer if constant.name not in gone]
    if any(ZERO in node.input for node in nodes):
        constants.append(numpy_helper.from_array(np.zeros(1, np.float32), ZERO))
    del graph.node[:], graph.initializer[:]
    graph.node.extend(quantize_once(nodes))
    graph.initializer.extend(constants)
    round_before_sorting(graph)
    add_weights(graph, weights.values())
    shorten_names(graph)
    model.opset_import[0].version, model.ir_version = OPSET, IR_VERSION


def _product(node: onnx.NodeProto, weight: FewBits) -> Iterator[onnx.NodeProto]:
    """A product of few bits, and a sum where it has a bias."""
    rows, _, *bias = node.input
    (output,) = node.output
    product = f"{output}.product" if bias else output
    yield from (
        _integer_product(rows, weight, product)
        if weight.is_integer
        else [make_node("MatMul", [rows, weight.name], product)]
    )
    if bias:
        yield make_node("Add", [product, *bias], output)


def _integer_product(rows: str, weight: FewBits, product: str) -> Iterator[onnx.NodeProto]:
    """Of rows that are rounded to 8 bits as they come: (x/s − z)·q, times s and the weight's scales."""
    integers, scale, zero = (f"{rows}_{part}" for part in ("quantized", "scale", "zero_point"))
    yield make_node("DynamicQuantizeLinear", [rows], integers, scale, zero)
    zeros = [] if weight.rounded.zeros is None else [f"{weight.name}.zero"]
    yield make_node("MatMulInteger", [integers, f"{weight.name}.int8", zero, *zeros], f"{product}.int32")
    yield make_node("Cast", [f"{product}.int32"], f"{product}.float", to=TensorProto.FLOAT)
    yield make_node("Mul", [scale, f"{weight.name}.scale"], f"{product}.scale")
    yield make_node("Mul", [f"{product}.float", f"{product}.scale"], product)


def quantize_once(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Those that quantize rows but once for all products that take them."""
    seen: set[str] = set()
    for node in nodes:
        if node.op_type != "DynamicQuantizeLinear" or node.name not in seen:
            yield node
        seen.add(node.name)
