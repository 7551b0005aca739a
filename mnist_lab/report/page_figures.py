"""The figures of the page: vector images inside it, each with its title and what it says. No torch here."""

import base64
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from mnist_lab.report.drawing import Figure, draw_embedded
from mnist_lab.report.results import Results

MAX_SVG_BYTES = 300_000  # of more, a bitmap is smaller


class Picture(NamedTuple):
    """One figure."""

    name: str
    title: str
    caption: str
    says: str  # to those who do not see it
    source: str  # a data: address


def draw_pictures(results: Results, figures: Mapping[str, Callable[[Results], Figure | None]]) -> Iterator[Picture]:
    """Every figure for which the records have data; one that cannot be drawn is left out, as `draw_all` says which."""
    for name, draw in figures.items():
        try:
            drawn = draw_embedded(partial(draw, results), max_svg_bytes=MAX_SVG_BYTES)
        except Exception:  # whatever it is, the page does not hang on it
            continue
        if drawn is not None:
            title = drawn.title.partition(" — ")[0]
            caption = " ".join((inspect.getdoc(draw) or "").partition("\n\n")[0].split())
            says = f"{title}. {caption} {drawn.footnote}".strip()
            yield Picture(name, title, caption, says, as_source(drawn.kind, drawn.content))


def as_source(kind: str, content: bytes) -> str:
    """An image as an address that holds it."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
