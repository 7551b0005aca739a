"""INT8 for those who stay in PyTorch: a program quantized by torchao, compiled by Inductor."""

import importlib.metadata
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torchao.quantization.pt2e.quantize_pt2e  # noqa: F401  registers the operators that programs are made of
from torch import Tensor
from torch._dynamo.utils import counters
from torch.export import ExportedProgram

from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.measure import Array
from mnist_lab.runtimes.pytorch import compile_module

LOWERED = "qlinear_weight_prepack_matcher_count"  # Inductor's count of layers that it lowered to INT8 kernels
METADATA = "mnist_lab.json"  # the file in the program's archive that says where it belongs
CONVERTED_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default


class TorchAOSession:
    """A quantized program from raw pixels to logits.

    Raises:
        UserError: the file is missing, or is not such a program.
    """

    runtime = "torchao"
    version = importlib.metadata.version("torchao")

    def __init__(self, program: Path) -> None:
        loaded = load_program(program)
        self._num_layers = num_quantized_layers(loaded.graph)
        self._module = compile_module(loaded.module())

    def prepare(self, pixels: Array) -> Tensor:
        """Compile for this batch size.

        Raises:
            WrongPrecision: a layer was not lowered to an INT8 kernel.
        """
        batch = torch.from_numpy(pixels)
        before, compiled_before = counters["inductor"][LOWERED], counters["stats"]["unique_graphs"]
        # Freezing makes constants of the weights, prepacked for the kernels. The warnings are of torch about itself.
        with torch._inductor.config.patch(freezing=True), warnings.catch_warnings(action="ignore"):
            self.run(batch)
        lowered = counters["inductor"][LOWERED] - before
        if counters["stats"]["unique_graphs"] > compiled_before and lowered != self._num_layers:
            raise WrongPrecision(f"torch.compile lowered {lowered} of {self._num_layers} layers to INT8 kernels")
        return batch

    def run(self, batch: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self._module(batch)
        return logits

    def predict(self, pixels: Array) -> Array:
        logits: Array = self.run(self.prepare(pixels)).numpy()
        return logits


def load_program(path: Path) -> ExportedProgram:
    """The quantized program in a file.

    Raises:
        UserError: the file is missing, truncated, or something else.
    """
    return _load(path)[0]


def read_program_metadata(path: Path) -> dict[str, Any]:
    """What a program says of itself.

    Raises:
        UserError: as `load_program`.
    """
    return _load(path)[1]


def _load(path: Path) -> tuple[ExportedProgram, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"no program at {path}")
    extra = {METADATA: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        return program, json.loads(extra[METADATA])
    except Exception as error:  # zip, JSON and schema errors share no base class
        raise UserError(f"{path} is truncated or not a program of this suite. Move it away.") from error


def num_quantized_layers(graph: torch.fx.Graph) -> int:
    """Linear layers with integer weights."""
    return sum(node.target is CONVERTED_WEIGHT for node in graph.nodes)


def program_bytes(path: Path) -> int:
    """Bytes of all weights, scales and constants that a program stores."""
    return sum(tensor.nbytes for tensor in load_program(path).state_dict.values())
