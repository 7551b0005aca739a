"""What the claims about the table's models compare with: rivals, variants, and the grid of temperature and alpha."""

from typing import get_args

from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.compress.int8 import Calibration, CalibrationMethod, StaticInt8
from mnist_lab.compress.train import TrainFFN
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import FFN, MODELS, MOE, STUDENT_WITHOUT_TEACHER, sparse_moe, static_int8, student
from mnist_lab.models.moe import RoutingConfig

# Dense FFNs with as many parameters as the MoE has per image, and in all.
RIVALS = (Row("FFN_equal_active", TrainFFN("equal-active")), Row("FFN_equal_total", TrainFFN("equal-total")))
VARIANTS = tuple(
    sparse_moe(routing)
    for routing in (
        RoutingConfig(top_k=RoutingConfig().num_experts),
        RoutingConfig(balance="none"),
        RoutingConfig(balance="switch"),
        RoutingConfig(balance="cv"),
        RoutingConfig(balance="wrong-sign"),
        RoutingConfig(noise=False),
    )
)
CALIBRATIONS = tuple(
    Calibration(size, method)
    for method in get_args(CalibrationMethod)
    for size in (10, 100, Calibration().calibration_size)
)
GRID = tuple(
    DistillationConfig(temperature, alpha) for temperature in (1, 2, 3, 5, 10, 20) for alpha in (0.3, 0.7, 0.9, 1)
)


def calibrated(calibration: Calibration) -> Row:
    """The MoE in static INT8 by another calibration."""
    return static_int8(MOE, StaticInt8(calibration))


def claim_rows() -> tuple[Row, ...]:
    """The table's models, and what else the claims about them compare with."""
    others = [calibrated(calibration) for calibration in CALIBRATIONS if calibration != Calibration()]
    return (*MODELS, *others, *RIVALS, *VARIANTS)


def grid_rows() -> tuple[Row, ...]:
    """Students of every temperature and alpha that claims try, with their teacher and the control."""
    return (MOE, STUDENT_WITHOUT_TEACHER, *(student(MOE, distillation) for distillation in GRID))


def winners(distillation: DistillationConfig) -> tuple[Row, ...]:
    """The students of both teachers with the grid's best setting; none where that is the default."""
    if distillation == DistillationConfig():
        return ()
    return student(MOE, distillation), student(FFN, distillation)
