"""That a base and additions are the experts they were made of, as near as a rank allows."""

import pytest
import torch
from test_merge_experts import with_a_shuffled_copy
from test_prune_experts import NO_TRAINING, make_moe, make_work
from tiny import make_dataset

from mnist_lab.compress.finetune import Finetuning
from mnist_lab.compress.share_base import ShareBase, Sharing, cut_rank, share_base
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.models import count_parameters
from mnist_lab.models.moe import SparseMoE

PIXELS = make_dataset().train.pixels


def test_differences_of_that_rank_come_out_exactly() -> None:
    model, generator = make_moe(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("weight_in", "weight_out"):
            weight = model.experts.get_parameter(name)  # (E, I, O)
            left = torch.randn(4, weight.shape[1], 2, generator=generator)
            right = torch.randn(4, 2, weight.shape[2], generator=generator)
            weight.copy_(weight[0] + 0.1 * left @ right)
    torch.testing.assert_close(share_base(model, 8, PIXELS)(PIXELS), model(PIXELS), atol=1e-2, rtol=1e-2)
    assert not torch.allclose(share_base(model, 1, PIXELS)(PIXELS), model(PIXELS), atol=0.1)


def test_experts_alike_but_for_the_order_of_their_units_need_one_base_only() -> None:
    model, _ = with_a_shuffled_copy()
    with torch.no_grad():
        for expert in (1, 3):
            for name in ("weight_in", "bias_in", "weight_out", "bias_out"):
                model.experts.get_parameter(name)[expert] = model.experts.get_parameter(name)[0]
    shared = share_base(model, 1, PIXELS)
    torch.testing.assert_close(shared(PIXELS), model(PIXELS), atol=1e-3, rtol=1e-3)


def test_a_cut_is_the_best_for_the_rows_that_come() -> None:
    generator = torch.Generator().manual_seed(0)
    delta, rows = torch.randn(12, 10, generator=generator), torch.randn(200, 12, generator=generator)
    rows[:, :6] *= 20  # inputs on which it hangs
    left, right = cut_rank(delta, rows, 3)
    assert (left.shape, right.shape) == ((12, 3), (3, 10))
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    plain = (u[:, :3] * s[:3]) @ v[:3]
    products = rows @ delta
    best = torch.linalg.svdvals(products)[3:].square().sum().sqrt()  # Eckart and Young
    assert (products - rows @ left @ right).norm() < 1.01 * best < (products - rows @ plain).norm()


def test_an_expert_without_rows_keeps_what_its_weights_say_most() -> None:
    delta = torch.randn(12, 10, generator=torch.Generator().manual_seed(0))
    left, right = cut_rank(delta, torch.zeros(0, 12), 3)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    torch.testing.assert_close(left @ right, (u[:, :3] * s[:3]) @ v[:3], atol=1e-4, rtol=1e-4)


def test_more_rank_is_nearer_and_inputs_that_are_always_zero_do_no_harm() -> None:
    model = make_moe()
    with torch.no_grad():
        model.get_parameter("stem.bias")[:4] = -1e3
    gaps = [(share_base(model, rank, PIXELS)(PIXELS) - model(PIXELS)).norm() for rank in (1, 4, 8)]
    assert gaps[0] > gaps[1] > gaps[2]


def test_step_makes_it_smaller_and_trains_all_of_it() -> None:
    work = make_work(make_moe())
    made = ShareBase(Sharing(2), NO_TRAINING).make(work)
    assert isinstance(made.model, SparseMoE)
    assert made.model.config.shared_rank == 2
    assert made.proof["left"] == count_parameters(made.model)[0] / count_parameters(make_moe())[0] < 1
    trained = ShareBase(Sharing(2), Finetuning(finetune_epochs=1)).make(work).model.state_dict()
    before = made.model.state_dict()
    for layer in ("layer_in", "layer_out"):
        for part in ("base", "left", "right"):
            assert not torch.equal(trained[f"experts.{layer}.{part}"], before[f"experts.{layer}.{part}"])


def test_ranks_that_make_nothing_smaller_are_errors() -> None:
    with pytest.raises(RunFailed, match="rank 8 makes nothing smaller"):
        ShareBase(Sharing(8), NO_TRAINING).make(make_work(make_moe()))
    for rank in (0, -1, 10**7):
        with pytest.raises(UserError, match="--rank"):
            Sharing(rank)
