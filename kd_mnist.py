"""Distil a trained teacher into the small FFN student, export it, and measure it.

python kd_mnist.py                          # the MoE teaches: expect 98.85 ± 0.12 %
python kd_mnist.py --teacher ffn            # the baseline teaches: expect 99.00 ± 0.07 %
python kd_mnist.py --no-distillation        # the control, same student, labels only: expect 99.01 ± 0.06 %
python kd_mnist.py --temperature 10         # becomes KD_FFN_Student-T10
python kd_mnist.py --pool 2 --windows 8x5s2 16x3s2 --hidden 32      # KD_small: a student of the small family
"""

from dataclasses import dataclass, field
from typing import Literal

from mnist_lab.command.console import make_and_print, open_lab
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import Options
from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.errors import UserError
from mnist_lab.experiments.rows import (
    FFN,
    MOE,
    STUDENT_WITHOUT_TEACHER,
    small_from_scratch,
    small_student,
    student,
)
from mnist_lab.experiments.run import Run
from mnist_lab.models.small import SmallOptions


@dataclass(frozen=True)
class KDOptions(Options):
    teacher: Literal["moe", "ffn"] = "moe"
    """Trained model that teaches."""
    distillation: bool = True
    """Learn from the teacher; with --no-distillation from the labels alone."""
    softening: DistillationConfig = field(default_factory=DistillationConfig)
    small: SmallOptions = field(default_factory=SmallOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.distillation and (self.teacher != "moe" or self.softening != DistillationConfig()):
            raise UserError("--no-distillation learns from the labels alone: drop --teacher, --temperature and --alpha")


def main(options: KDOptions) -> None:
    teacher, shape = MOE if options.teacher == "moe" else FFN, options.small.shape
    if options.distillation:
        row = small_student(shape, teacher, options.softening) if shape else student(teacher, options.softening)
    else:
        row = small_from_scratch(shape) if shape else STUDENT_WITHOUT_TEACHER
    with open_lab(options) as lab:
        make_and_print(Run(lab, row, options.seed))


if __name__ == "__main__":
    run_script(main, KDOptions, __doc__)
