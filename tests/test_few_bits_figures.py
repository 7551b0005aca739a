"""Figures of weights of few bits, on made-up records."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from builders import make_record
from matplotlib.axes import Axes
from test_compression_figures import drawn, lines_of, measured, original, parent, points_of
from test_figures import NAMINGS, assert_readable, footnote, legend_names, make_results

from mnist_lab.report import few_bits_figures
from mnist_lab.report.few_bits_figures import FEW_BITS_FIGURES, expert_bits
from mnist_lab.report.figures import FIGURES
from mnist_lab.report.records import Record
from mnist_lab.report.results import Results

ORDER = [
    "FFN_baseline",
    "Sparse_MoE",
    "FFN_baseline_weight_only",
    "Sparse_MoE_weight_only",
    "Sparse_MoE_layer_wise",
    "Sparse_MoE_QAT",
    "Sparse_MoE_mixed_bits",
]
THREE_LEVELS = round(math.log2(3), 6)


def rounded(
    name: str,
    bits: Any,
    seed: int = 0,
    *,
    acc: float = 0.98,
    source: str = "Sparse_MoE",
    rerouted: float | None = None,
    group_size: Any = "channel",
    first_layer_bits: Any = None,
    **setting: Any,
) -> Record:
    """Of an original, in few bits: after training where it has a scheme or a method, else trained with them."""
    rounding = {"bits": bits, "group_size": group_size, "first_layer_bits": first_layer_bits}
    is_trained = "QAT" in name or "layer_wise" in name
    usual = {"method": "gptq", "scheme": "symmetric", "router_bits": None, "activation_bits": None}
    form = {"rounding": rounding} | (setting if is_trained else {"method": usual | setting})
    routes = {} if rerouted is None else {"rerouted": rerouted, "rerouted_other_class": rerouted / 10}
    return replace(
        make_record(name, seed, **measured(acc, 1.0)),
        precision="INT2",
        config={"step": None, "form": form},
        parents={"source": parent(source, seed)},
        original=source,
        against_original={"file_ratio": 8.0} | routes,
    )


def mixed(seed: int = 0, *, allocation: str = "sensitivity", tags: str = "") -> Record:
    bits = {"stem": 4, "expert0.in": 2, "expert0.out": 3, "expert1.in": 8, "expert1.out": 4, "logits": 8}
    return replace(
        rounded(f"Sparse_MoE_mixed_bits{tags}", 2, seed),
        precision="mixed",
        config={"step": None, "form": {"allocation": allocation, "method": {"scheme": "symmetric"}}},
        proof={"text": "done", "bits": bits, "load": [0.3 + 0.01 * seed, 0.7 - 0.01 * seed]},
    )


def make_records(seed: int = 0) -> list[Record]:
    """An FFN and a mixture, both in fewer and fewer bits."""
    less = 0.001 * seed
    moe = "Sparse_MoE_weight_only"
    return [
        original("FFN_baseline", seed, acc=0.97 - less),
        original("Sparse_MoE", seed, acc=0.99 - less),
        rounded("FFN_baseline_weight_only-b2", 2, seed, acc=0.96 - less, source="FFN_baseline"),
        rounded("FFN_baseline_weight_only", 4, seed, acc=0.965 - less, source="FFN_baseline"),
        rounded(f"{moe}-b8", 8, seed, acc=0.99 - less, rerouted=0.01),
        rounded(moe, 4, seed, acc=0.989 - less, rerouted=0.03),
        rounded(f"{moe}-b2", 2, seed, acc=0.95 - less, rerouted=0.3),
        rounded(f"{moe}-b2-affine", 2, seed, acc=0.97 - less, rerouted=0.2, scheme="affine"),
        rounded(f"{moe}-b2-nearest", 2, seed, acc=0.5, rerouted=0.6, method="nearest"),
        rounded(f"{moe}-b2-g64", 2, seed, acc=0.98, rerouted=0.2, group_size=64),
        rounded(f"{moe}-b8-router4", 8, seed, acc=0.98, rerouted=0.04, router_bits=4),
        rounded(f"{moe}-b8-router2", 8, seed, acc=0.97, rerouted=0.2 + less, router_bits=2),
        rounded(f"{moe}-b8-a4", 8, seed, acc=0.9, rerouted=0.5, activation_bits=4),
        rounded("Sparse_MoE_layer_wise-bternary", "ternary", seed, acc=0.96 - less, rerouted=0.2),
        rounded("Sparse_MoE_QAT-b1-self", 1, seed, acc=0.94 - less, rerouted=0.3),
        rounded("Sparse_MoE_QAT-b1-first2", 1, seed, acc=0.98, rerouted=0.3, first_layer_bits=2),
        rounded("Sparse_MoE_QAT-b8-router2-self", 8, seed, acc=0.98, rerouted=0.1, router_bits=2),
        mixed(seed),
        mixed(seed, allocation="even", tags="-even"),
    ]


def all_results(seeds: int = 1) -> Results:
    return Results([record for seed in range(seeds) for record in make_records(seed)], ORDER)


def of(*records: Record) -> Results:
    return Results(records, ORDER)


def test_accuracy_over_bits_has_a_line_a_way_of_what_is_rounded_for_each_output_alone() -> None:
    figure = few_bits_figures.accuracy_vs_bits(all_results())
    assert drawn(figure) == {
        "made from FFN_baseline": [[(2, 96), (4, 96.5)]],
        "made from Sparse_MoE": [
            [(2, 95), (4, 98.9), (8, 99)],
            [(2, 97)],
            [(2, 50)],
            [(THREE_LEVELS, 96)],
            [(1, 94)],
        ],
    }
    assert legend_names(figure) == [
        "FFN_baseline_weight_only",
        "Sparse_MoE_weight_only",
        "Sparse_MoE_weight_only, zero points",
        "Sparse_MoE_weight_only, to the nearest",
        "Sparse_MoE_layer_wise",
        "Sparse_MoE_QAT",
    ]


def test_an_original_in_one_number_of_bits_has_no_panel_beside_others() -> None:
    alone = rounded("KD_FFN_Student_weight_only", 4, source="KD_FFN_Student")
    assert drawn(few_bits_figures.accuracy_vs_bits(of(*make_records(), alone))).keys() == {
        "made from FFN_baseline",
        "made from Sparse_MoE",
    }
    assert drawn(few_bits_figures.accuracy_vs_bits(of(alone))).keys() == {"made from KD_FFN_Student"}


def looks_of(axes: Axes) -> list[tuple[Any, Any]]:
    return [(line.get_color(), line.get_marker()) for line, _ in lines_of(axes)]


@pytest.mark.parametrize("name", ["accuracy_vs_bits", "routes_vs_router_bits"])
def test_no_two_lines_look_alike(name: str) -> None:
    records = [
        *make_records(),
        rounded("Sparse_MoE_weight_only-b8-router2-affine", 8, rerouted=0.1, router_bits=2, scheme="affine"),
    ]
    figure = FEW_BITS_FIGURES[name](of(*records))
    assert figure is not None
    for axes in figure.axes:
        looks = looks_of(axes)
        assert len(set(looks)) == len(looks)


def test_bits_are_evenly_spaced_by_factors_of_two_and_three_levels_have_a_name() -> None:
    figure = few_bits_figures.accuracy_vs_bits(all_results())
    assert figure is not None
    for axes in figure.axes:
        assert axes.get_xscale() == "log"
        ticks = {
            round(float(tick), 6): label.get_text()
            for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        }
        assert ticks == {8: "8", 4: "4", 3: "3", 2: "2", THREE_LEVELS: "1.6", 1: "1"}
    assert "1.6: three levels" in figure.axes[0].get_xlabel()


@pytest.mark.parametrize("seeds", [1, 3])
def test_original_is_a_dashed_line_at_its_mean_accuracy(seeds: int) -> None:
    figure = few_bits_figures.accuracy_vs_bits(all_results(seeds))
    assert figure is not None
    heights = [
        [float(np.asarray(line.get_ydata())[0]) for line in axes.lines if line.get_linestyle() == "--"]
        for axes in figure.axes
    ]
    assert heights == [[pytest.approx(97 - 0.05 * (seeds - 1))], [pytest.approx(99 - 0.05 * (seeds - 1))]]
    assert f"{seeds} seed" in footnote(figure)
    assert "dashed: the original in FP32" in footnote(figure)


def test_original_that_is_not_there_has_a_panel_without_its_line() -> None:
    records = [record for record in make_records() if record.model != "Sparse_MoE"]
    figure = few_bits_figures.accuracy_vs_bits(of(*records))
    assert figure is not None
    of_moe = next(axes for axes in figure.axes if axes.get_title() == "made from Sparse_MoE")
    assert not [line for line in of_moe.lines if line.get_linestyle() == "--"]
    assert [(2, 95), (4, 98.9), (8, 99)] in drawn(figure)["made from Sparse_MoE"]


def test_accuracies_have_their_intervals() -> None:
    results = all_results(3)
    model = next(model for model in results.models if model.name == "Sparse_MoE_weight_only")
    figure = few_bits_figures.accuracy_vs_bits(results)
    assert figure is not None
    bars = figure.axes[1].containers[0]
    segment = bars.lines[2][0].get_segments()[1]  # type: ignore[attr-defined]
    assert model.accuracy_interval is not None
    assert segment[:, 1] == pytest.approx([100 * end for end in model.accuracy_interval])


def test_routes_are_over_the_routers_bits_where_all_else_has_eight() -> None:
    figure = few_bits_figures.routes_vs_router_bits(all_results())
    assert figure is not None
    rerouted, other_class = figure.axes
    assert [points for _, points in lines_of(rerouted)] == [[(0, 1), (2, 4), (3, 20)], [(3, 10)]]
    assert [points for _, points in lines_of(other_class)] == [[(0, 0.1), (2, 0.4), (3, 2)], [(3, 1)]]
    assert [label.get_text() for label in rerouted.get_xticklabels()] == ["float", "8", "4", "2"]
    assert legend_names(figure) == ["Sparse_MoE_weight_only", "Sparse_MoE_QAT"]
    assert "error bars" not in footnote(figure)


def test_routes_have_an_interval_over_seeds() -> None:
    figure = few_bits_figures.routes_vs_router_bits(all_results(3))
    assert figure is not None
    segments = figure.axes[0].containers[0].lines[2][0].get_segments()  # type: ignore[attr-defined]
    half_width = 4.302653 * 0.1 / 3**0.5  # Student's t with two degrees of freedom
    assert segments[2][:, 1] == pytest.approx([20.1 - half_width, 20.1 + half_width])
    assert "error bars: 95 % interval over seeds" in footnote(figure)


def test_routes_of_two_mixtures_are_in_panels_of_their_own() -> None:
    other = "Sparse_MoE-none"
    records = [
        original(other),
        rounded("Sparse_MoE_weight_only-b8-none", 8, source=other, rerouted=0.05),
        rounded("Sparse_MoE_weight_only-b8-router2-none", 8, source=other, rerouted=0.4, router_bits=2),
        rounded("Sparse_MoE_weight_only-b8-switch", 8, source="Sparse_MoE-switch", rerouted=0.05),  # alone
    ]
    figure = few_bits_figures.routes_vs_router_bits(of(*make_records(), *records))
    assert figure is not None
    titles = ["made from Sparse_MoE", "made from Sparse_MoE-none"]
    assert [axes.get_title() for axes in figure.axes] == [title for title in titles for _ in range(2)]
    assert [points for _, points in lines_of(figure.axes[2])] == [[(0, 5), (3, 40)]]


def test_routes_need_a_router_in_few_bits() -> None:
    in_float = [record for record in make_records() if "router" not in record.row]
    assert few_bits_figures.routes_vs_router_bits(of(*in_float)) is None
    unknown = rounded("Sparse_MoE_weight_only-b8-router2", 8, router_bits=2)
    assert few_bits_figures.routes_vs_router_bits(of(unknown)) is None


@pytest.mark.parametrize("seeds", [1, 3])
def test_bits_of_an_expert_are_the_mean_of_its_layers_beside_its_load(seeds: int) -> None:
    figure = few_bits_figures.bits_by_expert(all_results(seeds))
    assert figure is not None
    (axes,) = figure.axes  # none for the one of even bits
    assert axes.get_title() == "Sparse_MoE_mixed_bits"
    assert [points_of(line) for line in axes.lines] == [[(30 + seed, 2.5), (70 - seed, 6)] for seed in range(seeds)]
    assert len({line.get_color() for line in axes.lines}) == seeds
    assert footnote(figure).startswith(f"{seeds} seed")


def test_dense_model_of_mixed_bits_has_no_experts_to_show() -> None:
    dense = mixed(tags="-dense")
    assert dense.proof is not None
    dense.proof |= {"load": [], "bits": {"hidden0": 4, "logits": 8}}
    assert few_bits_figures.bits_by_expert(of(dense)) is None


def test_experts_are_in_their_order_however_many_there_are() -> None:
    bits: dict[str, Any] = {f"expert{expert}.in": 2 if expert < 9 else 8 for expert in (0, 10, 2, 1)}
    assert expert_bits(bits | {"expert10.out": "ternary", "stem": 4}) == [
        2,
        2,
        2,
        pytest.approx((8 + THREE_LEVELS) / 2),
    ]


@pytest.mark.parametrize("name", FEW_BITS_FIGURES)
def test_figures_of_few_bits_are_not_drawn_where_there_are_none(name: str) -> None:
    assert FIGURES[name] is FEW_BITS_FIGURES[name]
    assert FEW_BITS_FIGURES[name](make_results(seeds=2)) is None
    assert FEW_BITS_FIGURES[name](Results([])) is None
    old = replace(mixed(), proof=None, config={})
    assert FEW_BITS_FIGURES[name](of(old)) is None


def one_of_each() -> Sequence[Record]:
    moe = "Sparse_MoE_weight_only-b8-router2"
    return [
        rounded("FFN_baseline_weight_only", 4, source="FFN_baseline"),
        rounded(moe, 8, rerouted=0.2, router_bits=2),
        mixed(),
    ]


@pytest.mark.parametrize("name", FEW_BITS_FIGURES)
def test_one_model_alone_is_drawn(name: str) -> None:
    assert_readable(FEW_BITS_FIGURES[name](of(*one_of_each())))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("name", FEW_BITS_FIGURES)
def test_labels_of_any_models_do_not_overlap_or_leave_the_figure(
    name: str, rounds: int, naming: str, seeds: int
) -> None:
    def rename(model: str, number: int) -> str:
        return NAMINGS[naming](model, number)

    many = [
        replace(record, row=rename(record.row, number), original=rename(record.original, number))
        for number in range(rounds)
        for seed in range(seeds)
        for record in make_records(seed)
    ]
    assert_readable(FEW_BITS_FIGURES[name](of(*many)))
