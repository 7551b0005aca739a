"""Graphs that run a model's few-bit weights in ways that the suite's own file does not.

All have the logits of `as_float`, but for how the engine rounds what goes into a product.

Shapes: O outputs, N blocks of inputs of an output, S bytes of a block.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from mnist_lab.compress.few_bit_products import Plan, products_of, put_in, weight_of
from mnist_lab.compress.few_bits import FewBits
from mnist_lab.compress.levels import LARGEST_GROUP, SMALLEST_GROUP, Rounded, Rounding
from mnist_lab.compress.weight_only import round_weight, uniform_plan
from mnist_lab.deploy.artifacts import save_onnx
from mnist_lab.deploy.onnx import build_onnx, graph_metadata
from mnist_lab.measure import Array
from mnist_lab.models import Model


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
    save_onnx(graph, file, graph_metadata(weights.model))


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


def drop_unused(graph: onnx.GraphProto) -> None:
    """The constants that no node takes."""
    used = {name for node in graph.node for name in node.input}
    kept = [constant for constant in graph.initializer if constant.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
