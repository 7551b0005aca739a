from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from builders import make_measurement, make_record
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from test_figures import NAMINGS, assert_readable, footnote, legend_names, make_results, measurement_of

from mnist_lab.report import compression_figures, figures, model_figures
from mnist_lab.report.compression_figures import COMPRESSION_FIGURES
from mnist_lab.report.figures import FIGURES
from mnist_lab.report.records import Measurement, Parent, Record
from mnist_lab.report.results import Results

ORDER = [
    "FFN_baseline",
    "Sparse_MoE",
    "FFN_baseline_pruned",
    "Sparse_MoE_pruned",
    "Sparse_MoE_sparse_router",
    "Sparse_MoE_fewer_experts",
    "Sparse_MoE_merged",
    "Sparse_MoE_fewer_experts_rival",
    "Sparse_MoE_fewer_experts_INT8",
]
ROUTES = {"top1_agreement": 0.9, "routes_jaccard": 0.8, "expert_cka_before": 0.5, "expert_cka": 0.7}
CRITERIA = ("utilization", "reap", "exact")


def measured(test_acc: float, file_mb: float) -> dict[str, Measurement]:
    return {"onnxruntime": replace(measurement_of(test_acc, file_mb, 1.0), test_acc=test_acc)}


def original(name: str, seed: int = 0, *, acc: float = 0.99, params: int = 1000, mb: float = 4.0) -> Record:
    record = make_record(name, seed, **measured(acc, mb))
    routing = {"routing": {"num_experts": 4}} if name.startswith("Sparse_MoE") else {}
    return replace(record, params_total=params, architecture=routing)


def parent(model: str, seed: int) -> Parent:
    return {"model": model, "file": f"{model}-seed{seed}.safetensors", "sha256": ""}


def compressed(
    name: str,
    seed: int = 0,
    *,
    acc: float = 0.98,
    nonzero: float | None = 500.0,
    mb: float = 4.0,
    source: str = "Sparse_MoE",
    step: dict[str, Any] | None = None,
    routes: dict[str, float] | None = None,
    **proof: Any,
) -> Record:
    """Of an original by a step."""
    figures = {"file_ratio": 1.0} | ({} if nonzero is None else {"nonzero_params": nonzero}) | (routes or {})
    return replace(
        make_record(name, seed, **measured(acc, mb)),
        config={"step": step or {"kind": "PruneWeights"}},
        parents={"source": parent(source, seed)},
        original=source,
        against_original=figures,
        proof={"text": "done", **proof},
    )


def rival(name: str, of: str, seed: int = 0, *, acc: float = 0.985, params: int = 300, mb: float = 1.2) -> Record:
    record = original(name, seed, acc=acc, params=params, mb=mb)
    return replace(record, config={"step": {"kind": "TrainLike"}}, parents={"teacher": parent(of, seed)})


def weights(ratio: float) -> dict[str, Any]:
    return {"kind": "PruneWeights", "pruning": {"ratio": ratio}}


def make_records(seed: int = 0) -> list[Record]:
    """An FFN and a mixture, what was made of them, and rivals."""
    less = 0.001 * seed
    int8 = compressed("Sparse_MoE_fewer_experts_INT8", seed, acc=0.965 - less, nonzero=None, mb=0.6)
    return [
        original("FFN_baseline", seed, acc=0.97 - less, params=800, mb=3.2),
        original("Sparse_MoE", seed, acc=0.99 - less),
        compressed(
            "FFN_baseline_pruned", seed, source="FFN_baseline", acc=0.96, nonzero=160, step=weights(0.8), mb=3.2
        ),
        compressed("Sparse_MoE_pruned-0.5", seed, acc=0.989 - less, nonzero=500, step=weights(0.5), routes=ROUTES),
        compressed("Sparse_MoE_pruned-0.9", seed, acc=0.95 - less, nonzero=100, step=weights(0.9), routes=ROUTES),
        compressed("Sparse_MoE_sparse_router", seed, nonzero=900, step={"ratio": 0.25}, routes=ROUTES),
        compressed("Sparse_MoE_fewer_experts", seed, acc=0.97 - less, nonzero=600, mb=2.4, routes=ROUTES, kept=[0, 3]),
        compressed("Sparse_MoE_fewer_experts-1", seed, acc=0.96 - less, nonzero=300, mb=1.2, kept=[3]),
        compressed("Sparse_MoE_merged", seed, acc=0.975 - less, nonzero=600, mb=2.4, routes=ROUTES, kept=[0, 1, 2]),
        rival("Sparse_MoE_fewer_experts_rival", "Sparse_MoE_fewer_experts", seed, params=600, mb=2.4, acc=0.98 - less),
        rival("Sparse_MoE_fewer_experts_rival-1", "Sparse_MoE_fewer_experts-1", seed, acc=0.985 - less),
        replace(
            int8, config={"step": None}, precision="INT8", parents={"source": parent("Sparse_MoE_fewer_experts", seed)}
        ),
    ]


def all_results(seeds: int = 1) -> Results:
    return Results([record for seed in range(seeds) for record in make_records(seed)], ORDER)


def without(*names: str) -> Results:
    return Results([record for record in make_records() if record.model not in names], ORDER)


def graded(name: str, seed: int, kept: Sequence[int], **accuracies: float) -> Record:
    """With grades of the criteria's choices."""
    grades = {criterion: {"kept": [*kept], "loss": 0.1, "acc": acc} for criterion, acc in accuracies.items()}
    return compressed(name, seed, kept=[*kept], grades=grades)


def lines_of(axes: Axes) -> list[tuple[Line2D, list[tuple[float, float]]]]:
    """Each line with error bars, and its points."""
    bars = [bar for bar in axes.containers if isinstance(bar, ErrorbarContainer)]
    return [(bar.lines[0], points_of(bar.lines[0])) for bar in bars]


def points_of(line: Line2D) -> list[tuple[float, float]]:
    x, y = (np.asarray(values, dtype=float) for values in line.get_data())
    return [(round(float(a), 6), round(float(b), 6)) for a, b in zip(x, y, strict=True)]


def drawn(figure: Figure | None) -> dict[str, list[list[tuple[float, float]]]]:
    """Points of the lines by panel."""
    assert figure is not None
    return {axes.get_title(): [points for _, points in lines_of(axes)] for axes in figure.axes}


def test_accuracy_over_nonzero_is_the_records_a_line_per_technique() -> None:
    figure = compression_figures.accuracy_vs_nonzero(all_results())
    assert drawn(figure) == {
        "made from FFN_baseline": [[(0.8, 97)], [(0.16, 96)]],
        "made from Sparse_MoE": [
            [(1, 99)],
            [(0.1, 95), (0.5, 98.9)],
            [(0.9, 98)],
            [(0.3, 96), (0.6, 97)],
            [(0.6, 97.5)],
            [(0.3, 98.5), (0.6, 98)],  # rivals: all their parameters
        ],
    }
    techniques = ["FFN_baseline_pruned", "Sparse_MoE_pruned", "Sparse_MoE_sparse_router", "Sparse_MoE_fewer_experts"]
    originals = {"FFN_baseline (original)", "Sparse_MoE (original)"}
    names = legend_names(figure)
    assert [name for name in names if name not in originals] == [
        *techniques,
        "Sparse_MoE_merged",
        "rivals from scratch",
    ]
    assert originals < set(names)
    assert figure is not None
    assert all(axes.get_xscale() == "log" for axes in figure.axes)


def test_accuracy_over_bytes_has_the_int8_models_too() -> None:
    figure = compression_figures.accuracy_vs_bytes(all_results())
    lines = drawn(figure)["made from Sparse_MoE"]
    assert [(0.6, 96.5)] in lines
    assert [(1.2, 98.5), (2.4, 98)] in lines
    assert "Sparse_MoE_fewer_experts_INT8" in legend_names(figure)
    assert "Sparse_MoE_fewer_experts_INT8" not in legend_names(compression_figures.accuracy_vs_nonzero(all_results()))


def test_rivals_are_dashed_and_originals_larger() -> None:
    results = all_results()
    looks = {model.name: model.look for model in results.models}
    figure = compression_figures.accuracy_vs_nonzero(results)
    assert figure is not None
    before, pruned, *_, rivals = [line for line, _ in lines_of(figure.axes[1])]
    assert (pruned.get_linestyle(), rivals.get_linestyle()) == ("-", "--")
    assert before.get_markersize() > pruned.get_markersize()
    assert before.get_color() == looks["Sparse_MoE"].color
    assert pruned.get_color() == looks["Sparse_MoE_pruned-0.5"].color
    assert rivals.get_color() not in {look.color for look in looks.values()}
    assert "dashed: the compressed models' architectures from scratch" in footnote(figure)


def test_models_that_were_not_fine_tuned_have_a_dotted_line_of_their_own() -> None:
    untrained = {"kind": "PruneExperts", "finetuning": {"finetune_epochs": 0}}
    names = ("Sparse_MoE_fewer_experts-3-ft0", "Sparse_MoE_fewer_experts-ft0")
    records = [*make_records(), *(compressed(name, acc=0.9, nonzero=700, step=untrained) for name in names)]
    figure = compression_figures.accuracy_vs_nonzero(Results(records, ORDER))
    assert figure is not None
    styles = {line.get_linestyle(): points for line, points in lines_of(figure.axes[1])}
    assert styles[":"] == [(0.7, 90), (0.7, 90)]
    assert "Sparse_MoE_fewer_experts, not fine-tuned" in legend_names(figure)


@pytest.mark.parametrize("seeds", [1, 3])
def test_accuracies_are_means_with_the_intervals_of_the_other_figures(seeds: int) -> None:
    results = all_results(seeds)
    model = next(model for model in results.models if model.name == "Sparse_MoE")
    figure = compression_figures.accuracy_vs_nonzero(results)
    assert figure is not None
    (bars, *_) = [bar for bar in figure.axes[1].containers if isinstance(bar, ErrorbarContainer)]
    assert points_of(bars.lines[0]) == [(1, round(100 * (0.99 - 0.001 * (seeds - 1) / 2), 6))]
    (segment,) = bars.lines[2][0].get_segments()
    assert model.accuracy_interval is not None
    assert segment[:, 1] == pytest.approx([100 * end for end in model.accuracy_interval])
    assert f"{seeds} seed" in footnote(figure)


def test_models_whose_parameters_are_not_known_have_no_point() -> None:
    records = [
        replace(record, against_original={"file_ratio": 1.0}) if record.model == "Sparse_MoE_pruned-0.9" else record
        for record in make_records()
    ]
    lines = drawn(compression_figures.accuracy_vs_nonzero(Results(records, ORDER)))["made from Sparse_MoE"]
    assert [(0.5, 98.9)] in lines


def test_original_that_is_not_there_has_a_panel_without_its_point() -> None:
    figure = compression_figures.accuracy_vs_nonzero(without("Sparse_MoE"))
    assert [(0.1, 95), (0.5, 98.9)] in drawn(figure)["made from Sparse_MoE"]
    assert "Sparse_MoE (original)" not in legend_names(figure)


def test_rival_whose_model_is_not_there_is_in_no_panel() -> None:
    figure = compression_figures.accuracy_vs_nonzero(without("Sparse_MoE_fewer_experts-1"))
    assert [*drawn(figure)] == ["made from FFN_baseline", "made from Sparse_MoE"]
    assert drawn(figure)["made from Sparse_MoE"][-1] == [(0.6, 98)]


def test_models_that_are_compressed_from_variants_have_panels_of_their_own() -> None:
    variant = compressed("Sparse_MoE_pruned-E8", source="Sparse_MoE-E8", acc=0.9, nonzero=200)
    figure = compression_figures.accuracy_vs_nonzero(
        Results([*make_records(), original("Sparse_MoE-E8", acc=0.98), variant], ORDER)
    )
    panels = drawn(figure)
    assert panels["made from Sparse_MoE-E8"] == [[(1, 98)], [(0.2, 90)]]
    assert len(panels) == 3


def test_one_compressed_model_alone_is_drawn() -> None:
    results = Results([compressed("Sparse_MoE_pruned", acc=0.9, nonzero=200, step=weights(0.5), routes=ROUTES)], ORDER)
    assert drawn(compression_figures.accuracy_vs_nonzero(results)) == {"made from Sparse_MoE": [[(0.2, 90)]]}
    for name in COMPRESSION_FIGURES.keys() - {"expert_criteria"}:
        assert_readable(COMPRESSION_FIGURES[name](results))


@pytest.mark.parametrize("name", COMPRESSION_FIGURES)
def test_figures_of_compression_are_not_drawn_of_the_usual_suite(name: str) -> None:
    assert FIGURES[name] is COMPRESSION_FIGURES[name]
    assert COMPRESSION_FIGURES[name](make_results(seeds=2)) is None
    assert COMPRESSION_FIGURES[name](Results([])) is None


def test_criteria_are_drawn_by_their_points_to_the_best_subset() -> None:
    name = "Sparse_MoE_fewer_experts"
    records = [
        graded(f"{name}-exact", 0, [0, 1], utilization=0.97, reap=0.90, exact=0.98),
        graded(f"{name}-exact", 1, [1, 2], utilization=0.97, exact=0.96),  # another may be more accurate
        graded(f"{name}-1-exact", 0, [2], utilization=0.95, reap=0.91, exact=0.95),
        graded(f"{name}-1-exact", 1, [2], utilization=0.94, reap=0.91, exact=0.95),
    ]
    figure = compression_figures.expert_criteria(Results([*make_records(), *records], ORDER))
    assert figure is not None
    one, two = figure.axes
    assert one.get_title() == f"{name}-1-exact: 1 expert stays"
    assert two.get_title() == f"{name}-exact: 2 experts stay"
    assert [label.get_text() for label in one.get_yticklabels()] == ["utilization", "reap"]
    found = {axes: [points_of(line) for line in axes.lines[1:]] for axes in (one, two)}
    # Of each criterion its seeds and their mean.
    assert found[one] == [[(0, 0), (-1, 0)], [(-0.5, 0)], [(-4, 1), (-4, 1)], [(-4, 1)]]
    assert found[two] == [[(-1, 0), (1, 0)], [(0, 0)], [(-8, 1)], [(-8, 1)]]
    assert footnote(figure).startswith("2 seeds")


def test_criteria_need_grades_with_the_best_subset() -> None:
    assert compression_figures.expert_criteria(all_results()) is None
    some = graded("Sparse_MoE_fewer_experts", 0, [1], utilization=0.9)
    assert compression_figures.expert_criteria(Results([some], ORDER)) is None
    old = replace(some, proof=None)
    assert compression_figures.expert_criteria(Results([old], ORDER)) is None


def test_criterion_without_a_grade_in_a_panel_has_no_point_there() -> None:
    name = "Sparse_MoE_fewer_experts"
    records = [graded(name, 0, [1, 2], utilization=0.9, exact=0.9), graded(f"{name}-1", 0, [1], reap=0.8, exact=0.9)]
    figure = compression_figures.expert_criteria(Results(records, ORDER))
    assert figure is not None
    places = {axes.get_title(): [y for line in axes.lines[1:] for _, y in points_of(line)] for axes in figure.axes}
    assert places == {f"{name}: 2 experts stay": [0, 0], f"{name}-1: 1 expert stays": [1, 1]}


def test_similarity_is_before_and_after_of_mixtures_that_have_it() -> None:
    results = Results(
        [
            *make_records(0),
            *[
                replace(record, against_original={**(record.against_original or {}), "expert_cka": 0.9})
                if record.model == "Sparse_MoE_merged"
                else record
                for record in make_records(1)
            ],
        ],
        ORDER,
    )
    figure = compression_figures.expert_similarity(results)
    assert figure is not None
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    mixtures = ["pruned-0.5", "pruned-0.9", "sparse_router", "fewer_experts", "merged"]
    assert labels == [f"Sparse_MoE_{name}" for name in mixtures]  # one expert alone has no others
    joined, before, after = [axes.lines[index::3] for index in range(3)]
    assert [points_of(line) for line in before] == [[(0.5, place)] for place in range(5)]
    assert [points_of(line) for line in after] == [[(0.7, place)] for place in range(4)] + [[(0.8, 4)]]
    assert [points_of(line) for line in joined] == [
        [*one, *other] for one, other in zip(map(points_of, before), map(points_of, after), strict=True)
    ]


def test_routing_is_over_the_share_left_out() -> None:
    figure = compression_figures.routing_vs_ratio(all_results())
    assert figure is not None
    agreement, overlap = figure.axes
    expected = {
        "Sparse_MoE_pruned": [50, 90],
        "Sparse_MoE_sparse_router": [25],
        "Sparse_MoE_fewer_experts": [50],  # 2 of 4; the dense model of one has no routes
        "Sparse_MoE_merged": [25],
    }
    assert legend_names(figure) == [*expected]
    for axes, value in ((agreement, 90), (overlap, 80)):
        assert [points for _, points in lines_of(axes)] == [
            [(x, value) for x in shares] for shares in expected.values()
        ]
    assert "error bars" not in footnote(figure)


def test_routing_has_an_interval_over_seeds_within_what_a_share_can_be() -> None:
    records = [
        compressed("Sparse_MoE_pruned", seed, step=weights(0.5), routes={**ROUTES, "top1_agreement": share})
        for seed, share in enumerate((0.96, 0.98, 1.0))
    ]
    figure = compression_figures.routing_vs_ratio(Results(records, ORDER))
    assert figure is not None
    (bars,) = [bar for bar in figure.axes[0].containers if isinstance(bar, ErrorbarContainer)]
    assert points_of(bars.lines[0]) == [(50, 98)]
    (segment,) = bars.lines[2][0].get_segments()
    half_width = 4.302653 * 2 / 3**0.5  # Student's t with two degrees of freedom
    assert segment[:, 1] == pytest.approx([98 - half_width, 100])
    assert "error bars: 95 % interval over seeds" in footnote(figure)


def test_routing_is_left_out_where_the_share_or_the_routes_are_not_known() -> None:
    assert compression_figures.routing_vs_ratio(without("Sparse_MoE")) is not None  # ratios are still known
    alone = [record for record in make_records() if record.model in {"Sparse_MoE_merged", "FFN_baseline_pruned"}]
    assert compression_figures.routing_vs_ratio(Results(alone, ORDER)) is None


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", COMPRESSION_FIGURES)
def test_labels_of_any_models_do_not_overlap_or_leave_the_figure(name: str, naming: str, seeds: int) -> None:
    records = [record for seed in range(seeds) for record in make_records(seed)]
    grades = dict.fromkeys(CRITERIA, 0.9)
    for seed in range(seeds):
        records += [graded(f"Sparse_MoE_fewer_experts-{keep}-exact", seed, range(keep), **grades) for keep in (1, 2, 3)]

    def rename(model: str, number: int) -> str:
        return NAMINGS[naming](model, number)

    many = [
        replace(
            record,
            row=rename(record.row, number),
            original=rename(record.original, number),
            parents={
                role: {**found, "model": rename(found["model"], number)} for role, found in record.parents.items()
            },
        )
        for number in range(3)
        for record in records
    ]
    assert_readable(COMPRESSION_FIGURES[name](Results(many, ORDER)))


def test_rival_is_no_student_of_the_model_whose_size_it_has() -> None:
    assert model_figures.confidence_histogram(all_results()) is None


def test_load_is_shown_of_as_many_families_as_there_is_room_for() -> None:
    epoch = {"epoch": 1, "expert_load": [0.4, 0.6]}
    names = [f"Sparse_MoE_pruned-0.{ratio}" for ratio in (5, 8, 9)] + ["Sparse_MoE_merged", "Sparse_MoE-E8"]
    records = [
        replace(make_record(name), curves=[epoch], expert_by_class=[[0.4, 0.6]] * 10)  # type: ignore[list-item]
        for name in ["Sparse_MoE", *names]
    ]
    figure = model_figures.expert_load(Results(records, ORDER))
    assert figure is not None
    shown = [axes.get_title().split(":")[0] for axes in figure.axes if "load over training" in axes.get_title()]
    assert shown == ["Sparse_MoE", "Sparse_MoE-E8", "Sparse_MoE_pruned-0.5", "Sparse_MoE_merged"]
    assert "2 more models not shown" in footnote(figure)


def test_epochs_are_whole_where_there_is_only_one() -> None:
    epoch = {"epoch": 1, "expert_load": [0.4, 0.6], "validation_acc": 0.9, "train_terms": {"cross_entropy": 0.1}}
    record = replace(make_record("Sparse_MoE"), curves=[epoch], expert_by_class=[[0.4, 0.6]] * 10)  # type: ignore[list-item]
    for draw in (model_figures.training_curves, model_figures.expert_load):
        figure = draw(Results([record], ORDER))
        assert figure is not None
        figure.draw_without_rendering()
        assert [tick for tick in figure.axes[0].get_xticks() if tick != round(tick)] == []


def test_curves_of_a_compressed_model_are_said_to_be_of_its_finetuning() -> None:
    assert "fine-tuning" not in footnote(model_figures.training_curves(make_results()))
    epoch = {"epoch": 1, "validation_acc": 0.9, "train_terms": {"cross_entropy": 0.1}}
    record = replace(compressed("Sparse_MoE_pruned"), curves=[epoch])  # type: ignore[list-item]
    assert "of a compressed model: its fine-tuning" in footnote(model_figures.training_curves(Results([record])))


def test_no_interval_of_an_accuracy_leaves_what_a_share_can_be() -> None:
    records = [make_record(seed=seed, onnxruntime=make_measurement(acc)) for seed, acc in enumerate((0.05, 0.95, 0.5))]
    (model,) = Results(records, ORDER).models
    assert model.accuracy_interval == (0, 1)


def test_bars_of_many_models_fill_their_panels() -> None:
    figure = figures.comparison_bars(all_results())
    assert figure is not None
    assert figure.axes[0].get_ylim() == (len(make_records()) - 0.5, -0.5)
