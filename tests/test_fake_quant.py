"""Rounding in training: its values and gradients by the formulas, and the plain model that it leaves."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from test_prune_experts import make_moe
from tiny import make_dataset, spec
from torch import Tensor

from mnist_lab.compress import fake_quant as f
from mnist_lab.compress.fake_quant import RoundedActivations, RoundedWeight, RoundRows, RoundToLevels, Weight
from mnist_lab.compress.levels import LEVELS, Bits, Rounding, RouterBits, on_levels
from mnist_lab.compress.weight_only import uniform_plan
from mnist_lab.deploy.onnx import build_onnx
from mnist_lab.models import Model
from mnist_lab.models.ffn import FFN, FFNConfig

PIXELS = make_dataset().train.pixels[:64]
BITS: tuple[Bits, ...] = tuple(LEVELS)
EVERY_BITS = pytest.mark.parametrize("bits", BITS)


def make_ffn() -> FFN:
    torch.manual_seed(0)
    return FFN(FFNConfig((40, 12), spec(0.18, 0.18))).eval()


MODELS: dict[str, Callable[[], Model]] = {"ffn": make_ffn, "moe": make_moe}


def round_all(model: Model, rounding: Rounding, router_bits: RouterBits = None) -> Model:
    for weight, own in f.roundings(model, rounding, router_bits):
        f.round_in_training(weight, own, as_int8=False)
    return model


def values_of(bits: Bits) -> list[int]:
    levels = LEVELS[bits]
    return [levels.lowest + levels.step * digit for digit in range(levels.num)]


def test_values_and_gradients_are_hand_computed() -> None:
    weight = torch.tensor([0.6, -0.2, -1.2, 0.9, -2.0], requires_grad=True)  # over 0.5: 1.2, -0.4, -2.4, 1.8, -4
    step = torch.tensor([0.5], requires_grad=True)
    rounded = RoundToLevels.apply(weight, step, LEVELS[2])  # -2, -1, 0, 1
    assert rounded.tolist() == [0.5, 0, -1, 0.5, -1]
    rounded.backward(torch.tensor([1.0, 10, 100, 1000, 10000]))
    assert weight.grad is not None
    assert step.grad is not None
    assert weight.grad.tolist() == [1, 10, 100, 0, 0]
    expected = (1 - 1.2) + 10 * (0 + 0.4) + 100 * (-2 + 2.4) + 1000 * 1 + 10000 * -2
    assert step.grad.tolist() == [pytest.approx(expected)]


@EVERY_BITS
def test_gradients_are_those_of_a_rounding_that_the_gradient_passes_by(bits: Bits) -> None:
    torch.manual_seed(0)
    levels = LEVELS[bits]
    reach = levels.step / 2
    weight = (3 * levels.farthest * torch.randn(200, 6, dtype=torch.float64)).requires_grad_()
    step = (torch.rand(1, 6, dtype=torch.float64) + 0.5).mul(torch.tensor([1, -1, 1, 1, -1, 1])).requires_grad_()
    multiple = (weight / step).clamp(levels.lowest - reach, levels.highest + reach)
    distance = (multiple.detach().unsqueeze(-1) - torch.tensor(values_of(bits))).abs()
    level = torch.tensor(values_of(bits), dtype=torch.float64)[distance.argmin(dim=-1)]
    expected = step * (multiple + (level - multiple).detach())
    found = RoundToLevels.apply(weight, step, levels)
    torch.testing.assert_close(found, expected)
    coming = torch.randn(200, 6, dtype=torch.float64)
    theirs, ours = (torch.autograd.grad(of, (weight, step), coming) for of in (expected, found))
    torch.testing.assert_close(ours, theirs)
    assert 0 < int((ours[0] == 0).sum()) < weight.numel()  # some are out of reach, and some are not


@pytest.mark.parametrize(("shape", "axis"), [((5, 40), 1), ((40, 5), 0), ((3, 40, 5), 1)], ids=str)
@pytest.mark.parametrize("group_size", ["channel", 16])
@EVERY_BITS
def test_every_group_of_an_output_has_its_own_scale(
    bits: Bits, group_size: Any, shape: tuple[int, ...], axis: int
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight.narrow(axis, 0, 16).mul_(100)
    rounded = RoundedWeight(weight, Rounding(bits, group_size), axis)(weight)
    assert rounded.shape == shape
    matrices = rounded.detach().movedim(axis, 0).flatten(1).numpy()
    found = on_levels(matrices, Rounding(bits, group_size))
    assert found is not None
    np.testing.assert_allclose(found.dequantize(), matrices, rtol=1e-4, atol=1e-6)
    assert len(found.scales) == (1 if group_size == "channel" else 3)
    if bits == 1:
        assert (rounded != 0).all()
    if group_size == 16:
        assert (np.abs(found.scales[0]) > 10 * np.abs(found.scales[1:])).all()


def test_single_bit_is_never_zero() -> None:
    assert RoundToLevels.apply(torch.tensor([0.0, 1e-9, -1e-9]), torch.ones(1), LEVELS[1]).abs().tolist() == [1, 1, 1]


def test_first_scales_are_of_least_error_and_what_fills_a_group_up_counts_for_nothing() -> None:
    weight = torch.where(torch.rand(4, 20) > 0.5, 0.3, -0.3)  # 20 inputs: a group of 16, and one of 4
    start = RoundedWeight(weight, Rounding(1, 16), 1).start
    torch.testing.assert_close(start.abs(), torch.full((4, 2, 1), 0.3))


def test_nothing_comes_from_what_fills_a_group_up() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 20, requires_grad=True)
    module = RoundedWeight(weight, Rounding(1, 16), 1)
    module(weight).sum().backward()
    alone = RoundedWeight(weight[:, 16:], Rounding(1), 1)
    alone(weight[:, 16:]).sum().backward()
    assert module.log_change.grad is not None
    assert alone.log_change.grad is not None
    torch.testing.assert_close(module.log_change.grad[:, 1], alone.log_change.grad[:, 0])


def test_a_scale_learns_as_a_share_of_itself() -> None:
    weight = torch.tensor([[0.6, -0.2, -1.2, 0.9]])
    module = RoundedWeight(weight, Rounding(2), 1)
    step = module.start.clone().requires_grad_()
    RoundToLevels.apply(weight.unsqueeze(1), step, LEVELS[2]).sum().backward()
    module(weight).sum().backward()
    assert module.log_change.grad is not None
    assert step.grad is not None
    torch.testing.assert_close(module.log_change.grad, step.grad * module.start)
    with torch.no_grad():
        module.log_change.add_(np.log(2))
    torch.testing.assert_close(module(weight), RoundToLevels.apply(weight, 2 * module.start[0], LEVELS[2]))


@pytest.mark.parametrize("router_bits", [None, 2])
@pytest.mark.parametrize("bits", get_args(Bits))
@pytest.mark.parametrize("name", MODELS)
def test_training_rounds_what_the_graph_rounds(name: str, bits: Bits, router_bits: RouterBits) -> None:
    model, rounding = MODELS[name](), Rounding(bits, 16)
    if name == "ffn" and router_bits is not None:
        return
    found = Counter(own for weight, own in f.roundings(model, rounding, router_bits) for _ in weight.matrices())
    assert found == Counter(uniform_plan(build_onnx(model), rounding, router_bits).values())


@pytest.mark.parametrize("group_size", ["channel", 16])
@EVERY_BITS
@pytest.mark.parametrize("name", MODELS)
def test_folded_model_is_plain_lies_on_levels_and_gives_the_same_logits(name: str, bits: Bits, group_size: Any) -> None:
    plain, rounding = MODELS[name](), Rounding(bits, group_size)
    router_bits: RouterBits = 4 if name == "moe" else None
    model = round_all(copy.deepcopy(plain), rounding, router_bits)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("log_change"):
                parameter.normal_(std=0.1)
        expected = model(PIXELS)
        f.fold(model)
        torch.testing.assert_close(model(PIXELS), expected, rtol=0, atol=0)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    ours, theirs = model.state_dict(), plain.state_dict()
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}
    kept = {key for key in ours if torch.equal(ours[key], theirs[key])}
    assert {key for key in ours if "weight" in key} & kept == set()
    assert ("router.gate" in kept) is False if name == "moe" else True
    assert {key for key in ours if "bias" in key or "noise" in key} <= kept
    for weight, own in f.roundings(model, rounding, router_bits):
        assert all(on_levels(matrix.numpy(), own) is not None for matrix in weight.matrices())


def test_matrices_are_inputs_first() -> None:
    model = make_moe()
    assert [matrix.shape for matrix in Weight(model.stem, "weight", 1).matrices()] == [(784, 16)]
    assert [matrix.shape for matrix in Weight(model.experts, "weight_in", 1).matrices()] == [(16, 12)] * 4
    assert [matrix.shape for matrix in Weight(model.router, "gate", 0).matrices()] == [(16, 4)]


def test_rows_lie_between_their_smallest_and_largest_value_with_zero_a_level() -> None:
    uneven = torch.tensor([[-1.2, 0.0, 0.5, 1.9]])  # steps of 3.1/3, of which 1.16 lie below zero: one does
    torch.testing.assert_close(RoundRows.apply(uneven, 2), torch.tensor([[-1.0, 0, 0, 2]]) * 3.1 / 3)
    rows = torch.tensor([[-1.0, 0.0, 0.3, 2.0]], requires_grad=True)
    rounded = RoundRows.apply(rows, 2)  # steps of 1
    assert rounded.tolist() == [[-1, 0, 0, 2]]
    rounded.backward(torch.tensor([[1.0, 2, 3, 4]]))
    assert rows.grad is not None
    assert rows.grad.tolist() == [[1, 2, 3, 4]]
    positive = torch.rand(50, 7)
    assert (RoundRows.apply(positive, 8) - positive).abs().max() <= positive.max() / 255 / 2 + 1e-6
    assert RoundRows.apply(positive, 4).unique().numel() == 16
    assert RoundRows.apply(torch.zeros(3), 4).tolist() == [0, 0, 0]


@pytest.fixture
def rounded_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of rows that are rounded, as it happens."""
    shapes: list[tuple[int, ...]] = []

    class Spy:
        @staticmethod
        def apply(rows: Tensor, bits: int) -> Tensor:
            assert bits == 4
            shapes.append(tuple(rows.shape))
            return rows

    monkeypatch.setattr(f, "RoundRows", Spy)
    return shapes


def test_rows_of_every_product_but_the_first_are_rounded(rounded_shapes: list[tuple[int, ...]]) -> None:
    for model, expected in (
        (make_ffn(), [(64, 40), (64, 12)]),
        (make_moe(), [(64, 16), (64, 16), (128, 16), (128, 12), (64, 8), (64, 6)]),  # gate, noise, experts, head
    ):
        rounded_shapes.clear()
        with RoundedActivations(4):
            model.train()(PIXELS)
        assert rounded_shapes == expected


def test_what_nothing_learns_from_is_left_alone(rounded_shapes: list[tuple[int, ...]]) -> None:
    with RoundedActivations(4):
        with torch.no_grad():  # a teacher
            make_moe()(PIXELS)
            make_ffn()(PIXELS[:1])
        make_ffn().train()(PIXELS)
    assert rounded_shapes == [(64, 40), (64, 12)]


def test_activations_change_what_comes_out_and_gradients_pass() -> None:
    model = make_ffn().train()
    with RoundedActivations(4):
        rounded = model(PIXELS)
    first, second, last = model.layers
    hidden = RoundRows.apply(first(model.normalize(PIXELS)).relu(), 4)
    expected = last(RoundRows.apply(second(hidden).relu(), 4))
    torch.testing.assert_close(rounded, expected)
    rounded.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_int8_weights_are_learned_as_the_largest_of_a_matrix_scales_them() -> None:
    model = make_moe()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight, own in f.roundings(model, Rounding(8), None):
        f.round_in_training(weight, own, as_int8=True)
    f.fold(model)
    for name in ("stem.weight", "experts.weight_in", "experts.weight_out", "head.0.weight"):
        step = before[name].abs().amax(dim=(-2, -1), keepdim=True) / 127
        torch.testing.assert_close(model.get_parameter(name), (before[name] / step).round() * step)
