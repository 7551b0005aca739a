"""The feed-forward network (FFN): flatten, normalise, Linear + ReLU layers, Linear to logits.

Small ones see pixels that were pooled, and begin with layers whose weights are shared between windows of the image.

Shapes: B images, I channels of a window, O of a layer, k pixels a side of a window, C classes.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lab.data import DataSpec
from mnist_lab.errors import UserError
from mnist_lab.files import MAX_VALUES

Positive = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class Windows:
    """A layer of `channels` on each square of `size` pixels a side, one every `stride` pixels."""

    channels: Positive
    size: Positive
    stride: Positive

    @property
    def name(self) -> str:
        return f"{self.channels}x{self.size}s{self.stride}"


@dataclass(frozen=True)
class FFNConfig:
    """`widths` of the hidden layers that see all of an image."""

    widths: Annotated[tuple[Positive, ...], Meta(max_length=16)]
    data: DataSpec
    kind: Literal["ffn"] = "ffn"
    pool: Positive = 1  # pixels of a side that become one
    windows: Annotated[tuple[Windows, ...], Meta(max_length=16)] = ()  # of the layers before

    def __post_init__(self) -> None:
        find_planes(self.data, self.pool, self.windows)

    @property
    def is_small(self) -> bool:
        """Whether it is of the family of small students, whose files spare every byte."""
        return self.pool > 1 or bool(self.windows)


class Planes(NamedTuple):
    """Shape of what windows see of an image, or make of it."""

    channels: int
    height: int
    width: int

    @property
    def num_values(self) -> int:
        return math.prod(self)


def find_planes(data: DataSpec, pool: int = 1, windows: Iterable[Windows] = ()) -> list[Planes]:
    """What the first layer sees, and what each layer of windows makes of it.

    Raises:
        UserError: the pool does not divide the image's sides, or a window is larger than what it sees.
    """
    height, width = data.image_size
    if height % pool or width % pool:
        raise UserError(f"--pool {pool} must divide the sides of an image, {height} and {width}")
    planes = [Planes(1, height // pool, width // pool)]
    for each in windows:
        _, *sides = planes[-1]
        if each.size > min(sides):
            raise UserError(f"--windows {each.name} is larger than the {sides[0]}x{sides[1]} pixels that it sees")
        planes.append(Planes(each.channels, *((side - each.size) // each.stride + 1 for side in sides)))
        if planes[-1].num_values > MAX_VALUES:
            made = f"{planes[-1].num_values:,} values of an image"
            raise UserError(f"--windows {each.name} makes {made}, more than {MAX_VALUES:,}")
    return planes


class Normalize(nn.Module):
    """Flatten raw pixels, or means of `pool` by `pool` of them, to rows of zero mean over the training set.

    Of the pixels themselves the variance is 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, data: DataSpec, pool: int = 1) -> None:
        super().__init__()
        self.pool = pool
        self.register_buffer("mean", torch.tensor(data.mean))
        self.register_buffer("std", torch.tensor(data.std))

    def forward(self, pixels: Tensor) -> Tensor:
        if self.pool > 1:
            pixels = F.avg_pool2d(pixels, self.pool)
        return (pixels.flatten(1) - self.mean).div_(self.std)  # (B, pixels)


class WindowLayer(nn.Module):
    """One linear layer on every window of planes: rows (B, I·H·W) -> (B, O·h·w).

    That is a convolution without padding, and is computed as one where the layer is no other than a linear one.
    """

    weight: None = None  # which `linear` has (O, I·k·k), so that rows come here as they are

    def __init__(self, sees: Planes, windows: Windows) -> None:
        super().__init__()
        self.sees, self.windows = sees, windows
        self.linear = linear_chain(sees.channels * windows.size**2, windows.channels)[0]

    def forward(self, rows: Tensor) -> Tensor:
        weight = self.linear.weight
        # Tools that trace a model know linear layers; and what stands in for one may have no such weight.
        if torch.compiler.is_exporting() or not isinstance(weight, Tensor):
            return self.join(apply_linear(self.linear, self.split(rows)))
        kernel = weight.unflatten(1, (self.sees.channels, self.windows.size, self.windows.size))
        planes = cast_like(rows, weight).unflatten(1, self.sees)
        return F.conv2d(planes, kernel, self.linear.bias, self.windows.stride).flatten(1)

    def split(self, rows: Tensor) -> Tensor:
        """Every window as a row of its own (B·h·w, I·k·k)."""
        size, stride = self.windows.size, self.windows.stride
        planes = rows.unflatten(1, self.sees)
        windows = planes.unfold(2, size, stride).unfold(3, size, stride)  # (B, I, h, w, k, k)
        return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, self.sees.channels * size**2)

    def join(self, outputs: Tensor) -> Tensor:
        """What a layer gives for each window (B·h·w, O), as rows of images (B, O·h·w)."""
        height, width = ((side - self.windows.size) // self.windows.stride + 1 for side in self.sees[1:])
        return outputs.unflatten(0, (-1, height * width)).transpose(1, 2).flatten(1)


class FFN(nn.Module):
    """`model(pixels) -> logits`: float32 (B, 1, height, width) in [0, 1] -> float32 (B, C)."""

    def __init__(self, config: FFNConfig) -> None:
        super().__init__()
        self.config = config
        self.normalize = Normalize(config.data, config.pool)
        *sees, last = find_planes(config.data, config.pool, config.windows)
        windows = [WindowLayer(planes, own) for planes, own in zip(sees, config.windows, strict=True)]
        dense = linear_chain(last.num_values, *config.widths, config.data.num_classes)
        self.layers = nn.ModuleList([*windows, *dense])

    def forward(self, pixels: Tensor) -> Tensor:
        return relu_chain(self.layers, self.normalize(pixels))  # (B, C)


def linear_layers(layers: Iterable[nn.Module]) -> Iterator[nn.Linear]:
    """Each layer's own linear one, which holds its weights."""
    for layer in layers:
        linear = layer.linear if isinstance(layer, WindowLayer) else layer
        assert isinstance(linear, nn.Linear)
        yield linear


def linear_chain(*widths: int) -> list[nn.Linear]:
    """Linear layers from each width to the next, He-initialised for ReLU (arXiv:1502.01852), zero biases."""
    layers = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(widths)]
    for layer in layers:
        if not layer.weight.is_meta:  # as in draw_normal
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return layers


def draw_normal(*shape: int, times: float = 1.0, over: float = 1.0) -> Tensor:
    """Normal values, scaled; on the meta device none, as to draw or scale there would import torch's compiler."""
    values = torch.empty(shape)
    return values if values.is_meta else values.normal_().mul_(times).div_(over)


def relu_chain(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    """Apply the layers with ReLU between them, none after the last, each in the precision of its weights."""
    *inner, last = layers
    for layer in inner:
        hidden = apply_linear(layer, hidden).relu_()  # (B, width)
    return apply_linear(last, hidden)  # (B, C)


def apply_linear(layer: nn.Module, rows: Tensor) -> Tensor:
    """A linear layer on rows of whatever precision."""
    weight = layer.weight  # of a quantized layer no tensor, and no business of ours
    result: Tensor = layer(cast_like(rows, weight) if isinstance(weight, Tensor) else rows)
    return result


def cast_like(rows: Tensor, weight: Tensor) -> Tensor:
    """Rows in the precision of a weight; no operation, and none in a traced graph, where that is theirs."""
    return rows if rows.dtype == weight.dtype else rows.to(weight.dtype)
