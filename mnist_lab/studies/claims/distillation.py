"""The claims about distilling a mixture and about techniques together: the rows compared, and what settles them."""

from typing import NamedTuple

from mnist_lab.compress.distill import Distil, DistillationConfig
from mnist_lab.compress.distill_mixture import DistilMixture, Matching, SmallMixture
from mnist_lab.compress.finetune import Finetuning
from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.prune_neurons import NeuronPruning, PruneNeurons
from mnist_lab.compress.prune_weights import PruneWeights, WeightPruning
from mnist_lab.compress.qat import Quantization
from mnist_lab.compress.train import TrainFFN
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import (
    MOE,
    STUDENT,
    learned,
    pruned_neurons,
    pruned_weights,
    student_mixture,
)
from mnist_lab.report.curve import PRINTED
from mnist_lab.studies.claims.evidence import Accuracies, Evidence
from mnist_lab.studies.claims.findings import Claim, Finding

BY_ITSELF = Finetuning(teacher="self")
SMALL = SmallMixture()


def mixture(router_weight: float, experts_weight: float) -> Row:
    """The small mixture, with these weights of what it learns besides the logits."""
    return student_mixture(MOE, DistilMixture(student=SMALL, matching=Matching(router_weight, experts_weight)))


def dense(widths: tuple[int, ...], taught: bool = True) -> Row:
    """A dense student of other widths, taught by the mixture or by labels alone."""
    name = "x".join(map(str, widths))
    if taught:
        return Row("KD_FFN", Distil(shape=widths), teacher=MOE, variant=name)
    return Row("FFN", TrainFFN(widths), variant=name)


MATCHED = student_mixture(MOE, DistilMixture(student=SMALL))
LOGITS_ALONE = mixture(0, 0)
IN_PART = {"router": mixture(Matching().router_weight, 0), "experts": mixture(0, Matching().experts_weight)}
UNTAUGHT = student_mixture(MOE, DistilMixture(DistillationConfig(alpha=0), SMALL, Matching(0, 0)))
EQUAL_BYTES = dense((106,))  # 84,280 parameters beside 84,618
EQUAL_TIME = STUDENT  # for batches; for one image the mixture takes longer than one far larger,
LARGER = dense((256, 128))


class Sized(NamedTuple):
    """A row of about 134 kB, a twenty-second of the mixture's file, by what was done."""

    name: str
    row: Row


HALF = pruned_neurons(MOE, PruneNeurons(NeuronPruning(0.5), BY_ITSELF))
COMBINED = Sized(
    "half of the units gone, then 4 bits",
    learned(HALF, Quantization(Rounding(4))),
)
ALONE = (
    Sized("1 bit", learned(MOE, Quantization(Rounding(1)))),
    Sized("seven eighths of the units gone", pruned_neurons(MOE, PruneNeurons(NeuronPruning(0.875), BY_ITSELF))),
    Sized("98.6 % zeros", pruned_weights(MOE, PruneWeights(WeightPruning(0.986), BY_ITSELF))),
    Sized("a dense student", dense((42,))),
)
FROM_SCRATCH = dense((42,), taught=False)
# What the printed curve says each size costs, in points; the rows are of no more bytes.
PRINTED_POINTS = {ratio: accuracy - PRINTED[1] for ratio, accuracy in PRINTED.items() if ratio > 1}
SMALLER: dict[int, Row] = {
    2: HALF,
    4: learned(MOE, Quantization(Rounding(4))),
    8: learned(MOE, Quantization(Rounding(3))),
    16: learned(MOE, Quantization(Rounding("ternary"))),
}


def distillation_rows() -> tuple[Row, ...]:
    """Everything that these claims compare, parents first."""
    mixtures = [MATCHED, LOGITS_ALONE, *IN_PART.values(), UNTAUGHT]
    rows = [MOE, *mixtures, EQUAL_BYTES, EQUAL_TIME, LARGER, COMBINED.row, *(alone.row for alone in ALONE)]
    return tuple(dict.fromkeys([*rows, FROM_SCRATCH, *SMALLER.values()]))


TIMED_STUDENTS = (MATCHED, EQUAL_BYTES, EQUAL_TIME, LARGER)


def settle_distillation(evidence: Evidence) -> list[Finding]:
    """Claims 25 to 28."""
    return [*_matching(evidence), *_dense_student(evidence), *_together(evidence), *_printed_curve(evidence)]


def _accuracies(evidence: Evidence, row: Row, other: Row, label: str) -> Accuracies:
    return evidence.accuracies(row.name, other.name, label)


def _matching(evidence: Evidence) -> list[Finding]:
    claim = Claim(25, "Matching router and experts as well as logits makes a better small mixture")

    return [
        claim.above(
            **_accuracies(evidence, MATCHED, LOGITS_ALONE, "router, experts and logits − logits alone"), bound=0
        ),
        *(
            claim.report(**_accuracies(evidence, row, LOGITS_ALONE, f"{what} and logits − logits alone"))
            for what, row in IN_PART.items()
        ),
        claim.report(**_accuracies(evidence, LOGITS_ALONE, UNTAUGHT, "logits alone − labels alone")),
        claim.report(**_accuracies(evidence, MATCHED, MOE, "router, experts and logits − the teacher")),
    ]


def _dense_student(evidence: Evidence) -> list[Finding]:
    claim = Claim(26, "A dense student gives up the mixture's advantage")
    dense_ones = {"equal bytes": EQUAL_BYTES, "no slower": EQUAL_TIME, "no slower for one image": LARGER}

    def accuracies(name: str) -> Accuracies:
        return _accuracies(evidence, MATCHED, dense_ones[name], f"mixture − dense student, {name}")

    return [
        claim.above(**accuracies("equal bytes"), bound=0),
        claim.above(**accuracies("no slower"), bound=0),
        claim.report(**accuracies("no slower for one image")),
        *(
            claim.report(f"file, mixture / dense student, {name}", evidence.file_share(MATCHED.name, row.name), "ratio")
            for name, row in dense_ones.items()
        ),
        *(
            claim.report(
                f"time, mixture / dense student, {name}, batch {batch}",
                evidence.time_ratio(MATCHED.name, row.name, batch),
                "ratio",
            )
            for name, row in dense_ones.items()
            for batch in (1, 64)
        ),
    ]


def _together(evidence: Evidence) -> list[Finding]:
    claim = Claim(27, "Combining techniques beats each alone at equal bytes")
    return [
        *(
            claim.above(**_accuracies(evidence, COMBINED.row, alone.row, f"{COMBINED.name} − {alone.name}"), bound=0)
            for alone in ALONE
        ),
        claim.report(**_accuracies(evidence, COMBINED.row, FROM_SCRATCH, f"{COMBINED.name} − from scratch")),
        claim.report(**_accuracies(evidence, COMBINED.row, MOE, f"{COMBINED.name} − the original")),
        *(
            claim.report(f"file, {one.name} / the original", evidence.file_share(one.row.name, MOE.name), "ratio")
            for one in (COMBINED, *ALONE)
        ),
    ]


def _printed_curve(evidence: Evidence) -> list[Finding]:
    claim = Claim(28, "The printed curve: a file 16 times smaller costs ten points")
    losses = {ratio: evidence.acc_points(row.name, MOE.name) for ratio, row in SMALLER.items()}
    return [
        claim.below("test accuracy, 16 times smaller − the original", losses[16], bound=-9, unit="points"),
        *(
            claim.report(
                f"test accuracy, {ratio} times smaller − the original, printed as {PRINTED_POINTS[ratio]:+g}",
                loss,
                "points",
            )
            for ratio, loss in losses.items()
        ),
        *(
            claim.report(
                f"file, the original / {ratio} times smaller", 1 / evidence.file_share(row.name, MOE.name), "ratio"
            )
            for ratio, row in SMALLER.items()
        ),
    ]
