"""One run at a time writes a folder; what killed ones left in it, or of temporary files, goes."""

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mnist_lab import folders
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.files import write_text
from mnist_lab.folders import ensure_writable, only_run_in, own_temporary_folder


def test_folder_that_may_not_be_looked_into_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        ensure_writable(tmp_path / "folder")


def test_folder_that_cannot_be_made_is_found_out_before_the_work_and_during_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        ensure_writable(tmp_path / "file" / "folder")
    with pytest.raises(RunFailed, match="cannot write"):
        write_text(tmp_path / "file" / "folder" / "x.txt", "")


HOLD = "import sys, time; from pathlib import Path; from mnist_lab.folders import only_run_in\n"
HOLD += "with only_run_in(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


def hold(folder: Path) -> "subprocess.Popen[str]":
    """Another process that uses a folder until it is killed."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    return other


def test_folder_in_use_is_refused_with_the_name_of_who_holds_it(tmp_path: Path) -> None:
    other = hold(tmp_path / "x")
    try:
        with pytest.raises(UserError, match=rf"in use by process {other.pid} .*--wait"), only_run_in(tmp_path / "x"):
            pass
    finally:
        other.kill()
        other.wait()
    with only_run_in(tmp_path / "x"), only_run_in(tmp_path / "x"):  # a killed process holds nothing
        pass


def test_waiting_goes_on_when_the_other_run_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD.replace("60", "1"), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    other.stdout.readline()
    with only_run_in(tmp_path, wait=True):
        assert other.wait() == 0
    assert f"waiting for process {other.pid}" in capsys.readouterr().out


def test_what_killed_runs_left_in_a_folder_goes_at_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for name in (".tmp-0123.json", "runs/.tmp-0123.npz"):
        (tmp_path / name).write_text("half")
    (tmp_path / "runs" / "kept.json").write_text("{}")
    with only_run_in(tmp_path):
        assert {path.name for path in tmp_path.rglob("*")} == {folders.LOCK, "runs", "kept.json"}
    assert {path.name for path in tmp_path.rglob("*")} == {"runs", "kept.json"}


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_file_system_without_locks_is_said_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "tmp").mkdir()
    (tmp_path / ".tmp-0123.json").write_text("another run's, perhaps")
    with own_temporary_folder(), only_run_in(tmp_path), only_run_in(tmp_path):
        write_text(tmp_path / "x.txt", "")
    assert "nothing can be locked" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"x.txt", "tmp", ".tmp-0123.json"}


def test_folder_in_which_nothing_was_made_is_not_left_behind(tmp_path: Path) -> None:
    with only_run_in(tmp_path / "a" / "b"), only_run_in(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / folders.LOCK).exists()
    assert list(tmp_path.iterdir()) == []


SCRATCH = """
import os, tempfile, time, sys
from mnist_lab.folders import own_temporary_folder
with own_temporary_folder():
    open(tempfile.mkdtemp() + "/x", "w").close()
    assert os.environ["TMPDIR"] == tempfile.gettempdir() != sys.argv[1]
    print(len([name for name in os.listdir(sys.argv[1]) if not name.endswith(".lock")]), flush=True)
    time.sleep(float(sys.argv[2]))
assert os.environ["TMPDIR"] == sys.argv[1]
"""


def test_temporary_files_go_with_the_process_and_those_of_killed_ones_at_the_next_start(tmp_path: Path) -> None:
    variables = os.environ | {"TMPDIR": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": "kept"}

    def start(seconds: int) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", SCRATCH, str(tmp_path), str(seconds)]
        return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)

    killed = start(100)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "1\n"
    beside = start(0)
    assert beside.communicate()[0] == "2\n"  # a living process keeps its own
    assert beside.returncode == 0
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 2
    assert start(0).communicate()[0] == "1\n"
    assert list(tmp_path.iterdir()) == []


def test_nowhere_to_write_temporary_files_fails_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    with pytest.raises(RunFailed, match="No usable temporary directory"), own_temporary_folder():
        pass
