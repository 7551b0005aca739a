"""Runs that workers of a Dask scheduler make: the same bits, each once, whoever is lost meanwhile."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_workers import FindTiny, jobs_of, wait_until
from tiny import CHAIN, OTHER, SMALL, TAUGHT

from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments import cluster
from mnist_lab.experiments.cluster import Cluster, pack, unpack
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import load_or_measure
from mnist_lab.experiments.workers import Here, make_side_by_side

pytest.importorskip("distributed", reason="needs requirements-cluster.txt")
ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


@contextmanager
def process(folder: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session and a folder of its own, which ends with the context."""
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        found = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield found
    finally:
        kill(found)
        found.wait()


def kill(found: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(found.pid, signal.SIGKILL)


@contextmanager
def start_scheduler(folder: Path) -> Iterator[str]:
    """Its address."""
    file = folder / "scheduler.json"
    options = f"--host 127.0.0.1 --port 0 --no-dashboard --scheduler-file {file}"
    with process(folder / "scheduler", "distributed.cli.dask_scheduler", *options.split()):
        wait_until(partial(lambda: file.exists() and bool(file.read_text())))
        yield json.loads(file.read_text())["address"]


def start_worker(stack: ExitStack, folder: Path, address: str) -> subprocess.Popen[bytes]:
    options = "--nworkers 1 --nthreads 1 --no-dashboard --no-nanny"
    return stack.enter_context(process(folder, "distributed.cli.dask_worker", address, *options.split()))


def files_of(lab: Lab) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in lab.checkpoints.iterdir()}


@pytest.mark.slow
def test_every_run_is_there_once_with_the_bits_of_a_local_one_though_a_worker_is_killed(tmp_path: Path) -> None:
    here, away = FindTiny(tmp_path / "here")(), FindTiny(tmp_path / "away")()
    list(make_side_by_side(jobs_of(here, *CHAIN, seeds=range(3)), Here()))
    with ExitStack() as stack:
        address = stack.enter_context(start_scheduler(tmp_path))
        killed, _ = [start_worker(stack, tmp_path / name, address) for name in ("one", "two")]
        workers = stack.enter_context(Cluster(address))
        wait_until(partial(lambda: workers.num_free == 4))  # both have come
        outcomes = []
        for outcome in make_side_by_side(jobs_of(away, *CHAIN, seeds=range(3)), workers):
            outcomes.append(outcome)
            if len(outcomes) == 2:
                kill(killed)
    assert [outcome.error for outcome in outcomes] == [None] * 15
    assert len({outcome.run.name for outcome in outcomes}) == 15
    assert files_of(away) == files_of(here)
    assert {path.name for path in (away.results / "runs").iterdir()} == {
        path.name for path in (here.results / "runs").iterdir()
    }
    assert not list((tmp_path / "two").rglob("*.safetensors"))  # what a worker made it does not keep


@pytest.mark.slow
def test_scheduler_that_goes_ends_the_run_in_one_line(tmp_path: Path) -> None:
    with ExitStack() as stack:
        scheduler = ExitStack()
        address = scheduler.enter_context(start_scheduler(tmp_path))
        workers = stack.enter_context(Cluster(address))
        workers.start(jobs_of(FindTiny(tmp_path / "away")(), SMALL)[0])  # there is no worker to do it
        scheduler.close()
        with pytest.raises(RunFailed, match="the scheduler is gone; run again to go on"):
            workers.wait()


@pytest.mark.slow
def test_no_scheduler_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_S", 1)
    for address in ("tcp://127.0.0.1:9", "nowhere://x", "x y", ""):
        with pytest.raises(UserError, match=r"--cluster .*(no scheduler answers|must be an address)"), Cluster(address):
            pass


def test_parcel_holds_all_that_another_machine_needs(tmp_path: Path) -> None:
    here = FindTiny(tmp_path / "here")()
    jobs = jobs_of(here, *CHAIN, seeds=range(1))
    list(make_side_by_side(jobs, Here()))
    (last,) = (job for job in jobs if job.run.row == TAUGHT)
    before = files_of(here)
    for path in (last.run.output, last.run.artifact, last.run.record):
        path.unlink()
    parcel = pack(last)
    assert set(parcel.checkpoints) == {"Small-seed0.safetensors", "Halved-seed0.safetensors"}
    made = parcel.make(tmp_path / "there")
    assert files_of(here) != before
    unpack(last, made)
    assert files_of(here) == before
    assert load_or_measure(last.run).run_name == last.run.name
    with pytest.raises(RunFailed, match="not what was asked for.*belongs to model Other"):
        unpack(last, made | {"Taught-seed0.safetensors": before["Other-seed0.safetensors"]})
    assert not last.run.output.exists()


@pytest.mark.parametrize(("field", "value", "says"), [
    ("versions", {"torch": "1.0"}, r"torch [\d.+a-z]+, not 1.0"),
    ("data", "0", "its data set is another one: digits"),
])  # fmt: skip
def test_machine_with_other_versions_or_data_is_refused(tmp_path: Path, field: str, value: Any, says: str) -> None:
    parcel = pack(jobs_of(FindTiny(tmp_path / "here")(), SMALL)[0])
    with pytest.raises(UserError, match=says):
        replace(parcel, **{field: value}).make(tmp_path / "there")


def test_run_that_only_lacks_its_record_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (job,) = jobs_of(FindTiny(tmp_path / "here")(), OTHER, seeds=range(1))
    list(make_side_by_side([job], Here()))
    job.run.record.unlink()
    monkeypatch.setattr("mnist_lab.experiments.technique.fit", None)  # would fail if it were called
    unpack(job, pack(job).make(tmp_path / "there"))
    assert job.run.record.exists()
