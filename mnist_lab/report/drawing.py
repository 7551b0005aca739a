"""How a figure looks: colours, markers, axes, bars, heat maps, legends, footnotes. No torch here, and no models.

No other module of the package imports matplotlib: what they need of it they take from here.
"""

import contextlib
import io
import itertools
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mnist_lab.errors import RunFailed
from mnist_lab.files import first_line, write_atomically
from mnist_lab.report.records import Record


@contextlib.contextmanager
def _whatever_backend() -> Iterator[None]:
    """Let matplotlib be imported although MPLBACKEND names a backend that it does not find, as notebooks' kernels do.

    One that it finds stays chosen.
    """
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        yield
    except UnicodeDecodeError as error:
        raise RunFailed("no figure can be drawn: matplotlib's settings (matplotlibrc) are no text") from error
    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend


with _whatever_backend():
    import matplotlib
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes as Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.colors import to_hex, to_rgb
    from matplotlib.figure import Figure as Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.lines import Line2D as Line2D
    from matplotlib.projections.polar import PolarAxes
    from matplotlib.textpath import text_to_path
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    from matplotlib.ticker import MaxNLocator as MaxNLocator

# Black, then seaborn's "colorblind" palette, whose pale hues come last.
COLORS = (
    "#000000", "#0173b2", "#de8f05", "#029e73", "#56b4e9", "#d55e00",
    "#cc78bc", "#ca9161", "#949494", "#fbafe4", "#ece133",
)  # fmt: skip
MARKERS = "osD^vPX<>ph"
MUTED = "#767676"
DOTS_PER_INCH = 100
PNG_COMPRESSION = 3  # files a tenth larger than at the default 6, in a third of the time
LONGEST_NAME = 60  # of a model, in characters
LINE_INCHES = 0.16  # of a text of 9 points
USUAL_LINES = 2  # of a title, a footnote: what the sizes of the figures allow for
NAME_INCHES = 3.0  # width of a name in the legend
LEGEND_INCHES = 3.2  # width of a legend that the sizes of the figures allow for
LEGEND_LINES = 30  # in one column

Values = npt.NDArray[np.float64]
Error = Values  # (2, N): below and above N values, in the unit of their axis


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


def shorten(names: Iterable[str]) -> dict[str, str]:
    """Each name and how it shows: a long one without its middle, and numbered where it would be like another."""
    shown: dict[str, str] = {}
    for name in names:
        shown[name] = next(form for form in _short_forms(name) if form not in shown.values())
    return shown


def _short_forms(name: str) -> Iterator[str]:
    if len(name) <= LONGEST_NAME:
        yield name
    half = LONGEST_NAME // 2 - 4
    yield f"{name[:half]} … {name[-half:]}"
    yield from (f"{name[:half]} …{number}… {name[-half:]}" for number in itertools.count(2))


class _Wrapper(textwrap.TextWrapper):
    """Breaks lines between words, and before what joins the parts of names."""

    wordsep_re = re.compile(r"(\s+)|(?=[-_+])")


def wrap(text: str, inches: float, points: float) -> str:
    """The text in lines no wider than that, at that size of the font."""
    font = FontProperties(size=points)
    room = max(1, int(130 * inches / points))  # characters in a line of usual ones
    while True:
        lines = _Wrapper(room).wrap(text)
        widths = [text_to_path.get_text_width_height_descent(line, font, ismath=False)[0] / 72 for line in lines]
        if room == 1 or max(widths, default=0) <= inches:
            return "\n".join(lines)
        room = room * 9 // 10


def count_lines(texts: Iterable[str]) -> int:
    """Of the text that has most."""
    return 1 + max(text.count("\n") for text in texts)


def extra_height(labels: Sequence[str]) -> float:
    """Inches of the longest label beyond the one line for which there is room."""
    return LINE_INCHES * (count_lines(labels) - 1)


def height_of_places(labels: Sequence[str], inches: float) -> float:
    """Of a panel with a place for each label, that high, and higher where a label has several lines."""
    return max(1.2, len(labels) * (inches + extra_height(labels)))


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
    room = size[0] - 0.3
    text = wrap(f"{title} — {what}", room, 13)
    if "\n" in text:
        text = "\n".join([wrap(title, room, 13), wrap(f"— {what}", room, 13)])
    figure.suptitle(text, fontsize=13)
    _make_room(figure, text, 13)
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


def write_figures(folder: Path, figures: Mapping[str, Callable[[], Figure | None]]) -> Iterator[Path]:
    """Draw each and write it to `folder/plots/NAME.png`; gives every file as soon as it is written.

    One that cannot be drawn keeps none of the others from it. The file that an earlier run left of a figure that is
    None, or cannot be drawn, is removed.

    Raises:
        RunFailed: at once, a file cannot be written; at the end, which figures could not be drawn, and why.
    """
    failures = []
    for name, draw in figures.items():
        png = None
        try:
            png = draw_png(draw)
        except Exception as error:  # whatever it is, the others do not hang on it
            failures.append(f"{name} ({type(error).__name__}: {first_line(error)})")
        path = folder / "plots" / f"{name}.png"
        if png is not None:
            write_atomically(path, lambda temporary, png=png: temporary.write_bytes(png))  # type: ignore[misc]
            yield path
        else:
            _remove(path)
    if failures:
        raise RunFailed(f"figures that could not be drawn in {folder / 'plots'}: {'; '.join(failures)}")


def draw_png(draw: Callable[[], Figure | None], *, dots_per_inch: int = DOTS_PER_INCH) -> bytes | None:
    """The file's content, which depends on no setting of the user's; None where there is nothing to draw."""
    with matplotlib.rc_context(_own_settings()):
        figure = draw()
        if figure is None:
            return None
        figure.set_dpi(dots_per_inch)
        content = io.BytesIO()
        # savefig would lay the figure out twice.
        print_png: Callable[..., None] = FigureCanvasAgg(figure).print_png
        print_png(content, pil_kwargs={"compress_level": PNG_COMPRESSION})
        return content.getvalue()


class Embedded(NamedTuple):
    """A figure as an image for a page, and what it says of itself."""

    kind: str  # as it is called on the web
    content: bytes
    title: str
    footnote: str


def draw_embedded(draw: Callable[[], Figure | None], *, max_svg_bytes: int) -> Embedded | None:
    """The same as SVG, its text as text; as a bitmap (WebP, lossless) where that would be larger than a page bears.

    Equal figures give equal bytes.
    """
    with matplotlib.rc_context(_own_settings() | {"svg.fonttype": "none", "svg.hashsalt": "mnist_lab"}):
        figure = draw()
        if figure is None:
            return None
        texts = [" ".join(text.split()) for text in (figure.get_suptitle(), figure.get_supxlabel())]
        content = io.BytesIO()
        print_svg: Callable[..., None] = FigureCanvasSVG(figure).print_svg
        print_svg(content, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        if content.tell() <= max_svg_bytes:
            return Embedded("image/svg+xml", content.getvalue(), *texts)
        figure.set_layout_engine("none")  # it is laid out
        figure.set_dpi(DOTS_PER_INCH)
        content = io.BytesIO()
        print_webp: Callable[..., None] = FigureCanvasAgg(figure).print_webp
        print_webp(content, pil_kwargs={"lossless": True, "method": 4})
        return Embedded("image/webp", content.getvalue(), *texts)


def _own_settings() -> dict[Any, Any]:
    """Those that matplotlib has by itself, whatever the user's are."""
    return {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise RunFailed(f"cannot remove {path}: {error.strerror or error}") from error


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
    """Names beside the panels, the muted ones last."""
    handles = [Line2D([], [], **look.line, linestyle=linestyle) for look in looks.values()]
    handles += [Line2D([], [], **look.line, linestyle="none", alpha=0.35) for look in (muted or {}).values()]
    place_legend(figure, handles, [*looks, *(muted or {})])


def place_legend(figure: Figure, handles: Sequence[Artist], names: Sequence[str]) -> None:
    """Beside the panels, in as many columns as it takes; where it would not fit the figure grows, in its shape."""
    labels = [wrap(name, NAME_INCHES, 9) for name in names]
    num_lines = sum(label.count("\n") + 1 for label in labels)
    legend = figure.legend(
        handles,
        labels,
        loc="outside right center",
        frameon=False,
        fontsize=9,
        ncols=math.ceil(num_lines / LEGEND_LINES),
    )
    extent = legend.get_window_extent()
    higher = max(0, extent.height / figure.dpi + 1 - figure.get_figheight())
    wider = max(0, extent.width / figure.dpi - LEGEND_INCHES)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + wider + higher, height + higher)


def write_footnote(figure: Figure, text: str) -> None:
    """A small muted text below the panels; the last of a figure, which grows by what is more than two lines."""
    text = wrap(text, 0.94 * figure.get_figwidth(), 8.5)  # letters as drawn are of whole pixels, and a little wider
    figure.supxlabel(text, fontsize=8.5, color=MUTED)
    _make_room(figure, text, 8.5)


def _make_room(figure: Figure, text: str, points: float) -> None:
    """Let the figure grow by the lines of a title or footnote that its size does not allow for."""
    num_lines = max(0, count_lines([text]) - USUAL_LINES)
    figure.set_figheight(figure.get_figheight() + num_lines * LINE_INCHES * points / 9)


def spread(values: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> Error:
    """Error bars from values to the ends of their intervals, as matplotlib takes them.

    Rounding may put an end on the wrong side of its value; matplotlib refuses bars of negative length.
    """
    middle = np.atleast_1d(values)
    return np.maximum(0.0, [middle - low, high - middle])


def draw_bars(
    axes: Axes,
    values: Sequence[float],
    looks: Sequence[Look],
    errors: Sequence[Error | None],
    blanks: Sequence[str],
) -> None:
    """A horizontal bar per value, which stands beside it; without a value (NaN) its blank says why."""
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
        ends = [values[place] for place in known]
        bars = np.hstack([*known.values()])
        axes.errorbar(ends, [*known], xerr=bars, fmt="none", ecolor="#9a9a9a", elinewidth=1.4, capsize=3)
    for place, (value, error, blank) in enumerate(zip(values, errors, blanks, strict=True)):
        text = blank if math.isnan(value) else f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}"
        end = 0 if math.isnan(value) else value + (error[1].item() if error is not None else 0)
        color = MUTED if math.isnan(value) else "black"
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8, color=color)


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
