"""Jobs in processes of their own end with the run that started them, and say in one line why they failed."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from mnist_lab.errors import RunFailed, UserError
from mnist_lab.studies.claims.side_by_side import run_side_by_side

pytestmark = pytest.mark.slow

PARENT = """
import sys; from pathlib import Path; from functools import partial
from test_side_by_side import sleep; from mnist_lab.studies.claims.side_by_side import run_side_by_side
if __name__ == "__main__":
    run_side_by_side({n: partial(sleep, Path(sys.argv[1]) / n) for n in "ab"}, num_workers=2)
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


def test_every_job_is_done_in_a_process_of_its_own(tmp_path: Path) -> None:
    run_side_by_side({name: partial(write, tmp_path / name) for name in "abc"}, num_workers=2)
    assert len({(tmp_path / name).read_text() for name in "abc"} - {str(os.getpid())}) == 3


def test_error_of_a_job_reaches_the_parent_and_ends_the_others(tmp_path: Path) -> None:
    for error in (UserError("no such data"), RunFailed("the loss is nan")):
        jobs = {"a": partial(sleep, tmp_path / "a"), "b": partial(fail, error)}
        with pytest.raises(type(error), match=str(error)):
            run_side_by_side(jobs, num_workers=2)
        assert not (tmp_path / "a").exists() or not lives(tmp_path / "a")


def test_job_that_is_killed_is_one_line() -> None:
    with pytest.raises(RunFailed, match="seed 3: its process was killed by signal 9"):
        run_side_by_side({"seed 3": kill_itself}, num_workers=1)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_job_outlives_its_parent(tmp_path: Path, number: signal.Signals) -> None:
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
