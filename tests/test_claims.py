import json
from pathlib import Path

import numpy as np
import pytest
from builders import make_measurement, make_record
from scipy import stats

from mnist_lab.claims import (
    Claim,
    Evidence,
    Finding,
    decide,
    format_claims,
    load_entropy,
    mutual_information,
    p_value,
    settle_claims,
    summarize,
    write_claims,
)
from mnist_lab.records import Record, save_predictions
from mnist_lab.rows import claim_rows

SEEDS = range(3)
CLAIM = Claim(1, "it is so")


@pytest.mark.parametrize(
    ("low", "high", "bound", "sign", "verdict"),
    [
        (-2.0, -1.0, 0.0, 1, "supported"),
        (1.0, 2.0, 0.0, 1, "refuted"),
        (-1.0, 1.0, 0.0, 1, "undecided"),
        (-1.0, 0.05, 0.1, 1, "supported"),
        (-0.05, 0.3, -0.1, -1, "supported"),
        (-0.3, -0.2, -0.1, -1, "refuted"),
        (-0.2, 0.0, -0.1, -1, "undecided"),
        (float("nan"), float("nan"), 0.0, 1, "undecided"),
    ],
)
def test_verdict_follows_from_where_the_interval_lies(
    low: float, high: float, bound: float, sign: int, verdict: str
) -> None:
    assert decide(low, high, bound, sign=sign) == verdict


def test_test_is_the_paired_t_of_the_two_models() -> None:
    one, other = np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.5, 2.5, 3.0, 4.5])
    reference = stats.ttest_rel(one, other)
    finding = CLAIM.below("one − other", one - other, 0, "points")
    assert finding.p_value == pytest.approx(reference.pvalue)
    interval = reference.confidence_interval(0.95)
    assert [finding.low, finding.high] == pytest.approx([interval.low, interval.high])
    assert finding.effect == pytest.approx((one - other).mean())
    assert finding.n == 4


@pytest.mark.parametrize(("effects", "p"), [([0.5, 0.5], 0.0), ([0.0, 0.0], 1.0)])
def test_effects_without_spread_have_a_p_value(effects: list[float], p: float) -> None:
    assert p_value(np.array(effects), 0) == p


def test_one_seed_decides_nothing() -> None:
    finding = CLAIM.above("x", [5.0], 0, "points")
    assert finding.verdict == "undecided"
    assert np.isnan([finding.low, finding.high, finding.p_value]).all()


def test_claim_needs_all_of_its_comparisons() -> None:
    good, bad = CLAIM.below("a", [-1.0, -1.1], 0, "x"), CLAIM.below("b", [1.0, 1.1], 0, "x")
    open_ = CLAIM.below("c", [-1.0, 1.0], 0, "x")
    assert summarize([good]) == {1: "supported"}
    assert summarize([good, open_]) == {1: "undecided"}
    assert summarize([good, open_, bad]) == {1: "refuted"}


def make_runs(folder: Path) -> list[Record]:
    """Three seeds of every model: the MoE better than all dense ones, its load even but where the sign is wrong."""
    generator = np.random.default_rng(0)
    runs = []
    for seed in SEEDS:
        for row in claim_rows():
            is_moe = row.model.startswith("Sparse_MoE") and row.model != "Sparse_MoE-K4"
            measurement = make_measurement(0.99 + 0.001 * is_moe + 1e-4 * generator.random())
            measurement.test_loss = 0.05 - 0.01 * is_moe + 1e-3 * generator.random()
            speed = 0.25 if row.precision == "INT8" else 1.0
            measurement.size_mib = speed * 1.02
            for batch in ("1", "64", "1024"):
                measurement.latency_ms[batch] = {"median_ms": speed + 0.01 * generator.random()}
            record = make_record(row.model, seed, onnxruntime=measurement)
            load = [0.94, 0.02, 0.02, 0.02] if "wrong" in row.model else [0.4, 0.2, 0.2, 0.2]
            if row.model in {"Sparse_MoE", "Sparse_MoE-switch", "Sparse_MoE-cv"}:
                load = [0.25, 0.25, 0.26 - 0.01 * seed, 0.24 + 0.01 * seed]
            record.curves = [{"expert_load": [1.0, 0, 0, 0]}, {"expert_load": load}]
            save_predictions(folder, record.run_name, generator.normal(size=(50, 10)).astype(np.float32) * 5)
            # Experts 0 and 1 share the first five digits, 2 and 3 the others.
            record.expert_by_class = [[0.5, 0.5, 0, 0]] * 5 + [[0, 0, 0.5, 0.5]] * 5
            record.config = {"architecture": {"routing": {"top_k": 2}}}
            record.measurements["onnxruntime"].confusion = (100 * np.eye(10, dtype=int)).tolist()
            runs.append(record)
    return runs


@pytest.fixture
def findings(tmp_path: Path) -> list[Finding]:
    return settle_claims(Evidence(tmp_path, make_runs(tmp_path), SEEDS))


def test_claims_are_settled_as_the_runs_are(findings: list[Finding]) -> None:
    verdicts = summarize(findings)
    assert [verdicts[number] for number in (1, 2, 3, 4, 6, 7)] == [
        "supported",
        "refuted",
        "supported",
        "supported",
        "refuted",
        "supported",
    ]
    by_comparison = {finding.comparison: finding for finding in findings}
    assert by_comparison["test loss, Sparse_MoE − FFN_equal_total"].verdict == "supported"
    assert by_comparison["test accuracy, Sparse_MoE − FFN_baseline"].effect == pytest.approx(0.1, abs=0.02)
    assert by_comparison["entropy of the expert load, wrong sign − none"].effect < -0.5
    assert by_comparison["time at batch 64, Sparse_MoE_PTQ / FP32"].effect == pytest.approx(0.25, abs=0.02)


def test_mutual_information_is_that_of_the_joint_counts() -> None:
    assert mutual_information(np.full((10, 4), 7.0)) == pytest.approx(0)
    assert mutual_information(np.eye(4) * 9) == pytest.approx(np.log(4))


def test_specialisation_is_above_that_of_shuffled_pairs(findings: list[Finding]) -> None:
    (finding,) = (finding for finding in findings if finding.claim == 8)
    # Knowing the expert halves the digits; shuffled, 2,000 pairs still show (10 - 1)·(4 - 1)/2/2000 of it by chance.
    assert finding.effect == pytest.approx(np.log(2) - 27 / 4000, abs=2e-3)
    assert finding.verdict == "supported"


def test_load_entropy_is_of_the_last_epoch(tmp_path: Path) -> None:
    record = next(run for run in make_runs(tmp_path) if run.model == "Sparse_MoE")
    record.curves[-1]["expert_load"] = [0.25] * 4
    assert load_entropy([record])[0] == pytest.approx(np.log(4))


def test_files_hold_every_finding(findings: list[Finding], tmp_path: Path) -> None:
    write_claims(tmp_path, [*findings, CLAIM.below("one seed", [1.0], 0, "x")], title="Claims")
    text = (tmp_path / "claims.md").read_text()
    assert format_claims(findings)[:40] in text
    loaded = json.loads((tmp_path / "claims.json").read_text())
    assert [entry["comparison"] for entry in loaded][:-1] == [finding.comparison for finding in findings]
    assert loaded[-1]["p_value"] is None
    assert all(entry["comparison"] in text for entry in loaded)
