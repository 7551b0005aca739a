"""Rounding with feedback: products change less than with the nearest integers."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from test_weight_only import PIXELS, make_model

from mnist_lab.compress.gptq import Gram, input_grams, round_with_feedback, search_scale
from mnist_lab.compress.levels import LEVELS, Bits
from mnist_lab.deploy.onnx import build_onnx
from mnist_lab.measure import Array
from mnist_lab.models.moe import SparseMoE


def draw(seed: int = 0, num_inputs: int = 32, num_outputs: int = 8) -> tuple[Array, Array]:
    """Weights, and rows whose inputs are correlated."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(num_inputs, num_outputs)).astype(np.float32)
    rows = random.normal(size=(400, 6)) @ random.normal(size=(6, num_inputs)) + 0.3 * random.normal(
        size=(400, num_inputs)
    )
    return weight, rows.astype(np.float32)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("group_size", [32, 16])
@pytest.mark.parametrize("bits", [4, 3, 2, "ternary", 1])
def test_products_change_less_than_with_the_nearest_integers(bits: Bits, group_size: int, affine: bool) -> None:
    weight, rows = draw()
    levels = LEVELS[bits]
    rounded = round_with_feedback(weight, gram_of(rows), levels, group_size, affine=affine)
    allowed = levels.lowest + levels.step * np.arange(levels.num)
    assert np.isin(rounded.integers, allowed).all()
    assert rounded.scales.shape == (32 // group_size, 8)
    scales = np.repeat(rounded.scales, group_size, axis=0)
    shift = 0 if rounded.zeros is None else np.repeat(rounded.zeros, group_size, axis=0)
    nearest = allowed[np.abs((weight / scales + shift)[..., None] - allowed).argmin(axis=2)]
    products = rows @ weight
    errors = [np.square(products - rows @ other).sum() for other in (rounded.dequantize(), scales * (nearest - shift))]
    assert errors[0] < 0.7 * errors[1]


def gram_of(rows: Array) -> Gram:
    return rows.T.astype(np.float64) @ rows


def test_inputs_that_have_nothing_to_do_with_each_other_give_no_feedback() -> None:
    weight, _ = draw()
    integers, scales, _, _ = round_with_feedback(weight, np.eye(32), LEVELS[4], 32)
    assert np.array_equal(integers, np.clip(np.round(weight / scales), -8, 7))


def test_inputs_that_never_came_get_no_weight() -> None:
    weight, rows = draw()
    rows[:, 5] = 0
    assert not round_with_feedback(weight, gram_of(rows), LEVELS[4], 32).integers[5].any()
    nothing = round_with_feedback(weight, np.zeros((32, 32)), LEVELS[4], 32)
    assert not nothing.integers.any()
    assert np.isfinite(nothing.scales).all()


def test_scale_is_of_least_error_and_may_be_negative() -> None:
    weight = torch.tensor([[-2.0, 2.0], [-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    scale, zero = search_scale(weight, torch.ones(3, dtype=torch.float64), LEVELS[2])
    torch.testing.assert_close(scale, torch.tensor([1.0, -1.0], dtype=torch.float64))  # −2 … 1 times that is exact
    assert not zero.any()
    outlier = torch.tensor([[8.0], *[[1.0]] * 50], dtype=torch.float64)
    energy = torch.ones(51, dtype=torch.float64)
    assert search_scale(outlier, energy, LEVELS[2])[0].abs() < 4  # it would round all others to 0


def test_zero_points_fit_levels_to_a_range_on_one_side() -> None:
    weight = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    scale, zero = search_scale(weight, torch.ones(4, dtype=torch.float64), LEVELS[2], affine=True)
    assert (scale.item(), zero.item()) == (1, -2)
    assert search_scale(weight, torch.ones(4, dtype=torch.float64), LEVELS[2])[0].abs() > 1.2


def test_grams_are_of_the_rows_that_come() -> None:
    model = make_model("moe")
    assert isinstance(model, SparseMoE)
    grams = input_grams(build_onnx(model), ["flat_pixels", "hidden", "expert2.rows"], PIXELS)
    flat = PIXELS.reshape(len(PIXELS), -1).astype(np.float64)
    np.testing.assert_allclose(grams["flat_pixels"], flat.T @ flat, rtol=1e-4)
    with torch.inference_mode():
        hidden = model.embed(torch.from_numpy(PIXELS)).numpy().astype(np.float64)
        visits = (model.routed(torch.from_numpy(PIXELS)).experts == 2).any(dim=1).numpy()
    np.testing.assert_allclose(grams["hidden"], hidden.T @ hidden, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(grams["expert2.rows"], hidden[visits].T @ hidden[visits], rtol=1e-3, atol=1e-3)


def test_the_graph_is_left_as_it_was() -> None:
    graph = build_onnx(make_model("ffn"))
    before = graph.SerializeToString()
    input_grams(graph, ["flat_pixels", "fc0.relu"], PIXELS)
    assert graph.SerializeToString() == before
    assert isinstance(graph, onnx.ModelProto)
    assert numpy_helper.to_array(graph.graph.initializer[0]).shape == (784, 256)
