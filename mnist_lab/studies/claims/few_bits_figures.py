"""The figures of the claims about fewer bits, from the finished runs alone.

Every figure function returns None where a run that it needs is missing.
"""

from collections.abc import Callable

from mnist_lab.experiments.rows import MOE
from mnist_lab.report.drawing import (
    COLORS,
    MARKERS,
    MUTED,
    Figure,
    make_figure,
    make_logarithmic,
    place_legend,
    write_footnote,
)
from mnist_lab.studies.claims.evidence import Evidence
from mnist_lab.studies.claims.few_bits import LEAST_RISE, MIXED, OF_MIXTURES, rise_per_visit
from mnist_lab.studies.claims.figures import half_width, note_seeds


def sensitivity_by_load(evidence: Evidence) -> Figure | None:
    """What two bits in an expert's layers cost a visit, against its load; a line for each seed."""
    names = {mixture: pair.by_sensitivity.name for mixture, pair in OF_MIXTURES.items()}
    if not evidence.has(*names.values()):
        return None
    figure, (axes,) = make_figure(
        evidence.runs(next(iter(names.values()))), "One layer in 2 bits, all else in float", size=(9, 5)
    )
    for index, (mixture, name) in enumerate(names.items()):
        for seed, (load, rise) in enumerate(map(rise_per_visit, evidence.runs(name))):
            axes.plot(
                100 * load, 1000 * rise, color=COLORS[index + 1], marker=MARKERS[index], markersize=6, linewidth=0.6,
                label=mixture if seed == 0 else None,
            )  # fmt: skip
    axes.set_xlabel("load of the expert (% of all visits)")
    make_logarithmic(axes, "y", "rise in KL per visit (millinats)")
    place_legend(figure, *axes.get_legend_handles_labels())
    write_footnote(
        figure,
        "calibration images; a line for each seed, a point for each living expert: the sum over its layers; "
        f"{1000 * LEAST_RISE:g}: none",
    )
    return figure


def mixed_against_even(evidence: Evidence) -> Figure | None:
    """Test accuracy against the original's of bits by sensitivity and of even ones, at the same bytes."""
    rows = [row for pair in MIXED.values() for row in pair]
    if not evidence.has(MOE.name, *(row.name for row in rows)):
        return None
    figure, (axes,) = make_figure(evidence.runs(MOE.name), "Mixed bits against even ones, same bytes", size=(9, 5))
    for place, pair in enumerate(MIXED.values()):
        for index, (label, row) in enumerate(zip(("by sensitivity", "evenly"), pair, strict=True)):
            points, height = evidence.acc_points(row.name, MOE.name), place + 0.3 * index - 0.15
            axes.errorbar(
                points.mean(), height, xerr=half_width(points), marker=MARKERS[index], markersize=8,
                color=COLORS[1 + index], capsize=3, label=label if place == 0 else None,
            )  # fmt: skip
            axes.plot(points, [height] * len(points), "|", color=MUTED, markersize=10, zorder=3)
    axes.axvline(0, color=MUTED, linewidth=1)
    axes.set_yticks(range(len(MIXED)), list(MIXED))
    axes.set_ylim(len(MIXED) - 0.5, -0.5)
    axes.set(xlabel="test accuracy, rounded − original (points)")
    place_legend(figure, *axes.get_legend_handles_labels())
    note_seeds(figure, evidence, "bars: 95 % interval; ticks: seeds")
    return figure


FEW_BITS_CLAIM_FIGURES: dict[str, Callable[[Evidence], Figure | None]] = {
    draw.__name__: draw for draw in (sensitivity_by_load, mixed_against_even)
}
