"""Files are whole or not there, say when they are damaged, and one run at a time writes a folder."""

import errno
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mnist_lab import files
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.files import (
    BLANK,
    check_seal,
    ensure_writable,
    only_run_in,
    own_temporary_folder,
    read_bytes,
    reading,
    seal,
    write_atomically,
    write_text,
)


def test_seal_notices_every_flipped_bit() -> None:
    content = seal(b"some text " + BLANK.encode() + b" and more")
    check_seal(content)
    for place in range(len(content)):
        for bit in range(8):
            with pytest.raises(ValueError, match="digest"):
                check_seal(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
    for end in range(len(content)):
        with pytest.raises(ValueError, match="digest"):
            check_seal(content[:end])


def test_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_usual_permissions(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "x.txt", "±")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.txt").stat().st_mode) == 0o666 & ~umask
    assert (tmp_path / "x.txt").read_bytes() == "±".encode()


def test_file_system_that_refuses_permissions_and_flushing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    for name in ("fsync", "chmod", "fchmod"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    write_text(tmp_path / "x.txt", "kept")
    assert (tmp_path / "x.txt").read_text() == "kept"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_flush_that_loses_data_fails_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_text(tmp_path / "x.txt", "old")

    def lose(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", lose)
    with pytest.raises(RunFailed, match=os.strerror(number)):
        write_text(tmp_path / "x.txt", "new")
    assert (tmp_path / "x.txt").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.txt"]


def test_folder_is_flushed_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[bool] = []
    flush = os.fsync

    def spy(descriptor: int) -> None:
        flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode) and (tmp_path / "x.txt").exists())
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    write_text(tmp_path / "x.txt", "")
    assert flushed == [False, True]


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


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_reading_what_is_no_file_ends_at_once(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    with pytest.raises(UserError, match="is not a file"):
        read_bytes(tmp_path / "x")


def test_reading_a_file_too_large_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(UserError, match="too many"):
        read_bytes(tmp_path / "x")


def test_errors_of_libraries_become_one_line_and_others_pass(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, reading(tmp_path / "x.json"):
        raise KeyError("first\nsecond")
    assert "\n" not in str(caught.value)
    assert "x.json is broken" in str(caught.value)
    for error in (UserError("own"), RunFailed("own"), MemoryError()):
        with pytest.raises(type(error)), reading(tmp_path / "x.json"):
            raise error


HOLD = "import sys, time; from pathlib import Path; from mnist_lab.files import only_run_in\n"
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
        assert {path.name for path in tmp_path.rglob("*")} == {files.LOCK, "runs", "kept.json"}
    assert {path.name for path in tmp_path.rglob("*")} == {"runs", "kept.json"}


def test_folder_in_which_nothing_was_made_is_not_left_behind(tmp_path: Path) -> None:
    with only_run_in(tmp_path / "a" / "b"), only_run_in(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / files.LOCK).exists()
    assert list(tmp_path.iterdir()) == []


SCRATCH = """
import os, tempfile, time, sys
from mnist_lab.files import own_temporary_folder
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


def test_checking_a_seal_costs_little() -> None:
    """Under 20 ms for a file of the largest usual model, by far: what a hash costs, and no copy."""
    content = seal(BLANK.encode() + bytes(5_000_000))
    start = time.process_time()
    check_seal(content)
    assert time.process_time() - start < 0.2  # a hundred times what it takes: only a blunder fails
