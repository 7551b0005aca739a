"""The table as text and files: CSV, Markdown, and what fits a screen. No torch here."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import pandas as pd
from tabulate import tabulate

from mnist_lab.files import read_bytes, reading, write_text
from mnist_lab.measure import TABLE_BATCHES
from mnist_lab.report.columns import COLUMNS, COMPRESSION, Column
from mnist_lab.report.table import compare, find_fastest

Style = Literal["simple", "github"]
WHERE = {"dataset", "preset", "recipe"}
TEXT_COLUMNS = {*WHERE, "model", "technique", "precision", "runtime", *(f"fastest b{batch}" for batch in TABLE_BATCHES)}
SUMMARY_LEGEND = (
    "acc: test accuracy in %, ± 95 % interval over seeds; ms b64: median milliseconds for a batch of 64; "
    "x orig: speed-up at batch 64 over the row's original, the first model of its chain, in the same runtime."
)
COMPARISON_LEGEND = (
    "Differences: `acc` in percentage points, `size` as a share of parameter storage, `x b1` … the speed-up at that "
    "batch size; against the row's original (the first model of its chain) and against the baseline, both in the same "
    "runtime (torchao's rows: in torch-compile, torch-sparse's: in pytorch, whose engines they share)."
)
COMPRESSION_LEGEND = (
    "Against the row's original, the first model of its chain, of the same seed: test accuracy in points, and its 95 % "
    "interval over seeds; how many times smaller file and parameters are; parameters that are not zero; images with "
    "the same class, KL divergence in nats, change of the worst class in points. Of a mixture: images whose first "
    "expert is the same, overlap of the chosen sets (Jaccard), images that the artifact sends to other experts, those "
    "of them with another class and with the same, the gate's KL, margin between the last expert chosen "
    "and the next, coefficient of variation of the load, experts with less than a tenth of an even share, and linear "
    "CKA between experts' outputs (1: alike). Memory in PyTorch: of the parameters once loaded, zeros in full, and of "
    "a pass of 1,000 images at its peak. Images per second in batches of 1,024; seconds that the technique took. Where "
    "scales are the batch's: test accuracy one image at a time, and images whose class is then another."
)
# What a narrow terminal can do without, first what it misses least.
DISPENSABLE = ("x orig", "seeds", "ms b1024", "precision", "ms b1", "MiB", "technique", "runtime")


def title_of(dataset: str, preset: str, recipe: str) -> str:
    """What a table is headed by."""
    return f"{dataset}, {preset} models, {recipe} recipe"


def write_table(
    folder: Path,
    table: pd.DataFrame,
    *,
    title: str,
    distillation: str,
    columns: Sequence[Column] = COLUMNS,
    sections: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write `table.csv` and `table.md`; the latter adds a summary and the comparisons, that of students among them.

    Args:
        sections: further ones after the summary, by heading; an empty one is left out.
    """
    write_text(folder / "table.csv", table.to_csv(index=False))
    compression = format_compression(table, style="github")
    parts = [
        f"# {title}",
        format_summary(table, style="github"),
        SUMMARY_LEGEND,
        *(f"## {heading}\n\n{text}" for heading, text in sections.items() if text),
        "## Every column",
        format_table(table, columns=columns),
        "## Against the original and against the baseline",
        format_comparison(table),
        COMPARISON_LEGEND,
        *(["## Does distillation help?", distillation] if distillation else []),
        *(["## Compression", compression, COMPRESSION_LEGEND] if compression else []),
        "## Fastest runtime",
        format_fastest(table, style="github"),
    ]
    write_text(folder / "table.md", "\n\n".join(parts) + "\n")


def read_run_names(folder: Path) -> set[str]:
    """The runs that the table in a folder is of; none where there is no table.

    Raises:
        UserError: it is broken.
    """
    path = folder / "table.csv"
    if not path.exists():
        return set()
    with reading(path, "Delete it."):
        rows = csv.DictReader(read_bytes(path).decode().splitlines())
        return {f"{row['model']}-seed{seed}" for row in rows for seed in row["seed_numbers"].split()}


class Part(NamedTuple):
    """A table as it shows: its columns under their headers, and the format of each that holds figures."""

    frame: pd.DataFrame
    formats: Mapping[str, str]

    def text(self, style: Style) -> str:
        """Aligned, in one of tabulate's styles."""
        return _format(self.frame, self.formats, style)


def all_columns(table: pd.DataFrame, columns: Sequence[Column] = COLUMNS) -> Part:
    """The table; blank cells stay blank."""
    formats = {_short_header(column.name): column.format for column in columns}
    return Part(table[[column.name for column in columns]].rename(columns=_short_header), formats)


def format_table(table: pd.DataFrame, *, columns: Sequence[Column] = COLUMNS) -> str:
    """`all_columns` in Markdown."""
    return all_columns(table, columns).text("github")


def compression(table: pd.DataFrame, columns: Sequence[Column] = COMPRESSION) -> Part:
    """What the models that were made from others lost and saved, each in its first runtime; no rows without any."""
    made = table[table["file_ratio"].notna()].drop_duplicates("model")
    found = [column for column in columns if made[column.name].notna().any()]
    headers = {column.name: column.name.replace("_", " ") for column in found}
    formats = {headers[column.name]: column.format for column in found}
    return Part(made[["model", *headers]].rename(columns=headers), formats)


def format_compression(table: pd.DataFrame, *, style: Style, columns: Sequence[Column] = COMPRESSION) -> str:
    """`compression` as aligned text; empty without any rows."""
    part = compression(table, columns)
    return "" if part.frame.empty else part.text(style)


def comparison(table: pd.DataFrame) -> Part:
    """`compare` under short headers."""
    compared = compare(table)
    names = [str(column) for column in compared]
    formats = {name: "+.2f" if name.startswith("acc") else ".2f" for name in names if "_vs_" in name}
    headers = {name: name.replace("_points", "").replace("speedup_", "x ").replace("_vs_", " vs ") for name in names}
    return Part(compared.rename(columns=headers), {headers[name]: format for name, format in formats.items()})  # noqa: A001


def format_comparison(table: pd.DataFrame) -> str:
    """`comparison` in Markdown."""
    return comparison(table).text("github")


def fastest(table: pd.DataFrame) -> Part:
    """`find_fastest` under short headers."""
    formats = {f"ms b{batch}": ".3f" for batch in TABLE_BATCHES}
    headers = {f"runtime_b{batch}": f"fastest b{batch}" for batch in TABLE_BATCHES}
    return Part(find_fastest(table).rename(columns=headers).rename(columns=_short_header), formats)


def format_fastest(table: pd.DataFrame, *, style: Style) -> str:
    """`fastest` as aligned text."""
    return fastest(table).text(style)


def summary(table: pd.DataFrame) -> Part:
    """The columns that fit a screen."""
    speedup = compare(table)["speedup_b64_vs_original"]
    interval = table["test_acc_ci95"].map(lambda value: "" if pd.isna(value) else f" ± {100 * value:.2f}")
    columns = {
        "model": table["model"],
        "technique": table["technique"],
        "precision": table["precision"],
        "runtime": table["runtime"],
        "seeds": table["seeds"],
        "acc": table["test_acc"].map(lambda value: f"{100 * value:.2f}") + interval,
        "MiB": table["size_mib"],
        **{f"ms b{batch}": table[f"latency_ms_b{batch}"] for batch in TABLE_BATCHES},
        "x orig": speedup,
    }
    formats = {"MiB": ".3f", "x orig": ".2f"} | {f"ms b{batch}": ".3f" for batch in TABLE_BATCHES}
    return Part(pd.DataFrame(columns), formats)


def format_summary(table: pd.DataFrame, *, style: Style, width: int | None = None) -> str:
    """`summary`, aligned: plainly, or in Markdown.

    Args:
        width: characters of a line; columns are left out until the table fits. None keeps all.
    """
    frame, formats = summary(table)
    text = _format(frame, formats, style)
    for name in DISPENSABLE:
        if width is None or len(text.partition("\n")[0]) <= width:
            break
        frame = frame.drop(columns=name)
        text = _format(frame, formats, style)
    return text


def _short_header(column: str) -> str:
    return column.replace("latency_ms_", "ms ")


def _format(table: pd.DataFrame, formats: Mapping[str, str], style: str) -> str:
    """Aligned text in one of tabulate's styles: a format per column, blank where there is no value."""
    names = [str(column) for column in table]
    rows = table.itertuples(index=False)
    return tabulate(
        [[format_cell(value, formats.get(name, "")) for name, value in zip(names, row, strict=True)] for row in rows],
        headers=names,
        tablefmt=style,
        disable_numparse=True,
        colalign=["left" if name in TEXT_COLUMNS else "right" for name in names],
    )


def format_cell(value: Any, how: str) -> str:
    """One cell in its column's format; blank where there is no value."""
    return "" if pd.isna(value) else format(int(value) if how.endswith("d") else value, how)
