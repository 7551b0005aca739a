"""A classifier that was made elsewhere, quantized: static and dynamic INT8, and weights in 4 bits.

What ONNX Runtime makes of a form is counted in the graph that it executes; a form in which no product becomes one of
integers is none.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper, version_converter
from onnxruntime import quantization as ort_quantization
from onnxruntime.quantization import matmul_nbits_quantizer

from mnist_lab.compress.int8 import (
    CALIBRATION_BATCH,
    FLOAT_OPERATORS,
    INTEGER_OPERATORS,
    leave_logits_in_float,
    needs_reduced_range,
    optimize,
    quiet,
)
from mnist_lab.deploy.artifacts import name_nodes
from mnist_lab.deploy.foreign import ForeignModel, silent_options
from mnist_lab.files import first_line
from mnist_lab.measure import Array, take_images
from mnist_lab.runtimes import Precision
from mnist_lab.runtimes.onnxruntime import PROVIDERS

OLDEST_OPSET = 13  # of which a scale for each channel is known
# Products, and what lies between them: their results can go from one to the next as bytes.
STATIC_OPERATORS = [
    "Conv", "Gemm", "MatMul", "Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Pad",
    "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze",
]  # fmt: skip
FOUR_BITS = "MatMulNBits"
BLOCK_SIZE = 32  # weights that share a scale
ROWS_IN_8_BITS = 4  # what ONNX Runtime calls this accuracy


class Executed(NamedTuple):
    """The products that ONNX Runtime executes: how many of each operator."""

    integer: dict[str, int]
    floats: dict[str, int]

    def precision(self, of_integers: Precision) -> Precision:
        """That of the whole model, where its integer products are of this one."""
        if not self.integer:
            return "FP32"
        return "mixed" if self.floats else of_integers

    @property
    def text(self) -> str:
        integer, floats = (
            ", ".join(f"{num} {name}" for name, num in found.items()) or "none" for found in (self.integer, self.floats)
        )
        return f"integer products: {integer}; in float: {floats}"


@dataclass(frozen=True)
class Quantized:
    """One form of a model, or why there is none."""

    tag: str  # of its file
    technique: str
    precision: Precision
    content: bytes
    executed: Executed


class Unquantized(NamedTuple):
    tag: str
    reason: str


def quantize_foreign(foreign: ForeignModel, calibration: Array) -> Iterator[Quantized | Unquantized]:
    """All forms of a model, one by one.

    Args:
        calibration: training images (N, 1, height, width) in [0, 1], from which static mode takes its ranges.
    """
    if foreign.is_quantized:
        yield Unquantized("INT8 and INT4", "it is quantized already")
        return
    forms: dict[str, tuple[str, Precision, Callable[[onnx.ModelProto], onnx.ModelProto]]] = {
        "INT8": ("static ptq", "INT8", lambda model: _static(model, foreign, calibration)),
        "INT8-dynamic": ("dynamic ptq", "INT8", _dynamic),
        "INT4": ("weight-only ptq", "INT4", _in_4_bits),
    }
    for tag, (technique, precision, convert) in forms.items():
        try:
            with quiet():
                content = convert(_simplified(foreign.model)).SerializeToString(deterministic=True)
                executed = find_executed(content)
        except Exception as error:  # the converter's errors share no base class
            yield Unquantized(tag, f"ONNX Runtime's converter cannot: {first_line(error)}")
            continue
        if not executed.integer:
            yield Unquantized(tag, "no product of it becomes one of integers")
        else:
            yield Quantized(tag, technique, executed.precision(precision), content, executed)


def find_executed(content: bytes) -> Executed:
    """The products in the graph that the engine runs."""
    operators = [node.op_type for node in optimize(content).node]
    integer, floats = (
        dict(Counter(name for name in operators if name in found))
        for found in (INTEGER_OPERATORS | {FOUR_BITS}, FLOAT_OPERATORS)
    )
    return Executed(integer, floats)


def _simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same in an opset that can be quantized, of fewer nodes: batch normalisation becomes part of convolutions."""
    if model.opset_import[0].version < OLDEST_OPSET:
        model = version_converter.convert_version(model, OLDEST_OPSET)
    with tempfile.TemporaryDirectory() as folder:
        options = silent_options(1)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "simplified.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=PROVIDERS)
        simplified = onnx.load(options.optimized_model_filepath)
    name_nodes(simplified.graph)
    return onnx.shape_inference.infer_shapes(simplified)


def _static(model: onnx.ModelProto, foreign: ForeignModel, calibration: Array) -> onnx.ModelProto:
    reduced_range = needs_reduced_range()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "static.onnx"
        ort_quantization.quantize_static(
            model,
            file,
            _Images(foreign, calibration),
            quant_format=ort_quantization.QuantFormat.QDQ,
            activation_type=ort_quantization.QuantType.QUInt8,  # signed ones would leave a Gemm in float
            weight_type=ort_quantization.QuantType.QInt8,
            op_types_to_quantize=STATIC_OPERATORS,
            # What convolutions' channels weigh differs much once batch normalisation is in them.
            per_channel=reduced_range or any(node.op_type == "Conv" for node in model.graph.node),
            reduce_range=reduced_range,
        )
        quantized = onnx.load(file)
    leave_logits_in_float(quantized.graph)
    return quantized


def _dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """Of matrix products only: of convolutions with dynamic ranges there is no fast kernel."""
    reduced_range = needs_reduced_range()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dynamic.onnx"
        ort_quantization.quantize_dynamic(
            model,
            file,
            weight_type=ort_quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=reduced_range,
            reduce_range=reduced_range,
        )
        return onnx.load(file)


def _in_4_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    """Of matrix products only, by ONNX Runtime's own operator: it takes rows in float and rounds them to 8 bits."""
    _split_gemms(model.graph)
    config = matmul_nbits_quantizer.DefaultWeightOnlyQuantConfig(
        block_size=BLOCK_SIZE, is_symmetric=True, accuracy_level=ROWS_IN_8_BITS
    )
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def _split_gemms(graph: onnx.GraphProto) -> None:
    """Make a product and a sum of each Gemm with weights of its own, in place: the converter sees no other products."""
    constants = {constant.name: constant for constant in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        how = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        is_plain = how.get("alpha", 1) == how.get("beta", 1) == 1 and not how.get("transA", 0)
        if node.op_type != "Gemm" or not is_plain or node.input[1] not in constants:
            nodes.append(node)
            continue
        rows, weight, *bias = node.input
        if how.get("transB", 0):
            transposed = f"{weight}.transposed"
            if transposed not in constants:
                values = np.ascontiguousarray(numpy_helper.to_array(constants[weight]).T)
                constants[transposed] = numpy_helper.from_array(values, transposed)
                graph.initializer.append(constants[transposed])
            weight = transposed
        product = f"{node.output[0]}.product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [rows, weight], [product], name=node.name or product))
        if bias:
            nodes.append(helper.make_node("Add", [product, *bias], list(node.output), name=f"{product}.bias"))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    unused = [constant for constant in graph.initializer if constant.name not in used]
    for constant in unused:
        graph.initializer.remove(constant)


class _Images(ort_quantization.CalibrationDataReader):  # type: ignore[misc]
    """Calibration images as the model takes them, in batches."""

    def __init__(self, foreign: ForeignModel, calibration: Array) -> None:
        size = foreign.fixed_batch or CALIBRATION_BATCH
        num_batches = math.ceil(len(calibration) / size)
        batches = np.split(take_images(calibration, num_batches * size), num_batches)
        self._batches: Iterator[dict[str, Any]] = (
            {foreign.images.name: foreign.images.prepare(batch)} for batch in batches
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._batches, None)
