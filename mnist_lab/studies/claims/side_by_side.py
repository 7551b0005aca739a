"""Jobs in processes of their own, a few at a time, none of which outlives the run that started it."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from mnist_lab.errors import RunFailed, UserError, why_exhausted

Job = Callable[[], None]  # can be pickled


def run_side_by_side(jobs: Mapping[str, Job], *, num_workers: int) -> None:
    """Do all jobs, each in a fresh process, at most that many at a time.

    Raises:
        UserError, RunFailed: as the first job that does; or its process was killed. Those at work end at once.
    """
    waiting, working = dict(jobs), dict[int, tuple[str, BaseProcess, Connection]]()
    try:
        while waiting or working:
            while waiting and len(working) < num_workers:
                name = next(iter(waiting))
                process, outcome = _start(waiting.pop(name))
                working[process.sentinel] = name, process, outcome
            for sentinel in wait([*working]):
                assert isinstance(sentinel, int)
                _finish(*working.pop(sentinel))
    finally:
        for _, process, _ in working.values():
            process.kill()
        for _, process, _ in working.values():
            process.join()


def _start(job: Job) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    outcome, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, sender))
    # Blocked in the child for good: of a Ctrl-C in the terminal its parent speaks, which hears it a moment later.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sender.close()
    return process, outcome


def _finish(name: str, process: BaseProcess, outcome: Connection) -> None:
    process.join()
    if process.exitcode == 0:
        return
    try:
        raise outcome.recv()
    except EOFError:
        code = process.exitcode or 0
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise RunFailed(f"{name}: its process was {how}; run again to go on") from None


def _work(job: Job, sender: Connection) -> None:
    """What the process does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TERM"] = "dumb"  # no moving bars, of which several would overwrite each other
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        job()
    except Exception as error:
        reason = why_exhausted(error)
        if reason is None and not isinstance(error, UserError | RunFailed):
            raise
        sender.send(error if reason is None else RunFailed(reason))
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
