"""Distil a trained teacher into the small FFN student, export it, and measure it.

python kd_mnist.py                          # the MoE teaches: expect 98.85 ± 0.12 %
python kd_mnist.py --teacher ffn            # the baseline teaches: expect 99.00 ± 0.07 %
python kd_mnist.py --no-distillation        # the control, same student, labels only: expect 99.01 ± 0.06 %
python kd_mnist.py --temperature 10         # becomes KD_FFN_Student-T10
python kd_mnist.py --data synthetic         # on made images, with the teacher's classes alone
"""

from dataclasses import dataclass, field
from typing import Literal

from mnist_lab.command.console import make_and_print, open_lab
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import Options
from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.compress.synthetic import Images
from mnist_lab.errors import UserError
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import FFN, MOE, STUDENT_WITHOUT_TEACHER, student, student_on_images
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
    teacher: Literal["moe", "ffn"] = "moe"
    """Trained model that teaches."""
    distillation: bool = True
    """Learn from the teacher; with --no-distillation from the labels alone."""
    softening: DistillationConfig = field(default_factory=DistillationConfig)
    images: ImageOptions = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.distillation and (self.teacher != "moe" or self.softening != DistillationConfig()):
            raise UserError("--no-distillation learns from the labels alone: drop --teacher, --temperature and --alpha")
        by_class = self.images.data != "labels"
        if by_class and (not self.distillation or self.softening != DistillationConfig()):
            raise UserError(
                f"--data {self.images.data} learns the teacher's classes: "
                "drop --no-distillation, --temperature and --alpha"
            )

    @property
    def row(self) -> Row:
        teacher = MOE if self.teacher == "moe" else FFN
        if self.images.data != "labels":
            return student_on_images(self.images.data, teacher, num_images=self.images.num_images)
        return student(teacher, self.softening) if self.distillation else STUDENT_WITHOUT_TEACHER


def main(options: KDOptions) -> None:
    row = options.row
    with open_lab(options) as lab:
        if row.images_of == lab.dataset.name:
            raise UserError(f"--data {row.images_of} is the data set itself: take --data true")
        record = make_and_print(Run(lab, row, options.seed))
        assert record.proof is not None
        if options.images.data != "labels":
            print(record.proof["text"])


if __name__ == "__main__":
    run_script(main, KDOptions, __doc__)
