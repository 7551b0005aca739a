"""The figures of a claims folder, which holds the runs of both suites."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from mnist_lab.report.drawing import Figure, write_figures
from mnist_lab.report.records import CONTROL, Record
from mnist_lab.studies.claims.compression import ZEROS
from mnist_lab.studies.claims.compression_figures import PRUNING_CLAIM_FIGURES
from mnist_lab.studies.claims.evidence import Evidence
from mnist_lab.studies.claims.few_bits import ROUTER_LEARNED
from mnist_lab.studies.claims.few_bits_figures import FEW_BITS_CLAIM_FIGURES
from mnist_lab.studies.claims.figures import CLAIM_FIGURES

SuiteName = Literal["models", "compression", "few-bits", "transfer", "distillation"]


class Suite(NamedTuple):
    """What is drawn of one suite's runs."""

    anchor: str  # a row of this suite alone, whose seeds and recipe are the suite's
    figures: Mapping[str, Callable[[Evidence], Figure | None]]


SUITES: dict[SuiteName, Suite] = {  # of the others nothing is drawn
    "models": Suite(CONTROL, CLAIM_FIGURES),
    "compression": Suite(ZEROS[0.5].after.name, PRUNING_CLAIM_FIGURES),
    "few-bits": Suite(ROUTER_LEARNED.name, FEW_BITS_CLAIM_FIGURES),
}


def draw_claims(folder: Path, records: Sequence[Record], *suites: SuiteName) -> Iterator[Path]:
    """Write every figure of these suites for which the runs are there into `folder/plots`; gives each file once it is
    written.

    Raises:
        RunFailed: as `write_figures`.
    """
    drawings: dict[str, Callable[[], Figure | None]] = {}
    for suite in filter(SUITES.__contains__, suites):
        anchor, figures = SUITES[suite]
        evidence = Evidence.in_folder(folder, records, anchor)
        drawings |= {name: partial(draw, evidence) for name, draw in figures.items()}
    return write_figures(folder, drawings)
