"""Several models as one, to learn from."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Ensemble(nn.Module):
    """Models of one task whose logits are averaged: `ensemble(pixels) -> logits`, float32 (B, C).

    Softened by any temperature T, that is the geometric mean of what the members say at T, normalised: one of the two
    means by which Hinton et al. (2015, arXiv:1503.02531) let an ensemble teach. The other, the arithmetic, is that of
    no logits that would do at every T.
    """

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.stack([member(pixels) for member in self.members]).mean(dim=0)
