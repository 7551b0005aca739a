"""Scripts that are killed or interrupted at random moments lose nothing, break nothing, leave nothing behind."""

import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from faults.scripts import QUICK, Started, environment, fork, fork_script, preload, start_script
from mnist_lab.deploy.artifacts import read_artifact
from mnist_lab.errors import UserError
from mnist_lab.files import TEMPORARY
from mnist_lab.folders import LOCK, SCRATCH, only_run_in, own_temporary_folder
from mnist_lab.models.checkpoints import read_tensors
from mnist_lab.report.records import load_predictions, load_record

KILLS = int(os.environ.get("FAULT_KILLS", "4"))
MANY = 50
SEED = int(os.environ.get("FAULT_SEED", "0"))
NAME = "digits-compact-quick"
ENDS = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
SAYS = {signal.SIGINT: "interrupted; finished", signal.SIGTERM: "terminated; finished"}
# Each with the seconds that it takes from its start to its end, and whether that is on all or some of the files.
SCRIPTS = {
    "run_all_experiments": ["--mode", "load", *QUICK],
    "ptq_mnist": ["--model", "moe", *QUICK],
    "claims_mnist": ["--seeds", "2", *QUICK],
    "visualize_results": [],
}
ENDED_AFTER_S: list[float] = []
# What differs between two runs that do the same.
TIMES = {"latency_ms", "latency_session", "time_by_job_us", "train_seconds"}


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        preload()
        yield Path(folder)


@pytest.fixture(scope="module")
def reference(scratch: Path) -> Path:
    """What the scripts come to when they are left alone; claims, which take a minute, for many kills only."""
    folder = scratch / "reference"
    folder.mkdir()
    for script in ["run_all_experiments", *(["claims_mnist"] if KILLS >= MANY else [])]:
        started = fork_script(script, SCRIPTS[script], folder, scratch / "log")
        assert started.wait(600) == 0, started.log.read_text()[-2000:]
    return folder


def test_kills_lose_nothing(reference: Path, scratch: Path) -> None:
    generator = random.Random(SEED)
    bytes_of = {path.relative_to(reference): path.read_bytes() for path in files_of(reference)}
    folder = scratch / "run"
    temporary = scratch / "tmp"
    temporary.mkdir()
    failures = []
    for number in range(KILLS):
        script = generator.choice(list(SCRIPTS))
        prepare(folder, reference, generator.choice(["full", "partial", "empty", "as it is"]), script, generator)
        signal_number = generator.choice(list(ENDS))
        start = start_script if generator.random() < 0.1 else fork_script
        before = {path: path.read_bytes() for path in files_of(folder)}
        what = f"{number}: {script} {signal_number.name} {start.__name__}"
        try:
            with environment(TMPDIR=str(temporary), TORCHINDUCTOR_CACHE_DIR=str(scratch / "inductor")):
                started = start(script, SCRIPTS[script], folder, scratch / "log")
                try:
                    end(started, signal_number, generator.uniform(0, 12), what)
                finally:
                    started.end()
            check_files(folder, before, bytes_of, what)
            check_leftovers(folder, temporary, what)
        except (AssertionError, UserError) as error:  # go on, from other files: hours may be ahead
            failures.append(str(error))
            print(error, flush=True)
            shutil.rmtree(folder)
        if (number + 1) % 50 == 0:
            print(f"{number + 1} kills", flush=True)
    took_s = sorted(ENDED_AFTER_S) or [0.0]
    print(f"{KILLS} kills; ended after {took_s[len(took_s) // 2]:.2f} s (median), {took_s[-1]:.2f} s at most")
    assert not failures


def prepare(folder: Path, reference: Path, state: str, script: str, generator: random.Random) -> None:
    is_after = script in {"ptq_mnist", "visualize_results"}  # something is to be there for them
    if state == "as it is" and folder.exists() and not is_after:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    if state == "empty" and not is_after:
        return
    shutil.copytree(reference, folder, dirs_exist_ok=True)
    if state == "partial":
        for path in files_of(folder):
            is_needed = "Sparse_MoE-" in path.name or path.parent.name == "runs"
            if generator.random() < 0.4 and not is_needed:
                path.unlink()


def end(started: Started, number: signal.Signals, after_s: float, what: str) -> None:
    """Send a signal after so many seconds, or find that the script has ended by then."""
    code = started.wait(after_s)
    if code is not None:
        assert code == 0, f"{what}: ended with {code}: {started.log.read_text()[-2000:]}"
        return
    os.kill(started.pid, number)
    start = time.monotonic()
    code = started.wait(20)
    took_s = time.monotonic() - start
    log = started.log.read_text(errors="replace")
    assert code in {ENDS[number], 0}, f"{what}: ended with {code}: {log[-2000:]}"
    assert took_s < 5, f"{what}: took {took_s:.1f} s"  # three where nothing else runs
    ENDED_AFTER_S.append(took_s)
    assert "Traceback" not in log, f"{what}: {log[-2000:]}"
    if number in SAYS and code != 0:
        assert log.count(SAYS[number]) == 1, f"{what}: {log[-500:]}"
    deadline = time.monotonic() + 10
    while started.living():
        assert time.monotonic() < deadline, f"{what}: processes are left"
        time.sleep(0.05)


def files_of(folder: Path) -> list[Path]:
    """Files that are meant to stay."""
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(TEMPORARY) and path.name != LOCK and ".fit" not in path.name
    ]


def check_files(folder: Path, before: dict[Path, bytes], reference: dict[Path, bytes], what: str) -> None:
    """All are whole and to the bit what they are without a kill; none that was there is gone."""
    for path in sorted(folder.rglob("*.fit*.safetensors")):
        if not path.name.startswith(TEMPORARY):
            read_tensors(path)
    found = files_of(folder)
    gone = {path.name for path in before} - {path.name for path in found}
    assert not {name for name in gone if not name.endswith(".png")}, f"{what}: lost {gone}"
    for path in found:
        content, expected = path.read_bytes(), reference.get(path.relative_to(folder))
        if path.suffix == ".safetensors":
            read_tensors(path)
        elif path.suffix == ".onnx":
            read_artifact(path)
        elif path.suffix == ".png":
            assert content.endswith(b"IEND\xaeB`\x82"), f"{what}: {path} is cut"
        elif path.parent.name == "runs" and path.suffix == ".json":
            record = load_record(path)
            load_predictions(path.parent.parent, record)
            if expected is not None:
                assert figures_of(path) == figures_of_bytes(expected, path), f"{what}: {path} has other figures"
        if path.suffix in {".safetensors", ".onnx", ".npz"} and expected is not None:
            assert content == expected, f"{what}: {path} has other bits"


def figures_of(path: Path) -> Any:
    return _without_times(asdict(load_record(path)))


def figures_of_bytes(content: bytes, path: Path) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(content)
        return figures_of(copy)


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(inner) for key, inner in value.items() if key not in {*TIMES, "threads"}}
    return [_without_times(inner) for inner in value] if isinstance(value, list) else value


def check_leftovers(folder: Path, temporary: Path, what: str) -> None:
    """After the next start there is nothing unfinished."""

    def start() -> None:
        tempfile.tempdir = None
        with own_temporary_folder():
            for kind in ("checkpoints", "results"):
                if (folder / kind / NAME).exists():
                    with only_run_in(folder / kind / NAME):
                        pass

    with environment(TMPDIR=str(temporary)):
        assert fork(start, temporary.parent / "log").wait(60) == 0, what
    left = [*folder.rglob(f"{TEMPORARY}*"), *temporary.glob(f"{SCRATCH}*")]
    assert not left, f"{what}: left {left}"
    assert not [path for path in temporary.iterdir() if not path.name.startswith("torchinductor")], what
