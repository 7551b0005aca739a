"""Distil a trained teacher into the small FFN student, export it, and measure it.

python kd_mnist.py                          # the MoE teaches: expect 98.85 ± 0.12 %
python kd_mnist.py --teacher ffn            # the baseline teaches: expect 99.00 ± 0.07 %
python kd_mnist.py --no-distillation        # the control, same student, labels only: expect 99.01 ± 0.06 %
python kd_mnist.py --temperature 10         # becomes KD_FFN_Student-T10
python kd_mnist.py --data synthetic         # on made images, with the teacher's classes alone
python kd_mnist.py --teacher ensemble       # three seeds of the MoE teach together
"""

from dataclasses import dataclass, field
from typing import Literal

from mnist_lab.command.console import make_and_print, open_lab
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import MAX_RUN_SEEDS, NUM_SEEDS, Options
from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.compress.synthetic import Images
from mnist_lab.errors import UserError
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import STUDENT_WITHOUT_TEACHER, TeacherName, student, student_on_images, taught_by
from mnist_lab.experiments.run import Run


@dataclass(frozen=True)
class ImageOptions:
    """What the student learns on."""

    data: Literal["labels", Images] = "labels"
    """The training images and their labels; or images with the teacher's classes alone: made ones (synthetic: evenly
    many augmented, mixed, ascended and generated), noise, the true ones, or another data set's."""
    num_images: int | None = None
    """Images that the teacher labels; when not given, as many as there are for training."""

    def __post_init__(self) -> None:
        if self.data == "labels" and self.num_images is not None:
            raise UserError("--num-images is for images that the teacher labels: name some with --data")


@dataclass(frozen=True)
class KDOptions(Options):
    teacher: TeacherName = "moe"
    """Trained model that teaches: the MoE, the FFN, several seeds of the MoE, one of the wide preset, or an MoE of a
    quarter of the epochs; other than moe and ffn, it is trained when it is missing."""
    ensemble_size: int = 3
    """Seeds that teach with --teacher ensemble, from --seed upward."""
    distillation: bool = True
    """Learn from the teacher; with --no-distillation from the labels alone."""
    softening: DistillationConfig = field(default_factory=DistillationConfig)
    images: ImageOptions = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.distillation and (self.teacher != "moe" or self.softening != DistillationConfig()):
            raise UserError("--no-distillation learns from the labels alone: drop --teacher, --temperature and --alpha")
        if self.ensemble_size != 3 and self.teacher != "ensemble":
            raise UserError(f"--ensemble-size {self.ensemble_size} is for --teacher ensemble")
        most = min(MAX_RUN_SEEDS, NUM_SEEDS - self.seed)
        if self.teacher == "ensemble" and not 2 <= self.ensemble_size <= most:
            raise UserError(
                f"--ensemble-size {self.ensemble_size} must lie between 2 and {most:,}, from --seed {self.seed}"
            )
        if self.teacher.startswith("wide") and self.preset == "wide":
            raise UserError(f"--teacher {self.teacher} is for another preset: drop --preset wide, or wide-")
        by_class = self.images.data != "labels"
        if by_class and (not self.distillation or self.softening != DistillationConfig()):
            raise UserError(
                f"--data {self.images.data} learns the teacher's classes: "
                "drop --no-distillation, --temperature and --alpha"
            )

    @property
    def row(self) -> Row:
        if not self.distillation:
            return STUDENT_WITHOUT_TEACHER
        return taught_by(self.teacher, self._taught, self.ensemble_size)

    def _taught(self, teacher: Row) -> Row:
        if self.images.data == "labels":
            return student(teacher, self.softening)
        return student_on_images(self.images.data, teacher, num_images=self.images.num_images)


def main(options: KDOptions) -> None:
    row = options.row
    with open_lab(options) as lab:
        if row.images_of == lab.dataset.name:
            raise UserError(f"--data {row.images_of} is the data set itself: take --data true")
        record = make_and_print(Run(lab, row, options.seed), with_parents=options.teacher not in {"moe", "ffn"})
        assert record.proof is not None
        if options.images.data != "labels":
            print(record.proof["text"])


if __name__ == "__main__":
    run_script(main, KDOptions, __doc__)
