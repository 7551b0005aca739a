"""What this machine is, and how much of it may be used."""

import importlib.metadata
import os
from pathlib import Path

import pytest

from mnist_lab import machine
from mnist_lab.machine import cpu_model, package_version, usable_cpus

ARM = "processor\t: 0\nCPU implementer\t: 0x41\nCPU variant\t: {}\nCPU part\t: {}\nCPU revision\t: {}\n\n"


def name_of(text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    machine._cpu_info.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: text)
        name = cpu_model()
    machine._cpu_info.cache_clear()
    return name


def test_two_arm_cpus_without_a_name_are_two_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    a76, a53 = (name_of(ARM.format(*numbers), monkeypatch) for numbers in (("0x4", "0xd0b", 1), ("0x0", "0xd03", 4)))
    assert a76 != a53
    assert a76 == name_of(ARM.format("0x4", "0xd0b", 1), monkeypatch)


def test_affinity_counts_not_the_cpus_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert usable_cpus() == 3


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "1000 100000"}, 1),
        ({"cpu.max": "nonsense"}, 8),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ({}, 8),
    ],
)
def test_quota_of_the_control_groups_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: int
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self: "0::/a/b\n" if str(self) == "/proc/self/cgroup" else read(self))
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cpus() == expected


def test_quota_of_the_first_version_of_control_groups_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cpu,cpuacct" / "job"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("250000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    read = Path.read_text
    groups = "4:cpu,cpuacct:/job\n3:cpuset:/\n"
    monkeypatch.setattr(Path, "read_text", lambda self: groups if str(self) == "/proc/self/cgroup" else read(self))
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert usable_cpus() == 3


def test_module_of_another_distribution_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in {"onnxruntime", "msgspec"}:
            raise importlib.metadata.PackageNotFoundError(name)
        return "9.9" if name == "onnxruntime-gpu" else real(name)

    package_version.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"onnxruntime": ["onnxruntime-gpu"]})
    assert package_version("onnxruntime") == "onnxruntime-gpu 9.9"
    import msgspec

    assert package_version("msgspec") == msgspec.__version__
    package_version.cache_clear()
