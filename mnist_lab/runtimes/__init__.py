"""Where a model runs. Each runtime loads a file and runs batches of raw pixels on the CPU."""

import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from mnist_lab.files import first_line
from mnist_lab.measure import Array

RuntimeName = Literal["pytorch", "torch-compile", "torch-sparse", "onnxruntime", "openvino", "torchao"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
Precision = Literal["FP32", "BF16", "INT8", "INT4", "INT3", "INT2", "ternary", "INT1", "mixed"]
# What each runtime loads: the checkpoint, the ONNX artifact, or the integers and scales for PyTorch.
EXTENSIONS: dict[RuntimeName, str] = {
    "pytorch": "safetensors",
    "torch-compile": "safetensors",
    "torch-sparse": "safetensors",
    "onnxruntime": "onnx",
    "openvino": "onnx",
    "torchao": "safetensors",
}
# An MoE's products that stay in float in a file of any precision: the router decides routes, and the combinations are
# weighted sums of a row an expert.
ROUTER, COMBINE, COMBINE_BIASES = "router", "combine", "combine_biases"
FLOAT_PRODUCTS = (ROUTER, COMBINE, COMBINE_BIASES)
VENDOR, FUSED = "com.microsoft", "QMoE"  # ONNX Runtime's own operator for all that lies between router and head

COMPILING_TORCH = (2, 15)  # 2.11 can neither trace the MoE's grouped products nor lower torchao's models
# What torch.compile asks of a compiler, in short. On macOS it looks for OpenMP itself, in several places.
PROGRAM = """
#ifdef _OPENMP
#include <omp.h>
#endif
int main() { return 0; }
"""
COMPILER = "clang++" if sys.platform == "darwin" else "g++"
COMPILER_OPTIONS = ("-std=c++20", "-shared", "-fPIC", *(() if sys.platform == "darwin" else ("-fopenmp",)))


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
    if runtime == "torch-sparse" and not _has_mkl():
        return "torch-sparse needs a PyTorch with MKL, whose products of sparse matrices it takes"
    if runtime in {"torch-compile", "torchao"} and (needed := _needed_to_compile()):
        return f"{runtime} needs {needed}"
    return None


def _has_mkl() -> bool:
    import torch

    return torch.backends.mkl.is_available()


def _needed_to_compile() -> str | None:
    import torch

    installed = torch.__version__
    if tuple(map(int, installed.split(".")[:2])) < COMPILING_TORCH:
        return f"torch {'.'.join(map(str, COMPILING_TORCH))} or newer; installed is {installed}"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python.h (the python3-dev package of many systems)"
    return _why_no_compiler(os.environ.get("CXX", COMPILER))


@functools.cache
def _why_no_compiler(command: str) -> str | None:
    """What is wrong with a C++ compiler: a command, perhaps with arguments, as torch.compile takes it too."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        return f"a C++ compiler, and CXX is no command: {error}"
    if not words or shutil.which(words[0]) is None:
        return f"a C++ compiler, and {command or 'the empty CXX'} is not there"
    try:
        with tempfile.TemporaryDirectory() as folder:
            failure = _try_compiler(words, Path(folder))
    except OSError as error:
        return f"a folder for temporary files: {error.strerror or error}"
    return f"a C++ compiler that works, and {command} does not: {failure}" if failure else None


def _try_compiler(words: Sequence[str], folder: Path) -> str | None:
    """What a compiler says that makes no library of a small program, in a line; None where it does."""
    (folder / "program.cpp").write_text(PROGRAM)
    command = [*words, *COMPILER_OPTIONS, "program.cpp", "-o", "program.so"]
    try:
        done = subprocess.run(
            command, cwd=folder, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return first_line(error)
    if (folder / "program.so").is_file():
        return None
    return done.stderr.decode(errors="replace").strip().partition("\n")[0] or "it makes no library of a small program"


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
    if runtime == "torch-sparse":
        from mnist_lab.runtimes.torch_sparse import TorchSparseSession

        return TorchSparseSession(file)
    if runtime == "torchao":
        from mnist_lab.runtimes.torchao import TorchAOSession

        return TorchAOSession(file)
    if runtime == "openvino":
        from mnist_lab.runtimes.openvino import OpenVINOSession

        return OpenVINOSession(file, precision=precision, threads=threads)
    from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(file, threads=threads)
