"""What the benchmarks share: their options, the models that they time, a progress bar, the files that they write."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from mnist_lab.command.options import DataOptions, Options
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import ensure_files, ensure_weights
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.run import Run
from mnist_lab.files import BLANK, seal, write_atomically, write_text
from mnist_lab.machine import cpu_flags, describe_machine, package_versions
from mnist_lab.models import PresetName
from mnist_lab.progress import progress_bar
from mnist_lab.report.drawing import Figure, draw_png
from mnist_lab.training import RecipeName

DOTS_PER_INCH = 120


@dataclass(frozen=True)
class BenchmarkOptions(DataOptions):
    """Which models; those that are not there are trained. Each benchmark sets threads and batch sizes itself."""

    preset: PresetName = "compact"
    """Set of architectures."""
    recipe: RecipeName = "quick"
    """Training budget: speed does not depend on it, but how the router spreads the images does."""

    def suite_options(self, *runtimes: str) -> Options:
        """The same for the suite, measuring in these runtimes.

        Raises:
            UserError: the seed is out of range.
        """
        fields = {name: getattr(self, name) for name in BenchmarkOptions.__dataclass_fields__}
        return Options(**fields, runtime=runtimes)  # type: ignore[arg-type]


def ensure_models(lab: Lab, rows: Iterable[Row], seed: int) -> list[Run]:
    """The rows' files for the lab's runtimes, made where they are missing or stale; their quality is not measured."""
    runs = [Run(lab, row, seed) for row in rows]
    for run in runs:
        ensure_weights(run)
        ensure_files(run)
    return runs


@contextmanager
def show_progress(name: str, num_steps: int) -> Iterator[Callable[[], None]]:
    """A bar, and what moves it by a step: redrawn then only, not from a thread that would run beside what is timed."""
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task(name, total=num_steps)

        def advance() -> None:
            progress.advance(task)
            progress.refresh()

        yield advance


def format_table(table: pd.DataFrame, style: str | None = None) -> str:
    """As Markdown, its numbers in that style; without one, texts as they are."""
    columns = table.to_dict("list")
    return tabulate(columns, "keys", "github", floatfmt=style or "g", disable_numparse=style is None)


def write_outputs(
    folder: Path,
    name: str,
    table: pd.DataFrame,
    text: str,
    *,
    draw: Callable[[], Figure] | None = None,
    **measured: Any,
) -> None:
    """Write the table to `folder/NAME.csv`, the text to .md, and print it.

    Args:
        draw: the figure, written to .png, and with it all that was measured to .json, sealed.
        measured: beside the table.
    """
    record = {
        "digest": BLANK,
        "machine": describe_machine() | {"flags": sorted(cpu_flags())},
        "versions": package_versions(),
        **measured,
        "rows": table.astype(object).where(table.notna(), None).to_dict("records"),
    }
    texts = {"csv": table.to_csv(index=False), "md": f"{text}\n"}
    if draw is not None:
        texts["json"] = seal(json.dumps(record, indent=1, allow_nan=False).encode()).decode()
    for extension, content in texts.items():
        write_text(folder / f"{name}.{extension}", content)
    print(f"\n{text}\n\nwritten: {folder / name}.{', .'.join(texts)}", flush=True)
    if draw is not None and (png := draw_png(draw, dots_per_inch=DOTS_PER_INCH)) is not None:
        write_atomically(folder / f"{name}.png", lambda path: path.write_bytes(png))
        print(f"plot: {folder / name}.png")
