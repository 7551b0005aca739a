"""A shared base: what a mixture's experts have in common is stored once, and of each what it adds, in low rank.

Base and additions as in D²-MoE (arXiv:2502.17298): the base is the experts' mean, by how many images visit each; what
an expert's weights differ from it is cut to a rank where it changes the products with the expert's own inputs least.
The router stays as it is.

Shapes: D model width, H expert width, O expert output width, E experts, I inputs, R rank.
"""

import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from mnist_lab.compress.finetune import Finetuning, finetune
from mnist_lab.compress.merge_experts import align_units
from mnist_lab.compress.prune_experts import look, utilization
from mnist_lab.compress.prune_weights import Matrix, layer_inputs
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.models import build_skeleton, count_parameters
from mnist_lab.models.moe import SharedBaseExperts, SparseMoE

CHOOSING_SIZE = 2000  # training images by which experts are compared and cut
DAMPING = 1e-3  # of the inputs' mean square
MAX_RANK = 10**6


@dataclass(frozen=True)
class Sharing:
    """How much of its own each expert keeps."""

    rank: int = field(default=8, metadata={"tag": "R"})
    """Rank of what each expert adds to the weights that all share."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise UserError(f"--rank {self.rank} must lie between 1 and {MAX_RANK:,}")


def cut_rank(delta_IO: Tensor, rows_NI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`left` (I, R) and `right` (R, O) whose product is nearest to `delta_IO` in what comes of these rows.

    With V the leading right singular vectors of X·Δ, X·Δ·V·Vᵀ is the nearest of that rank to X·Δ (Eckart and Young).
    """
    delta, rows = delta_IO.double(), rows_NI.double()
    products = rows @ delta
    # Inputs that never came count a little, so that of an expert without rows the weights decide.
    gram_OO = products.T @ products + DAMPING * (1 + rows.square().mean(dim=1).sum()) * delta.T @ delta
    right = torch.linalg.eigh(gram_OO).eigenvectors.flip(1)[:, :rank].T
    return (delta @ right.T).float(), right.float()


@torch.no_grad()
def share_base(model: SparseMoE, rank: int, pixels: Tensor) -> SparseMoE:
    """The mixture with a base and additions of that rank, in evaluation mode; near to what it was.

    Hidden units are put in the order of the most visited expert's first, so that the mean means something.
    """
    frequency_E = utilization(look(model, pixels))
    by_use = sorted(range(len(frequency_E)), key=lambda expert: -float(frequency_E[expert]))
    order_EH = align_units(model, [by_use], "weights", pixels)
    smaller = build_skeleton(replace(model.config, shared_rank=rank))
    assert isinstance(smaller, SparseMoE)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("experts.weight")}
    smaller.load_state_dict(kept, strict=False, assign=True)
    inputs, experts = layer_inputs(model, pixels), model.experts
    in_order = {
        "in": torch.stack([w[:, order] for w, order in zip(experts.weight_in, order_EH, strict=True)]),
        "out": torch.stack([w[order] for w, order in zip(experts.weight_out, order_EH, strict=True)]),
    }
    shares_E = frequency_E / frequency_E.sum()
    assert isinstance(smaller.experts, SharedBaseExperts)
    smaller.experts.bias_in = torch.nn.Parameter(experts.bias_in.gather(1, order_EH))
    for name, weight_EIO in in_order.items():
        base_IO = torch.einsum("e,eio->io", shares_E, weight_EIO)
        parts = []
        for expert, weight_IO in enumerate(weight_EIO):
            rows = inputs[Matrix(f"experts.weight_{name}", expert)].rows
            parts.append(cut_rank(weight_IO - base_IO, rows if name == "in" else rows[:, order_EH[expert]], rank))
        left, right = (torch.stack(part).contiguous() for part in zip(*parts, strict=True))
        layer = smaller.experts.layer_in if name == "in" else smaller.experts.layer_out
        layer.load_state_dict({"base": base_IO, "left": left, "right": right}, assign=True)
    return smaller.eval()


@dataclass(frozen=True)
class ShareBase:
    """A mixture whose experts share a base."""

    label: ClassVar[str] = "shared base"
    cost: ClassVar[float] = 0.6
    sharing: Sharing = Sharing()
    finetuning: Finetuning = field(default_factory=Finetuning)

    def make(self, work: Work) -> Made:
        before = work.source
        assert isinstance(before, SparseMoE)
        config, (num_before, _) = before.config, count_parameters(before)
        left = count_parameters(build_skeleton(replace(config, shared_rank=self.sharing.rank)))[0] / num_before
        if left >= 1 or self.sharing.rank > min(config.model_width, config.expert_width, config.output_width):
            raise RunFailed(f"{work.name}: rank {self.sharing.rank} makes nothing smaller")
        model = copy.deepcopy(share_base(before, self.sharing.rank, work.dataset.train.pixels[:CHOOSING_SIZE]))
        curves = finetune(work, model, before, self.finetuning)
        text = f"{left:.1%} of the parameters left: experts add rank {self.sharing.rank} to a shared base"
        return Made(model, curves, {"text": text, "left": left})
