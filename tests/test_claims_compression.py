"""What settles the claims about pruning a mixture, on made-up records."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import make_measurement, make_record

from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import MOE, rival
from mnist_lab.report.records import Record, save_predictions
from mnist_lab.studies.claims.compression import (
    FEWER,
    HALF_OF_PARAMETERS,
    ROUTER,
    SAME_BYTES,
    SHARED_OUT,
    SMALL,
    UNBALANCED,
    ZEROS,
    compression_rows,
    settle_compression,
    zeros,
)
from mnist_lab.studies.claims.compression_figures import PRUNING_CLAIM_FIGURES
from mnist_lab.studies.claims.draw import draw_claims
from mnist_lab.studies.claims.evidence import Evidence, loss_beyond_the_most_visited, pruned_gate_share
from mnist_lab.studies.claims.findings import Finding, summarize

SEEDS = range(3)
LABELS = np.arange(100) % 10
UNEVEN = zeros(0.9, UNBALANCED).before
SHARED_OUT_BEFORE, SHARED_OUT_AFTER = SHARED_OUT.values()
Change = Callable[[Record], None]


def points(lost: float) -> Change:
    def change(record: Record) -> None:
        record.measurements["onnxruntime"].test_acc -= lost / 100

    return change


def against_original(**figures: float) -> Change:
    def change(record: Record) -> None:
        assert record.against_original is not None
        record.against_original.update(figures)

    return change


def by_expert(load: list[float], loss_rise: list[float | None]) -> Change:
    def change(record: Record) -> None:
        assert record.proof is not None
        record.proof["by_expert"] = {"load": load, "loss_rise": loss_rise}

    return change


# The least visited expert that lives loses most.
RARE_LOSE_MORE = by_expert([0.02, 0.08, 0.6, 0.3], [None, 0.9, 0.2, 0.3])
HOLD: list[tuple[Row, Change]] = [
    (UNEVEN, RARE_LOSE_MORE),
    (SHARED_OUT_AFTER["even"], points(0.5)),
    (ZEROS[0.95].after, against_original(expert_cka=0.4)),
    (ZEROS[0.98].after, against_original(expert_cka=0.5)),
    (ROUTER.before, against_original(routes_jaccard=0.6)),
    (ROUTER.before, points(2)),
    (FEWER.before, points(3)),
    *[(rival(row), points(1)) for row in SMALL.values()],
]
# One for each comparison: what has to be otherwise for it to be refuted.
REFUTED: list[tuple[int, Row, Change]] = [
    (15, UNEVEN, by_expert([0.02, 0.08, 0.6, 0.3], [9.0, 0.1, 0.2, 0.3])),
    (15, SHARED_OUT_AFTER["utilization"], points(1)),
    (15, SHARED_OUT_AFTER["sensitivity"], points(1)),
    (16, ZEROS[0.95].after, against_original(expert_cka=0.2)),
    (16, ZEROS[0.98].after, against_original(expert_cka=0.2)),
    (17, ROUTER.before, lambda record: setattr(record, "params_total", 40_000)),
    (17, ROUTER.before, against_original(routes_jaccard=0.98)),
    (17, ROUTER.before, points(-5)),
    *[(18, pruned.before, points(5)) for pruned in [*SAME_BYTES.values()][1:]],
    (18, FEWER.after, points(0.2)),
    (19, ZEROS[0.5].after, points(0.3)),
    *[(19, rival(row), points(-2)) for row in SMALL.values()],
]
# What is only reported settles nothing.
REPORTED: list[tuple[Row, Change]] = [
    (zeros(0.9).before, by_expert([0.2, 0.2, 0.3, 0.3], [0.0, 0.0, 0.9, 0.9])),
    *[(row, points(4)) for allocation, row in SHARED_OUT_BEFORE.items() if allocation != "even"],
    *[(ZEROS[ratio].before, against_original(expert_cka=0.1)) for ratio in (0.95, 0.98)],
    (ROUTER.after, against_original(routes_jaccard=1.0)),
    (HALF_OF_PARAMETERS, points(9)),
]


def make_run(folder: Path, row: Row, seed: int, generator: np.random.Generator, changes: list[Change]) -> Record:
    """As good as the original to 0.02 points, and with the original's routes, but for these changes."""
    measurement = make_measurement(0.99 + 2e-4 * generator.random())
    measurement.file_mb = 3.0 if row == MOE else 2.0
    measurement.confusion = (10 * np.eye(10, dtype=int)).tolist()
    record = make_record(row.name, seed, onnxruntime=measurement)
    logits = generator.normal(size=(len(LABELS), 10)).astype(np.float32)
    record.predictions = save_predictions(folder, record.run_name, logits, LABELS)
    record.architecture = {"model_width": 256, "routing": {"num_experts": 4}}
    record.params_total = 730_890
    record.proof = {"zeros": 0.5}
    RARE_LOSE_MORE(record)
    if row.source is not None:
        likeness = 0.3 + 0.01 * generator.random()
        record.against_original = {"routes_jaccard": 1.0, "expert_cka": likeness, "expert_cka_before": 0.3}
    for change in changes:
        change(record)
    return record


def make_pruned(folder: Path, *changes: tuple[Row, Change]) -> Evidence:
    """Three seeds in which every claim holds, but for these changes."""
    generator = np.random.default_rng(0)
    of_row: dict[str, list[Change]] = {}
    for row, change in (*HOLD, *changes):
        of_row.setdefault(row.name, []).append(change)
    runs = [
        make_run(folder, row, seed, generator, of_row.get(row.name, [])) for seed in SEEDS for row in compression_rows()
    ]
    return Evidence(folder, runs, SEEDS)


def test_rows_have_their_parents_first_and_no_name_twice() -> None:
    rows = compression_rows()
    assert len({row.name for row in rows}) == len(rows)
    for place, row in enumerate(rows):
        assert all(parent in rows[:place] for parent in row.parents.values())


def test_claims_are_supported_where_they_hold_whatever_is_only_reported(tmp_path: Path) -> None:
    findings = settle_compression(make_pruned(tmp_path, *REPORTED))
    assert summarize(findings) == dict.fromkeys(range(15, 20), "supported")
    assert len({finding.comparison for finding in findings}) == len(findings)
    deciding = [finding.claim for finding in findings if finding.verdict != "reported"]
    assert deciding == sorted(claim for claim, _, _ in REFUTED)


@pytest.mark.parametrize(("claim", "row", "change"), REFUTED, ids=lambda value: getattr(value, "name", None))
def test_claim_is_refuted_by_each_of_its_comparisons(claim: int, row: Row, change: Change, tmp_path: Path) -> None:
    findings = settle_compression(make_pruned(tmp_path, (row, change)))
    refuted = [finding for finding in findings if finding.verdict == "refuted"]
    assert [finding.claim for finding in refuted] == [claim]
    assert summarize(findings) == dict.fromkeys(range(15, 20), "supported") | {claim: "refuted"}


def effects(findings: list[Finding]) -> dict[str, float]:
    return {finding.comparison: finding.effect for finding in findings}


def test_effects_are_those_of_the_pairs(tmp_path: Path) -> None:
    found = effects(settle_compression(make_pruned(tmp_path, (ROUTER.after, points(1)))))
    noise = pytest.approx(0, abs=0.03)
    assert found["half of the gate, of all parameters"] == pytest.approx(512 / 730_890)
    assert found["test accuracy, half of the gate before fine-tuning − the original"] + 2 == noise
    assert found["test accuracy, half of the gate after fine-tuning − the original"] + 1 == noise
    assert found["test accuracy, 4 → 2 experts − 80 % zeros, before fine-tuning"] + 3 == noise
    assert found["test accuracy, 90 % zeros − its rival from scratch"] - 1 == noise
    assert found["file, 80 % zeros / the original"] == pytest.approx(2 / 3)
    assert found["file, 90 % zeros / its rival"] == 1


@pytest.mark.parametrize(
    ("load", "rises", "expected"),
    [
        ([0.02, 0.08, 0.6, 0.3], [None, 0.9, 0.2, 0.3], 0.7),  # the first is dead, though images came to it
        ([0.025, 0.475, 0.3, 0.2], [0.5, 0.1, 0.2, 0.3], 0.4),  # just alive
        ([0.0, 1.0, 0.0, 0.0], [None, 0.4, None, None], 0.0),  # nothing to compare
    ],
)
def test_least_visited_expert_is_one_that_lives(load: list[float], rises: list[Any], expected: float) -> None:
    record = make_record()
    record.proof = {"by_expert": {"load": load, "loss_rise": rises}}
    assert loss_beyond_the_most_visited(record) == pytest.approx(expected)


def test_gates_share_counts_what_became_zero() -> None:
    record = make_record()
    record.architecture, record.params_total = {"model_width": 8, "routing": {"num_experts": 3}}, 1000
    record.proof = {"zeros": 0.25}
    assert pruned_gate_share(record) == pytest.approx(6 / 1000)


def test_figures_are_drawn_from_the_runs_of_their_own_suite(tmp_path: Path) -> None:
    evidence = make_pruned(tmp_path)
    records = [evidence.run(row.name, seed) for row in compression_rows() for seed in SEEDS]
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "load_by_balance.png").touch()  # of the other suite, whose runs are not among these
    drawn = [path.stem for path in draw_claims(tmp_path, records, "compression")]
    assert drawn == [*PRUNING_CLAIM_FIGURES]
    assert (plots / "load_by_balance.png").exists()
    assert [path.stem for path in draw_claims(tmp_path, records, "models", "compression")] == drawn
    assert [*draw_claims(tmp_path, records[3:6], "models", "compression")] == []
