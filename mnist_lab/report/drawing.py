"""How a model and a figure look: colours, markers, axes, legends, footnotes. No torch here."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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

from mnist_lab.report.records import TABLE_BATCHES, Measurement, Record, build_table, confidence_interval

RUNTIME = "onnxruntime"
LATENCIES = [f"latency_ms_b{batch}" for batch in TABLE_BATCHES]

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


def make_figure(
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


def rows_of(models: Sequence[Model]) -> pd.DataFrame:
    return pd.DataFrame({model.name: model.row for model in models}).T


def with_latency(models: Sequence[Model], column: str | None = None) -> list[Model]:
    return [model for model in models if model.row[[column] if column else LATENCIES].notna().any()]


def find_model(models: Sequence[Model], name: str) -> Model | None:
    """The model of that name, else the first of its variants."""
    family = [model for model in models if model.name.partition("-")[0] == name]
    return min(family, key=lambda model: model.name != name, default=None)


def draw_points(
    axes: Axes, models: Sequence[Model], column: str, *, batch: int | None = None, alpha: float = 1
) -> None:
    for model in models:
        axes.errorbar(
            [model.row[column]],
            [100 * model.row["test_acc"]],
            xerr=model.latency_error(batch) if batch else None,
            yerr=model.accuracy_error,
            **look_of(model),
            elinewidth=1,
            capsize=3,
            alpha=alpha,
        )


def look_of(model: Model) -> dict[str, Any]:
    return {
        "color": model.color,
        "marker": model.marker,
        "markersize": 8,
        "markerfacecolor": model.face,
        "markeredgecolor": model.color,
        "markeredgewidth": 1.6,
    }


def draw_legend(
    figure: Figure, models: Sequence[Model], *, muted: Sequence[Model] = (), linestyle: Literal["-", "none"] = "none"
) -> None:
    handles = [Line2D([], [], **look_of(model), linestyle=linestyle, label=model.name) for model in models]
    handles += [
        Line2D([], [], **look_of(m), linestyle="none", alpha=0.35, label=f"{m.name} (dominated)") for m in muted
    ]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)


def make_logarithmic(axes: Axes, which: str, label: str) -> None:
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


def describe_conditions(
    figure: Figure, models: Sequence[Model], *, latency: bool = False, bars: bool = True, note: str = ""
) -> None:
    """Say where the figures hold, what the bars are, and who is missing."""
    seeds = sorted({len(model.runs) for model in models})
    parts = ["ONNX Runtime", f"{'–'.join(str(count) for count in seeds)} seed{'s' if seeds != [1] else ''}"]
    if seeds != [1] and bars:
        parts[-1] += ", bars: 95 % interval"
    timed = with_latency(models)
    if latency and timed:
        threads, cpu = int(timed[0].row["threads"]), timed[0].runs[0].machine["cpu"]
        parts += [
            f"latency: median{' and quartiles' if bars else ''}, {threads} thread{'s' if threads > 1 else ''}, {cpu}"
        ]
        if (sessions := len({model.measurements[0].latency_session for model in timed})) > 1:
            parts[-1] += f", from {sessions} sessions, whose times compare only roughly"
    parts += [note] if note else []
    write_footnote(figure, "; ".join(parts))


def write_footnote(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=8.5, color=MUTED)


def bar_error(model: Model, column: str) -> list[list[float]] | None:
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


def draw_bar(axes: Axes, place: int, model: Model, value: float, error: list[list[float]] | None) -> None:
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


def closed(radii: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Angles and radii of a radar's outline, back to its start."""
    angles = np.arange(len(radii) + 1) * 2 * np.pi / len(radii)
    return angles, np.append(radii, radii[:1])


def draw_radar(
    axes: PolarAxes, labels: list[str], radii: npt.NDArray[np.float64], model: Model, decades: float
) -> None:
    axes.set_theta_zero_location("N")
    axes.plot(*closed(radii), **(look_of(model) | {"markersize": 4}), linewidth=1.8, clip_on=False)
    if not np.isnan(radii).any():
        axes.fill(*closed(radii), color=model.color, alpha=0.12)
    axes.set_xticks(closed(radii)[0][:-1], labels, fontsize=8)
    for angle, label in zip(closed(radii)[0], axes.get_xticklabels(), strict=False):
        side = round(float(np.sin(angle)), 6)
        label.set_horizontalalignment("center" if side == 0 else "right" if side > 0 else "left")
    rings = [times for times in (2, 5, 10, 100) if math.log10(times) < 0.9 * decades]
    axes.set_yticks([1 - math.log10(times) / decades for times in rings], [f"{times}×" for times in rings], fontsize=7)
    axes.set_rlabel_position(180 / len(radii))
    axes.set_ylim(0, 1.02)
    axes.set_title(model.name, fontsize=10, pad=12)


def draw_curve(axes: Axes, model: Model, value_of: Callable[[dict[str, Any]], float]) -> None:
    curves = [{epoch["epoch"]: value_of(epoch) for epoch in record.curves} for record in model.runs]
    by_seed = pd.DataFrame(curves).T.sort_index().dropna(how="all")
    if len(by_seed.columns) > 1:
        axes.plot(by_seed.index, by_seed, color=model.color, linewidth=0.6, alpha=0.5)
    look = look_of(model) | {"markersize": 4.5, "markeredgewidth": 1}
    axes.plot(by_seed.index, by_seed.mean(axis=1), **look, linewidth=1.6, markevery=max(1, len(by_seed) // 10))


def draw_load(axes: Axes, record: Record) -> None:
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


def label_outer(panels: Sequence[Axes], columns: int, x_label: str, y_label: str) -> None:
    """Name the axes of the left and the lowest panels only."""
    for place, axes in enumerate(panels):
        if place % columns == 0:
            axes.set_ylabel(y_label)
        if place + columns >= len(panels):
            axes.set_xlabel(x_label)
            axes.tick_params(labelbottom=True)
