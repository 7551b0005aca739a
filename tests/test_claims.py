import json
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from builders import HERE, edit_json, make_measurement, make_record
from scipy import stats
from tiny import SMALL, make_lab

from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.compress.int8 import StaticInt8
from mnist_lab.deploy.inside import JOBS
from mnist_lab.errors import UserError
from mnist_lab.experiments.row import Row, describe
from mnist_lab.experiments.run import Run
from mnist_lab.machine import cpu_model
from mnist_lab.report.records import Epoch, Record, load_record, save_predictions
from mnist_lab.studies.claims import run as claims_run
from mnist_lab.studies.claims.evidence import (
    Evidence,
    load_cv,
    load_entropy,
    mutual_information,
    num_dead_experts,
    soften,
)
from mnist_lab.studies.claims.figures import CLAIM_FIGURES
from mnist_lab.studies.claims.findings import (
    Claim,
    Finding,
    decide,
    format_claims,
    mcnemar,
    p_value,
    ratio_of_medians,
    summarize,
    write_claims,
)
from mnist_lab.studies.claims.rows import CALIBRATIONS, calibrated, claim_rows, grid_rows, winners
from mnist_lab.studies.claims.run import _settle_other_files
from mnist_lab.studies.claims.settle import (
    Settings,
    find_winner,
    load_scaling,
    settle_claims,
    settle_dark_knowledge,
    settle_scaling,
)

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
    low: float, high: float, bound: float, sign: Literal[-1, 1], verdict: str
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


LABELS = np.arange(1000) % 10


def make_epoch(epoch: int, expert_load: list[float]) -> Epoch:
    return Epoch(
        epoch=epoch,
        learning_rate=1e-3,
        train_terms={"cross_entropy": 0.1},
        validation_loss=0.1,
        validation_acc=0.98,
        expert_load=expert_load,
        dropped_share=0.0,
    )


def make_run(folder: Path, row: Row, seed: int, generator: np.random.Generator) -> Record:
    """The MoE better than all dense models, its load even but where the sign is wrong, INT8 four times as fast."""
    is_moe = row.name.startswith("Sparse_MoE") and row.name != "Sparse_MoE-K4"
    measurement = make_measurement(0.99 + 0.001 * is_moe + 1e-4 * generator.random())
    measurement.test_loss = 0.05 - 0.01 * is_moe + 1e-3 * generator.random()
    measurement.test_brier = 0.02
    speed = 0.25 if row.form.precision == "INT8" else 1.0
    measurement.size_mib = speed * 1.02
    for batch in ("1", "64", "1024"):
        median_ms = speed + 0.01 * generator.random()
        measurement.latency_ms[batch] = {"median_ms": median_ms, "q1_ms": median_ms, "q3_ms": median_ms, "num_calls": 9}
    measurement.confusion = (100 * np.eye(10, dtype=int)).tolist()
    record = make_record(row.name, seed, onnxruntime=measurement)
    load = [0.94, 0.02, 0.02, 0.02] if "wrong" in row.name else [0.4, 0.2, 0.2, 0.2]
    if row.name in {"Sparse_MoE", "Sparse_MoE-switch", "Sparse_MoE-cv"}:
        load = [0.25, 0.25, 0.26 - 0.01 * seed, 0.24 + 0.01 * seed]
    record.curves = [make_epoch(epoch, shares) for epoch, shares in ((1, [1.0, 0, 0, 0]), (2, load))]
    logits = generator.normal(size=(len(LABELS), 10)).astype(np.float32) * 5
    record.predictions = save_predictions(folder, record.run_name, logits, LABELS)
    record.scaled = {"temperature": 2.0, "test_loss": 0.03, "test_ece": 0.01, "test_brier": 0.01}
    # Experts 0 and 1 share the first five digits, 2 and 3 the others; without one, its digits lose a tenth.
    record.expert_by_class = [[0.5, 0.5, 0, 0]] * 5 + [[0, 0, 0.5, 0.5]] * 5
    record.acc_without_expert = [[0.9] * 5 + [1.0] * 5] * 2 + [[1.0] * 5 + [0.9] * 5] * 2
    record.time_by_job_us = dict.fromkeys(JOBS, 1.0)
    record.family = row.family
    record.architecture = {"routing": {"top_k": 2}}
    record.config = {"step": describe(row.step), "form": describe(row.form)}
    record.routes_changed = 0.001 if isinstance(row.form, StaticInt8) else None
    return record


def make_evidence(folder: Path) -> tuple[Evidence, Settings]:
    """Three seeds of every model, and a grid whose winner is T = 5, α = 0.9."""
    generator = np.random.default_rng(0)
    best = winners(DistillationConfig(5, 0.9))
    runs, grid = (
        [make_run(folder / name, row, seed, generator) for seed in SEEDS for row in rows]
        for name, rows in (("own", [*claim_rows(), *best]), ("grid", grid_rows()))
    )
    for record in grid:
        record.validation_acc = 0.99 if record.model == "KD_FFN_Student-T5-a0.9" else 0.98
    settings = Settings(
        calibrations=[calibrated(calibration).name for calibration in CALIBRATIONS],
        winner="-T5-a0.9",
        grid=Evidence.in_folder(folder / "grid", grid),
    )
    return Evidence.in_folder(folder / "own", runs), settings


@pytest.fixture
def findings(tmp_path: Path) -> list[Finding]:
    return settle_claims(*make_evidence(tmp_path))


def test_claims_are_settled_as_the_runs_are(findings: list[Finding]) -> None:
    verdicts = summarize(findings)
    assert set(verdicts) == {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14}
    assert [number for number, verdict in verdicts.items() if verdict == "supported"] == [1, 3, 4, 7, 8, 13]
    assert [verdicts[number] for number in (2, 5, 6)] == ["refuted"] * 3
    by_comparison = {finding.comparison: finding for finding in findings}
    assert by_comparison["test loss, Sparse_MoE − FFN_equal_total"].verdict == "supported"
    assert by_comparison["test accuracy, Sparse_MoE − FFN_baseline"].effect == pytest.approx(0.1, abs=0.02)
    assert by_comparison["entropy of the expert load, wrong sign − none"].effect < -0.5
    assert by_comparison["time at batch 64, Sparse_MoE_PTQ / FP32"].effect == pytest.approx(0.25, abs=0.02)
    assert by_comparison["routing's share of the time, Sparse_MoE"].effect == pytest.approx(5 / 8)
    assert by_comparison["dead experts, wrong sign"].effect == 3
    assert by_comparison["images whose experts change, Sparse_MoE_PTQ-cal10-entropy"].effect == pytest.approx(1e-3)
    lost = "test accuracy lost when an expert is closed, mean over experts"
    assert by_comparison[lost].effect == pytest.approx(5)
    assert by_comparison["the same, on the expert's own digits − on the others"].effect == pytest.approx(10)


def test_accuracies_are_also_compared_image_by_image(findings: list[Finding]) -> None:
    accuracies = [finding for finding in findings if finding.comparison.startswith("test accuracy, ")]
    with_images = [finding for finding in accuracies if "worst" not in finding.comparison]
    assert {finding.claim for finding in with_images} == {1, 2, 3, 4, 5, 7, 9, 10, 13, 14}
    assert all(len(finding.mcnemar_p) == 3 for finding in with_images)
    assert all(0 < p <= 1 for finding in with_images for p in finding.mcnemar_p)


def test_mcnemar_counts_the_images_that_only_one_gets_right() -> None:
    one = np.array([True] * 90 + [True] * 8 + [False] * 1 + [False] * 5)
    other = np.array([True] * 90 + [False] * 8 + [True] * 1 + [False] * 5)
    # Two-sided sign test of 8 against 1: 2·(1 + 9)/2⁹.
    assert mcnemar(one, other) == pytest.approx(20 / 512)
    assert mcnemar(one, one) == 1


def test_reported_figures_decide_nothing() -> None:
    reported = CLAIM.report("a", [1.0, 1.1], "x")
    assert (reported.verdict, reported.bound) == ("reported", "")
    assert summarize([reported, CLAIM.below("b", [-1.0, -1.1], 0, "x")]) == {1: "supported"}
    assert summarize([reported]) == {1: "undecided"}


def test_ratio_of_medians_has_the_notches_interval() -> None:
    ratio, low, high = ratio_of_medians(2.0, 0.1, 100, 1.0, 0.2, 400)
    assert ratio == 2
    assert low == pytest.approx((2 - 0.0157) / (1 + 0.0157))
    assert high == pytest.approx((2 + 0.0157) / (1 - 0.0157))


def test_winner_is_chosen_on_validation(tmp_path: Path) -> None:
    _, settings = make_evidence(tmp_path)
    assert find_winner(settings.grid, settings.grid.find("KD_FFN_Student")) == "KD_FFN_Student-T5-a0.9"


def test_softening_is_the_softmax_of_divided_logits() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 10))
    probabilities, softened = (np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) for z in (logits, logits / 3))
    np.testing.assert_allclose(soften(probabilities, 3), softened)


def test_scaling_tells_whether_sparse_wins_when_large(tmp_path: Path) -> None:
    kinds = {"sparse": 2.0, "dense, equal total": 8.0, "dense, equal active": 1.0}
    rows = [
        {"sweep": sweep, "experts": 8, "width": 512, "batch": 256, "kind": kind, "median_ms": ms * size}
        | {sweep: size, "q1_ms": ms - 0.01, "q3_ms": ms + 0.01, "num_calls": 36}
        for sweep in ("experts", "width")
        for size in (2, 64)
        for kind, ms in kinds.items()
    ]
    path = tmp_path / "scaling.json"

    def save(**fields: Any) -> None:
        edit_json(path, {"machine": HERE, "rows": rows} | fields)

    save()
    findings = settle_scaling(load_scaling(path).rows)
    assert [(finding.verdict, finding.effect) for finding in findings] == [("supported", 0.25), ("reported", 2.0)] * 2
    wrongs: list[dict[str, Any]] = [
        {"rows": []},
        {"rows": rows[:-1]},
        {"rows": [{**rows[0], "median_ms": -1}]},
        {"machine": None},
    ]
    for wrong in wrongs:
        save(**wrong)
        with pytest.raises(UserError, match=r"scaling.json is broken"):
            load_scaling(path)
    save()
    path.write_text(path.read_text().replace('"num_calls": 36', '"num_calls": 37'))
    with pytest.raises(UserError, match="not what was written"):
        load_scaling(path)


def test_scaling_of_another_cpu_settles_nothing_here(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    kinds = ("sparse", "dense, equal total", "dense, equal active")
    point = {"experts": 8, "width": 8, "batch": 8, "median_ms": 2, "q1_ms": 1, "q3_ms": 3, "num_calls": 9}
    rows = [{"sweep": sweep, "kind": kind, **point} for sweep in ("experts", "width") for kind in kinds]
    for cpu, num_findings in ((cpu_model(), 4), ("another", 0)):
        edit_json(tmp_path / "benchmarks" / "scaling.json", {"machine": {**HERE, "cpu": cpu}, "rows": rows})
        findings, notes = _settle_other_files(tmp_path, "mnist")
        assert len(findings) == num_findings
        assert any("another CPU" in note for note in notes) == (cpu == "another")


def test_dark_knowledge_counts_threes() -> None:
    errors = {"labels": 140, "distilled": 80, "distilled-without-3": 200, "bias corrected": 100}
    threes = {"labels": 10, "distilled": 5, "distilled-without-3": 150, "bias corrected": 20}
    runs = [
        {
            "num_threes": 1000,
            "errors": {role: {"all_digits": n + s, "threes": threes[role]} for role, n in errors.items()},
        }
        for s in (0, 1)
    ]
    by_comparison = {finding.comparison: finding for finding in settle_dark_knowledge(runs)}
    assert by_comparison["share of threes recognised, bias corrected"].effect == pytest.approx(0.98)
    assert by_comparison["share of threes recognised, bias corrected"].verdict == "supported"
    assert by_comparison["test errors, labels − distilled"].effect == 60


def test_every_figure_is_drawn_from_the_runs(tmp_path: Path) -> None:
    evidence, settings = make_evidence(tmp_path)
    without_figure = {name for name, draw in CLAIM_FIGURES.items() if draw(evidence) is None}
    assert without_figure == {"temperature_and_alpha"}
    assert CLAIM_FIGURES["temperature_and_alpha"](settings.grid) is not None
    empty = Evidence(tmp_path, [], [])
    assert not any(draw(empty) for draw in CLAIM_FIGURES.values())


def test_mutual_information_is_that_of_the_joint_counts() -> None:
    assert mutual_information(np.full((10, 4), 7.0)) == pytest.approx(0)
    assert mutual_information(np.eye(4) * 9) == pytest.approx(np.log(4))


def test_specialisation_is_above_that_of_shuffled_pairs(findings: list[Finding]) -> None:
    finding = next(finding for finding in findings if finding.claim == 8)
    # Knowing the expert halves the digits; shuffled, 2,000 pairs still show (10 - 1)·(4 - 1)/2/2000 of it by chance.
    assert finding.effect == pytest.approx(np.log(2) - 27 / 4000, abs=2e-3)
    assert finding.verdict == "supported"


def test_load_is_of_the_last_epoch(tmp_path: Path) -> None:
    evidence, _ = make_evidence(tmp_path)
    record = evidence.run("Sparse_MoE", 0)
    record.curves[-1]["expert_load"] = [0.25] * 4
    assert load_entropy(record) == pytest.approx(np.log(4))
    assert (load_cv(record), num_dead_experts(record)) == (0, 0)
    record.curves[-1]["expert_load"] = [0.5, 0.48, 0.02, 0]
    assert num_dead_experts(record) == 2


def test_files_hold_every_finding(findings: list[Finding], tmp_path: Path) -> None:
    write_claims(tmp_path, [*findings, CLAIM.below("one seed", [1.0], 0, "x")], title="Claims")
    text = (tmp_path / "claims.md").read_text()
    assert format_claims(findings)[:40] in text
    loaded = json.loads((tmp_path / "claims.json").read_text())
    assert [entry["comparison"] for entry in loaded][:-1] == [finding.comparison for finding in findings]
    assert loaded[-1]["p_value"] is None
    assert all(entry["comparison"] in text for entry in loaded)


def test_evidence_is_of_one_recipe_and_knows_rows_without_the_recipes_departures(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    records = [make_run(tmp_path, row, seed, generator) for row in grid_rows() for seed in SEEDS]
    shorter = [make_run(tmp_path, row, seed, generator) for row in grid_rows() for seed in SEEDS[:2]]
    for record in shorter:
        record.departures = "-epochs1"
    both = Evidence.in_folder(tmp_path, [*shorter, *records])
    assert both.seeds == list(SEEDS)
    assert both.run("Sparse_MoE", 0).model == "Sparse_MoE"
    alone = Evidence.in_folder(tmp_path, shorter)
    assert alone.seeds == [0, 1]
    assert alone.run("Sparse_MoE", 0).model == "Sparse_MoE-epochs1"
    assert alone.find("KD_FFN_Student") == both.find("KD_FFN_Student")


@pytest.mark.slow
def test_seeds_are_made_side_by_side_on_threads_that_do_not_hang_on_how_many_are_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    find = partial(make_lab, tmp_path)
    doors = claims_run.Doors(lambda: nullcontext(find()), find)
    lab = claims_run._plan(find(), range(2))
    assert (lab.checkpoints.name, lab.results.name) == ("claims", "claims")
    claims_run._make(lab, doors, [SMALL], range(2))
    before = [Run(lab, SMALL, seed).output.read_bytes() for seed in (0, 1)]
    Run(lab, SMALL, 1).output.unlink()
    claims_run._make(lab, doors, [SMALL], range(2))
    assert [Run(lab, SMALL, seed).output.read_bytes() for seed in (0, 1)] == before
    records = [load_record(Run(lab, SMALL, seed).record) for seed in (0, 1)]
    assert {record.train_threads for record in records} == {1}
    assert Run(replace(lab, train_threads=2), SMALL, 0).why_stale() == "stale: trained on 1 threads, not 2"
