"""What reports on this subject claim, and the paired tests over seeds that settle it. From records alone, no torch.

An effect is a difference or a ratio between two models of the same seed. Its 95 % interval is Student's t over
seeds, and the verdict follows from it: supported where the whole interval lies on the claim's side of its bound,
refuted where it lies on the other, undecided otherwise.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats
from tabulate import tabulate

from mnist_lab.files import write_atomically
from mnist_lab.records import TABLE_BATCHES, Measurement, Record, confidence_interval, load_predictions

Verdict = Literal["supported", "refuted", "undecided"]
Values = npt.NDArray[np.float64]
RUNTIME = "onnxruntime"
NUM_SHUFFLES = 100
EPSILON = 1e-12  # keeps the logarithm of a probability that half precision rounded to 0 finite


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
    bound: str  # what the effect must satisfy for the claim to hold
    test: str
    p_value: float  # two-sided, of the effect against its bound; NaN for a single seed
    n: int
    verdict: Verdict


@dataclass(frozen=True)
class Claim:
    """A statement and the comparisons that test it."""

    number: int
    statement: str

    def below(self, comparison: str, values: Iterable[float], bound: float, unit: str) -> Finding:
        """The claim says that the effect is smaller than `bound`."""
        return self._test(comparison, values, bound, unit, sign=1)

    def above(self, comparison: str, values: Iterable[float], bound: float, unit: str) -> Finding:
        """The claim says that the effect is larger than `bound`."""
        return self._test(comparison, values, bound, unit, sign=-1)

    def _test(self, comparison: str, values: Iterable[float], bound: float, unit: str, *, sign: int) -> Finding:
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
            bound=f"{'<' if sign > 0 else '>'} {bound:g}",
            test="paired t over seeds",
            p_value=p_value(effects, bound),
            n=len(effects),
            verdict=decide(low, high, bound, sign=sign),
        )


def decide(low: float, high: float, bound: float, *, sign: int) -> Verdict:
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


class Evidence:
    """The finished runs of one results folder, by model and seed; `suffix` is what all of their names end with."""

    def __init__(self, folder: Path, records: Sequence[Record], seeds: Sequence[int], *, suffix: str = "") -> None:
        self.folder, self.seeds, self.suffix = folder, list(seeds), suffix
        self._records = {(record.model, record.seed): record for record in records}

    def runs(self, model: str) -> list[Record]:
        return [self._records[model + self.suffix, seed] for seed in self.seeds]

    def values(self, model: str, measure: Callable[[Measurement], float]) -> Values:
        """A figure of every seed's measurement."""
        return np.array([measure(record.measurements[RUNTIME]) for record in self.runs(model)])

    def latencies(self, model: str, batch: int) -> Values:
        """Median milliseconds of every seed."""
        return self.values(model, lambda m: m.latency_ms[str(batch)]["median_ms"])

    def time_ratio(self, model: str, other: str, batch: int) -> Values:
        """Latency as a multiple of another model's, per seed."""
        return self.latencies(model, batch) / self.latencies(other, batch)

    def probabilities(self, model: str) -> list[Values]:
        """Test probabilities (N, C) of every seed."""
        return [load_predictions(self.folder, record.run_name)[0].astype(float) for record in self.runs(model)]

    def acc_points(self, model: str, other: str) -> Values:
        """Difference in test accuracy, percentage points, per seed."""
        return 100 * (self.values(model, lambda m: m.test_acc) - self.values(other, lambda m: m.test_acc))

    def loss_gap(self, model: str, other: str) -> Values:
        """Difference in test loss, nats, per seed."""
        return self.values(model, lambda m: m.test_loss) - self.values(other, lambda m: m.test_loss)

    def size_share(self, model: str, other: str) -> Values:
        return self.values(model, lambda m: m.size_mib) / self.values(other, lambda m: m.size_mib)


def settle_claims(evidence: Evidence) -> list[Finding]:
    """Every claim that the records of the table and its variants can settle."""
    return [finding for settle in SETTLERS for finding in settle(evidence)]


def _sparse_against_dense(evidence: Evidence) -> list[Finding]:
    loss = Claim(1, "A sparse MoE reaches a lower loss than the FFN baseline, and than dense FFNs of its size")
    rivals = ["FFN_baseline", "FFN_equal_active", "FFN_equal_total", "Sparse_MoE-K4"]
    accuracy = Claim(2, "Its test accuracy is slightly lower than the baseline's")
    points = evidence.acc_points("Sparse_MoE", "FFN_baseline")
    return [
        *(
            loss.below(f"test loss, Sparse_MoE − {rival}", evidence.loss_gap("Sparse_MoE", rival), 0, "nats")
            for rival in rivals
        ),
        accuracy.below("test accuracy, Sparse_MoE − FFN_baseline", points, 0, "points"),
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
    cheap = Claim(4, "Dynamic INT8 costs the MoE less than 0.1 point at a quarter of the size")
    unreliable = Claim(5, "Static calibration (min–max, 1,000 images) is unreliable for the MoE")
    slow = Claim(6, "INT8 does not speed the MoE up")
    fp32 = "Sparse_MoE"
    costs = evidence.acc_points("Sparse_MoE_PTQ", fp32)
    return [
        *_cost_and_size(cheap, evidence, "Sparse_MoE_INT8", fp32),
        unreliable.below("test accuracy, Sparse_MoE_PTQ − FP32", costs, -0.1, "points"),
        *(
            slow.above(f"time at batch 64, {int8} / FP32", evidence.time_ratio(int8, fp32, 64), 0.95, "ratio")
            for int8 in ("Sparse_MoE_INT8", "Sparse_MoE_PTQ")
        ),
    ]


def _cost_and_size(claim: Claim, evidence: Evidence, int8: str, fp32: str) -> list[Finding]:
    return [
        claim.above(f"test accuracy, {int8} − FP32", evidence.acc_points(int8, fp32), -0.1, "points"),
        claim.below(f"size, {int8} / FP32", evidence.size_share(int8, fp32), 0.28, "share"),
    ]


def _balance_and_noise(evidence: Evidence) -> list[Finding]:
    balance = Claim(7, "The balance loss prevents expert collapse, and the entropy with the wrong sign brings it about")
    noise = Claim(9, "Noise in the router helps")
    load = {name: load_entropy(evidence.runs(name)) for name in BALANCED}
    even, label = load["Sparse_MoE"], "entropy of the expert load"
    silent = "Sparse_MoE-noiseFalse"
    return [
        *(
            balance.above(f"{label}, {loss} − none", load[model] - load["Sparse_MoE-none"], 0, "nats")
            for model, loss in (("Sparse_MoE", "entropy"), ("Sparse_MoE-switch", "switch"), ("Sparse_MoE-cv", "cv"))
        ),
        balance.below(
            f"{label}, wrong sign − none", load["Sparse_MoE-wrong-sign"] - load["Sparse_MoE-none"], 0, "nats"
        ),
        noise.above("test accuracy, with noise − without", evidence.acc_points("Sparse_MoE", silent), 0, "points"),
        noise.above(f"{label}, with noise − without", even - load[silent], 0, "nats"),
    ]


def _specialisation(evidence: Evidence) -> list[Finding]:
    claim = Claim(8, "Experts specialise")
    gains = [knowledge_of_digits(record) for record in evidence.runs("Sparse_MoE")]
    return [claim.above("information of expert about digit − the same shuffled", gains, 0, "nats")]


def _distillation(evidence: Evidence) -> list[Finding]:
    gains = Claim(10, "Distillation from the MoE beats distillation from the FFN, and both beat none")
    confident = Claim(11, "The student matches the teacher's confidence and is slightly overconfident")
    composes = Claim(13, "Compression composes: KD then INT8 loses no more than either alone")
    teacher, student, control = "Sparse_MoE", "KD_FFN_Student", "FFN_Student_no_KD"
    pairs = {
        "from the MoE − from the FFN": (student, "KD_FFN_Student_from_FFN"),
        "from the MoE − none": (student, control),
        "from the FFN − none": ("KD_FFN_Student_from_FFN", control),
    }
    gap = np.abs(mean_confidence(evidence, student) - mean_confidence(evidence, teacher))
    closer = kl_gap(evidence, teacher, student, control)
    both = evidence.acc_points("KD_FFN_Student_INT8", "FFN_baseline")
    return [
        *(
            gains.above(f"test accuracy, {label}", evidence.acc_points(*pair), 0, "points")
            for label, pair in pairs.items()
        ),
        confident.below("distance of mean confidence, student − teacher", gap, 0.01, "probability"),
        confident.above("mean confidence − accuracy", overconfidence(evidence, student), 0, "probability"),
        confident.below("KL(teacher ‖ student), distilled − control", closer, 0, "nats"),
        *(
            composes.above(
                f"test accuracy, KD + INT8 − {label} alone",
                both - evidence.acc_points(model, "FFN_baseline"),
                -0.1,
                "points",
            )
            for label, model in (("KD", student), ("INT8", "FFN_PTQ_INT8"))
        ),
    ]


BALANCED = [f"Sparse_MoE{variant}" for variant in ("", "-none", "-switch", "-cv", "-wrong-sign", "-noiseFalse")]
SETTLERS: list[Callable[[Evidence], list[Finding]]] = [
    _sparse_against_dense,
    _int8_of_the_ffn,
    _int8_of_the_moe,
    _balance_and_noise,
    _specialisation,
    _distillation,
]


def load_entropy(runs: Sequence[Record]) -> Values:
    """Entropy of the share of pairs that each expert takes in the last epoch, nats; log E when even."""
    shares = [np.array(record.curves[-1]["expert_load"]) for record in runs]
    return np.array([stats.entropy(share) for share in shares])


def knowledge_of_digits(record: Record) -> float:
    """Mutual information between an image's digit and its experts on the test split, above that of shuffled pairs."""
    assert record.expert_by_class is not None
    images = np.array(record.measurements[RUNTIME].confusion).sum(axis=1)
    pairs = np.rint(
        np.array(record.expert_by_class) * images[:, None] * record.config["architecture"]["routing"]["top_k"]
    )
    drawn = stats.random_table(pairs.sum(axis=1).astype(int), pairs.sum(axis=0).astype(int))
    shuffled = drawn.rvs(NUM_SHUFFLES, random_state=record.seed)
    return mutual_information(pairs) - float(np.mean([mutual_information(table) for table in shuffled]))


def mutual_information(counts: Values) -> float:
    """In nats, of the two variables whose joint counts these are."""
    return float(stats.entropy(counts.sum(axis=0)) + stats.entropy(counts.sum(axis=1)) - stats.entropy(counts.ravel()))


def mean_confidence(evidence: Evidence, model: str) -> Values:
    """Mean probability of the predicted class, per seed."""
    return np.array([probabilities.max(axis=1).mean() for probabilities in evidence.probabilities(model)])


def overconfidence(evidence: Evidence, model: str) -> Values:
    return mean_confidence(evidence, model) - evidence.values(model, lambda m: m.test_acc)


def kl_gap(evidence: Evidence, teacher: str, student: str, control: str) -> Values:
    """How much closer to the teacher the student is than the control, per seed."""
    target = evidence.probabilities(teacher)

    def divergence(model: str) -> Values:
        pairs = zip(target, evidence.probabilities(model), strict=True)
        return np.array([stats.entropy(p + EPSILON, q + EPSILON, axis=1).mean() for p, q in pairs])

    return divergence(student) - divergence(control)


def summarize(findings: Sequence[Finding]) -> dict[int, Verdict]:
    """A claim is supported where all of its comparisons are, refuted where one is, undecided otherwise."""
    verdicts: dict[int, Verdict] = {}
    for number in sorted({finding.claim for finding in findings}):
        own = {finding.verdict for finding in findings if finding.claim == number}
        verdicts[number] = "refuted" if "refuted" in own else "supported" if own == {"supported"} else "undecided"
    return verdicts


def format_claims(findings: Sequence[Finding]) -> str:
    """The findings as Markdown, a table per claim."""
    verdicts = summarize(findings)
    parts = []
    for number, verdict in verdicts.items():
        own = [finding for finding in findings if finding.claim == number]
        rows = [
            [
                finding.comparison,
                f"{finding.effect:+.4g}",
                f"[{finding.low:+.4g}, {finding.high:+.4g}]",
                finding.unit,
                finding.bound,
                f"{finding.p_value:.2g}",
                finding.n,
                finding.verdict,
            ]
            for finding in own
        ]
        headers = ["comparison", "effect", "95 % interval", "unit", "claimed", "p", "n", "verdict"]
        table = tabulate(rows, headers, "github", disable_numparse=True)
        parts.append(f"## {number}. {own[0].statement}: {verdict}\n\n{table}")
    return "\n\n".join(parts)


def write_claims(folder: Path, findings: Sequence[Finding], *, title: str) -> None:
    """Write `claims.md` and `claims.json`."""
    text = f"# {title}\n\n{__doc__.partition(chr(10) * 2)[2].strip()}\n\n{format_claims(findings)}\n"
    fields = [
        {key: None if value != value else value for key, value in asdict(finding).items()}  # NaN is no JSON
        for finding in findings
    ]
    write_atomically(folder / "claims.md", lambda path: path.write_text(text))
    write_atomically(folder / "claims.json", lambda path: path.write_text(json.dumps(fields, indent=1) + "\n"))
