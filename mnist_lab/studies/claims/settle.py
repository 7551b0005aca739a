"""The usual claims, each with the comparisons that settle it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from mnist_lab.files import check_seal, read_bytes, reading
from mnist_lab.machine import Machine
from mnist_lab.measure import TABLE_BATCHES
from mnist_lab.report.records import CONTROL, Amount, Count, Record
from mnist_lab.studies.claims.evidence import (
    Evidence,
    cost_of_closing,
    divergence,
    knowledge_of_digits,
    load_cv,
    load_entropy,
    mean_confidence,
    num_dead_experts,
    routing_share,
    soften,
    unevenness_of_closing,
)
from mnist_lab.studies.claims.findings import Claim, Finding, Values, ratio_of_medians

FP32_MOE, STUDENT, FROM_FFN, NO_KD = "Sparse_MoE", "KD_FFN_Student", "KD_FFN_Student_from_FFN", CONTROL
BALANCED = {"entropy": "Sparse_MoE", "Switch": "Sparse_MoE-switch", "CV²": "Sparse_MoE-cv"}
WRONG_SIGN, UNBALANCED, WITHOUT_NOISE = "Sparse_MoE-wrong-sign", "Sparse_MoE-none", "Sparse_MoE-noiseFalse"


@dataclass(frozen=True)
class Settings:
    """What claims compare besides the nine models, by the names of the models."""

    calibrations: Sequence[str]  # static INT8 forms of the MoE
    winner: str  # the name's ending of the students whose temperature and alpha won; empty for the defaults
    grid: Evidence  # students of every temperature and alpha, on a quicker recipe, with fewer seeds


def settle_claims(evidence: Evidence, settings: Settings) -> list[Finding]:
    """Every claim that the records can settle."""
    return [
        *_sparse_against_dense(evidence),
        *_int8_of_the_ffn(evidence),
        *_int8_of_the_moe(evidence),
        *_static_calibration(evidence, settings.calibrations),
        *_int8_speed_of_the_moe(evidence),
        *_balance(evidence),
        *_specialisation(evidence),
        *_noise(evidence),
        *_distillation(evidence, settings),
        *_confidence(evidence),
        *_composition(evidence),
        *_overhead(evidence),
    ]


def _sparse_against_dense(evidence: Evidence) -> list[Finding]:
    loss = Claim(1, "A sparse MoE reaches a lower loss than the FFN baseline, and than dense FFNs of its size")
    rivals = ["FFN_baseline", "FFN_equal_active", "FFN_equal_total", "Sparse_MoE-K4"]
    accuracy = Claim(2, "Its test accuracy is slightly lower than the baseline's")
    return [
        *(
            loss.below(f"test loss, {FP32_MOE} − {rival}", evidence.loss_gap(FP32_MOE, rival), 0, "nats")
            for rival in rivals
        ),
        *(loss.report(**evidence.accuracies(FP32_MOE, rival)) for rival in rivals[1:]),
        accuracy.below(**evidence.accuracies(FP32_MOE, "FFN_baseline"), bound=0),
    ]


def _int8_of_the_ffn(evidence: Evidence) -> list[Finding]:
    claim = Claim(3, "Static INT8 costs the dense FFN less than 0.1 point, takes a quarter of the size, and is faster")
    int8, fp32 = "FFN_PTQ_INT8", "FFN_baseline"
    return [
        *_cost_and_size(claim, evidence, int8, fp32),
        *(
            claim.below(f"time at batch {batch}, INT8 / FP32", evidence.time_ratio(int8, fp32, batch), 1, "ratio")
            for batch in TABLE_BATCHES
        ),
    ]


def _int8_of_the_moe(evidence: Evidence) -> list[Finding]:
    claim = Claim(4, "Dynamic INT8 costs the MoE less than 0.1 point at a quarter of the size")
    return _cost_and_size(claim, evidence, "Sparse_MoE_INT8", FP32_MOE)


def _cost_and_size(claim: Claim, evidence: Evidence, int8: str, fp32: str) -> list[Finding]:
    return [
        claim.above(**evidence.accuracies(int8, fp32), bound=-0.1),
        claim.below(f"size, {int8} / {fp32}", evidence.size_share(int8, fp32), 0.28, "share"),
    ]


def _static_calibration(evidence: Evidence, models: Sequence[str]) -> list[Finding]:
    claim = Claim(5, "Static calibration is unreliable for the MoE")
    worst = np.min([evidence.acc_points(model, FP32_MOE) for model in models], axis=0)
    return [
        claim.below(f"test accuracy, each seed's worst of {len(models)} calibrations − FP32", worst, -0.1, "points"),
        *(claim.report(**evidence.accuracies(model, FP32_MOE)) for model in models),
        *(
            claim.report(
                f"images whose experts change, {model}",
                [record.routes_changed or 0.0 for record in evidence.runs(model)],
                "share",
            )
            for model in models
        ),
    ]


def _int8_speed_of_the_moe(evidence: Evidence) -> list[Finding]:
    claim = Claim(6, "INT8 does not speed the MoE up, because routing dominates")
    forms = ("Sparse_MoE_INT8", "Sparse_MoE_PTQ")
    return [
        *(
            claim.above(f"time at batch 64, {int8} / FP32", evidence.time_ratio(int8, FP32_MOE, 64), 0.95, "ratio")
            for int8 in forms
        ),
        *(
            claim.above(f"routing's share of the time, {model}", evidence.per_seed(model, routing_share), 0.5, "share")
            for model in (FP32_MOE, *forms)
        ),
    ]


def _balance(evidence: Evidence) -> list[Finding]:
    claim = Claim(7, "The balance loss prevents expert collapse, and the entropy with the wrong sign brings it about")
    figures: list[tuple[str, str, Callable[[Record], float]]] = [
        ("entropy of the expert load", "nats", load_entropy),
        ("coefficient of variation of the load", "", load_cv),
        ("dead experts", "experts", num_dead_experts),
    ]
    label, unit, entropy = figures[0]
    unbalanced = evidence.per_seed(UNBALANCED, entropy)
    variants = {"none": UNBALANCED, **BALANCED, "wrong sign": WRONG_SIGN}
    return [
        *(
            claim.above(f"{label}, {loss} − none", evidence.per_seed(model, entropy) - unbalanced, 0, unit)
            for loss, model in BALANCED.items()
        ),
        claim.below(f"{label}, wrong sign − none", evidence.per_seed(WRONG_SIGN, entropy) - unbalanced, 0, unit),
        *(
            claim.report(f"{label}, {loss}", evidence.per_seed(model, figure), unit)
            for label, unit, figure in figures
            for loss, model in variants.items()
        ),
        *(
            claim.report(**evidence.accuracies(model, UNBALANCED, f"{loss} − none"))
            for loss, model in variants.items()
            if loss != "none"
        ),
    ]


def _specialisation(evidence: Evidence) -> list[Finding]:
    claim = Claim(8, "Experts specialise")
    knowledge = evidence.per_seed(FP32_MOE, knowledge_of_digits)
    closing = evidence.per_seed(FP32_MOE, cost_of_closing)
    uneven = evidence.per_seed(FP32_MOE, unevenness_of_closing)
    return [
        claim.above("information of expert about digit − the same shuffled", knowledge, 0, "nats"),
        claim.above("test accuracy lost when an expert is closed, mean over experts", closing, 0, "points"),
        claim.above("the same, on the expert's own digits − on the others", uneven, 0, "points"),
    ]


def _noise(evidence: Evidence) -> list[Finding]:
    claim = Claim(9, "Noise in the router helps")
    load = evidence.per_seed(FP32_MOE, load_entropy) - evidence.per_seed(WITHOUT_NOISE, load_entropy)
    return [
        claim.above(**evidence.accuracies(FP32_MOE, WITHOUT_NOISE, "with noise − without"), bound=0),
        claim.above("entropy of the expert load, with noise − without", load, 0, "nats"),
    ]


def _distillation(evidence: Evidence, settings: Settings) -> list[Finding]:
    claim = Claim(10, "Distillation from the MoE beats distillation from the FFN, and both beat none")

    def pairs(ending: str) -> Iterable[tuple[str, str, str]]:
        note = f", {ending.lstrip('-')}" if ending else ""
        yield f"from the MoE − from the FFN{note}", STUDENT + ending, FROM_FFN + ending
        yield f"from the MoE − none{note}", STUDENT + ending, NO_KD
        yield f"from the FFN − none{note}", FROM_FFN + ending, NO_KD

    best = STUDENT + settings.winner
    on_grid = f"best of the grid on validation ({settings.winner.lstrip('-') or 'the defaults'}) − none, on the grid"
    return [
        *(
            claim.above(**evidence.accuracies(model, other, label), bound=0)
            for ending in dict.fromkeys(("", settings.winner))
            for label, model, other in pairs(ending)
        ),
        claim.report(**settings.grid.accuracies(best, NO_KD, on_grid)),
    ]


def _confidence(evidence: Evidence) -> list[Finding]:
    claim = Claim(11, "The student matches the teacher's confidence and is slightly overconfident")
    teacher, student, control = (evidence.probabilities(model) for model in (FP32_MOE, STUDENT, NO_KD))
    confidence = np.array([mean_confidence(p) for p in student])
    gap = np.abs(confidence - [mean_confidence(p) for p in teacher])
    over = confidence - evidence.values(STUDENT, lambda m: m.test_acc)
    softened = [soften(p, t) for p, t in zip(student, evidence.scaled(STUDENT, "temperature"), strict=True)]
    over_after = [mean_confidence(p) for p in softened] - evidence.values(STUDENT, lambda m: m.test_acc)

    def to_teacher(students: Sequence[Values]) -> Values:
        return np.array([divergence(*pair) for pair in zip(teacher, students, strict=True)])

    findings = [
        claim.below("distance of mean confidence, student − teacher", gap, 0.01, "probability"),
        claim.above("mean confidence − accuracy", over, 0, "probability"),
        claim.below("mean confidence − accuracy", over, 0.01, "probability"),
        claim.below("KL(teacher ‖ student), distilled − control", to_teacher(student) - to_teacher(control), 0, "nats"),
        claim.report("KL(teacher ‖ student)", to_teacher(student), "nats"),
        claim.report("KL(teacher ‖ student), after temperature scaling", to_teacher(softened), "nats"),
        claim.report("mean confidence − accuracy, after temperature scaling", over_after, "probability"),
        claim.report("temperature fitted on validation, student", evidence.scaled(STUDENT, "temperature"), ""),
    ]
    for name, label, unit in (("test_ece", "ECE", ""), ("test_loss", "NLL", "nats"), ("test_brier", "Brier score", "")):
        for model in (FP32_MOE, STUDENT, NO_KD):
            before, after = evidence.values(model, lambda m, name=name: getattr(m, name)), evidence.scaled(model, name)  # type: ignore[misc]
            findings.append(claim.report(f"{label}, {model}", before, unit))
            findings.append(claim.report(f"{label}, {model}, after temperature scaling", after, unit))
    return findings


def _composition(evidence: Evidence) -> list[Finding]:
    claim = Claim(13, "Compression composes: KD then INT8 loses no more than either alone")
    both = "KD_FFN_Student_INT8"
    return [
        claim.above(**evidence.accuracies(both, model, f"KD + INT8 − {label} alone"), bound=-0.1)
        for label, model in (("KD", STUDENT), ("INT8", "FFN_PTQ_INT8"))
    ]


OVERHEAD = Claim(14, "The overhead of the sparse MoE outweighs its benefit at MNIST scale and turns at larger scale")


def _overhead(evidence: Evidence) -> list[Finding]:
    rival = "FFN_equal_active"
    return [
        OVERHEAD.above(f"time at batch 64, {FP32_MOE} / {rival}", evidence.time_ratio(FP32_MOE, rival, 64), 1, "ratio"),
        OVERHEAD.below(**evidence.accuracies(FP32_MOE, rival), bound=0.1),
        OVERHEAD.report(
            f"time at batch 64, {FP32_MOE} / FFN_equal_total",
            evidence.time_ratio(FP32_MOE, "FFN_equal_total", 64),
            "ratio",
        ),
    ]


class Point(msgspec.Struct):
    """What `benchmarks/scaling.py` measured of one kind of model at one size."""

    sweep: str
    kind: str
    experts: int
    width: int
    batch: int
    median_ms: Amount
    q1_ms: Amount
    q3_ms: Amount
    num_calls: Count


class Scaling(msgspec.Struct):
    """What `benchmarks/scaling.py` keeps, as far as a claim needs it."""

    machine: Machine
    rows: list[Point]


def load_scaling(path: Path) -> Scaling:
    """What `benchmarks/scaling.py` kept.

    Raises:
        UserError: the file is damaged, edited, or lacks what is compared.
    """
    content = read_bytes(path)
    with reading(path, "Delete it, and run `python -m benchmarks.scaling` again."):
        check_seal(content)
        found = msgspec.json.decode(content, type=Scaling)
        settle_scaling(found.rows)
    return found


def settle_scaling(points: Sequence[Point]) -> list[Finding]:
    """Claim 14 at larger scale: the largest of the experts and widths that were measured."""
    table = pd.DataFrame([msgspec.structs.asdict(point) for point in points])
    findings = []
    for sweep in ("experts", "width"):
        swept = table[table["sweep"] == sweep]
        largest = swept[swept[sweep] == swept[sweep].max()].set_index("kind")
        sparse = largest.loc["sparse"]
        for rival in ("dense, equal total", "dense, equal active"):
            dense = largest.loc[rival]
            interval = ratio_of_medians(
                *(sparse["median_ms"], sparse["q3_ms"] - sparse["q1_ms"], sparse["num_calls"]),
                *(dense["median_ms"], dense["q3_ms"] - dense["q1_ms"], dense["num_calls"]),
            )
            size = f"{sparse['experts']} experts, width {sparse['width']}, batch {sparse['batch']}"
            label = f"time, sparse / {rival} ({size})"
            num = int(min(sparse["num_calls"], dense["num_calls"]))
            findings.append(OVERHEAD.ratio(label, interval, n=num, below=1 if "total" in rival else None))
    return findings


def settle_dark_knowledge(runs: Sequence[dict[str, Any]]) -> list[Finding]:
    """Claim 12, from the file of `dark_knowledge_mnist.py`: one entry per seed."""
    claim = Claim(
        12,
        "Dark knowledge: without a single 3 in its transfer set, a distilled student recognises most threes once its "
        "bias is corrected",
    )

    def errors(role: str, of: str = "all_digits") -> Values:
        return np.array([run["errors"][role][of] for run in runs], dtype=float)

    threes = np.array([run["num_threes"] for run in runs], dtype=float)
    right = 1 - errors("bias corrected", "threes") / threes
    return [
        claim.above("share of threes recognised, bias corrected", right, 0.5, "share"),
        claim.report("the same before", 1 - errors("distilled-without-3", "threes") / threes, "share"),
        *(claim.report(f"test errors, {role}", errors(role), "images") for role in runs[0]["errors"]),
        claim.report("test errors, labels − distilled", errors("labels") - errors("distilled"), "images"),
    ]


def find_winner(grid: Evidence, models: Sequence[str]) -> str:
    """The model with the highest validation accuracy over the seeds; among equals the lowest validation loss."""

    def merit(model: str) -> tuple[float, float]:
        runs = grid.runs(model)
        return sum(record.validation_acc for record in runs), -sum(record.validation_loss for record in runs)

    return max(models, key=merit)
