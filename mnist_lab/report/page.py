"""One page that tells a results folder's whole story, in one file that needs no network. No torch here.

`templates/` holds its HTML, its style, and its two scripts: one for tables and colours, one for the live demo. Scripts
are named in the page's content security policy by their digest: no other runs, whatever names in records say.
"""

import base64
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mnist_lab.errors import UserError
from mnist_lab.files import write_text
from mnist_lab.report.drawing import Figure
from mnist_lab.report.figures import FIGURES
from mnist_lab.report.findings import HEADERS, Finding, cells_of, summarize
from mnist_lab.report.page_demo import Demo
from mnist_lab.report.page_figures import draw_pictures
from mnist_lab.report.page_images import (
    Mistake,
    OfExpert,
    TestImages,
    as_png,
    choose_images,
    describe_experts,
    describe_mistake,
)
from mnist_lab.report.page_verdicts import find_sentences, find_tiles
from mnist_lab.report.records import Record, load_predictions
from mnist_lab.report.results import Results, conditions
from mnist_lab.report.text import (
    COMPARISON_LEGEND,
    COMPRESSION_LEGEND,
    SUMMARY_LEGEND,
    TEXT_COLUMNS,
    Part,
    all_columns,
    comparison,
    compression,
    fastest,
    format_cell,
    summary,
)
from mnist_lab.report.winner import find_winners, headline

TEMPLATES = Path(__file__).parent / "templates"
OF_TRAINING, OF_EXPERTS = ("training_curves",), ("expert_load",)  # figures with a section of their own
DRAWN_LIKE_MNIST = {"mnist", "qmnist", "digits"}  # strokes that were fitted into a box, then centred


@dataclass(frozen=True)
class Surroundings:
    """What the page shows beside the records, as far as it is at hand."""

    findings: Sequence[Finding] = ()
    images: TestImages | None = None
    demo: Demo | None = None
    demo_missing: str = ""  # why there is none
    commands: Sequence[str] = ()  # that make it all again
    figures: Mapping[str, Callable[[Results], Figure | None]] = field(default_factory=lambda: FIGURES)


class Cell(NamedTuple):
    """A cell of a table: as it shows, and the number that it sorts by, if it is one."""

    text: str
    number: str


class Sheet(NamedTuple):
    """A table of the page, and the same to copy."""

    name: str
    title: str
    legend: str
    headers: Sequence[str]
    rows: list[list[Cell]]
    is_text: list[bool]  # by column
    csv: str
    latex: str


def write_page(folder: Path, results: Results, surroundings: Surroundings) -> Path:
    """Write `report.html` into a results folder.

    Raises:
        RunFailed: it cannot be written.
    """
    path = folder / "report.html"
    write_text(path, build_page(folder, results, surroundings))
    return path


def build_page(folder: Path, results: Results, surroundings: Surroundings) -> str:
    """The page as HTML.

    Args:
        folder: of the records, where their predictions lie.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = [_read("page.js"), *([_read("demo.js")] if surroundings.demo else [])]
    pictures = list(draw_pictures(results, surroundings.figures))
    first, winners = results.records[0], find_winners(results.records)
    return environment.get_template("report.html").render(
        title=f"{first.dataset}, {first.preset} models, {first.recipe} recipe",
        style=_read("page.css"),
        scripts=scripts,
        policy=_policy(scripts),
        tiles=find_tiles(winners),
        winner=[headline(winners), *winners.notes] if winners is not None else [],
        sentences=find_sentences(results, surroundings.findings),
        conditions=conditions(results, results.models, latency=True, bars=False),
        sheets=make_sheets(results),
        pictures=[picture for picture in pictures if picture.name not in {*OF_TRAINING, *OF_EXPERTS}],
        training=[picture for picture in pictures if picture.name in OF_TRAINING],
        expert_figures=[picture for picture in pictures if picture.name in OF_EXPERTS],
        experts=_experts(results, surroundings.images),
        mistakes=find_mistakes(folder, results, surroundings.images),
        num_models=len(results.models),
        has_images=surroundings.images is not None,
        demo=surroundings.demo,
        demo_missing=surroundings.demo_missing,
        demo_rows=_demo_rows(results, surroundings.demo),
        demo_settings=_demo_settings(first),
        examples=_examples(first, surroundings.images),
        claims=_claims(surroundings.findings),
        claim_headers=HEADERS,
        facts=_facts(results),
        versions=first.versions,
        files=_files(results),
        commands=surroundings.commands,
    )


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """Nothing from outside, no script but these and the engine that they unpack."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed} blob: 'wasm-unsafe-eval'; "
        "base-uri 'none'; form-action 'none'"
    )


def make_sheets(results: Results) -> list[Sheet]:
    """The tables of `table.md`, those without rows left out."""
    table = results.table
    parts = (
        ("summary", "Summary", SUMMARY_LEGEND, summary(table)),
        ("columns", "Every column", "", all_columns(table, results.columns)),
        ("comparison", "Against the original and the baseline", COMPARISON_LEGEND, comparison(table)),
        ("compression", "Compression", COMPRESSION_LEGEND, compression(table)),
        ("runtimes", "Fastest runtime", "", fastest(table)),
    )
    return [
        _sheet(name, title, legend.replace("`", ""), part) for name, title, legend, part in parts if len(part.frame)
    ]


def _sheet(name: str, title: str, legend: str, part: Part) -> Sheet:
    headers = [str(header) for header in part.frame]
    is_text = [header in TEXT_COLUMNS for header in headers]
    rows = [
        [
            Cell(format_cell(value, part.formats.get(header, "")), "" if words else _number(value))
            for header, words, value in zip(headers, is_text, row, strict=True)
        ]
        for row in part.frame.itertuples(index=False)
    ]
    shown = pd.DataFrame([[cell.text for cell in row] for row in rows], columns=headers)
    styler = shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    formats = "".join("l" if words else "r" for words in is_text)
    latex = styler.to_latex(hrules=True, column_format=formats).replace("±", r"$\pm$")
    return Sheet(name, title, legend, headers, rows, is_text, part.frame.to_csv(index=False), latex)


def _number(value: Any) -> str:
    """What a cell sorts by: of text its first number; empty where it has none."""
    words = str(value).split()
    try:
        number = float(words[0]) if words else math.nan
    except ValueError:
        return ""
    return "" if math.isnan(number) else repr(number)


def find_mistakes(folder: Path, results: Results, images: TestImages | None) -> tuple[list[Mistake], list[Mistake]]:
    """Test images that most models' first seeds miss, and others that divide them; none without predictions."""
    predicted: dict[str, Any] = {}
    labels = None
    for model in results.models:
        try:
            found = load_predictions(folder, model.runs[0])
        except UserError:  # of a record whose predictions are gone the page shows the rest
            continue
        if labels is None or np.array_equal(labels, found.labels):
            labels, predicted[model.short_name] = found.labels, found.predicted
    if labels is None:
        return [], []
    names = results.records[0].class_names
    missed, divided = choose_images(np.stack([*predicted.values()]), labels)
    is_same = images is not None and np.array_equal(images.labels, labels)
    describe = partial(
        describe_mistake, predicted=predicted, labels=labels, names=names, images=images if is_same else None
    )
    return [*map(describe, missed)], [*map(describe, divided)]


def _experts(results: Results, images: TestImages | None) -> list[tuple[str, list[OfExpert]]]:
    """Of the first mixture, and those whose choices are at hand: what each of its experts gets."""
    found: list[tuple[str, list[OfExpert]]] = []
    for model in results.models:
        record = model.runs[0]
        if record.expert_by_class and (not found or (images and model.name in images.experts)):
            sizes = [sum(row) for row in model.measurements[0].confusion] or [1] * len(record.expert_by_class)
            own = describe_experts(model.name, record.expert_by_class, sizes, record.class_names, images)
            found.append((model.short_name, own))
    return found


def _demo_rows(results: Results, demo: Demo | None) -> list[dict[str, Any]]:
    by_name = {model.name: model for model in results.models}
    return [
        {"model": by_name[own.name], "packed": own.packed, "tells_experts": own.tells_experts}
        for own in (demo.models if demo else ())
    ]


def _demo_settings(record: Record) -> dict[str, Any]:
    """What the demo's script must know of the data."""
    data = record.architecture.get("data", {})
    return {
        "classes": record.class_names,
        "size": data.get("image_size"),
        "isDarkOnLight": data.get("polarity") == "dark-on-light",
        "isCentred": record.dataset in DRAWN_LIKE_MNIST,
    }


def _examples(record: Record, images: TestImages | None) -> list[tuple[str, str, str]]:
    """The first test image of each class: its name, the image, and its bytes as text (base 64)."""
    if images is None:
        return []
    found = []
    for own, name in enumerate(record.class_names):
        places = np.flatnonzero(images.labels == own)
        if len(places):
            pixels = images.pixels[places[0]]
            found.append((name, as_png(pixels), base64.b64encode(pixels.tobytes()).decode()))
    return found


def _claims(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    claims = []
    for number, verdict in summarize(findings).items():
        own = [finding for finding in findings if finding.claim == number]
        rows = [cells_of(finding) for finding in own]
        claims.append({"number": number, "verdict": verdict, "statement": own[0].statement, "rows": rows})
    return claims


def _facts(results: Results) -> dict[str, str]:
    """Where the figures hold."""
    first = results.records[0]
    seeds = sorted({record.seed for record in results.records})
    images = sum(map(sum, next(iter(first.measurements.values())).confusion))
    recipe: dict[str, Any] = next((r.config["recipe"] for r in results.records if r.config.get("recipe")), {})
    facts = {
        "CPU": first.machine["cpu"],
        "Cores that may be used": str(first.machine["cores"]),
        "System": f"{first.machine['system']}, Python {first.machine['python']}",
        "Threads for latency": _all_of(m.threads for r in results.records for m in r.measurements.values()),
        "Threads for training": _all_of(record.train_threads for record in results.records),
        "Data": f"{first.dataset}, {images:,} test images" if images else first.dataset,
        "Preset": first.preset,
        "Recipe": f"{first.recipe} {_short(recipe) if recipe else ''}",
        "Seeds": ", ".join(map(str, seeds)),
        "Records": f"{len(results.records)}, of {len(results.models)} models",
    }
    return {name: value for name, value in facts.items() if value}


def _all_of(values: Any) -> str:
    return ", ".join(map(str, sorted({value for value in values if value is not None})))


def _short(value: Any) -> str:
    """A setting as text, one of several parts in brackets."""
    if isinstance(value, dict):
        return f"({', '.join(f'{name} {_short(own)}'.replace('_', ' ') for name, own in value.items())})"
    return "none" if value is None else str(value)


def _files(results: Results) -> list[tuple[str, str, str]]:
    """Each model's first artifact, which a user deploys: its name and digest."""
    firsts = [model.runs[0] for model in results.models]
    return [(record.model, record.artifact["file"], record.artifact["sha256"]) for record in firsts]
