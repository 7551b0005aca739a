"""BF16: FP32 with 8 instead of 24 bits of mantissa. Nothing to calibrate, half the size."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from mnist_lab.compress.float32 import prove_float, write_float
from mnist_lab.experiments.technique import Proof, Work
from mnist_lab.machine import cpu_flags
from mnist_lab.models import Model
from mnist_lab.runtimes import Precision, RuntimeName

BF16_FLAGS = {"amx_bf16", "avx512_bf16"}


@dataclass(frozen=True)
class BFloat16:
    """Weights rounded to BF16, and products computed in it."""

    label: ClassVar[str] = ""
    precision: ClassVar[Precision] = "BF16"
    # ONNX Runtime has no BF16 products for x86.
    runtimes: ClassVar[tuple[RuntimeName, ...]] = ("pytorch", "torch-compile", "openvino")

    def write(self, model: Model, file: Path, work: Work, metadata: Mapping[str, Any]) -> None:
        write_float(round_weights(model), file, metadata)

    def prove(self, model: Model, file: Path) -> Proof:
        return prove_float(file, self.precision)


def has_bfloat16() -> bool:
    """Whether this CPU multiplies BF16 by itself, instead of emulating it."""
    return bool(cpu_flags() & BF16_FLAGS)


def round_weights(model: Model) -> Model:
    """A copy with the parameters rounded to BF16; its constants (mean and deviation) stay FP32."""
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return rounded
