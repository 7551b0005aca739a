"""Expert pruning: experts that matter least are taken out of a mixture, whose router then chooses among the rest.

The gates of those left are renormalised by themselves: each gate is a softmax over what there is to choose from.

Shapes: B images, E experts, O expert output width.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from mnist_lab import measure
from mnist_lab.compress.finetune import Finetuning, finetune
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.technique import Made, Proof, Work
from mnist_lab.measure import EVALUATION_BATCH
from mnist_lab.models.moe import SparseMoE
from mnist_lab.models.surgery import as_dense, with_experts
from mnist_lab.progress import progress_bar
from mnist_lab.training import torch_predictor

CHOOSING_SIZE = 10_000  # training images that the choice is made on
MAX_EXACT = 12  # experts: 4,094 subsets
Criterion = Literal["utilization", "reap", "redundancy", "router-norm", "ablation", "exact"]
CHEAPER: tuple[Criterion, ...] = ("utilization", "reap", "redundancy", "router-norm", "ablation")  # than trying all


@dataclass(frozen=True)
class ExpertPruning:
    """How many experts stay, and which."""

    keep: int = field(default=2, metadata={"tag": ""})
    """Experts that stay; one alone becomes a dense model without a router."""
    criterion: Criterion = field(default="ablation", metadata={"tag": ""})
    """What an expert is worth: its share of images; its mean gate times the norm of its output; how little its output
    resembles the others'; how much its router weights grew in training; the loss without it, one removed after the
    other; or exact, the loss of every subset."""

    def __post_init__(self) -> None:
        check_keep(self.keep)


class Grade(TypedDict):
    """How a choice of experts does."""

    kept: list[int]
    loss: float  # nats
    acc: float


class Seen(NamedTuple):
    """What a mixture does with the images that the choice is made on."""

    chosen_BE: Tensor  # 1 where an image visits an expert
    gates_BE: Tensor  # 0 where it does not
    outputs_EBO: Tensor  # of every expert for every image


@torch.no_grad()
def look(model: SparseMoE, pixels: Tensor) -> Seen:
    """Run every expert on every image."""
    hidden_BD = model.embed(pixels)
    decision = model.router(hidden_BD)
    gates_BE = torch.zeros_like(decision.logits_BE).scatter(1, decision.experts_BK, decision.weights_BK)
    chosen_BE = torch.zeros_like(gates_BE).scatter(1, decision.experts_BK, 1.0)
    return Seen(chosen_BE, gates_BE, model.experts.on_all(hidden_BD))


def utilization(seen: Seen) -> Tensor:
    """Share of the images that visit each expert."""
    return seen.chosen_BE.mean(dim=0)


def reap(seen: Seen) -> Tensor:
    """Mean of gate times output norm over the images that visit each expert (REAP, arXiv:2510.13999)."""
    norms_BE = seen.outputs_EBO.norm(dim=2).T
    return (seen.gates_BE * norms_BE).sum(dim=0) / seen.chosen_BE.sum(dim=0).clamp(min=1)


def distinctness(seen: Seen) -> Tensor:
    """1 − the largest cosine between an expert's outputs and another's, mean over images."""
    directions = F.normalize(seen.outputs_EBO, dim=2)
    cosines_EE = torch.einsum("ebo,fbo->ef", directions, directions) / directions.shape[1]
    return 1 - cosines_EE.fill_diagonal_(-1).max(dim=1).values


def router_growth(model: SparseMoE, initial: SparseMoE) -> Tensor:
    """How much the norm of each expert's router weights grew in training (arXiv:2405.16646)."""
    return (model.router.gate.norm(dim=0) - initial.router.gate.norm(dim=0)).detach()


def choose_experts(model: SparseMoE, config: ExpertPruning, work: Work) -> list[int]:
    """Those that stay, in their order."""
    num_experts = model.config.routing.num_experts
    pixels = work.dataset.train.pixels[:CHOOSING_SIZE]
    labels = work.dataset.train.labels[:CHOOSING_SIZE]
    if config.criterion == "exact":
        subsets = list(map(list, itertools.combinations(range(num_experts), config.keep)))
        with progress_bar() as progress:
            tried = progress.track(subsets, description="subsets of experts")
            return min(tried, key=lambda some: loss_with(model, some, pixels, labels))
    if config.criterion == "ablation":
        return remove_by_loss(model, config.keep, pixels, labels)
    if config.criterion == "router-norm":
        initial = work.build(model.config)
        assert isinstance(initial, SparseMoE)
        return best(router_growth(model, initial), config.keep)
    kept = list(range(num_experts))
    while len(kept) > config.keep:  # what is left shares the images anew after each removal
        scores = SCORES[config.criterion](look(with_experts(model, kept), pixels))
        kept = [kept[index] for index in best(scores, len(kept) - 1)]
    return kept


SCORES: dict[Criterion, Callable[[Seen], Tensor]] = {
    "utilization": utilization,
    "reap": reap,
    "redundancy": distinctness,
}


def grade_criteria(model: SparseMoE, exact: Sequence[int], work: Work) -> dict[Criterion, Grade]:
    """What every criterion chooses beside the best subset, and how well that does on validation images untrained."""
    split, keep = work.dataset.validation, len(exact)
    chosen = {criterion: choose_experts(model, ExpertPruning(keep, criterion), work) for criterion in CHEAPER}
    grades: dict[Criterion, Grade] = {}
    for criterion, kept in {**chosen, "exact": list(exact)}.items():
        with torch.inference_mode():
            logits = measure.predict(torch_predictor(with_experts(model, kept)), split.pixels.numpy())
        loss, acc = measure.cross_entropy(logits, split.labels.numpy()), measure.accuracy(logits, split.labels.numpy())
        grades[criterion] = {"kept": kept, "loss": loss, "acc": acc}
    return grades


def best(scores: Tensor, num: int) -> list[int]:
    """The places of the highest scores, in order."""
    return sorted(scores.topk(num).indices.tolist())


def remove_by_loss(model: SparseMoE, keep: int, pixels: Tensor, labels: Tensor) -> list[int]:
    """Close, one after the other, the expert without which the loss is least; estimated anew after each."""
    kept = list(range(model.config.routing.num_experts))
    while len(kept) > keep:
        rests = [[expert for expert in kept if expert != gone] for gone in kept]
        kept = min(rests, key=lambda rest: loss_with(model, rest, pixels, labels))
    return kept


@torch.inference_mode()
def loss_with(model: SparseMoE, kept: Sequence[int], pixels: Tensor, labels: Tensor) -> float:
    """Mean cross-entropy in nats of the mixture with these experts only."""
    smaller = with_experts(model, kept)
    logits = torch.cat([smaller(batch) for batch in pixels.split(EVALUATION_BATCH)])
    return float(F.cross_entropy(logits, labels))


def check_keep(keep: int, num_experts: int | None = None) -> None:
    """Raise UserError where so many experts cannot stay, of as many as there are if that is known."""
    if keep < 1:
        raise UserError(f"--keep {keep} must be at least 1")
    if num_experts is not None and keep >= num_experts:
        raise UserError(f"--keep {keep} must be less than the {num_experts} experts that there are")


def check_experts(num_experts: int, config: ExpertPruning) -> None:
    """Raise UserError where a mixture of so many experts cannot be pruned so."""
    check_keep(config.keep, num_experts)
    if config.criterion == "exact" and num_experts > MAX_EXACT:
        raise UserError(
            f"--criterion exact tries every subset, and takes at most {MAX_EXACT} experts, not {num_experts}"
        )


@dataclass(frozen=True)
class PruneExperts:
    """A mixture with fewer experts; with one, a dense FFN."""

    label: ClassVar[str] = "pruned experts"
    cost: ClassVar[float] = 0.4
    pruning: ExpertPruning = ExpertPruning()
    train: Literal["all", "router"] = field(default="all", metadata={"tag": ""})
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        if self.train == "router" and self.pruning.keep == 1:
            raise UserError("--train router: the one expert of --keep 1 needs none")

    def make(self, work: Work) -> Made:
        before = work.source
        assert isinstance(before, SparseMoE)
        check_experts(before.config.routing.num_experts, self.pruning)
        kept = choose_experts(before, self.pruning, work)
        shares = utilization(look(before, work.dataset.train.pixels[:CHOOSING_SIZE]))
        if not any(shares[expert] > 0 for expert in range(len(shares)) if expert not in kept):
            raise RunFailed(f"{work.name}: no image comes to the experts that would go")
        smaller = copy.deepcopy(with_experts(before, kept))
        model = as_dense(smaller) if len(kept) == 1 else smaller
        curves = finetune(
            work,
            model,
            before,
            self.finetuning,
            only=["router.gate", "router.noise"] if self.train == "router" else None,
        )
        names = ", ".join(map(str, kept))
        proof: Proof = {"text": f"kept expert{'s' if len(kept) > 1 else ''} {names}", "kept": kept}
        if self.pruning.criterion == "exact":
            proof["grades"] = grade_criteria(before, kept, work)
            right = [criterion for criterion in CHEAPER if proof["grades"][criterion]["kept"] == kept]
            proof["text"] += (
                f", the best of all subsets; found as well by {' and '.join(right) or 'no other criterion'}"
            )
        return Made(model, curves, proof)
