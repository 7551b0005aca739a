"""The figures of the claims about pruning, from the finished runs alone.

Every figure function returns None where a run that it needs is missing.
"""

from collections.abc import Callable

from mnist_lab.experiments.rows import MOE
from mnist_lab.report.drawing import COLORS, MARKERS, MUTED, Figure, make_figure, place_legend, write_footnote
from mnist_lab.studies.claims.compression import AFTER, BEFORE, MIXTURES, SAME_BYTES, zeros
from mnist_lab.studies.claims.evidence import Evidence, loss_by_expert
from mnist_lab.studies.claims.figures import half_width, note_seeds


def loss_by_load(evidence: Evidence) -> Figure | None:
    """What one ratio for all experts costs the images of each, against its load; a line for each seed."""
    names = {mixture: zeros(0.9, source).before.name for mixture, source in MIXTURES.items()}
    if not evidence.has(*names.values()):
        return None
    runs = evidence.runs(next(iter(names.values())))
    figure, (axes,) = make_figure(runs, "One ratio for all experts: 90 % zeros, before fine-tuning", size=(9, 5))
    for index, (mixture, name) in enumerate(names.items()):
        for seed, (load, rise) in enumerate(map(loss_by_expert, evidence.runs(name))):
            axes.plot(
                100 * load, rise, color=COLORS[index + 1], marker=MARKERS[index], markersize=6, linewidth=0.6,
                label=mixture if seed == 0 else None,
            )  # fmt: skip
    axes.axvline(100 / runs[0].architecture["routing"]["num_experts"], color=MUTED, linestyle="--", linewidth=1)
    axes.set(xlabel="load of the expert (% of all visits)", ylabel="rise in loss of its images (nats)")
    place_legend(figure, *axes.get_legend_handles_labels())
    write_footnote(figure, "validation images; a line for each seed, a point for each living expert; dashed: even load")
    return figure


def before_and_after_finetuning(evidence: Evidence) -> Figure | None:
    """Test accuracy against the original's at about the same bytes, before and after fine-tuning."""
    rows = [row for pruned in SAME_BYTES.values() for row in pruned]
    if not evidence.has(MOE.name, *(row.name for row in rows)):
        return None
    figure, panels = make_figure(
        evidence.runs(MOE.name), "Pruning to about the same bytes", columns=2, size=(13, 4), sharey=True
    )
    for index, (axes, when) in enumerate(zip(panels, (BEFORE, AFTER), strict=True)):
        for place, pruned in enumerate(SAME_BYTES.values()):
            points = evidence.acc_points(pruned[index].name, MOE.name)
            axes.errorbar(
                points.mean(), place, xerr=half_width(points), marker="o", markersize=8, color=COLORS[1], capsize=3
            )
            axes.plot(points, [place] * len(points), "|", color=MUTED, markersize=10, zorder=3)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set(xlabel="test accuracy, pruned − original (points)")
        axes.set_title(when, fontsize=10)
    shares = [evidence.file_share(pruned.after.name, MOE.name).mean() for pruned in SAME_BYTES.values()]
    labels = [f"{label}\n{share:.2f} of the file" for label, share in zip(SAME_BYTES, shares, strict=True)]
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    note_seeds(figure, evidence, "bars: 95 % interval; ticks: seeds")
    return figure


PRUNING_CLAIM_FIGURES: dict[str, Callable[[Evidence], Figure | None]] = {
    draw.__name__: draw for draw in (loss_by_load, before_and_after_finetuning)
}
