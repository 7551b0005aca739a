"""One function per figure, from records alone. No torch here.

Every figure function takes the records of one results folder and returns a matplotlib Figure, or None
where the records have no data for it.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import MaxNLocator

from mnist_lab.files import write_atomically
from mnist_lab.measure import NUM_BINS
from mnist_lab.report.drawing import (
    ACCURACY_LABEL,
    COLORS,
    LATENCIES,
    MARKERS,
    MUTED,
    SIZE_LABEL,
    bar_error,
    closed,
    describe_conditions,
    draw_bar,
    draw_curve,
    draw_legend,
    draw_load,
    draw_points,
    draw_radar,
    find_model,
    find_models,
    label_outer,
    make_figure,
    make_logarithmic,
    rows_of,
    with_latency,
    write_footnote,
)
from mnist_lab.report.records import CLAIMS_FOLDER, TABLE_BATCHES, Record, build_table, first_seeds
from mnist_lab.studies.claims.evidence import Evidence
from mnist_lab.studies.claims.figures import CLAIM_FIGURES

PARETO_COLUMNS = ["test_acc", "file_mb", "latency_ms_b64"]
MAX_MOE_VARIANTS = 4
DOTS_PER_INCH = 120


def draw_all(folder: Path, records: Sequence[Record]) -> list[Path]:
    """Write every figure that the records have data for into `folder/plots`, and return the files.

    A figure without data is not drawn, and the file that an earlier run left of it is removed. A folder of claims
    has figures of its own.

    Raises:
        UserError: the folder cannot be written.
    """
    if folder.name == CLAIMS_FOLDER:
        evidence = Evidence.in_folder(folder, records)
        figures = {name: draw(evidence) for name, draw in CLAIM_FIGURES.items()}
    else:
        figures = {name: draw(records) if records else None for name, draw in FIGURES.items()}
    paths = []
    for name, figure in figures.items():
        path = folder / "plots" / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            figure.set_dpi(DOTS_PER_INCH)
            # savefig would lay the figure out twice.
            write_atomically(path, FigureCanvasAgg(figure).print_png)
            paths.append(path)
    return paths


def pareto_set(table: pd.DataFrame) -> list[Any]:
    """Index of the rows that no other dominates in accuracy, file size and latency at batch 64.

    A row dominates another when it is nowhere worse and somewhere better; equal rows both stay. Rows
    with a blank among the three are not compared.
    """
    rows = table[PARETO_COLUMNS].dropna()
    costs = rows.to_numpy(dtype=float) * [-1, 1, 1]
    dominated = [bool(((costs <= cost).all(axis=1) & (costs < cost).any(axis=1)).any()) for cost in costs]
    return list(rows.index[~np.array(dominated, dtype=bool)])


def radar_radii(table: pd.DataFrame) -> tuple[pd.DataFrame, float]:
    """Per model and cost 1 − log10(times worse than the best) / decades, in [0, 1], and the decades of the radius.

    A cost of zero, no error at all, counts as half of the lowest other one. Blanks stay, columns of blanks go.
    """
    costs = table[["ece", "params_active", "file_mb", *LATENCIES]].astype(float).dropna(axis="columns", how="all")
    costs.insert(0, "error", 1 - table["test_acc"].astype(float))
    costs = costs.apply(lambda cost: cost.mask(cost == 0, cost[cost > 0].min() / 2 if cost.any() else 1))
    decades_worse = np.log10(costs / costs.min())
    decades = max(1.0, 1.08 * float(decades_worse.max().max()))
    return 1 - decades_worse / decades, decades


def accuracy_vs_size(records: Sequence[Record]) -> Figure | None:
    """Test accuracy over the size of the deployed file."""
    models = find_models(records)
    if not models:
        return None
    figure, (axes,) = make_figure(records, "Accuracy against size", size=(9.5, 5.2))
    draw_points(axes, models, "file_mb")
    make_logarithmic(axes, "x", SIZE_LABEL)
    axes.set_ylabel(ACCURACY_LABEL)
    draw_legend(figure, models)
    describe_conditions(figure, models)
    return figure


def accuracy_vs_time(records: Sequence[Record]) -> Figure | None:
    """Test accuracy over the median latency, one panel per batch size; models without latency are left out."""
    models = with_latency(find_models(records))
    if not models:
        return None
    figure, panels = make_figure(
        records, "Accuracy against latency", columns=len(TABLE_BATCHES), size=(13, 5.2), sharey=True
    )
    for axes, batch, column in zip(panels, TABLE_BATCHES, LATENCIES, strict=True):
        draw_points(axes, with_latency(models, column), column, batch=batch)
        make_logarithmic(axes, "x", f"latency of a batch of {batch} (ms)")
    panels[0].set_ylabel(ACCURACY_LABEL)
    draw_legend(figure, models)
    describe_conditions(figure, models, latency=True)
    return figure


def pareto_frontier(records: Sequence[Record]) -> Figure | None:
    """The models that none beats in accuracy, file size and latency at once, named first; the others muted."""
    models = with_latency(find_models(records), "latency_ms_b64")
    if not models:
        return None
    front = pareto_set(rows_of(models))
    best = [model for model in models if model.name in front]
    others = [model for model in models if model.name not in front]
    title = "Pareto frontier of accuracy, file size and latency at batch 64"
    figure, panels = make_figure(records, title, columns=2, size=(12.5, 5.5), sharey=True)
    for axes, column, label in zip(
        panels, PARETO_COLUMNS[1:], (SIZE_LABEL, "latency of a batch of 64 (ms)"), strict=True
    ):
        draw_points(axes, others, column, alpha=0.3)
        draw_points(axes, best, column, batch=64 if column != "file_mb" else None)
        steps = rows_of(best).sort_values([column, "test_acc"], ascending=[True, False])
        steps = steps[steps["test_acc"] > steps["test_acc"].cummax().shift(fill_value=-1)]
        axes.step(steps[column], 100 * steps["test_acc"], where="post", color=MUTED, linestyle="--", zorder=1)
        make_logarithmic(axes, "x", label)
    panels[0].set_ylabel(ACCURACY_LABEL)
    draw_legend(figure, best, muted=others)
    describe_conditions(figure, models, latency=True, note="dashed: frontier of the panel's two figures")
    return figure


def comparison_bars(records: Sequence[Record]) -> Figure | None:
    """Error, calibration error, file size and latencies of every model, as bars from zero."""
    models = find_models(records)
    if not models:
        return None
    panels: list[tuple[str, str, float]] = [
        ("test_acc", "test error (%)", 100),
        ("ece", "expected calibration error (%)", 100),
        ("file_mb", SIZE_LABEL, 1),
        *((f"latency_ms_b{batch}", f"latency of a batch of {batch} (ms)", 1) for batch in TABLE_BATCHES),
    ]
    size = (13, 2.4 + 0.6 * len(models))
    figure, all_axes = make_figure(records, "Comparison, shorter is better", rows=2, columns=3, size=size, sharey=True)
    for axes, (column, label, scale) in zip(all_axes, panels, strict=True):
        for place, model in enumerate(models):
            value = scale * (1 - model.row[column] if column == "test_acc" else model.row[column])
            draw_bar(axes, place, model, value, bar_error(model, column))
        axes.set(xlabel=label, yticks=range(len(models)), yticklabels=[model.name for model in models])
        axes.margins(x=0.22)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
    all_axes[0].invert_yaxis()
    describe_conditions(figure, models, latency=True)
    return figure


def normalized_comparison(records: Sequence[Record]) -> Figure | None:
    """A radar per model: how many times worse than the best model it is, on a logarithmic radius, rim = best."""
    models = find_models(records)
    if not models:
        return None
    radii, decades = radar_radii(rows_of(models))
    names = {
        "error": "test error",
        "ece": "calibration\nerror",
        "params_active": "active\nparameters",
        "file_mb": "file",
    }
    names |= {column: f"batch {batch}" for column, batch in zip(LATENCIES, TABLE_BATCHES, strict=True)}
    labels = [names.get(column, column) for column in map(str, radii)]
    columns = math.ceil(len(models) / math.ceil(len(models) / 4))
    size = (max(7, 3.7 * columns), 2.9 * math.ceil(len(models) / columns) + 0.8)
    figure, panels = make_figure(
        records,
        "Normalized comparison, rim = best model",
        cells=len(models),
        columns=columns,
        size=size,
        projection="polar",
    )
    for axes, model in zip(panels, models, strict=True):
        assert isinstance(axes, PolarAxes)
        draw_radar(axes, labels, radii.loc[model.name].to_numpy(), model, decades)
        axes.plot(*closed(radii.iloc[0].to_numpy()), color=MUTED, linestyle="--", linewidth=1)
    note = f"batch: its latency; rings: times worse than the best model; dashed: {models[0].name}"
    describe_conditions(figure, models, latency=True, bars=False, note=note)
    return figure


def training_curves(records: Sequence[Record]) -> Figure | None:
    """Validation error and each weighted term of the training loss, per epoch: the mean, and every seed thin."""
    models = [model for model in find_models(records) if model.runs[0].curves]
    if not models:
        return None
    terms = list(
        dict.fromkeys(term for model in models for epoch in model.runs[0].curves for term in epoch["train_terms"])
    )
    series: list[tuple[str, Callable[[dict[str, Any]], float]]] = [
        ("validation error (%)", lambda epoch: 100 * (1 - epoch["validation_acc"])),
        *(
            (
                f"training loss: {term.replace('_', ' ')} (nats)",
                lambda epoch, term=term: epoch["train_terms"].get(term, np.nan),
            )
            for term in terms
        ),
    ]
    size = (11.5, 4 * math.ceil(len(series) / 2) + 0.8)
    figure, panels = make_figure(records, "Training curves", cells=len(series), columns=2, size=size)
    for axes, (label, value_of) in zip(panels, series, strict=True):
        for model in models:
            draw_curve(axes, model, value_of)
        make_logarithmic(axes, "y", label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    draw_legend(figure, models, linestyle="-")
    seeds = max(len(model.runs) for model in models)
    note = "mean and single seeds, " if seeds > 1 else ""
    write_footnote(figure, f"{note}loss terms as weighted in the objective, mean over the epoch as it ran")
    return figure


def confidence_histogram(records: Sequence[Record]) -> Figure | None:
    """How sure the teacher, its student and the student without a teacher are of their test predictions."""
    models = find_models(records)
    student = find_model(models, "KD_FFN_Student")
    teacher = next((m for m in models if student and m.name == (student.runs[0].parent or {}).get("model")), None)
    if student is None or teacher is None:
        return None
    control = find_model(models, "FFN_Student_no_KD")
    shown = [
        (teacher, "teacher"),
        (student, "distilled student"),
        *([(control, "student, no teacher")] if control else []),
    ]
    figure, panels = make_figure(
        records, "Confidence of test predictions", columns=len(shown), size=(4.2 * len(shown), 4.4), sharey=True
    )
    edges = np.arange(NUM_BINS + 1) / NUM_BINS
    for axes, (model, role) in zip(panels, shown, strict=True):
        counts = np.array([measurement.bins["count"] for measurement in model.measurements])
        shares = 100 * counts / counts.sum(axis=1, keepdims=True)
        mean, low, high = shares.mean(axis=0), shares.min(axis=0), shares.max(axis=0)
        axes.bar(edges[:-1], mean, width=1 / NUM_BINS, align="edge", color=model.color, alpha=0.75, edgecolor="white")
        if len(counts) > 1:
            drawn = mean > 0
            centers = (edges[:-1] + edges[1:]) / 2
            spread = np.stack([mean - low, high - mean])[:, drawn]
            axes.errorbar(centers[drawn], mean[drawn], spread, fmt="none", ecolor=MUTED, elinewidth=1, capsize=2)
        sums = np.array([measurement.bins["confidence_sum"] for measurement in model.measurements])
        axes.set_title(f"{role}: {model.name}\nmean confidence {100 * sums.sum() / counts.sum():.2f} %", fontsize=10)
        axes.set(xlabel="probability of the predicted class", xlim=(0, 1))
        make_logarithmic(axes, "y", "")
    panels[0].set_ylabel("share of test images (%)")
    seeds = len(student.runs)
    spread_note = f", mean of {seeds} seeds, bars: lowest and highest seed" if seeds > 1 else ", one seed"
    write_footnote(figure, f"ONNX Runtime; {NUM_BINS} bins{spread_note}")
    return figure


def reliability_diagram(records: Sequence[Record]) -> Figure | None:
    """Accuracy over confidence in 15 bins, seeds pooled, a panel per model; the calibrated one is on the diagonal."""
    models = find_models(records)
    if not models:
        return None
    columns = min(5, len(models))
    size = (max(6, 2.7 * columns), 2.8 * math.ceil(len(models) / columns) + 0.9)
    figure, panels = make_figure(
        records, "Reliability", cells=len(models), columns=columns, size=size, sharex=True, sharey=True
    )
    for axes, model in zip(panels, models, strict=True):
        count, confidence_sum, correct = (
            np.array([measurement.bins[key] for measurement in model.measurements], dtype=float)
            for key in ("count", "confidence_sum", "correct")
        )
        filled = count.sum(axis=0) > 0
        confidence = confidence_sum.sum(axis=0)[filled] / count.sum(axis=0)[filled]
        accuracy = correct.sum(axis=0)[filled] / count.sum(axis=0)[filled]
        axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1)
        axes.plot(confidence, accuracy, color=model.color, linewidth=1)
        if len(model.runs) > 1:
            by_seed = np.divide(correct, count, out=np.full_like(count, np.nan), where=count > 0)[:, filled]
            spread = [accuracy - np.nanmin(by_seed, axis=0), np.nanmax(by_seed, axis=0) - accuracy]
            axes.errorbar(confidence, accuracy, spread, fmt="none", ecolor=MUTED, elinewidth=1, capsize=2)
        area = 8 + 30 * np.log10(count.mean(axis=0)[filled] + 1)
        axes.scatter(confidence, accuracy, s=area, marker="o", facecolors=model.face, edgecolors=model.color, zorder=3)
        axes.set_title(f"{model.name}\nECE {100 * model.row['ece']:.2f} %", fontsize=9)
        axes.set(xlim=(-0.02, 1.06), ylim=(-0.06, 1.06), aspect="equal")
    label_outer(panels, columns, "mean confidence", "accuracy")
    counts = ", ".join(f"{images:,}" for images in (1, 100, 10_000))
    note = "; bars: lowest and highest seed" if max(len(model.runs) for model in models) > 1 else ""
    write_footnote(figure, f"ONNX Runtime; 15 bins, area grows with the logarithm of a bin's images ({counts}){note}")
    return figure


def expert_load(records: Sequence[Record]) -> Figure | None:
    """Per MoE, first seed: every expert's share of the load over training, and of each class in the end."""
    found = [m for m in find_models(records) if m.runs[0].expert_by_class and m.runs[0].curves]
    models = found[:MAX_MOE_VARIANTS]
    if not models:
        return None
    figure, panels = make_figure(
        records, "Expert load", rows=len(models), columns=2, size=(12, 3.6 * len(models) + 0.9)
    )
    class_name = "class" if models[0].runs[0].dataset in {"fashion-mnist", "kmnist"} else "digit"
    for model, load_axes, class_axes in zip(models, panels[::2], panels[1::2], strict=True):
        record = model.runs[0]
        draw_load(load_axes, record)
        by_expert = 100 * np.array(record.expert_by_class).T
        few = len(by_expert) <= 12
        sns.heatmap(
            by_expert, ax=class_axes, cmap="cividis", vmin=0, annot=few, fmt=".0f", annot_kws={"fontsize": 8},
            linewidths=0.5 if few else 0, cbar_kws={"label": f"share of the {class_name}'s test pairs (%)"},
        )  # fmt: skip
        class_axes.set(xlabel=class_name, ylabel="expert")
        class_axes.set_title(f"{model.name}: who gets which {class_name}, test images", fontsize=10)
    more = f"; {len(found) - len(models)} more not shown" if len(found) > len(models) else ""
    write_footnote(figure, f"first seed ({models[0].runs[0].seed}); a pair is one image at one of its experts{more}")
    return figure


def confusion_matrices(records: Sequence[Record]) -> Figure | None:
    """Which digits a model's first seed takes for which: errors shaded and counted, the right ones left blank."""
    models = find_models(records)
    if not models:
        return None
    columns = min(5, len(models))
    size = (max(6, 3.1 * columns), 3.7 * math.ceil(len(models) / columns) + 0.8)
    figure, panels = make_figure(records, "Test errors by class", cells=len(models), columns=columns, size=size)
    errors = {model.name: np.array(model.measurements[0].confusion) for model in models}
    for matrix in errors.values():
        np.fill_diagonal(matrix, 0)
    highest = max(1, *(int(matrix.max()) for matrix in errors.values()))
    for axes, model in zip(panels, models, strict=True):
        matrix = errors[model.name]
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=highest)
        for true, predicted in np.argwhere(matrix > 0):
            count = matrix[true, predicted]
            color = "white" if count > 0.6 * highest else "black"
            text = axes.text(predicted, true, str(count), ha="center", va="center", fontsize=6.5, color=color)
            text.set_in_layout(False)  # hundreds of texts inside their cells, which no layout need measure
        axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
        axes.grid(visible=False)
        axes.scatter(range(len(matrix)), range(len(matrix)), marker="s", s=30, color="#d9d9d9", linewidths=0)
        axes.tick_params(labelsize=8, length=0)
        axes.set_title(f"{model.name}\n{matrix.sum()} errors", fontsize=9)
    label_outer(panels, columns, "predicted", "true")
    write_footnote(figure, "ONNX Runtime, first seed of each model; grey: right predictions, not counted")
    return figure


def latency_by_runtime(records: Sequence[Record]) -> Figure | None:
    """Median latency of every model in every runtime that timed it, first seed, a panel per batch size."""
    table = build_table(records)
    timed = table[table[LATENCIES].notna().any(axis=1)]
    if timed.empty:
        return None
    threads = timed["threads"].mode()[0]  # times on other numbers of threads do not compare
    timed = timed[timed["threads"] == threads]
    sessions = {
        m.latency_session for record in first_seeds(records) for m in record.measurements.values() if m.latency_ms
    }
    names = list(dict.fromkeys(timed["model"]))
    runtimes = sorted(timed["runtime"].unique())
    figure, panels = make_figure(
        records, "Latency by runtime", columns=len(LATENCIES), size=(13, 1.8 + 0.35 * len(names))
    )
    for axes, column, batch in zip(panels, LATENCIES, TABLE_BATCHES, strict=True):
        for runtime, color, marker in zip(runtimes, COLORS, MARKERS, strict=False):
            rows = timed[timed["runtime"] == runtime]
            places = [names.index(model) for model in rows["model"]]
            axes.plot(rows[column], places, marker, color=color, markersize=7, alpha=0.85, label=runtime)
        make_logarithmic(axes, "x", f"latency of a batch of {batch} (ms)")
        axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=9)
    note = f"median, {threads:.0f} thread{'s' if threads > 1 else ''}, {records[0].machine['cpu']}"
    if len(sessions) > 1:
        note += f", from {len(sessions)} sessions, whose times compare only roughly"
    write_footnote(figure, note)
    return figure


FIGURES: dict[str, Callable[[Sequence[Record]], Figure | None]] = {
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
}
