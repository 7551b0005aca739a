"""What the page says first: what the table comes to, in figures and sentences. No torch here."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from mnist_lab.report.figures import pareto_set, within_noise
from mnist_lab.report.findings import Finding, summarize
from mnist_lab.report.results import MAX_LISTED, Model, Results, listed, rows_of, with_latency
from mnist_lab.report.table import compare, judge_distillation

ONE_IMAGE, BATCH = "latency_ms_b1", "latency_ms_b64"


class Tile(NamedTuple):
    """A figure that stands out."""

    what: str
    figure: str
    model: str
    beside: str  # what else is to be known of it


def find_tiles(results: Results) -> list[Tile]:
    """The most accurate model, the smallest that is as accurate within noise, and the fastest."""
    models = results.models
    if not models:
        return []
    best = max(models, key=lambda model: model.row["test_acc"])
    alike = next((group for group in within_noise(models) if best in group), [best])
    smallest = min(alike, key=lambda model: model.row["file_mb"])
    seeds = f"{len(best.runs)} seed{'s' if len(best.runs) > 1 else ''}"
    tiles = [
        Tile("Most accurate", _accuracy(best), best.short_name, f"{seeds}, {best.row['file_mb']:.3g} MB"),
        Tile(
            "Smallest as accurate within noise",
            f"{smallest.row['file_mb']:.3g} MB",
            smallest.short_name,
            _accuracy(smallest),
        ),
    ]
    for column, what in ((ONE_IMAGE, "Fastest for one image"), (BATCH, "Fastest for a batch of 64")):
        timed = with_latency(models, column)
        if timed:
            fastest = min(timed, key=lambda model: model.row[column])
            tiles.append(Tile(what, f"{fastest.row[column]:.3g} ms", fastest.label, _accuracy(fastest)))
    return tiles


def find_sentences(results: Results, findings: Sequence[Finding]) -> list[str]:
    """What follows from the records, a sentence each."""
    sentences = []
    models = results.models
    timed = with_latency(models, BATCH)
    front = set(pareto_set(rows_of(timed))) if timed else set()
    if front:
        names = listed([model.label for model in timed if model.name in front])
        sentences.append(
            f"Of {len(timed)} timed models none beats these in accuracy, file size and latency of a batch of 64 at "
            f"once: {names}."
        )
    sentences += [
        f"{listed([model.short_name for model in group])} are as accurate within noise."
        for group in within_noise(models)[:1]
    ]
    sentences += [line.removeprefix("- ") for line in judge_distillation(results.records).splitlines()]
    sentences += _of_derived(results)
    verdicts = list(summarize(findings).values())
    if verdicts:
        counts = [f"{verdicts.count(own)} {own}" for own in ("supported", "refuted", "undecided")]
        sentences.append(f"Of {len(verdicts)} claims tested: {', '.join(counts)}.")
    return sentences


def _of_derived(results: Results) -> list[str]:
    """What each form of another model cost and bought; of more than a few, the table says it."""
    derived = [model for model in results.models if pd.notna(model.row["file_ratio"])]
    if len(derived) > MAX_LISTED:
        return [f"{len(derived)} models were made from others: what each lost and saved stands under Compression."]
    speedups = compare(results.comparable).set_index(["model", "runtime"])["speedup_b64_vs_original"]
    sentences = []
    for model in derived:
        parts = []
        if pd.notna(model.row["acc_points"]):
            half_width = model.row["acc_points_ci95"]
            interval = "" if pd.isna(half_width) else f" ± {half_width:.2f}"
            parts.append(f"{model.row['acc_points']:+.2f}{interval} points of accuracy")
        parts.append(f"a file {model.row['file_ratio']:.1f} times smaller")
        speedup = speedups[model.name, model.runtime]
        if pd.notna(speedup):
            parts.append(f"{speedup:.2f} times the speed at batch 64")
        sentences.append(f"{model.label} against {model.runs[0].original}: {', '.join(parts)}.")
    return sentences


def _accuracy(model: Model) -> str:
    accuracy, half_width = 100 * model.row["test_acc"], 100 * model.row["test_acc_ci95"]
    return f"{accuracy:.2f} %" if pd.isna(half_width) else f"{accuracy:.2f} ± {half_width:.2f} %"
