"""Figures of compressed models: what they lost for what was left out, and what became of their routing. No torch here.

They stand beside the model that they were made from, their *original*, and beside their *rivals*: the same
architectures from scratch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mnist_lab.report.drawing import (
    COLORS,
    MUTED,
    NAME_INCHES,
    Axes,
    Error,
    Figure,
    Line2D,
    Look,
    extra_height,
    height_of_places,
    label_outer,
    make_figure,
    make_logarithmic,
    place_legend,
    spread,
    wrap,
    write_footnote,
)
from mnist_lab.report.records import Record
from mnist_lab.report.results import ACCURACY_LABEL, SIZE_LABEL, Model, Results, conditions, num_seeds
from mnist_lab.report.statistics import confidence_interval

RIVALS = "rivals from scratch"
UNTRAINED = ", not fine-tuned"
RIVAL_LOOK = Look(MUTED, "d")
JOINED = "joined: settings of one technique"
ROUTING = {"top1_agreement": "images with the same first expert (%)", "routes_jaccard": "overlap of chosen sets (%)"}
EXACT = "exact"  # the criterion that tries every subset


class Point(NamedTuple):
    """One model's, in a panel."""

    x: float
    y: float
    error: Error | None  # of y


def accuracy_vs_nonzero(results: Results) -> Figure | None:
    """Test accuracy over the parameters that are not zero: a panel per original, a line per technique."""

    def nonzero(model: Model) -> float:
        """Thousands; of what was only trained, all."""
        return float(model.row["nonzero_params" if model.is_derived else "params_total"]) / 1000

    return _draw_accuracy(
        results,
        "Accuracy against parameters that are not zero",
        "parameters that are not zero (thousands)",
        nonzero,
        notes=["of originals and rivals: all parameters"],
    )


def accuracy_vs_bytes(results: Results) -> Figure | None:
    """Test accuracy over the size of the deployed file: a panel per original, a line per technique."""
    return _draw_accuracy(
        results, "Accuracy against the deployed file", SIZE_LABEL, lambda model: float(model.row["file_mb"])
    )


def expert_criteria(results: Results) -> Figure | None:
    """How far each criterion's choice of experts is from the best subset's, before any fine-tuning: a panel per choice
    that was made of every subset, a dot per seed.
    """
    models = [model for model in results.models if any(map(_grades, model.runs))]
    if not models:
        return None
    graded = {model.name: [grades for grades in map(_grades, model.runs) if grades] for model in models}
    criteria = dict.fromkeys(name for runs in graded.values() for grades in runs for name in grades if name != EXACT)
    titles = [wrap(f"{model.short_name}: {_num_kept(graded[model.name][0])}", 4, 10) for model in models]
    columns = min(2, len(models))
    height = 1.1 + 0.3 * max(4, len(criteria)) + extra_height(titles)
    figure, panels = make_figure(
        results.records,
        "Choices of experts against the best subset, before fine-tuning",
        cells=len(models),
        columns=columns,
        size=(5 * columns + 1.6, height * math.ceil(len(models) / columns) + 0.9),
    )
    for place, (axes, model, title) in enumerate(zip(panels, models, titles, strict=True)):
        axes.axvline(0, color=MUTED, linestyle="--", linewidth=1)
        for row, name in enumerate(criteria):
            points = [
                100 * (grades[name]["acc"] - grades[EXACT]["acc"]) for grades in graded[model.name] if name in grades
            ]
            axes.plot(points, [row] * len(points), "o", color=MUTED, markersize=4, alpha=0.6)
            axes.plot(points and [np.mean(points)], points and [row], **Look(COLORS[1], "D").line)
        axes.set_title(title, fontsize=10)
        axes.set_yticks(range(len(criteria)), list(criteria) if place % columns == 0 else [""] * len(criteria))
        axes.set_ylim(len(criteria) - 0.5, -0.5)
    label_outer(panels, columns, "validation accuracy less that of the best subset (points)", "")
    write_footnote(
        figure,
        f"{num_seeds(models)}: dots, their mean: diamonds; dashed: the best subset (exact), that of least loss on "
        "training images, so that others may be more accurate",
    )
    return figure


def expert_similarity(results: Results) -> Figure | None:
    """How alike the experts of every compressed mixture are, before and after."""
    models = [model for model in results.models if model.row[["expert_cka_before", "expert_cka"]].notna().all()]
    if not models:
        return None
    labels = [wrap(model.short_name, NAME_INCHES, 10) for model in models]
    size = (9.5, 1.8 + height_of_places(labels, 0.35))
    figure, (axes,) = make_figure(results.records, "Likeness of experts' outputs", size=size)
    for place, model in enumerate(models):
        before, after = model.row["expert_cka_before"], model.row["expert_cka"]
        axes.plot([before, after], [place, place], color=MUTED, linewidth=1.2, zorder=1)
        axes.plot([before], [place], **Look(MUTED, "o", "INT8").line)
        axes.plot([after], [place], **model.look.line)
    axes.set_yticks(range(len(models)), labels)
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.set_xlabel("linear CKA, mean over pairs of experts")
    write_footnote(
        figure,
        f"{num_seeds(models)}, mean; hollow: of the original, coloured: of the compressed model, on the same test "
        "images; 1: the same up to rotation and scale",
    )
    return figure


def routing_vs_ratio(results: Results) -> Figure | None:
    """How much of the routing stayed, over the share that was left out: a row of panels per original."""
    looks = looks_by_family(results)
    members: dict[str, list[Model]] = {}
    for model in results.models:
        if not math.isnan(_share_left_out(results, model)) and model.row[[*ROUTING]].notna().any():
            members.setdefault(model.runs[0].original, []).append(model)
    if not members:
        return None
    titles = titles_of(results, members, 4.2)
    columns = len(ROUTING)
    size = (12.5, (4 + extra_height(titles)) * len(members) + 0.9)
    figure, panels = make_figure(
        results.records, "Routing against what was left out", rows=len(members), columns=columns, size=size
    )
    handles: dict[str, Line2D] = {}
    for place, axes in enumerate(panels):
        title, models = titles[place // columns], [*members.values()][place // columns]
        column, label = [*ROUTING.items()][place % columns]

        def point_of(model: Model, column: str = column) -> Point:
            share = _share_left_out(results, model)
            return Point(100 * share, 100 * model.row[column], interval_over_seeds(model, column))

        handles |= draw_lines(axes, models, point_of, lambda model: looks[model.family])
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="left out (% of weights, of units, or of experts)", ylabel=label, xlim=(0, 103))
    place_legend(figure, [*handles.values()], [*handles])
    shown = [model for models in members.values() for model in models]
    bars = "; error bars: 95 % interval over seeds" if max(len(model.runs) for model in shown) > 1 else ""
    write_footnote(figure, f"{num_seeds(shown)}{bars}; against the original's routes on test images; {JOINED}")
    return figure


COMPRESSION_FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    draw.__name__: draw
    for draw in (accuracy_vs_nonzero, accuracy_vs_bytes, expert_criteria, expert_similarity, routing_vs_ratio)
}


def _draw_accuracy(
    results: Results, title: str, x_label: str, x_of: Callable[[Model], float], *, notes: Sequence[str] = ()
) -> Figure | None:
    members = _by_original(results)
    if not members:
        return None
    looks = looks_by_family(results)

    def draw_panel(axes: Axes, _: str, models: Sequence[Model]) -> dict[str, Line2D]:
        lines = draw_lines(
            axes,
            models,
            lambda model: Point(x_of(model), 100 * model.row["test_acc"], model.accuracy_error),
            lambda model: looks[model.family],
        )
        make_logarithmic(axes, "x", "")
        return lines

    has_rivals = any(model.is_rival for models in members.values() for model in models)
    dashed = ["dashed: the compressed models' architectures from scratch"] if has_rivals else []
    return draw_accuracies(results, title, members, draw_panel, x_label=x_label, notes=[JOINED, *dashed, *notes])


def draw_accuracies(
    results: Results,
    title: str,
    members: Mapping[str, Sequence[Model]],
    draw_panel: Callable[[Axes, str, Sequence[Model]], dict[str, Line2D]],
    *,
    x_label: str,
    notes: Sequence[str],
) -> Figure:
    """A panel of accuracies for each original and the models that were made from it.

    Args:
        draw_panel: draws them, given the original's name; its lines by name, for the legend.
    """
    titles = titles_of(results, members, 4.2)
    columns = min(2, len(members))
    rows = math.ceil(len(members) / columns)
    figure, panels = make_figure(
        results.records,
        title,
        cells=len(members),
        columns=columns,
        size=(4.8 * columns + 3.4, (4.2 + extra_height(titles)) * rows + 0.9),
    )
    handles: dict[str, Line2D] = {}
    for axes, own_title, (name, models) in zip(panels, titles, members.items(), strict=True):
        handles |= draw_panel(axes, name, models)
        axes.set_title(own_title, fontsize=10)
    label_outer(panels, columns, x_label, ACCURACY_LABEL)
    if RIVALS in handles:
        handles[RIVALS] = handles.pop(RIVALS)  # last
    place_legend(figure, [*handles.values()], [*handles])
    shown = [model for models in members.values() for model in models]
    write_footnote(figure, conditions(results, shown, notes=notes))
    return figure


def _by_original(results: Results) -> dict[str, list[Model]]:
    """Of every original that was compressed: itself, what was made from it, and the rivals, in the table's order."""
    by_name = {model.name: model for model in results.models}

    def original_of(name: str) -> str:
        """A rival stands where the model does whose architecture it has."""
        model = by_name.get(name)
        if model is None:  # not in the table, as one of another data set
            return name
        if model.is_rival:
            return original_of(model.runs[0].parents["teacher"]["model"])
        return original_of(model.runs[0].original) if model.is_derived else name

    members: dict[str, list[Model]] = {}
    for model in results.models:
        members.setdefault(original_of(model.name), []).append(model)
    return {name: own for name, own in members.items() if any(map(_is_compressed, own))}


def _is_compressed(model: Model) -> bool:
    """Whether something was left out of another model, which another form does not."""
    return model.is_derived and model.runs[0].config.get("step") is not None


def titles_of(results: Results, originals: Mapping[str, Sequence[Model]], inches: float) -> list[str]:
    short_names = {model.name: model.short_name for model in results.models}
    return [wrap(f"made from {short_names.get(name, name)}", inches, 10) for name in originals]


def looks_by_family(results: Results) -> dict[str, Look]:
    return looks_by(results.models, lambda model: model.family)


def looks_by(models: Sequence[Model], name_of: Callable[[Model], str]) -> dict[str, Look]:
    """That of the plainest model of each name."""
    looks: dict[str, Look] = {}
    for model in sorted(models, key=lambda model: (len(model.name), model.name)):
        looks.setdefault(name_of(model), model.look)
    return looks


def draw_lines(
    axes: Axes,
    models: Sequence[Model],
    point_of: Callable[[Model], Point],
    look_of: Callable[[Model], Look],
    *,
    name_of: Callable[[Model], str] | None = None,
) -> dict[str, Line2D]:
    """A line per technique, or per what `name_of` gives, joined from left to right, another of the rivals, and the
    original larger; each by its name. Points without a place (NaN) are left out.
    """
    members: dict[str, list[Model]] = {}
    for model in models:
        members.setdefault((name_of or line_of)(model), []).append(model)
    lines = {}
    for name, own in members.items():
        points = sorted((point_of(model) for model in own), key=lambda point: point[:2])
        points = [point for point in points if not math.isnan(point.x + point.y)]
        if not points:
            continue
        errors = [np.full((2, 1), np.nan) if point.error is None else point.error for point in points]
        look = RIVAL_LOOK if name == RIVALS else look_of(own[0])
        bars = axes.errorbar(
            [point.x for point in points],
            [point.y for point in points],
            yerr=np.hstack(errors),
            **look.line | ({} if own[0].is_derived or name == RIVALS else {"markersize": 13}),
            linestyle="--" if name == RIVALS else ":" if _is_untrained(own[0]) else "-",
            elinewidth=1,
            capsize=3,
        )
        lines[name] = bars.lines[0]
    return lines


def line_of(model: Model) -> str:
    if model.is_rival:
        return RIVALS
    if not model.is_derived:
        return f"{model.label} (original)"
    return model.family + (UNTRAINED if _is_untrained(model) else "")


def _is_untrained(model: Model) -> bool:
    """Whether it was measured as it was once something had been left out."""
    step = model.runs[0].config.get("step") or {}
    return step.get("finetuning", {}).get("finetune_epochs") == 0


def interval_over_seeds(model: Model, column: str) -> Error | None:
    """Percentage points from the mean of a share to the ends of its interval; None of a single seed."""
    if len(model.runs) < 2 or pd.isna(model.row[column]):
        return None
    mean = 100 * float(model.row[column])
    half_width = 100 * confidence_interval([(run.against_original or {})[column] for run in model.runs])
    return spread(mean, max(0, mean - half_width), min(100, mean + half_width))


def _grades(record: Record) -> dict[str, dict[str, Any]]:
    """What each criterion's choice of experts is worth before fine-tuning, if the best subset is known too."""
    grades = (record.proof or {}).get("grades") or {}
    return grades if EXACT in grades else {}


def _num_kept(grades: Mapping[str, Mapping[str, Any]]) -> str:
    num = len(grades[EXACT]["kept"])
    return f"{num} expert{'s stay' if num > 1 else ' stays'}"


def _share_left_out(results: Results, model: Model) -> float:
    """Of the weights, units or experts, in [0, 1]; NaN where the record does not say."""
    record = model.runs[0]
    step = record.config.get("step") or {}
    ratio = step.get("pruning", {}).get("ratio", step.get("ratio"))
    if ratio is not None:
        return float(ratio)
    kept = (record.proof or {}).get("kept")
    original = next((other for other in results.records if other.model == record.original), None)
    if not kept or original is None:
        return math.nan
    return 1 - len(kept) / original.architecture["routing"]["num_experts"]
