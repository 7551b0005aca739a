"""How a figure looks: colours, markers, axes, bars, heat maps, legends, footnotes. No torch here, and no models."""

import itertools
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.projections.polar import PolarAxes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from mnist_lab.files import write_atomically
from mnist_lab.report.records import Record

# Black, then seaborn's "colorblind" palette, whose pale hues come last.
COLORS = (
    "#000000", "#0173b2", "#de8f05", "#029e73", "#56b4e9", "#d55e00",
    "#cc78bc", "#ca9161", "#949494", "#fbafe4", "#ece133",
)  # fmt: skip
MARKERS = "osD^vPX<>ph"
MUTED = "#767676"
DOTS_PER_INCH = 100
PNG_COMPRESSION = 3  # files a tenth larger than at the default 6, in a third of the time

Values = npt.NDArray[np.float64]
Error = tuple[float, float]  # below and above a value, in the unit of its axis


@dataclass(frozen=True)
class Look:
    """How a model shows in every figure. The fill tells the precision: FP32 full, BF16 half, INT8 hollow."""

    color: str
    marker: str
    precision: str = "FP32"

    @property
    def face(self) -> str:
        """Of areas: white for INT8, pale for whatever else is not FP32."""
        if self.precision == "INT8":
            return "white"
        if self.precision == "FP32":
            return self.color
        red, green, blue = to_rgb(self.color)
        return to_hex((0.6 + 0.4 * red, 0.6 + 0.4 * green, 0.6 + 0.4 * blue))

    @property
    def line(self) -> dict[str, Any]:
        """What `plot` takes."""
        return {
            "color": self.color,
            "marker": self.marker,
            "markersize": 8,
            "fillstyle": {"FP32": "full", "INT8": "full", "BF16": "left"}.get(self.precision, "top"),
            "markerfacecolor": "white" if self.precision == "INT8" else self.color,
            "markerfacecoloralt": "white",
            "markeredgecolor": self.color,
            "markeredgewidth": 1.6,
        }


def choose_looks(models: Iterable[tuple[str, str, str]], order: Sequence[str] = ()) -> dict[str, Look]:
    """A look for every model, no two of the same colour and marker; a family has one colour.

    Args:
        models: name, family and precision of each.
        order: families, whose places choose the looks, so that those of their plain models (shortest names) do not
            hang on who else is drawn. Others come after, by name.
    """
    plainest_first = sorted(models, key=lambda model: (len(model[0]), model[0]))
    families = list(dict.fromkeys([*order, *sorted(family for _, family, _ in plainest_first)]))
    taken: set[tuple[str, str]] = set()

    def take(color: str, start: int) -> tuple[str, str]:
        pair = next((color, marker) for marker in _markers_from(start) if (color, marker) not in taken)
        taken.add(pair)
        return pair

    # Five on with each round of the colours, so that families of one colour get unlike markers.
    starts = [place + 5 * (place // len(COLORS)) for place in range(len(families))]
    plain = {
        family: take(COLORS[place % len(COLORS)], start)
        for place, (family, start) in enumerate(zip(families, starts, strict=True))
    }
    looks: dict[str, Look] = {}
    seen: set[str] = set()
    for name, family, precision in plainest_first:
        color, marker = plain[family]
        if family in seen:
            color, marker = take(color, starts[families.index(family)] + 5)
        seen.add(family)
        looks[name] = Look(color, marker, precision)
    return looks


def _markers_from(start: int) -> Iterator[str]:
    """All markers, from one of them on, and then numbers, of which there are enough."""
    yield from (MARKERS[(start + step) % len(MARKERS)] for step in range(len(MARKERS)))
    yield from (f"${number}$" for number in itertools.count(1))


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
    what = f"{first.dataset} · {first.preset} · {first.recipe}"
    fits = len(title) + len(what) < 9.5 * size[0]  # characters of 13 points in an inch
    figure.suptitle(f"{title} — {what}" if fits else f"{title}\n— {what}", fontsize=13)
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


def write_figures(folder: Path, figures: Mapping[str, Figure | None]) -> list[Path]:
    """Write `folder/plots/NAME.png` for each, and return the files; that of a figure which is None is removed.

    Raises:
        UserError: the folder cannot be written.
    """
    paths = []
    for name, figure in figures.items():
        path = folder / "plots" / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)
        else:
            write_atomically(path, lambda temporary, figure=figure: _print_png(figure, temporary))  # type: ignore[misc]
            paths.append(path)
    return paths


def _print_png(figure: Figure, path: Path) -> None:
    figure.set_dpi(DOTS_PER_INCH)
    # savefig would lay the figure out twice.
    print_png: Callable[..., None] = FigureCanvasAgg(figure).print_png
    print_png(path, pil_kwargs={"compress_level": PNG_COMPRESSION})


def make_logarithmic(axes: Axes, which: str, label: str) -> None:
    """A logarithmic axis with a margin, whose ticks are plain numbers however short it is."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.axes.set(**{f"{which}scale": "log"})
    low, high = axis.get_view_interval()
    subs = (1, 2, 3, 5, 7) if high / low < 20 else (1, 2, 5) if high / low < 200 else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    if label:
        axis.set_label_text(label)


def label_outer(panels: Sequence[Axes], columns: int, x_label: str, y_label: str) -> None:
    """Name the axes of the left and the lowest panels only."""
    for place, axes in enumerate(panels):
        if place % columns == 0:
            axes.set_ylabel(y_label)
        if place + columns >= len(panels):
            axes.set_xlabel(x_label)
            axes.tick_params(labelbottom=True)


def draw_legend(
    figure: Figure,
    looks: Mapping[str, Look],
    *,
    muted: Mapping[str, Look] | None = None,
    linestyle: Literal["-", "none"] = "none",
) -> None:
    """Names beside the panels, the muted ones last; the figure grows where they would not fit."""
    handles = [Line2D([], [], **look.line, linestyle=linestyle, label=name) for name, look in looks.items()]
    handles += [
        Line2D([], [], **look.line, linestyle="none", alpha=0.35, label=name) for name, look in (muted or {}).items()
    ]
    figure.set_figheight(max(figure.get_figheight(), 0.2 * len(handles) + 1))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=9)


def write_footnote(figure: Figure, text: str) -> None:
    """A small muted line below the panels, or as many as the width asks for."""
    lines = textwrap.wrap(text, int(15 * figure.get_figwidth()), break_on_hyphens=False)
    figure.supxlabel("\n".join(lines), fontsize=8.5, color=MUTED)


def draw_bars(axes: Axes, values: Sequence[float], looks: Sequence[Look], errors: Sequence[Error | None]) -> None:
    """A horizontal bar per value, which stands beside it, or the words that there is none."""
    axes.barh(
        range(len(values)),
        np.nan_to_num(values),
        color=[look.face for look in looks],
        edgecolor=[look.color for look in looks],
        hatch=["////" if look.precision == "INT8" else "" for look in looks],
        linewidth=[0 if math.isnan(value) else 1.2 for value in values],
        height=0.7,
    )
    known = {place: error for place, error in enumerate(errors) if error is not None}
    if known:
        ends, spread = [values[place] for place in known], np.transpose([*known.values()])
        axes.errorbar(ends, [*known], xerr=spread, fmt="none", ecolor="#9a9a9a", elinewidth=1.4, capsize=3)
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        text = "not measured" if math.isnan(value) else f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}"
        end = 0 if math.isnan(value) else value + (error[1] if error is not None else 0)
        color = MUTED if math.isnan(value) else "black"
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8, color=color)


def as_error(error: Error | None) -> list[list[float]] | None:
    """As `errorbar` takes it."""
    return None if error is None else [[error[0]], [error[1]]]


def prepare_radar(axes: Axes, labels: Sequence[str], decades: float) -> None:
    """Spokes with their names, and rings that say how many times worse than the best, which is at the rim."""
    assert isinstance(axes, PolarAxes)
    axes.set_theta_zero_location("N")
    angles = closed(np.zeros(len(labels)))[0][:-1]
    axes.set_xticks(angles, labels, fontsize=9)
    for angle, label in zip(angles, axes.get_xticklabels(), strict=True):
        side = round(float(np.sin(angle)), 6)
        label.set_horizontalalignment("center" if side == 0 else "right" if side > 0 else "left")
    rings = [times for times in (2, 5, 10, 100) if math.log10(times) < 0.9 * decades]
    axes.set_yticks([1 - math.log10(times) / decades for times in rings], [f"{times}×" for times in rings], fontsize=8)
    axes.set_rlabel_position(180 / len(labels))
    axes.set_ylim(0, 1.02)


def closed(radii: Values) -> tuple[Values, Values]:
    """Angles and radii of a radar's outline, back to its start."""
    angles = np.arange(len(radii) + 1) * 2 * np.pi / len(radii)
    return angles, np.append(radii, radii[:1])


def draw_heatmap(
    axes: Axes,
    values: Values,
    *,
    x_labels: Sequence[Any],
    y_labels: Sequence[Any],
    texts: Sequence[Sequence[str]] = (),
    cmap: str = "cividis",
    low: float | None = None,
    high: float | None = None,
    bar_label: str = "",
    lowest_first: bool = False,
) -> None:
    """Cells shaded by their values, from `low` to `high`, and beside them the colour bar, if it has a label.

    Args:
        texts: in the cells.
        lowest_first: the first row at the bottom.
    """
    mesh = axes.pcolormesh(values, cmap=cmap, vmin=low, vmax=high, edgecolors="white", linewidth=0.5 if texts else 0)
    is_dark = np.asarray(mesh.cmap(mesh.norm(values)))[..., :3] @ [0.2126, 0.7152, 0.0722] < 0.45
    for row, cells in enumerate(texts):
        for column, cell in enumerate(cells):
            color = "white" if is_dark[row, column] else "#262626"
            text = axes.text(column + 0.5, row + 0.5, cell, ha="center", va="center", fontsize=8, color=color)
            text.set_in_layout(False)  # inside its cell, so that no layout need measure it
    axes.set_xticks(np.arange(values.shape[1]) + 0.5, [str(label) for label in x_labels])
    axes.set_yticks(np.arange(values.shape[0]) + 0.5, [str(label) for label in y_labels])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    if not lowest_first:
        axes.invert_yaxis()
    if bar_label:
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.colorbar(mesh, ax=axes, label=bar_label).outline.set_visible(False)
