"""The claims about pruning a mixture: the rows that they compare, and the comparisons that settle them."""

from collections.abc import Callable
from typing import NamedTuple

from mnist_lab.compress.finetune import Finetuning
from mnist_lab.compress.merge_experts import MergeExperts
from mnist_lab.compress.prune_experts import PruneExperts
from mnist_lab.compress.prune_neurons import NeuronPruning, PruneNeurons
from mnist_lab.compress.prune_router import PruneRouter
from mnist_lab.compress.prune_weights import Allocation, PruneWeights, WeightPruning
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import (
    MOE,
    merged_experts,
    pruned_experts,
    pruned_neurons,
    pruned_router,
    pruned_weights,
    rival,
    sparse_moe,
)
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.studies.claims.evidence import (
    Accuracies,
    Evidence,
    load_of_the_least_visited,
    loss_beyond_the_most_visited,
    pruned_gate_share,
)
from mnist_lab.studies.claims.findings import Claim, Finding, Values

BEFORE, AFTER = "before fine-tuning", "after fine-tuning"


class Pruned(NamedTuple):
    """One technique's rows, before and after fine-tuning."""

    before: Row
    after: Row


def both(make: Callable[[Finetuning], Row]) -> Pruned:
    """Not trained after the cut, and trained a little more, also towards what the model said before."""
    return Pruned(make(Finetuning(finetune_epochs=0)), make(Finetuning(teacher="self")))


def zeros(ratio: float, source: Row = MOE, allocation: Allocation = "even") -> Pruned:
    """A mixture with that share of its weights at zero."""
    pruning = WeightPruning(ratio, allocation=allocation)
    return both(lambda finetuning: pruned_weights(source, PruneWeights(pruning, finetuning)))


def narrower(ratio: float) -> Pruned:
    """The mixture without that share of its units."""
    return both(lambda finetuning: pruned_neurons(MOE, PruneNeurons(NeuronPruning(ratio), finetuning)))


UNBALANCED = sparse_moe(RoutingConfig(balance="none"))  # whose experts are used unevenly
MIXTURES = {"without a balance loss": UNBALANCED, "with a balance loss": MOE}
ADAPTED: tuple[Allocation, ...] = ("utilization", "sensitivity")
ALLOCATIONS: tuple[Allocation, ...] = ("even", *ADAPTED)
SHARED_OUT = {
    f"80 % zeros {BEFORE}": {allocation: zeros(0.8, UNBALANCED, allocation).before for allocation in ALLOCATIONS},
    f"95 % zeros {AFTER}": {allocation: zeros(0.95, UNBALANCED, allocation).after for allocation in ALLOCATIONS},
}
ZEROS = {ratio: zeros(ratio) for ratio in (0.5, 0.8, 0.9, 0.95, 0.98)}
ROUTER = both(lambda finetuning: pruned_router(PruneRouter(0.5, finetuning)))
FEWER = both(lambda finetuning: pruned_experts(PruneExperts(finetuning=finetuning)))
# About the bytes that two of four experts leave, 0.64 of the file: of widths, which are multiples of 8, the nearest
# leave 0.66; a fifth of the weights 0.60, as one that is stored with its place takes 12 bytes in place of 4.
SAME_BYTES = {
    "4 → 2 experts": FEWER,
    "4 → 2 by merging": both(lambda finetuning: merged_experts(MergeExperts(finetuning=finetuning))),
    "22 % of the units gone": narrower(0.22),
    "80 % zeros": ZEROS[0.8],
}
HALF_OF_PARAMETERS = narrower(0.34).after  # 0.49 are left
SMALL = {
    "4 → 2 experts": FEWER.after,
    "half of the units gone": narrower(0.5).after,
    "three quarters of the units gone": narrower(0.75).after,
    "90 % zeros": ZEROS[0.9].after,
}


def compression_rows() -> tuple[Row, ...]:
    """Everything that the claims about pruning compare, parents first."""
    shared_out = [row for rows in SHARED_OUT.values() for row in rows.values()]
    alike = [row for ratio in (0.5, 0.95, 0.98) for row in ZEROS[ratio]]
    same_bytes = [row for pruned in SAME_BYTES.values() for row in pruned]
    with_rivals = [row for small in SMALL.values() for row in (small, rival(small))]
    at_one_ratio = [zeros(ratio, source).before for source in MIXTURES.values() for ratio in (0.8, 0.9)]
    rows = [MOE, UNBALANCED, *at_one_ratio, *shared_out, *alike, *ROUTER, *same_bytes, HALF_OF_PARAMETERS]
    return tuple(dict.fromkeys([*rows, *with_rivals]))


def settle_compression(evidence: Evidence) -> list[Finding]:
    """Claims 15 to 19."""
    return [
        *_one_ratio_for_all(evidence),
        *_likeness(evidence),
        *_router(evidence),
        *_whole_experts(evidence),
        *_half_and_rivals(evidence),
    ]


def _accuracies(evidence: Evidence, row: Row, other: Row, label: str) -> Accuracies:
    return evidence.accuracies(row.name, other.name, label)


def _against_original(evidence: Evidence, row: Row, label: str) -> Accuracies:
    return _accuracies(evidence, row, MOE, f"{label} − the original")


def _one_ratio_for_all(evidence: Evidence) -> list[Finding]:
    claim = Claim(
        15, "One ratio for all experts hurts the rarely used ones more; adapted ratios do better at the same total"
    )

    def rise(mixture: str, ratio: float) -> tuple[str, Values]:
        label = f"rise in loss, images of the least visited expert − of the most, {100 * ratio:.0f} % zeros {BEFORE}"
        row = zeros(ratio, MIXTURES[mixture]).before
        return f"{label}, {mixture}", evidence.per_seed(row.name, loss_beyond_the_most_visited)

    uneven, even = MIXTURES
    untrained, trained = (
        [_accuracies(evidence, rows[each], rows["even"], f"{label}, by {each} − even") for each in ADAPTED]
        for label, rows in SHARED_OUT.items()
    )
    return [
        claim.above(*rise(uneven, 0.9), bound=0, unit="nats"),
        *(claim.above(**gain, bound=0) for gain in trained),
        *(claim.report(*rise(*case), unit="nats") for case in ((even, 0.9), (uneven, 0.8), (even, 0.8))),
        *(
            claim.report(
                f"load of the least visited expert, {mixture}",
                evidence.per_seed(zeros(0.9, source).before.name, load_of_the_least_visited),
                "share",
            )
            for mixture, source in MIXTURES.items()
        ),
        *(claim.report(**gain) for gain in untrained),
    ]


def _likeness(evidence: Evidence) -> list[Finding]:
    claim = Claim(16, "Aggressive pruning makes experts alike")

    def rise(ratio: float, row: Row, when: str) -> tuple[str, Values]:
        values = evidence.against_original(row.name, "expert_cka")
        values = values - evidence.against_original(row.name, "expert_cka_before")
        return f"likeness of experts' outputs (CKA), {100 * ratio:.0f} % zeros {when} − the original", values

    trained = {ratio: rise(ratio, ZEROS[ratio].after, AFTER) for ratio in (0.5, 0.95, 0.98)}
    return [
        *(claim.above(*trained[ratio], bound=0, unit="") for ratio in (0.95, 0.98)),
        claim.report(*trained[0.5], unit=""),
        *(claim.report(*rise(ratio, ZEROS[ratio].before, BEFORE), unit="") for ratio in (0.5, 0.95, 0.98)),
    ]


def _router(evidence: Evidence) -> list[Finding]:
    claim = Claim(17, "Pruning the router saves next to nothing and endangers routing")

    def overlap(row: Row, when: str) -> tuple[str, Values]:
        label = f"overlap of an image's experts with the original's (Jaccard), half of the gate {when}"
        return label, evidence.against_original(row.name, "routes_jaccard")

    before, after = ROUTER
    saved = evidence.per_seed(before.name, pruned_gate_share)
    return [
        claim.below("half of the gate, of all parameters", saved, 0.01, "share"),
        claim.below(*overlap(before, BEFORE), bound=0.95, unit="share"),
        claim.below(**_against_original(evidence, before, f"half of the gate {BEFORE}"), bound=0),
        claim.report(*overlap(after, AFTER), unit="share"),
        claim.report(**_against_original(evidence, after, f"half of the gate {AFTER}")),
    ]


def _whole_experts(evidence: Evidence) -> list[Finding]:
    claim = Claim(
        18, "At equal bytes removing experts is the most disruptive form; fine-tuning brings the accuracy back"
    )
    (experts, fewer), *others = SAME_BYTES.items()
    return [
        *(
            claim.below(**_accuracies(evidence, fewer.before, other.before, f"{experts} − {label}, {BEFORE}"), bound=0)
            for label, other in others
        ),
        claim.above(**_against_original(evidence, fewer.after, f"{experts} {AFTER}"), bound=-0.05),
        *(
            claim.report(**_against_original(evidence, pruned.before, f"{label} {BEFORE}"))
            for label, pruned in SAME_BYTES.items()
        ),
        *(claim.report(**_against_original(evidence, pruned.after, f"{label} {AFTER}")) for label, pruned in others),
        *(
            claim.report(f"file, {label} / the original", evidence.file_share(pruned.after.name, MOE.name), "share")
            for label, pruned in SAME_BYTES.items()
        ),
    ]


def _half_and_rivals(evidence: Evidence) -> list[Finding]:
    claim = Claim(
        19,
        "Half of the parameters are not needed; and pruning a large model beats training a small one of the same bytes",
    )
    return [
        claim.above(**_against_original(evidence, ZEROS[0.5].after, "50 % zeros"), bound=-0.1),
        *(
            claim.above(**_accuracies(evidence, row, rival(row), f"{label} − its rival from scratch"), bound=0)
            for label, row in SMALL.items()
        ),
        claim.report(
            **_against_original(evidence, HALF_OF_PARAMETERS, "34 % of the units gone, half of the parameters")
        ),
        *(
            claim.report(f"file, {label} / its rival", evidence.file_share(row.name, rival(row).name), "ratio")
            for label, row in SMALL.items()
        ),
    ]
