import os
import socket
import stat
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mnist_lab import idx
from mnist_lab.errors import UserError
from mnist_lab.idx import INT32, UINT8, find_idx


def header(shape: Sequence[int], kind: int = 8) -> bytes:
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, kind, len(shape), *shape)


def write_idx(path: Path, array: np.ndarray) -> None:
    """The format of the MNIST files: type, dimensions, sizes, data; all big-endian."""
    kind = {1: 8, 4: 12}[array.dtype.itemsize]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header(array.shape, kind) + array.astype(array.dtype.newbyteorder(">")).tobytes())


def write_sparse_idx(path: Path, shape: Sequence[int], start: bytes = b"") -> None:
    """A file of unsigned bytes, zeros but for the first ones, that takes no place on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header(shape) + start)
    os.truncate(path, len(header(shape)) + int(np.prod(shape, dtype=np.int64)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def test_rows_are_read_as_they_were_written(path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    write_idx(path, images)
    file = find_idx(path, dtype=UINT8, row_shape=(3, 2))
    assert file.num_rows == 4
    np.testing.assert_array_equal(file.read(4), images)
    np.testing.assert_array_equal(file.read(2), images[:2])


def test_numbers_of_four_bytes_have_a_sign_and_start_with_the_highest(path: Path) -> None:
    numbers = np.array([[1, -2], [300, 70_000]], np.int32)
    write_idx(path, numbers)
    np.testing.assert_array_equal(find_idx(path, dtype=INT32, row_shape=(2,)).read(2), numbers)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello",
        b"\x1f\x8b\x08\x01" + bytes(20),  # gzip
        header((4,), kind=13) + bytes(16),  # floats
        header(()),
        header((1, 1, 1, 1)) + bytes(1),
        header((4, 3, 2))[:-1],
    ],
)
def test_another_format_is_said_to_be_one(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(UserError, match="file is broken: it is not an IDX file. Delete it"):
        find_idx(path, dtype=UINT8)


@pytest.mark.parametrize("num_bytes", [3, 5])
def test_length_must_be_that_of_the_header(path: Path, num_bytes: int) -> None:
    path.write_bytes(header((4,)) + bytes(num_bytes))
    with pytest.raises(UserError, match=f"it has {8 + num_bytes} bytes, its header promises 12"):
        find_idx(path, dtype=UINT8)


@pytest.mark.parametrize(
    "shape",
    [(60_000, 10_000, 10_000), (1_000_001, 3, 2), (0, 3, 2), (5, 2, 3), (5, 6), (5,)],
    ids="6_TB too_many none turned flat labels".split(),
)
def test_what_is_not_asked_for_is_refused_unread(
    path: Path, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sparse_idx(path, shape)
    monkeypatch.delattr(np, "fromfile")
    with pytest.raises(UserError, match=r"it holds [\dx]+ values of type uint8, not Nx3x2 .* from 1 to 1,000,000"):
        find_idx(path, dtype=UINT8, row_shape=(3, 2))


def test_type_is_compared_too(path: Path) -> None:
    write_idx(path, np.zeros(4, np.int32))
    with pytest.raises(UserError, match="4 values of type int32, not N of type uint8"):
        find_idx(path, dtype=UINT8)


def test_largest_file_is_found(path: Path) -> None:
    write_sparse_idx(path, (idx.MAX_ROWS,))
    assert find_idx(path, dtype=UINT8).num_rows == idx.MAX_ROWS


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket", "device"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    path = Path("file")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path = Path(os.devnull)
        assert stat.S_ISCHR(path.stat().st_mode)
    monkeypatch.delattr(Path, "open")
    with pytest.raises(UserError, match=f"{path} is a .*{kind}.*, not a file"):
        find_idx(path, dtype=UINT8)


@pytest.mark.parametrize("call", ["stat", "open"])
def test_file_that_may_not_be_read_is_one_line(path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(path, np.zeros(4, np.uint8))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, call, refuse)
    with pytest.raises(UserError, match="^.*file cannot be read: Permission denied$"):
        find_idx(path, dtype=UINT8)


@pytest.mark.parametrize("damage", ["shorten", "remove"])
def test_file_that_changes_after_it_was_found_is_one_line(path: Path, damage: str) -> None:
    write_idx(path, np.zeros(4, np.uint8))
    file = find_idx(path, dtype=UINT8)
    if damage == "shorten":
        os.truncate(path, 10)
    else:
        path.unlink()
    with pytest.raises(UserError, match="become shorter|cannot be read: No such file"):
        file.read(4)
