"""INT8 post-training quantization (PTQ): the textbook formulas, and ONNX Runtime's conversion.

r is a real number, q its 8-bit integer, S the scale, Z the zero point: r ≈ S·(q − Z).
"""

import contextlib
import io
import logging
import platform
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnxruntime import quantization as ort_quantization
from onnxruntime.quantization import calibrate

from mnist_lab.deploy.artifacts import name_nodes, read_artifact, read_onnx, read_onnx_metadata, save_onnx
from mnist_lab.deploy.card import features_needed
from mnist_lab.deploy.inside import count_rows, isolate_experts
from mnist_lab.deploy.onnx import build_onnx, write_onnx
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.experiments.technique import Proof, Work
from mnist_lab.files import write_atomically
from mnist_lab.machine import VNNI, cpu_flags
from mnist_lab.measure import Array
from mnist_lab.models import Model
from mnist_lab.runtimes import FLOAT_PRODUCTS, Precision, RuntimeName
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

Mode = Literal["static", "dynamic"]
CalibrationMethod = Literal["minmax", "entropy", "percentile"]
MAX_CALIBRATION_SIZE = 10**9
Int8 = npt.NDArray[np.int8]
CALIBRATION_BATCH = 100
# A new row passes the range of n others with chance 1/(n + 1): from this many on an expert's own rows will do.
MIN_ROWS = 32
# Besides the products: Relu, which joins its Gemm only when both are quantized, and what moves an MoE's rows,
# which then are bytes instead of floats.
STATIC_OPERATORS = ["MatMul", "Gemm", "Relu", "Gather", "Split", "Concat", "Conv", "AveragePool"]
# What becomes of the experts' outputs in `deploy/onnx.py`: they are moved, then mixed.
MOVED = {"sorted_outputs", "by_image"}
MIXED = {"mixed", "mixed.relu"}
CALIBRATORS: dict[CalibrationMethod, Callable[..., calibrate.CalibraterBase]] = {
    "minmax": calibrate.MinMaxCalibrater,
    # As many bins as levels, the default, would leave it no choice but the whole range.
    "entropy": partial(calibrate.EntropyCalibrater, num_bins=512),
    "percentile": partial(calibrate.PercentileCalibrater, num_bins=2048, symmetric=True),
}
INTEGER_OPERATORS = {"QGemm", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"}
INTEGER_OPERATORS |= {"QLinearConv", "ConvInteger"}
FLOAT_OPERATORS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}


@dataclass(frozen=True)
class Calibration:
    """What static mode takes the ranges of its activations from."""

    calibration_size: int = field(default=1000, metadata={"tag": "cal"})
    """Training images that static mode calibrates on."""
    calibration_method: CalibrationMethod = field(default="minmax", metadata={"tag": ""})
    """How they become a range: all that was seen, the range that loses least information, or its middle 99.999 %."""

    def __post_init__(self) -> None:
        if not 1 <= self.calibration_size <= MAX_CALIBRATION_SIZE:
            raise UserError(
                f"--calibration-size {self.calibration_size} must lie between 1 and {MAX_CALIBRATION_SIZE:,}"
            )


NO_RANGES = Calibration(calibration_size=2)  # a program must be run once, though dynamic mode learns nothing of it


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
    return platform.machine().lower() in {"x86_64", "amd64"} and not cpu_flags() & {*VNNI}


@dataclass(frozen=True)
class DynamicInt8:
    """INT8 whose activation ranges are taken from each batch as it runs."""

    label: ClassVar[str] = "dynamic ptq"
    precision: ClassVar[Precision] = "INT8"
    # OpenVINO reads such a file, but computes its products in FP32.
    runtimes: ClassVar[tuple[RuntimeName, ...]] = ("onnxruntime", "torchao")
    mode: ClassVar[Mode] = "dynamic"
    reduced_range: bool = field(default_factory=needs_reduced_range, metadata={"tag": None})

    def write(self, model: Model, file: Path, work: Work, metadata: Mapping[str, Any]) -> None:
        _write_int8(model, file, work, metadata, NO_RANGES, mode=self.mode, reduced_range=self.reduced_range)

    def prove(self, model: Model, file: Path) -> Proof:
        return _prove_int8(model, file, reduced_range=self.reduced_range)


@dataclass(frozen=True)
class StaticInt8:
    """INT8 whose activation ranges are fixed, by calibration on training images."""

    label: ClassVar[str] = "static ptq"
    precision: ClassVar[Precision] = "INT8"
    mode: ClassVar[Mode] = "static"
    calibration: Calibration = Calibration()
    reduced_range: bool = field(default_factory=needs_reduced_range, metadata={"tag": None})

    @property
    def runtimes(self) -> tuple[RuntimeName, ...]:
        """Torchao takes ranges in a way of its own, which goes by the default's name."""
        is_minmax = self.calibration.calibration_method == "minmax"
        return ("onnxruntime", "openvino", "torchao") if is_minmax else ("onnxruntime", "openvino")

    def write(self, model: Model, file: Path, work: Work, metadata: Mapping[str, Any]) -> None:
        _write_int8(model, file, work, metadata, self.calibration, mode=self.mode, reduced_range=self.reduced_range)

    def prove(self, model: Model, file: Path) -> Proof:
        return _prove_int8(model, file, reduced_range=self.reduced_range, calibration=self.calibration)


def _write_int8(
    model: Model,
    file: Path,
    work: Work,
    metadata: Mapping[str, Any],
    calibration: Calibration,
    *,
    mode: Mode,
    reduced_range: bool,
) -> None:
    """The artifact, or integers and scales for PyTorch."""
    pixels = work.calibration(calibration.calibration_size)
    if file.suffix == ".safetensors":
        from mnist_lab.compress.pt2e import write_quantized

        batches = pixels.split(CALIBRATION_BATCH)
        write_quantized(
            model,
            file,
            is_dynamic=mode == "dynamic",
            calibration=batches,
            reduced_range=reduced_range,
            metadata=metadata,
        )
        return

    with tempfile.TemporaryDirectory() as folder:
        fp32 = Path(folder) / "fp32.onnx"
        write_onnx(model, fp32, metadata)
        quantize(
            fp32,
            file,
            mode=mode,
            calibration=pixels.numpy(),
            method=calibration.calibration_method,
            keep_float=FLOAT_PRODUCTS,
            reduced_range=reduced_range,
            metadata=read_onnx_metadata(fp32),
        )


def _prove_int8(model: Model, file: Path, *, reduced_range: bool, calibration: Calibration | None = None) -> Proof:
    if file.suffix == ".safetensors":
        from mnist_lab.compress.pt2e import prove_quantized

        return prove_quantized(model, file)
    says = read_onnx_metadata(file)
    fp32 = build_onnx(model, layout=says.get("layout", {}).get("name"))
    keep_float = set(FLOAT_PRODUCTS)
    if calibration is None:  # dynamic mode has no fast integer convolutions
        keep_float |= {node.name for node in fp32.graph.node if node.op_type == "Conv"}
    counted = prove_integer(file, fp32, keep_float=keep_float)
    products = ", ".join(f"{count} {name}" for name, count in counted.integer_products.items())
    floats = ", ".join(counted.float_products) or "none"
    weights = "7-bit weights, for any CPU" if reduced_range else "8-bit weights, for which x86 needs VNNI"
    notes = _describe_calibration(says["calibration"], calibration) if calibration else []
    text = "; ".join([f"integer products: {products}", f"in float: {floats}", weights, *notes])
    return asdict(counted) | {"reduced_range": reduced_range, "text": text}


def _describe_calibration(found: Mapping[str, Any], asked: Calibration) -> Iterator[str]:
    """What a reader would not expect of an artifact's calibration."""
    num_images, rows = found["num_images"], found["rows_of_rare_experts"]
    if num_images < asked.calibration_size:
        yield f"calibrated on {num_images:,} images, all that there are"
    if rows:
        seen = ", ".join(f"expert {expert} saw {count:,}" for expert, count in rows.items())
        yield f"{seen} of {num_images:,} calibration images: calibrated on all of them"


@dataclass(frozen=True)
class Products:
    """What the engine executes, counted in its optimized graph."""

    integer_products: dict[str, int]  # operator -> how many
    float_products: list[str]  # names of the products left in float on purpose


def quantize(
    artifact: Path,
    output: Path,
    *,
    mode: Mode,
    calibration: Array | None = None,
    method: CalibrationMethod = "minmax",
    keep_float: Collection[str] = (),
    reduced_range: bool,
    metadata: Mapping[str, Any],
) -> None:
    """Convert an FP32 artifact to INT8: a scale for each matrix of 8-bit weights, or for each output of 7-bit ones.

    What static mode calibrated on stands in the output's metadata, as `calibration`.

    Args:
        calibration: training pixels (N, 1, height, width) from which static mode takes activation ranges;
            dynamic mode takes them from each batch as it runs and needs none.
        method: how static mode turns the activations it saw into a range: all of it, the one that loses least
            information (as TensorRT does), or the middle 99.999 %.
        keep_float: names of the products that stay in float.
        reduced_range: weights of 7 bits, for a CPU whose 8-bit products saturate.

    Raises:
        RunFailed: the folder cannot be written.
    """
    common: dict[str, Any] = {
        # For 8 bits a scale for each output would cost more (a third of a row's time) than it is worth (2 dB of 40).
        "per_channel": reduced_range,
        "reduce_range": reduced_range,
        "weight_type": ort_quantization.QuantType.QInt8,
        "nodes_to_exclude": list(keep_float),
    }

    def convert(temporary: Path) -> None:
        notes: dict[str, Any] = {}
        if mode == "static":
            assert calibration is not None
            rare = rare_experts(artifact, calibration)
            notes["calibration"] = {"num_images": len(calibration), "rows_of_rare_experts": rare}
            ranges = _find_ranges(artifact, dense, calibration, method, rare)
            _quantize_static(dense, temporary, ranges, **common)
        else:
            ort_quantization.quantize_dynamic(dense, temporary, op_types_to_quantize=["MatMul", "Gemm"], **common)
        model = onnx.load(temporary)
        if mode == "static":
            leave_logits_in_float(model.graph)
        else:
            round_before_sorting(model.graph)
        notes["cpu_features"] = features_needed(model.graph)
        save_onnx(model, temporary, {**metadata, **notes})

    with quiet(), tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"  # the converter sees no sparse constants
        onnx.save(read_onnx(artifact), dense)
        write_atomically(output, convert)


def rare_experts(artifact: Path, calibration: Array) -> dict[int, int]:
    """Experts of the sparse layout that get too few of the calibration images, by number, and how many those are."""
    enough = min(MIN_ROWS, len(calibration))
    return {expert: rows for expert, rows in enumerate(count_rows(artifact, calibration)) if rows < enough}


def _find_ranges(
    artifact: Path, dense: Path, calibration: Array, method: CalibrationMethod, rare: Collection[int]
) -> calibrate.TensorsData:
    """The range of every activation over the calibration images; inside rare experts, as if each image came there."""
    with tempfile.TemporaryDirectory() as folder:
        ranges = _calibrate(dense, calibration, method, Path(folder))
        if rare:
            probe = Path(folder) / "probe.onnx"
            onnx.save(isolate_experts(artifact, rare), probe)
            for name, found in _calibrate(probe, calibration, method, Path(folder)).items():
                ranges[name] = found
            _widen(ranges, MIXED, [ranges[f"expert{expert}.out"] for expert in rare])
    if ranges.keys() & MOVED:
        # Where experts' outputs had scales of their own, joining them would have to convert the bytes.
        outputs = MOVED | {name for name in ranges if name.startswith("expert") and name.endswith(".out")}
        _widen(ranges, outputs, [ranges[name] for name in outputs])
    return ranges


def _widen(ranges: calibrate.TensorsData, names: Collection[str], outputs: Sequence[calibrate.TensorData]) -> None:
    """Let these ranges reach as far as those of experts' outputs. What is mixed of them goes no further."""
    lowest, highest = min(output.lowest for output in outputs), max(output.highest for output in outputs)
    for name in names & ranges.keys():
        ranges[name].highest = max(ranges[name].highest, highest)
        if name != "mixed.relu":
            ranges[name].lowest = min(ranges[name].lowest, lowest)


def _calibrate(model: Path, calibration: Array, method: CalibrationMethod, folder: Path) -> calibrate.TensorsData:
    """The range of every activation of a model over the calibration images."""
    augmented = str(folder / "augmented.onnx")
    calibrator = CALIBRATORS[method](model, STATIC_OPERATORS, augmented)
    calibrator.augment_graph()
    options = session_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    calibrator.infer_session = onnxruntime.InferenceSession(augmented, options, providers=PROVIDERS)
    # Histograms cannot merge batches in which an expert gets different numbers of rows.
    batch_size = CALIBRATION_BATCH if method == "minmax" else len(calibration)
    calibrator.collect_data(_CalibrationReader(calibration, batch_size))
    with np.errstate(invalid="ignore"):  # an expert without rows has an empty histogram
        return calibrator.compute_data()


def _quantize_static(dense: Path, output: Path, ranges: calibrate.TensorsData, **common: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "ranges.json"
        ort_quantization.save_tensors_data(ranges, cache)
        ort_quantization.quantize_static(
            dense,
            output,
            calibration_cache_path=cache,
            quant_format=ort_quantization.QuantFormat.QDQ,
            activation_type=ort_quantization.QuantType.QUInt8,
            calibrate_method=ranges.calibration_method,
            op_types_to_quantize=STATIC_OPERATORS,
            **common,
        )


def leave_logits_in_float(graph: onnx.GraphProto) -> None:
    """Drop the rounding of the logits to 8 bits, which the converter adds and nothing after them needs."""
    producers = {output: node for node in graph.node for output in node.output}
    dequantize = producers[graph.output[0].name]
    if dequantize.op_type != "DequantizeLinear":
        return
    quantize = producers[dequantize.input[0]]
    producers[quantize.input[0]].output[0] = graph.output[0].name
    graph.node.remove(dequantize)
    graph.node.remove(quantize)
    used = {name for node in graph.node for name in node.input}
    for constant in [constant for constant in graph.initializer if constant.name not in used]:
        graph.initializer.remove(constant)


def round_before_sorting(graph: onnx.GraphProto) -> None:
    """Round the rows that experts get once, not each expert's by themselves, so that they move as bytes.

    Where some expert takes them in float, nothing changes.
    """
    sort = next((node for node in graph.node if node.name == "sorted_rows"), None)
    if sort is None:
        return
    rows = sort.input[0]
    rounded = [f"{rows}_{part}" for part in ("quantized", "scale", "zero_point")]  # as the converter calls them
    experts = {name for node in graph.node if node.input[:1] == sort.output[:1] for name in node.output}
    if any(node.op_type != "DynamicQuantizeLinear" for node in graph.node if experts & set(node.input)):
        return
    quantizers = [node for node in graph.node if node.op_type == "DynamicQuantizeLinear"]
    renamed: dict[str, str] = {}
    for node in quantizers:
        if node.input[0] in experts:
            renamed |= zip(node.output, [node.input[0], *rounded[1:]], strict=True)
            graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    sort.input[0] = rounded[0]
    if all(node.input[0] != rows for node in quantizers):
        once = onnx.helper.make_node("DynamicQuantizeLinear", [rows], rounded, name=f"{rows}_QuantizeLinear")
        graph.node.insert(list(graph.node).index(sort), once)
    del graph.value_info[:]  # which calls these rows floats


def prove_integer(artifact: Path, fp32: onnx.ModelProto, *, keep_float: Collection[str]) -> Products:
    """Compare the graph that the engine runs with the FP32 model it came from.

    Raises:
        WrongPrecision: a product that should be INT8 is not, or one in `keep_float` or a softmax is.
    """
    products = {node.name for node in fp32.graph.node if node.op_type in {"Conv", "Gemm", "MatMul"}}
    return prove_products(artifact, products - set(keep_float), keep_float=products & set(keep_float))


def prove_products(artifact: Path, products: Collection[str], *, keep_float: Collection[str]) -> Products:
    """That the engine runs these products in integers, those of `keep_float` in float, and no others.

    Raises:
        WrongPrecision: it does not, or runs a softmax in integers.
    """
    nodes = optimized_graph(artifact).node
    integer = Counter(node.op_type for node in nodes if node.op_type in INTEGER_OPERATORS)
    floats = {_layer_of(node) for node in nodes if node.op_type in FLOAT_OPERATORS}
    problems = []
    if integer.total() != len(products):
        problems.append(f"{integer.total()} of {len(products)} layers are integer products")
    if floats != set(keep_float):
        problems.append(f"in float are {sorted(floats)}, not {sorted(keep_float)}")
    if any(node.op_type == "QLinearSoftmax" for node in nodes):
        problems.append("the softmax is no longer in float")
    if problems:
        raise WrongPrecision(f"the INT8 model is not what it should be: {'; '.join(problems)}")
    return Products(dict(integer), sorted(floats))


def _layer_of(node: onnx.NodeProto) -> str:
    """Name of a product in the FP32 graph: a convolution in blocks of channels joins its Relu, and takes its name."""
    if "Conv" not in node.op_type:
        return node.name
    return node.name.removeprefix("fused ").removesuffix("_nchwc").removesuffix(".relu")


def optimized_graph(artifact: Path) -> onnx.GraphProto:
    """The graph as ONNX Runtime executes it on this CPU."""
    return optimize(read_artifact(artifact))


def optimize(content: bytes) -> onnx.GraphProto:
    """The same of a model that is safe to run."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(1)
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        onnxruntime.InferenceSession(content, options, providers=PROVIDERS)
        graph = onnx.load(options.optimized_model_filepath).graph
    name_nodes(graph)
    return graph


class _CalibrationReader(ort_quantization.CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pixels: Array, batch_size: int) -> None:
        starts = range(0, len(pixels), batch_size)
        self._batches: Iterator[Array] = (pixels[start : start + batch_size] for start in starts)

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"pixels": batch}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the converter's advice to run a shape inference that these graphs do not need, and its progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
