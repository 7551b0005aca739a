"""BF16: FP32 with 8 instead of 24 bits of mantissa. Nothing to calibrate, half the size."""

from typing import TypeVar

import torch

from mnist_lab.machine import cpu_flags
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import SparseMoE

BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
M = TypeVar("M", FFN, SparseMoE, FFN | SparseMoE)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies BF16 by itself, instead of emulating it."""
    return bool(cpu_flags() & BF16_FLAGS)


def round_weights(model: M) -> M:
    """Round the parameters of `model` to BF16, in place; its constants (mean and deviation) stay FP32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.normalize.dtype = torch.bfloat16
    return model
