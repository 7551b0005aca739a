"""What settles the claims about fewer bits, and about a model for other data, on made-up records."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import make_measurement, make_record
from test_compression_figures import lines_of, points_of
from test_figures import assert_readable, footnote, legend_names

from mnist_lab.compress.mixed_bits import MixedBits
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import MOE
from mnist_lab.report.drawing import MUTED
from mnist_lab.report.records import Record, save_predictions
from mnist_lab.studies.claims import few_bits_figures
from mnist_lab.studies.claims.draw import draw_claims
from mnist_lab.studies.claims.evidence import Evidence
from mnist_lab.studies.claims.few_bits import (
    ACTIVATIONS,
    BY_LAYERS,
    FEW,
    IN_8,
    LEARNED,
    LEARNED_IN_8,
    MIXED,
    OF_MIXTURES,
    ROUTER,
    ROUTER_LEARNED,
    SCHEMES,
    UNBALANCED,
    few_bits_rows,
    rise_per_visit,
    rounded,
    sensitivity_of_the_least_visited,
    settle_few_bits,
)
from mnist_lab.studies.claims.few_bits_figures import FEW_BITS_CLAIM_FIGURES
from mnist_lab.studies.claims.findings import Finding, summarize
from mnist_lab.studies.claims.transfer import settle_transfer, source_for, transfer_rows

SEEDS = range(3)
LABELS = np.arange(100) % 10
UNEVEN, USUAL = (pair.by_sensitivity for pair in OF_MIXTURES.values())
WAYS = transfer_rows("mnist")
Change = Callable[[Record], None]


def points(gained: float) -> Change:
    def change(record: Record) -> None:
        record.measurements["onnxruntime"].test_acc += gained / 100

    return change


def against_original(**figures: float) -> Change:
    def change(record: Record) -> None:
        assert record.against_original is not None
        record.against_original.update(figures)

    return change


def proof(**figures: Any) -> Change:
    def change(record: Record) -> None:
        assert record.proof is not None
        record.proof.update(figures)

    return change


LOAD = [0.02, 0.08, 0.6, 0.3]  # the first expert is dead, though images came to it
RARE_SUFFER = proof(load=LOAD, rise_per_visit=[1e-9, 0.04, 0.01, 0.02])
HOLD: list[tuple[Row, Change]] = [
    (UNEVEN, RARE_SUFFER),
    *[(pair.by_sensitivity, points(1)) for pair in MIXED.values()],
    (ROUTER[2], against_original(rerouted=0.2)),
    (ROUTER[2], points(-1)),
    *[(row, against_original(load_cv=0.4)) for row in ACTIVATIONS.values()],
    *[(BY_LAYERS[bits], points(1)) for bits in FEW],
]
# One for each comparison: what has to be otherwise for it to be refuted.
REFUTED: list[tuple[int, Row, Change]] = [
    (20, UNEVEN, proof(rise_per_visit=[9.0, 0.005, 0.01, 0.02])),
    *[(20, pair.by_sensitivity, points(-2)) for pair in MIXED.values()],
    (21, ROUTER[2], against_original(rerouted=0.04)),
    (21, ROUTER_LEARNED, points(-2)),
    *[(22, row, against_original(load_cv=0.24)) for row in ACTIVATIONS.values()],
    *[(23, rounded(bits, method), points(2)) for bits in FEW for method in SCHEMES.values()],
]
# What is only reported settles nothing.
REPORTED: list[tuple[Row, Change]] = [
    (UNEVEN, proof(bits={"expert1.in": 2, "expert2.in": 8, "expert0.in": 4, "expert3.in": 4})),
    (UNEVEN, points(-3)),
    *[(pair.by_sensitivity, against_original(kl_to_original=9)) for pair in MIXED.values()],
    *[(ROUTER[bits], against_original(rerouted=0, rerouted_other_class=0)) for bits in (8, 4)],
    *[(ROUTER[bits], points(3)) for bits in (8, 4)],
    (IN_8, against_original(rerouted_other_class=0.9)),
    *[(row, against_original(rerouted=0)) for row in ACTIVATIONS.values()],
    *[(row, points(3)) for row in ACTIVATIONS.values()],
    *[(rounded(3, method), points(3)) for method in SCHEMES.values()],
    *[(LEARNED[bits], points(-3)) for bits in (4, 2, "ternary", 1)],
]


def make_run(folder: Path, row: Row, seed: int, generator: np.random.Generator, changes: list[Change]) -> Record:
    """As good as the original to 0.02 points, with a hundredth of the images rerouted, but for these changes."""
    measurement = make_measurement(0.98 + 2e-4 * generator.random())
    measurement.file_mb = 3.0 if row == MOE else 0.3
    measurement.confusion = (10 * np.eye(10, dtype=int)).tolist()
    record = make_record(row.name, seed, onnxruntime=measurement)
    logits = generator.normal(size=(len(LABELS), 10)).astype(np.float32)
    record.predictions = save_predictions(folder, record.run_name, logits, LABELS)
    noise = 0.001 * generator.random()
    if row.source is not None:
        record.against_original = {
            "rerouted": 0.01 + noise,
            "rerouted_other_class": 0.001,
            "load_cv_before": 5.0,  # of the original with weights in float, which is not what is compared with
            "load_cv": 0.2 + noise,
            "kl_to_original": 0.01 + noise,
        }
    record.proof = {"trained_share": 0.04, "step_bytes": 3_000, "step_bytes_of_all": 10_000}
    if isinstance(row.form, MixedBits):
        bits = {f"expert{expert}.{layer}": 2 + expert for expert in (0, 1, 2) for layer in ("in", "out")}
        record.proof = {"load": LOAD, "bits": {"stem": 2, **bits, "expert3.in": 8, "expert3.out": 8}}
        if row.form.allocation == "sensitivity":
            record.proof["rise_per_visit"] = [1e-9, 0.01, 0.01, 0.01]
    for change in changes:
        change(record)
    return record


def make_evidence_of(
    folder: Path, rows: Sequence[Row], changes: Sequence[tuple[Row, Change]], seeds: Sequence[int] = SEEDS
) -> Evidence:
    generator = np.random.default_rng(0)
    of_row: dict[str, list[Change]] = {}
    for row, change in changes:
        of_row.setdefault(row.name, []).append(change)
    runs = [make_run(folder, row, seed, generator, of_row.get(row.name, [])) for seed in seeds for row in rows]
    return Evidence(folder, runs, seeds)


def make_few_bits(folder: Path, *changes: tuple[Row, Change], seeds: Sequence[int] = SEEDS) -> Evidence:
    """Seeds in which every claim holds, but for these changes."""
    return make_evidence_of(folder, few_bits_rows(), [*HOLD, *changes], seeds)


def make_transferred(folder: Path, *changes: tuple[Row, Change]) -> Evidence:
    return make_evidence_of(folder, WAYS, changes)


def ancestors(row: Row) -> Iterator[Row]:
    for parent in row.parents.values():
        yield parent
        yield from ancestors(parent)


def test_rows_have_their_ancestors_first_and_no_name_twice() -> None:
    rows = few_bits_rows()
    assert len({row.name for row in rows}) == len(rows)
    for place, row in enumerate(rows):
        assert not [ancestor for ancestor in ancestors(row) if ancestor in rows[place:]]
        assert {MOE, UNBALANCED} & {row, *ancestors(row)}  # no third mixture is trained


def test_every_row_is_compared(tmp_path: Path) -> None:
    evidence = make_few_bits(tmp_path)
    seen: set[str] = set()

    class Watched(Evidence):
        def run(self, model: str, seed: int) -> Record:
            seen.add(model)
            return super().run(model, seed)

    records = [evidence.run(row.name, seed) for row in few_bits_rows() for seed in SEEDS]
    settle_few_bits(Watched(tmp_path, records, SEEDS))
    assert {row.name for row in few_bits_rows()} - seen == {UNBALANCED.name}  # only a source


def test_claims_are_supported_where_they_hold_whatever_is_only_reported(tmp_path: Path) -> None:
    findings = settle_few_bits(make_few_bits(tmp_path, *REPORTED))
    assert summarize(findings) == dict.fromkeys(range(20, 24), "supported")
    assert len({finding.comparison for finding in findings}) == len(findings)
    deciding = [finding.claim for finding in findings if finding.verdict != "reported"]
    assert deciding == sorted(claim for claim, _, _ in REFUTED)


@pytest.mark.parametrize(("claim", "row", "change"), REFUTED, ids=lambda value: getattr(value, "name", None))
def test_claim_is_refuted_by_each_of_its_comparisons(claim: int, row: Row, change: Change, tmp_path: Path) -> None:
    findings = settle_few_bits(make_few_bits(tmp_path, (row, change)))
    refuted = [finding for finding in findings if finding.verdict == "refuted"]
    assert [finding.claim for finding in refuted] == [claim]
    assert summarize(findings) == dict.fromkeys(range(20, 24), "supported") | {claim: "refuted"}


def effects(findings: list[Finding]) -> dict[str, float]:
    return {finding.comparison: finding.effect for finding in findings}


def test_effects_are_those_of_the_pairs(tmp_path: Path) -> None:
    found = effects(
        settle_few_bits(
            make_few_bits(
                tmp_path,
                (ROUTER_LEARNED, points(-0.4)),
                (LEARNED_IN_8, points(0.3)),
                (BY_LAYERS[2], against_original(kl_to_original=0.5)),
                (MIXED["3 bits"].evenly, against_original(kl_to_original=0.03)),
            )
        )
    )
    uneven, usual = OF_MIXTURES
    noise, little = pytest.approx(0, abs=0.03), pytest.approx(0, abs=0.002)
    label = "rise in KL per visit in 2 bits, log(least visited / most visited expert)"
    assert found[f"{label}, {uneven}"] == pytest.approx(np.log(4))
    assert found[f"{label}, {usual}"] == 0
    assert found[f"mean bits of the least visited expert − of the most, 2.5 bits, {uneven}"] == -1
    assert found["test accuracy, by sensitivity − evenly, 3 bits with zero points"] - 1 == noise
    assert found["KL to the original, by sensitivity − evenly, 3 bits"] + 20 == pytest.approx(0, abs=2)
    assert found["file, by sensitivity / evenly, 2.5 bits"] == 1
    assert found["images with other experts, router in 2 bits − in float"] - 19 == pytest.approx(0, abs=0.2)
    trained_for = "test accuracy, router in 2 bits − in float, trained for − not trained for"
    assert found[trained_for] - (-0.7 + 1) == noise
    assert found["test accuracy, router in 2 bits − in float, learned"] + 0.7 == noise
    assert found["load's variation (CV), activations in 4 bits − in float"] - 0.2 == little
    assert found["load's variation (CV), in float"] - 0.2 == little
    assert found["test accuracy, layer by layer − rounded with zero points, three levels"] - 1 == noise
    assert found["test accuracy, trained with them (QAT), 1 bit − the original"] == noise


@pytest.mark.parametrize(
    ("load", "rises", "living", "expected"),
    [
        (LOAD, [9.0, 0.04, 0.01, 0.02], [0.08, 0.3, 0.6], np.log(4)),
        ([0.025, 0.475, 0.3, 0.2], [0.5, 0.1, 0.2, 0.3], [0.025, 0.2, 0.3, 0.475], np.log(5)),  # just alive
        ([0.0, 1.0, 0.0, 0.0], [0.0, 0.4, 0.0, 0.0], [1.0], 0.0),  # nothing to compare
        ([0.3, 0.7], [0.0, 1e-9], [0.3, 0.7], 0.0),  # none that can be told from another
    ],
)
def test_dead_expert_is_no_least_visited_one(
    load: list[float], rises: list[float], living: list[float], expected: float
) -> None:
    record = make_record()
    record.proof = {"load": load, "rise_per_visit": rises}
    assert rise_per_visit(record)[0].tolist() == living
    assert sensitivity_of_the_least_visited(record) == pytest.approx(expected)


def test_figures_are_drawn_from_the_runs_of_their_own_suite(tmp_path: Path) -> None:
    evidence = make_few_bits(tmp_path)
    records = [evidence.run(row.name, seed) for row in few_bits_rows() for seed in SEEDS]
    drawn = [path.stem for path in draw_claims(tmp_path, records, "few-bits")]
    assert drawn == [*FEW_BITS_CLAIM_FIGURES]
    assert [path.stem for path in draw_claims(tmp_path, records, "models", "compression", "few-bits")] == drawn
    assert [*draw_claims(tmp_path, records[3:6], "few-bits")] == []


@pytest.mark.parametrize("name", FEW_BITS_CLAIM_FIGURES)
def test_figures_need_every_run(name: str, tmp_path: Path) -> None:
    evidence = make_few_bits(tmp_path)
    lacking = {"sensitivity_by_load": USUAL, "mixed_against_even": MIXED["3 bits"].evenly}[name]
    records = [evidence.run(row.name, seed) for row in few_bits_rows() for seed in SEEDS if row != lacking]
    assert FEW_BITS_CLAIM_FIGURES[name](Evidence(tmp_path, records, SEEDS)) is None
    assert FEW_BITS_CLAIM_FIGURES[name](Evidence(tmp_path, [], [])) is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_sensitivity_is_over_the_load_a_line_a_seed(seeds: int, tmp_path: Path) -> None:
    figure = few_bits_figures.sensitivity_by_load(make_few_bits(tmp_path, seeds=range(seeds)))
    assert figure is not None
    (axes,) = figure.axes
    assert legend_names(figure) == [*OF_MIXTURES]
    even = [[(8, 10), (30, 10), (60, 10)]] * seeds
    assert [points_of(line) for line in axes.lines] == [[(8, 40), (30, 20), (60, 10)]] * seeds + even
    assert len({line.get_color() for line in axes.lines}) == 2
    assert axes.get_yscale() == "log"  # as their ratio is what decides


@pytest.mark.parametrize("seeds", [1, 3])
def test_mixed_bits_stand_beside_even_ones(seeds: int, tmp_path: Path) -> None:
    evidence = make_few_bits(tmp_path, seeds=range(seeds))
    figure = few_bits_figures.mixed_against_even(evidence)
    assert figure is not None
    (axes,) = figure.axes
    assert legend_names(figure) == ["by sensitivity", "evenly"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [*MIXED]
    expected = [
        (round(float(evidence.acc_points(row.name, MOE.name).mean()), 6), place + height)
        for place, pair in enumerate(MIXED.values())
        for row, height in zip(pair, (-0.15, 0.15), strict=True)
    ]
    assert [points[0] for _, points in lines_of(axes)] == [pytest.approx(point) for point in expected]
    ticks = [line for line in axes.lines if line.get_marker() == "|" and line.get_color() == MUTED]
    assert [len(points_of(line)) for line in ticks] == [seeds] * len(expected)
    assert f"{seeds} seed" in footnote(figure)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("name", FEW_BITS_CLAIM_FIGURES)
def test_labels_do_not_overlap_or_leave_the_figure(name: str, seeds: int, tmp_path: Path) -> None:
    assert_readable(FEW_BITS_CLAIM_FIGURES[name](make_few_bits(tmp_path, seeds=range(seeds))))


def test_adapters_match_within_a_margin(tmp_path: Path) -> None:
    def verdict(gained: float) -> str:
        return summarize(settle_transfer(make_transferred(tmp_path, (WAYS.adapters, points(gained))), "mnist"))[24]

    assert [verdict(gained) for gained in (1, -0.2, -0.4)] == ["supported", "supported", "refuted"]


def test_adapters_are_reported_beside_all_that_they_save(tmp_path: Path) -> None:
    findings = settle_transfer(make_transferred(tmp_path, (WAYS.from_loftq, points(-9))), "mnist")
    assert summarize(findings) == {24: "supported"}
    found = effects(findings)
    noise = pytest.approx(0, abs=0.03)
    assert found["test accuracy, adapters from LoftQ − from zero"] + 9 == noise
    assert found["test accuracy, adapters from LoftQ − full fine-tuning"] + 9 == noise
    assert found["parameters trained, adapters / full fine-tuning"] == pytest.approx(0.04)
    assert found["bytes at the peak of a step, adapters / full fine-tuning"] == pytest.approx(0.3)


def test_transfer_starts_from_mnist_and_for_mnist_itself_from_its_sibling() -> None:
    assert [source_for(name) for name in ("fashion-mnist", "kmnist", "digits", "mnist")] == [
        *["mnist"] * 3,
        "fashion-mnist",
    ]
    assert [row.name for row in WAYS] == [
        "Sparse_MoE_adapted-mnist",
        "Sparse_MoE_adapted-mnist-loftq",
        "Sparse_MoE_finetuned-mnist",
    ]
    assert {row.source.dataset for row in WAYS if row.source is not None} == {"mnist"}
