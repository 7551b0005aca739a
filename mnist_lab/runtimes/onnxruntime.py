"""ONNX Runtime on the CPU."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnxruntime

from mnist_lab.deploy.artifacts import read_artifact
from mnist_lab.files import reading
from mnist_lab.machine import package_version
from mnist_lab.measure import Array


class BoundBatch(NamedTuple):
    """Input and output in place: a call neither looks them up, nor copies, nor allocates."""

    binding: onnxruntime.IOBinding
    logits: Array  # (B, C), overwritten by every run
    pixels: npt.NDArray[Any]  # kept alive for the binding


class OnnxRuntimeSession:
    """An ONNX artifact from raw pixels to logits.

    Raises:
        UserError: the file is missing, damaged, or not one of this suite's.
    """

    runtime = "onnxruntime"
    version = package_version("onnxruntime")

    def __init__(self, artifact: Path, *, threads: int) -> None:
        content = read_artifact(artifact)
        with reading(artifact):
            self._session = onnxruntime.InferenceSession(content, session_options(threads), providers=PROVIDERS)

    def prepare(self, pixels: Array) -> BoundBatch:
        return bind_batch(self._session, pixels)

    def run(self, batch: BoundBatch) -> Array:
        self._session.run_with_iobinding(batch.binding)
        return batch.logits

    def predict(self, pixels: Array) -> Array:
        return self.run(self.prepare(pixels))


PROVIDERS = ["CPUExecutionProvider"]


def bind_batch(session: onnxruntime.InferenceSession, pixels: npt.NDArray[Any]) -> BoundBatch:
    """What a session's one input takes, and room for its one output (B, C), bound to it."""
    pixels = np.ascontiguousarray(pixels)
    taken, given = session.get_inputs()[0], session.get_outputs()[0]
    logits = np.empty((len(pixels), given.shape[1]), np.float32)
    binding = session.io_binding()
    binding.bind_input(taken.name, "cpu", 0, pixels.dtype, pixels.shape, pixels.ctypes.data)
    binding.bind_output(given.name, "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
    return BoundBatch(binding, logits, pixels)


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Options for `threads` threads that sleep, not spin, between calls, so as not to slow the next model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options
