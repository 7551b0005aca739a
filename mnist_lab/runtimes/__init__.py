"""Where a model runs. Each runtime loads a file and runs batches of raw pixels on the CPU."""

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from mnist_lab.measure import Array

RuntimeName = Literal["pytorch", "torch-compile", "onnxruntime", "openvino", "torchao"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
Precision = Literal["FP32", "BF16", "INT8"]
# What each runtime loads: the checkpoint, the ONNX artifact, or the quantized PyTorch program.
EXTENSIONS: dict[RuntimeName, str] = {
    "pytorch": "safetensors",
    "torch-compile": "safetensors",
    "onnxruntime": "onnx",
    "openvino": "onnx",
    "torchao": "pt2",
}
# An MoE's products that stay in float in a file of any precision: the router decides routes, and the combination is a
# weighted sum of K rows.
ROUTER, COMBINE = "router", "combine"
FLOAT_PRODUCTS = (ROUTER, COMBINE)

COMPILING_TORCH = (2, 15)  # 2.11 can neither trace the MoE's grouped products nor lower torchao's programs


class Session(Protocol):
    """A loaded model. `prepare` stands outside the clock; `run` is what is timed."""

    runtime: str
    version: str

    def prepare(self, pixels: Array) -> Any:
        """The batch in the form that `run` takes, with everything done that the first call would do."""

    def run(self, batch: Any) -> Any:
        """One forward pass, in the runtime's own form of logits."""

    def predict(self, pixels: Array) -> Array:
        """Logits (B, C) as an array."""


def bind(session: Session, pixels: Array) -> Callable[[], Any]:
    """A forward pass of these images, prepared, as a call to be timed."""
    return functools.partial(session.run, session.prepare(pixels))


def why_missing(runtime: RuntimeName) -> str | None:
    """What a runtime lacks on this machine; None where it can run."""
    if runtime in {"openvino", "torchao"} and importlib.util.find_spec(runtime) is None:
        return f"{runtime} is not installed: pip install -r requirements-extra.txt"
    if runtime in {"torch-compile", "torchao"} and (needed := _needed_to_compile()):
        return f"{runtime} needs {needed}"
    return None


def _needed_to_compile() -> str | None:
    installed = importlib.metadata.version("torch")
    if tuple(map(int, installed.split(".")[:2])) < COMPILING_TORCH:
        return f"torch {'.'.join(map(str, COMPILING_TORCH))} or newer; installed is {installed}"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h (the python3-dev package of many systems)"
    if shutil.which(os.environ.get("CXX") or "g++") is None:
        return f"a C++ compiler, and {os.environ.get('CXX') or 'g++'} is not there"
    return None


def open_session(runtime: RuntimeName, file: Path, *, precision: Precision, threads: int) -> Session:
    """Load a model into the named runtime.

    Args:
        file: of the kind that `EXTENSIONS` gives.
        precision: that the model's products must run in.
        threads: of the runtime; those of PyTorch take torch's own setting, which is one for the process.

    Raises:
        UserError: the file is missing or broken.
        WrongPrecision: the runtime reports products in another precision.
    """
    if runtime == "pytorch":
        from mnist_lab.runtimes.pytorch import PyTorchSession

        return PyTorchSession(file)
    if runtime == "torch-compile":
        from mnist_lab.runtimes.pytorch import TorchCompileSession

        return TorchCompileSession(file)
    if runtime == "torchao":
        from mnist_lab.runtimes.torchao import TorchAOSession

        return TorchAOSession(file)
    if runtime == "openvino":
        from mnist_lab.runtimes.openvino import OpenVINOSession

        return OpenVINOSession(file, precision=precision, threads=threads)
    from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(file, threads=threads)
