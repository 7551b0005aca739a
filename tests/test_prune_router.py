"""What is left of a router, and where images go then."""

import copy

import pytest
import torch
from test_prune_experts import NO_TRAINING, make_moe, make_work

from mnist_lab.compress.finetune import Finetuning
from mnist_lab.compress.prune_router import PruneRouter, routing_agreement, share_of_zeros
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.models.moe import SparseMoE


def test_smallest_weights_of_the_gate_become_zero_and_nothing_else_changes() -> None:
    before = make_moe()
    made = PruneRouter(0.5, NO_TRAINING).make(make_work(copy.deepcopy(before)))
    assert isinstance(made.model, SparseMoE)
    was, gate = before.router.gate, made.model.router.gate
    assert int((gate == 0).sum()) == gate.numel() // 2
    assert was[gate == 0].abs().max() < was[gate != 0].abs().min()
    changed = {name for name, w in made.model.state_dict().items() if not torch.equal(w, before.state_dict()[name])}
    assert changed == {"router.gate"}


def test_zeros_stay_while_the_rest_learns() -> None:
    made = PruneRouter(0.75, Finetuning(finetune_epochs=2)).make(make_work(make_moe()))
    assert isinstance(made.model, SparseMoE)
    assert share_of_zeros(made.model) == pytest.approx(0.75)
    assert len(made.curves) == 2


def test_agreement_counts_images_whose_set_of_experts_is_the_same() -> None:
    work = make_work(make_moe())
    model, pixels = work.source, work.dataset.train.pixels
    assert isinstance(model, SparseMoE)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.router.gate[:, 0] += 0.05
    same = [
        set(one.tolist()) == set(two.tolist())
        for one, two in zip(model.routed(pixels).experts, other.routed(pixels).experts, strict=True)
    ]
    assert 0 < routing_agreement(model, other, pixels) < 1
    assert routing_agreement(model, other, pixels) == pytest.approx(sum(same) / len(same))


def test_what_changes_nothing_is_an_error_and_so_is_a_ratio_out_of_range() -> None:
    model = make_moe()
    with torch.no_grad():
        model.router.gate[:, :2] = 0
    with pytest.raises(RunFailed, match="no weight of the router"):
        PruneRouter(0.5, NO_TRAINING).make(make_work(model))
    with pytest.raises(UserError, match="--ratio"):
        PruneRouter(1.0)
