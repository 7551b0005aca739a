"""ONNX Runtime on the CPU."""

from pathlib import Path
from typing import Any

import onnxruntime

from mnist_lab.errors import UserError
from mnist_lab.measure import Array


class OnnxRuntimeSession:
    """An ONNX artifact from raw pixels to logits.

    Raises:
        UserError: the file is missing, or is not an ONNX model.
    """

    runtime = "onnxruntime"
    version = onnxruntime.__version__

    def __init__(self, artifact: Path, *, threads: int) -> None:
        if not artifact.is_file():
            raise UserError(f"no artifact at {artifact}")
        try:
            self._session = onnxruntime.InferenceSession(artifact, session_options(threads), providers=PROVIDERS)
        except Exception as error:  # the library's errors share no public base class
            raise UserError(f"{artifact} is truncated or not an ONNX model ({error})") from error
        self._outputs = ["logits"]

    def prepare(self, pixels: Array) -> dict[str, Array]:
        return {"pixels": pixels}

    def run(self, batch: dict[str, Array]) -> Any:
        return self._session.run(self._outputs, batch)

    def predict(self, pixels: Array) -> Array:
        logits: Array = self.run(self.prepare(pixels))[0]
        return logits


PROVIDERS = ["CPUExecutionProvider"]


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options for `threads` threads that sleep, not spin, between calls, so as not to slow the next model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
