"""Files are whole or not there, say when they are damaged, and one run at a time writes a folder."""

import errno
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mnist_lab.errors import RunFailed, UserError
from mnist_lab.files import BLANK, check_seal, read_bytes, reading, seal, write_atomically, write_text


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
    for error in (UserError("own"), RunFailed("own"), MemoryError(), RuntimeError("std::bad_alloc")):
        with pytest.raises(type(error)), reading(tmp_path / "x.json"):
            raise error


def test_checking_a_seal_costs_little() -> None:
    """Under 20 ms for a file of the largest usual model, by far: what a hash costs, and no copy."""
    content = seal(BLANK.encode() + bytes(5_000_000))
    start = time.process_time()
    check_seal(content)
    assert time.process_time() - start < 0.2  # a hundred times what it takes: only a blunder fails
