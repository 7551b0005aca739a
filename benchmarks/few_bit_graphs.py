"""Graphs that run a model's few-bit weights in ways that the suite's own file does not.

All have the logits of `as_float`, but for how the engine rounds what goes into a product.

Shapes: O outputs, N blocks of inputs of an output, S bytes of a block.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from mnist_lab.compress.few_bits import IR_VERSION, OPSET, FewBits, add_weights
from mnist_lab.compress.int8 import needs_reduced_range, quantize
from mnist_lab.compress.levels import LARGEST_GROUP, SMALLEST_GROUP, Rounded, Rounding
from mnist_lab.compress.weight_only import Plan, products_of, put_in, round_weight, uniform_plan, weight_of
from mnist_lab.deploy.artifacts import read_onnx, save_onnx
from mnist_lab.deploy.onnx import build_onnx, layout_metadata
from mnist_lab.measure import Array
from mnist_lab.models import Model
from mnist_lab.runtimes import FLOAT_PRODUCTS


class Weights(NamedTuple):
    """A model, and its products' weights in few bits: to the nearest, as speed does not depend on it."""

    model: Model
    plan: Plan
    rounded: Mapping[str, Rounded]  # by product

    def stored(self) -> list[FewBits]:
        """By the names of the FP32 graph's constants."""
        products = products_of(build_onnx(self.model))
        return [FewBits(products[name].input[1], self.plan[name].bits, self.rounded[name]) for name in self.plan]


def round_all(model: Model, rounding: Rounding) -> Weights:
    graph = build_onnx(model)
    plan, products = uniform_plan(graph, rounding, None), products_of(graph)
    rounded = {name: round_weight(weight_of(graph, products[name]), own, None) for name, own in plan.items()}
    return Weights(model, plan, rounded)


def as_file(weights: Weights, file: Path) -> None:
    """As the suite writes them."""
    graph = build_onnx(weights.model)
    put_in(graph, weights.plan, weights.rounded)
    save_onnx(graph, file, layout_metadata(weights.model))


def as_float(weights: Weights) -> onnx.ModelProto:
    """The FP32 graph of these weights."""
    graph = build_onnx(weights.model)
    values = {weight.name: weight.rounded.dequantize() for weight in weights.stored()}
    for constant in graph.graph.initializer:
        if constant.name in values:
            constant.CopyFrom(numpy_helper.from_array(values[constant.name], constant.name))
    return graph


def as_nbits(weights: Weights, accuracy_level: int) -> onnx.ModelProto:
    """With ONNX Runtime's own operator as the products, in blocks of the weights' groups."""
    model = build_onnx(weights.model)
    for node in model.graph.node:
        if node.name not in weights.plan:
            continue
        rows, weight, bias = node.input
        rounded, bits = weights.rounded[node.name], int(weights.plan[node.name].bits)
        packed_ONS, scales_ON = pack_blocks(rounded, bits)
        model.graph.initializer.append(numpy_helper.from_array(packed_ONS, f"{weight}.q"))
        model.graph.initializer.append(numpy_helper.from_array(scales_ON, f"{weight}.scale"))
        product = helper.make_node(
            "MatMulNBits",
            [rows, f"{weight}.q", f"{weight}.scale", "", "", bias],
            node.output,
            name=node.name,
            domain="com.microsoft",
            K=rounded.integers.shape[0],
            N=rounded.integers.shape[1],
            bits=bits,
            block_size=packed_ONS.shape[2] * 8 // bits,
            accuracy_level=accuracy_level,
        )
        node.CopyFrom(product)
    drop_unused(model.graph)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def pack_blocks(rounded: Rounded, bits: int) -> tuple[npt.NDArray[np.uint8], Array]:
    """Integers (O, N, bytes of a block) and scales (O, N) of weights without zero points, as MatMulNBits takes them.

    A weight is stored with 2^(bits − 1) added, the first of a byte in its lowest bits; blocks are filled up with zeros.
    A group is a block, or as many as it takes where it is larger than they can be.
    """
    num_inputs, num_outputs = rounded.integers.shape
    block_size = min(max(SMALLEST_GROUP, 1 << (rounded.group_size - 1).bit_length()), LARGEST_GROUP)
    num_blocks = math.ceil(num_inputs / block_size)
    filled = np.zeros((num_blocks * block_size, num_outputs), np.int64)
    filled[:num_inputs] = rounded.integers
    by_byte = (filled.T + 2 ** (bits - 1)).reshape(num_outputs, num_blocks, -1, 8 // bits)
    packed = (by_byte << np.arange(0, 8, bits)).sum(axis=-1).astype(np.uint8)
    scales = np.repeat(rounded.scales, math.ceil(rounded.group_size / block_size), axis=0)[:num_blocks]
    return packed, np.ascontiguousarray(scales.T)


def as_dynamic_int8(weights: Weights) -> onnx.ModelProto:
    """Unpacked to INT8 when the file is loaded, for integer products with rows that are quantized as they come."""
    model = build_onnx(weights.model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes += _integer_product(node) if node.name in weights.plan else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return _unpack_to_int8(model, weights)


def _integer_product(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    rows, weight, bias = node.input
    name = node.name
    yield helper.make_node("DynamicQuantizeLinear", [rows], [f"{name}.rows", f"{name}.scale", f"{name}.zero"])
    yield helper.make_node("MatMulInteger", [f"{name}.rows", f"{weight}.int8", f"{name}.zero"], [f"{name}.int32"])
    yield helper.make_node("Cast", [f"{name}.int32"], [f"{name}.cast"], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [f"{name}.scale", f"{weight}.scale"], [f"{name}.scales"])
    yield helper.make_node("Mul", [f"{name}.cast", f"{name}.scales"], [f"{name}.product"])
    yield helper.make_node("Add", [f"{name}.product", bias], node.output, name=name)


def as_static_int8(weights: Weights, calibration: Array, folder: Path) -> onnx.ModelProto:
    """Unpacked to INT8 when the file is loaded, for the integer products of static mode."""
    dense, static = folder / "few-float.onnx", folder / "few-static.onnx"
    save_onnx(as_float(weights), dense, layout_metadata(weights.model))
    quantize(
        dense,
        static,
        mode="static",
        calibration=calibration,
        keep_float=FLOAT_PRODUCTS,
        reduced_range=needs_reduced_range(),
        metadata=layout_metadata(weights.model),
    )
    model = read_onnx(static)
    constants = {constant.name: constant for constant in model.graph.initializer}
    for name, node in products_of(build_onnx(weights.model)).items():
        if name in weights.plan:
            _take_scales(constants, node.input[1], node.input[2], weights.rounded[name].scales[0])
    integers = {f"{weight.name}_quantized": f"{weight.name}.int8" for weight in weights.stored()}
    for node in model.graph.node:
        if node.input[0] in integers:
            node.input[0] = integers[node.input[0]]
    return _unpack_to_int8(model, weights)


def _take_scales(constants: Mapping[str, TensorProto], weight: str, bias: str, scales_O: Array) -> None:
    """Of the few-bit weights, in place of the converter's 8-bit ones: for the bias they are multiplied by the rows'."""
    names = f"{weight}_scale", f"{bias}_quantized_scale", f"{bias}_quantized"
    before_O, of_bias_O, bias_O = (numpy_helper.to_array(constants[name]) for name in names)
    ratio_O = scales_O / before_O
    replaced = scales_O, of_bias_O * ratio_O, np.rint(bias_O / ratio_O).astype(np.int32)
    for name, value in zip(names, replaced, strict=True):
        constants[name].CopyFrom(numpy_helper.from_array(value, name))


def _unpack_to_int8(model: onnx.ModelProto, weights: Weights) -> onnx.ModelProto:
    """The weights' integers as `NAME.int8`, made of the few bits that the suite's file has, and scales `NAME.scale`."""
    stored = weights.stored()
    add_weights(model.graph, stored)
    names = {weight.name for weight in stored}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.output[0] in names:
            (name,) = node.output
            node.CopyFrom(helper.make_node("Cast", node.input[:1], [f"{name}.int8"], to=TensorProto.INT8))
    drop_unused(model.graph)
    model.opset_import[0].version, model.ir_version = OPSET, IR_VERSION
    return model


def drop_unused(graph: onnx.GraphProto) -> None:
    """The constants that no node takes."""
    used = {name for node in graph.node for name in node.input}
    kept = [constant for constant in graph.initializer if constant.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
