"""Router pruning: the smallest weights of a mixture's gate become zero; they are few, and all routes hang on them."""

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from mnist_lab.compress.finetune import Finetuning, check_ratio
from mnist_lab.compress.prune_weights import CALIBRATION_SIZE, Matrix, Pruner
from mnist_lab.errors import RunFailed
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.models.moe import SparseMoE

GATE = Matrix("router.gate")


@dataclass(frozen=True)
class PruneRouter:
    """A mixture most of whose gate is zero."""

    label: ClassVar[str] = "pruned router"
    cost: ClassVar[float] = 0.4
    ratio: float = field(default=0.5, metadata={"tag": ""})
    """Share of the gate's weights that become zero, the smallest first."""
    finetuning: Finetuning = field(default_factory=Finetuning)

    def __post_init__(self) -> None:
        check_ratio(self.ratio)

    def make(self, work: Work) -> Made:
        model = work.source
        assert isinstance(model, SparseMoE)
        before, zeros_before = copy.deepcopy(model), share_of_zeros(model)
        pruner = Pruner(model, {GATE: torch.ones(1, 1)}, {GATE: 1 - self.ratio})
        curves = pruner.train(work, before, self.finetuning, "one-shot")
        zeros = share_of_zeros(model)
        if zeros <= zeros_before:
            raise RunFailed(f"{work.name}: no weight of the router became zero")
        agreement = routing_agreement(before, model, work.calibration(CALIBRATION_SIZE))
        said = f"{zeros:.1%} of the router's weights are zero; {agreement:.1%} of {CALIBRATION_SIZE:,} training images"
        text = f"{said} go to the same experts as before"
        return Made(model, curves, {"text": text, "zeros": zeros, "agreement": agreement})


def share_of_zeros(model: SparseMoE) -> float:
    """Of the gate's weights."""
    return float((model.router.gate == 0).double().mean())


@torch.no_grad()
def routing_agreement(model: SparseMoE, other: SparseMoE, pixels: torch.Tensor) -> float:
    """Share of images that two mixtures send to the same experts, in whatever order."""
    ours, theirs = (m.router(m.embed(pixels)).experts_BK.sort(dim=1).values for m in (model, other))
    return float((ours == theirs).all(dim=1).double().mean())
