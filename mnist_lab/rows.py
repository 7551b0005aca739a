"""The rows of the table: what each model is, and how an option that departs from the default names it."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.compress.quantize import Calibration, CalibrationMethod, Mode
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.runtimes import Precision, RuntimeName

ModelName = Literal["ffn", "moe", "student"]
Rival = Literal["ffn-active", "ffn-total"]  # dense FFNs with as many parameters as the MoE has per image, or in all


@dataclass(frozen=True)
class Trained:
    """A row that is trained: its architecture, and from whom a student learns."""

    model: str
    technique: str
    architecture: ModelName | Rival
    routing: RoutingConfig = field(default_factory=RoutingConfig)  # of the MoE
    parent: str | None = None  # the teacher
    distillation: DistillationConfig | None = None

    precision: ClassVar[Precision] = "FP32"
    runtimes: ClassVar[tuple[RuntimeName, ...]] = ("pytorch", "torch-compile", "onnxruntime", "openvino")
    extension: ClassVar[str] = "safetensors"


@dataclass(frozen=True)
class Quantized:
    """A row that is converted from a trained one."""

    model: str
    technique: str
    parent: str
    mode: Mode
    calibration: Calibration = field(default_factory=Calibration)  # static mode only

    precision: ClassVar[Precision] = "INT8"
    extension: ClassVar[str] = "onnx"

    @property
    def runtimes(self) -> tuple[RuntimeName, ...]:
        """OpenVINO reads a dynamically quantized file, but computes its products in FP32; torchao knows minmax only."""
        if self.mode == "dynamic":
            return ("onnxruntime", "torchao")
        is_minmax = self.calibration.calibration_method == "minmax"
        return ("onnxruntime", "openvino", "torchao") if is_minmax else ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Rounded:
    """A row whose weights are a trained one's, rounded to BF16, and whose products are computed in BF16."""

    model: str
    technique: str
    parent: str

    precision: ClassVar[Precision] = "BF16"
    # ONNX Runtime has no BF16 products for x86.
    runtimes: ClassVar[tuple[RuntimeName, ...]] = ("pytorch", "torch-compile", "openvino")
    extension: ClassVar[str] = "safetensors"


Row = Trained | Quantized | Rounded


def ffn_baseline(*, suffix: str = "") -> Trained:
    """The dense FFN, against which everything is read."""
    return Trained(f"FFN_baseline{suffix}", "dense", "ffn")


def sparse_moe(routing: RoutingConfig = RoutingConfig(), *, suffix: str = "") -> Trained:
    """The noisy top-K mixture of experts."""
    labels = {
        "num_experts": "E",
        "top_k": "K",
        "balance": "",
        "balance_weight": "w",
        "capacity_factor": "c",
        "noise": "noise",
    }
    return Trained(f"Sparse_MoE{departures(routing, labels)}{suffix}", "moe", "moe", routing)


def dense_rival(rival: Rival, *, suffix: str = "") -> Trained:
    """A dense FFN of the MoE's size, per image or in all."""
    return Trained({"ffn-active": "FFN_equal_active", "ffn-total": "FFN_equal_total"}[rival] + suffix, "dense", rival)


def student(
    teacher: Literal["moe", "ffn"] = "moe",
    distillation: DistillationConfig | None = DistillationConfig(),
    *,
    suffix: str = "",
) -> Trained:
    """The small FFN, taught by the MoE or the baseline; with `distillation=None` by the labels alone."""
    if distillation is None:
        return Trained(f"FFN_Student_no_KD{suffix}", "dense", "student")
    name = {"moe": "KD_FFN_Student", "ffn": "KD_FFN_Student_from_FFN"}[teacher]
    parent = trained(teacher, suffix=suffix).model
    suffix = departures(distillation, {"temperature": "T", "alpha": "a"}) + suffix
    return Trained(name + suffix, "kd", "student", parent=parent, distillation=distillation)


def trained(model: ModelName, *, suffix: str = "") -> Trained:
    """The default row of an architecture."""
    return {"ffn": ffn_baseline, "moe": sparse_moe, "student": student}[model](suffix=suffix)


def quantized(
    model: ModelName,
    mode: Mode | None = None,
    calibration: Calibration = Calibration(),
    *,
    suffix: str = "",
) -> Quantized:
    """The INT8 form of a trained model; static by default, for the MoE dynamic."""
    parent = trained(model, suffix=suffix)
    default_mode: Mode = "dynamic" if model == "moe" else "static"
    mode = mode or default_mode
    if model == "moe":
        name = {"dynamic": "Sparse_MoE_INT8", "static": "Sparse_MoE_PTQ"}[mode]
    else:
        name = {"ffn": "FFN_PTQ_INT8", "student": "KD_FFN_Student_INT8"}[model]
        name += "" if mode == default_mode else f"-{mode}"
    technique = f"{mode} ptq" if model == "ffn" else f"{parent.technique} + {mode} ptq"
    name += departures(calibration, {"calibration_size": "cal", "calibration_method": ""}) + suffix
    return Quantized(name, technique, parent.model, mode, calibration)


def rounded(model: Literal["ffn", "moe"], *, suffix: str = "") -> Rounded:
    """The BF16 form of a trained model."""
    parent = trained(model, suffix=suffix)
    return Rounded({"ffn": "FFN_BF16", "moe": "Sparse_MoE_BF16"}[model] + suffix, parent.technique, parent.model)


def table_rows(*, suffix: str = "", bfloat16: bool = True) -> list[Row]:
    """All nine models, every parent before its children; then, for a CPU that has BF16, those two."""
    rows: list[Row] = [
        ffn_baseline(suffix=suffix),
        quantized("ffn", suffix=suffix),
        sparse_moe(suffix=suffix),
        quantized("moe", suffix=suffix),
        quantized("moe", "static", suffix=suffix),
        student("moe", suffix=suffix),
        student("ffn", suffix=suffix),
        student(distillation=None, suffix=suffix),
        quantized("student", suffix=suffix),
    ]
    return rows + [rounded("ffn", suffix=suffix), rounded("moe", suffix=suffix)] * bfloat16


CALIBRATIONS = [
    Calibration(size, method)
    for method in get_args(CalibrationMethod)
    for size in (10, 100, Calibration().calibration_size)
]
GRID = [DistillationConfig(temperature, alpha) for temperature in (1, 2, 3, 5, 10, 20) for alpha in (0.3, 0.7, 0.9, 1)]


def claim_rows(*, suffix: str = "") -> list[Row]:
    """The nine models, and what else the claims about them compare with."""
    rivals: tuple[Rival, ...] = get_args(Rival)
    variants = [
        RoutingConfig(top_k=RoutingConfig().num_experts),
        RoutingConfig(balance="none"),
        RoutingConfig(balance="switch"),
        RoutingConfig(balance="cv"),
        RoutingConfig(balance="wrong-sign"),
        RoutingConfig(noise=False),
    ]
    return [
        *table_rows(suffix=suffix, bfloat16=False),
        *(quantized("moe", "static", other, suffix=suffix) for other in CALIBRATIONS if other != Calibration()),
        *(dense_rival(rival, suffix=suffix) for rival in rivals),
        *(sparse_moe(routing, suffix=suffix) for routing in variants),
    ]


def grid_rows(*, suffix: str = "") -> list[Row]:
    """Students of every temperature and alpha that claims try, with their teacher and the control."""
    return [
        sparse_moe(suffix=suffix),
        student(distillation=None, suffix=suffix),
        *(student("moe", distillation, suffix=suffix) for distillation in GRID),
    ]


def place_in_table(model: str) -> int:
    """Rank of a model in the table: that of the row it is, or that it departs from."""
    rivals: tuple[Rival, ...] = get_args(Rival)
    names = [row.model for row in (*table_rows(), *map(dense_rival, rivals))]
    return names.index(model.partition("-")[0])


def departures(config: Any, labels: dict[str, str], *, default: Any = None) -> str:
    """`-T10` for each field of `config` that differs from its default; `labels` maps field to `T`."""
    default = type(config)() if default is None else default
    changed = {field: getattr(config, field) for field in labels if getattr(config, field) != getattr(default, field)}
    return "".join(f"-{labels[field]}{_shortest(value)}" for field, value in changed.items())


def _shortest(value: object) -> str:
    """A value as text that no other value shares: 10.0 as 10."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
