"""Checkpoint -> one ONNX file: standard operators, weights inside, raw pixels in, logits out.

The normalisation is folded into the first layer. The MoE has two forms with the same logits:
"sparse" sorts the (image, expert) pairs by expert, as `models/moe.py` does, so that cost grows
with K; "dense" runs every expert on every image as two large products, and a gate of zeros and
weights between them keeps the chosen ones. The first computes less, the second moves less.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
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
Dispatch = Literal["sparse", "dense"]


def export_onnx(
    model: FFN | SparseMoE, path: Path, metadata: Mapping[str, Any], *, dispatch: Dispatch = "sparse"
) -> None:
    """Write `model` to `path` as an ONNX model: float32 `pixels` (batch, 1, 28, 28) -> `logits` (batch, C).

    Weights of a BF16 model are stored in BF16 and cast where they are used; an engine that is told to
    compute in BF16 drops the casts.

    Args:
        dispatch: the form of the MoE; a dense model has only one.

    Raises:
        UserError: the folder cannot be written.
    """
    graph = _Graph(weight_type=next(model.parameters()).dtype)
    graph.add("Flatten", ["pixels"], "flat_pixels")
    if isinstance(model, SparseMoE):
        _add_moe(graph, model, "flat_pixels", dispatch)
    else:
        weights = _layer_weights(model.layers)
        weights[0] = _fold_normalization(model.normalize, *weights[0])
        _add_layers(graph, "fc", weights, "flat_pixels")
    proto = graph.to_model(metadata)
    write_atomically(path, lambda temporary: onnx.save(proto, temporary))


class _Graph:
    """Nodes and initializers in the making. A node is named after its (first) output."""

    def __init__(self, weight_type: torch.dtype) -> None:
        self.weight_type = weight_type
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def constant(self, name: str, value: Array | int | list[int]) -> str:
        array = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, value: Array) -> str:
        if self.weight_type != torch.bfloat16:
            return self.constant(name, value)
        stored = torch.from_numpy(value).bfloat16().view(torch.uint8).numpy().tobytes()
        self.initializers.append(
            helper.make_tensor(f"{name}.bf16", TensorProto.BFLOAT16, value.shape, stored, raw=True)
        )
        return self.add("Cast", [f"{name}.bf16"], name, to=TensorProto.FLOAT)

    def gemm(self, name: str, rows: str, weight: Array, bias: Array) -> str:
        inputs = [rows, self.weight(f"{name}.weight", weight), self.weight(f"{name}.bias", bias)]
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


def _add_moe(graph: _Graph, model: SparseMoE, rows: str, dispatch: Dispatch) -> str:
    stem = _fold_normalization(model.normalize, *_layer_weights([model.stem])[0])
    hidden = graph.add("Relu", [graph.gemm("stem", rows, *stem)], "hidden")
    router_logits = graph.add("MatMul", [hidden, graph.weight("router.gate", _array(model.router.gate))], ROUTER)
    top_k = graph.constant("top_k", [model.config.routing.top_k])
    graph.add("TopK", [router_logits, top_k], "top_logits", "top_experts", axis=-1)
    graph.add("Softmax", ["top_logits"], "expert_weights", axis=-1)
    mixed = (_add_sparse_dispatch if dispatch == "sparse" else _add_dense_dispatch)(graph, model, hidden)
    return _add_layers(graph, "head", _layer_weights(model.head), graph.add("Relu", [mixed], "mixed.relu"))


def _add_sparse_dispatch(graph: _Graph, model: SparseMoE, hidden: str) -> str:
    """Sort the pairs by expert, split the rows, one product per expert, put back, weighted sum.

    Pair p is (image p // K, its (p % K)-th expert).
    """
    num_experts, top_k = model.config.routing.num_experts, model.config.routing.top_k
    experts, output_width = model.experts, model.config.output_width
    expert_of_pair = graph.add("Reshape", ["top_experts", graph.constant("vector_shape", [-1])], "expert_of_pair")
    num_pairs = graph.add("Shape", [expert_of_pair], "num_pairs")
    ones = graph.add("Expand", [graph.constant("one", [1]), num_pairs], "ones")
    no_load = graph.constant("no_load", [0] * num_experts)
    load = graph.add("ScatterElements", [no_load, expert_of_pair, ones], "load", axis=0, reduction="add")
    graph.add("TopK", [expert_of_pair, num_pairs], "sorted_experts", "order", axis=0, largest=0)
    image = graph.add("Div", ["order", graph.constant("k", top_k)], "image")
    sorted_rows = graph.add("Gather", [hidden, image], "sorted_rows", axis=0)
    own_rows = [f"expert{index}.rows" for index in range(num_experts)]
    graph.add("Split", [sorted_rows, load], *own_rows, axis=0)
    outputs = []
    for index, rows in enumerate(own_rows):
        name = f"expert{index}"
        inner = graph.gemm(f"{name}.in", rows, _array(experts.weight_in[index]), _array(experts.bias_in[index]))
        inner = graph.add("Relu", [inner], f"{name}.relu")
        outputs.append(
            graph.gemm(f"{name}.out", inner, _array(experts.weight_out[index]), _array(experts.bias_out[index]))
        )
    sorted_outputs = graph.add("Concat", outputs, "sorted_outputs", axis=0)

    end = graph.add("Squeeze", [num_pairs], "end")
    pairs = graph.add("Range", [graph.constant("start", 0), end, graph.constant("step", 1)], "pairs")
    place = graph.add("ScatterElements", ["order", "order", pairs], "place", axis=0)  # the inverse permutation
    place = graph.add("Reshape", [place, graph.constant("by_image_shape", [-1, top_k])], "place_by_image")
    by_image = graph.add("Gather", [sorted_outputs, place], "by_image", axis=0)
    as_row = graph.add("Unsqueeze", ["expert_weights", graph.constant("middle_axis", [1])], "weights_as_row")
    mixed = graph.add("MatMul", [as_row, by_image], COMBINE)
    return graph.add("Reshape", [mixed, graph.constant("mixed_shape", [-1, output_width])], "mixed")


def _add_dense_dispatch(graph: _Graph, model: SparseMoE, hidden: str) -> str:
    """Σ g_e·(relu(h·W_e + b_e)·V_e + c_e) as two products over all experts: g is 0 where an expert was not chosen."""
    num_experts, experts = model.config.routing.num_experts, model.experts
    no_gates = graph.add("Sub", [ROUTER, ROUTER], "no_gates")
    gates = graph.add("ScatterElements", [no_gates, "top_experts", "expert_weights"], "gates", axis=1)
    weight_in = _array(experts.weight_in.transpose(0, 1).flatten(1))  # (D, E·H)
    inner = graph.gemm("experts.in", hidden, weight_in, _array(experts.bias_in.flatten()))
    inner = graph.add("Relu", [inner], "experts.relu")
    by_expert = graph.constant("by_expert_shape", [-1, num_experts, model.config.expert_width])
    inner = graph.add("Reshape", [inner, by_expert], "by_expert")
    as_column = graph.add("Unsqueeze", [gates, graph.constant("last_axis", [2])], "gates_as_column")
    gated = graph.add("Mul", [inner, as_column], "gated")
    all_widths = graph.constant("all_widths", [-1, num_experts * model.config.expert_width])
    gated = graph.add("Reshape", [gated, all_widths], "gated_rows")
    weight_out = graph.weight("experts.out.weight", _array(experts.weight_out.flatten(0, 1)))  # (E·H, O)
    output = graph.add("MatMul", [gated, weight_out], "experts.out")
    bias = graph.add("MatMul", [gates, graph.weight("experts.out.bias", _array(experts.bias_out))], COMBINE)
    return graph.add("Add", [output, bias], "mixed")


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
    array: Array = tensor.detach().float().cpu().numpy()
    return array
