"""What this machine is: the part of every record that says where its figures hold."""

import functools
import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

RECORDED_PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "openvino", "torchao")


@functools.cache
def _cpu_info() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; empty where there is no such file."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text().partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_model() -> str:
    """Name and stepping of the CPU, as precisely as the system tells."""
    info = _cpu_info()
    name = info.get("model name") or platform.processor() or platform.machine()
    numbers = [info[key] for key in ("cpu family", "model", "stepping") if key in info]
    return f"{name} ({'/'.join(numbers)})" if numbers else name


def cpu_flags() -> set[str]:
    """Instruction-set extensions in Linux' names; empty where the system does not list them."""
    return set(_cpu_info().get("flags", "").split())


def describe_machine() -> dict[str, str | int]:
    """CPU, cores, operating system and Python."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def package_versions() -> dict[str, str]:
    """Installed versions of the libraries that figures depend on."""
    installed = [name for name in RECORDED_PACKAGES if importlib.util.find_spec(name) is not None]
    return {name: importlib.metadata.version(name) for name in installed}
