"""What the figures are drawn of: the records, their table, and the models as they are drawn. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from mnist_lab.measure import TABLE_BATCHES
from mnist_lab.report.columns import COLUMNS, Column
from mnist_lab.report.drawing import Error, Look, choose_looks
from mnist_lab.report.records import Measurement, Record
from mnist_lab.report.statistics import binomial_interval
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


def _choose_row(rows: pd.DataFrame) -> pd.Series:
    """That of ONNX Runtime, else of the fastest runtime, else the first of a model's rows."""
    own = rows[rows["runtime"] == RUNTIME]
    timed = rows["latency_ms_b64"].astype(float).dropna()
    return own.iloc[0] if len(own) else rows.loc[timed.idxmin()] if len(timed) else rows.iloc[0]


def rows_of(models: Sequence[Model]) -> pd.DataFrame:
    """Their rows of the table, by name."""
    return pd.DataFrame({model.name: model.row for model in models}).T


def with_latency(models: Sequence[Model], column: str | None = None) -> list[Model]:
    """Those with any latency, or with the one of that column."""
    return [model for model in models if model.row[[column] if column else list(LATENCIES)].notna().any()]
