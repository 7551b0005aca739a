"""Distil a trained teacher into a small student, export it, and measure it.

python kd_mnist.py                          # the MoE teaches: expect 98.85 ± 0.12 %
python kd_mnist.py --teacher ffn            # the baseline teaches: expect 99.00 ± 0.07 %
python kd_mnist.py --teacher ensemble       # three seeds of the MoE teach together
python kd_mnist.py --teacher Sparse_MoE-E8  # any trained row teaches, by the name of its checkpoint
python kd_mnist.py --no-distillation        # the control, same student, labels only: expect 99.01 ± 0.06 %
python kd_mnist.py --temperature 10         # becomes KD_FFN_Student-T10
python kd_mnist.py --data synthetic         # on made images, with the teacher's classes alone
python kd_mnist.py --windows 8x5s2 12x3s2 12x3s1                           # KD_small: of a small shape
python kd_mnist.py --student moe --student-experts 3 --student-width 32    # KD_MoE_Student: a small mixture
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from tyro.conf import arg

from mnist_lab.command.console import make_and_print, open_lab, print_expert_load
from mnist_lab.command.entry import run_script
from mnist_lab.command.options import MAX_RUN_SEEDS, NUM_SEEDS, RowOptions
from mnist_lab.command.source import find_named, naming
from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.compress.distill_mixture import DistilMixture, Matching, SmallMixture
from mnist_lab.compress.synthetic import Images
from mnist_lab.errors import UserError
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.pipeline import check_name
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import (
    STUDENT_WITHOUT_TEACHER,
    TeacherName,
    small_from_scratch,
    small_student,
    student,
    student_mixture,
    student_on_images,
    taught_by,
)
from mnist_lab.models.moe import SparseMoEConfig
from mnist_lab.models.small import SmallOptions

TEACHERS: tuple[TeacherName, ...] = get_args(TeacherName)


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
class KDOptions(RowOptions):
    student: Literal["ffn", "moe"] = "ffn"
    """What learns: a small dense model, or a small mixture of experts."""
    teacher: Annotated[str, arg(metavar=f"{{{','.join(TEACHERS)},NAME}}")] = "moe"
    """Trained model that teaches: the MoE, the FFN, several seeds of the MoE, one of the wide preset, or an MoE of a
    quarter of the epochs; other than moe and ffn, it is trained when it is missing. Or any trained row, by the name of
    its checkpoint without the seed (docs/variants.md)."""
    ensemble_size: int = 3
    """Seeds that teach with --teacher ensemble, from --seed upward."""
    distillation: bool = True
    """Learn from the teacher; with --no-distillation from the labels alone."""
    softening: DistillationConfig = field(default_factory=DistillationConfig)
    small: SmallOptions = field(default_factory=SmallOptions)
    mixture: SmallMixture = field(default_factory=SmallMixture)
    matching: Matching = field(default_factory=Matching)
    images: ImageOptions = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_teacher()
        self._check_student()
        if self.images.data != "labels" and (not self.distillation or self.softening != DistillationConfig()):
            raise UserError(
                f"--data {self.images.data} learns the teacher's classes: "
                "drop --no-distillation, --temperature and --alpha"
            )

    def _check_teacher(self) -> None:
        if not self.distillation and (self.teacher != "moe" or self.softening != DistillationConfig()):
            raise UserError("--no-distillation learns from the labels alone: drop --teacher, --temperature and --alpha")
        if self.ensemble_size != 3 and self.teacher != "ensemble":
            raise UserError(f"--ensemble-size {self.ensemble_size} is for --teacher ensemble")
        last = self.all_seeds[-1]
        most = min(MAX_RUN_SEEDS, NUM_SEEDS - last)
        if self.teacher == "ensemble" and not 2 <= self.ensemble_size <= most:
            raise UserError(f"--ensemble-size {self.ensemble_size} must lie between 2 and {most:,}, from seed {last}")
        if self.teacher in {"wide-moe", "wide-ffn"} and self.preset == "wide":
            raise UserError(f"--teacher {self.teacher} is for another preset: drop --preset wide, or wide-")

    def _check_student(self) -> None:
        if self.student == "ffn":
            if (self.mixture, self.matching) != (SmallMixture(), Matching()):
                raise UserError(
                    "--student-experts, --student-width, --router-weight and --experts-weight are for --student moe"
                )
            return
        if self.small.shape:
            raise UserError("--hidden, --pool and --windows shape a dense student: drop --student moe")
        if not self.distillation:
            raise UserError("--no-distillation trains a dense student: drop --student moe, or give --alpha 0")
        if self.images.data != "labels":
            raise UserError(f"--data {self.images.data} is for a dense student: drop --student moe")
        if self.teacher in {"ffn", "wide-ffn", "ensemble"}:
            self._check_router()

    def _check_router(self) -> None:
        """Raise UserError where a teacher without a router of its own is to teach one."""
        if self.student == "moe" and self.matching.needs_mixture:
            raise UserError(
                f"--teacher {self.teacher} has no one router to match: add --router-weight 0 --experts-weight 0"
            )

    def find_row(self, lab: Lab) -> tuple[Lab, Row]:
        """The student; and the lab with what departs from the recipe in its teacher's name, where that is a name.

        Raises:
            UserError: it is no trained row of the lab, or the student cannot learn from it.
        """
        for usual in TEACHERS:
            if self.teacher == usual:
                return lab, self._row_of(usual)
        found = find_named(lab, self.teacher, self.seed, "--teacher")
        if not isinstance(found.config, SparseMoEConfig):
            self._check_router()
        row = self._taught(found.row)
        with naming(f"--teacher {self.teacher}"):
            check_name(row)
        return found.lab, row

    def _row_of(self, teacher: TeacherName) -> Row:
        if self.distillation:
            return taught_by(teacher, self._taught, self.ensemble_size)
        shape = self.small.shape
        return small_from_scratch(shape) if shape else STUDENT_WITHOUT_TEACHER

    def _taught(self, teacher: Row) -> Row:
        shape = self.small.shape
        if self.student == "moe":
            return student_mixture(teacher, DistilMixture(self.softening, self.mixture, self.matching))
        taught = small_student(shape, teacher, self.softening) if shape else student(teacher, self.softening)
        if self.images.data == "labels":
            return taught
        return student_on_images(taught, self.images.data, num_images=self.images.num_images)


def main(options: KDOptions) -> None:
    with open_lab(options) as lab:
        lab, row = options.find_row(lab)
        if row.images_of == lab.dataset.name:
            raise UserError(f"--data {row.images_of} is the data set itself: take --data true")
        is_made = options.teacher in {"ensemble", "wide-moe", "wide-ffn", "early-moe"}
        for record in make_and_print(lab, row, options.all_seeds, with_parents=is_made):
            if options.student == "moe":
                print_expert_load(record)
            if options.images.data != "labels":
                assert record.proof is not None
                print(record.proof["text"])


if __name__ == "__main__":
    run_script(main, KDOptions, __doc__)
