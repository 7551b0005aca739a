"""Checkpoint -> one ONNX file: standard operators, weights inside, raw pixels in, logits out.

The normalisation is folded into the first layer. The sparse MoE is dispatched as in
`models/moe.py`: pairs sorted by expert, one product per expert on its rows, scattered back.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from mnist_lab.artifacts import set_onnx_metadata
from mnist_lab.data import NUM_CLASSES
from mnist_lab.files import write_atomically
from mnist_lab.measure import Array
from mnist_lab.models.ffn import FFN, Normalize
from mnist_lab.models.moe import SparseMoE

OPSET = 17
IR_VERSION = 8  # the oldest that has this opset: older runtimes can read the file
ROUTER, COMBINE = "router", "combine"
# Products that stay in float: the router decides routes, and the combination is a weighted sum of K rows.
FLOAT_PRODUCTS = (ROUTER, COMBINE)


def export_onnx(model: FFN | SparseMoE, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write `model` to `path` as an ONNX model: float32 `pixels` (batch, 1, 28, 28) -> `logits` (batch, C).

    Raises:
        UserError: the folder cannot be written.
    """
    graph = _Graph()
    graph.add("Flatten", ["pixels"], "flat_pixels")
    if isinstance(model, SparseMoE):
        _add_moe(graph, model, "flat_pixels")
    else:
        weights = _layer_weights(model.layers)
        weights[0] = _fold_normalization(model.normalize, *weights[0])
        _add_layers(graph, "fc", weights, "flat_pixels")
    proto = graph.to_model(metadata)
    write_atomically(path, lambda temporary: onnx.save(proto, temporary))


class _Graph:
    """Nodes and initializers in the making. A node is named after its (first) output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def constant(self, name: str, value: Array | int | list[int]) -> str:
        array = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def gemm(self, name: str, rows: str, weight: Array, bias: Array) -> str:
        inputs = [rows, self.constant(f"{name}.weight", weight), self.constant(f"{name}.bias", bias)]
        return self.add("Gemm", inputs, name)

    def to_model(self, metadata: Mapping[str, Any]) -> onnx.ModelProto:
        pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 1, 28, 28])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", NUM_CLASSES])
        graph = helper.make_graph(self.nodes, "mnist_lab", [pixels], [logits], self.initializers)
        model = helper.make_model(
            graph,
            producer_name="mnist_lab",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        set_onnx_metadata(model, metadata)
        onnx.checker.check_model(model)
        return model


def _add_layers(graph: _Graph, name: str, weights: list[tuple[Array, Array]], rows: str) -> str:
    """Gemm layers with ReLU between them; the last one gives the logits."""
    for index, (weight, bias) in enumerate(weights[:-1]):
        rows = graph.add("Relu", [graph.gemm(f"{name}{index}", rows, weight, bias)], f"{name}{index}.relu")
    return graph.gemm("logits", rows, *weights[-1])


def _add_moe(graph: _Graph, model: SparseMoE, rows: str) -> str:
    num_experts, top_k = model.config.routing.num_experts, model.config.routing.top_k
    experts, output_width = model.experts, model.config.output_width
    stem = _fold_normalization(model.normalize, *_layer_weights([model.stem])[0])
    hidden = graph.add("Relu", [graph.gemm("stem", rows, *stem)], "hidden")

    router_logits = graph.add("MatMul", [hidden, graph.constant("router.gate", _array(model.router.gate))], ROUTER)
    graph.add("TopK", [router_logits, graph.constant("top_k", [top_k])], "top_logits", "top_experts", axis=-1)
    weights = graph.add("Softmax", ["top_logits"], "expert_weights", axis=-1)

    # Pair p is (image p // K, its (p % K)-th expert). NonZero lists the pairs of one expert in batch order.
    vector = graph.constant("vector_shape", [-1])
    k = graph.constant("k", top_k)
    expert_of_pair = graph.add("Reshape", ["top_experts", vector], "expert_of_pair")
    pairs, outputs = [], []
    for index in range(num_experts):
        name = f"expert{index}"
        chosen = graph.add("Equal", [expert_of_pair, graph.constant(f"{name}.id", index)], f"{name}.chosen")
        own_pairs = graph.add("Reshape", [graph.add("NonZero", [chosen], f"{name}.nonzero"), vector], f"{name}.pairs")
        image = graph.add("Div", [own_pairs, k], f"{name}.image")
        own_rows = graph.add("Gather", [hidden, image], f"{name}.rows", axis=0)
        inner = graph.gemm(f"{name}.in", own_rows, _array(experts.weight_in[index]), _array(experts.bias_in[index]))
        inner = graph.add("Relu", [inner], f"{name}.relu")
        pairs.append(own_pairs)
        outputs.append(
            graph.gemm(f"{name}.out", inner, _array(experts.weight_out[index]), _array(experts.bias_out[index]))
        )
    sorted_rows = graph.add("Concat", outputs, "sorted_rows", axis=0)
    sorted_pairs = graph.add("Concat", pairs, "sorted_pairs", axis=0)

    # Every pair occurs once, so scattering the sorted rows overwrites all of them.
    place = graph.add("Unsqueeze", [sorted_pairs, graph.constant("last_axis", [1])], "place")
    pair_rows = graph.add("ScatterND", [sorted_rows, place, sorted_rows], "pair_rows")
    by_image = graph.add(
        "Reshape", [pair_rows, graph.constant("by_image_shape", [-1, top_k, output_width])], "by_image"
    )
    as_row = graph.add("Unsqueeze", [weights, graph.constant("middle_axis", [1])], "weights_as_row")
    mixed = graph.add("MatMul", [as_row, by_image], COMBINE)
    mixed = graph.add("Reshape", [mixed, graph.constant("mixed_shape", [-1, output_width])], "mixed")
    mixed = graph.add("Relu", [mixed], "mixed.relu")
    return _add_layers(graph, "head", _layer_weights(model.head), mixed)


def _fold_normalization(normalize: Normalize, weight: Array, bias: Array) -> tuple[Array, Array]:
    """Weights (784, D) for raw pixels: W/std and b − (mean/std)·ΣW, computed in float64."""
    mean, std = float(normalize.mean), float(normalize.std)
    exact = weight.astype(np.float64) / std
    return exact.astype(np.float32), (bias - mean * exact.sum(axis=0)).astype(np.float32)


def _layer_weights(layers: Iterable[nn.Module]) -> list[tuple[Array, Array]]:
    """Weight (inputs, outputs) and bias of each linear layer."""
    return [
        (np.ascontiguousarray(_array(layer.weight).T), _array(layer.bias))
        for layer in layers
        if isinstance(layer, nn.Linear)
    ]


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().cpu().numpy()
    return array
