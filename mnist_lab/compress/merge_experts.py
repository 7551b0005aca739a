"""Merging: experts that resemble each other become one, so that what the others knew is not thrown away.

Hidden units have no order of their own: before two experts are averaged, the units of one are put in the order of the
other's that they resemble most (an assignment problem). The average is weighted by how many images visit each.

Shapes: B images, D model width, H expert width, O expert output width, E experts.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from mnist_lab.compress.finetune import Finetuning, finetune
from mnist_lab.compress.prune_experts import Seen, best, check_keep, look, utilization
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.models.moe import SparseMoE
from mnist_lab.models.surgery import as_dense, with_experts

CHOOSING_SIZE = 2000  # training images on which experts are compared
Grouping = Literal["frequency", "outputs"]
Alignment = Literal["weights", "activations", "none"]


@dataclass(frozen=True)
class Merging:
    """How many experts stay, which become one, and how their units find each other."""

    keep: int = field(default=2, metadata={"tag": ""})
    """Experts that stay; one alone becomes a dense model without a router."""
    group: Grouping = field(default="frequency", metadata={"tag": ""})
    """The most visited stay, and each other joins that whose router logits resemble its own (MC-SMoE); or experts are
    clustered by their outputs (HC-SMoE)."""
    align: Alignment = field(default="weights", metadata={"tag": ""})
    """How hidden units are matched before they are averaged: by their weights, by their activations, or not at all."""

    def __post_init__(self) -> None:
        check_keep(self.keep)


@torch.no_grad()
def group_experts(model: SparseMoE, config: Merging, pixels: Tensor, seen: Seen) -> list[list[int]]:
    """Sets of experts, each to become one; the most visited of a set first."""
    frequency_E = utilization(seen)
    if config.group == "outputs":
        means_EO = seen.outputs_EBO.mean(dim=1).double().numpy()
        labels = fcluster(linkage(means_EO, method="average"), config.keep, criterion="maxclust")
        groups = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    else:
        logits_EB = (model.embed(pixels) @ model.router.gate).T
        leads = best(frequency_E, config.keep)
        groups = [[lead] for lead in leads]
        for expert in set(range(len(frequency_E))) - set(leads):
            likeness = F.cosine_similarity(logits_EB[leads], logits_EB[expert].unsqueeze(0))
            groups[int(likeness.argmax())].append(expert)
    return [sorted(group, key=lambda expert: (-float(frequency_E[expert]), expert)) for group in groups]


@torch.no_grad()
def merge_experts(
    model: SparseMoE, groups: Sequence[Sequence[int]], frequency_E: Tensor, order_EH: Tensor
) -> SparseMoE:
    """A mixture with an expert for each group, the average of its members.

    Args:
        order_EH: the order in which each expert's hidden units are taken.
    """
    merged = copy.deepcopy(with_experts(model, [group[0] for group in groups]))
    for place, group in enumerate(groups):
        share = frequency_E[list(group)] + 1e-9  # nobody may visit any of them
        for member, weight in zip(group, (share / share.sum()).tolist(), strict=True):
            start = 0.0 if member == group[0] else 1.0
            order_H = order_EH[member]
            _add(merged.experts.weight_in[place], model.experts.weight_in[member][:, order_H], start, weight)
            _add(merged.experts.bias_in[place], model.experts.bias_in[member][order_H], start, weight)
            _add(merged.experts.weight_out[place], model.experts.weight_out[member][order_H], start, weight)
            _add(merged.experts.bias_out[place], model.experts.bias_out[member], start, weight)
            _add(merged.router.gate[:, place], model.router.gate[:, member], start, weight)
    return merged


def _add(to: Tensor, part: Tensor, start: float, weight: float) -> None:
    to.mul_(start).add_(part, alpha=weight)


@torch.no_grad()
def align_units(model: SparseMoE, groups: Sequence[Sequence[int]], alignment: Alignment, pixels: Tensor) -> Tensor:
    """(E, H): the order in which each expert's hidden units match those of its group's first."""
    experts = model.experts
    order_EH = torch.arange(experts.bias_in.shape[1]).repeat(len(experts.bias_in), 1)
    if alignment == "none":
        return order_EH
    hidden_BD = model.embed(pixels)
    for first, *others in groups:
        for other in others:
            if alignment == "weights":
                likeness_HH = (
                    experts.weight_in[first].T @ experts.weight_in[other]
                    + experts.weight_out[first] @ experts.weight_out[other].T
                    + torch.outer(experts.bias_in[first], experts.bias_in[other])
                )
            else:
                likeness_HH = _activations(model, first, hidden_BD).T @ _activations(model, other, hidden_BD)
            order_EH[other] = torch.from_numpy(linear_sum_assignment(likeness_HH.numpy(), maximize=True)[1])
    return order_EH


def _activations(model: SparseMoE, expert: int, hidden_BD: Tensor) -> Tensor:
    """Of an expert's hidden units, centred and of length 1: their products are correlations."""
    inner_BH = (hidden_BD @ model.experts.weight_in[expert] + model.experts.bias_in[expert]).relu()
    return F.normalize(inner_BH - inner_BH.mean(dim=0), dim=0)


@dataclass(frozen=True)
class MergeExperts:
    """A mixture whose experts have become fewer by averaging; with one, a dense FFN."""

    label: ClassVar[str] = "merged experts"
    cost: ClassVar[float] = 0.4
    merging: Merging = Merging()
    finetuning: Finetuning = field(default_factory=Finetuning)

    def make(self, work: Work) -> Made:
        before = work.source
        assert isinstance(before, SparseMoE)
        check_keep(self.merging.keep, before.config.routing.num_experts)
        pixels = work.dataset.train.pixels[:CHOOSING_SIZE]
        seen = look(before, pixels)
        groups = group_experts(before, self.merging, pixels, seen)
        order_EH = align_units(before, groups, self.merging.align, pixels)
        merged = merge_experts(before, groups, utilization(seen), order_EH)
        model = as_dense(merged) if len(groups) == 1 else merged
        curves = finetune(work, model, before, self.finetuning)
        said = ", ".join(" and ".join(map(str, group)) for group in groups)
        return Made(
            model, curves, {"text": f"experts merged: {said}", "groups": groups, "kept": [g[0] for g in groups]}
        )
