"""Activations of few bits: what goes from layer to layer is rounded as well, and to and from experts travels so.

q = clip(round(x/s)), x ≈ s·q: unsigned behind a ReLU, signed where experts' outputs leave them. s is the one of least
squared error on calibration images.
"""

from collections import Counter
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from mnist_lab.compress.few_bits import IR_VERSION, OPSET
from mnist_lab.measure import Array
from mnist_lab.models.moe import SparseMoEConfig
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

CALIBRATION_SIZE = 1000  # training images
SHARES = np.linspace(0.1, 1, 46)  # of the scale that reaches the largest value
GATHERED = "sorted_outputs"  # the experts' outputs, side by side


class Kind(NamedTuple):
    """Of integers."""

    data_type: int
    lowest: int
    highest: int


KINDS = {
    (8, False): Kind(TensorProto.UINT8, 0, 255),
    (8, True): Kind(TensorProto.INT8, -128, 127),
    (4, False): Kind(TensorProto.UINT4, 0, 15),
    (4, True): Kind(TensorProto.INT4, -8, 7),
}


def find_activations(graph: onnx.GraphProto) -> dict[str, bool]:
    """Tensors of an FP32 graph that go from layer to layer, and whether they are signed."""
    behind_relu = {node.output[0]: False for node in graph.node if node.op_type == "Relu"}
    return behind_relu | {node.output[0]: True for node in graph.node if node.name == GATHERED}


def round_activations(model: onnx.ModelProto, bits: Literal[8, 4], pixels: Array) -> None:
    """Let an FP32 graph round them, in place.

    Args:
        pixels: to calibrate on, (N, 1, height, width).
    """
    graph, signed = model.graph, find_activations(model.graph)
    values = _read_out(model, list(signed), pixels)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in signed:
                node.input[place] = f"{name}.rounded"
        nodes.append(node)
        for name in signed.keys() & set(node.output):
            kind = KINDS[bits, signed[name]]
            graph.initializer.append(numpy_helper.from_array(best_scale(values[name], kind), f"{name}.scale"))
            nodes += _rounding(name, kind)
    del graph.node[:]
    graph.node.extend(nodes)
    model.opset_import[0].version, model.ir_version = OPSET, IR_VERSION


def _rounding(name: str, kind: Kind) -> list[onnx.NodeProto]:
    """The nodes that make of a tensor its `.rounded`."""
    scale, integers, rounded = (f"{name}.{part}" for part in ("scale", "integers", "rounded"))
    quantize = helper.make_node("QuantizeLinear", [name, scale], [integers], name=integers, output_dtype=kind.data_type)
    if kind.lowest < 0:
        return [quantize, helper.make_node("DequantizeLinear", [integers, scale], [rounded], name=rounded)]
    # ONNX Runtime 1.32 would put a product of few bits right behind a rounding into float.
    floats = f"{name}.floats"
    dequantize = helper.make_node("DequantizeLinear", [integers, scale], [floats], name=floats)
    return [quantize, dequantize, helper.make_node("Relu", [floats], [rounded], name=rounded)]


def _read_out(model: onnx.ModelProto, names: list[str], pixels: Array) -> dict[str, Array]:
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(opened.SerializeToString(), session_options(1), providers=PROVIDERS)
    return dict(zip(names, session.run([*names, "logits"], {"pixels": pixels}), strict=False))


def best_scale(values: Array, kind: Kind) -> npt.NDArray[np.float32]:
    """The scale () for which Σ (x − s·q)² is least."""
    reach = max(values.max(initial=0) / kind.highest, values.min(initial=0) / min(kind.lowest, -1))
    scales = ((reach or 1) * SHARES).astype(np.float32)
    errors = [np.square(values - s * np.clip(np.rint(values / s), kind.lowest, kind.highest)).sum() for s in scales]
    return np.array(scales[int(np.argmin(errors))])


def count_rounded(graph: onnx.GraphProto) -> Counter[int]:
    """How many activations a graph rounds to how many bits."""
    bits_of_type = {kind.data_type: bits for (bits, _), kind in KINDS.items()}
    rounding = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    return Counter(bits_of_type[helper.get_node_attr_value(node, "output_dtype")] for node in rounding)


def bytes_to_and_from_experts(config: SparseMoEConfig, bits: int) -> int:
    """Of one image's rows, to each of its experts and back, with so many bits a value."""
    values = config.routing.top_k * (config.model_width + config.output_width)
    return -(-values * bits // 8)
