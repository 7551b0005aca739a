"""The dense feed-forward network (FFN): flatten, normalise, Linear + ReLU layers, Linear to logits."""

import itertools
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from msgspec import Meta
from torch import Tensor, nn

from mnist_lab.data import DataSpec


@dataclass(frozen=True)
class FFNConfig:
    """`widths` of the hidden layers."""

    widths: Annotated[tuple[Annotated[int, Meta(ge=1)], ...], Meta(max_length=16)]
    data: DataSpec
    kind: Literal["ffn"] = "ffn"


class Normalize(nn.Module):
    """Flatten raw pixels to rows of zero mean and unit variance over the training set."""

    mean: Tensor
    std: Tensor

    def __init__(self, data: DataSpec) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(data.mean))
        self.register_buffer("std", torch.tensor(data.std))

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.flatten(1) - self.mean).div_(self.std)  # (B, pixels)


class FFN(nn.Module):
    """`model(pixels) -> logits`: float32 (B, 1, height, width) in [0, 1] -> float32 (B, C)."""

    def __init__(self, config: FFNConfig) -> None:
        super().__init__()
        self.config = config
        self.normalize = Normalize(config.data)
        self.layers = nn.ModuleList(linear_chain(config.data.num_pixels, *config.widths, config.data.num_classes))

    def forward(self, pixels: Tensor) -> Tensor:
        return relu_chain(self.layers, self.normalize(pixels))  # (B, C)


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
