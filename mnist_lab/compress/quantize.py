"""INT8 post-training quantization (PTQ): the textbook formulas, and ONNX Runtime's conversion.

r is a real number, q its 8-bit integer, S the scale, Z the zero point: r ≈ S·(q − Z).
"""

import contextlib
import io
import logging
import platform
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime import quantization as ort_quantization
from onnxruntime.quantization import calibrate

from mnist_lab.artifacts import set_onnx_metadata
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.files import write_atomically
from mnist_lab.machine import cpu_flags
from mnist_lab.measure import Array

Mode = Literal["static", "dynamic"]
CalibrationMethod = Literal["minmax", "entropy", "percentile"]
MAX_CALIBRATION_SIZE = 10**9
Int8 = npt.NDArray[np.int8]
CALIBRATION_BATCH = 100
# Besides the products: Relu, which joins its Gemm only when both are quantized, and what moves an MoE's rows,
# which then are bytes instead of floats.
STATIC_OPERATORS = ["MatMul", "Gemm", "Relu", "Gather", "Split", "Concat"]
CALIBRATORS: dict[CalibrationMethod, tuple[ort_quantization.CalibrationMethod, dict[str, int]]] = {
    "minmax": (ort_quantization.CalibrationMethod.MinMax, {}),
    # As many bins as levels, the default, would leave it no choice but the whole range.
    "entropy": (ort_quantization.CalibrationMethod.Entropy, {"num_bins": 512}),
    "percentile": (ort_quantization.CalibrationMethod.Percentile, {}),
}
INTEGER_OPERATORS = {"QGemm", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"}
FLOAT_OPERATORS = {"Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


@dataclass(frozen=True)
class Calibration:
    """What static mode takes the ranges of its activations from."""

    calibration_size: int = 1000
    """Training images that static mode calibrates on."""
    calibration_method: CalibrationMethod = "minmax"
    """How they become a range: all that was seen, the range that loses least information, or its middle 99.999 %."""

    def __post_init__(self) -> None:
        if not 1 <= self.calibration_size <= MAX_CALIBRATION_SIZE:
            raise UserError(
                f"--calibration-size {self.calibration_size} must lie between 1 and {MAX_CALIBRATION_SIZE:,}"
            )


def affine_parameters(r_min: float, r_max: float, *, q_min: int = 0, q_max: int = 255) -> tuple[float, int]:
    """S = (r_max − r_min)/(q_max − q_min), Z = q_min − round(r_min/S).

    The range is widened to include 0, which must be exactly representable (padding, ReLU); a range
    of nothing but 0 gets S = 1.
    """
    r_min, r_max = min(r_min, 0.0), max(r_max, 0.0)
    scale = (r_max - r_min) / (q_max - q_min) or 1.0
    return scale, q_min - round(r_min / scale)


def affine_quantize(r: Array, scale: float, zero_point: int, *, q_min: int = 0, q_max: int = 255) -> Any:
    """Q = clip(round(r/S) + Z), rounding half to even."""
    return np.clip(np.round(r / scale) + zero_point, q_min, q_max).astype(np.int32)


def affine_dequantize(q: Any, scale: float, zero_point: int) -> Array:
    """R ≈ S·(q − Z)."""
    values: Array = (scale * (q - zero_point)).astype(np.float32)
    return values


def absmax_quantize(r: Array, *, q_max: int = 127, axis: int | None = None) -> tuple[Int8, Array]:
    """Symmetric: q = round(q_max·r / max|r|), zero at 0. A tensor of zeros gets S = 1.

    Args:
        axis: the axis whose slices share one scale (per-channel); None for one scale in all.

    Returns:
        q, and S with r ≈ S·q, shaped to broadcast against q.
    """
    kept = tuple(i for i in range(r.ndim) if i != axis) if axis is not None else None
    largest = np.abs(r).max(axis=kept, keepdims=True)
    scale = np.where(largest > 0, largest / q_max, 1.0).astype(np.float32)
    return np.clip(np.round(r / scale), -q_max, q_max).astype(np.int8), scale


def needs_reduced_range() -> bool:
    """Whether 8-bit weights can overflow this CPU's 16-bit sums, so that 7-bit ones are due.

    x86 without VNNI adds two 8-bit products in a saturating 16-bit register.
    """
    return platform.machine().lower() in {"x86_64", "amd64"} and not cpu_flags() & {"avx512_vnni", "avx_vnni"}


@dataclass(frozen=True)
class QuantizationProof:
    """What the engine executes, counted in its optimized graph."""

    integer_products: dict[str, int]  # operator -> how many
    float_products: list[str]  # names of the products left in float on purpose
    reduced_range: bool  # weights of 7 bits, for a CPU whose 8-bit products saturate


def quantize(
    artifact: Path,
    output: Path,
    *,
    mode: Mode,
    calibration: Array | None = None,
    method: CalibrationMethod = "minmax",
    keep_float: Collection[str] = (),
    metadata: Mapping[str, Any],
) -> None:
    """Convert an FP32 artifact to INT8 with per-channel weights, and check what the engine makes of it.

    Args:
        calibration: training pixels (N, 1, 28, 28) from which static mode takes activation ranges;
            dynamic mode takes them from each batch as it runs and needs none.
        method: how static mode turns the activations it saw into a range: all of it, the one that loses least
            information (as TensorRT does), or the middle 99.999 %.
        keep_float: names of the products that stay in float.

    Raises:
        WrongPrecision: a layer that should be INT8 is not, or one that should be float is not. Nothing
            is written then.
        UserError: the folder cannot be written.
    """
    common: dict[str, Any] = {
        "per_channel": True,
        "reduce_range": needs_reduced_range(),
        "weight_type": ort_quantization.QuantType.QInt8,
        "nodes_to_exclude": list(keep_float),
    }

    def convert(temporary: Path) -> None:
        if mode == "static":
            assert calibration is not None
            with _ranges(artifact, calibration, method) as ranges:
                ort_quantization.quantize_static(
                    artifact,
                    temporary,
                    calibration_cache_path=ranges,
                    quant_format=ort_quantization.QuantFormat.QDQ,
                    activation_type=ort_quantization.QuantType.QUInt8,
                    calibrate_method=CALIBRATORS[method][0],
                    op_types_to_quantize=STATIC_OPERATORS,
                    **common,
                )
        else:
            ort_quantization.quantize_dynamic(artifact, temporary, op_types_to_quantize=["MatMul", "Gemm"], **common)
        model = onnx.load(temporary)
        if mode == "static":
            _leave_logits_in_float(model.graph)
        set_onnx_metadata(model, metadata)
        onnx.save(model, temporary)
        prove_integer(temporary, artifact, keep_float=keep_float)

    with _quiet():
        write_atomically(output, convert)


@contextlib.contextmanager
def _ranges(artifact: Path, calibration: Array, method: CalibrationMethod) -> Iterator[Path]:
    """A passing file with the range of every activation over the calibration images."""
    kind, options = CALIBRATORS[method]
    # Histograms cannot merge batches in which an expert gets different numbers of rows.
    batch_size = CALIBRATION_BATCH if method == "minmax" else len(calibration)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranges.json"
        calibrator = calibrate.create_calibrator(
            artifact,
            STATIC_OPERATORS,
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=kind,
            extra_options=options,
        )
        calibrator.collect_data(_CalibrationReader(calibration, batch_size))
        ort_quantization.save_tensors_data(calibrator.compute_data(), path)
        yield path


def _leave_logits_in_float(graph: onnx.GraphProto) -> None:
    """Drop the rounding of the logits to 8 bits, which the converter adds and nothing after them needs."""
    producers = {output: node for node in graph.node for output in node.output}
    dequantize = producers[graph.output[0].name]
    if dequantize.op_type != "DequantizeLinear":
        return
    quantize = producers[dequantize.input[0]]
    producers[quantize.input[0]].output[0] = graph.output[0].name
    graph.node.remove(dequantize)
    graph.node.remove(quantize)


def prove_integer(artifact: Path, fp32_artifact: Path, *, keep_float: Collection[str]) -> QuantizationProof:
    """Compare the graph that the engine runs with the FP32 artifact it came from.

    Raises:
        WrongPrecision: a product that should be INT8 is not, or one in `keep_float` or a softmax is.
    """
    products = {node.name for node in onnx.load(fp32_artifact).graph.node if node.op_type in {"Gemm", "MatMul"}}
    expected_float = products & set(keep_float)
    nodes = optimized_graph(artifact).node
    integer = Counter(node.op_type for node in nodes if node.op_type in INTEGER_OPERATORS)
    floats = {node.name for node in nodes if node.op_type in FLOAT_OPERATORS}
    problems = []
    if integer.total() != len(products - expected_float):
        problems.append(f"{integer.total()} of {len(products - expected_float)} layers are integer products")
    if floats != expected_float:
        problems.append(f"in float are {sorted(floats)}, not {sorted(expected_float)}")
    if any(node.op_type == "QLinearSoftmax" for node in nodes):
        problems.append("the softmax is no longer in float")
    if problems:
        raise WrongPrecision(f"the INT8 model is not what it should be: {'; '.join(problems)}")
    return QuantizationProof(dict(integer), sorted(floats), needs_reduced_range())


def optimized_graph(artifact: Path) -> onnx.GraphProto:
    """The graph as ONNX Runtime executes it on this CPU."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: it warns that such a file fits this CPU alone
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(artifact, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath).graph


class _CalibrationReader(ort_quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pixels: Array, batch_size: int) -> None:
        starts = range(0, len(pixels), batch_size)
        self._batches: Iterator[Array] = (pixels[start : start + batch_size] for start in starts)

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"pixels": batch}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter's advice to run a shape inference that these graphs do not need, and its progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
