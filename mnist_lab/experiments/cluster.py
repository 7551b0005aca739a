"""Workers on other machines, by Dask distributed: files travel as bytes, so that no disk is shared.

A worker gets a run's settings and the checkpoints that it is made from, makes and measures it in a temporary folder,
and gives its files back. What Dask sends can run code: its scheduler and workers belong in a network of one's own, or
behind TLS (docs/sweeps.md).
"""

import contextlib
import functools
import hashlib
import os
import queue
import re
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import ensure_parents, files_of
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.workers import (
    Done,
    Here,
    Job,
    Processes,
    Task,
    Workers,
    attempt,
    find_once,
    finish,
    make_or_load,
)
from mnist_lab.files import first_line, write_atomically
from mnist_lab.machine import package_versions
from mnist_lab.report.records import predictions_path

if TYPE_CHECKING:
    import distributed

CONNECT_S = 10
POLL_S = 1
AHEAD = 2  # jobs for each worker's thread, so that none waits for its next one
QUIET = {"distributed": "critical", "distributed.client": "critical"}  # what goes wrong is said in one line
Files = dict[str, bytes]  # by name
Answer = Files | UserError | RunFailed


class Cluster:
    """The workers of a Dask scheduler, as many as there are at the time."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._done: queue.SimpleQueue[distributed.Future[Answer]] = queue.SimpleQueue()
        self._working: dict[distributed.Future[Answer], Job] = {}
        self._is_missed = False

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            UserError: Dask is not installed here, or nobody answers there.
        """
        try:
            import dask

            dask.config.set({"logging": QUIET})
            import distributed
        except ImportError as error:
            raise UserError("--cluster needs Dask: pip install -r requirements-cluster.txt") from error
        if not re.fullmatch(r"[a-z]+://\S+", self.address):  # Dask would start workers here where there is none
            raise UserError(f"--cluster '{self.address}' must be an address, as tcp://host:8786")
        try:
            self._client = distributed.Client(self.address, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UserError(f"--cluster {self.address}: no scheduler answers: {first_line(error)}") from error
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):  # it may be gone
            self._client.cancel(list(self._working), asynchronous=False)
        self._working = {}
        with contextlib.suppress(Exception):
            self._client.close(timeout=POLL_S)

    @property
    def num_free(self) -> int:
        return AHEAD * max(1, self._num_threads()) - len(self._working)

    def _num_threads(self) -> int:
        return sum(self._client.nthreads().values())

    def start(self, job: Job) -> None:
        # Not a pure function: the same job once more, after its file was deleted, is done once more.
        future = self._client.submit(_do_there, pack(job), pure=False)
        self._working[future] = job
        future.add_done_callback(self._done.put)

    def wait(self) -> Done:
        while True:
            try:
                future = self._done.get(timeout=POLL_S)
                break
            except queue.Empty:
                self._check()
        job = self._working.pop(future)
        if future.status != "finished":
            return Done(job, self._why_failed(future))
        outcome = future.result()
        if isinstance(outcome, dict):
            unpack(job, outcome)
        return finish(job, outcome)

    def _check(self) -> None:
        if self._client.status != "running":
            raise self._is_gone()
        is_missed = not self._num_threads()
        if is_missed and not self._is_missed:
            print(f"--cluster {self.address}: no worker is there; waiting for one", flush=True)
        self._is_missed = is_missed

    def _why_failed(self, future: "distributed.Future[Answer]") -> RunFailed:
        """Where workers died of it: others need not.

        Raises:
            RunFailed: nothing would go better with the others.
        """
        import distributed

        if future.status != "error":
            raise self._is_gone()
        error = future.exception()
        if isinstance(error, distributed.KilledWorker):
            return RunFailed("several workers died while they made it; run again to go on")
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise RunFailed(f"--cluster {self.address}: {reason}. Are scheduler and workers started in the suite's folder?")

    def _is_gone(self) -> RunFailed:
        return RunFailed(f"--cluster {self.address}: the scheduler is gone; run again to go on")


def find_workers(num: int, cluster: str | None = None) -> Workers:
    """A scheduler's, where an address is given; else so many processes of this machine, or this one alone."""
    if cluster is not None:
        return Cluster(cluster)
    return Processes(num) if num > 1 else Here()


@dataclass(frozen=True)
class Parcel:
    """A task, with all that it needs on another machine."""

    task: Task
    checkpoints: Mapping[str, bytes]  # by path, as seen from the lab's checkpoints
    data: str  # the data set's fingerprint
    versions: Mapping[str, str]  # of the libraries, and of the suite

    def make(self, folder: Path) -> Files:
        """The files of the run, which is made in that folder.

        Raises:
            UserError: this machine has other versions or other data.
        """
        _check_versions(self.versions)
        lab = move(find_once(self.task.find), folder)
        if lab.dataset.fingerprint != self.data:
            raise UserError(f"its data set is another one: {lab.dataset.name} with other images or labels")
        for path, content in self.checkpoints.items():
            _write(lab.checkpoints / path, content)
        torch.set_num_threads(lab.train_threads or 1)
        run = Run(lab, self.task.row, self.task.seed)
        make_or_load(run, is_measured=self.task.is_measured)
        return {path.name: path.read_bytes() for path in _files_of(run) if path.exists()}


def pack(job: Job) -> Parcel:
    """What another machine needs to do a job whose parents in its own lab are there; makes those of other labs."""
    run = job.run
    ensure_parents(run)
    runs = [*_ancestors(run), *([] if run.why_stale() else [run])]  # what is made already needs measuring only
    files = {os.path.relpath(one.output, run.lab.checkpoints): one.output.read_bytes() for one in runs}
    return Parcel(job.task, files, run.lab.dataset.fingerprint, _versions())


def unpack(job: Job, files: Files) -> None:
    """Put the files of a run that was made elsewhere in their places, the record last.

    Raises:
        RunFailed: they are not what was asked for, and are gone again.
    """
    paths = [path for path in _files_of(job.run) if path.name in files]
    for path in paths:
        _write(path, files[path.name])
    try:
        reason = job.run.why_stale()
    except UserError as error:
        reason = str(error)
    if reason:
        for path in paths:
            path.unlink()
        raise RunFailed(f"{job.name}, as a worker made it, is not what was asked for: {reason}")


def move(lab: Lab, folder: Path) -> Lab:
    """The same lab with its files below a folder."""
    return replace(
        lab,
        checkpoints=folder / "checkpoints" / lab.checkpoints.parent.name / lab.checkpoints.name,
        results=folder / "results" / lab.results.parent.name / lab.results.name,
        _other_labs={},
    )


def _files_of(run: Run) -> list[Path]:
    return [*files_of(run), predictions_path(run.lab.results, run.name), run.record]


def _ancestors(run: Run) -> Iterator[Run]:
    for parent in run.parents.values():
        yield from _ancestors(parent)
        yield parent


def _write(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


@functools.cache
def _versions() -> dict[str, str]:
    """Of the libraries that figures depend on, and of the suite itself."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return package_versions() | {"the suite itself": digest.hexdigest()[:12]}


def _check_versions(expected: Mapping[str, str]) -> None:
    own = _versions()
    differing = [name for name in sorted({**own, **expected}) if own.get(name) != expected.get(name)]
    if differing:
        listed = "; ".join(f"{name} {own.get(name, 'missing')}, not {expected.get(name, 'none')}" for name in differing)
        raise UserError(f"it has other versions than the machine that asks: {listed}")


_ALONE = threading.Lock()  # torch's random numbers are a process's, whatever threads Dask gives it


def _do_there(parcel: Parcel) -> Answer:
    """What a worker does, in a folder of its own that goes with it."""
    import distributed

    worker = distributed.get_worker()
    with _ALONE, tempfile.TemporaryDirectory(dir=worker.local_directory) as folder:
        outcome = attempt(functools.partial(parcel.make, Path(folder)))
    return UserError(f"worker {worker.address}: {outcome}") if isinstance(outcome, UserError) else outcome
