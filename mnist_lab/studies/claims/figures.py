"""One function per figure of the claims, from the finished runs alone. No torch here.

Every figure function returns None where a run that it needs is missing.
"""

from collections.abc import Callable

import numpy as np

from mnist_lab.report.drawing import (
    COLORS,
    MARKERS,
    MUTED,
    Axes,
    Figure,
    MaxNLocator,
    draw_heatmap,
    make_figure,
    make_logarithmic,
    place_legend,
    spread,
    write_footnote,
)
from mnist_lab.report.records import Record
from mnist_lab.report.statistics import confidence_interval
from mnist_lab.studies.claims.evidence import (
    Evidence,
    load_cv,
    load_entropy,
    num_dead_experts,
    points_lost_without,
)
from mnist_lab.studies.claims.findings import Values
from mnist_lab.studies.claims.settle import BALANCED, FP32_MOE, NO_KD, STUDENT, UNBALANCED, WRONG_SIGN

CONFIDENCES = [0, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999, 1]  # edges of the bins
SCORES = {  # label, and what the axis shows of the score
    "test_ece": ("calibration error (ECE, %)", 100),
    "test_loss": ("loss (NLL, nats)", 1),
    "test_brier": ("Brier score", 1),
}


def student_against_teacher(evidence: Evidence) -> Figure | None:
    """How sure teacher and student are of the same test images, as shares of all images, seeds pooled."""
    if not evidence.has(FP32_MOE, STUDENT, NO_KD):
        return None
    figure, panels = make_figure(
        evidence.runs(STUDENT), "Student against teacher: confidence on the same images", columns=2, size=(13, 5.8)
    )
    labels = [f"≤ {100 * edge:g}" for edge in CONFIDENCES[1:]]
    teacher = np.concatenate([p.max(axis=1) for p in evidence.probabilities(FP32_MOE)])
    for axes, model, role in zip(panels, (STUDENT, NO_KD), ("distilled", "no teacher"), strict=True):
        student = np.concatenate([p.max(axis=1) for p in evidence.probabilities(model)])
        counts, _, _ = np.histogram2d(student, teacher, bins=[CONFIDENCES, CONFIDENCES])
        shares = 100 * counts / counts.sum()
        texts = [[f"{share:.2g}" for share in row] for row in shares]
        shades = np.log10(shares + 1e-3)
        draw_heatmap(axes, shades, x_labels=labels, y_labels=labels, texts=texts, lowest_first=True)
        axes.set_aspect("equal")
        axes.set(xlabel=f"confidence of the teacher, {FP32_MOE} (%)", ylabel="confidence of the student (%)")
        axes.set_title(
            f"{model}, {role}\nmean confidence {100 * student.mean():.2f} %, teacher {100 * teacher.mean():.2f} %",
            fontsize=10,
        )
    note_seeds(figure, evidence, "share of test images in %, shaded by its logarithm")
    return figure


def calibration_before_and_after(evidence: Evidence) -> Figure | None:
    """ECE, loss and Brier score on the test split, before and after one temperature fitted on validation."""
    models = [FP32_MOE, "FFN_baseline", STUDENT, NO_KD, "KD_FFN_Student_INT8"]
    if not evidence.has(*models):
        return None
    figure, panels = make_figure(
        evidence.runs(STUDENT), "Calibration before and after temperature scaling", columns=3, size=(13, 4), sharey=True
    )
    temperatures = [evidence.scaled(model, "temperature").mean() for model in models]
    for axes, (name, (label, scale)) in zip(panels, SCORES.items(), strict=True):
        for place, model in enumerate(models):
            before = scale * evidence.values(model, lambda m, n=name: getattr(m, n))  # type: ignore[misc]
            after = scale * evidence.scaled(model, name)
            axes.plot([before.mean(), after.mean()], [place, place], color=MUTED, linewidth=1, zorder=1)
            for values, face, when in ((before, COLORS[1], "before"), (after, "white", "after")):
                axes.errorbar(
                    values.mean(), place, xerr=half_width(values), marker="o", markersize=8, color=COLORS[1],
                    markerfacecolor=face, elinewidth=1, capsize=3, label=when if place == 0 else None,
                )  # fmt: skip
        axes.set(xlabel=label)
        axes.set_xlim(left=0)
    names = [f"{model}\nT = {t:.2f}" for model, t in zip(models, temperatures, strict=True)]
    panels[0].set_yticks(range(len(models)), names)
    panels[0].invert_yaxis()
    place_legend(figure, *panels[0].get_legend_handles_labels())
    note_seeds(figure, evidence, "temperature fitted on validation")
    return figure


def load_by_balance(evidence: Evidence) -> Figure | None:
    """The experts' load under each balancing loss: in the last epoch by rank, and its entropy over training."""
    variants = {"none": UNBALANCED, **BALANCED, "wrong sign": WRONG_SIGN}
    if not evidence.has(*variants.values()):
        return None
    figure, (by_rank, over_time) = make_figure(
        evidence.runs(FP32_MOE), "Expert load under each balancing loss", columns=2, size=(13, 5.6)
    )
    num_experts = len(evidence.runs(FP32_MOE)[0].curves[-1]["expert_load"])
    width = 0.8 / len(variants)
    for index, (name, model) in enumerate(variants.items()):
        runs = evidence.runs(model)
        loads = 100 * np.array([sorted(run.curves[-1]["expert_load"], reverse=True) for run in runs])
        places = np.arange(num_experts) + (index - (len(variants) - 1) / 2) * width
        bars = spread(loads.mean(axis=0), loads.min(axis=0), loads.max(axis=0))
        by_rank.bar(
            places, loads.mean(axis=0), width, yerr=bars, color=COLORS[index], ecolor=MUTED, capsize=2,
            label=f"{name}: CV {_mean(runs, load_cv):.2f}, dead {_mean(runs, num_dead_experts):.1f}",
        )  # fmt: skip
        epochs = [epoch["epoch"] for epoch in runs[0].curves]
        entropies = np.array([[_entropy(epoch["expert_load"]) for epoch in run.curves] for run in runs])
        over_time.plot(epochs, entropies.T, color=COLORS[index], linewidth=0.6, alpha=0.5)
        over_time.plot(
            epochs, entropies.mean(axis=0), color=COLORS[index], marker=MARKERS[index], markersize=4.5,
            markevery=max(1, len(epochs) // 10), label=f"{name}: {_mean(runs, load_entropy):.3f} in the end",
        )  # fmt: skip
    by_rank.axhline(100 / num_experts, color=MUTED, linestyle="--", linewidth=1)
    by_rank.set_xticks(range(num_experts), [f"{rank + 1}." for rank in range(num_experts)])
    by_rank.set(xlabel="experts, most loaded first", ylabel="share of training pairs, last epoch (%)")
    over_time.axhline(np.log(num_experts), color=MUTED, linestyle="--", linewidth=1)
    over_time.set(xlabel="epoch", ylabel="entropy of the load (nats)")
    over_time.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (by_rank, over_time):
        axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    note_seeds(figure, evidence, "bars: lowest and highest seed; dashed: even load; dead: below a tenth of it")
    return figure


def expert_by_digit(evidence: Evidence) -> Figure | None:
    """Which expert gets which digit, and what closing it costs that digit, first seed."""
    if not evidence.has(FP32_MOE):
        return None
    record = evidence.runs(FP32_MOE)[0]
    if record.expert_by_class is None or record.acc_without_expert is None:
        return None
    figure, (share, lost) = make_figure([record], "Experts and digits", columns=2, size=(13, 4.2))
    by_expert = 100 * np.array(record.expert_by_class).T
    _draw_by_digit(share, by_expert, ".0f", f"{FP32_MOE}: who gets which digit", "share of the digit's pairs (%)")
    _draw_by_digit(lost, points_lost_without(record), ".1f", "an expert closed", "accuracy lost (points)")
    write_footnote(figure, f"seed {record.seed}, test images; a closed expert's images go to the best of the others")
    return figure


def accuracy_by_calibration(evidence: Evidence) -> Figure | None:
    """Static INT8 of the MoE against the number of calibration images: accuracy, and images sent elsewhere."""
    names = evidence.find("Sparse_MoE_PTQ")
    if len(names) < 2 or not evidence.has(FP32_MOE, *names):
        return None
    figure, panels = make_figure(
        evidence.runs(FP32_MOE), "Static INT8 of the MoE against calibration", columns=2, size=(13, 4.6)
    )
    by_method: dict[str, dict[int, str]] = {}
    for name in names:
        settings = evidence.runs(name)[0].config["form"]["calibration"]
        by_method.setdefault(settings["calibration_method"], {})[settings["calibration_size"]] = name
    for index, (method, by_size) in enumerate(sorted(by_method.items())):
        sizes = sorted(by_size)
        costs = [evidence.acc_points(by_size[size], FP32_MOE) for size in sizes]
        changed = [
            np.array([100 * (record.routes_changed or 0) for record in evidence.runs(by_size[size])]) for size in sizes
        ]
        for axes, values in zip(panels, (costs, changed), strict=True):
            means, errors = [v.mean() for v in values], [half_width(v) or 0 for v in values]
            places = np.array(sizes) * 1.06 ** (index - 1)  # beside each other
            axes.errorbar(
                places, means, errors, elinewidth=1, capsize=3,
                color=COLORS[index + 1], marker=MARKERS[index], label=method,
            )  # fmt: skip
    for axes, label in zip(
        panels, ("test accuracy, INT8 − FP32 (points)", "images whose experts change (%)"), strict=True
    ):
        make_logarithmic(axes, "x", "calibration images")
        axes.set_ylabel(label)
    panels[0].axhline(0, color=MUTED, linewidth=1)
    panels[0].legend(frameon=False, fontsize=9)
    panels[1].set_ylim(bottom=0)
    note_seeds(figure, evidence, "bars: 95 % interval")
    return figure


def temperature_and_alpha(evidence: Evidence) -> Figure | None:
    """What distillation gains over the labels alone, for every temperature and alpha that was tried."""
    gains = _gains(evidence)
    temperatures, alphas = sorted({t for t, _ in gains}), sorted({a for _, a in gains})
    if min(len(temperatures), len(alphas)) < 2 or len(gains) < len(temperatures) * len(alphas):
        return None
    rows = [[gains[temperature, alpha] for temperature in temperatures] for alpha in alphas]
    means = np.array([[values.mean() for values in row] for row in rows])
    counts = sorted({len(values) for values in gains.values()})
    seeds = f"{'–'.join(map(str, counts))} seed{'s' if counts != [1] else ''}"
    controls = evidence.found(NO_KD)
    # The table's students, and the claims about them, may be of another recipe and of more seeds.
    title = f"Distillation: temperature and alpha ({controls[0].recipe} recipe, {seeds})"
    figure, (axes,) = make_figure(controls, title, size=(1.6 * len(temperatures) + 2.5, 4.8))
    limit = max(np.abs(means).max(), 1e-9)
    draw_heatmap(
        axes,
        means,
        x_labels=[f"{temperature:g}" for temperature in temperatures],
        y_labels=[f"{alpha:g}" for alpha in alphas],
        texts=[[_with_interval(values) for values in row] for row in rows],
        cmap="RdBu",
        low=-limit,
        high=limit,
        bar_label="test accuracy, distilled − no teacher (points)",
        lowest_first=True,
    )
    axes.set(xlabel="temperature T", ylabel="weight α of the teacher")
    interval = ", ± 95 % interval" if counts != [1] else ""
    write_footnote(figure, f"teacher {FP32_MOE}; ONNX Runtime; {seeds}{interval}")
    return figure


def _gains(evidence: Evidence) -> dict[tuple[float, float], Values]:
    """By temperature and alpha: points of test accuracy above the student without a teacher, per seed."""
    gains = {}
    for name in evidence.find(STUDENT):
        if runs := evidence.found(name):
            settings = runs[0].config["step"]["distillation"]
            values = [_accuracy(run) - _accuracy(evidence.run(NO_KD, run.seed)) for run in runs]
            gains[settings["temperature"], settings["alpha"]] = np.array(values)
    return gains


def _with_interval(values: Values) -> str:
    half = half_width(values)
    return f"{values.mean():+.2f}" + ("" if half is None else f"\n± {half:.2f}")


CLAIM_FIGURES: dict[str, Callable[[Evidence], Figure | None]] = {
    draw.__name__: draw
    for draw in (
        student_against_teacher,
        calibration_before_and_after,
        load_by_balance,
        expert_by_digit,
        accuracy_by_calibration,
        temperature_and_alpha,
    )
}


def note_seeds(figure: Figure, evidence: Evidence, text: str) -> None:
    """A footnote that says how many seeds stand behind a figure."""
    count = len(evidence.seeds)
    write_footnote(figure, f"ONNX Runtime; {count} seed{'s' if count > 1 else ''}; {text}")


def _draw_by_digit(axes: Axes, table: Values, fmt: str, title: str, unit: str) -> None:
    texts = [[format(value, fmt) for value in row] for row in table] if table.size <= 12 * 12 else ()
    draw_heatmap(axes, table, x_labels=range(table.shape[1]), y_labels=range(len(table)), texts=texts, bar_label=unit)
    axes.set(xlabel="digit", ylabel="expert")
    axes.set_title(title, fontsize=10)


def half_width(values: Values) -> float | None:
    """Of the 95 % interval of the mean; None for a single seed."""
    return confidence_interval(list(values)) if len(values) > 1 else None


def _mean(runs: list[Record], figure: Callable[[Record], float]) -> float:
    return float(np.mean([figure(run) for run in runs]))


def _entropy(load: list[float]) -> float:
    shares = np.array(load)
    return float(-(shares * np.log(np.maximum(shares, 1e-12))).sum())


def _accuracy(record: Record) -> float:
    return 100 * record.measurements["onnxruntime"].test_acc
