"""Weight-only quantization: weights of 8, 4 or 2 bits, with a scale for each output, or for each group of its inputs.

They are rounded to the nearest, or with feedback (`gptq.py`).

The file is standard ONNX: integers, and a DequantizeLinear where they are used. ONNX Runtime makes one product of both,
`MatMulNBits`, which rounds its inputs to 8 bits by itself.

Shapes: I inputs, O outputs, G groups of inputs.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from mnist_lab.compress.gptq import Gram, input_grams, round_with_feedback
from mnist_lab.compress.int8 import absmax_quantize, optimized_graph
from mnist_lab.deploy.artifacts import read_onnx, save_onnx
from mnist_lab.deploy.onnx import IR_VERSION, OPSET, build_onnx, layout_metadata
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.experiments.technique import Proof, Work
from mnist_lab.measure import Array
from mnist_lab.models import Model
from mnist_lab.runtimes import FLOAT_PRODUCTS, Precision, RuntimeName
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

Bits = Literal[8, 4, 2]
Int8 = npt.NDArray[np.int8]
TYPES: dict[Bits, int] = {8: TensorProto.INT8, 4: TensorProto.INT4, 2: TensorProto.INT2}
VERSIONS: dict[Bits, tuple[int, int]] = {8: (21, 10), 4: (21, 10), 2: (25, 13)}  # opset and IR that know the type
PRECISIONS: dict[Bits, Precision] = {8: "INT8", 4: "INT4", 2: "INT2"}
# ONNX Runtime 1.32 packs 2 bits wrongly where the outputs are no multiple of this; such a layer keeps 4 bits.
OUTPUTS_OF_2_BITS = 4
ZERO = "zero"
FLOAT_OPERATORS = {"Gemm", "MatMul", "FusedGemm", "FusedMatMul"}
SMALLEST_GROUP = 16  # that ONNX Runtime's product has a kernel for, as powers of two from there to
LARGEST_GROUP = 256
CALIBRATION_SIZE = 5000  # training images
CHECKED_IMAGES = 200
LEAST_DECIBELS = 20.0  # of the engine's logits against those of the same weights in FP32: int8 inputs give some 40


@dataclass(frozen=True)
class Rounding:
    """To how many bits weights are rounded, and which of them share a scale."""

    bits: Bits = field(default=4, metadata={"tag": "b"})
    """Of a weight."""
    group_size: int | Literal["channel"] = field(default="channel", metadata={"tag": "g"})
    """Inputs of an output that share a scale, a power of two from 16 to 256; or channel, all of them."""
    method: Literal["gptq", "nearest"] = field(default="gptq", metadata={"tag": ""})
    """Rounding to the nearest, or gptq: what is still to be rounded makes up for what was, on calibration images."""

    def __post_init__(self) -> None:
        if self.group_size == "channel":
            return
        size = self.group_size
        if not SMALLEST_GROUP <= size <= LARGEST_GROUP or size & (size - 1):
            raise UserError(f"--group-size {size} must be channel, or a power of two from 16 to 256")


@dataclass(frozen=True)
class WeightOnly:
    """Weights of few bits, and nothing else of the model."""

    label: ClassVar[str] = "weight-only ptq"
    runtimes: ClassVar[tuple[RuntimeName, ...]] = ("onnxruntime",)
    rounding: Rounding = Rounding()

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.rounding.bits]

    def write(self, model: Model, file: Path, work: Work, metadata: Mapping[str, Any]) -> None:
        graph = build_onnx(model)
        calibration = work.calibration(CALIBRATION_SIZE).numpy() if self.rounding.method == "gptq" else None
        round_weights(graph, self.rounding, calibration)
        save_onnx(graph, file, {**metadata, **layout_metadata(model)})

    def prove(self, model: Model, file: Path) -> Proof:
        return prove_weights(file)


def quantize_weight(weight_IO: Array, bits: Bits, group_size: int) -> tuple[Int8, Array]:
    """Absmax: q = round(q_max·w / max|w|) of each output's group of inputs, the last of which may be shorter.

    Returns:
        q (I, O), and the scales (G, O).
    """
    q_max = 2 ** (bits - 1) - 1
    groups = [weight_IO[start : start + group_size] for start in range(0, len(weight_IO), group_size)]
    parts = [absmax_quantize(group, q_max=q_max, axis=1) for group in groups]
    return np.concatenate([q for q, _ in parts]), np.concatenate([scale for _, scale in parts])


def pack(integers: Int8, bits: Bits) -> bytes:
    """Two's complement, the first in the lowest bits of a byte, as ONNX stores them."""
    per_byte = 8 // bits
    flat = np.concatenate([integers.ravel(), np.zeros(-integers.size % per_byte, np.int8)])
    fields = (flat.view(np.uint8) & (2**bits - 1)).reshape(-1, per_byte)
    shifted: npt.NDArray[np.uint8] = (fields << (bits * np.arange(per_byte, dtype=np.uint8))).sum(1, dtype=np.uint8)
    return shifted.tobytes()


def round_weights(model: onnx.ModelProto, rounding: Rounding, calibration: Array | None = None) -> None:
    """Put the weights of an FP32 graph's products, those of the routing apart, into few bits; in place.

    Args:
        calibration: training pixels (N, 1, height, width), by which they are rounded with feedback; without, to the
            nearest.
    """
    graph, constants = model.graph, {constant.name: constant for constant in model.graph.initializer}
    products = {
        node.name: node.input[0]
        for node in graph.node
        if node.op_type in {"Gemm", "MatMul"} and node.name not in FLOAT_PRODUCTS and node.input[1] in constants
    }
    grams = {} if calibration is None else input_grams(model, list(dict.fromkeys(products.values())), calibration)
    nodes = []
    for node in graph.node:
        if node.name not in products:
            nodes.append(node)
            continue
        weight = constants.pop(node.input[1])
        bits: Bits = 4 if rounding.bits == 2 and weight.dims[1] % OUTPUTS_OF_2_BITS else rounding.bits
        stored, dequantize = _few_bits(weight, bits, rounding.group_size, grams.get(node.input[0]))
        constants |= {constant.name: constant for constant in stored}
        nodes += [dequantize, *_product(node, dequantize.output[0])]
    for node in nodes:
        # ONNX Runtime 1.32 may join a Relu to a product in float, before it sees the few bits.
        if node.op_type == "Relu":
            node.op_type = "Max"
            node.input.append(ZERO)
            constants[ZERO] = numpy_helper.from_array(np.zeros(1, np.float32), ZERO)
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants.values())
    opset, ir_version = VERSIONS[rounding.bits]
    model.opset_import[0].version, model.ir_version = max(OPSET, opset), max(IR_VERSION, ir_version)


def _few_bits(
    weight: TensorProto, bits: Bits, group_size: int | Literal["channel"], gram: Gram | None
) -> tuple[list[TensorProto], onnx.NodeProto]:
    """A weight's integers and scales, and the node that multiplies them."""
    values = numpy_helper.to_array(weight)
    size = len(values) if group_size == "channel" else min(group_size, len(values))
    if gram is None:
        integers, scales = quantize_weight(values, bits, size)
    else:
        integers, scales = round_with_feedback(values, gram, bits, size)
    is_one_group = len(scales) == 1
    stored = TensorProto(
        name=f"{weight.name}.q", data_type=TYPES[bits], dims=values.shape, raw_data=pack(integers, bits)
    )
    scale = numpy_helper.from_array(scales[0] if is_one_group else scales, f"{weight.name}.scale")
    how: dict[str, Any] = {"axis": 1} if is_one_group else {"axis": 0, "block_size": size}
    inputs = [stored.name, scale.name]
    return [stored, scale], helper.make_node("DequantizeLinear", inputs, [weight.name], name=weight.name, **how)


def _product(node: onnx.NodeProto, weight: str) -> Iterator[onnx.NodeProto]:
    """A Gemm as a product and a sum: only products are made one with their dequantized weights."""
    rows, bias = node.input[0], [*node.input[2:]]
    (output,) = node.output
    product = f"{output}.product" if bias else output
    yield helper.make_node("MatMul", [rows, weight], [product], name=product)
    if bias:
        yield helper.make_node("Add", [product, *bias], [output], name=output)


def prove_weights(file: Path) -> Proof:
    """That ONNX Runtime multiplies with few bits in every product but the routing's, and computes what the file says.

    Raises:
        WrongPrecision: it does not.
    """
    model = read_onnx(file)
    types = [constant.data_type for constant in model.graph.initializer]
    stored = Counter({bits: types.count(data_type) for bits, data_type in TYPES.items()})
    nodes = optimized_graph(file).node
    run = Counter(helper.get_node_attr_value(node, "bits") for node in nodes if node.op_type == "MatMulNBits")
    floats = sorted(node.name for node in nodes if node.op_type in FLOAT_OPERATORS)
    if run != stored or not set(floats) <= set(FLOAT_PRODUCTS):
        raise WrongPrecision(
            f"of {stored.total()} layers in few bits ONNX Runtime runs {run.total()} so; in float are {floats}"
        )
    decibels = agreement(file, model)
    if decibels < LEAST_DECIBELS:
        raise WrongPrecision(f"ONNX Runtime computes something else than the file says: {decibels:.0f} dB")
    counted = ", ".join(f"{num} of {bits} bits" for bits, num in sorted(run.items(), reverse=True))
    text = f"weights of products: {counted}; in float: {', '.join(floats) or 'none'}"
    return {"text": text, "products": {str(bits): num for bits, num in run.items()}, "decibels": decibels}


def agreement(file: Path, model: onnx.ModelProto) -> float:
    """Signal to noise in decibels between an artifact and the same weights in FP32, on random pixels."""
    make_float(model)
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    pixels = np.random.default_rng(0).random((CHECKED_IMAGES, *shape), np.float32)
    found, expected = (
        onnxruntime.InferenceSession(content, session_options(1), providers=PROVIDERS).run(None, {"pixels": pixels})[0]
        for content in (file.read_bytes(), model.SerializeToString())
    )
    noise = float(np.square(found - expected).sum())
    return 10 * math.log10(float(np.square(expected).sum()) / max(noise, 1e-30))


def make_float(model: onnx.ModelProto) -> None:
    """Put what few bits stand for in their place; in place."""
    graph, constants = model.graph, {constant.name: constant for constant in model.graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            nodes.append(node)
            continue
        integers, scales = (numpy_helper.to_array(constants.pop(name)).astype(np.float32) for name in node.input)
        size = next((a.i for a in node.attribute if a.name == "block_size"), len(integers))
        repeated = np.repeat(np.atleast_2d(scales), size, axis=0)[: len(integers)]
        constants[node.output[0]] = numpy_helper.from_array(integers * repeated, node.output[0])
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants.values())
