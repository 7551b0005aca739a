"""Few bits: the levels of weights, and weights that lie on them already."""

from typing import Any

import numpy as np
import pytest

from mnist_lab.compress.levels import LEVELS, Bits, Rounded, Rounding, find_levels
from mnist_lab.errors import UserError

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [(4, range(-8, 8)), (3, range(-4, 4)), (2, range(-2, 2)), ("ternary", range(-1, 2)), (1, (-1, 1))],
)
def test_levels_are_those_of_so_many_bits(bits: Bits, expected: Any) -> None:
    levels = LEVELS[bits]
    assert [levels.lowest + levels.step * digit for digit in range(levels.num)] == [*expected]
    assert levels.highest == max(expected)
    assert levels.farthest == max(map(abs, expected))


@pytest.mark.parametrize("group_size", [40, 16])
@pytest.mark.parametrize("bits", LEVELS)
def test_weights_on_levels_are_found_and_stay_as_they_are(bits: Bits, group_size: int) -> None:
    levels = LEVELS[bits]
    digits = RANDOM.integers(0, levels.num, (40, 12))
    scales = RANDOM.uniform(0.01, 2, (-(-40 // group_size), 12)) * RANDOM.choice([-1, 1], 12)
    drawn = (levels.lowest + levels.step * digits).astype(np.int8)
    weight = Rounded(drawn, scales.astype(np.float32), None, group_size).dequantize()
    weight[:, 3] = 0  # an output that never fires
    found = find_levels(weight, levels, group_size)
    assert found is not None
    np.testing.assert_allclose(found.dequantize(), weight, rtol=1e-5, atol=1e-7)
    assert np.isin(found.integers, levels.lowest + levels.step * np.arange(levels.num)).all()


@pytest.mark.parametrize("bits", LEVELS)
def test_weights_off_levels_are_not_found(bits: Bits) -> None:
    levels = LEVELS[bits]
    weight = (levels.lowest + levels.step * RANDOM.integers(0, levels.num, (40, 12))).astype(np.float32)
    weight[7, 5] += 0.3 * levels.step
    assert find_levels(weight, levels, 40) is None
    assert find_levels(RANDOM.normal(size=(40, 12)).astype(np.float32), levels, 40) is None


def test_each_group_has_its_own_scale() -> None:
    weight = np.array([[1.0], [-2.0], [3.0], [-6.0]], np.float32)
    assert find_levels(weight, LEVELS[2], 4) is None
    found = find_levels(weight, LEVELS[2], 2)
    assert found is not None
    assert np.array_equal(found.integers, [[1], [-2], [1], [-2]])
    assert np.array_equal(found.scales, [[1], [3]])


def test_zero_points_shift_levels() -> None:
    rounded = Rounded(
        np.array([[-2], [1], [0]], np.int8), np.array([[0.5], [2]], np.float32), np.array([[-2], [1]], np.int8), 2
    )
    assert rounded.dequantize().ravel().tolist() == [0, 1.5, -2]


def test_bad_groups_are_the_users_error() -> None:
    for size in (0, -1, 8, 48, 512):
        with pytest.raises(UserError, match="--group-size"):
            Rounding(4, size)
    assert [Rounding(4, 64).size_of_groups(num) for num in (12, 64, 100)] == [12, 64, 64]
    assert Rounding(4).size_of_groups(100) == 100


def test_first_and_last_layer_keep_more() -> None:
    assert [r.bits for r in Rounding(1, first_layer_bits=2).of_layers(4)] == [2, 1, 1, 4]
    assert [r.bits for r in Rounding(8).of_layers(3)] == [8, 8, 8]
    assert [r.bits for r in Rounding(2).of_layers(1)] == [4]
    with pytest.raises(UserError, match="--first-layer-bits 2"):
        Rounding(2, first_layer_bits=2)
