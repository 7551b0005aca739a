"""Too little memory, disk, files; folders that go or may not be written while a script runs: one line, exit 1."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.scripts import LOAD, QUICK, ROOT, fork_script, preload
from faults.test_damage import IS_LONG
from faults.test_kills import files_of

NAME = "digits-compact-quick"
TRAIN = ["--mode", "train", *QUICK]


def run_limited(
    limit: Callable[[], None], script: str, arguments: list[str], folder: Path, **changes: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *arguments],
        cwd=folder,
        preexec_fn=limit,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        env=os.environ | changes,
    )


def expect_failure(done: subprocess.CompletedProcess[str], *says: str) -> None:
    """Exit code 1 (or a user's 2), no traceback, and the cause in the last line."""
    assert done.returncode in {1, 2}, done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("failed: ", "error: ")), done.stderr[-2000:]
    assert any(text.lower() in last.lower() for text in says), last


@pytest.mark.parametrize("gib", [0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6] if IS_LONG else [2])
def test_too_little_memory(folder: Path, gib: float) -> None:
    before = {path: path.read_bytes() for path in files_of(folder / "checkpoints")}
    size = int(gib * 2**30)
    done = run_limited(lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)), "baseline_mnist", [*QUICK], folder)
    if done.returncode:
        expect_failure(done, "memory", "threads")
    assert {path: path.read_bytes() for path in files_of(folder / "checkpoints")} == before


@pytest.mark.parametrize("num", [16, 24, 32, 48, 64] if IS_LONG else [32])
def test_too_many_open_files(folder: Path, num: int) -> None:
    done = run_limited(
        lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (num, num)), "run_all_experiments", LOAD, folder
    )
    if done.returncode:
        expect_failure(done, "too many open files")


@pytest.mark.parametrize("kib", [1, 100, 1000, 2000] if IS_LONG else [1000])
def test_limit_of_file_sizes(folder: Path, kib: int) -> None:
    before = {path: path.read_bytes() for path in files_of(folder)}
    size = kib * 1024
    done = run_limited(
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)), "run_all_experiments", TRAIN, folder
    )
    expect_failure(done, "file too large")
    after = {path: path.read_bytes() for path in files_of(folder)}
    assert after.keys() >= before.keys()
    assert not list(folder.rglob(".tmp-*"))


def test_full_temporary_folder(folder: Path) -> None:
    mount = folder / "full"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        for script, arguments in (("run_all_experiments", TRAIN), ("ptq_mnist", [*QUICK, "--runtime", "onnxruntime"])):
            done = run_limited(lambda: None, script, arguments, folder, TMPDIR=str(mount))
            if done.returncode:
                expect_failure(done, "No space left")
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.parametrize("size", ["64k", "3m", "12m"] if IS_LONG else ["3m"])
@pytest.mark.parametrize("option", ["--checkpoints", "--results"])
def test_full_disk(folder: Path, size: str, option: str) -> None:
    mount = folder / "full"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        done = run_limited(lambda: None, "run_all_experiments", [*TRAIN, option, str(mount / "x")], folder)
        if done.returncode or option == "--checkpoints":
            expect_failure(done, "No space left")
        assert not list(mount.rglob(".tmp-*"))
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.parametrize("kind", ["checkpoints", "results"])
@pytest.mark.parametrize("change", ["removed", "read-only", "a file"])
def test_folder_that_changes_while_a_script_runs(finished: Path, tmp_path: Path, kind: str, change: str) -> None:
    if change == "read-only" and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    preload()
    started = fork_script("run_all_experiments", TRAIN, tmp_path, tmp_path / "log")
    victim = tmp_path / kind / NAME
    try:
        while not list(victim.rglob("FFN_baseline*")) and started.wait(0.05) is None:
            pass
        if change == "read-only":
            victim.chmod(0o500)
        else:
            victim.rename(tmp_path / "elsewhere")
            if change == "a file":
                victim.write_text("")
        code = started.wait(200)
    finally:
        started.end()
    log = started.log.read_text(errors="replace")
    assert "Traceback" not in log, log[-3000:]
    assert code in {0, 1, 2}, log[-2000:]
    if code:
        assert log.strip().splitlines()[-1].startswith(("failed: ", "error: ")), log[-1000:]
        assert str(kind) in log.strip().splitlines()[-1]


def test_second_run_in_the_same_folder_ends_with_the_name_of_the_first_or_waits(folder: Path) -> None:
    preload()
    first = fork_script("run_all_experiments", TRAIN, folder, folder / "log")
    try:
        while "training images" not in first.log.read_text(errors="replace"):
            assert first.wait(0.05) is None
        done = run_limited(lambda: None, "baseline_mnist", [*QUICK], folder)
        assert done.returncode == 2
        assert f"in use by process {first.pid} (run_all_experiments.py)" in done.stderr
        waiting = fork_script("baseline_mnist", [*QUICK, "--wait"], folder, folder / "log2")
        try:
            time.sleep(1)
            os.kill(first.pid, signal.SIGKILL)
            assert waiting.wait(120) == 0, waiting.log.read_text()
            assert f"waiting for process {first.pid}" in waiting.log.read_text()
        finally:
            waiting.end()
    finally:
        first.end()
        first.wait(5)
