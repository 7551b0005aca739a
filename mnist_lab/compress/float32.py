"""FP32, the form that every other one is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
import torch

from mnist_lab.deploy.artifacts import read_onnx
from mnist_lab.deploy.onnx import write_onnx
from mnist_lab.errors import WrongPrecision
from mnist_lab.experiments.technique import Proof, Work
from mnist_lab.models import Model
from mnist_lab.models.checkpoints import load_checkpoint, save_checkpoint
from mnist_lab.runtimes import Precision, RuntimeName


@dataclass(frozen=True)
class Float32:
    """The weights as they were trained."""

    label: ClassVar[str] = ""
    precision: ClassVar[Precision] = "FP32"
    runtimes: ClassVar[tuple[RuntimeName, ...]] = ("pytorch", "torch-compile", "onnxruntime", "openvino")

    def write(self, model: Model, file: Path, work: Work, metadata: Mapping[str, Any]) -> None:
        write_float(model, file, metadata)

    def prove(self, model: Model, file: Path) -> Proof:
        return prove_float(file, self.precision)


def write_float(model: Model, file: Path, metadata: Mapping[str, Any]) -> None:
    """Write a checkpoint or an artifact, in the precision of the weights."""
    if file.suffix == ".safetensors":
        save_checkpoint(file, model, metadata)
    else:
        write_onnx(model, file, metadata)


def prove_float(file: Path, precision: Precision) -> Proof:
    """That every weight in a file is stored in this precision.

    Raises:
        WrongPrecision: one is not.
    """
    dtype, onnx_type = {
        "FP32": (torch.float32, onnx.TensorProto.FLOAT),
        "BF16": (torch.bfloat16, onnx.TensorProto.BFLOAT16),
    }[precision]
    if file.suffix == ".safetensors":
        weights = {name: parameter.dtype == dtype for name, parameter in load_checkpoint(file).model.named_parameters()}
    else:
        constants = read_onnx(file).graph.initializer
        weights = {c.name: c.data_type == onnx_type for c in constants if c.data_type != onnx.TensorProto.INT64}
    wrong = [name for name, is_right in weights.items() if not is_right]
    if wrong:
        raise WrongPrecision(f"{file.name} should be {precision}, but {', '.join(wrong)} are not")
    return {"text": f"{len(weights)} arrays in {precision}", "arrays": len(weights)}
