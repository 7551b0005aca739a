"""Where a training step's time goes, and how much of the machine's FP32 limit training reaches.

python -m benchmarks.training                       # the standard recipe's steps, about a minute

Writes training.csv and .md to results/<dataset>-<preset>-<recipe>/benchmarks. Every part of a step is timed by turns on
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
from tabulate import tabulate
from torch import nn

from benchmarks.common import BenchmarkOptions
from benchmarks.limits import product_rate
from mnist_lab.compress.distill import distillation_objective
from mnist_lab.command.console import open_lab
from mnist_lab.data import Split, augment
from mnist_lab.files import write_atomically
from mnist_lab.experiments.lab import Lab, model_config
from mnist_lab.measure import Latency, measure_latency
from mnist_lab.models import build_model, count_parameters
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import SparseMoE
from mnist_lab.experiments.rows import Trained, ffn_baseline, sparse_moe, student
from mnist_lab.command.entry import run_script
from mnist_lab.training import Batch, Objective, Recipe, RecipeName, fit, make_optimizer, sum_terms, supervised_loss

NUM_ROUNDS = 9
NUM_EPOCHS = 3


@dataclass(frozen=True)
class TrainingOptions(BenchmarkOptions):
    recipe: RecipeName = "standard"
    """Training budget whose batch size and augmentation are timed."""


def main(options: TrainingOptions) -> None:
    with open_lab(options.suite_options("onnxruntime")) as lab:
        limit = product_rate("FP32")
        rows = [ffn_baseline(), sparse_moe(), student(), student(distillation=None)]
        table = pd.DataFrame([measure_training(lab, row, options.seed, limit=limit) for row in rows])
    text = (
        f"# Where a training step's time goes\n\nMilliseconds per step of {lab.recipe.batch_size} images, "
        f"{torch.get_num_threads()} threads; FP32 limit {limit / 1e9:.0f} G operations/s.\n\n"
        + tabulate(table.to_dict("list"), "keys", "github", floatfmt=".3g")
    )
    folder = lab.results / "benchmarks"
    write_atomically(folder / "training.csv", lambda path: table.to_csv(path, index=False))
    write_atomically(folder / "training.md", lambda path: path.write_text(text + "\n"))
    print(f"\n{text}\n\nwritten: {folder}/training.csv and .md")


def measure_training(lab: Lab, row: Trained, seed: int, *, limit: float) -> dict[str, object]:
    """A row of the table: the parts of a step, images per second, and their share of the limit."""
    torch.manual_seed(seed)
    model = build_model(model_config(lab, row)).train()
    recipe, operations = lab.recipe, useful_operations(model)
    objective: Objective = supervised_loss
    if row.distillation is not None:
        teacher = build_model(model_config(lab, sparse_moe()))  # its random weights are as fast as trained ones
        objective = distillation_objective(teacher, row.distillation, device="cpu")
        operations += 2 * count_parameters(teacher)[1]
    times = time_step(recipe, lab.dataset.train, model, objective)
    start = time.perf_counter()
    fit(model, lab.dataset, replace(recipe, epochs=NUM_EPOCHS), seed=seed, objective=objective, name=row.model)
    images_per_s = NUM_EPOCHS * len(lab.dataset.train) / (time.perf_counter() - start)
    return {
        "model": row.model,
        **{part: latency.median_ms for part, latency in times.items()},
        "images/s": round(images_per_s),
        "share of limit": operations * images_per_s / limit,
    }


def time_step(recipe: Recipe, train: Split, model: nn.Module, objective: Objective) -> dict[str, Latency]:
    """Median milliseconds of each part of a step, by turns."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(train), generator=generator)[: recipe.batch_size]
    pixels, labels = train.pixels.index_select(0, rows), train.labels.index_select(0, rows)
    optimizer = make_optimizer(model, recipe)

    def forward_and_backward() -> None:
        optimizer.zero_grad()
        sum_terms(objective(model, Batch(pixels, labels, rows)).terms).backward()

    parts: dict[str, Callable[[], object]] = {"batch": partial(train.pixels.index_select, 0, rows)}
    if recipe.augmentation is not None:
        parts["augmentation"] = partial(augment, pixels, recipe.augmentation, generator)
    parts |= {"forward and backward": forward_and_backward, "update": optimizer.step}
    forward_and_backward()
    return measure_latency(parts, num_rounds=NUM_ROUNDS)


def useful_operations(model: FFN | SparseMoE) -> float:
    """Multiplications and additions of a model's matrix products for one training image."""
    first = model.stem if isinstance(model, SparseMoE) else model.layers[0]
    assert isinstance(first, nn.Linear)
    return 6 * count_parameters(model)[1] - 2 * first.weight.numel()


if __name__ == "__main__":
    run_script(main, TrainingOptions, __doc__ or "")
