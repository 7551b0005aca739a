"""Dark knowledge: what a student learns of a digit that it never sees (Hinton et al. 2015, arXiv:1503.02531, §3).

A teacher 784-1200-1200-10 learns from shifted images. Students 784-800-800-10 see the images as they are: one learns
from the labels, one from the teacher's probabilities at T = 20, one the same way but without a single 3. Its bias for
the 3 is then raised by what gives the fewest errors on the validation images, where the paper took the test images.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tabulate import tabulate

from mnist_lab import measure
from mnist_lab.checkpoints import load_checkpoint, read_metadata, save_checkpoint
from mnist_lab.compress.distill import DistillationConfig, distillation_objective
from mnist_lab.data import Augmentation, Dataset, Split
from mnist_lab.files import sha256
from mnist_lab.models import build_model
from mnist_lab.models.ffn import FFN, FFNConfig
from mnist_lab.models.moe import SparseMoE
from mnist_lab.training import Objective, Recipe, fit, supervised_loss, torch_predictor

Role = Literal["teacher", "labels", "distilled", "distilled-without-3"]
TEACHER_WIDTHS, STUDENT_WIDTHS = (1200, 1200), (800, 800)
LEFT_OUT = 3
SHIFTS = Augmentation(rotation_degrees=0, shift_pixels=2, scale=0, shear=0, elastic_pixels=0)
TEACHER_RECIPE = Recipe(epochs=30, batch_size=256, augmentation=SHIFTS)
STUDENT_RECIPE = Recipe(epochs=20, batch_size=256)
DISTILLATION = DistillationConfig(temperature=20, alpha=1)
BIASES = np.arange(0, 20.05, 0.1, dtype=np.float32)


class Errors(NamedTuple):
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
    errors: dict[str, Errors] = field(repr=False)  # by role, and "bias corrected"
    bias: float  # that the corrected student's 3 was given
    num_images: int  # of the test split
    num_threes: int


def run_seed(
    dataset: Dataset,
    folder: Path,
    seed: int,
    *,
    teacher_recipe: Recipe = TEACHER_RECIPE,
    student_recipe: Recipe = STUDENT_RECIPE,
    device: str = "cpu",
) -> DarkKnowledge:
    """Train the four models, or load those in `folder` that are up to date, and count their test errors.

    Raises:
        UserError: a checkpoint is broken, or the folder cannot be written.
        TrainingDiverged: a loss is no longer finite.
    """
    models: dict[Role, FFN | SparseMoE] = {}
    teacher_path = folder / f"teacher-seed{seed}.safetensors"
    keep = dataset.train.labels != LEFT_OUT
    without = replace(dataset, train=Split(dataset.train.pixels[keep], dataset.train.labels[keep]))
    plan: list[tuple[Role, tuple[int, ...], Dataset, Recipe]] = [
        ("teacher", TEACHER_WIDTHS, dataset, teacher_recipe),
        ("labels", STUDENT_WIDTHS, dataset, student_recipe),
        ("distilled", STUDENT_WIDTHS, dataset, student_recipe),
        ("distilled-without-3", STUDENT_WIDTHS, without, student_recipe),
    ]
    for role, widths, data, recipe in plan:
        is_distilled = role.startswith("distilled")
        config = {
            "architecture": asdict(FFNConfig(widths, dataset.mean, dataset.std)),
            "recipe": asdict(recipe),
            "distillation": asdict(DISTILLATION) if is_distilled else None,
            "parent_sha256": sha256(teacher_path) if is_distilled else None,
        }
        path = folder / f"{role}-seed{seed}.safetensors"
        if not path.exists() or read_metadata(path).get("config") != _as_json(config):
            objective: Objective = supervised_loss
            if is_distilled:
                objective = distillation_objective(
                    models["teacher"], DISTILLATION, device=device, fixed_pixels=data.train.pixels
                )
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                model = build_model(FFNConfig(widths, dataset.mean, dataset.std))
            fit(model, data, recipe, seed=seed, objective=objective, device=device, name=f"{role} seed {seed}")
            save_checkpoint(path, model, {"role": role, "seed": seed, "config": config})
        models[role] = load_checkpoint(path).model
    return _count_errors(models, dataset, seed)


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    """Tuples as the lists that a file gives back."""
    architecture = config["architecture"] | {"widths": list(config["architecture"]["widths"])}
    return config | {"architecture": architecture}


def _count_errors(models: dict[Role, FFN | SparseMoE], dataset: Dataset, seed: int) -> DarkKnowledge:
    pixels, labels = dataset.load_test().numpy()
    logits = {str(role): measure.predict(torch_predictor(model), pixels) for role, model in models.items()}
    student = models["distilled-without-3"]
    validation_pixels, validation_labels = dataset.validation.numpy()
    bias = best_bias(measure.predict(torch_predictor(student), validation_pixels), validation_labels)
    logits["bias corrected"] = raise_bias(logits["distilled-without-3"], bias)
    is_three = labels == LEFT_OUT
    wrong = {role: of_role.argmax(axis=1) != labels for role, of_role in logits.items()}
    return DarkKnowledge(
        seed=seed,
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


def format_dark_knowledge(runs: Sequence[DarkKnowledge]) -> str:
    """Errors of every seed beside the paper's, as Markdown."""
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
    table = tabulate(rows, ["model", "errors by seed", "paper", "on threes by seed", "paper"], "github")
    biases = ", ".join(f"{run.bias:.1f}" for run in runs)
    return (
        f"{table}\n\n{runs[0].num_images:,} test images, {runs[0].num_threes:,} threes (paper: 10,000 and 1,010). "
        f"The bias of the 3 was raised by {biases} (paper: 3.5)."
    )
