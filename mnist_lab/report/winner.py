"""What to deploy: of the rows that are as accurate as the best, the most accurate, the smallest and the fastest.

Chosen on validation images: the largest of many test accuracies would be too good to be true. No torch here.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

from mnist_lab.report.records import Conditions, Measurement, Record, Timing
from mnist_lab.report.statistics import confidence_interval

RUNTIME = "onnxruntime"  # which runs the file that is deployed
MARGIN = 0.1  # percentage points below the best
ROUNDING = 1e-9  # of accuracies that are sums of floats
BATCHES = (1, 64)
HEADERS = ("winner", "row", "below best", "test acc", "MB", *(f"ms b{batch}" for batch in BATCHES), "file")
LEGEND = (
    "Winners are of the rows whose mean accuracy on validation images is within {margin} points of the best. The mean "
    "decides: were it enough that an interval reaches so far, rows would gain by varying much from seed to seed. "
    "Below best: percentage points on validation images over the seeds that both have, ± 95 % interval of their "
    "difference. As fast as the fastest is what lies within its quartiles; of equals the more accurate wins, then the "
    "smaller. Test accuracy, in % ± 95 % interval over seeds, decides nothing. File, its size in 10⁶ bytes and medians "
    "in ms are of the lowest seed."
)


class Points(NamedTuple):
    """Percentage points: the mean over seeds and the half-width of its 95 % interval; NaN of one seed."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + ("" if math.isnan(self.half_width) else f" ± {self.half_width:.2f}")


@dataclass(frozen=True, eq=False)
class Candidate:
    """A row in ONNX Runtime."""

    runs: tuple[Record, ...]  # by seed, the lowest first

    @property
    def name(self) -> str:
        return self.runs[0].model

    @property
    def file(self) -> str:
        """To deploy: the artifact of the lowest seed, in the checkpoints folder."""
        return self.runs[0].artifact["file"]

    @property
    def first(self) -> Measurement:
        return self.runs[0].measurements[RUNTIME]

    @cached_property
    def validation_acc(self) -> float:
        """Mean over seeds."""
        return float(np.mean([record.validation_acc for record in self.runs]))

    @cached_property
    def test_acc(self) -> Points:
        """In percent."""
        return _points([100 * record.measurements[RUNTIME].test_acc for record in self.runs])

    @property
    def conditions(self) -> Conditions:
        """Of its latencies: those of others do not compare."""
        return Conditions(self.runs[0].timed_on(RUNTIME), self.first.threads)

    def timing(self, batch: int) -> Timing | None:
        return self.first.latency_ms.get(str(batch))


@dataclass(frozen=True)
class Winners:
    """Who wins what, and among whom."""

    by_prize: dict[str, Candidate]  # most accurate, smallest, fastest at batch ...
    best: Candidate  # on validation images
    within: tuple[Candidate, ...]  # as accurate as the best
    num_rows: int  # of the table
    notes: tuple[str, ...]  # what a reader must know of the choice

    @property
    def prizes(self) -> dict[str, Candidate]:
        """Each winner once, by all that it won, in a few words."""
        winners = {winner.name: winner for winner in self.by_prize.values()}
        return {
            ", ".join(prize for prize, own in self.by_prize.items() if own is winner): winner
            for winner in winners.values()
        }


def find_winners(records: Iterable[Record]) -> Winners | None:
    """The winners of a table; None where nothing was measured in ONNX Runtime, whose files are deployed."""
    by_model: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.seed):
        if RUNTIME in record.measurements:
            by_model.setdefault(record.model, []).append(record)
    rows = [Candidate(tuple(runs)) for runs in by_model.values()]
    if not rows:
        return None
    best = min(rows, key=_preference)
    within = tuple(row for row in rows if points_below(best, row).mean <= MARGIN + ROUNDING)
    by_prize = {"most accurate": best, "smallest": min(within, key=lambda row: (row.first.file_mb, *_preference(row)))}
    timed, conditions = _timed_alike(rows)
    for batch in BATCHES:
        if fastest := _fastest([row for row in within if row in timed], batch):
            by_prize[f"fastest at batch {batch}"] = fastest
    left_out = [row for row in within if row.first.latency_ms and row not in timed]
    return Winners(by_prize, best, within, len(rows), tuple(_notes(best, by_prize, left_out, conditions)))


def points_below(best: Candidate, row: Candidate) -> Points:
    """How far a row's validation accuracy lies below the best's, over the seeds that both have."""
    of_best = {record.seed: record.validation_acc for record in best.runs}
    own = {record.seed: record.validation_acc for record in row.runs}
    paired = [100 * (of_best[seed] - own[seed]) for seed in own if seed in of_best]
    return _points(paired or [100 * (best.validation_acc - row.validation_acc)])


def _points(values: Sequence[float]) -> Points:
    return Points(float(np.mean(values)), confidence_interval(values))


def _preference(row: Candidate) -> tuple[float, float]:
    """Of two rows that are otherwise equal the one for which this is lower."""
    return -row.validation_acc, row.first.file_mb


def _timed_alike(rows: Sequence[Candidate]) -> tuple[list[Candidate], Conditions | None]:
    """Those whose latencies are of the conditions under which most were timed, and these."""
    timed = [row for row in rows if row.first.latency_ms]
    if not timed:
        return [], None
    ((conditions, _),) = Counter(row.conditions for row in timed).most_common(1)
    return [row for row in timed if row.conditions == conditions], conditions


def _fastest(rows: Sequence[Candidate], batch: int) -> Candidate | None:
    """Of those whose median lies within the quartiles of the lowest one, the preferred."""
    timings = [(timing, row) for row in rows if (timing := row.timing(batch)) is not None]
    if not timings:
        return None
    lowest, _ = min(timings, key=lambda pair: pair[0]["median_ms"])
    return min((row for timing, row in timings if timing["median_ms"] <= lowest["q3_ms"]), key=_preference)


def _notes(
    best: Candidate, by_prize: Mapping[str, Candidate], left_out: Sequence[Candidate], conditions: Conditions | None
) -> Iterator[str]:
    winners = {row.name: row for row in by_prize.values()}
    below = {name: points_below(best, row) for name, row in winners.items() if row is not best}
    if any(len(row.runs) == 1 for row in winners.values()):
        yield "one seed decides nothing: run with --seeds 3 or more before one is deployed"
    elif unsure := [name for name, points in below.items() if not points.mean + points.half_width <= MARGIN]:
        yield f"more seeds would tell whether it is so for {' and '.join(unsure)}, whose interval reaches beyond"
    if conditions is None:
        yield "none was timed"
    elif left_out:
        names = ", ".join(row.name for row in left_out)
        yield f"not compared in speed, as not timed on {conditions}: {names}"
    if len({row.first.latency_session for row in winners.values() if row not in left_out}) > 1:
        yield "not all were timed by turns: times compare only roughly"


def headline(winners: Winners) -> str:
    """Among how many rows, and how accurate."""
    seeds = sorted({len(row.runs) for row in winners.within})
    counts = f"{'–'.join(map(str, dict.fromkeys([seeds[0], seeds[-1]])))} seed{'s' if seeds != [1] else ''}"
    return (
        f"{len(winners.within)} of {winners.num_rows} rows are within {MARGIN} points of the best validation accuracy "
        f"({100 * winners.best.validation_acc:.2f} %, {winners.best.name}), {counts}"
    )


def format_winners(winners: Winners | None, folder: Path) -> str:
    """At most six lines: among whom, who won what and its file, and what is to be said of it; empty without any.

    Args:
        folder: of the checkpoints.
    """
    if winners is None:
        return ""
    rows = [
        [
            f"  {prize}:",
            winner.name,
            f"{winner.test_acc} %",
            *_figures(winner, "MB", "ms b{}"),
            str(folder / winner.file),
        ]
        for prize, winner in winners.prizes.items()
    ]
    table = tabulate(rows, tablefmt="plain", disable_numparse=True)
    notes = ["; ".join(winners.notes)] if winners.notes else []
    return "\n".join([f"what to deploy: {headline(winners)}", table, *notes])


def write_up_winners(winners: Winners | None, folder: Path) -> str:
    """The same in Markdown, with what it means; empty without any."""
    if winners is None:
        return ""
    rows = [
        [
            prize,
            winner.name,
            str(points_below(winners.best, winner)),
            str(winner.test_acc),
            *_figures(winner),
            f"`{folder / winner.file}`",
        ]
        for prize, winner in winners.prizes.items()
    ]
    alignment = ["left" if header in {"winner", "row", "file"} else "right" for header in HEADERS]
    table = tabulate(rows, headers=HEADERS, tablefmt="github", disable_numparse=True, colalign=alignment)
    legend = LEGEND.format(margin=MARGIN)
    notes = [f"{note[0].upper()}{note[1:]}." for note in winners.notes]
    return "\n\n".join([f"{headline(winners)}.", table, legend, *notes])


def _figures(row: Candidate, unit_of_size: str = "", unit_of_time: str = "") -> list[str]:
    """Size and times, blank where there is none."""
    timings = {batch: row.timing(batch) for batch in BATCHES}
    return [
        f"{row.first.file_mb:.3f} {unit_of_size}".strip(),
        *(
            "" if timing is None else f"{timing['median_ms']:.3f} {unit_of_time.format(batch)}".strip()
            for batch, timing in timings.items()
        ),
    ]
