"""Where a training step's time goes, and how much of the machine's FP32 limit training reaches.

python -m benchmarks.training                       # the standard recipe's steps, about a minute

Expect 73,000 images a second for the FFN and 22,000 for the MoE on two cores, 37 and 26 % of the limit. Writes
training.csv and .md to results/<dataset>-<preset>-<recipe>/benchmarks. Every part of a step is timed by turns on
all cores, then whole epochs of `fit`, with their batches, progress bar and validation. Useful operations are those of
the matrix products: 2 per active parameter and image forward (of a teacher too), 4 backward, where the first layer
needs no gradient of the pixels. The limit is the best FP32 matrix product on all cores.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
from torch import nn

from benchmarks.common import BenchmarkOptions, format_table, write_outputs
from benchmarks.limits import product_rate
from mnist_lab.command.console import open_lab
from mnist_lab.command.entry import run_script
from mnist_lab.compress.distill import Distil, distillation_objective
from mnist_lab.compress.train import TrainFFN, TrainMoE
from mnist_lab.data import Split, augment
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import FFN, MOE, STUDENT, STUDENT_WITHOUT_TEACHER
from mnist_lab.experiments.run import Run
from mnist_lab.measure import Latency, measure_latency
from mnist_lab.models import Model, count_parameters
from mnist_lab.models.moe import SparseMoE
from mnist_lab.training import AdamW, Batch, Objective, Recipe, RecipeName, fit, sum_terms, supervised_loss

NUM_ROUNDS = 9
NUM_EPOCHS = 3


@dataclass(frozen=True)
class TrainingOptions(BenchmarkOptions):
    recipe: RecipeName = "standard"
    """Training budget whose batch size and augmentation are timed."""


def main(options: TrainingOptions) -> None:
    rows = (FFN, MOE, STUDENT, STUDENT_WITHOUT_TEACHER)
    with open_lab(options.suite_options("onnxruntime")) as lab:
        limit = product_rate("FP32")
        table = pd.DataFrame([measure_training(Run(lab, row, options.seed), limit=limit) for row in rows])
    text = (
        f"# Where a training step's time goes\n\nMilliseconds per step of {lab.recipe.batch_size} images, "
        f"{torch.get_num_threads()} threads; FP32 limit {limit / 1e9:.0f} G operations/s.\n\n"
        + format_table(table, ".3g")
    )
    write_outputs(lab.results / "benchmarks", "training", table, text)


def measure_training(run: Run, *, limit: float) -> dict[str, object]:
    """A row of the table: the parts of a step, images per second, and their share of the limit."""
    dataset, recipe, model = run.lab.dataset, run.lab.recipe, build(run, run.row)
    objective: Objective = supervised_loss
    operations = useful_operations(model)
    if isinstance(run.row.step, Distil):
        assert run.row.teacher is not None
        teacher = build(run, run.row.teacher)  # its random weights are as fast as trained ones
        # Where no augmentation changes the images, it sees them once in all.
        fixed_pixels = dataset.train.pixels if recipe.augmentation is None else None
        objective = distillation_objective(teacher, run.row.step.distillation, device="cpu", fixed_pixels=fixed_pixels)
        operations += 2 * count_parameters(teacher)[1] if fixed_pixels is None else 0
    times = time_step(recipe, dataset.train, model, objective)
    start = time.perf_counter()
    fit(model, dataset, replace(recipe, epochs=NUM_EPOCHS), seed=run.seed, objective=objective, name=run.row.name)
    images_per_s = NUM_EPOCHS * len(dataset.train) / (time.perf_counter() - start)
    return {
        "model": run.row.name,
        **{part: latency.median_ms for part, latency in times.items()},
        "images/s": round(images_per_s),
        "share of limit": operations * images_per_s / limit,
    }


def build(run: Run, row: Row) -> Model:
    """An untrained model of a row that is trained from scratch."""
    assert isinstance(row.step, TrainFFN | TrainMoE | Distil)
    return run.work().build(row.step.config(run.lab.preset, run.lab.dataset.spec))


def time_step(recipe: Recipe, train: Split, model: nn.Module, objective: Objective) -> dict[str, Latency]:
    """Median milliseconds of each part of a step, by turns."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(train), generator=generator)[: recipe.batch_size]  # (B,)
    batch = Batch(train.pixels[rows], train.labels[rows], rows)
    optimizer = AdamW(model, recipe.weight_decay)
    model.train()

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        sum_terms(objective(model, batch).terms).backward()

    parts: dict[str, Callable[[], object]] = {"batch": partial(train.pixels.index_select, 0, rows)}
    if recipe.augmentation is not None:
        parts["augmentation"] = partial(augment, batch.pixels, recipe.augmentation, generator)
    parts |= {"forward and backward": forward_and_backward, "update": partial(optimizer.step, recipe.learning_rate)}
    forward_and_backward()
    return measure_latency(parts, num_rounds=NUM_ROUNDS)


def useful_operations(model: Model) -> float:
    """Multiplications and additions of a model's matrix products for one training image."""
    first = model.stem if isinstance(model, SparseMoE) else model.layers[0]
    assert isinstance(first, nn.Linear)
    return 6 * count_parameters(model)[1] - 2 * first.weight.numel()


if __name__ == "__main__":
    run_script(main, TrainingOptions, __doc__)
