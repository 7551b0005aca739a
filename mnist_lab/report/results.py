"""What the figures are drawn of: the records, their table, and the models as they are drawn. No torch here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from mnist_lab.measure import TABLE_BATCHES
from mnist_lab.report.columns import ACCURACY, COLUMNS, Column, Cost
from mnist_lab.report.drawing import Error, Look, choose_looks
from mnist_lab.report.records import Measurement, Record
from mnist_lab.report.statistics import binomial_interval, confidence_interval
from mnist_lab.report.table import build_table

RUNTIME = "onnxruntime"
LATENCIES = {f"latency_ms_b{batch}": batch for batch in TABLE_BATCHES}


@dataclass(frozen=True)
class Model:
    """A model in the runtime from which the figures take it: its row of the table, its runs by seed, and its look."""

    name: str
    runtime: str
    row: pd.Series
    runs: list[Record]
    look: Look

    @property
    def label(self) -> str:
        """Its name, and where it ran if that is not ONNX Runtime."""
        return self.name if self.runtime == RUNTIME else f"{self.name} ({self.runtime})"

    @property
    def measurements(self) -> list[Measurement]:
        return [record.measurements[self.runtime] for record in self.runs]

    @property
    def num_images(self) -> int:
        """Of the test split; 0 where the record has no confusion matrix."""
        return int(np.sum(self.measurements[0].confusion or 0))

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """Ends of the 95 % interval: Student's over the seeds, and of one seed the binomial one of the test images."""
        accuracy, half_width = float(self.row["test_acc"]), float(self.row["test_acc_ci95"])
        if len(self.runs) > 1:
            return accuracy - half_width, min(1.0, accuracy + half_width)
        return binomial_interval(accuracy, self.num_images) if self.num_images else None

    @property
    def accuracy_error(self) -> Error | None:
        """Percentage points from the accuracy to the ends of its interval."""
        if self.accuracy_interval is None:
            return None
        low, high = self.accuracy_interval
        return 100 * (self.row["test_acc"] - low), 100 * (high - self.row["test_acc"])

    def latency_error(self, column: str) -> Error | None:
        """Milliseconds from the median to the first and third quartile; None where the column has no median."""
        if pd.isna(self.row[column]):
            return None
        latency = self.measurements[0].latency_ms[str(LATENCIES[column])]
        median = latency["median_ms"]
        return max(0.0, median - latency["q1_ms"]), max(0.0, latency["q3_ms"] - median)

    def cost(self, column: Column) -> float:
        """What the figures show of a column that has a cost; NaN where the table is blank."""
        assert column.cost is not None
        value = self.row[column.name]
        return float("nan") if pd.isna(value) else float(column.cost.of(value))

    def cost_error(self, column: Column) -> Error | None:
        """From the cost to the ends of its interval over seeds, or of the accuracy's own, or to the quartiles."""
        assert column.cost is not None
        if column.name in LATENCIES:
            return self.latency_error(column.name)
        value = self.cost(column)
        if column.name == ACCURACY.name and self.accuracy_interval is not None:
            low, high = sorted(column.cost.of(end) for end in self.accuracy_interval)
            return max(0.0, value - low), max(0.0, high - value)
        if not column.is_mean or len(self.runs) < 2 or math.isnan(value):
            return None
        read = [column.read(record, record.measurements[self.runtime]) for record in self.runs]
        half_width = confidence_interval([column.cost.of(one) for one in read])
        return min(half_width, value), half_width


@dataclass(frozen=True)
class Results:
    """The records of one results folder, in the order of the families and with the columns of their table."""

    records: Sequence[Record]
    order: Sequence[str] = ()
    columns: Sequence[Column] = COLUMNS

    @cached_property
    def table(self) -> pd.DataFrame:
        return build_table(self.records, order=self.order, columns=self.columns)

    @cached_property
    def models(self) -> list[Model]:
        """Every model of the table once, in its order: in ONNX Runtime, else in its fastest runtime at batch 64.

        Latencies are those of the first timed model's CPU and thread count; others do not compare, and are blanked.
        """
        if not len(self.table):
            return []
        chosen = pd.DataFrame([_choose_row(rows) for _, rows in self.table.groupby("model", sort=False)])
        looks = choose_looks(zip(chosen["model"], chosen["family"], chosen["precision"], strict=True), self.order)
        models = []
        conditions = None
        for _, row in chosen.iterrows():
            name, runtime = str(row["model"]), str(row["runtime"])
            runs = [r for r in self.records if r.model == name and runtime in r.measurements]
            runs.sort(key=lambda record: record.seed)
            own_conditions = (runs[0].machine["cpu"], row["threads"])
            if row[list(LATENCIES)].notna().any():
                conditions = conditions or own_conditions
                if own_conditions != conditions:
                    row[list(LATENCIES)] = np.nan
            models.append(Model(name, runtime, row, runs, looks[name]))
        return models

    @cached_property
    def costs(self) -> list[tuple[Column, Cost]]:
        """The columns that figures show as a cost, but for those of which no model has any."""
        found = [(column, column.cost) for column in self.columns if column.cost is not None]
        return [
            (column, cost) for column, cost in found if any(pd.notna(model.row[column.name]) for model in self.models)
        ]


def _choose_row(rows: pd.DataFrame) -> pd.Series:
    """That of ONNX Runtime, else of the fastest runtime, else the first of a model's rows."""
    own = rows[rows["runtime"] == RUNTIME]
    return (own if len(own) else rows.sort_values("latency_ms_b64", kind="stable")).iloc[0]


def rows_of(models: Sequence[Model]) -> pd.DataFrame:
    """Their rows of the table, by name."""
    return pd.DataFrame({model.name: model.row for model in models}).T


def with_latency(models: Sequence[Model], column: str | None = None) -> list[Model]:
    """Those with any latency, or with the one of that column."""
    return [model for model in models if model.row[[column] if column else list(LATENCIES)].notna().any()]


def where(models: Sequence[Model]) -> str:
    """The runtime that the figures of these models are of."""
    elsewhere = {model.runtime for model in models} - {RUNTIME}
    is_all = len({model.runtime for model in models}) == 1
    return "ONNX Runtime" if not elsewhere else elsewhere.pop() if is_all else "ONNX Runtime, or as the name says"


def conditions(models: Sequence[Model], *, latency: bool = False, bars: bool = True, notes: Sequence[str] = ()) -> str:
    """Where the figures of these models hold, and what the error bars are.

    Args:
        latency: their latencies are shown.
        bars: error bars are.
        notes: what else is to be said.
    """
    counts = sorted({len(model.runs) for model in models})
    parts = [where(models), f"{'–'.join(str(count) for count in counts)} seed{'s' if counts != [1] else ''}"]
    if bars and any(model.accuracy_interval for model in models):
        parts.append(f"error bars: 95 % {_interval(models)}")
    timed = with_latency(models)
    if latency and timed:
        threads, cpu = int(timed[0].row["threads"]), timed[0].runs[0].machine["cpu"]
        parts.append(
            f"latency: median{' and quartiles' if bars else ''}, {threads} thread{'s' if threads > 1 else ''}, {cpu}"
        )
        if (sessions := len({model.measurements[0].latency_session for model in timed})) > 1:
            parts[-1] += f", from {sessions} sessions, whose times compare only roughly"
    return "; ".join([*parts, *notes])


def _interval(models: Sequence[Model]) -> str:
    """What the intervals of these models' accuracies are."""
    counts = {len(model.runs) for model in models}
    binomial = f"binomial interval of the {max(model.num_images for model in models):,} test images"
    if 1 not in counts:
        return "interval over seeds"
    return binomial if counts == {1} else f"interval over seeds, of a single seed {binomial}"
