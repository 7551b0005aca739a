"""The figures of the page: vector images inside it, each with its title and what it says. No torch here."""

import base64
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from mnist_lab.report.drawing import Figure, Vector, draw_png, draw_svg
from mnist_lab.report.results import Results

MAX_SVG_BYTES = 300_000  # of more, a bitmap is smaller


class Picture(NamedTuple):
    """One figure."""

    name: str
    title: str
    says: str  # what it shows, and under which conditions
    source: str  # a data: address


def draw_pictures(results: Results, figures: Mapping[str, Callable[[Results], Figure | None]]) -> Iterator[Picture]:
    """Every figure for which the records have data; one that cannot be drawn is left out, as `draw_all` says which."""
    for name, draw in figures.items():
        try:
            vector = draw_svg(partial(draw, results))
            source = vector and _source(vector, partial(draw, results))
        except Exception:  # whatever it is, the page does not hang on it
            continue
        if vector and source:
            shows = inspect.getdoc(draw) or ""
            says = f"{' '.join(shows.partition(chr(10) * 2)[0].split())} {vector.footnote}"
            yield Picture(name, vector.title.partition(" — ")[0], says.strip(), source)


def _source(vector: Vector, draw: Callable[[], Figure | None]) -> str:
    if len(vector.svg) <= MAX_SVG_BYTES:
        return as_source("svg+xml", vector.svg)
    return as_source("png", draw_png(draw) or b"")


def as_source(kind: str, content: bytes) -> str:
    """An image as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
