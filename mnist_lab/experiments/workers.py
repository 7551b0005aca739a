"""Runs made several at once, parents first, by workers: this process, others of this machine, or other machines."""

import contextlib
import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple, Protocol, Self, TypeVar

import torch

from mnist_lab.errors import RunFailed, UserError, why_exhausted
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.latencies import torch_threads
from mnist_lab.experiments.make import cost_of, ensure_weights, find_finished, load_or_make, load_or_measure
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.run import Run
from mnist_lab.report.records import Record

T = TypeVar("T")
Finder = Callable[[], Lab]  # can be pickled; those that are equal find the same


@dataclass(frozen=True)
class Task:
    """A run, as another process makes it."""

    find: Finder
    row: Row
    seed: int
    is_measured: bool

    def __call__(self) -> None:
        lab = find_once(self.find)
        torch.set_num_threads(lab.train_threads or 1)
        make_or_load(Run(lab, self.row, self.seed), is_measured=self.is_measured)


@dataclass(frozen=True)
class Job:
    """A run to be made, and how another process finds its lab."""

    run: Run
    find: Finder
    is_measured: bool = True  # or only its weights are wanted, as a parent's

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def task(self) -> Task:
        return Task(self.find, self.run.row, self.run.seed, self.is_measured)


class Done(NamedTuple):
    """A job at its end: its files are in its lab's folders, or it failed."""

    job: Job
    error: RunFailed | None


class Workers(Protocol):
    """Who does jobs; at the end of the context nobody is at work."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    @property
    def num_free(self) -> int:
        """Jobs that may be started now."""

    def start(self, job: Job) -> None:
        """Begin one whose parents in its own lab are there."""

    def wait(self) -> Done:
        """One of those that were started, at its end.

        Raises:
            UserError, RunFailed: what would stop the others too.
        """


class Outcome(NamedTuple):
    """What became of a run that was asked for: its record, or why there is none."""

    run: Run
    record: Record | None
    error: RunFailed | None = None


def make_side_by_side(jobs: Sequence[Job], workers: Workers) -> Iterator[Outcome]:
    """Make and measure what is not up to date, several at once, and the parents that it lacks; a line for each.

    The outcomes come as they are there, first of those runs of which nothing is to be made. What needs a run that
    failed fails too.

    Raises:
        UserError, RunFailed: as `Workers.wait`.
    """
    assert len({job.run.output for job in jobs}) == len(jobs), "two rows of one name would overwrite each other"
    due: list[Job] = []
    for job in jobs:
        record = find_finished(job.run)
        if record is None:
            due.append(job)
        else:
            yield Outcome(job.run, record)
    yield from _make_due(_with_parents(due), workers)


def _with_parents(due: Sequence[Job]) -> dict[Path, Job]:
    """By their files, with the parents that are missing or stale; parents first."""
    asked, found = {job.run.output: job for job in due}, dict[Path, Job]()

    def add(job: Job) -> None:
        for parent in _parents(job.run):
            if parent.output in asked or parent.why_stale():
                add(asked.get(parent.output) or Job(parent, job.find, is_measured=False))
        found.setdefault(job.run.output, job)

    for job in due:
        add(job)
    return found


def _parents(run: Run) -> list[Run]:
    """Those of its own lab: the others are made with what needs them."""
    return [parent for parent in run.parents.values() if parent.lab == run.lab]


def _make_due(waiting: dict[Path, Job], workers: Workers) -> Iterator[Outcome]:
    parents = {output: {parent.output for parent in _parents(job.run)} for output, job in waiting.items()}
    needs = {output: outputs & waiting.keys() for output, outputs in parents.items()}
    progress, done, failed = _Progress(waiting.values()), set[Path](), set[Path]()
    num_working = 0
    while waiting or num_working:
        num_free = workers.num_free
        for output in [*waiting]:
            if needs[output] & failed:
                failed.add(output)
                yield from _outcome(waiting.pop(output), RunFailed("what it is made from failed"), progress)
            elif needs[output] <= done and num_free > 0:
                workers.start(waiting.pop(output))
                num_working, num_free = num_working + 1, num_free - 1
        if num_working:
            job, error = workers.wait()
            num_working -= 1
            (done if error is None else failed).add(job.run.output)
            yield from _outcome(job, error, progress)


def _outcome(job: Job, error: RunFailed | None, progress: "_Progress") -> Iterator[Outcome]:
    """Of a run that was asked for; its line, and also a parent's."""
    record = load_or_measure(job.run) if job.is_measured and error is None else None
    said = f"validation accuracy {record.validation_acc:.2%}" if record else str(error or "made, as others need it")
    progress.say(job, said if error is None else f"FAILED: {said}")
    if job.is_measured:
        yield Outcome(job.run, record, error)


class _Progress:
    """How many of how many are done, since when, and how long the others will take about."""

    def __init__(self, jobs: Iterable[Job]) -> None:
        self._costs = {job.run.output: cost_of(job.run) for job in jobs}
        self._all, self._num, self._start = sum(self._costs.values()), len(self._costs), time.perf_counter()

    def say(self, job: Job, what: str) -> None:
        del self._costs[job.run.output]
        left, elapsed = sum(self._costs.values()), time.perf_counter() - self._start
        left_s = elapsed * left / (self._all - left)
        number = self._num - len(self._costs)
        print(f"[{number}/{self._num}, {elapsed:.0f} s, about {left_s:.0f} s left] {job.name}: {what}", flush=True)


@functools.lru_cache(maxsize=1)  # data sets are large
def find_once(find: Finder) -> Lab:
    """The lab that `find` finds; when asked for the same again, what was found before."""
    return find()


def make_or_load(run: Run, *, is_measured: bool) -> None:
    """See that a run's files are there and up to date; its record too, where it is wanted."""
    if is_measured:
        load_or_make(run)
    else:
        ensure_weights(run)


def attempt(do: Callable[[], T]) -> T | UserError | RunFailed:
    """What it returns, or why not, where that is worth one line."""
    try:
        return do()
    except Exception as error:
        reason = why_exhausted(error)
        if reason is not None:
            return RunFailed(reason)
        if isinstance(error, UserError | RunFailed):
            return error
        raise


class Here:
    """One worker: this process."""

    def __init__(self) -> None:
        self._job: Job | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._job = None

    @property
    def num_free(self) -> int:
        return int(self._job is None)

    def start(self, job: Job) -> None:
        self._job = job

    def wait(self) -> Done:
        job, self._job = self._job, None
        assert job is not None
        with torch_threads(job.run.lab.train_threads or torch.get_num_threads()):
            return finish(job, attempt(partial(make_or_load, job.run, is_measured=job.is_measured)))


def finish(job: Job, outcome: object) -> Done:
    """A job's end, where its outcome is its alone.

    Raises:
        UserError: for another job it would be the same.
    """
    if isinstance(outcome, UserError):
        raise outcome
    return Done(job, outcome if isinstance(outcome, RunFailed) else None)


class Processes:
    """Processes of this machine, started when they are needed, none of which outlives this one."""

    def __init__(self, num: int) -> None:
        self._num = num
        self._idle: list[_Process] = []
        self._working: dict[Connection, tuple[Job, _Process]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        processes = [*self._idle, *(process for _, process in self._working.values())]
        for process in processes:
            process.process.kill()
        for process in processes:
            process.process.join()
        self._idle, self._working = [], {}

    @property
    def num_free(self) -> int:
        return self._num - len(self._working)

    def start(self, job: Job) -> None:
        process = self._idle.pop() if self._idle else _Process.start()
        self._working[process.connection] = job, process
        with contextlib.suppress(BrokenPipeError):  # it was killed: `wait` says so
            process.connection.send(job.task)

    def wait(self) -> Done:
        connection = next(found for found in wait([*self._working]) if isinstance(found, Connection))
        job, process = self._working.pop(connection)
        try:
            outcome = connection.recv()
        except (EOFError, ConnectionResetError):
            return Done(job, RunFailed(f"{process.how_it_ended()}; run again to go on"))
        self._idle.append(process)
        return finish(job, outcome)


class _Process(NamedTuple):
    process: BaseProcess
    connection: Connection

    @classmethod
    def start(cls) -> "_Process":
        context = multiprocessing.get_context("spawn")
        connection, its_own = context.Pipe()
        process = context.Process(target=_work, args=(its_own,))
        # Blocked in the child for good: of a Ctrl-C in the terminal its parent speaks, which hears it a moment later.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        its_own.close()
        return cls(process, connection)

    def how_it_ended(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        return f"its process was killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"


def _work(connection: Connection) -> None:
    """What a process does: one task after the other, until its parent ends it, or itself."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TERM"] = "dumb"  # no moving bars, of which several would overwrite each other
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(attempt(task))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
