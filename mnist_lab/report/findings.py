"""What claims came to: findings, and the files that hold them. No torch here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from mnist_lab.files import read_bytes, reading

Verdict = Literal["supported", "refuted", "undecided", "reported"]
HEADERS = ("comparison", "effect", "95 % interval", "unit", "claimed", "p", "n", "verdict")
NO_FIGURES = ("low", "high", "p_value")  # of a single seed, in a file null


@dataclass(frozen=True)
class Finding:
    """One comparison that bears on a claim."""

    claim: int
    statement: str
    comparison: str
    effect: float  # mean over seeds
    low: float  # 95 % interval; with `high` NaN for a single seed
    high: float
    unit: str
    bound: str  # what the effect must satisfy for the claim to hold; empty where it is only reported
    test: str
    p_value: float  # two-sided, of the effect against its bound; NaN for a single seed
    n: int
    verdict: Verdict
    mcnemar_p: list[float] = field(default_factory=list)  # per seed; empty where no images are compared


def summarize(findings: Sequence[Finding]) -> dict[int, Verdict]:
    """A claim is supported where all of its comparisons are, refuted where one is, undecided otherwise."""
    verdicts: dict[int, Verdict] = {}
    for number in sorted({finding.claim for finding in findings}):
        own = {finding.verdict for finding in findings if finding.claim == number} - {"reported"}
        verdicts[number] = "refuted" if "refuted" in own else "supported" if own == {"supported"} else "undecided"
    return verdicts


def cells_of(finding: Finding) -> list[str]:
    """A finding as text, one cell under each of `HEADERS`."""
    return [
        finding.comparison,
        f"{finding.effect:+.4g}",
        "" if math.isnan(finding.low) else f"[{finding.low:+.4g}, {finding.high:+.4g}]",
        finding.unit,
        finding.bound,
        "" if math.isnan(finding.p_value) else f"{finding.p_value:.2g}",
        str(finding.n),
        finding.verdict,
    ]


def load_findings(folder: Path) -> list[Finding]:
    """Those of every `claims*.json` in a results folder, by claim; none where there is no such file.

    Raises:
        UserError: a file is broken.
    """
    findings: list[Finding] = []
    for path in sorted(folder.glob("claims*.json")):
        with reading(path, "Delete it and test the claims again."):
            stored = msgspec.json.decode(read_bytes(path), type=list[dict[str, Any]])
            found = [fields | {name: math.nan for name in NO_FIGURES if fields[name] is None} for fields in stored]
            findings += msgspec.convert(found, list[Finding])
    return sorted(findings, key=lambda finding: finding.claim)
