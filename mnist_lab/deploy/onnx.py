"""A model -> one ONNX file: standard operators, weights inside, raw pixels in, logits out.

The normalisation is folded into the first layer; windows are convolutions. The MoE has two layouts with the same
logits: "sparse" sorts the (image, expert) pairs by expert, as `models/moe.py` does, so that cost grows with K; "dense"
runs every expert on every image as two large products, and a gate of zeros and weights between them keeps the chosen
ones. The first computes less, the second moves less. Which one a file gets does not depend on the machine: the same
model gives the same bytes. Experts with a shared base have a layout of their own, "shared", that multiplies with each
base once an image, and with the small additions of every expert.

Shapes: B images, P pixels, k of them a side of a window, D model width, H expert width, O expert output width,
E experts, K experts per image, N = B·K (image, expert) pairs, n of one expert, C classes, R rank. In the graph weights
are (inputs, outputs), those of windows (outputs, inputs, k, k).
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from mnist_lab.data import DataSpec
from mnist_lab.deploy.artifacts import INTERFACE, save_onnx
from mnist_lab.deploy.card import Interface
from mnist_lab.deploy.sparse import graph_bytes, store_sparsely
from mnist_lab.measure import Array
from mnist_lab.models import Model
from mnist_lab.models.ffn import FFN, Normalize, find_planes, linear_layers
from mnist_lab.models.moe import SharedBaseExperts, SparseMoE, SparseMoEConfig
from mnist_lab.runtimes import COMBINE, COMBINE_BIASES, ROUTER

OPSET = 17
IR_VERSION = 8  # the oldest that has this opset: older runtimes can read the file
Layout = Literal["sparse", "dense", "shared"]


def choose_layout(config: SparseMoEConfig) -> Layout:
    """The faster one as a rule: sorting the pairs saves nothing where every image visits every expert."""
    if config.shared_rank is not None:
        return "shared"
    is_even = config.expert_widths is None
    return "dense" if is_even and config.routing.top_k == config.routing.num_experts else "sparse"


def write_onnx(model: Model, path: Path, metadata: Mapping[str, Any], *, layout: Layout | None = None) -> None:
    """Write the graph of `build_onnx` with `metadata` (anything JSON can hold) and `graph_metadata` to `path`.

    Raises:
        RunFailed: the folder cannot be written.
    """
    save_onnx(build_onnx(model, layout=layout), path, {**metadata, **graph_metadata(model, layout)})


def graph_metadata(model: Model, layout: Layout | None = None) -> dict[str, Any]:
    """What an artifact says of its graph: what goes in and comes out, and of an MoE its layout."""
    own = {"layout": {"name": layout or choose_layout(model.config)}} if isinstance(model, SparseMoE) else {}
    return {INTERFACE: asdict(interface_of(model.config.data)), **own}


def interface_of(data: DataSpec) -> Interface:
    """What models of some data take and give."""
    return Interface(data.class_names, data.image_size, data.polarity)


def build_onnx(model: Model, *, layout: Layout | None = None) -> onnx.ModelProto:
    """`model` as an ONNX model: float32 `pixels` (batch, 1, height, width) -> `logits` (batch, C).

    BF16 weights are stored in BF16 and cast where they are used; an engine that is told to compute in BF16 drops the
    casts.

    Args:
        layout: of the MoE, that of `choose_layout` when not given; a dense model has only one.
    """
    graph, pool = _Graph(model.config.data), model.config.pool
    pixels = "pixels"
    if pool > 1:
        how = {"kernel_shape": [pool, pool], "strides": [pool, pool]}
        pixels = graph.add("AveragePool", [pixels], "pooled_pixels", **how)
    if isinstance(model, SparseMoE):
        rows = graph.add("Flatten", [pixels], "flat_pixels")  # (B, P)
        _add_moe(graph, model, rows, layout or choose_layout(model.config))
    else:
        layers = _layers(linear_layers(model.layers))
        layers[0] = _fold_normalization(model.normalize, layers[0])
        planes = _add_windows(graph, model, layers, pixels)
        rows = graph.add("Flatten", [planes], "flat_pixels")
        _add_layers(graph, "fc", layers[len(model.config.windows) :], rows)
    return graph.to_model()


def stored_bytes(model: Model) -> int:
    """Bytes of the constants of a model's artifact."""
    graph = build_onnx(model).graph
    store_sparsely(graph)
    return graph_bytes(graph)


class _Layer(NamedTuple):
    """A linear layer's arrays, and the precision that they are stored in."""

    weight: Array  # (inputs, outputs)
    bias: Array  # (outputs,)
    dtype: torch.dtype


class _Graph:
    """Nodes and initializers in the making. A node is named after its (first) output."""

    def __init__(self, data: DataSpec) -> None:
        self.data = data
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def add(self, operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))
        return outputs[0]

    def constant(self, name: str, value: Array | int | list[int]) -> str:
        array = value if isinstance(value, np.ndarray) else np.array(value, np.int64)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def weight(self, name: str, value: Array, dtype: torch.dtype) -> str:
        if dtype != torch.bfloat16:
            return self.constant(name, value)
        stored = torch.from_numpy(value).bfloat16().view(torch.uint8).numpy().tobytes()
        self.initializers.append(
            helper.make_tensor(f"{name}.bf16", TensorProto.BFLOAT16, value.shape, stored, raw=True)
        )
        return self.add("Cast", [f"{name}.bf16"], name, to=TensorProto.FLOAT)

    def gemm(self, name: str, rows: str, layer: _Layer) -> str:
        weight = self.weight(f"{name}.weight", layer.weight, layer.dtype)
        return self.add("Gemm", [rows, weight, self.weight(f"{name}.bias", layer.bias, layer.dtype)], name)

    def matmul(self, name: str, rows: str, weight: Tensor, *, stored_as: str = "") -> str:
        """Without a bias; a weight (inputs, outputs)."""
        constant = self.weight(stored_as or f"{name}.weight", _array(weight), weight.dtype)
        return self.add("MatMul", [rows, constant], name)

    def to_model(self) -> onnx.ModelProto:
        image_shape: list[str | int | None] = ["batch", 1, *self.data.image_size]
        pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, image_shape)
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", self.data.num_classes])
        graph = helper.make_graph(self.nodes, "mnist_lab", [pixels], [logits], self.initializers)
        model = helper.make_model(
            graph,
            producer_name="mnist_lab",
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
        )
        onnx.checker.check_model(model)
        return model


def _add_windows(graph: _Graph, model: FFN, layers: list[_Layer], planes: str) -> str:
    """Conv layers with ReLU behind each."""
    sees = find_planes(model.config.data, model.config.pool, model.config.windows)
    for index, (own, (channels, *_), layer) in enumerate(zip(model.config.windows, sees, layers, strict=False)):
        name = f"windows{index}"
        kernel = np.ascontiguousarray(layer.weight.T).reshape(own.channels, channels, own.size, own.size)
        weight = graph.weight(f"{name}.weight", kernel, layer.dtype)
        how = {"strides": [own.stride, own.stride]} if own.stride > 1 else {}
        conv = graph.add("Conv", [planes, weight, graph.weight(f"{name}.bias", layer.bias, layer.dtype)], name, **how)
        planes = graph.add("Relu", [conv], f"{name}.relu")  # (B, channels, height, width)
    return planes


def _add_layers(graph: _Graph, name: str, layers: list[_Layer], rows: str) -> str:
    """Gemm layers with ReLU between them; the last one gives the logits."""
    for index, layer in enumerate(layers[:-1]):
        rows = graph.add("Relu", [graph.gemm(f"{name}{index}", rows, layer)], f"{name}{index}.relu")  # (B, width)
    return graph.gemm("logits", rows, layers[-1])  # (B, C)


def _add_moe(graph: _Graph, model: SparseMoE, rows: str, layout: Layout) -> str:
    stem = _fold_normalization(model.normalize, _layers([model.stem])[0])
    hidden = graph.add("Relu", [graph.gemm("stem", rows, stem)], "hidden")  # (B, D)
    router_logits = graph.matmul(ROUTER, hidden, model.router.gate, stored_as="router.gate")  # (B, E)
    top_k = graph.constant("top_k", [model.config.routing.top_k])
    graph.add("TopK", [router_logits, top_k], "top_logits", "top_experts", axis=-1)  # (B, K) each
    if model.config.routing.weighed_over == "all":
        graph.add("Softmax", [router_logits], "router_probs", axis=-1)  # (B, E)
        # Not TopK of these: where rounding makes two equal, it might choose others than of the logits.
        graph.add("GatherElements", ["router_probs", "top_experts"], "expert_weights", axis=-1)  # (B, K)
    else:
        graph.add("Softmax", ["top_logits"], "expert_weights", axis=-1)  # (B, K)
    mixed = EXPERTS[layout](graph, model, hidden)  # (B, O)
    return _add_layers(graph, "head", _layers(model.head), graph.add("Relu", [mixed], "mixed.relu"))  # (B, C)


def _add_sparse_experts(graph: _Graph, model: SparseMoE, hidden: str) -> str:
    """Sort the pairs by expert, split the rows, one product per expert, put back, weighted sum.

    Pair p is (image p // K, its (p % K)-th expert).
    """
    num_experts, top_k = model.config.routing.num_experts, model.config.routing.top_k
    expert_of_pair = graph.add("Reshape", ["top_experts", graph.constant("vector_shape", [-1])], "expert_of_pair")  # N
    num_pairs = graph.add("Shape", [expert_of_pair], "num_pairs")  # (1,)
    ones = graph.add("Expand", [graph.constant("one", [1]), num_pairs], "ones")  # (N,)
    no_load = graph.constant("no_load", [0] * num_experts)
    load = graph.add("ScatterElements", [no_load, expert_of_pair, ones], "load", axis=0, reduction="add")  # (E,)
    graph.add("TopK", [expert_of_pair, num_pairs], "sorted_experts", "order", axis=0, largest=0)  # (N,) each
    image = graph.add("Div", ["order", graph.constant("k", top_k)], "image")  # (N,)
    sorted_rows = graph.add("Gather", [hidden, image], "sorted_rows", axis=0)  # (N, D)
    own_rows = [f"expert{index}.rows" for index in range(num_experts)]
    graph.add("Split", [sorted_rows, load], *own_rows, axis=0)  # (n, D) each
    outputs = []
    for index, (rows, own) in enumerate(zip(own_rows, model.experts.each(), strict=True)):
        name = f"expert{index}"
        inner = graph.gemm(f"{name}.in", rows, _layer(own.weight_in, own.bias_in))  # (n, H)
        inner = graph.add("Relu", [inner], f"{name}.relu")
        outputs.append(graph.gemm(f"{name}.out", inner, _layer(own.weight_out, own.bias_out)))  # (n, O)
    sorted_outputs = graph.add("Concat", outputs, "sorted_outputs", axis=0)  # (N, O)

    end = graph.add("Squeeze", [num_pairs], "end")
    pairs = graph.add("Range", [graph.constant("start", 0), end, graph.constant("step", 1)], "pairs")  # (N,)
    place = graph.add("ScatterElements", ["order", "order", pairs], "place", axis=0)  # (N,), the inverse permutation
    place = graph.add("Reshape", [place, graph.constant("by_image_shape", [-1, top_k])], "place_by_image")  # (B, K)
    by_image = graph.add("Gather", [sorted_outputs, place], "by_image", axis=0)  # (B, K, O)
    as_row = graph.add(
        "Unsqueeze", ["expert_weights", graph.constant("middle_axis", [1])], "weights_as_row"
    )  # (B, 1, K)
    mixed = graph.add("MatMul", [as_row, by_image], COMBINE)  # (B, 1, O)
    return graph.add("Reshape", [mixed, graph.constant("mixed_shape", [-1, model.config.output_width])], "mixed")


def _add_dense_experts(graph: _Graph, model: SparseMoE, hidden: str) -> str:
    """Σ g_e·(relu(h·W_e + b_e)·V_e + c_e) as two products over all experts: g is 0 where an expert was not chosen."""
    num_experts, experts = model.config.routing.num_experts, model.experts
    gates = _add_gates(graph)  # (B, E)
    weight_in = _array(experts.weight_in.transpose(0, 1).flatten(1))  # (D, E·H)
    layer_in = _Layer(weight_in, _array(experts.bias_in.flatten()), experts.weight_in.dtype)
    inner = graph.add("Relu", [graph.gemm("experts.in", hidden, layer_in)], "experts.relu")  # (B, E·H)
    by_expert = graph.constant("by_expert_shape", [-1, num_experts, model.config.expert_width])
    inner = graph.add("Reshape", [inner, by_expert], "by_expert")  # (B, E, H)
    as_column = graph.add("Unsqueeze", [gates, graph.constant("last_axis", [2])], "gates_as_column")  # (B, E, 1)
    gated = graph.add("Mul", [inner, as_column], "gated")  # (B, E, H)
    all_widths = graph.constant("all_widths", [-1, num_experts * model.config.expert_width])
    gated = graph.add("Reshape", [gated, all_widths], "gated_rows")  # (B, E·H)
    output = graph.matmul("experts.out", gated, experts.weight_out.flatten(0, 1))  # (B, O)
    biases = graph.matmul(COMBINE, gates, experts.bias_out, stored_as="experts.out.bias")  # (B, O)
    return graph.add("Add", [output, biases], "mixed")


def _add_shared_experts(graph: _Graph, model: SparseMoE, hidden: str) -> str:
    """Products with a base once an image, and with what each expert adds; those not chosen have weight 0."""
    experts, width = model.experts, model.config.expert_width
    assert isinstance(experts, SharedBaseExperts)
    num_experts, rank = experts.layer_in.left.shape[0], experts.layer_in.left.shape[2]
    gates = _add_gates(graph)  # (B, E)
    shared = graph.matmul("shared.in", hidden, experts.layer_in.base)  # (B, H)
    inners, lows = [], []
    for index, (bias, left_in, right_in, left_out) in enumerate(
        zip(experts.bias_in, experts.layer_in.left, experts.layer_in.right, experts.layer_out.left, strict=True)
    ):
        name = f"expert{index}"
        low = graph.matmul(f"{name}.low", hidden, left_in)  # (B, R)
        inner = graph.add("Add", [shared, graph.gemm(f"{name}.in", low, _layer(right_in, bias))], f"{name}.sum")
        inners.append(graph.add("Relu", [inner], f"{name}.relu"))  # (B, H)
        lows.append(graph.matmul(f"{name}.out", inners[-1], left_out))  # (B, R)

    by_expert_shape = graph.constant("by_expert_shape", [-1, num_experts, width])
    by_expert = graph.add("Reshape", [graph.add("Concat", inners, "inners", axis=1), by_expert_shape], "by_expert")
    as_row = graph.add("Unsqueeze", [gates, graph.constant("middle_axis", [1])], "gates_as_row")  # (B, 1, E)
    mixed = graph.add("MatMul", [as_row, by_expert], COMBINE)  # (B, 1, H)
    mixed = graph.add("Reshape", [mixed, graph.constant("mixed_shape", [-1, width])], "mixed_inners")  # (B, H)
    output = graph.matmul("shared.out", mixed, experts.layer_out.base)  # (B, O)

    low_shape = graph.constant("low_shape", [-1, num_experts, rank])
    low = graph.add("Reshape", [graph.add("Concat", lows, "lows", axis=1), low_shape], "lows_by_expert")  # (B, E, R)
    as_column = graph.add("Unsqueeze", [gates, graph.constant("last_axis", [2])], "gates_as_column")  # (B, E, 1)
    gated = graph.add("Mul", [low, as_column], "gated")
    gated = graph.add("Reshape", [gated, graph.constant("all_ranks", [-1, num_experts * rank])], "gated_rows")
    low = graph.matmul("experts.out", gated, experts.layer_out.right.flatten(0, 1))  # (B, O)
    bias_out = graph.matmul(COMBINE_BIASES, gates, experts.bias_out, stored_as="experts.out.bias")  # (B, O)
    return graph.add("Add", [graph.add("Add", [output, low], "outputs"), bias_out], "mixed")


def _add_gates(graph: _Graph) -> str:
    """The weights of all experts (B, E), 0 where one was not chosen."""
    no_gates = graph.add("Sub", [ROUTER, ROUTER], "no_gates")
    return graph.add("ScatterElements", [no_gates, "top_experts", "expert_weights"], "gates", axis=1)


EXPERTS = {"sparse": _add_sparse_experts, "dense": _add_dense_experts, "shared": _add_shared_experts}


def _layer(weight: Tensor, bias: Tensor) -> _Layer:
    """Of a weight (inputs, outputs)."""
    return _Layer(np.ascontiguousarray(_array(weight)), _array(bias), weight.dtype)


def _fold_normalization(normalize: Normalize, layer: _Layer) -> _Layer:
    """Weights (P or k·k, D) for raw pixels: W/std and b − (mean/std)·ΣW, computed in float64."""
    mean, std = float(normalize.mean), float(normalize.std)
    exact = layer.weight.astype(np.float64) / std  # (P, D)
    bias = (layer.bias - mean * exact.sum(axis=0)).astype(np.float32)  # (D,)
    return _Layer(exact.astype(np.float32), bias, layer.dtype)


def _layers(modules: Iterable[nn.Module]) -> list[_Layer]:
    """The arrays of each linear layer."""
    return [_layer(layer.weight.T, layer.bias) for layer in linear_layers(modules)]


def _array(tensor: Tensor) -> Array:
    array: Array = tensor.detach().float().cpu().numpy()
    return array
