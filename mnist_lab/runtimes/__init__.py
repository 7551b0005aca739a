"""Where a model runs. Each runtime loads an artifact and runs batches of raw pixels on the CPU."""

from pathlib import Path
from typing import Any, Protocol

from mnist_lab.measure import Array


class Session(Protocol):
    """A loaded model. `prepare` stands outside the clock; `run` is what is timed."""

    runtime: str
    version: str

    def prepare(self, pixels: Array) -> Any:
        """The batch in the form that `run` takes."""

    def run(self, batch: Any) -> Any:
        """One forward pass, in the runtime's own form of logits."""

    def predict(self, pixels: Array) -> Array:
        """Logits (B, C) as an array."""


def open_session(runtime: str, checkpoint: Path, artifact: Path, *, threads: int) -> Session:
    """Load a model into the named runtime.

    Args:
        checkpoint: the safetensors file, which PyTorch runs.
        artifact: the ONNX file, which the others run.
        threads: of the runtime; PyTorch takes torch's own setting, which is one for the process.
    """
    if runtime == "pytorch":
        from mnist_lab.runtimes.pytorch import PyTorchSession

        return PyTorchSession(checkpoint)
    from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(artifact, threads=threads)
