import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from mnist_lab import measure


@pytest.fixture
def logits() -> measure.Array:
    return (3 * np.random.default_rng(0).standard_normal((500, 10))).astype(np.float32)


@pytest.fixture
def labels(logits: measure.Array) -> measure.Labels:
    noisy = logits + 2 * np.random.default_rng(1).standard_normal(logits.shape)
    return noisy.argmax(axis=1).astype(np.int64)


@pytest.mark.slow
def test_quality_agrees_with_the_references(logits: measure.Array, labels: measure.Labels) -> None:
    from sklearn import metrics
    from torchmetrics.functional.classification import multiclass_calibration_error

    quality = measure.quality(logits, labels)
    torch_logits, torch_labels = torch.from_numpy(logits), torch.from_numpy(labels)
    predicted = logits.argmax(axis=1)
    assert quality.acc == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert quality.loss == pytest.approx(torch.nn.functional.cross_entropy(torch_logits, torch_labels).item(), rel=1e-5)
    reference = multiclass_calibration_error(torch_logits.softmax(dim=1), torch_labels, num_classes=10, n_bins=15)
    assert quality.ece == pytest.approx(reference.item(), abs=1e-5)
    assert quality.confusion == metrics.confusion_matrix(labels, predicted, labels=range(10)).tolist()


def test_bins_hold_every_image(logits: measure.Array, labels: measure.Labels) -> None:
    bins = measure.confidence_bins(logits, labels)
    assert sum(bins.count) == 500
    assert sum(bins.correct) == round(measure.accuracy(logits, labels) * 500)
    for index, (count, total) in enumerate(zip(bins.count, bins.confidence_sum, strict=True)):
        assert index / 15 * count <= total + 1e-9
        assert total <= (index + 1) / 15 * count + 1e-9


def test_large_logits_neither_overflow_nor_leave_the_last_bin() -> None:
    logits = np.array([[1000.0, 0.0], [0.0, 1000.0]], np.float32)
    quality = measure.quality(logits, np.array([0, 0]))
    assert quality.bins.count[-1] == 2
    assert quality.loss == pytest.approx(500)


def test_predict_batches_and_keeps_the_order() -> None:
    sizes = []

    def run(pixels: measure.Array) -> measure.Array:
        sizes.append(len(pixels))
        return pixels

    pixels = np.arange(2500, dtype=np.float32)[:, None]
    assert np.array_equal(measure.predict(run, pixels), pixels)
    assert sizes == [1000, 1000, 500]


def test_latency_takes_turns_in_blocks_and_drops_the_first_calls() -> None:
    order: list[str] = []

    def make_call(name: str) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            time.sleep(0.001)

        return call

    calls = {name: make_call(name) for name in ("a", "b")}
    blocks = 0

    def on_block() -> None:
        nonlocal blocks
        blocks += 1

    latencies = measure.measure_latency(calls, num_rounds=3, block_s=0.005, on_block=on_block)
    turns = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert turns == ["a", "b"] * 3
    assert blocks == 6
    for name in calls:
        assert latencies[name].num_calls == order.count(name) - 3 * 2
        assert 1.0 <= latencies[name].q1_ms <= latencies[name].median_ms <= latencies[name].q3_ms


def test_latency_is_a_median_of_milliseconds() -> None:
    durations = iter([0.0, 0.0] + [0.002] * 4 + [0.05] + [0.002] * 1000)
    latency = measure.measure_latency({"x": lambda: time.sleep(next(durations))}, num_rounds=1, block_s=0.09)["x"]
    assert 2.0 <= latency.median_ms < 10


def test_brier_score_is_the_squared_distance_from_the_label() -> None:
    logits = np.log(np.array([[0.7, 0.2, 0.1], [0.5, 0.25, 0.25]], np.float32))
    expected = (0.3**2 + 0.2**2 + 0.1**2 + 0.5**2 + 0.75**2 + 0.25**2) / 2
    assert measure.brier_score(logits, np.array([0, 1])) == pytest.approx(expected, rel=1e-5)


def test_temperature_undoes_the_scale_of_logits() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(20_000, 10)).astype(np.float32) * 2
    cumulated = np.exp(measure.log_softmax(logits)).cumsum(axis=1)
    labels = (generator.random((20_000, 1)) > cumulated).sum(axis=1).clip(max=9)  # drawn from softmax(logits)
    assert measure.fit_temperature(logits * 3, labels) == pytest.approx(3, rel=0.03)


def test_decibels_are_ten_times_the_logarithm_of_signal_over_noise() -> None:
    expected = np.array([3.0, 4.0], np.float32)
    assert measure.decibels(expected + np.array([0.0, 0.5], np.float32), expected) == pytest.approx(20)
    assert measure.decibels(expected, expected) == 300
