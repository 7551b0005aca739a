"""Runs are made parents first by several workers; their processes end with the run that started them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tiny import CHAIN, HALVED, OTHER, ROUNDED, SMALL, TAUGHT, make_lab

from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.workers import Done, Here, Job, Processes, make_or_load, make_side_by_side

PARENT = """
import sys; from pathlib import Path; from functools import partial
from test_workers import do_all, sleep
if __name__ == "__main__":
    do_all({n: partial(sleep, Path(sys.argv[1]) / n) for n in "ab"}, num_workers=2)
"""


def write(path: Path) -> None:
    path.write_text(str(os.getpid()))


def sleep(path: Path) -> None:
    write(path)
    time.sleep(100)


def fail(error: Exception) -> None:
    raise error


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def do_all(tasks: Mapping[str, Callable[[], None]], *, num_workers: int) -> dict[str, RunFailed | None]:
    """Any tasks, and why those that did not succeed failed."""
    waiting = [cast("Job", SimpleNamespace(name=name, task=task)) for name, task in tasks.items()]
    errors: dict[str, RunFailed | None] = {}
    with Processes(num_workers) as workers:
        while len(errors) < len(tasks):
            while waiting and workers.num_free:
                workers.start(waiting.pop(0))
            job, error = workers.wait()
            errors[job.name] = error
    return errors


def lives(path: Path) -> bool:
    try:
        os.kill(int(path.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: "partial[bool]") -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_tasks_are_done_in_as_many_other_processes_as_there_are_workers(tmp_path: Path) -> None:
    assert do_all({name: partial(write, tmp_path / name) for name in "abcd"}, num_workers=2) == dict.fromkeys("abcd")
    processes = {(tmp_path / name).read_text() for name in "abcd"}
    assert len(processes) <= 2
    assert str(os.getpid()) not in processes


@pytest.mark.slow
def test_users_error_reaches_the_parent_and_ends_the_others(tmp_path: Path) -> None:
    tasks = {"a": partial(sleep, tmp_path / "a"), "b": partial(fail, UserError("no such data"))}
    with pytest.raises(UserError, match="no such data"):
        do_all(tasks, num_workers=2)
    assert not (tmp_path / "a").exists() or not lives(tmp_path / "a")


@pytest.mark.slow
def test_task_that_fails_or_is_killed_is_one_line_and_the_others_go_on(tmp_path: Path) -> None:
    tasks: dict[str, Callable[[], None]] = {
        "a": partial(fail, RunFailed("the loss is nan")),
        "b": kill_itself,
        "c": partial(fail, MemoryError()),
        "d": partial(write, tmp_path / "d"),
    }
    errors = do_all(tasks, num_workers=1)
    assert {name: str(error) for name, error in errors.items()} == {
        "a": "the loss is nan",
        "b": "its process was killed by signal 9; run again to go on",
        "c": "too little memory",
        "d": "None",
    }
    assert (tmp_path / "d").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    parent = subprocess.Popen(
        [sys.executable, script, tmp_path], env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.DEVNULL
    )
    wait_until(partial(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "ab")))
    parent.send_signal(number)
    parent.wait(20)
    wait_until(partial(lambda: not any(lives(tmp_path / name) for name in "ab")))


@dataclass(frozen=True)
class FindTiny:
    """Finds the tests' lab in another process."""

    folder: Path

    def __call__(self) -> Lab:
        return make_lab(self.folder, train_threads=1)


class Several:
    """Workers of this process that take up to three jobs at once, and do the last one first."""

    def __init__(self, failing: str = "") -> None:
        self.jobs: list[Job] = []
        self.started: list[str] = []
        self.failing = failing

    def __enter__(self) -> "Several":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def num_free(self) -> int:
        return 3 - len(self.jobs)

    def start(self, job: Job) -> None:
        assert not [parent for parent in job.run.parents.values() if parent.why_stale()]
        self.started.append(job.name)
        self.jobs.append(job)

    def wait(self) -> Done:
        job = self.jobs.pop()
        if job.run.row.family == self.failing:
            return Done(job, RunFailed("the loss is nan"))
        make_or_load(job.run, is_measured=job.is_measured)
        return Done(job, None)


def jobs_of(lab: Lab, *rows: Any, seeds: range = range(2)) -> list[Job]:
    return [Job(Run(lab, row, seed), FindTiny(lab.results.parent)) for seed in seeds for row in rows]


def test_parents_come_first_and_only_what_was_asked_for_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab, workers = make_lab(tmp_path), Several()
    outcomes = list(make_side_by_side(jobs_of(lab, ROUNDED, OTHER), workers))
    assert {outcome.run.name for outcome in outcomes} == {
        f"{row}-seed{k}" for row in ("Rounded", "Other") for k in (0, 1)
    }
    assert all(outcome.record and outcome.record.run_name == outcome.run.name for outcome in outcomes)
    assert sorted(workers.started) == sorted(f"{row.family}-seed{seed}" for row in CHAIN for seed in (0, 1))
    assert not Run(lab, TAUGHT, 0).record.exists()
    assert "[10/10, " in capsys.readouterr().out


def test_what_is_up_to_date_is_not_made_again_and_what_lacks_a_record_is_measured(tmp_path: Path) -> None:
    lab = make_lab(tmp_path)
    list(make_side_by_side(jobs_of(lab, SMALL, OTHER), Several()))
    Run(lab, OTHER, 1).record.unlink()
    bits = Run(lab, OTHER, 1).output.read_bytes()
    workers = Several()
    assert len([outcome.record for outcome in make_side_by_side(jobs_of(lab, SMALL, OTHER), workers)]) == 4
    assert workers.started == ["Other-seed1"]
    assert Run(lab, OTHER, 1).record.exists()
    assert Run(lab, OTHER, 1).output.read_bytes() == bits


def test_what_needs_a_run_that_failed_fails_too_and_the_others_go_on(tmp_path: Path) -> None:
    outcomes = make_side_by_side(
        jobs_of(make_lab(tmp_path), SMALL, HALVED, ROUNDED, OTHER, seeds=range(1)), Several("Halved")
    )
    assert {outcome.run.row.family: str(outcome.error) for outcome in outcomes} == {
        "Small": "None",
        "Other": "None",
        "Halved": "the loss is nan",
        "Rounded": "what it is made from failed",
    }


@pytest.mark.slow
def test_bits_do_not_hang_on_how_many_processes_there_are(tmp_path: Path) -> None:
    files = []
    for workers in (Here(), Processes(2)):
        lab = FindTiny(tmp_path / type(workers).__name__)()
        with workers:
            outcomes = list(make_side_by_side(jobs_of(lab, *CHAIN), workers))
        assert not [outcome.error for outcome in outcomes if outcome.error]
        assert {outcome.record.train_threads for outcome in outcomes if outcome.record and outcome.run.row.step} == {1}
        files.append({path.name: path.read_bytes() for path in lab.checkpoints.iterdir()})
    assert files[0] == files[1]
