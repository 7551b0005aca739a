"""The dense feed-forward network (FFN): flatten, normalise, Linear + ReLU layers, Linear to logits."""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mnist_lab.data import NUM_CLASSES


@dataclass(frozen=True)
class FFNConfig:
    """`widths` of the hidden layers; `mean` and `std` of the training pixels."""

    widths: tuple[int, ...]
    mean: float
    std: float
    kind: Literal["ffn"] = "ffn"


class Normalize(nn.Module):
    """Flatten raw pixels (B, 1, 28, 28) to (B, 784), zero mean and unit variance over the training set.

    `dtype` is that of the result: what the layers after it compute in.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.dtype = torch.float32
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.flatten(1) - self.mean).div_(self.std).to(self.dtype)


class FFN(nn.Module):
    """`model(pixels) -> logits`: float32 (B, 1, 28, 28) in [0, 1] -> float32 (B, C)."""

    def __init__(self, config: FFNConfig) -> None:
        super().__init__()
        self.config = config
        self.normalize = Normalize(config.mean, config.std)
        self.layers = nn.ModuleList(linear_chain(28 * 28, *config.widths, NUM_CLASSES))

    def forward(self, pixels: Tensor) -> Tensor:
        return relu_chain(self.layers, self.normalize(pixels))


def linear_chain(*widths: int) -> list[nn.Linear]:
    """Linear layers from each width to the next, He-initialised for ReLU (arXiv:1502.01852), zero biases."""
    layers = [nn.Linear(fan_in, fan_out) for fan_in, fan_out in itertools.pairwise(widths)]
    for layer in layers:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return layers


def relu_chain(layers: nn.ModuleList, hidden: Tensor) -> Tensor:
    """Apply the layers with ReLU between them, none after the last."""
    for layer in layers[:-1]:
        hidden = layer(hidden).relu_()
    return layers[-1](hidden)
