"""Accuracy, loss, calibration error, latency, size: the only definition of each.

Works on callables and numpy logits, so that any runtime can be measured. Shapes: N images, C classes.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
K = TypeVar("K")

TABLE_BATCHES = (1, 64, 1024)  # at which every row's latency is measured
DEAD_SHARE = 0.1  # an expert with less than that of an even share is dead
EVALUATION_BATCH = 1000  # dynamic INT8 scales depend on the batch, so it is one size everywhere
NUM_BINS = 15
MIB = 2**20


@dataclass(frozen=True)
class ConfidenceBins:
    """Per bin of confidence in (i/15, (i+1)/15]: images, their summed confidence, how many are right."""

    count: list[int]
    confidence_sum: list[float]
    correct: list[int]


@dataclass(frozen=True)
class Quality:
    """How well a model's logits fit a split."""

    acc: float  # fraction of images
    loss: float  # mean cross-entropy, nats
    ece: float  # expected calibration error, 15 bins
    brier: float  # mean squared distance of the probabilities from the label's
    bins: ConfidenceBins
    confusion: list[list[int]]  # [true class][predicted class]


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one forward pass of the whole batch: median and quartiles over all timed calls."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    num_calls: int


def predict(run: Callable[[Array], Array], pixels: Array, *, batch: int = EVALUATION_BATCH) -> Array:
    """Logits (N, C) of all images, in batches of 1000 unless another size is given."""
    return np.concatenate([run(pixels[start : start + batch]) for start in range(0, len(pixels), batch)])


def log_softmax(logits: Array) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def accuracy(logits: Array, labels: Labels) -> float:
    """Share of images whose largest logit is their label's."""
    return float((logits.argmax(axis=1) == labels).mean())


def cross_entropy(logits: Array, labels: Labels) -> float:
    """Mean negative log-likelihood in nats."""
    return float(-log_softmax(logits)[np.arange(len(labels)), labels].mean())


def decibels(found: Array, expected: Array) -> float:
    """Signal to noise, 10·log₁₀ Σ expected² / Σ (found − expected)²; 300 where there is no noise."""
    noise = float(np.square(found - expected).sum())
    return 10 * math.log10(max(float(np.square(expected).sum()), 1e-30) / noise) if noise else 300.0


def confidence_bins(logits: Array, labels: Labels) -> ConfidenceBins:
    """Sort the images into 15 equal bins by the probability of their predicted class."""
    confidence = np.exp(log_softmax(logits).max(axis=1))
    is_correct = logits.argmax(axis=1) == labels
    bin_of = np.clip(np.ceil(confidence * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)
    return ConfidenceBins(
        count=np.bincount(bin_of, minlength=NUM_BINS).tolist(),
        confidence_sum=np.bincount(bin_of, weights=confidence, minlength=NUM_BINS).tolist(),
        correct=np.bincount(bin_of, weights=is_correct, minlength=NUM_BINS).astype(int).tolist(),
    )


def expected_calibration_error(bins: ConfidenceBins) -> float:
    """Mean gap between confidence and accuracy, weighted by bin size (Guo et al. 2017, arXiv:1706.04599)."""
    gaps = np.abs(np.array(bins.confidence_sum) - np.array(bins.correct))
    return float(gaps.sum() / sum(bins.count))


def brier_score(logits: Array, labels: Labels) -> float:
    """Mean over images of Σ_c (p_c − [c is the label])², in [0, 2] (Brier 1950)."""
    distance = np.exp(log_softmax(logits))
    distance[np.arange(len(labels)), labels] -= 1
    return float(np.square(distance).sum(axis=1).mean())


def fit_temperature(logits: Array, labels: Labels) -> float:
    """The T for which softmax(logits / T) has the lowest cross-entropy (Guo et al. 2017, arXiv:1706.04599)."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log_t: cross_entropy(logits * np.float32(np.exp(-log_t)), labels), bounds=(-3, 3), method="bounded"
    )
    return float(np.exp(found.x))


def confusion_matrix(predicted: Labels, labels: Labels, num_classes: int) -> list[list[int]]:
    """Counts [true class][predicted class]."""
    counts: list[list[int]] = (
        np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
        .reshape(num_classes, num_classes)
        .tolist()
    )
    return counts


def quality(logits: Array, labels: Labels) -> Quality:
    """Everything that is said of a model's predictions, from one set of logits."""
    bins = confidence_bins(logits, labels)
    return Quality(
        acc=accuracy(logits, labels),
        loss=cross_entropy(logits, labels),
        ece=expected_calibration_error(bins),
        brier=brier_score(logits, labels),
        bins=bins,
        confusion=confusion_matrix(logits.argmax(axis=1), labels, logits.shape[1]),
    )


def take_images(pixels: Array, batch: int) -> Array:
    """A batch of that size, to be timed; fewer images repeat."""
    return np.resize(pixels, (batch, *pixels.shape[1:]))


def measure_latency(
    calls: Mapping[K, Callable[[], object]],
    *,
    num_rounds: int,
    block_s: float = 0.03,
    num_dropped: int = 2,
    on_block: Callable[[], None] = lambda: None,
) -> dict[K, Latency]:
    """Time every call, taking turns in blocks, so that drift of the machine hits all alike.

    Each block drops its first calls, then repeats for at least `block_s` seconds: alternating after
    every single call would evict the caches and double the times at batch 1.
    """
    times_s: dict[K, list[float]] = {name: [] for name in calls}
    for _ in range(num_rounds):
        for name, call in calls.items():
            for _ in range(num_dropped):
                call()
            block_end = time.perf_counter() + block_s
            now = time.perf_counter()
            while now < block_end:
                call()
                before, now = now, time.perf_counter()
                times_s[name].append(now - before)
            on_block()
    return {name: _summarize(np.array(samples) * 1e3) for name, samples in times_s.items()}


def _summarize(samples_ms: npt.NDArray[np.float64]) -> Latency:
    q1, median, q3 = np.percentile(samples_ms, [25, 50, 75])
    return Latency(median_ms=float(median), q1_ms=float(q1), q3_ms=float(q3), num_calls=len(samples_ms))
