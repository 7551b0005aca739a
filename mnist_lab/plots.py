"""One function per figure, from records alone: nothing is trained or measured, and torch is not imported.

Every function takes the records of one results folder and returns a figure, or None where the records
hold nothing to draw. Models are compared in ONNX Runtime, the engine that runs all of them. A colour
stands for a row of the table, a marker for its variants, a hollow marker for INT8.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from mnist_lab.files import write_atomically
from mnist_lab.measure import NUM_BINS
from mnist_lab.records import TABLE_BATCHES, Measurement, Record, build_table, confidence_interval

RUNTIME = "onnxruntime"
LATENCIES = [f"latency_ms_b{batch}" for batch in TABLE_BATCHES]
PARETO_COLUMNS = ["test_acc", "file_mb", "latency_ms_b64"]
MAX_MOE_VARIANTS = 4
DOTS_PER_INCH = 150

_HUES = sns.color_palette("colorblind").as_hex()
COLORS = ["#000000", *(_HUES[index] for index in (0, 1, 2, 9, 3, 4, 5, 7, 6, 8))]
MARKERS = "osD^vPX<>ph*"
MUTED = "#767676"
SIZE_LABEL = "deployed file (MB = 10⁶ bytes)"
ACCURACY_LABEL = "test accuracy (%)"


@dataclass(frozen=True)
class Model:
    """A model of the table in ONNX Runtime: its row, its runs by seed, and how it is drawn."""

    name: str
    row: pd.Series
    runs: list[Record]
    color: str
    marker: str

    @property
    def measurements(self) -> list[Measurement]:
        return [record.measurements[RUNTIME] for record in self.runs]

    @property
    def face(self) -> str:
        return "white" if self.row["precision"] == "INT8" else self.color

    @property
    def accuracy_error(self) -> list[list[float]] | None:
        """Student-t 95 % interval in points below and above the mean, ending at 100 %; None for one seed."""
        if math.isnan(self.row["test_acc_ci95"]):
            return None
        half_width, room = 100 * self.row["test_acc_ci95"], 100 * (1 - self.row["test_acc"])
        return [[half_width], [min(half_width, room)]]

    def latency_error(self, batch: int) -> list[list[float]]:
        """From median to the first and third quartile, in ms."""
        latency = self.measurements[0].latency_ms[str(batch)]
        median = latency["median_ms"]
        return [[max(0.0, median - latency["q1_ms"])], [max(0.0, latency["q3_ms"] - median)]]


def draw_all(folder: Path, records: Sequence[Record]) -> list[Path]:
    """Write every figure that the records have data for into `folder/plots`, and return the files.

    A figure without data is not drawn, and the file that an earlier run left of it is removed.

    Raises:
        UserError: the folder cannot be written.
    """
    paths = []
    for name, draw in FIGURES.items():
        path = folder / "plots" / f"{name}.png"
        figure = draw(records) if records else None
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            write_atomically(path, partial(figure.savefig, dpi=DOTS_PER_INCH))
            paths.append(path)
    return paths


def find_models(records: Iterable[Record]) -> list[Model]:
    """The models that ONNX Runtime measured, in the order of the table.

    Latencies are those of the first timed model's CPU and thread count; others do not compare, and are blanked.
    """
    runs: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        if RUNTIME in record.measurements:
            runs.setdefault(record.model, []).append(record)
    table = build_table(itertools.chain.from_iterable(runs.values())).query("runtime == @RUNTIME").set_index("model")
    conditions = pd.Series({name: (runs[name][0].machine["cpu"], table.loc[name, "threads"]) for name in table.index})
    timed = conditions[table[LATENCIES].notna().any(axis=1)]
    if len(timed):
        table.loc[conditions != timed.iloc[0], LATENCIES] = np.nan
    models, variants = [], dict.fromkeys((run[0].order for run in runs.values()), 0)
    for name, row in table.iterrows():
        order = runs[str(name)][0].order
        marker = MARKERS[(order + 5 * variants[order]) % len(MARKERS)]
        variants[order] += 1
        models.append(Model(str(name), row, runs[str(name)], COLORS[order % len(COLORS)], marker))
    return models


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
    figure, (axes,) = _figure(records, "Accuracy against size", size=(9.5, 5.2))
    _scatter(axes, models, "file_mb")
    _logarithmic(axes, "x", SIZE_LABEL)
    axes.set_ylabel(ACCURACY_LABEL)
    _legend(figure, models)
    _footnote(figure, models)
    return figure


def accuracy_vs_time(records: Sequence[Record]) -> Figure | None:
    """Test accuracy over the median latency, one panel per batch size; models without latency are left out."""
    models = _timed(find_models(records))
    if not models:
        return None
    figure, panels = _figure(
        records, "Accuracy against latency", columns=len(TABLE_BATCHES), size=(13, 5.2), sharey=True
    )
    for axes, batch, column in zip(panels, TABLE_BATCHES, LATENCIES, strict=True):
        _scatter(axes, _timed(models, column), column, batch=batch)
        _logarithmic(axes, "x", f"latency of a batch of {batch} (ms)")
    panels[0].set_ylabel(ACCURACY_LABEL)
    _legend(figure, models)
    _footnote(figure, models, latency=True)
    return figure


def pareto_frontier(records: Sequence[Record]) -> Figure | None:
    """The models that none beats in accuracy, file size and latency at once, named first; the others muted."""
    models = _timed(find_models(records), "latency_ms_b64")
    if not models:
        return None
    front = pareto_set(_rows(models))
    best = [model for model in models if model.name in front]
    others = [model for model in models if model.name not in front]
    title = "Pareto frontier of accuracy, file size and latency at batch 64"
    figure, panels = _figure(records, title, columns=2, size=(12.5, 5.5), sharey=True)
    for axes, column, label in zip(
        panels, PARETO_COLUMNS[1:], (SIZE_LABEL, "latency of a batch of 64 (ms)"), strict=True
    ):
        _scatter(axes, others, column, alpha=0.3)
        _scatter(axes, best, column, batch=64 if column != "file_mb" else None)
        steps = _rows(best).sort_values([column, "test_acc"], ascending=[True, False])
        steps = steps[steps["test_acc"] > steps["test_acc"].cummax().shift(fill_value=-1)]
        axes.step(steps[column], 100 * steps["test_acc"], where="post", color=MUTED, linestyle="--", zorder=1)
        _logarithmic(axes, "x", label)
    panels[0].set_ylabel(ACCURACY_LABEL)
    _legend(figure, best, muted=others)
    _footnote(figure, models, latency=True, note="dashed: frontier of the panel's two figures")
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
    figure, all_axes = _figure(records, "Comparison, shorter is better", rows=2, columns=3, size=size, sharey=True)
    for axes, (column, label, scale) in zip(all_axes, panels, strict=True):
        for place, model in enumerate(models):
            value = scale * (1 - model.row[column] if column == "test_acc" else model.row[column])
            _bar(axes, place, model, value, _bar_error(model, column))
        axes.set(xlabel=label, yticks=range(len(models)), yticklabels=[model.name for model in models])
        axes.margins(x=0.22)
        axes.set_xlim(left=0)
        axes.grid(visible=False, axis="y")
    all_axes[0].invert_yaxis()
    _footnote(figure, models, latency=True)
    return figure


def normalized_comparison(records: Sequence[Record]) -> Figure | None:
    """A radar per model: how many times worse than the best model it is, on a logarithmic radius, rim = best."""
    models = find_models(records)
    if not models:
        return None
    radii, decades = radar_radii(_rows(models))
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
    figure, panels = _figure(
        records,
        "Normalized comparison, rim = best model",
        cells=len(models),
        columns=columns,
        size=size,
        projection="polar",
    )
    for axes, model in zip(panels, models, strict=True):
        assert isinstance(axes, PolarAxes)
        _radar(axes, labels, radii.loc[model.name].to_numpy(), model, decades)
        axes.plot(*_closed(radii.iloc[0].to_numpy()), color=MUTED, linestyle="--", linewidth=1)
    note = f"batch: its latency; rings: times worse than the best model; dashed: {models[0].name}"
    _footnote(figure, models, latency=True, bars=False, note=note)
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
    figure, panels = _figure(records, "Training curves", cells=len(series), columns=2, size=size)
    for axes, (label, value_of) in zip(panels, series, strict=True):
        for model in models:
            _curve(axes, model, value_of)
        _logarithmic(axes, "y", label)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, models, linestyle="-")
    seeds = max(len(model.runs) for model in models)
    note = "mean and single seeds, " if seeds > 1 else ""
    _write_footnote(figure, f"{note}loss terms as weighted in the objective, mean over the epoch as it ran")
    return figure


def confidence_histogram(records: Sequence[Record]) -> Figure | None:
    """How sure the teacher, its student and the student without a teacher are of their test predictions."""
    models = find_models(records)
    student = _find(models, "KD_FFN_Student")
    teacher = next((m for m in models if student and m.name == (student.runs[0].parent or {}).get("model")), None)
    if student is None or teacher is None:
        return None
    control = _find(models, "FFN_Student_no_KD")
    shown = [
        (teacher, "teacher"),
        (student, "distilled student"),
        *([(control, "student, no teacher")] if control else []),
    ]
    figure, panels = _figure(
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
        _logarithmic(axes, "y", "")
    panels[0].set_ylabel("share of test images (%)")
    seeds = len(student.runs)
    spread_note = f", mean of {seeds} seeds, bars: lowest and highest seed" if seeds > 1 else ", one seed"
    _write_footnote(figure, f"ONNX Runtime; {NUM_BINS} bins{spread_note}")
    return figure


def reliability_diagram(records: Sequence[Record]) -> Figure | None:
    """Accuracy over confidence in 15 bins, seeds pooled, a panel per model; the calibrated one is on the diagonal."""
    models = find_models(records)
    if not models:
        return None
    columns = min(5, len(models))
    size = (max(6, 2.7 * columns), 2.8 * math.ceil(len(models) / columns) + 0.9)
    figure, panels = _figure(
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
    _outer_labels(panels, columns, "mean confidence", "accuracy")
    counts = ", ".join(f"{images:,}" for images in (1, 100, 10_000))
    note = "; bars: lowest and highest seed" if max(len(model.runs) for model in models) > 1 else ""
    _write_footnote(figure, f"ONNX Runtime; 15 bins, area grows with the logarithm of a bin's images ({counts}){note}")
    return figure


def expert_load(records: Sequence[Record]) -> Figure | None:
    """Per MoE, first seed: every expert's share of the load over training, and of each class in the end."""
    models = [m for m in find_models(records) if m.runs[0].expert_by_class and m.runs[0].curves][:MAX_MOE_VARIANTS]
    if not models:
        return None
    figure, panels = _figure(records, "Expert load", rows=len(models), columns=2, size=(12, 3.6 * len(models) + 0.9))
    class_name = "class" if models[0].runs[0].dataset in {"fashion-mnist", "kmnist"} else "digit"
    for model, load_axes, class_axes in zip(models, panels[::2], panels[1::2], strict=True):
        record = model.runs[0]
        _load_curves(load_axes, record)
        by_expert = 100 * np.array(record.expert_by_class).T
        few = len(by_expert) <= 12
        sns.heatmap(
            by_expert, ax=class_axes, cmap="cividis", vmin=0, annot=few, fmt=".0f", annot_kws={"fontsize": 8},
            linewidths=0.5 if few else 0, cbar_kws={"label": f"share of the {class_name}'s test pairs (%)"},
        )  # fmt: skip
        class_axes.set(xlabel=class_name, ylabel="expert")
        class_axes.set_title(f"{model.name}: who gets which {class_name}, test images", fontsize=10)
    _write_footnote(figure, f"first seed ({models[0].runs[0].seed}); a pair is one image at one of its experts")
    return figure


def confusion_matrices(records: Sequence[Record]) -> Figure | None:
    """Which digits a model's first seed takes for which: errors shaded and counted, the right ones left blank."""
    models = find_models(records)
    if not models:
        return None
    columns = min(5, len(models))
    size = (max(6, 3.1 * columns), 3.7 * math.ceil(len(models) / columns) + 0.8)
    figure, panels = _figure(records, "Test errors by class", cells=len(models), columns=columns, size=size)
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
            axes.text(predicted, true, str(count), ha="center", va="center", fontsize=6.5, color=color)
        axes.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
        axes.grid(visible=False)
        axes.scatter(range(len(matrix)), range(len(matrix)), marker="s", s=30, color="#d9d9d9", linewidths=0)
        axes.tick_params(labelsize=8, length=0)
        axes.set_title(f"{model.name}\n{matrix.sum()} errors", fontsize=9)
    _outer_labels(panels, columns, "predicted", "true")
    _write_footnote(figure, "ONNX Runtime, first seed of each model; grey: right predictions, not counted")
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
    )
}


def _figure(
    records: Sequence[Record],
    title: str,
    *,
    size: tuple[float, float],
    rows: int = 1,
    columns: int = 1,
    cells: int | None = None,
    projection: str | None = None,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A titled figure and its panels, row by row: `rows` × `columns`, or as many rows as `cells` panels fill."""
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.08))
    FigureCanvasAgg(figure)
    first = records[0]
    figure.suptitle(f"{title} — {first.dataset} · {first.preset} · {first.recipe}", fontsize=13)
    rows = rows if cells is None else math.ceil(cells / columns)
    grid = figure.subplots(
        rows, columns, squeeze=False, subplot_kw={"projection": projection}, sharex=sharex, sharey=sharey
    )
    panels: list[Axes] = list(grid.flat)
    for axes in panels[cells:] if cells is not None else []:
        axes.remove()
    panels = panels[:cells]
    for axes in panels:
        axes.set_axisbelow(True)
        axes.grid(visible=True, color="#e3e3e3", linewidth=0.7)
        for side in {"top", "right"} & set(axes.spines):
            axes.spines[side].set_visible(False)
    return figure, panels


def _rows(models: Sequence[Model]) -> pd.DataFrame:
    return pd.DataFrame({model.name: model.row for model in models}).T


def _timed(models: Sequence[Model], column: str | None = None) -> list[Model]:
    return [model for model in models if model.row[[column] if column else LATENCIES].notna().any()]


def _find(models: Sequence[Model], name: str) -> Model | None:
    """The model of that name, else the first of its variants."""
    family = [model for model in models if model.name.partition("-")[0] == name]
    return min(family, key=lambda model: model.name != name, default=None)


def _scatter(axes: Axes, models: Sequence[Model], column: str, *, batch: int | None = None, alpha: float = 1) -> None:
    for model in models:
        axes.errorbar(
            [model.row[column]],
            [100 * model.row["test_acc"]],
            xerr=model.latency_error(batch) if batch else None,
            yerr=model.accuracy_error,
            **_look(model),
            elinewidth=1,
            capsize=3,
            alpha=alpha,
        )


def _look(model: Model) -> dict[str, Any]:
    return {
        "color": model.color,
        "marker": model.marker,
        "markersize": 8,
        "markerfacecolor": model.face,
        "markeredgecolor": model.color,
        "markeredgewidth": 1.6,
    }


def _legend(
    figure: Figure, models: Sequence[Model], *, muted: Sequence[Model] = (), linestyle: Literal["-", "none"] = "none"
) -> None:
    handles = [Line2D([], [], **_look(model), linestyle=linestyle, label=model.name) for model in models]
    handles += [Line2D([], [], **_look(m), linestyle="none", alpha=0.35, label=f"{m.name} (dominated)") for m in muted]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)


def _logarithmic(axes: Axes, which: str, label: str) -> None:
    """A logarithmic axis with a margin, whose ticks are plain numbers however short it is."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.axes.set(**{f"{which}scale": "log"})
    low, high = axis.get_view_interval()
    subs = (1, 2, 3, 5, 7) if high / low < 20 else (1, 2, 5) if high / low < 200 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    if label:
        axis.set_label_text(label)


def _footnote(
    figure: Figure, models: Sequence[Model], *, latency: bool = False, bars: bool = True, note: str = ""
) -> None:
    """Say where the figures hold, what the bars are, and who is missing."""
    seeds = sorted({len(model.runs) for model in models})
    parts = ["ONNX Runtime", f"{'–'.join(str(count) for count in seeds)} seed{'s' if seeds != [1] else ''}"]
    if seeds != [1] and bars:
        parts[-1] += ", bars: 95 % interval"
    timed = _timed(models)
    if latency and timed:
        threads, cpu = int(timed[0].row["threads"]), timed[0].runs[0].machine["cpu"]
        parts += [
            f"latency: median{' and quartiles' if bars else ''}, {threads} thread{'s' if threads > 1 else ''}, {cpu}"
        ]
    parts += [note] if note else []
    _write_footnote(figure, "; ".join(parts))


def _write_footnote(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=8.5, color=MUTED)


def _bar_error(model: Model, column: str) -> list[list[float]] | None:
    """Distances from a bar's end, in the unit of its panel: intervals over seeds, quartiles of latencies."""
    if column in LATENCIES:
        return None if pd.isna(model.row[column]) else model.latency_error(TABLE_BATCHES[LATENCIES.index(column)])
    if column == "file_mb" or len(model.runs) < 2:
        return None
    if column == "test_acc":
        value, half_width = 1 - model.row["test_acc"], model.row["test_acc_ci95"]
    else:
        value, half_width = model.row["ece"], confidence_interval([m.test_ece for m in model.measurements])
    return [[100 * min(half_width, value)], [100 * half_width]]


def _bar(axes: Axes, place: int, model: Model, value: float, error: list[list[float]] | None) -> None:
    if math.isnan(value):
        axes.annotate(
            "not measured", (0, place), (4, 0), textcoords="offset points", va="center", fontsize=8, color=MUTED
        )
        return
    hatch = "////" if model.face == "white" else ""
    axes.barh(place, value, color=model.face, edgecolor=model.color, hatch=hatch, linewidth=1.2, height=0.7)
    if error is not None:
        axes.errorbar(value, place, xerr=error, fmt="none", ecolor="#9a9a9a", elinewidth=1.4, capsize=3)
    end = value + (error[1][0] if error is not None else 0)
    axes.annotate(f"{value:#.3g}", (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8)


def _closed(radii: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Angles and radii of a radar's outline, back to its start."""
    angles = np.arange(len(radii) + 1) * 2 * np.pi / len(radii)
    return angles, np.append(radii, radii[:1])


def _radar(axes: PolarAxes, labels: list[str], radii: npt.NDArray[np.float64], model: Model, decades: float) -> None:
    axes.set_theta_zero_location("N")
    axes.plot(*_closed(radii), **(_look(model) | {"markersize": 4}), linewidth=1.8, clip_on=False)
    if not np.isnan(radii).any():
        axes.fill(*_closed(radii), color=model.color, alpha=0.12)
    axes.set_xticks(_closed(radii)[0][:-1], labels, fontsize=8)
    for angle, label in zip(_closed(radii)[0], axes.get_xticklabels(), strict=False):
        side = round(float(np.sin(angle)), 6)
        label.set_horizontalalignment("center" if side == 0 else "right" if side > 0 else "left")
    rings = [times for times in (2, 5, 10, 100) if math.log10(times) < 0.9 * decades]
    axes.set_yticks([1 - math.log10(times) / decades for times in rings], [f"{times}×" for times in rings], fontsize=7)
    axes.set_rlabel_position(180 / len(radii))
    axes.set_ylim(0, 1.02)
    axes.set_title(model.name, fontsize=10, pad=12)


def _curve(axes: Axes, model: Model, value_of: Callable[[dict[str, Any]], float]) -> None:
    curves = [{epoch["epoch"]: value_of(epoch) for epoch in record.curves} for record in model.runs]
    by_seed = pd.DataFrame(curves).T.sort_index().dropna(how="all")
    if len(by_seed.columns) > 1:
        axes.plot(by_seed.index, by_seed, color=model.color, linewidth=0.6, alpha=0.5)
    look = _look(model) | {"markersize": 4.5, "markeredgewidth": 1}
    axes.plot(by_seed.index, by_seed.mean(axis=1), **look, linewidth=1.6, markevery=max(1, len(by_seed) // 10))


def _load_curves(axes: Axes, record: Record) -> None:
    epochs = [epoch["epoch"] for epoch in record.curves]
    loads = 100 * np.array([epoch["expert_load"] for epoch in record.curves])
    num_experts = loads.shape[1]
    for expert in range(num_experts):
        marker = MARKERS[expert % len(MARKERS)]
        axes.plot(epochs, loads[:, expert], marker=marker, color=COLORS[expert % len(COLORS)], label=f"expert {expert}")
    axes.axhline(100 / num_experts, color=MUTED, linestyle="--", label=f"even share, {100 / num_experts:.3g} %")
    if num_experts <= 12:
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set(xlabel="epoch", ylabel="share of training pairs (%)", ylim=(0, 1.1 * loads.max()))
    axes.set_title(f"{record.model}: load over training", fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _outer_labels(panels: Sequence[Axes], columns: int, x_label: str, y_label: str) -> None:
    """Name the axes of the left and the lowest panels only."""
    for place, axes in enumerate(panels):
        if place % columns == 0:
            axes.set_ylabel(y_label)
        if place + columns >= len(panels):
            axes.set_xlabel(x_label)
            axes.tick_params(labelbottom=True)
