"""Figures of the curve: accuracy over bytes and over latency, and what each link of a pipeline does. No torch here."""

import math
import string
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mnist_lab.report.curve import PRINTED, find_mixture, front, has_curve, is_from_scratch, num_bytes
from mnist_lab.report.drawing import (
    COLORS,
    MUTED,
    NAME_INCHES,
    Axes,
    Figure,
    Line2D,
    extra_height,
    height_of_places,
    make_figure,
    make_logarithmic,
    place_legend,
    wrap,
    write_footnote,
)
from mnist_lab.report.results import (
    ACCURACY_LABEL,
    LATENCIES,
    Model,
    Results,
    conditions,
    num_seeds,
    where,
    with_latency,
)
from mnist_lab.report.statistics import confidence_interval

KIB = 1024
FP32_300_100 = 4 * 266_610  # bytes of LeNet-300-100


class Anchor(NamedTuple):
    """Published networks on MNIST: bytes and test accuracy in % of each."""

    name: str
    source: str
    points: tuple[tuple[float, float], ...]


ANCHORS = (
    Anchor("LeNet-300-100, Deep Compression", "arXiv:1510.00149", ((FP32_300_100 / 40, 98.42),)),
    Anchor("LeNet-300-100, soft weight sharing", "arXiv:1702.04008", ((FP32_300_100 / 64, 98.06),)),
    Anchor("LeNet-300-100, EPR", "arXiv:1906.06624", ((8560, 98.1),)),
    Anchor("LeNet-5, EPR", "arXiv:1906.06624", ((2840, 99.0),)),
    Anchor("LeNet-5, MIRACLE", "arXiv:1810.00440", ((3030, 99.31),)),
    Anchor("dense 256-64-64-64-10, 4 bits", "BitNetMCU", ((12.3 * KIB, 99.01),)),
    Anchor("dense on shared windows, NF4", "BitNetMCU", ((8.1 * KIB, 99.25), (9.7 * KIB, 99.37))),
    Anchor("CNN, 2 bits", "BitNetMCU", ((5.4 * KIB, 99.06), (7.3 * KIB, 99.28), (11 * KIB, 99.55))),
)
PUBLISHED_ON = "mnist"
LEAST_ERROR = 0.01  # %, one image of 10,000; a model without errors is drawn there
CHOSEN = "blue: the best at each cost, chosen on validation images; numbers from left to right"
OTHERS, FROM_SCRATCH = "all other rows", "trained from scratch, on labels"
AS_PRINTED = "a published curve, as printed"
FRONT, RIVAL, PUBLISHED, GAIN, LOSS = COLORS[1], COLORS[5], COLORS[3], COLORS[3], COLORS[5]
LEAST_LINKS = 3  # of a chain in the waterfall
MAX_CHAINS = 6
NEAR = 0.065  # of a panel's width: numbers side by side would overlap
Cost = Callable[[Model], float]


class Fronts(NamedTuple):
    """What is best at each cost: of the rows that are compared, and of those from scratch."""

    cost: Cost
    best: list[Model]
    rivals: list[Model]


def curve(results: Results) -> Figure | None:
    """Test accuracy over the bytes of the deployed file: every row, the best of each size, and what is known of others.

    The best are chosen on validation images.
    """
    mixture = find_mixture(results.models)
    if mixture is None or not has_curve(results):
        return None
    figure, (axes,) = make_figure(results.records, "Accuracy against bytes", size=(12.5, 6.6))
    fronts = _find_fronts(results.models, num_bytes)
    numbers = _number([fronts])
    printed = {num_bytes(mixture) / ratio: 100 - accuracy for ratio, accuracy in PRINTED.items()}
    is_published_on = results.records[0].dataset == PUBLISHED_ON
    published = [*printed.values(), *(100 - accuracy for anchor in ANCHORS for _, accuracy in anchor.points)]
    limits = _limits([*_errors(fronts), *(published if is_published_on else [])])
    handles, notes = _draw_rows(axes, results.models, fronts, numbers, limits), [CHOSEN]
    if is_published_on:
        (handles[AS_PRINTED],) = axes.plot([*printed], [*printed.values()], ":", color=PUBLISHED, linewidth=2)
        handles |= _draw_anchors(axes)
        notes.append("crosses: other networks, as published")
    make_logarithmic(axes, "x", "deployed file (bytes)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    notes += _show_errors([axes], results.models, limits)
    _place_legend(figure, handles, numbers)
    write_footnote(figure, conditions(results, results.models, notes=notes))
    return figure


def curve_latency(results: Results) -> Figure | None:
    """The same over the median latency of one image and of 1,024; models without latency are left out."""
    if not has_curve(results):
        return None
    batches = {column: batch for column, batch in LATENCIES.items() if batch != 64}
    timed = {column: with_latency(results.models, column) for column in batches}
    if not all(timed.values()):
        return None
    figure, panels = make_figure(
        results.records, "Accuracy against latency, the best of each", columns=2, size=(15, 6.6), sharey=True
    )
    fronts = [_find_fronts(models, _cost_of(column)) for column, models in timed.items()]
    numbers, limits = _number(fronts), _limits([error for own in fronts for error in _errors(own)])
    handles: dict[str, Line2D] = {}
    for axes, own, (column, models) in zip(panels, fronts, timed.items(), strict=True):
        handles |= _draw_rows(axes, models, own, numbers, limits)
        make_logarithmic(axes, "x", f"latency of a batch of {batches[column]:,} (ms)")
    notes = [CHOSEN, *_show_errors(panels, results.models, limits)]
    _place_legend(figure, handles, numbers)
    write_footnote(figure, conditions(results, results.models, latency=True, notes=notes))
    return figure


def waterfall(results: Results) -> Figure | None:
    """What each link of a pipeline does to the deployed file's bytes and to test accuracy: a row of panels for each
    chain of at least three links, of many for the longest.
    """
    chains = sorted(find_chains(results.models), key=lambda chain: -len(chain))[:MAX_CHAINS]
    if not chains:
        return None
    titles = [wrap(chain[-1].short_name, 5.5, 10) for chain in chains]
    labels = [[wrap(label, NAME_INCHES, 10) for label in _link_names(chain)] for chain in chains]
    height = max(height_of_places(own, 0.4) for own in labels) + 1.1 + extra_height(titles)
    figure, panels = make_figure(
        results.records, "What each link does", rows=len(chains), columns=2, size=(13, height * len(chains) + 0.9)
    )
    for chain, title, own, left, right in zip(chains, titles, labels, panels[::2], panels[1::2], strict=True):
        _draw_bytes(left, chain)
        _draw_points(right, chain)
        left.set_title(title, fontsize=10)
        left.set_yticks(range(len(chain)), own)
        right.set_yticks(range(len(chain)), [""] * len(chain))
        for axes in (left, right):
            axes.set_ylim(len(chain) - 0.5, -0.5)
            axes.grid(visible=False, axis="y")
    shown = [model for chain in chains for model in chain]
    bars = "; error bars: 95 % interval over seeds" if max(len(model.runs) for model in shown) > 1 else ""
    more = len(find_chains(results.models)) - len(chains)
    not_shown = f"; {more} more chains are not shown" if more else ""
    write_footnote(figure, f"{where(shown)}; {num_seeds(shown)}{bars}; points: against the link before{not_shown}")
    return figure


CURVE_FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    draw.__name__: draw for draw in (curve, curve_latency, waterfall)
}


def _cost_of(column: str) -> Cost:
    return lambda model: float(model.row[column])


def _find_fronts(models: Sequence[Model], cost: Cost) -> Fronts:
    best = front((model for model in models if not is_from_scratch(model)), cost)
    return Fronts(cost, best, front(filter(is_from_scratch, models), cost))


def _number(fronts: Sequence[Fronts]) -> dict[str, int]:
    """The best, by label, from 1 on, the dearest first."""
    labels = dict.fromkeys(model.label for own in fronts for model in reversed(own.best))
    return {label: number for number, label in enumerate(labels, start=1)}


def _error(accuracy: float) -> float:
    """In %, as drawn."""
    return max(LEAST_ERROR, 100 * (1 - accuracy))


def _ends(model: Model) -> list[float]:
    """Errors at the ends of the interval of its accuracy, the larger one first."""
    accuracy = model.row["test_acc"]
    return [_error(end) for end in model.accuracy_interval or (accuracy, accuracy)]


def _errors(fronts: Fronts) -> list[float]:
    return [_error(model.row["test_acc"]) for model in (*fronts.best, *fronts.rivals)]


class Limits(NamedTuple):
    """Of the axis of errors, in %."""

    low: float
    high: float


def _limits(errors: Sequence[float]) -> Limits:
    """With room for intervals, the longest of which are cut off."""
    return Limits(0.6 * min(errors), 1.25 * max(errors))


def _draw_rows(
    axes: Axes, models: Sequence[Model], fronts: Fronts, numbers: Mapping[str, int], limits: Limits
) -> dict[str, Line2D]:
    """Every row as a dot, the best as steps with numbers; the lines by name."""
    handles: dict[str, Line2D] = {}

    def draw(chosen: Sequence[Model], *style: str, **look: Any) -> Line2D:
        errors = [_error(model.row["test_acc"]) for model in chosen]
        (line,) = axes.plot([fronts.cost(model) for model in chosen], errors, *style, **look)
        return line

    for model in fronts.best:
        number = numbers[model.label]
        size = 8 if number < 10 else 12
        handles[model.label] = Line2D([], [], linestyle="none", marker=f"${number}$", color=FRONT, markersize=size)
        axes.plot([fronts.cost(model)] * 2, _ends(model), "-", color=FRONT, linewidth=1, alpha=0.6)
    others = [model for model in models if not is_from_scratch(model) and model not in fronts.best]
    handles[OTHERS] = draw(others, "o", color="#bdbdbd", markersize=4, zorder=1)
    draw(fronts.best, "o-", color=FRONT, markersize=7, linewidth=2.5, drawstyle="steps-post", zorder=4)
    scratch = [model for model in models if is_from_scratch(model)]
    draw(scratch, "d", color=RIVAL, markersize=5, markerfacecolor="white", zorder=3)
    handles[FROM_SCRATCH] = draw(fronts.rivals, "d--", color=RIVAL, markersize=6, drawstyle="steps-post", zorder=3)
    for near in _neighbours(fronts, models):
        place = np.mean([math.log(fronts.cost(model)) for model in near])
        axes.annotate(
            ", ".join(str(numbers[model.label]) for model in near),
            (math.exp(place), max(limits.low, min(_ends(model)[1] for model in near))),
            (0, 14),  # clear of crosses on the line
            textcoords="offset points",
            ha="center",
            color=FRONT,
            fontsize=10,
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            zorder=6,
        )
    return handles


def _neighbours(fronts: Fronts, models: Sequence[Model]) -> list[list[Model]]:
    """The best, the cheapest first, in groups that are too near each other for a number each."""
    logs = [math.log(fronts.cost(model)) for model in models]
    groups: list[list[Model]] = []
    for model in fronts.best:
        place = math.log(fronts.cost(model))
        if groups and place - math.log(fronts.cost(groups[-1][0])) < NEAR * (max(logs) - min(logs)):
            groups[-1].append(model)
        else:
            groups.append([model])
    return groups


def _place_legend(figure: Figure, handles: Mapping[str, Line2D], numbers: Mapping[str, int]) -> None:
    """Those with numbers first."""
    names = sorted(handles, key=lambda name: numbers.get(name, len(numbers) + 1))
    place_legend(figure, [handles[name] for name in names], names)


def _draw_anchors(axes: Axes) -> dict[str, Line2D]:
    """Crosses with letters; the lines by name and source."""
    handles = {}
    for letter, anchor in zip(string.ascii_lowercase, ANCHORS, strict=False):
        for size, accuracy in anchor.points:
            axes.plot([size], [100 - accuracy], "x", color="black", markersize=6, markeredgewidth=1.5, zorder=7)
            axes.annotate(
                letter, (size, 100 - accuracy), (5, 3), textcoords="offset points", fontsize=9, style="italic", zorder=7
            )
        name = f"{anchor.name} ({anchor.source})"
        handles[name] = Line2D([], [], linestyle="none", marker=f"${letter}$", color="black", markersize=7)
    return handles


def _show_errors(panels: Sequence[Axes], models: Sequence[Model], limits: Limits) -> list[str]:
    """A logarithmic axis of errors, told as accuracy, as long as what matters; a note of rows that it leaves out."""
    for axes in panels:
        axes.set_ylim(*limits)
        make_logarithmic(axes, "y", "")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 - value:.10g}")
        axes.set_ylim(*reversed(limits))  # the better, the higher
    panels[0].set_ylabel(ACCURACY_LABEL)
    num_below = sum(_error(model.row["test_acc"]) > limits.high for model in models)
    return [f"{num_below} row{'s lie' if num_below > 1 else ' lies'} below"] if num_below else []


def find_chains(models: Sequence[Model]) -> list[list[Model]]:
    """Every chain of sources of at least three links whose models are all there, from its original to its end."""
    by_name = {model.name: model for model in models}

    def source_of(model: Model) -> str | None:
        source = model.runs[0].parents.get("source")
        return None if source is None else source["model"]

    def chain_to(name: str) -> list[Model]:
        """Empty where one is missing."""
        if name not in by_name:
            return []
        source = source_of(by_name[name])
        before = [] if source is None else chain_to(source)
        return [*before, by_name[name]] if before or source is None else []

    sources = {source_of(model) for model in models}
    chains = [chain_to(name) for name in by_name if name not in sources]
    return [chain for chain in chains if len(chain) > LEAST_LINKS]


def _link_names(chain: Sequence[Model]) -> list[str]:
    """What the original is called, then what each link did, and its departures from the defaults."""
    names = [chain[0].label]
    for before, model in pairwise(chain):
        record, source = model.runs[0], before.runs[0]
        label = record.technique.removeprefix(source.technique).removeprefix(" + ") or f"as {record.precision}"
        inherited = source.row.removeprefix(source.family)[1:]
        own = record.row.removeprefix(record.family).removesuffix(inherited).strip("-+")
        names.append(" ".join([label, *own.split("-")]).strip())
    return names


def _draw_bytes(axes: Axes, chain: Sequence[Model]) -> None:
    sizes = [num_bytes(model) for model in chain]
    axes.barh(range(len(chain)), sizes, color=[MUTED, *[FRONT] * (len(chain) - 1)], height=0.65)
    for place, size in enumerate(sizes):
        axes.annotate(f"{size:,}", (size, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_xlim(min(sizes) / 3, max(sizes) * 3)
    axes.set_xscale("log")
    axes.set_xlabel("deployed file (bytes, logarithmic)")
    axes.set_xticks([])  # the numbers stand beside the bars
    axes.minorticks_off()


def _draw_points(axes: Axes, chain: Sequence[Model]) -> None:
    """Test accuracy against the link before, of the same seeds, percentage points."""
    axes.axvline(0, color=MUTED, linewidth=1)
    for place, (before, model) in enumerate(pairwise(chain), start=1):
        was = _accuracies(before)
        points = [100 * (accuracy - was[seed]) for seed, accuracy in _accuracies(model).items() if seed in was]
        if not points:
            continue
        mean, half_width = float(np.mean(points)), confidence_interval(points)
        axes.barh([place], [mean], color=GAIN if mean >= 0 else LOSS, height=0.65)
        if not math.isnan(half_width):
            axes.errorbar([mean], [place], xerr=[half_width], fmt="none", ecolor="#444444", elinewidth=1, capsize=3)
        end = max(0.0, mean + (0 if math.isnan(half_width) else half_width))
        axes.annotate(f"{mean:+.2f}", (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.margins(x=0.2)
    axes.set_xlabel("test accuracy won or lost (points)")


def _accuracies(model: Model) -> dict[int, float]:
    """On test images, by seed."""
    return {
        record.seed: measurement.test_acc for record, measurement in zip(model.runs, model.measurements, strict=True)
    }
