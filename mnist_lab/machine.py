"""What this machine is: the part of every record that says where its figures hold."""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

RECORDED_PACKAGES = ("torch", "torchvision", "numpy", "onnx", "onnxruntime", "openvino", "torchao")
VNNI = ("avx512_vnni", "avx_vnni")  # Linux' names of what adds products of bytes in 32 bits
CGROUPS = Path("/sys/fs/cgroup")


class Machine(TypedDict):
    """CPU, cores that may be used, operating system and Python's version."""

    cpu: str
    cores: int
    system: str
    python: str


@functools.cache
def _cpu_info() -> dict[str, str]:
    """The first processor's fields in /proc/cpuinfo; empty where there is no such file."""
    try:
        first, _, _ = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_model() -> str:
    """Name and stepping of the CPU, as precisely as the system tells; of an ARM one without a name its numbers."""
    info = _cpu_info()
    name = info.get("model name") or platform.processor() or platform.machine()
    of_x86, of_arm = ("cpu family", "model", "stepping"), tuple(f"CPU {k}" for k in ("implementer", "part", "variant"))
    numbers = [info[key] for key in (*of_x86, *of_arm, "CPU revision") if key in info]
    return f"{name} ({'/'.join(numbers)})" if numbers else name


def cpu_flags() -> set[str]:
    """Instruction-set extensions in Linux' names; empty where the system does not list them."""
    return set(_cpu_info().get("flags", "").split())


def usable_cpus() -> int:
    """CPUs that this process may use: those that its affinity admits, and no more than its control group's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *_quotas()]))


def _quotas() -> Iterator[int]:
    """Whole CPUs that each control group around this process allows, in version 2 and 1 of their files."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for _, controllers, group in groups:
        root = CGROUPS / controllers if controllers else CGROUPS
        own = root / group.lstrip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(root):
                break
            quota = _quota(folder)
            if quota is not None:
                yield quota


def _quota(folder: Path) -> int | None:
    """That of one control group, rounded up; None where it sets none."""
    try:
        if (folder / "cpu.max").exists():
            limit, period = (folder / "cpu.max").read_text().split()
        else:
            limit = (folder / "cpu.cfs_quota_us").read_text()
            period = (folder / "cpu.cfs_period_us").read_text()
        return -(-int(limit) // int(period)) if int(limit) > 0 else None
    except (OSError, ValueError):  # "max" is no number
        return None


def describe_machine() -> Machine:
    """This one."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cpus(),
        "system": platform.system(),
        "python": platform.python_version(),
    }


@functools.cache
def package_version(name: str) -> str:
    """Of the distribution that an importable module comes from, whatever it is called; "unknown" if it says none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
    for distribution in importlib.metadata.packages_distributions().get(name, []):
        try:
            return f"{distribution} {importlib.metadata.version(distribution)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return str(getattr(importlib.import_module(name), "__version__", "unknown"))


def package_versions() -> dict[str, str]:
    """Installed versions of the libraries that figures depend on."""
    installed = [name for name in RECORDED_PACKAGES if importlib.util.find_spec(name) is not None]
    return {name: package_version(name) for name in installed}
