"""The columns of the table: each a name, how to read it from the records, and where it shows. No torch here.

A metric is one `Column`: table, CSV, Markdown, bars and radar follow from it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mnist_lab.measure import TABLE_BATCHES
from mnist_lab.report.records import Measurement, Record
from mnist_lab.report.statistics import confidence_interval

Reading = Callable[[Record, Measurement], Any]


def first(values: Sequence[Any]) -> Any:
    return values[0]


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


@dataclass(frozen=True)
class Cost:
    """How a column shows in the figures that compare models: as a cost, of which less is better."""

    label: str  # of its bars, with unit
    spoke: str = ""  # its name on the radar; empty where it has none
    of: Callable[[float], float] = float  # the cost, of the column's value


@dataclass(frozen=True)
class Column:
    """One column. What it reads may be None: not measured, and blank."""

    name: str
    read: Reading  # of one seed's record, and its measurement in the row's runtime
    over_seeds: Callable[[Sequence[Any]], Any] = first  # of all that was read; lowest seed first
    format: str = ""  # of a cell in Markdown
    cost: Cost | None = None
    measure: Callable[[Any], float] | None = None  # of the model as stored; kept in the record's `figures`

    @property
    def is_mean(self) -> bool:
        """Whether its value is a mean over seeds, and so has an interval."""
        return self.over_seeds is mean


def figure(name: str, measure: Callable[[Any], float], *, format: str = ".4f", cost: Cost | None = None) -> Column:  # noqa: A002
    """A metric of the model itself, that the suite does not know otherwise: its mean over seeds.

    Blank for a row whose own file holds no PyTorch model, as INT8's.

    Args:
        measure: of the model (FFN | SparseMoE) with the weights that the row's own file stores.
    """
    return Column(name, lambda record, _: record.figures.get(name), mean, format, cost, measure)


def latency(batch: int) -> Column:
    """Median milliseconds for a batch, of the first seed."""

    def read(_: Record, measurement: Measurement) -> float | None:
        timing = measurement.latency_ms.get(str(batch))
        return None if timing is None else timing["median_ms"]

    cost = Cost(f"latency of a batch of {batch} (ms)", f"batch {batch}")
    return Column(f"latency_ms_b{batch}", read, format=".3f", cost=cost)


def _as_percent(value: float) -> float:
    return 100 * value


ACCURACY = Column(
    "test_acc",
    lambda _, m: m.test_acc,
    mean,
    ".4f",
    Cost("test error (%)", "test error", lambda accuracy: 100 * (1 - accuracy)),
)
LATENCIES = tuple(latency(batch) for batch in TABLE_BATCHES)
COLUMNS = (
    Column("model", lambda r, _: r.model),
    Column("technique", lambda r, _: r.technique),
    Column("precision", lambda r, _: r.precision),
    Column("runtime", lambda r, m: next(name for name, own in r.measurements.items() if own is m)),
    Column("seeds", lambda r, _: r.seed, len, "d"),
    ACCURACY,
    replace(ACCURACY, name="test_acc_ci95", over_seeds=confidence_interval, cost=None),
    Column("train_acc", lambda _, m: m.train_acc, mean, ".4f"),
    Column("train_loss", lambda _, m: m.train_loss, mean, ".4f"),
    Column("test_loss", lambda _, m: m.test_loss, mean, ".4f"),
    Column(
        "ece",
        lambda _, m: m.test_ece,
        mean,
        ".4f",
        Cost("expected calibration error (%)", "calibration\nerror", _as_percent),
    ),
    Column("params_total", lambda r, _: r.params_total, format=",d"),
    Column(
        "params_active", lambda r, _: r.params_active, format=",d", cost=Cost("active parameters", "active\nparameters")
    ),
    Column("size_mib", lambda _, m: m.size_mib, format=".3f"),
    Column("file_mb", lambda _, m: m.file_mb, format=".3f", cost=Cost("deployed file (MB = 10⁶ bytes)", "file")),
    *LATENCIES,
    Column("threads", lambda _, m: m.threads, format=".0f"),
)


def against_original(name: str, format: str = ".3f") -> Column:  # noqa: A002
    """A figure of a model against the first of its chain: the mean over seeds; blank where it says nothing."""
    return Column(name, lambda record, _: (record.against_original or {}).get(name), mean, format)


ACC_POINTS = against_original("acc_points", "+.2f")


def _images_per_second(record: Record, measurement: Measurement) -> float | None:
    """Of a batch of the largest size; of a model made from another only."""
    timing = measurement.latency_ms.get(str(TABLE_BATCHES[-1]))
    return None if timing is None or not record.against_original else 1e3 * TABLE_BATCHES[-1] / timing["median_ms"]


# Of the models that were made from others, in a section of their own.
COMPRESSION = (
    ACC_POINTS,
    replace(ACC_POINTS, name="acc_points_ci95", over_seeds=confidence_interval, format=".2f"),
    against_original("file_ratio", ".2f"),
    against_original("params_ratio", ".2f"),
    against_original("nonzero_params", ",.0f"),
    Column("same_class", lambda r, m: m.same_class if r.against_original else None, mean, ".4f"),
    against_original("kl_to_original", ".4f"),
    against_original("worst_class_points", "+.2f"),
    against_original("top1_agreement"),
    against_original("routes_jaccard"),
    against_original("rerouted", ".4f"),
    against_original("rerouted_other_class", ".4f"),
    against_original("rerouted_same_class", ".4f"),
    against_original("gate_kl", ".4f"),
    against_original("route_margin", ".2f"),
    against_original("load_cv_before", ".2f"),
    against_original("load_cv", ".2f"),
    against_original("dead_experts", ".1f"),
    against_original("expert_cka_before"),
    against_original("expert_cka"),
    against_original("params_mib"),
    against_original("activations_mib_before", ".2f"),
    against_original("activations_mib", ".2f"),
    Column("images_per_second", _images_per_second, format=",.0f"),
    Column("technique_seconds", lambda r, _: r.train_seconds if r.against_original else None, mean, ".1f"),
    Column("test_acc_b1", lambda _, m: m.test_acc_b1, mean, ".4f"),
    Column("other_class_b1", lambda _, m: m.other_class_b1, mean, ".4f"),
)
