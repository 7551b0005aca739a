"""The claim about a model that becomes one of another data set: the rows that it compares, and what settles it."""

from typing import NamedTuple

from mnist_lab.compress.adapters import Adapters, AdaptLowRank, FinetuneAll
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import MOE, adapted
from mnist_lab.sources import DatasetName
from mnist_lab.studies.claims.evidence import Evidence
from mnist_lab.studies.claims.findings import Claim, Finding, Values

SOURCE = MOE  # on the data set that it comes from
MARGIN_POINTS = 0.3  # that a match may be behind


class Ways(NamedTuple):
    """To make a model of one data set one of another."""

    adapters: Row
    from_loftq: Row
    full: Row


def transfer_rows(dataset: DatasetName) -> Ways:
    """What becomes of a model that was trained on `dataset`."""
    steps = (AdaptLowRank(), AdaptLowRank(Adapters(init="loftq")), FinetuneAll())
    return Ways(*(adapted(SOURCE, dataset, step) for step in steps))


def source_for(dataset: str) -> DatasetName:
    """The data set whose models are to become ones of `dataset`."""
    return "fashion-mnist" if dataset == "mnist" else "mnist"


def settle_transfer(evidence: Evidence, dataset: DatasetName) -> list[Finding]:
    """Claim 24."""
    claim = Claim(24, "4-bit adapters match full fine-tuning")
    adapters, from_loftq, full = (row.name for row in transfer_rows(dataset))

    def proved(name: str) -> Values:
        return evidence.per_seed(adapters, lambda record: (record.proof or {})[name])

    return [
        claim.above(
            **evidence.accuracies(adapters, full, "adapters − full fine-tuning"),
            bound=-MARGIN_POINTS,
        ),
        claim.report(**evidence.accuracies(from_loftq, full, "adapters from LoftQ − full fine-tuning")),
        claim.report(**evidence.accuracies(from_loftq, adapters, "adapters from LoftQ − from zero")),
        claim.report("parameters trained, adapters / full fine-tuning", proved("trained_share"), "share"),
        claim.report(
            "bytes at the peak of a step, adapters / full fine-tuning",
            proved("step_bytes") / proved("step_bytes_of_all"),
            "share",
        ),
    ]
