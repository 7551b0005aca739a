"""Few bits: the integers that a weight may become, and which weights share a scale.

w ≈ s·(q − z): q one of a few evenly spaced integers, s the scale and z the zero point of an output's group of inputs.

Shapes: I inputs, O outputs, G groups of inputs.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mnist_lab.errors import UserError
from mnist_lab.measure import Array

Bits = Literal[8, 4, 3, 2, "ternary", 1]
RouterBits = Literal[8, 4, 2] | None  # None: they stay in float
ActivationBits = Literal[8, 4] | None
GroupSize = int | Literal["channel"]
Int8 = npt.NDArray[np.int8]
Float64 = npt.NDArray[np.float64]
SMALLEST_GROUP = 16  # that ONNX Runtime's product has a kernel for, as powers of two from there to
LARGEST_GROUP = 256
ON_LEVEL = 1e-3  # how far from a level, as a share of the distance between two, a weight still lies on it


class Levels(NamedTuple):
    """`lowest`, `lowest` + `step`, …"""

    lowest: int
    num: int
    step: int = 1

    @property
    def highest(self) -> int:
        return self.lowest + self.step * (self.num - 1)

    @property
    def farthest(self) -> int:
        """The largest distance from zero."""
        return max(-self.lowest, self.highest)


LEVELS: dict[Bits, Levels] = {
    8: Levels(-128, 256),
    4: Levels(-8, 16),
    3: Levels(-4, 8),
    2: Levels(-2, 4),
    "ternary": Levels(-1, 3),
    1: Levels(-1, 2, step=2),
}


@dataclass(frozen=True)
class Rounding:
    """To how many bits weights are rounded, and which of them share a scale."""

    bits: Bits = field(default=4, metadata={"tag": "b"})
    """Of a weight; ternary is -1, 0 or 1 times a scale, 1 is -1 or 1."""
    group_size: GroupSize = field(default="channel", metadata={"tag": "g"})
    """Inputs of an output that share a scale, a power of two from 16 to 256; or channel, all of them."""
    first_layer_bits: Bits | None = field(default=None, metadata={"tag": "first"})
    """Of the first layer's weights, which see the pixels; when not given, as many as of all others."""

    def __post_init__(self) -> None:
        if self.first_layer_bits == self.bits:
            raise UserError(f"--first-layer-bits {self.bits} is what all layers have: drop it")
        if self.group_size == "channel":
            return
        size = self.group_size
        if not SMALLEST_GROUP <= size <= LARGEST_GROUP or size & (size - 1):
            raise UserError(f"--group-size {size} must be channel, or a power of two from 16 to 256")

    @property
    def of_first_layer(self) -> "Rounding":
        return Rounding(self.first_layer_bits or self.bits, self.group_size)

    @property
    def of_last_layer(self) -> "Rounding":
        """It has few weights, and all that it loses shows: they keep 4 bits."""
        return self if self.bits in {8, 4} else Rounding(4, self.group_size)

    def of_layers(self, num_layers: int) -> list["Rounding"]:
        """Of each layer, in the order of a pass."""
        found = [replace(self, first_layer_bits=None)] * num_layers
        found[0], found[-1] = self.of_first_layer, self.of_last_layer
        return found

    def size_of_groups(self, num_inputs: int) -> int:
        """Inputs of a group; the last one of a layer may be smaller."""
        return num_inputs if self.group_size == "channel" else min(self.group_size, num_inputs)


def check_groups(rounding: Rounding, *, is_small: bool) -> None:
    """Raise UserError where a small student's weights were to have more scales than one for each output."""
    if is_small and rounding.group_size != "channel":
        raise UserError(f"--group-size {rounding.group_size} would make small students larger: drop it")


class Rounded(NamedTuple):
    """A layer's weights in few bits."""

    integers: Int8  # (I, O)
    scales: Array  # (G, O)
    zeros: Int8 | None  # (G, O) zero points; None where all are 0
    group_size: int

    def dequantize(self) -> Array:
        """(I, O), what they stand for."""
        centred = self.integers.astype(np.float32)
        if self.zeros is not None:
            centred = centred - self._by_input(self.zeros.astype(np.float32))
        values: Array = centred * self._by_input(self.scales)
        return values

    def _by_input(self, per_group: Array) -> Array:
        return np.repeat(per_group, self.group_size, axis=0)[: len(self.integers)]


def name_of(bits: Bits) -> str:
    return {"ternary": "three levels", 1: "1 bit"}.get(bits, f"{bits} bits")


def on_levels(weight_IO: Array, rounding: Rounding) -> Rounded | None:
    """Weights that were trained on the levels of this rounding; None of any others."""
    return find_levels(weight_IO, LEVELS[rounding.bits], rounding.size_of_groups(len(weight_IO)))


def find_levels(weight_IO: Array, levels: Levels, group_size: int) -> Rounded | None:
    """Weights that lie on such levels already, as those that were trained there do; None where one does not.

    The scale of a group is its largest weight over one of the levels, the first that puts all others on levels too.
    """
    integers = np.empty(weight_IO.shape, np.int8)
    scales = []
    for start in range(0, len(weight_IO), group_size):
        group: Float64 = weight_IO[start : start + group_size].astype(np.float64)
        found = _find_scales(group, levels)
        if found is None:
            return None
        multiples = group / np.where(found == 0, 1, found)
        digits = np.rint((multiples - levels.lowest) / levels.step)
        integers[start : start + group_size] = levels.lowest + levels.step * digits
        scales.append(found)
    return Rounded(integers, np.stack(scales).astype(np.float32), None, group_size)


def _find_scales(group_IO: Float64, levels: Levels) -> Float64 | None:
    """(O,), 0 for an output of zeros."""
    farthest_O = group_IO[np.abs(group_IO).argmax(axis=0), np.arange(group_IO.shape[1])]
    scales_O, left_O = np.zeros_like(farthest_O), farthest_O != 0
    for level in range(levels.farthest, 0, -1):
        for sign in (1, -1):
            if not left_O.any():
                return scales_O
            scale_O = sign * farthest_O[left_O] / level
            digits_IO = (group_IO[:, left_O] / scale_O - levels.lowest) / levels.step
            nearest_IO = np.rint(digits_IO).clip(0, levels.num - 1)
            fits_O = (np.abs(digits_IO - nearest_IO) < ON_LEVEL).all(axis=0)
            places = np.flatnonzero(left_O)[fits_O]
            scales_O[places], left_O[places] = scale_O[fits_O], False
    return None if left_O.any() else scales_O
