"""A claim's comparisons, each with its effect, interval and verdict, and the files that hold them.

An effect is a difference or a ratio between two models of the same seed. Its 95 % interval is Student's t over
seeds, and the verdict follows from it: supported where the whole interval lies on the claim's side of its bound,
refuted where it lies on the other, undecided otherwise. Figures that bear on a claim without deciding it are
reported. Where predictions are compared image by image, McNemar's exact test says of every seed's two models
whether they differ on these very test images.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats
from tabulate import tabulate

from mnist_lab.files import write_text
from mnist_lab.report.findings import HEADERS, Verdict, cells_of
from mnist_lab.report.findings import Finding as Finding
from mnist_lab.report.findings import summarize as summarize
from mnist_lab.report.statistics import confidence_interval

Values = npt.NDArray[np.float64]
OVER_SEEDS = "paired t over seeds"


@dataclass(frozen=True)
class Claim:
    """A statement and the comparisons that test it."""

    number: int
    statement: str

    def below(
        self, comparison: str, values: Iterable[float], bound: float, unit: str, *, mcnemar_p: Sequence[float] = ()
    ) -> Finding:
        """The claim says that the effect is smaller than `bound`."""
        return self._test(comparison, values, bound, unit, sign=1, mcnemar_p=mcnemar_p)

    def above(
        self, comparison: str, values: Iterable[float], bound: float, unit: str, *, mcnemar_p: Sequence[float] = ()
    ) -> Finding:
        """The claim says that the effect is larger than `bound`."""
        return self._test(comparison, values, bound, unit, sign=-1, mcnemar_p=mcnemar_p)

    def report(
        self, comparison: str, values: Iterable[float], unit: str, *, mcnemar_p: Sequence[float] = ()
    ) -> Finding:
        """The claim says nothing of the effect, but it helps to judge it; its p-value is against 0."""
        return self._test(comparison, values, 0, unit, sign=0, mcnemar_p=mcnemar_p)

    def ratio(
        self, comparison: str, interval: tuple[float, float, float], *, n: int, below: float | None = None
    ) -> Finding:
        """A ratio of two medians with its 95 % interval, which the claim says is smaller than `below`, if anything."""
        effect, low, high = interval
        return Finding(
            claim=self.number,
            statement=self.statement,
            comparison=comparison,
            effect=effect,
            low=low,
            high=high,
            unit="ratio",
            bound="" if below is None else f"< {below:g}",
            test="notches of the medians over timed calls",
            p_value=float("nan"),
            n=n,
            verdict="reported" if below is None else decide(low, high, below, sign=1),
        )

    def _test(
        self,
        comparison: str,
        values: Iterable[float],
        bound: float,
        unit: str,
        *,
        sign: Literal[-1, 0, 1],
        mcnemar_p: Sequence[float],
    ) -> Finding:
        effects = np.array(list(values), dtype=float)
        mean, half_width = float(effects.mean()), confidence_interval(list(effects))
        low, high = mean - half_width, mean + half_width
        return Finding(
            claim=self.number,
            statement=self.statement,
            comparison=comparison,
            effect=mean,
            low=low,
            high=high,
            unit=unit,
            bound={1: f"< {bound:g}", -1: f"> {bound:g}", 0: ""}[sign],
            test=OVER_SEEDS,
            p_value=p_value(effects, bound),
            n=len(effects),
            verdict=decide(low, high, bound, sign=sign) if sign else "reported",
            mcnemar_p=list(mcnemar_p),
        )


def decide(low: float, high: float, bound: float, *, sign: Literal[-1, 1]) -> Verdict:
    """By the interval's place: `sign` 1 claims less than `bound`, −1 more. A single seed decides nothing."""
    ends = sorted(sign * (end - bound) for end in (low, high))
    if ends[1] < 0:
        return "supported"
    return "refuted" if ends[0] > 0 else "undecided"


def p_value(effects: Values, bound: float) -> float:
    """Two-sided one-sample t; where every seed gave the same, 1 on the bound and 0 off it."""
    if len(effects) < 2:
        return float("nan")
    if np.ptp(effects) == 0:
        return float(effects[0] == bound)
    return float(stats.ttest_1samp(effects, bound).pvalue)


def mcnemar(is_right: npt.NDArray[np.bool_], other_is_right: npt.NDArray[np.bool_]) -> float:
    """Exact two-sided p of McNemar's test: are the images that only one of two models gets right split evenly?"""
    only_one, only_other = int((is_right & ~other_is_right).sum()), int((~is_right & other_is_right).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(stats.binomtest(only_one, only_one + only_other).pvalue)


def ratio_of_medians(
    median: float, spread: float, num: int, other: float, other_spread: float, other_num: int
) -> tuple[float, float, float]:
    """The ratio of two medians and its 95 % interval, from the notches median ± 1.57·IQR/√n (McGill et al. 1978)."""
    notch, other_notch = 1.57 * spread / math.sqrt(num), 1.57 * other_spread / math.sqrt(other_num)
    return median / other, (median - notch) / (other + other_notch), (median + notch) / (other - other_notch)


def format_claims(findings: Sequence[Finding]) -> str:
    """The findings as Markdown, a table per claim."""
    parts = []
    for number, verdict in summarize(findings).items():
        own = [finding for finding in findings if finding.claim == number]
        headers = [*HEADERS]
        rows = [cells_of(finding) for finding in own]
        if any(finding.mcnemar_p for finding in own):
            headers.append("McNemar's p per seed")
            for row, finding in zip(rows, own, strict=True):
                row.append(" ".join(f"{p:.1g}" for p in finding.mcnemar_p))
        table = tabulate(rows, headers, "github", disable_numparse=True)
        parts.append(f"## {number}. {own[0].statement}: {verdict}\n\n{table}")
    return "\n\n".join(parts)


def write_claims(
    folder: Path, findings: Sequence[Finding], *, title: str, notes: Sequence[str] = (), name: str = "claims"
) -> None:
    """Write `claims.md` and `claims.json`, or of another name; `notes` say what was left untested, and why."""
    explanation = __doc__.partition(chr(10) * 2)[2].strip()
    text = "\n\n".join([f"# {title}", explanation, *notes, format_claims(findings)]) + "\n"
    fields = [
        {key: None if value != value else value for key, value in asdict(finding).items()}  # NaN is no JSON
        for finding in findings
    ]
    write_text(folder / f"{name}.md", text)
    write_text(folder / f"{name}.json", json.dumps(fields, indent=1) + "\n")
