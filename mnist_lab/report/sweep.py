"""The table of a sweep: its rows from all folders, beside what was varied. No torch here."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from mnist_lab.files import write_text
from mnist_lab.report.columns import COLUMNS, LATENCIES, Column
from mnist_lab.report.records import Record
from mnist_lab.report.table import HIDDEN, build_table
from mnist_lab.report.text import format_table

# What the Markdown table shows of the table's columns: those that a reader of many rows looks for.
SHOWN = ("model", "runtime", "seeds", "test_acc", "test_acc_ci95", "test_loss", "params_total", "file_mb")


class SweepPart(NamedTuple):
    """What a sweep made in one folder: the records, and by model what was given of the options that it varies."""

    records: Sequence[Record]
    settings: Mapping[str, Mapping[str, Any]]


def write_sweep(folder: Path, parts: Sequence[SweepPart]) -> list[Path]:
    """Write `sweep.csv`, with every column of the folders' tables, and `sweep.md`; none where nothing was made."""
    tables = [_build_table(part) for part in parts if part.records]
    if not tables:
        return []
    table = pd.concat(tables, ignore_index=True)
    usual = {column.name for column in COLUMNS}
    names = itertools.takewhile(lambda name: name not in usual, map(str, table))
    varied = [Column(name, lambda *_: None) for name in names]  # which the table holds already
    shown = [column for column in COLUMNS if column.name in SHOWN or column in LATENCIES]
    paths = [folder / "sweep.csv", folder / "sweep.md"]
    write_text(paths[0], table.to_csv(index=False))
    write_text(paths[1], f"# Sweep\n\n{format_table(table, columns=[*varied, *shown])}\n")
    return paths


def _build_table(part: SweepPart) -> pd.DataFrame:
    """The records' table in the order of the settings, which stand first."""
    places = {model: place for place, model in enumerate(part.settings)}
    table = build_table(part.records).drop(columns=list(HIDDEN))
    table = table.sort_values("model", key=lambda models: models.map(places), kind="stable")
    names = dict.fromkeys(name for settings in part.settings.values() for name in settings)
    given = {name: [part.settings[model].get(name) for model in table["model"]] for name in names}
    datasets = {"dataset": [part.records[0].dataset] * len(table)}
    return pd.concat([pd.DataFrame(datasets | given, index=table.index, dtype=object), table], axis=1)
