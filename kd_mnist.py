"""Distil a trained teacher into the small FFN student, export it, and measure it.

python kd_mnist.py                          # the MoE teaches
python kd_mnist.py --teacher ffn            # the baseline teaches
python kd_mnist.py --no-distillation        # the control: same student, labels only
python kd_mnist.py --temperature 10         # becomes KD_FFN_Student-T10
"""

from dataclasses import dataclass, field
from typing import Literal

from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.console import make_and_print, open_lab
from mnist_lab.errors import UserError
from mnist_lab.options import Options
from mnist_lab.rows import student
from mnist_lab.scripts import run_script


@dataclass(frozen=True)
class KDOptions(Options):
    teacher: Literal["moe", "ffn"] = "moe"
    """Trained model that teaches."""
    distillation: bool = True
    """Learn from the teacher; with --no-distillation from the labels alone."""
    softening: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.distillation and (self.teacher != "moe" or self.softening != DistillationConfig()):
            raise UserError("--no-distillation learns from the labels alone: drop --teacher, --temperature and --alpha")


def main(options: KDOptions) -> None:
    distillation = options.softening if options.distillation else None
    with open_lab(options) as lab:
        make_and_print(lab, student(options.teacher, distillation, suffix=options.suffix), options.seed)


if __name__ == "__main__":
    run_script(main, KDOptions, __doc__)
