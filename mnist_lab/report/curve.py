"""The curve of accuracy against bytes: the best row of each size, the best from scratch beside it, and their table.

Which row is the best is decided on validation images; test accuracy is only told. No torch here.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tabulate import tabulate

from mnist_lab.errors import RunFailed
from mnist_lab.files import write_text
from mnist_lab.report.records import MIXTURE
from mnist_lab.report.results import LATENCIES, Model, Results

RATIOS = tuple(2**step for step in range(11))  # how many times smaller than the mixture in FP32
PRINTED = {1: 98.0, 2: 97.5, 4: 96.0, 8: 93.0, 16: 88.0}  # % by how many times smaller, as a published text has it
LEAST_BITS = {"FP32", "INT8", "BF16"}  # of the usual rows; what is below was compressed
HEADERS = ("smaller", "bytes at most", "row", "bytes", "validation", "test", "from scratch", "bytes", "test")
LEGEND = (
    "For each size, as a share of the file of {name} in FP32, the row that is most accurate on validation images of "
    "those whose deployed file, the largest of its seeds, is not larger; beside it, chosen in the same way, the best "
    "that was only trained from scratch, on labels. Accuracies in %, means over seeds, test ± 95 % interval; "
    "medians in ms for batches of 1, 64 and 1,024."
)


def num_bytes(model: Model) -> int:
    """Of its deployed file, the largest of its seeds."""
    return max(round(1e6 * measurement.file_mb) for measurement in model.measurements)


def validation_acc(model: Model) -> float:
    """Mean over seeds."""
    return float(np.mean([record.validation_acc for record in model.runs]))


def find_mixture(models: Sequence[Model]) -> Model | None:
    """The mixture in FP32, which sizes are told by; where every one departs from the recipe, its variant."""
    return min((m for m in models if m.family == MIXTURE), key=lambda model: len(model.name), default=None)


def is_from_scratch(model: Model) -> bool:
    """Whether it was trained on labels alone, to be compared with: neither the mixture, nor taught, nor made of it."""
    is_taught = "teacher" in model.runs[0].parents and not model.is_rival  # which has the other's size only
    return not model.is_derived and not is_taught and model.family != MIXTURE


def has_curve(results: Results) -> bool:
    """Whether there is a mixture, and something that was compressed beyond INT8 and BF16."""
    is_any_smaller = any(
        model.is_derived and (model.runs[0].config.get("step") is not None or model.runs[0].precision not in LEAST_BITS)
        for model in results.models
    )
    return is_any_smaller and find_mixture(results.models) is not None


def best_within(models: Iterable[Model], limit: float, cost: Callable[[Model], float] = num_bytes) -> Model | None:
    """The most accurate on validation images of those that cost no more; of equal ones the cheapest."""
    within = [model for model in models if cost(model) <= limit]
    return max(within, key=lambda model: (validation_acc(model), -cost(model)), default=None)


def front(models: Iterable[Model], cost: Callable[[Model], float] = num_bytes) -> list[Model]:
    """Every model that is more accurate on validation images than all that cost no more, the cheapest first.

    Those whose cost is not known (NaN) are left out.
    """
    found: list[Model] = []
    known = [model for model in models if not math.isnan(cost(model))]
    for model in sorted(known, key=lambda model: (cost(model), -validation_acc(model))):
        if not found or validation_acc(model) > validation_acc(found[-1]):
            found.append(model)
    return found


@dataclass(frozen=True)
class Place:
    """One size on the curve."""

    ratio: int
    limit: int  # bytes
    best: Model | None
    rival: Model | None  # from scratch


def places_on_curve(results: Results) -> list[Place]:
    """For each ratio of the mixture's file the best of those that are no larger; none where nothing was compressed."""
    mixture = find_mixture(results.models)
    if mixture is None or not has_curve(results):
        return []
    rivals = [model for model in results.models if is_from_scratch(model)]
    others = [model for model in results.models if not is_from_scratch(model)]
    limits = {ratio: num_bytes(mixture) // ratio for ratio in RATIOS}
    return [
        Place(ratio, limit, best_within(others, limit), best_within(rivals, limit)) for ratio, limit in limits.items()
    ]


def format_curve(results: Results) -> str:
    """The curve as a table in Markdown; blank where there is no row."""

    def cells(place: Place) -> list[str]:
        best = place.best
        shown = [_name(best), _bytes(best), _percent(None if best is None else validation_acc(best)), _test(best)]
        of_rival = [_name(place.rival), _bytes(place.rival), _test(place.rival)]
        times = ["" if best is None or pd.isna(best.row[column]) else f"{best.row[column]:.3f}" for column in LATENCIES]
        return [f"{place.ratio:,}×", f"{place.limit:,}", *shown, *of_rival, *times]

    headers = [*HEADERS, *(f"ms b{batch}" for batch in LATENCIES.values())]
    alignment = ["left" if header in {"row", "from scratch"} else "right" for header in headers]
    rows = [cells(place) for place in places_on_curve(results)]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True, colalign=alignment)


def write_curve(folder: Path, results: Results) -> Path | None:
    """Write `curve.md` beside the table; where nothing was compressed, the one that is there goes.

    Raises:
        RunFailed: it cannot be written or removed.
    """
    path = folder / "curve.md"
    mixture = find_mixture(results.models)
    if mixture is None or not has_curve(results):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise RunFailed(f"cannot remove {path}: {error.strerror or error}") from error
        return None
    first = mixture.runs[0]
    title = f"# Accuracy against bytes: {first.dataset}, {first.preset} models, {first.recipe} recipe"
    write_text(path, "\n\n".join([title, format_curve(results), LEGEND.format(name=mixture.name)]) + "\n")
    return path


def _name(model: Model | None) -> str:
    return "" if model is None else model.name


def _bytes(model: Model | None) -> str:
    return "" if model is None else f"{num_bytes(model):,}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _test(model: Model | None) -> str:
    if model is None:
        return ""
    half_width = model.row["test_acc_ci95"]
    return _percent(model.row["test_acc"]) + ("" if pd.isna(half_width) else f" ± {100 * half_width:.2f}")
