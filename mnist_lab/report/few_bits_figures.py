"""Figures of weights of few bits: accuracy by bits, routes by the router's, bits by expert. No torch here."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from mnist_lab.report.compression_figures import (
    JOINED,
    Point,
    draw_accuracies,
    draw_lines,
    interval_over_seeds,
    looks_by,
    titles_of,
)
from mnist_lab.report.drawing import (
    COLORS,
    MUTED,
    Axes,
    Figure,
    Line2D,
    Look,
    extra_height,
    label_outer,
    make_figure,
    place_legend,
    wrap,
    write_footnote,
)
from mnist_lab.report.results import Model, Results, num_seeds

BITS: dict[Any, float] = {8: 8, 4: 4, 3: 3, 2: 2, "ternary": math.log2(3), 1: 1}  # of information a weight
IN_FLOAT = "float"
ROUTER_BITS = [IN_FLOAT, 8, 4, 2]
REROUTED = {
    "rerouted": "other experts (% of images)",
    "rerouted_other_class": "other experts and another answer (% of images)",
}


def accuracy_vs_bits(results: Results) -> Figure | None:
    """Test accuracy over the bits of a weight: a panel per original, a line per way to come to so few.

    Originals in one number of bits alone have none where there are others to compare.
    """
    members = _by_original(model for model in results.models if _is_plain(model))
    if not members:
        return None
    several = {name: models for name, models in members.items() if len({*map(_bits, models)}) > 1}
    members = several or members
    shown = [model for models in members.values() for model in models]
    looks, by_name = looks_by(shown, _way), {model.name: model for model in results.models}

    def draw_panel(axes: Axes, original: str, models: Sequence[Model]) -> dict[str, Line2D]:
        if original in by_name:
            axes.axhline(100 * by_name[original].row["test_acc"], color=MUTED, linestyle="--", linewidth=1)
        lines = draw_lines(
            axes,
            models,
            lambda model: Point(_bits(model), 100 * model.row["test_acc"], model.accuracy_error),
            lambda model: looks[_way(model)],
            name_of=_way,
        )
        axes.set_xscale("log", base=2)
        axes.set_xlim(0.93, 8.6)
        axes.set_xticks([*BITS.values()], [f"{bits:.2g}" for bits in BITS.values()])
        axes.minorticks_off()
        return lines

    return draw_accuracies(
        results,
        "Accuracy against the bits of a weight",
        members,
        draw_panel,
        x_label="bits of a weight (1.6: three levels)",
        notes=[JOINED, "dashed: the original in FP32", "the last layer keeps at least 4 bits"],
    )


def routes_vs_router_bits(results: Results) -> Figure | None:
    """Images whose experts change over the bits of the router's weights, and those whose answer changes as well: a row
    of panels per original.
    """
    found = _by_original(
        model for model in results.models if not pd.isna(model.row["rerouted"]) and _is_of_router(model)
    )
    members = {
        name: models for name, models in found.items() if any(_router_bits(model) != IN_FLOAT for model in models)
    }
    if not members:
        return None
    titles = titles_of(results, members, 4.2)
    columns = len(REROUTED)
    figure, panels = make_figure(
        results.records,
        "Routes against the bits of the router's weights",
        rows=len(members),
        columns=columns,
        size=(12.5, (4 + extra_height(titles)) * len(members) + 0.9),
    )
    shown = [model for models in members.values() for model in models]
    looks = looks_by(shown, _way)
    handles: dict[str, Line2D] = {}
    for place, axes in enumerate(panels):
        models = [*members.values()][place // columns]
        column, label = [*REROUTED.items()][place % columns]

        def point_of(model: Model, column: str = column) -> Point:
            x = ROUTER_BITS.index(_router_bits(model))
            return Point(x, 100 * model.row[column], interval_over_seeds(model, column))

        handles |= draw_lines(axes, models, point_of, lambda model: looks[_way(model)], name_of=_way)
        axes.set_title(titles[place // columns], fontsize=10)
        axes.set_xticks(range(len(ROUTER_BITS)), [str(bits) for bits in ROUTER_BITS])
        axes.set(xlabel="bits of the router's weights", ylabel=label, xlim=(-0.2, len(ROUTER_BITS) - 0.8))
        axes.set_ylim(bottom=0)
    place_legend(figure, [*handles.values()], [*handles])
    bars = "; error bars: 95 % interval over seeds" if max(len(model.runs) for model in shown) > 1 else ""
    write_footnote(
        figure, f"{num_seeds(shown)}{bars}; test images, against the original's artifact; all other weights: 8 bits"
    )
    return figure


def bits_by_expert(results: Results) -> Figure | None:
    """The mean bits of each expert's weights beside its load, where bits are mixed: a panel per model."""
    models = [
        model for model in results.models if (model.runs[0].proof or {}).get("load") and _is_by_sensitivity(model)
    ]
    if not models:
        return None
    panel_titles = [wrap(model.short_name, 4, 10) for model in models]
    columns = min(2, len(models))
    rows = math.ceil(len(models) / columns)
    figure, panels = make_figure(
        results.records,
        "Bits of an expert beside its load",
        cells=len(models),
        columns=columns,
        size=(4.8 * columns + 1.6, (3.6 + extra_height(panel_titles)) * rows + 0.9),
    )
    for axes, model, title in zip(panels, models, panel_titles, strict=True):
        for seed, record in enumerate(model.runs):
            assert record.proof is not None
            load, bits = record.proof["load"], expert_bits(record.proof["bits"])
            axes.plot([100 * share for share in load], bits, **Look(COLORS[1 + seed % 7], "o").line, linestyle="")
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.1)
    label_outer(panels, columns, "load of the expert (% of all visits)", "bits, mean of its two layers")
    write_footnote(figure, f"{num_seeds(models)}, a colour each; a point for each expert")
    return figure


FEW_BITS_FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    draw.__name__: draw for draw in (accuracy_vs_bits, routes_vs_router_bits, bits_by_expert)
}


def expert_bits(bits: dict[str, Any]) -> list[float]:
    """Mean bits of each expert's layers, of the bits by product."""
    by_expert: dict[int, list[float]] = {}
    for product, own in bits.items():
        if product.startswith("expert"):
            by_expert.setdefault(int(product.removeprefix("expert").partition(".")[0]), []).append(BITS[own])
    return [sum(own) / len(own) for _, own in sorted(by_expert.items())]


def _by_original(models: Iterable[Model]) -> dict[str, list[Model]]:
    members: dict[str, list[Model]] = {}
    for model in models:
        members.setdefault(model.runs[0].original, []).append(model)
    return members


def _form(model: Model) -> dict[str, Any]:
    return model.runs[0].config.get("form") or {}


def _rounding(model: Model) -> dict[str, Any]:
    rounding: dict[str, Any] = _form(model).get("rounding") or {}
    return rounding


def _bits(model: Model) -> float:
    """Of information a weight."""
    return BITS[_rounding(model)["bits"]]


def _setting(model: Model, name: str) -> Any:
    """Of a form that has it itself or in its method."""
    form = _form(model)
    return (form | form.get("method", {})).get(name)


def _is_plain(model: Model) -> bool:
    """Whether nothing but weights is rounded, with a scale for each output."""
    rounding = _rounding(model)
    is_uniform = bool(rounding) and rounding["group_size"] == "channel" and not rounding.get("first_layer_bits")
    return is_uniform and not any(_setting(model, name) for name in ("router_bits", "activation_bits"))


def _router_bits(model: Model) -> Any:
    return _setting(model, "router_bits") or IN_FLOAT


def _is_of_router(model: Model) -> bool:
    """Whether but for the router it has weights of 8 bits, which reroute next to nothing."""
    return _rounding(model).get("bits") == 8 and not _setting(model, "activation_bits")


def _is_by_sensitivity(model: Model) -> bool:
    return _form(model).get("allocation") == "sensitivity"


def _way(model: Model) -> str:
    notes = {"affine": ", zero points", "nearest": ", to the nearest"}
    return model.family + "".join(notes.get(_setting(model, name), "") for name in ("scheme", "method"))
