"""PyTorch: eager, and compiled by Inductor."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mnist_lab.measure import Array
from mnist_lab.models.checkpoints import load_checkpoint


class PyTorchSession:
    """The checkpoint's model in evaluation mode, in the precision of its weights."""

    runtime = "pytorch"
    version = str(torch.__version__)

    def __init__(self, checkpoint: Path) -> None:
        self.loaded = load_checkpoint(checkpoint).model
        self.model: Callable[[Tensor], Tensor] = self.loaded

    def prepare(self, pixels: Array) -> Tensor:
        return torch.from_numpy(pixels)

    def run(self, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            return self.model(batch)

    def predict(self, pixels: Array) -> Array:
        logits: Array = self.run(self.prepare(pixels)).float().numpy()
        return logits


class TorchCompileSession(PyTorchSession):
    """The same model through `torch.compile`, specialised to each batch size that it is prepared for."""

    runtime = "torch-compile"

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.model = compile_module(self.model)

    def prepare(self, pixels: Array) -> Tensor:
        batch = super().prepare(pixels)
        self.run(batch)
        return batch


def compile_module(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`module`, compiled anew for every batch size and for no model but this one."""
    # Models of one class share a cache, and beyond its limit calls would silently run eagerly.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    compiled: Callable[[Tensor], Tensor] = torch.compile(module, dynamic=False)
    return compiled
