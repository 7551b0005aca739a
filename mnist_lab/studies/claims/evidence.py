"""The finished runs that claims are tested on, and the figures that claims compare. No torch here."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt
from scipy import stats

from mnist_lab.measure import DEAD_SHARE
from mnist_lab.report.records import CONTROL, Measurement, Predictions, Record, load_predictions
from mnist_lab.studies.claims.findings import Values, mcnemar

RUNTIME = "onnxruntime"
NUM_SHUFFLES = 100
EPSILON = 1e-12  # keeps the logarithm of a probability that half precision rounded to 0 finite
ROUTING_JOBS = ("router", "sort", "move rows", "combine", "gate")


class Accuracies(TypedDict):
    """A difference in test accuracy, as a claim's methods take it."""

    comparison: str
    values: Values
    unit: str
    mcnemar_p: list[float]


class Evidence:
    """The finished runs of one results folder, by row and seed, all on the same recipe."""

    def __init__(self, folder: Path, records: Iterable[Record], seeds: Sequence[int]) -> None:
        self.folder, self.seeds = folder, list(seeds)
        self._records = {(record.row, record.seed): record for record in records}

    @classmethod
    def in_folder(cls, folder: Path, records: Sequence[Record], anchor: str = CONTROL) -> "Evidence":
        """All that these records hold of the recipe from which one row departs least, for that row's seeds."""
        departures = min((record.departures for record in records if record.row == anchor), key=len, default="")
        own = [record for record in records if record.departures == departures]
        return cls(folder, own, sorted(record.seed for record in own if record.row == anchor))

    def has(self, *models: str) -> bool:
        """Whether every seed of these models is there, and there is one."""
        return bool(self.seeds) and all((model, seed) in self._records for model in models for seed in self.seeds)

    def find(self, family: str) -> list[str]:
        """The rows of a family that are there."""
        return list(dict.fromkeys(record.row for record in self._records.values() if record.family == family))

    def run(self, model: str, seed: int) -> Record:
        return self._records[model, seed]

    def runs(self, model: str) -> list[Record]:
        return [self.run(model, seed) for seed in self.seeds]

    def found(self, model: str) -> list[Record]:
        """The runs of those seeds that are there."""
        return [self.run(model, seed) for seed in self.seeds if (model, seed) in self._records]

    def per_seed(self, model: str, figure: Callable[[Record], float]) -> Values:
        """A figure of every seed's record."""
        return np.array([figure(record) for record in self.runs(model)], dtype=float)

    def values(self, model: str, measure: Callable[[Measurement], float | None]) -> Values:
        """A figure of every seed's measurement."""
        return np.array([measure(record.measurements[RUNTIME]) for record in self.runs(model)], dtype=float)

    def scaled(self, model: str, name: str) -> Values:
        """A figure of every seed after temperature scaling, or the temperature."""
        return np.array([record.scaled[name] for record in self.runs(model) if record.scaled], dtype=float)

    def latencies(self, model: str, batch: int) -> Values:
        """Median milliseconds of every seed."""
        return self.values(model, lambda m: m.latency_ms[str(batch)]["median_ms"])

    def time_ratio(self, model: str, other: str, batch: int) -> Values:
        """Latency as a multiple of another model's, per seed."""
        return self.latencies(model, batch) / self.latencies(other, batch)

    def predictions(self, model: str) -> list[Predictions]:
        """Test predictions of every seed."""
        return [load_predictions(self.folder, record) for record in self.runs(model)]

    def probabilities(self, model: str) -> list[Values]:
        """Test probabilities (N, C) of every seed."""
        return [predictions.probabilities.astype(float) for predictions in self.predictions(model)]

    def acc_points(self, model: str, other: str) -> Values:
        """Difference in test accuracy, percentage points, per seed."""
        points = 100 * (self.values(model, lambda m: m.test_acc) - self.values(other, lambda m: m.test_acc))
        return np.round(points, 9)  # equal counts of images give exactly 0

    def mcnemar_p(self, model: str, other: str) -> list[float]:
        """McNemar's exact p of every seed's two models."""
        pairs = zip(self.predictions(model), self.predictions(other), strict=True)
        return [mcnemar(one.predicted == one.labels, two.predicted == two.labels) for one, two in pairs]

    def accuracies(self, model: str, other: str, label: str = "") -> Accuracies:
        """The difference in test accuracy of two models, per seed and image by image."""
        return {
            "comparison": f"test accuracy, {label or f'{model} − {other}'}",
            "values": self.acc_points(model, other),
            "unit": "points",
            "mcnemar_p": self.mcnemar_p(model, other),
        }

    def loss_gap(self, model: str, other: str) -> Values:
        """Difference in test loss, nats, per seed."""
        return self.values(model, lambda m: m.test_loss) - self.values(other, lambda m: m.test_loss)

    def size_share(self, model: str, other: str) -> Values:
        return self.values(model, lambda m: m.size_mib) / self.values(other, lambda m: m.size_mib)

    def file_share(self, model: str, other: str) -> Values:
        """The deployed file as a share of another model's, per seed."""
        return self.values(model, lambda m: m.file_mb) / self.values(other, lambda m: m.file_mb)

    def against_original(self, model: str, name: str) -> Values:
        """A figure of every seed against its original."""
        return np.array([(record.against_original or {})[name] for record in self.runs(model)], dtype=float)


def final_load(record: Record) -> Values:
    """Share of the training pairs that each expert took in the last epoch."""
    return np.array(record.curves[-1]["expert_load"], dtype=float)


def load_entropy(record: Record) -> float:
    """Entropy of the final load in nats; log E when even."""
    return float(stats.entropy(final_load(record)))


def load_cv(record: Record) -> float:
    """Coefficient of variation of the final load; 0 when even."""
    return float(stats.variation(final_load(record)))


def num_dead_experts(record: Record) -> int:
    """Experts that take less than a tenth of an even share."""
    load = final_load(record)
    return int((load < DEAD_SHARE / len(load)).sum())


def knowledge_of_digits(record: Record) -> float:
    """Mutual information between an image's digit and its experts on the test split, above that of shuffled pairs."""
    assert record.expert_by_class is not None
    images = images_per_class(record)
    pairs = np.rint(np.array(record.expert_by_class) * images[:, None] * record.architecture["routing"]["top_k"])
    drawn = stats.random_table(pairs.sum(axis=1).astype(int), pairs.sum(axis=0).astype(int))
    shuffled = drawn.rvs(NUM_SHUFFLES, random_state=record.seed)
    return mutual_information(pairs) - float(np.mean([mutual_information(table) for table in shuffled]))


def images_per_class(record: Record) -> Values:
    return np.array(record.measurements[RUNTIME].confusion, dtype=float).sum(axis=1)


def mutual_information(counts: Values) -> float:
    """In nats, of the two variables whose joint counts these are."""
    return float(stats.entropy(counts.sum(axis=0)) + stats.entropy(counts.sum(axis=1)) - stats.entropy(counts.ravel()))


def points_lost_without(record: Record) -> Values:
    """Percentage points of test accuracy that closing each expert costs on each class: [expert][class]."""
    confusion = np.array(record.measurements[RUNTIME].confusion, dtype=float)
    before = confusion.diagonal() / np.maximum(confusion.sum(axis=1), 1)
    lost: Values = 100 * (before - np.array(record.acc_without_expert))
    return lost


def cost_of_closing(record: Record) -> float:
    """Percentage points of test accuracy that closing an expert costs, mean over experts."""
    images = images_per_class(record)
    return float((points_lost_without(record) @ images / images.sum()).mean())


def unevenness_of_closing(record: Record) -> float:
    """What closing an expert costs its own digits beyond the other digits, points, mean over experts.

    An expert's own are the digits of which it takes the largest share of all experts.
    """
    lost, owner = points_lost_without(record), np.array(record.expert_by_class).argmax(axis=1)
    gaps = [
        lost[expert, owner == expert].mean() - lost[expert, owner != expert].mean()
        for expert in range(len(lost))
        if 0 < (owner == expert).sum() < len(owner)
    ]
    return float(np.mean(gaps)) if gaps else 0.0


def routing_share(record: Record) -> float:
    """Share of a pass at batch 64 that routing takes: to score, sort, move and combine, all but products."""
    assert record.time_by_job_us is not None
    return sum(record.time_by_job_us[job] for job in ROUTING_JOBS) / sum(record.time_by_job_us.values())


def pruned_gate_share(record: Record) -> float:
    """Weights of the gate that became zero, as a share of all parameters."""
    assert record.proof is not None
    num_weights = record.architecture["model_width"] * record.architecture["routing"]["num_experts"]
    return float(record.proof["zeros"] * num_weights / record.params_total)


class ByExpert(NamedTuple):
    """What pruning did to the validation images that visited each living expert, the least visited first."""

    load: Values  # share of all visits
    loss_rise: Values  # nats


def loss_by_expert(record: Record) -> ByExpert:
    assert record.proof is not None
    found = record.proof["by_expert"]
    load, rise = (np.array(found[name], dtype=float) for name in ("load", "loss_rise"))
    living = living_experts(load)
    return ByExpert(load[living], rise[living])


def living_experts(load: Values) -> npt.NDArray[np.int64]:
    """Those that get at least a tenth of an even share of all visits, the least visited first."""
    order = np.argsort(load)
    return order[load[order] >= DEAD_SHARE / len(load)]


def load_of_the_least_visited(record: Record) -> float:
    """Share of all visits that the least visited living expert gets."""
    return float(loss_by_expert(record).load[0])


def loss_beyond_the_most_visited(record: Record) -> float:
    """What pruning adds to the loss on the least visited living expert's images beyond the most visited's, nats."""
    rise = loss_by_expert(record).loss_rise
    return float(rise[0] - rise[-1])


def mean_confidence(probabilities: Values) -> float:
    """Mean probability of the predicted class."""
    return float(probabilities.max(axis=1).mean())


def soften(probabilities: Values, temperature: float) -> Values:
    """softmax(logits / T), from softmax(logits)."""
    powers = np.maximum(probabilities, EPSILON) ** (1 / temperature)
    softened: Values = powers / powers.sum(axis=1, keepdims=True)
    return softened


def divergence(target: Values, approximation: Values) -> float:
    """KL(target ‖ approximation) in nats, mean over images; both (N, C)."""
    return float(stats.entropy(target + EPSILON, approximation + EPSILON, axis=1).mean())
