"""Dark knowledge: what a student learns of a digit that it never sees (Hinton et al. 2015, arXiv:1503.02531, §3).

A teacher 784-1200-1200-10 learns from shifted images. Students 784-800-800-10 see the images as they are: one learns
from the labels, one from the teacher's probabilities at T = 20, one the same way but without a single 3. Its bias for
the 3 is then raised by what gives the fewest errors on the validation images, where the paper took the test images.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
from tabulate import tabulate

from mnist_lab import measure
from mnist_lab.compress.distill import Distil, DistillationConfig
from mnist_lab.compress.train import TrainFFN
from mnist_lab.data import Augmentation, Split
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import ensure_weights
from mnist_lab.experiments.row import Row, describe
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.technique import Made, Step, Work
from mnist_lab.files import BLANK, as_json, check_seal, read_bytes, reading, seal, write_atomically
from mnist_lab.models import Model
from mnist_lab.training import Recipe, torch_predictor

LEFT_OUT = 3
SHIFTS = Augmentation(rotation_degrees=0, shift_pixels=2, scale=0, shear=0, elastic_pixels=0)
TEACHER_RECIPE = Recipe(epochs=30, batch_size=256, augmentation=SHIFTS)
STUDENT_RECIPE = Recipe(epochs=20, batch_size=256)
BIASES = np.arange(0, 20.05, 0.1, dtype=np.float32)


@dataclass(frozen=True)
class OnItsOwnTerms:
    """A step on a recipe of its own, and perhaps without the images of one class."""

    step: Step
    recipe: Recipe
    without_class: int | None = field(default=None, metadata={"tag": None})
    label: ClassVar[str] = ""
    cost: ClassVar[float] = 4.0

    def make(self, work: Work) -> Made:
        work = replace(work, recipe=self.recipe)
        if self.without_class is not None:
            train = work.dataset.train
            keep = train.labels != self.without_class
            work = replace(work, dataset=replace(work.dataset, train=Split(train.pixels[keep], train.labels[keep])))
        return self.step.make(work)


def paper_rows(teacher_recipe: Recipe = TEACHER_RECIPE, student_recipe: Recipe = STUDENT_RECIPE) -> tuple[Row, ...]:
    """Teacher, student of the labels, student of the teacher, and the one that never sees a 3."""
    distil = Distil(DistillationConfig(temperature=20, alpha=1), shape=(800, 800))
    teacher = Row("teacher", OnItsOwnTerms(TrainFFN((1200, 1200)), teacher_recipe))
    return (
        teacher,
        Row("labels", OnItsOwnTerms(TrainFFN((800, 800)), student_recipe)),
        Row("distilled", OnItsOwnTerms(distil, student_recipe), teacher=teacher),
        Row("distilled-without-3", OnItsOwnTerms(distil, student_recipe, LEFT_OUT), teacher=teacher),
    )


@dataclass(frozen=True)
class Errors:
    """Test images that a model gets wrong: all, and those of the digit 3."""

    all_digits: int
    threes: int


# Errors in the paper on 10,000 test images, and on their 1,010 threes where it gives them.
PAPER: dict[str, tuple[int, int | None]] = {
    "teacher": (67, None),
    "labels": (146, None),
    "distilled": (74, None),
    "distilled-without-3": (206, 133),
    "bias corrected": (109, 14),
}


@dataclass(frozen=True)
class DarkKnowledge:
    """One seed's outcome."""

    seed: int
    dataset: str
    recipes: dict[str, Any] = field(repr=False)  # by role
    errors: dict[str, Errors] = field(repr=False)  # by role, and "bias corrected"
    bias: float  # that the corrected student's 3 was given
    num_images: int  # of the test split
    num_threes: int


def run_seed(lab: Lab, rows: Sequence[Row], seed: int) -> DarkKnowledge:
    """Train the rows' models, or load those that are up to date, and count their test errors.

    Raises:
        UserError: a checkpoint is broken, or the folder cannot be written.
        TrainingDiverged: a loss is no longer finite.
    """
    models: dict[str, Model] = {}
    for row in rows:
        run = Run(lab, row, seed)
        ensure_weights(run)
        models[row.name] = run.load()
    return _count_errors(models, lab, seed, recipes_of(rows))


def recipes_of(rows: Sequence[Row]) -> dict[str, Any]:
    """What each role learns by, as JSON gives it back."""
    recipes: dict[str, Any] = as_json({row.name: describe(row.step) for row in rows})
    return recipes


def _count_errors(models: dict[str, Model], lab: Lab, seed: int, recipes: dict[str, Any]) -> DarkKnowledge:
    pixels, labels = lab.test.numpy()
    logits = {role: measure.predict(torch_predictor(model), pixels) for role, model in models.items()}
    student = models["distilled-without-3"]
    validation_pixels, validation_labels = lab.dataset.validation.numpy()
    bias = best_bias(measure.predict(torch_predictor(student), validation_pixels), validation_labels)
    logits["bias corrected"] = raise_bias(logits["distilled-without-3"], bias)
    is_three = labels == LEFT_OUT
    wrong = {role: of_role.argmax(axis=1) != labels for role, of_role in logits.items()}
    return DarkKnowledge(
        seed=seed,
        dataset=lab.dataset.name,
        recipes=recipes,
        errors={role: Errors(int(w.sum()), int(w[is_three].sum())) for role, w in wrong.items()},
        bias=bias,
        num_images=len(labels),
        num_threes=int(is_three.sum()),
    )


def best_bias(logits: measure.Array, labels: measure.Labels) -> float:
    """What to add to the logit of the 3 for the highest accuracy; the smallest such value."""
    accuracies = [measure.accuracy(raise_bias(logits, float(bias)), labels) for bias in BIASES]
    return float(BIASES[int(np.argmax(accuracies))])


def raise_bias(logits: measure.Array, bias: float) -> measure.Array:
    raised = logits.copy()
    raised[:, LEFT_OUT] += np.float32(bias)
    return raised


def save_dark_knowledge(path: Path, runs: Sequence[DarkKnowledge]) -> None:
    """Keep what every seed came to, sealed.

    Raises:
        RunFailed: the folder cannot be written.
    """
    content = msgspec.json.format(msgspec.json.encode({"digest": BLANK, "runs": runs}), indent=1)
    write_atomically(path, lambda temporary: temporary.write_bytes(seal(content + b"\n")))


def load_dark_knowledge(path: Path, dataset: str) -> list[DarkKnowledge]:
    """What `save_dark_knowledge` kept of seeds that learned of this data set as the paper has it.

    Raises:
        UserError: the file is missing, damaged, edited, or of something else.
    """
    content = read_bytes(path)
    with reading(path, "Delete it and run dark_knowledge_mnist.py again."):
        check_seal(content)
        runs = msgspec.convert(msgspec.json.decode(content)["runs"], list[DarkKnowledge])
        if not runs or len({run.seed for run in runs}) < len(runs):
            raise ValueError("it holds no seed, or one twice")
        recipes = recipes_of(paper_rows())
        if any(run.dataset != dataset or run.recipes != recipes or run.errors.keys() != PAPER.keys() for run in runs):
            raise ValueError(f"it is not of {dataset} and of the recipes of this version")
    return runs


def format_dark_knowledge(runs: Sequence[DarkKnowledge], *, left_out: str = str(LEFT_OUT)) -> str:
    """Errors of every seed beside the paper's, as Markdown.

    Args:
        left_out: what the class that the student never sees is called.
    """
    shown = "threes" if left_out == str(LEFT_OUT) else f"images of class {left_out}"
    rows = [
        [
            role,
            " ".join(str(run.errors[role].all_digits) for run in runs),
            in_paper,
            " ".join(str(run.errors[role].threes) for run in runs),
            "" if threes_in_paper is None else threes_in_paper,
        ]
        for role, (in_paper, threes_in_paper) in PAPER.items()
    ]
    table = tabulate(rows, ["model", "errors by seed", "paper", f"on {shown} by seed", "paper"], "github")
    biases = ", ".join(f"{run.bias:.1f}" for run in runs)
    return (
        f"{table}\n\n{runs[0].num_images:,} test images, {runs[0].num_threes:,} {shown} (paper: 10,000 and 1,010). "
        f"The bias of the {left_out} was raised by {biases} (paper: 3.5)."
    )
