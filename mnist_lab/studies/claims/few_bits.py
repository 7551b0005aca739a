"""The claims about fewer bits: the rows that they compare, and the comparisons that settle them."""

from typing import NamedTuple

import numpy as np

from mnist_lab.compress.levels import Bits, Rounding, name_of
from mnist_lab.compress.mixed_bits import MixedBits
from mnist_lab.compress.qat import Quantization
from mnist_lab.compress.weight_only import Method, WeightOnly
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import MOE, learned, mixed_bits, sparse_moe, weight_only
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.report.few_bits_figures import expert_bits
from mnist_lab.report.records import Record
from mnist_lab.studies.claims.evidence import Accuracies, Evidence, living_experts
from mnist_lab.studies.claims.findings import Claim, Finding, Values

SCHEMES = {"": Method(), " with zero points": Method(scheme="affine")}
LEAST_RISE = 1e-7  # nats a visit, that float32 tells from none
UNBALANCED = sparse_moe(RoutingConfig(balance="none"))  # whose experts are used unevenly
MIXTURES = {"experts used unevenly (no balance loss)": UNBALANCED, "the usual mixture": MOE}


class Mixed(NamedTuple):
    """The same bytes, shared out by what each layer is worth, and evenly: all in 3 bits, or in 2 or 3 by lot."""

    by_sensitivity: Row
    evenly: Row


def rounded(bits: Bits, method: Method = Method()) -> Row:
    """Weights of so many bits, after training."""
    return weight_only(MOE, WeightOnly(Rounding(bits), method))


def mixed(mean_bits: float, method: Method = Method(), source: Row = MOE) -> Mixed:
    by_sensitivity, evenly = (
        mixed_bits(source, MixedBits(None, mean_bits, allocation, method)) for allocation in ("sensitivity", "even")
    )
    return Mixed(by_sensitivity, evenly)


MIXED = {
    f"{mean_bits:g} bits{note}": mixed(mean_bits, method) for mean_bits in (2.5, 3) for note, method in SCHEMES.items()
}
OF_MIXTURES = {name: mixed(2.5, source=source) for name, source in MIXTURES.items()}
IN_8 = rounded(8)
ROUTER = {bits: rounded(8, Method(router_bits=bits)) for bits in (8, 4, 2)}
ROUTER_LEARNED = learned(MOE, Quantization(Rounding(8), router_bits=2))
LEARNED_IN_8 = learned(MOE, Quantization(Rounding(8)))
ACTIVATIONS = {bits: rounded(8, Method(activation_bits=bits)) for bits in (8, 4)}
FEW: tuple[Bits, ...] = (2, "ternary")
TRIED: tuple[Bits, ...] = (3, *FEW)
BY_LAYERS = {bits: learned(MOE, Quantization(Rounding(bits), learn="layers")) for bits in TRIED}
LEARNED: dict[Bits, Row] = {bits: learned(MOE, Quantization(Rounding(bits))) for bits in (4, 2, "ternary", 1)}


def few_bits_rows() -> tuple[Row, ...]:
    """Everything that the claims about fewer bits compare, parents first."""
    of_mixed = [row for pair in (*OF_MIXTURES.values(), *MIXED.values()) for row in pair]
    rounded_alone = [rounded(bits, method) for bits in TRIED for method in SCHEMES.values()]
    routers = [IN_8, *ROUTER.values(), LEARNED_IN_8, ROUTER_LEARNED]
    rows = [MOE, UNBALANCED, *of_mixed, *routers, *ACTIVATIONS.values(), *rounded_alone]
    return tuple(dict.fromkeys([*rows, *BY_LAYERS.values(), *LEARNED.values()]))


def settle_few_bits(evidence: Evidence) -> list[Finding]:
    """Claims 20 to 23."""
    return [*_mixed(evidence), *_router(evidence), *_activations(evidence), *_layers(evidence)]


def rise_per_visit(record: Record) -> tuple[Values, Values]:
    """Load of each living expert, the least visited first, and what two bits cost a visit, in nats: the sum over its
    layers, each alone in two bits.
    """
    assert record.proof is not None
    load, rise = (np.array(record.proof[name], dtype=float) for name in ("load", "rise_per_visit"))
    living = living_experts(load)
    return load[living], np.maximum(rise[living], LEAST_RISE)


def sensitivity_of_the_least_visited(record: Record) -> float:
    """What a visit of the least visited living expert costs beyond one of the most visited, as log of their ratio."""
    _, rise = rise_per_visit(record)
    return float(np.log(rise[0] / rise[-1]))


def bits_of_the_least_visited(record: Record) -> float:
    """Mean bits of the least visited living expert's weights beyond the most visited's."""
    assert record.proof is not None
    bits, living = expert_bits(record.proof["bits"]), living_experts(np.array(record.proof["load"]))
    return bits[living[0]] - bits[living[-1]]


def _accuracies(evidence: Evidence, row: Row, other: Row, label: str) -> Accuracies:
    return evidence.accuracies(row.name, other.name, label)


def _mixed(evidence: Evidence) -> list[Finding]:
    claim = Claim(
        20,
        "Experts used less are more sensitive to rounding; mixing bits by expert beats one width for all at the same "
        "bytes",
    )

    def sensitivity(mixture: str) -> tuple[str, Values]:
        label = f"rise in KL per visit in 2 bits, log(least visited / most visited expert), {mixture}"
        return label, evidence.per_seed(OF_MIXTURES[mixture].by_sensitivity.name, sensitivity_of_the_least_visited)

    def bits(mixture: str) -> tuple[str, Values]:
        label = f"mean bits of the least visited expert − of the most, 2.5 bits, {mixture}"
        return label, evidence.per_seed(OF_MIXTURES[mixture].by_sensitivity.name, bits_of_the_least_visited)

    def divergence(name: str) -> tuple[str, Values]:
        one, other = (evidence.against_original(row.name, "kl_to_original") for row in MIXED[name])
        return f"KL to the original, by sensitivity − evenly, {name}", 1000 * (one - other)

    uneven, even = MIXTURES
    return [
        claim.above(*sensitivity(uneven), bound=0, unit=""),
        *(
            claim.above(**_accuracies(evidence, *pair, f"by sensitivity − evenly, {name}"), bound=0)
            for name, pair in MIXED.items()
        ),
        claim.report(*sensitivity(even), unit=""),
        *(claim.report(*bits(mixture), unit="bits") for mixture in MIXTURES),
        claim.report(**_accuracies(evidence, *OF_MIXTURES[uneven], f"by sensitivity − evenly, 2.5 bits, {uneven}")),
        *(claim.report(*divergence(name), unit="millinats") for name in MIXED),
        *(
            claim.report(
                f"file, by sensitivity / evenly, {name}",
                evidence.file_share(pair.by_sensitivity.name, pair.evenly.name),
                "ratio",
            )
            for name, pair in MIXED.items()
        ),
    ]


def _router(evidence: Evidence) -> list[Finding]:
    claim = Claim(21, "Rounding the router changes the chosen experts; training for it helps")

    def rerouted(bits: int, name: str = "rerouted") -> Values:
        more = evidence.against_original(ROUTER[bits].name, name) - evidence.against_original(IN_8.name, name)
        return 100 * more

    gains = evidence.acc_points(ROUTER_LEARNED.name, LEARNED_IN_8.name) - evidence.acc_points(ROUTER[2].name, IN_8.name)
    return [
        claim.above("images with other experts, router in 2 bits − in float", rerouted(2), bound=5, unit="points"),
        claim.above(
            "test accuracy, router in 2 bits − in float, trained for − not trained for", gains, bound=0, unit="points"
        ),
        *(
            claim.report(f"images with other experts, router in {bits} bits − in float", rerouted(bits), "points")
            for bits in (8, 4)
        ),
        *(
            claim.report(
                f"images with other experts and another answer, router in {bits} bits − in float",
                rerouted(bits, "rerouted_other_class"),
                "points",
            )
            for bits in (8, 4, 2)
        ),
        *(
            claim.report(**_accuracies(evidence, row, IN_8, f"router in {bits} bits − in float"))
            for bits, row in ROUTER.items()
        ),
        claim.report(**_accuracies(evidence, ROUTER_LEARNED, LEARNED_IN_8, "router in 2 bits − in float, learned")),
    ]


def _activations(evidence: Evidence) -> list[Finding]:
    claim = Claim(22, "Rounding activations upsets the load")

    def unevenness(bits: int) -> tuple[str, Values]:
        in_float, own = (evidence.against_original(row.name, "load_cv") for row in (IN_8, ACTIVATIONS[bits]))
        return f"load's variation (CV), activations in {bits} bits − in float", own - in_float

    def rerouted(bits: int) -> tuple[str, Values]:
        in_float, own = (evidence.against_original(row.name, "rerouted") for row in (IN_8, ACTIVATIONS[bits]))
        return f"images with other experts, activations in {bits} bits − in float", 100 * (own - in_float)

    return [
        *(claim.above(*unevenness(bits), bound=0.05, unit="") for bits in ACTIVATIONS),
        claim.report("load's variation (CV), in float", evidence.against_original(IN_8.name, "load_cv"), ""),
        *(claim.report(*rerouted(bits), unit="points") for bits in ACTIVATIONS),
        *(
            claim.report(**_accuracies(evidence, row, IN_8, f"activations in {bits} bits − in float"))
            for bits, row in ACTIVATIONS.items()
        ),
    ]


def _layers(evidence: Evidence) -> list[Finding]:
    claim = Claim(23, "Layer-wise distillation beats rounding alone at few bits")

    def gains(bits: Bits) -> list[Accuracies]:
        return [
            _accuracies(
                evidence, BY_LAYERS[bits], rounded(bits, method), f"layer by layer − rounded{note}, {name_of(bits)}"
            )
            for note, method in SCHEMES.items()
        ]

    return [
        *(claim.above(**gain, bound=0) for bits in FEW for gain in gains(bits)),
        *(claim.report(**gain) for gain in gains(3)),
        *(
            claim.report(**_accuracies(evidence, row, MOE, f"layer by layer, {name_of(bits)} − the original"))
            for bits, row in BY_LAYERS.items()
        ),
        *(
            claim.report(**_accuracies(evidence, row, MOE, f"trained with them (QAT), {name_of(bits)} − the original"))
            for bits, row in LEARNED.items()
        ),
    ]
