"""One function per figure, from records alone. No torch here.

Every figure function takes the results of one folder and returns a matplotlib Figure, or None where the
records have no data for it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnist_lab.report.compression_figures import COMPRESSION_FIGURES
from mnist_lab.report.curve_figures import CURVE_FIGURES
from mnist_lab.report.drawing import (
    COLORS,
    MARKERS,
    MUTED,
    NAME_INCHES,
    Axes,
    Figure,
    Look,
    MaxNLocator,
    closed,
    draw_bars,
    draw_legend,
    height_of_places,
    make_figure,
    make_logarithmic,
    place_legend,
    prepare_radar,
    wrap,
    write_figures,
    write_footnote,
)
from mnist_lab.report.few_bits_figures import FEW_BITS_FIGURES
from mnist_lab.report.model_figures import (
    confidence_histogram,
    confusion_matrices,
    expert_load,
    reliability_diagram,
    training_curves,
)
from mnist_lab.report.results import (
    ACCURACY_LABEL,
    LATENCIES,
    SIZE_LABEL,
    Model,
    Results,
    compare_only,
    conditions,
    left_out,
    listed,
    rows_of,
    timed_rows,
    with_latency,
)

PARETO_COLUMNS = ["test_acc", "file_mb", "latency_ms_b64"]
MAX_GROUPS = 3  # of models within noise of each other, that a footnote lists


def draw_all(folder: Path, results: Results) -> Iterator[Path]:
    """Write every figure that the records have data for into `folder/plots`; gives each file once it is written.

    A figure without data is not drawn, and the file that an earlier run left of it is removed.

    Raises:
        RunFailed: as `write_figures`.
    """
    return write_figures(folder, {name: partial(draw, results) for name, draw in FIGURES.items()})


def pareto_set(table: pd.DataFrame) -> list[Any]:
    """Index of the rows that no other dominates in accuracy, file size and latency at batch 64.

    A row dominates another when it is nowhere worse and somewhere better; equal rows both stay. Rows
    with a blank among the three are not compared.
    """
    rows = table[PARETO_COLUMNS].dropna()
    costs = rows.to_numpy(dtype=float) * [-1, 1, 1]
    dominated = [bool(((costs <= cost).all(axis=1) & (costs < cost).any(axis=1)).any()) for cost in costs]
    return list(rows.index[~np.array(dominated, dtype=bool)])


def radar_radii(costs: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """Per model and cost 1 − log10(times worse than the best) / decades, in [0, 1], and the decades of the radius.

    A cost of zero, no error at all, counts as half of the lowest other one. Blanks stay.
    """
    costs = costs.transform(lambda cost: cost.mask(cost == 0, cost[cost > 0].min() / 2 if cost.any() else 1))
    decades_worse = (costs / costs.min()).map(math.log10)
    decades = max(1.0, 1.08 * float(decades_worse.max().max()))
    return 1 - decades_worse / decades, decades


def within_noise(models: Sequence[Model]) -> list[list[Model]]:
    """Groups of models, the most accurate first, of any two of which one's accuracy lies in the other's interval."""
    groups: list[list[Model]] = []
    for model in sorted(models, key=lambda model: -model.row["test_acc"]):
        if groups and all(_is_alike(model, other) for other in groups[-1]):
            groups[-1].append(model)
        else:
            groups.append([model])
    return [group for group in groups if len(group) > 1]


def _is_alike(one: Model, other: Model) -> bool:
    pairs = ((one.row["test_acc"], other.accuracy_interval), (other.row["test_acc"], one.accuracy_interval))
    return any(interval is not None and interval[0] <= accuracy <= interval[1] for accuracy, interval in pairs)


def accuracy_vs_size(results: Results) -> Figure | None:
    """Test accuracy over the size of the deployed file."""
    models = results.models
    if not models:
        return None
    figure, (axes,) = make_figure(results.records, "Accuracy against size", size=(9.5, 5.2))
    _draw_points(axes, models, "file_mb")
    make_logarithmic(axes, "x", SIZE_LABEL)
    axes.set_ylabel(ACCURACY_LABEL)
    draw_legend(figure, _looks(models))
    write_footnote(figure, conditions(results, models))
    return figure


def accuracy_vs_time(results: Results) -> Figure | None:
    """Test accuracy over the median latency, one panel per batch size; models without latency are left out."""
    models = with_latency(results.models)
    if not models:
        return None
    figure, panels = make_figure(
        results.records, "Accuracy against latency", columns=len(LATENCIES), size=(13, 5.2), sharey=True
    )
    for axes, (column, batch) in zip(panels, LATENCIES.items(), strict=True):
        _draw_points(axes, with_latency(models, column), column)
        make_logarithmic(axes, "x", f"latency of a batch of {batch} (ms)")
    panels[0].set_ylabel(ACCURACY_LABEL)
    draw_legend(figure, _looks(models))
    write_footnote(figure, conditions(results, models, latency=True))
    return figure


def pareto_frontier(results: Results) -> Figure | None:
    """The models that none beats in accuracy, file size and latency at once, named first; the others muted."""
    models = with_latency(results.models, "latency_ms_b64")
    if not models:
        return None
    best, others = _split_by_frontier(models)
    title = "Pareto frontier of accuracy, file size and latency at batch 64"
    figure, panels = make_figure(results.records, title, columns=2, size=(12.5, 5.5), sharey=True)
    for axes, column, label in zip(
        panels, PARETO_COLUMNS[1:], (SIZE_LABEL, "latency of a batch of 64 (ms)"), strict=True
    ):
        _draw_points(axes, others, column, alpha=0.3)
        _draw_points(axes, best, column)
        steps = rows_of(best).sort_values([column, "test_acc"], ascending=[True, False])
        steps = steps[steps["test_acc"] > steps["test_acc"].cummax().shift(fill_value=-1)]
        axes.step(steps[column], 100 * steps["test_acc"], where="post", color=MUTED, linestyle="--", zorder=1)
        make_logarithmic(axes, "x", label)
    panels[0].set_ylabel(ACCURACY_LABEL)
    draw_legend(figure, _looks(best), muted=_looks(others, " (dominated)"))
    groups = within_noise(best)
    noise = [
        f"accuracies of {listed([model.label for model in group])} are within noise of each other"
        for group in groups[:MAX_GROUPS]
    ]
    more = [f"and those of {len(groups) - MAX_GROUPS} more groups"] if len(groups) > MAX_GROUPS else []
    notes = ["dashed: frontier of the panel's two figures", *noise, *more]
    write_footnote(figure, conditions(results, models, latency=True, notes=notes))
    return figure


def comparison_bars(results: Results) -> Figure | None:
    """Every column that is a cost, of every model, as bars from zero."""
    models = results.models
    if not models:
        return None
    panels = results.costs
    columns = min(4, math.ceil(len(panels) / 2))
    rows = math.ceil(len(panels) / columns)
    labels = [wrap(model.label, NAME_INCHES, 10) for model in models]
    figure, all_axes = make_figure(
        results.records,
        "Comparison, shorter is better",
        cells=len(panels),
        columns=columns,
        size=(3.2 * columns + 2.8, rows * (1.1 + height_of_places(labels, 0.3)) + 0.4),
        sharey=True,
    )
    looks = [model.look for model in models]
    for axes, (column, cost) in zip(all_axes, panels, strict=True):
        values, errors = zip(*[(model.cost(column), model.cost_error(column)) for model in models], strict=True)
        draw_bars(axes, values, looks, errors, [model.why_blank(column) for model in models])
        axes.set(xlabel=wrap(cost.label, NAME_INCHES, 10))
        axes.margins(x=0.25)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.grid(visible=False, axis="y")
    all_axes[0].set_yticks(range(len(models)), labels)
    all_axes[0].set_ylim(len(models) - 0.5, -0.5)  # shared by all
    fills = {"INT8": "hatched: INT8", "BF16": "pale: BF16"}
    shown = {model.look.precision for model in models}
    notes = [text for precision, text in fills.items() if precision in shown]
    write_footnote(figure, conditions(results, models, latency=True, notes=notes))
    return figure


def normalized_comparison(results: Results) -> Figure | None:
    """How many times worse than the best a model is, on every spoke: the Pareto frontier over each other."""
    models = results.models
    spokes = [(column, cost) for column, cost in results.costs if cost.spoke]
    if not models:
        return None
    costs = pd.DataFrame(
        {column.name: [model.cost(column) for model in models] for column, _ in spokes},
        index=[model.name for model in models],
    )
    radii, decades = radar_radii(costs)
    best, others = _split_by_frontier(models)
    figure, (axes,) = make_figure(
        results.records, "Normalized comparison, rim = best model", size=(10.5, 6.4), projection="polar"
    )
    prepare_radar(axes, [cost.spoke for _, cost in spokes], decades)
    for model in others:
        look = model.look.line | {"markersize": 4, "markeredgewidth": 0.8}
        axes.plot(*closed(radii.loc[model.name].to_numpy()), **look, linewidth=0.8, alpha=0.3, clip_on=False)
    for model in best:
        look = model.look.line | {"markersize": 6}
        axes.plot(*closed(radii.loc[model.name].to_numpy()), **look, linewidth=1.8, clip_on=False)
    draw_legend(figure, _looks(best), muted=_looks(others, " (dominated)"), linestyle="-")
    notes = [
        "rings: times worse than the best model, logarithmic",
        "batch: latency of one",
        *(["thin: dominated in accuracy, file and latency at batch 64"] if others else []),
    ]
    write_footnote(figure, conditions(results, models, latency=True, bars=False, notes=notes))
    return figure


def latency_by_runtime(results: Results) -> Figure | None:
    """Median latency of every model in every runtime that timed it, first seed, a panel per batch size."""
    timed = timed_rows(results.comparable)
    if timed.empty:
        return None
    models = [model for model in results.models if model.name in set(timed["model"])]
    names = [model.name for model in models]
    labels = [wrap(model.short_name, NAME_INCHES, 10) for model in models]
    runtimes = sorted(timed["runtime"].unique())
    size = (13, 1.8 + height_of_places(labels, 0.35))
    figure, panels = make_figure(results.records, "Latency by runtime", columns=len(LATENCIES), size=size)
    for axes, (column, batch) in zip(panels, LATENCIES.items(), strict=True):
        for runtime, color, marker in zip(runtimes, COLORS, MARKERS, strict=False):
            rows = timed[timed["runtime"] == runtime]
            places = [names.index(model) for model in rows["model"]]
            axes.plot(rows[column], places, marker, color=color, markersize=7, alpha=0.85, label=runtime)
        make_logarithmic(axes, "x", f"latency of a batch of {batch} (ms)")
        axes.set_yticks(range(len(names)), labels if axes is panels[0] else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
    place_legend(figure, *panels[0].get_legend_handles_labels())
    first_runs = {key: results.runs[key][0] for key in zip(timed["model"], timed["runtime"], strict=True)}
    sessions = {record.measurements[runtime].latency_session for (_, runtime), record in first_runs.items()}
    short_names = {model.name: model.short_name for model in results.models}
    others = {f"{short_names[model]} in {runtime}": own for (model, runtime), own in results.left_out.items()}
    write_footnote(figure, "; ".join([f"median, {results.timed_under}{compare_only(sessions)}", *left_out(others)]))
    return figure


OF_COMPRESSED = COMPRESSION_FIGURES | FEW_BITS_FIGURES | CURVE_FIGURES
FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    draw.__name__: draw
    for draw in (
        accuracy_vs_size,
        accuracy_vs_time,
        pareto_frontier,
        comparison_bars,
        normalized_comparison,
        training_curves,
        confidence_histogram,
        reliability_diagram,
        expert_load,
        confusion_matrices,
        latency_by_runtime,
    )
} | OF_COMPRESSED


def _split_by_frontier(models: Sequence[Model]) -> tuple[list[Model], list[Model]]:
    """Those on the Pareto frontier, and the others. Without latencies there is no frontier: all are of the first."""
    front = pareto_set(rows_of(models)) or [model.name for model in models]
    return [model for model in models if model.name in front], [model for model in models if model.name not in front]


def _looks(models: Sequence[Model], suffix: str = "") -> dict[str, Look]:
    return {model.label + suffix: model.look for model in models}


def _draw_points(axes: Axes, models: Sequence[Model], column: str, *, alpha: float = 1) -> None:
    for model in models:
        axes.errorbar(
            [model.row[column]],
            [100 * model.row["test_acc"]],
            xerr=model.latency_error(column) if column in LATENCIES else None,
            yerr=model.accuracy_error,
            **model.look.line,
            elinewidth=1,
            capsize=3,
            alpha=alpha,
        )
