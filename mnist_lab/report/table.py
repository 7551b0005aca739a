"""The table that gathers records: its rows, their order, and what they are compared with. No torch here."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mnist_lab.measure import TABLE_BATCHES
from mnist_lab.report.columns import COLUMNS, COMPRESSION, Column, first
from mnist_lab.report.records import BASELINE, CONTROL, Record
from mnist_lab.report.statistics import confidence_interval

SAME_ENGINE = {"torchao": "torch-compile", "torch-sparse": "pytorch"}  # where a runtime has no FP32 of its own
HIDDEN = ("seed_numbers", "original", "family")  # what comparisons need to know of a row


def build_table(
    records: Iterable[Record], *, order: Sequence[str] = (), columns: Sequence[Column] = COLUMNS
) -> pd.DataFrame:
    """One row per model and runtime; means over seeds, latency of the first seed. What was not measured is blank (NaN).

    Args:
        order: the families, first one first; of others the rows come last, by name.
    """
    by_row: dict[tuple[str, str], list[Record]] = {}
    for record in sort_records(records, order):
        for runtime in record.measurements:
            by_row.setdefault((record.model, runtime), []).append(record)
    models = list(dict.fromkeys(model for model, _ in by_row))
    keys = sorted(by_row, key=lambda key: (models.index(key[0]), key[1] != "pytorch", key[1]))
    columns = [*columns, *COMPRESSION]
    rows = [_table_row(by_row[key], key[1], columns) for key in keys]
    return pd.DataFrame(rows, columns=[*(column.name for column in columns), *HIDDEN])


def sort_records(records: Iterable[Record], order: Sequence[str] = ()) -> list[Record]:
    """In the order of their families, then by model and seed."""
    places = {family: place for place, family in enumerate(order)}

    def place(record: Record) -> tuple[int, str, str, int]:
        known = record.family in places
        return (
            places.get(record.family, len(places)),
            "" if known else record.family,
            record.model,
            record.seed,
        )

    return sorted(records, key=place)


def _table_row(records: list[Record], runtime: str, columns: Sequence[Column]) -> dict[str, Any]:
    """One cell per column, of the runs by seed."""
    read = {
        column.name: [column.read(record, record.measurements[runtime]) for record in records] for column in columns
    }
    cells = {column.name: _cell(column, read[column.name]) for column in columns}
    lowest = records[0]
    return cells | {
        "seed_numbers": " ".join(str(record.seed) for record in records),
        "original": None if lowest.original == lowest.model else lowest.original,
        "family": lowest.family,
    }


def _cell(column: Column, read: list[Any]) -> Any:
    """Blank where a seed that counts was not measured."""
    counted = read[:1] if column.over_seeds is first else read
    return np.nan if None in counted else column.over_seeds(read)


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """Every row against its original (the first model of its chain), and against the baseline.

    Both in the row's own runtime (torchao's rows in torch-compile, torch-sparse's in pytorch). Accuracy
    difference in percentage points, parameter storage as a share, speed-up as a factor per batch size;
    NaN where there is nothing to compare with, for the accuracy also where the two rows are not of the
    same seeds, for the speed-up where they were not timed on as many threads.
    """
    by_key = table.set_index(["model", "runtime"])
    columns: dict[str, pd.Series] = {
        "model": table["model"],
        "precision": table["precision"],
        "runtime": table["runtime"],
    }
    for label, reference in (
        ("original", table["original"]),
        ("baseline", pd.Series(_baseline(table), index=table.index)),
    ):
        keys = pd.MultiIndex.from_arrays([reference, table["runtime"].replace(SAME_ENGINE)])
        other = by_key.reindex(keys).set_index(table.index)
        is_paired = table["seed_numbers"] == other["seed_numbers"]
        is_timed_alike = table["threads"] == other["threads"]
        columns[f"acc_points_vs_{label}"] = ((table["test_acc"] - other["test_acc"]) * 100).where(is_paired)
        columns[f"size_vs_{label}"] = table["size_mib"] / other["size_mib"]
        for batch in TABLE_BATCHES:
            column = f"latency_ms_b{batch}"
            columns[f"speedup_b{batch}_vs_{label}"] = (other[column] / table[column]).where(is_timed_alike)
    return pd.DataFrame(columns)


def _baseline(table: pd.DataFrame) -> str | None:
    """The model to compare with: the baseline, or where every run departs from the recipe, its variant."""
    return min(table["model"][table["family"] == BASELINE], key=len, default=None)


def find_fastest(table: pd.DataFrame) -> pd.DataFrame:
    """Per model and batch size the runtime with the lowest median latency, and that latency in ms; blank if untimed.

    Of the threads on which most rows were timed: times on others do not compare.
    """
    table = table.copy()
    columns = [f"latency_ms_b{batch}" for batch in TABLE_BATCHES]
    table.loc[~table["threads"].isin(table["threads"].mode()[:1]), columns] = np.nan
    rows = []
    for model, group in table.groupby("model", sort=False):
        row = {"model": model, "precision": group["precision"].iloc[0]}
        for batch in TABLE_BATCHES:
            timed = group.set_index("runtime")[f"latency_ms_b{batch}"].dropna()
            row[f"runtime_b{batch}"] = None if timed.empty else timed.idxmin()
            row[f"latency_ms_b{batch}"] = timed.min()
        rows.append(row)
    return pd.DataFrame(rows)


def judge_distillation(records: Iterable[Record]) -> str:
    """A line for each taught student: does it beat the same student on labels alone, of the same seeds and budget?"""
    records = list(records)
    controls = {
        (control.seed, control.params_total, json.dumps(control.config.get("recipe"))): control
        for control in records
        if control.family == CONTROL
    }
    gains: dict[str, list[float]] = {}
    for taught in records:
        control = controls.get((taught.seed, taught.params_total, json.dumps(taught.config.get("recipe"))))
        if taught.technique == "kd" and control is not None:
            runtime = next((name for name in taught.measurements if name in control.measurements), None)
            if runtime is not None:
                gain = taught.measurements[runtime].test_acc - control.measurements[runtime].test_acc
                gains.setdefault(taught.model, []).append(100 * gain)
    return "\n".join(f"- {model} {_judge_gain(points)}" for model, points in gains.items())


def _judge_gain(points: list[float]) -> str:
    mean, half = float(np.mean(points)), confidence_interval(points)
    if len(points) == 1:
        return f"against labels alone: {mean:+.2f} points; one seed decides nothing."
    verdict = "beats" if mean > half else "falls behind" if mean < -half else "does not beat"
    return f"{verdict} labels alone: {mean:+.2f} ± {half:.2f} points over {len(points)} seeds."
