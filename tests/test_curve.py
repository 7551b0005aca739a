"""The curve of accuracy against bytes: the best of each size, the table, and the figures."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import make_record
from test_compression_figures import compressed, measured, original, parent, rival
from test_figures import assert_readable, footnote, legend_names, make_results

from mnist_lab.report import curve_figures
from mnist_lab.report.curve import (
    RATIOS,
    best_within,
    find_mixture,
    format_curve,
    front,
    has_curve,
    is_from_scratch,
    num_bytes,
    places_on_curve,
    write_curve,
)
from mnist_lab.report.curve_figures import ANCHORS, CURVE_FIGURES, find_chains
from mnist_lab.report.figures import FIGURES
from mnist_lab.report.records import Record, Timing
from mnist_lab.report.results import Model, Results

CHAIN = ("fewer_experts", "fewer_experts_narrower", "fewer_experts_narrower_QAT_FP32", "fewer_experts_narrower_QAT")


def validated(record: Record, validation_acc: float) -> Record:
    return replace(record, validation_acc=validation_acc)


def make_records(seed: int = 0) -> list[Record]:
    """A mixture of 4 MB, its chain, a taught student, and what was trained from scratch; each test differs by seed."""
    less = 0.001 * seed
    sources = ("Sparse_MoE", *(f"Sparse_MoE_{name}" for name in CHAIN))
    chain = [
        compressed(f"{name}-2" if place == 1 else name, seed, source="Sparse_MoE", acc=acc - less, mb=mb)
        for place, (name, acc, mb) in enumerate(
            zip(sources[1:], (0.985, 0.975, 0.97, 0.96), (2.0, 0.9, 0.9, 0.1), strict=True)
        )
    ]
    names = ["Sparse_MoE", *(record.model for record in chain)]
    chain = [
        replace(record, parents={"source": parent(before, seed)}, technique=technique)
        for record, before, technique in zip(
            chain,
            names,
            ("moe + pruned experts", *["moe + pruned experts + pruned neurons"], *["moe + pruned experts + qat"] * 2),
            strict=False,
        )
    ]
    chain[2] = replace(chain[2], technique="moe + pruned experts + pruned neurons + qat")
    chain[3] = replace(chain[3], technique=chain[2].technique, precision="INT4")
    student = replace(
        original("KD_FFN_Student", seed, acc=0.95, mb=0.4), parents={"teacher": parent("Sparse_MoE", seed)}
    )
    return [
        validated(original("FFN_baseline", seed, acc=0.98 - less, mb=1.0), 0.981),
        validated(replace(original("Sparse_MoE", seed, acc=0.99 - less), technique="moe"), 0.985),
        *(validated(record, acc) for record, acc in zip(chain, (0.988, 0.98, 0.97, 0.96), strict=True)),
        validated(student, 0.975),
        validated(rival("Sparse_MoE_narrower_rival", names[2], seed, acc=0.965 - less, mb=0.9), 0.979),
    ]


def make_curve(seeds: int = 1) -> Results:
    records = [record for seed in range(seeds) for record in make_records(seed)]
    return Results(records, ["FFN_baseline", "Sparse_MoE"])


def by_name(results: Results) -> dict[str, Model]:
    return {model.name: model for model in results.models}


def test_the_best_of_each_size_is_chosen_on_validation_images() -> None:
    places = places_on_curve(make_curve())
    assert [place.ratio for place in places] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024] == [*RATIOS]
    assert [place.limit for place in places][:4] == [4_000_000, 2_000_000, 1_000_000, 500_000]
    found = [place.best.name if place.best else None for place in places]
    narrower = "Sparse_MoE_fewer_experts_narrower-2"
    assert found == [
        "Sparse_MoE_fewer_experts",  # beats the mixture itself on validation, not on test
        "Sparse_MoE_fewer_experts",
        narrower,
        "KD_FFN_Student",
        *["Sparse_MoE_fewer_experts_narrower_QAT"] * 2,
        *[None] * 5,
    ]
    rivals = [place.rival.name if place.rival else None for place in places]
    assert rivals == ["FFN_baseline"] * 3 + [None] * 8


def test_of_several_seeds_the_largest_file_and_the_mean_accuracy_count() -> None:
    one, two = make_records(0), make_records(1)
    larger = replace(two[2], measurements=measured(0.985, 2.1))
    lower = validated(two[3], 0.95)
    models = by_name(Results([*one, *two[:2], larger, lower, *two[4:]]))
    assert num_bytes(models["Sparse_MoE_fewer_experts"]) == 2_100_000
    within = best_within(models.values(), 2_000_000)
    assert within is not None
    assert within.name == "FFN_baseline"
    close = [models["Sparse_MoE_fewer_experts_narrower-2"], models["Sparse_MoE_fewer_experts_narrower_QAT_FP32"]]
    assert best_within(close, 10**6) == close[1]  # 0.965 and 0.97
    assert best_within([], 10**6) is None


def test_the_front_rises_with_cost_and_leaves_out_what_has_none() -> None:
    models = by_name(make_curve())
    costs = {"Sparse_MoE": 5.0, "Sparse_MoE_fewer_experts": 3.0, "KD_FFN_Student": math.nan, "FFN_baseline": 3.0}
    chosen = [models[name] for name in costs]
    assert [model.name for model in front(chosen, lambda model: costs[model.name])] == ["Sparse_MoE_fewer_experts"]
    sizes = [num_bytes(model) for model in front(models.values())]
    assert sizes == sorted(sizes)
    assert front(models.values())[0].name == "Sparse_MoE_fewer_experts_narrower_QAT"


def test_what_was_only_trained_from_scratch_is_compared_with() -> None:
    found = {name for name, model in by_name(make_curve()).items() if is_from_scratch(model)}
    assert found == {"FFN_baseline", "Sparse_MoE_narrower_rival"}


def test_table_of_the_curve() -> None:
    header, _, first, second, *rest = format_curve(make_curve(2)).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        *("smaller", "bytes at most", "row", "bytes", "validation", "test", "from scratch", "bytes", "test"),
        *("ms b1", "ms b64", "ms b1024"),
    ]
    cells = [cell.strip() for cell in first.split("|")[1:-1]]
    assert cells[:6] == ["1×", "4,000,000", "Sparse_MoE_fewer_experts", "2,000,000", "98.80", "98.45 ± 0.64"]
    assert cells[6:9] == ["FFN_baseline", "1,000,000", "97.95 ± 0.64"]
    assert second.split("|")[1].strip() == "2×"
    assert len(rest) == 9
    assert [cell.strip() for cell in rest[-1].split("|")[1:-1]] == ["1,024×", "3,906", *[""] * 10]
    assert " 98.50 |" in format_curve(make_curve())  # one seed has no interval


def test_table_lies_beside_the_other_and_goes_where_nothing_was_compressed(tmp_path: Path) -> None:
    path = write_curve(tmp_path, make_curve())
    assert path == tmp_path / "curve.md"
    text = path.read_text()
    assert text.startswith("# Accuracy against bytes: mnist, compact models, quick recipe\n\n|")
    assert format_curve(make_curve()) in text
    assert write_curve(tmp_path, make_results()) is None
    assert not path.exists()


def test_sizes_are_told_by_the_plain_mixture() -> None:
    records = [original("Sparse_MoE-E8", mb=6.0), *make_records()]
    mixture = find_mixture(Results(records).models)
    assert mixture is not None
    assert mixture.name == "Sparse_MoE"
    assert find_mixture(Results([make_record()]).models) is None
    assert not has_curve(Results([record for record in make_records() if record.model != "Sparse_MoE"]))


@pytest.mark.parametrize("name", CURVE_FIGURES)
def test_figures_of_the_curve_are_not_drawn_of_the_usual_suite(name: str) -> None:
    assert FIGURES[name] is CURVE_FIGURES[name]
    assert CURVE_FIGURES[name](make_results(seeds=2)) is None
    assert CURVE_FIGURES[name](Results([])) is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_curve_shows_every_row_and_what_is_published(seeds: int) -> None:
    figure = curve_figures.curve(make_curve(seeds))
    assert_readable(figure)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == "log"
    names = legend_names(figure)
    assert names[:4] == [
        "Sparse_MoE_fewer_experts",
        "Sparse_MoE_fewer_experts_narrower-2",
        "KD_FFN_Student",
        "Sparse_MoE_fewer_experts_narrower_QAT",
    ]
    assert len(names) == 4 + 3 + len(ANCHORS)
    (printed,) = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert np.asarray(printed.get_xdata()).tolist() == [4e6, 2e6, 1e6, 5e5, 2.5e5]
    assert (100 - np.asarray(printed.get_ydata())).tolist() == [98, 97.5, 96, 93, 88]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert {"99", "98", "90"} <= set(labels)
    low, high = axes.get_ylim()
    assert low > high  # the better, the higher


def test_published_figures_are_of_mnist_alone() -> None:
    figure = curve_figures.curve(Results([replace(record, dataset="digits") for record in make_records()]))
    assert figure is not None
    assert not [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert len(legend_names(figure)) == 4 + 2


def test_rows_far_below_are_counted_not_shown() -> None:
    collapsed = validated(compressed("Sparse_MoE_pruned-0.99", acc=0.1, mb=0.2), 0.1)
    figure = curve_figures.curve(Results([*make_records(), collapsed]))
    assert figure is not None
    assert "1 row lies below" in footnote(figure)


def timed(record: Record, factor: float) -> Record:
    timing: Timing = {"median_ms": factor, "q1_ms": factor, "q3_ms": factor, "num_calls": 9}
    own = record.measurements["onnxruntime"]
    return replace(record, measurements={"onnxruntime": replace(own, latency_ms={"1": timing, "1024": timing})})


def test_latencies_have_a_panel_each() -> None:
    records = [timed(record, 1.0 + place) for place, record in enumerate(make_records())]
    figure = curve_figures.curve_latency(Results(records))
    assert_readable(figure)
    assert figure is not None
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "latency of a batch of 1 (ms)",
        "latency of a batch of 1,024 (ms)",
    ]


def test_waterfall_tells_bytes_and_points_of_each_link() -> None:
    results = make_curve(3)
    (chain,) = find_chains(results.models)
    assert chain[0].name == "Sparse_MoE"
    assert len(chain) == 5
    figure = curve_figures.waterfall(results)
    assert_readable(figure)
    assert figure is not None
    left, right = figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "Sparse_MoE",
        "pruned experts",
        "pruned neurons 2",
        "qat",
        "as INT4",
    ]
    assert [text.get_text() for text in left.texts] == ["4,000,000", "2,000,000", "900,000", "900,000", "100,000"]
    assert [text.get_text() for text in right.texts] == ["-0.50", "-1.00", "-0.50", "-1.00"]


def test_waterfall_needs_three_links_all_of_them_there() -> None:
    records = {record.model: record for record in make_records()}
    del records["Sparse_MoE_fewer_experts"]
    assert curve_figures.waterfall(Results([*records.values()])) is None
    shorter = [record for record in make_records() if "QAT" not in record.model]
    assert curve_figures.waterfall(Results(shorter)) is None
