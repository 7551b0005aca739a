"""Which experts become one, and that a merged expert is what its members were."""

from typing import get_args

import pytest
import torch
from test_prune_experts import NO_TRAINING, make_moe, make_work
from tiny import make_dataset

from mnist_lab.compress import merge_experts as m
from mnist_lab.compress.merge_experts import Alignment, Grouping, MergeExperts, Merging
from mnist_lab.compress.prune_experts import look, utilization
from mnist_lab.errors import UserError
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import SparseMoE
from mnist_lab.models.surgery import with_experts

PIXELS = make_dataset().train.pixels


def with_a_shuffled_copy(seed: int = 0) -> tuple[SparseMoE, torch.Tensor]:
    """Expert 2 is expert 0 with its hidden units in another order; that order."""
    model = make_moe()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        experts = model.experts
        experts.weight_in[2], experts.bias_in[2] = experts.weight_in[0][:, order], experts.bias_in[0][order]
        experts.weight_out[2], experts.bias_out[2] = experts.weight_out[0][order], experts.bias_out[0]
    return model, order


@pytest.mark.parametrize("alignment", ["weights", "activations"])
def test_units_find_their_own_whatever_their_order(alignment: Alignment) -> None:
    model, order = with_a_shuffled_copy()
    found = m.align_units(model, [[0, 2], [1], [3]], alignment, PIXELS)
    active = (model.embed(PIXELS) @ model.experts.weight_in[0] + model.experts.bias_in[0]).relu().std(dim=0) > 0
    assert torch.equal(order[found[2]][active], torch.arange(12)[active])
    assert torch.equal(found[1], torch.arange(12))
    merged = m.merge_experts(model, [[0, 2], [1], [3]], torch.tensor([0.5, 0.1, 0.3, 0.1]), found)
    torch.testing.assert_close(merged.experts.weight_in[0][:, active], model.experts.weight_in[0][:, active])
    torch.testing.assert_close(merged.experts.weight_out[0][active], model.experts.weight_out[0][active])
    torch.testing.assert_close(
        merged.router.gate[:, 0], (5 * model.router.gate[:, 0] + 3 * model.router.gate[:, 2]) / 8
    )
    unaligned = m.merge_experts(
        model, [[0, 2], [1], [3]], torch.ones(4), m.align_units(model, [[0, 2]], "none", PIXELS)
    )
    assert not torch.allclose(unaligned.experts.weight_in[0], model.experts.weight_in[0])


def test_groups_of_one_are_the_mixture_itself() -> None:
    model = make_moe()
    order = m.align_units(model, [[0], [1], [2], [3]], "weights", PIXELS)
    merged = m.merge_experts(model, [[0], [1], [2], [3]], torch.ones(4), order)
    torch.testing.assert_close(merged(PIXELS), model(PIXELS))
    kept = m.merge_experts(model, [[3], [1]], torch.ones(4), order)
    torch.testing.assert_close(kept(PIXELS), with_experts(model, [3, 1])(PIXELS))


def test_the_most_visited_stay_and_those_alike_in_output_are_together() -> None:
    model, _ = with_a_shuffled_copy()
    seen = look(model, PIXELS)
    by_frequency = m.group_experts(model, Merging(2, "frequency"), PIXELS, seen)
    assert {group[0] for group in by_frequency} == set(utilization(seen).topk(2).indices.tolist())
    by_outputs = m.group_experts(model, Merging(3, "outputs"), PIXELS, seen)
    assert sorted(map(sorted, by_outputs)) == [[0, 2], [1], [3]]
    for groups in (by_frequency, by_outputs):
        assert sorted(expert for group in groups for expert in group) == [0, 1, 2, 3]


@pytest.mark.parametrize("group", get_args(Grouping))
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_stay_as_asked_for(group: Grouping, keep: int) -> None:
    made = MergeExperts(Merging(keep, group), NO_TRAINING).make(make_work(make_moe()))
    assert len(made.proof["groups"]) == len(made.proof["kept"]) == keep
    if keep == 1:
        assert isinstance(made.model, FFN)
    else:
        assert isinstance(made.model, SparseMoE)
        assert made.model.config.routing.num_experts == keep


def test_bad_input_is_the_users_error() -> None:
    with pytest.raises(UserError, match="--keep"):
        Merging(0)
    with pytest.raises(UserError, match="--keep 4"):
        MergeExperts(Merging(4), NO_TRAINING).make(make_work(make_moe()))
