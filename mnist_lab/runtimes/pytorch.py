"""PyTorch, eager."""

from pathlib import Path

import torch
from torch import Tensor

from mnist_lab.checkpoints import load_checkpoint
from mnist_lab.measure import Array


class PyTorchSession:
    """The checkpoint's model in evaluation mode."""

    runtime = "pytorch"
    version = str(torch.__version__)

    def __init__(self, checkpoint: Path) -> None:
        self.model = load_checkpoint(checkpoint).model

    def prepare(self, pixels: Array) -> Tensor:
        return torch.from_numpy(pixels)

    def run(self, batch: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = self.model(batch)
        return logits

    def predict(self, pixels: Array) -> Array:
        logits: Array = self.run(self.prepare(pixels)).numpy()
        return logits
