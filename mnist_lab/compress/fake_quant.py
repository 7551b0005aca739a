"""Rounding inside a network that goes on learning: forward it rounds, backward the gradient passes it by.

Weights: forward ŵ = s·level(w/s) (levels.py). Backward ∂ŵ/∂w is 1 where w/s lies in reach of the levels, half a step
beyond the lowest and the highest at most, and 0 elsewhere (straight-through); and the step size s is learned (LSQ,
arXiv:1902.08153): ∂ŵ/∂s = level(w/s) − w/s in reach, level(w/s) elsewhere. s is trained as s₀·exp(θ), so that a step of
Adam changes it by a share of itself.

Shapes: I inputs, O outputs, E experts, G groups of inputs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from mnist_lab.compress.gptq import nearest_level, search_scale
from mnist_lab.compress.levels import LEVELS, Levels, Rounding, RouterBits, check_groups
from mnist_lab.models import Model
from mnist_lab.models.ffn import linear_layers
from mnist_lab.models.moe import SparseMoE

SYMMETRIC_8 = Levels(-127, 255)
TINY = torch.finfo(torch.float32).tiny
# Of what the models multiply with, which argument the rows are; F.grouped_mm itself is not asked about.
PLACE_OF_ROWS = {F.linear: 0, F.conv2d: 0, torch._grouped_mm: 0, torch.addmm: 1, Tensor.matmul: 0}


class Weight(NamedTuple):
    """A weight of a model: of a linear layer (O, I), of a router (I, O), or of experts (E, I, O)."""

    module: nn.Module
    name: str
    input_axis: int

    @property
    def value(self) -> Tensor:
        """As the model uses it."""
        value: Tensor = getattr(self.module, self.name)
        return value

    def matrices(self) -> tuple[Tensor, ...]:
        """(I, O) each."""
        value = self.value.detach()
        return value.unbind() if value.ndim == 3 else (value if self.input_axis == 0 else value.T,)


def roundings(model: Model, rounding: Rounding, router_bits: RouterBits) -> list[tuple[Weight, Rounding]]:
    """The weights of all products, and how each is rounded."""
    if isinstance(model, SparseMoE):
        stacked = [Weight(model.experts, name, 1) for name in ("weight_in", "weight_out")]
        weights = [Weight(model.stem, "weight", 1), *stacked, *(Weight(layer, "weight", 1) for layer in model.head)]
    else:
        check_groups(rounding, is_small=model.config.is_small)
        weights = [Weight(layer, "weight", 1) for layer in linear_layers(model.layers)]
    found = list(zip(weights, rounding.of_layers(len(weights)), strict=True))
    if isinstance(model, SparseMoE) and router_bits is not None:
        found.append((Weight(model.router, "gate", 0), Rounding(router_bits)))
    return found


def round_in_training(weight: Weight, rounding: Rounding, *, as_int8: bool) -> None:
    """Let a model round one of its weights wherever it uses it; in place.

    Args:
        as_int8: as INT8 will, with the scale of a matrix's largest weight.
    """
    rounded = AbsmaxWeight() if as_int8 else RoundedWeight(weight.value, rounding, weight.input_axis)
    parametrize.register_parametrization(weight.module, weight.name, rounded)


def fold(model: nn.Module) -> None:
    """Leave a plain model, whose weights lie on their levels; in place."""
    for module in [*model.modules()]:
        for name in [*getattr(module, "parametrizations", {})]:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


class RoundToLevels(torch.autograd.Function):
    """Of weights, and steps that broadcast against them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, step: Tensor, levels: Levels) -> Tensor:
        multiple = weight / step
        level = nearest_level(multiple, levels)
        ctx.save_for_backward(multiple, level, step)
        ctx.levels = levels
        return level * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        multiple, level, step = ctx.saved_tensors
        reach = ctx.levels.step / 2  # for a single bit, −1 or 1, that is to −2 and 2
        passed = gradient * ((multiple >= ctx.levels.lowest - reach) & (multiple <= ctx.levels.highest + reach))
        of_step = torch.addcmul(gradient * level, passed, multiple, value=-1)
        return passed, of_step.sum_to_size(step.shape), None


class RoundedWeight(nn.Module):
    """A weight on its levels, in the place of the one that is trained; steps are part of the model while it trains."""

    start: Tensor  # the steps of least error

    def __init__(self, weight: Tensor, rounding: Rounding, input_axis: int) -> None:
        super().__init__()
        self.levels, self.input_axis = LEVELS[rounding.bits], input_axis
        self.group_size = rounding.size_of_groups(weight.shape[input_axis])
        groups = weight.detach().split(self.group_size, dim=input_axis)
        steps = [_best_steps(group.movedim(input_axis, 0), self.levels) for group in groups]
        self.register_buffer("start", torch.stack(steps, dim=input_axis).unsqueeze(input_axis + 1))
        self.log_change = nn.Parameter(torch.zeros_like(self.start))

    def forward(self, weight: Tensor) -> Tensor:
        step = self.start * self.log_change.exp()
        rounded: Tensor = RoundToLevels.apply(self._to_groups(weight), step, self.levels)
        axis = self.input_axis
        return rounded.flatten(axis, axis + 1).narrow(axis, 0, weight.shape[axis])

    def _to_groups(self, weight: Tensor) -> Tensor:
        """The inputs' axis as two, groups and inputs of a group, the last one filled up with zeros."""
        axis = self.input_axis
        missing = -weight.shape[axis] % self.group_size
        if missing:
            shape = [missing if place == axis else size for place, size in enumerate(weight.shape)]
            weight = torch.cat([weight, weight.new_zeros(shape)], dim=axis)
        return weight.unflatten(axis, (-1, self.group_size))


class AbsmaxWeight(nn.Module):
    """A weight as INT8 has it: q = round(127·w / max|w|) of each matrix."""

    def forward(self, weight: Tensor) -> Tensor:
        step = weight.detach().abs().amax(dim=(-2, -1), keepdim=True) / SYMMETRIC_8.highest
        rounded: Tensor = RoundToLevels.apply(weight, step.clamp(min=TINY), SYMMETRIC_8)
        return rounded


def _best_steps(inputs_first: Tensor, levels: Levels) -> Tensor:
    """Of least squared error, for weights (inputs of a group, …) without its first axis."""
    rows = inputs_first.flatten(1).double()
    step, _ = search_scale(rows, rows.new_ones(len(rows)), levels)
    return step.float().reshape(inputs_first.shape[1:])


class RoundRows(torch.autograd.Function):
    """Rows in so many bits, from their smallest value to their largest, with zero a level."""

    @staticmethod
    def forward(_: Any, rows: Tensor, bits: int) -> Tensor:
        low, high = rows.min().clamp(max=0), rows.max().clamp(min=0)
        step = ((high - low) / (2**bits - 1)).clamp(min=TINY)
        zero = (-low / step).round()
        return ((rows / step).round() + zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(step)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class RoundedActivations(TorchFunctionMode):
    """Within, every product but the first of a pass rounds its rows: pixels are whole numbers already.

    Products that nothing learns from, as those of a teacher, stay as they are.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.num_products = bits, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = PLACE_OF_ROWS.get(func)
        if place is not None and torch.is_grad_enabled():
            self.num_products += 1
            if self.num_products > 1:
                args = (*args[:place], RoundRows.apply(args[place], self.bits), *args[place + 1 :])
        return func(*args, **(kwargs or {}))
