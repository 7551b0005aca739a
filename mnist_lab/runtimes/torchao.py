"""INT8 for those who stay in PyTorch: a program quantized by torchao, compiled by Inductor."""

import importlib.metadata
import warnings
from pathlib import Path

import torch
import torch._inductor.config
from torch import Tensor
from torch._dynamo.utils import counters

from mnist_lab.compress.pt2e import load_program, num_quantized_layers
from mnist_lab.errors import WrongPrecision
from mnist_lab.measure import Array
from mnist_lab.runtimes.pytorch import compile_module

LOWERED = "qlinear_weight_prepack_matcher_count"  # Inductor's count of layers that it lowered to INT8 kernels


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
