"""What the figures are drawn of: the records, their table, and the models as they are drawn. No torch here."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from mnist_lab.measure import TABLE_BATCHES
from mnist_lab.report.columns import ACCURACY, COLUMNS, Column, Cost
from mnist_lab.report.drawing import Error, Look, choose_looks, shorten, spread
from mnist_lab.report.records import RIVAL, Conditions, Measurement, Record
from mnist_lab.report.statistics import binomial_interval, confidence_interval
from mnist_lab.report.table import build_table

RUNTIME = "onnxruntime"
LATENCIES = {f"latency_ms_b{batch}": batch for batch in TABLE_BATCHES}
MAX_LISTED = 8  # names in a footnote
ACCURACY_LABEL = "test accuracy (%)"
SIZE_LABEL = "deployed file (MB = 10⁶ bytes)"


@dataclass(frozen=True)
class Model:
    """A model in the runtime from which the figures take it: its row of the table, its runs by seed, and its look."""

    name: str
    short_name: str
    runtime: str
    row: pd.Series
    runs: list[Record]
    look: Look
    elsewhere: Conditions | None = None  # of its latencies, where they do not compare with the others' and are blank

    @property
    def label(self) -> str:
        """Its name as it shows, and where it ran if that is not ONNX Runtime."""
        return self.short_name if self.runtime == RUNTIME else f"{self.short_name} ({self.runtime})"

    @property
    def family(self) -> str:
        return self.runs[0].family

    @property
    def is_derived(self) -> bool:
        """Whether it has another model's weights: compressed, or in another form."""
        return self.runs[0].original != self.name

    @property
    def is_rival(self) -> bool:
        """Whether it is a compressed model's architecture from scratch."""
        return self.family.endswith(RIVAL)

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
            return max(0.0, accuracy - half_width), min(1.0, accuracy + half_width)
        return binomial_interval(accuracy, self.num_images) if self.num_images else None

    @property
    def accuracy_error(self) -> Error | None:
        """Percentage points from the accuracy to the ends of its interval."""
        if self.accuracy_interval is None:
            return None
        low, high = self.accuracy_interval
        return spread(100 * self.row["test_acc"], 100 * low, 100 * high)

    def latency_error(self, column: str) -> Error | None:
        """Milliseconds from the median to the first and third quartile; None where the column has no median."""
        if pd.isna(self.row[column]):
            return None
        latency = self.measurements[0].latency_ms[str(LATENCIES[column])]
        return spread(latency["median_ms"], latency["q1_ms"], latency["q3_ms"])

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
            return spread(value, low, high)
        if not column.is_mean or len(self.runs) < 2 or math.isnan(value):
            return None
        read = [column.read(record, record.measurements[self.runtime]) for record in self.runs]
        half_width = confidence_interval([column.cost.of(one) for one in read])
        return spread(value, max(0.0, value - half_width), value + half_width)

    def why_blank(self, column: Column) -> str:
        """What stands in the place of a cost that is NaN."""
        return "left out" if self.elsewhere and column.name in LATENCIES else "not measured"


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
    def runs(self) -> dict[tuple[str, str], list[Record]]:
        """By model and runtime, the lowest seed first: that whose latency stands in the table."""
        found: dict[tuple[str, str], list[Record]] = {}
        for record in sorted(self.records, key=lambda record: record.seed):
            for runtime in record.measurements:
                found.setdefault((record.model, runtime), []).append(record)
        return found

    def _conditions_of(self, model: str, runtime: str) -> Conditions:
        record = self.runs[model, runtime][0]
        return Conditions(record.timed_on(runtime), record.measurements[runtime].threads)

    @cached_property
    def timed_under(self) -> Conditions | None:
        """The conditions of the first timed model's latencies, the only ones that figures show; None where none is."""
        timed = timed_rows(self.table)
        if timed.empty:
            return None
        row = _choose_row(timed[timed["model"] == timed["model"].iloc[0]])
        return self._conditions_of(row["model"], row["runtime"])

    @cached_property
    def left_out(self) -> dict[tuple[str, str], Conditions]:
        """Models and runtimes whose latencies are of other conditions."""
        timed = timed_rows(self.table)
        found = {key: self._conditions_of(*key) for key in zip(timed["model"], timed["runtime"], strict=True)}
        return {key: own for key, own in found.items() if own != self.timed_under}

    @cached_property
    def comparable(self) -> pd.DataFrame:
        """The table, in which latencies of other conditions are blank."""
        table = self.table.copy()
        is_other = [key in self.left_out for key in zip(table["model"], table["runtime"], strict=True)]
        table.loc[is_other, list(LATENCIES)] = np.nan
        return table

    @cached_property
    def models(self) -> list[Model]:
        """Every model of the table once, in its order: in ONNX Runtime, else in its fastest runtime at batch 64."""
        if not len(self.table):
            return []
        chosen = pd.DataFrame([_choose_row(rows) for _, rows in self.comparable.groupby("model", sort=False)])
        looks = choose_looks(zip(chosen["model"], chosen["family"], chosen["precision"], strict=True), self.order)
        short_names = shorten(chosen["model"])
        models = []
        for _, row in chosen.iterrows():
            name, runtime = key = row["model"], row["runtime"]
            elsewhere = self.left_out.get(key)
            models.append(Model(name, short_names[name], runtime, row, self.runs[key], looks[name], elsewhere))
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


def timed_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Those with a latency."""
    return table[table[list(LATENCIES)].notna().any(axis=1)]


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


def conditions(
    results: Results, models: Sequence[Model], *, latency: bool = False, bars: bool = True, notes: Sequence[str] = ()
) -> str:
    """Where the figures of these models hold, and what the error bars are.

    Args:
        latency: their latencies are shown.
        bars: error bars are.
        notes: what else is to be said.
    """
    parts = [where(models), num_seeds(models)]
    if bars and any(model.accuracy_interval for model in models):
        parts.append(f"error bars: 95 % {_interval(models)}")
    timed = with_latency(models)
    if latency and timed:
        sessions = {model.measurements[0].latency_session for model in timed}
        parts.append(
            f"latency: median{' and quartiles' if bars else ''}, {results.timed_under}{compare_only(sessions)}"
        )
        parts += left_out({model.label: model.elsewhere for model in results.models if model.elsewhere})
    return "; ".join([*parts, *notes])


def num_seeds(models: Sequence[Model]) -> str:
    """How many, or from how many to how many, stand behind each."""
    counts = sorted({len(model.runs) for model in models})
    return f"{'–'.join(str(count) for count in counts)} seed{'s' if counts != [1] else ''}"


def compare_only(sessions: Collection[str]) -> str:
    """What is to be said of latencies that were not all measured by turns."""
    return f", from {len(sessions)} sessions, whose times compare only roughly" if len(sessions) > 1 else ""


def left_out(labels: Mapping[str, Conditions]) -> list[str]:
    """A note for each of the other conditions, of whose latencies are not shown."""
    by_conditions: dict[Conditions, list[str]] = {}
    for label, own in labels.items():
        by_conditions.setdefault(own, []).append(label)
    return [
        f"left out, as it does not compare: latency of {listed(names)} ({own})" for own, names in by_conditions.items()
    ]


def listed(names: Sequence[str]) -> str:
    """Names in a sentence, of many the first ones and how many more there are."""
    *names, last = names if len(names) <= MAX_LISTED else [*names[:MAX_LISTED], f"{len(names) - MAX_LISTED} more"]
    return f"{', '.join(names)} and {last}" if names else last


def _interval(models: Sequence[Model]) -> str:
    """What the intervals of these models' accuracies are."""
    counts = {len(model.runs) for model in models}
    binomial = f"binomial interval of the {max(model.num_images for model in models):,} test images"
    if 1 not in counts:
        return "interval over seeds"
    return binomial if counts == {1} else f"interval over seeds, of a single seed {binomial}"
