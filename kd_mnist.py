"""Distil a trained teacher into a small student, export it, and measure it.

python kd_mnist.py                          # the MoE teaches: expect 98.85 ± 0.12 %
python kd_mnist.py --teacher ffn            # the baseline teaches: expect 99.00 ± 0.07 %
python kd_mnist.py --no-distillation        # the control, same student, labels only: expect 99.01 ± 0.06 %
python kd_mnist.py --temperature 10         # becomes KD_FFN_Student-T10
python kd_mnist.py --student moe --student-experts 2 --student-width 32    # a small mixture, KD_MoE_Student-E2-w32
python kd_mnist.py --pool 2 --windows 8x5s2 16x3s2 --hidden 32      # KD_small: a student of the small family
"""

from dataclasses import dataclass, field
from typing import Literal

from mnist_lab.command.console import make_and_print, open_lab, print_expert_load
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import Options
from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.compress.distill_mixture import DistilMixture, Matching, SmallMixture
from mnist_lab.errors import UserError
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import (
    FFN,
    MOE,
    STUDENT_WITHOUT_TEACHER,
    small_from_scratch,
    small_student,
    student,
    student_mixture,
)
from mnist_lab.experiments.run import Run
from mnist_lab.models.small import SmallOptions


@dataclass(frozen=True)
class KDOptions(Options):
    student: Literal["ffn", "moe"] = "ffn"
    """What learns: a small FFN, or a small mixture of experts."""
    teacher: Literal["moe", "ffn"] = "moe"
    """Trained model that teaches."""
    distillation: bool = True
    """Learn from the teacher; with --no-distillation from the labels alone."""
    softening: DistillationConfig = field(default_factory=DistillationConfig)
    mixture: SmallMixture = field(default_factory=SmallMixture)
    matching: Matching = field(default_factory=Matching)
    small: SmallOptions = field(default_factory=SmallOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.distillation and (self.teacher != "moe" or self.softening != DistillationConfig()):
            raise UserError("--no-distillation learns from the labels alone: drop --teacher, --temperature and --alpha")
        if self.student == "moe":
            if self.small.shape:
                raise UserError("--hidden, --pool and --windows shape a dense student: drop --student moe")
            if not self.distillation:
                raise UserError("--no-distillation trains the small FFN: drop --student moe, or give --alpha 0")
            if self.teacher == "ffn" and self.matching.needs_mixture:
                raise UserError("--teacher ffn has no experts to match: add --router-weight 0 --experts-weight 0")
        elif (self.mixture, self.matching) != (SmallMixture(), Matching()):
            raise UserError(
                "--student-experts, --student-width, --router-weight and --experts-weight are for --student moe"
            )

    @property
    def row(self) -> Row:
        teacher, shape = MOE if self.teacher == "moe" else FFN, self.small.shape
        if self.student == "moe":
            return student_mixture(teacher, DistilMixture(self.softening, self.mixture, self.matching))
        if not self.distillation:
            return small_from_scratch(shape) if shape else STUDENT_WITHOUT_TEACHER
        return small_student(shape, teacher, self.softening) if shape else student(teacher, self.softening)


def main(options: KDOptions) -> None:
    with open_lab(options) as lab:
        record = make_and_print(Run(lab, options.row, options.seed))
        if options.student == "moe":
            print_expert_load(record)


if __name__ == "__main__":
    run_script(main, KDOptions, __doc__)
