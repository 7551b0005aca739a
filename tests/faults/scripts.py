"""Scripts in processes that are forked from one which has imported all that they need, so that most of their time is
work; some are started afresh, so that imports are hit too.
"""

import atexit
import contextlib
import io
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIGITS = ("--dataset", "digits")
QUICK = (*DIGITS, "--recipe", "quick", "--epochs", "2", "--batch-size", "512")
LOAD = ["--mode", "load", *QUICK]


@dataclass
class Started:
    """A running script, leader of its own session."""

    pid: int
    log: Path

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, negative for a signal; None where it still runs."""
        end = time.monotonic() + timeout_s
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > end:
                return None
            time.sleep(0.01)

    def living(self) -> list[int]:
        """Processes of its session that still run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == self.pid and fields[0] != "Z":
                    found.append(int(folder.name))
        return found

    def end(self) -> None:
        """Leave nothing running."""
        for pid in self.living():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def fork_script(script: str, arguments: Sequence[str], folder: Path, log: Path) -> Started:
    """Run a script in a child of this process, in `folder`; its output goes to `log`."""
    return fork(lambda: _run(script, arguments, folder), log)


def start_script(script: str, arguments: Sequence[str], folder: Path, log: Path) -> Started:
    """The same in a fresh interpreter."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which the background ignores
        )
    return Started(process.pid, log)


def fork(run: Callable[[], None], log: Path) -> Started:
    """Run something in a child of this process; its output goes to `log`."""
    pid = os.fork()
    if pid == 0:
        try:
            atexit._clear()  # what its parent is to remove at the end
            os.setsid()
            descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            for name in ("stdout", "stderr"):
                setattr(sys, name, io.TextIOWrapper(io.FileIO(1 if name == "stdout" else 2, "w"), line_buffering=True))
            run()
            sys.exit()
        except SystemExit as error:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code if isinstance(error.code, int) else bool(error.code))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
        os._exit(1)
    return Started(pid, log)


def _run(script: str, arguments: Sequence[str], folder: Path) -> None:
    from mnist_lab.command.ending import handle_endings

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    handle_endings()
    os.chdir(folder)
    sys.argv = [f"{script}.py", *arguments]
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


def preload() -> None:
    """Import what the scripts do. Nothing computes here: a forked child has none of its parent's threads."""
    import mnist_lab.command.console
    import mnist_lab.experiments.rows
    import mnist_lab.report.figures
    import mnist_lab.studies.claims.run  # noqa: F401


@contextlib.contextmanager
def environment(**changes: str | None) -> Iterator[None]:
    """Other environment variables for a while; None for none."""
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
