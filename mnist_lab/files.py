"""Files that are whole or not there, and that say when they are damaged."""

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mnist_lab.errors import RunFailed, UserError, why_exhausted

TEMPORARY = ".tmp-"  # how the names of unfinished files begin
BLANK = f"sha256:{'0' * 64}"  # where a file's own digest goes
DIGEST = re.compile(rb"sha256:([0-9a-f]{64})")
MAX_BYTES = 2**31  # of a file that is read whole; ONNX allows no more
MAX_VALUES = 2**16  # that a file's windows may make of an image, as their weights do not bound them
# What fsync says where a file system has no such thing; whatever else it says means lost data.
NO_FSYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EBADF, errno.EROFS}


def as_json(value: Any) -> Any:
    """A value as a JSON file gives it back: tuples as lists."""
    return json.loads(json.dumps(value))


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file: how a derived file names its parent."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(content: bytes) -> bytes:
    """The same content with its own digest in the place of `BLANK`, which it holds once."""
    blank = BLANK.encode()
    assert content.count(blank) == 1
    return content.replace(blank, b"sha256:" + _digest(content, content.index(blank) + len(b"sha256:")))


def check_seal(content: bytes) -> None:
    """Raise ValueError where content is not what was sealed: each of its bits counts."""
    found = DIGEST.search(content)
    if found is None:
        raise ValueError("it holds no digest of its content, as files of other programs and of earlier versions do not")
    if _digest(content, found.start(1)) != found[1]:
        raise ValueError("its content is not what was written, by its own digest")


def _digest(content: bytes, start: int) -> bytes:
    """Of the content with zeros in the 64 places from `start` on."""
    view = memoryview(content)
    digest = hashlib.sha256(view[:start])
    digest.update(b"0" * 64)
    digest.update(view[start + 64 :])
    return digest.hexdigest().encode()


@contextlib.contextmanager
def reading(
    path: Path, advice: str = "Move it away and make it again.", *, verdict: str = "is broken"
) -> Iterator[None]:
    """Whatever a library says of a file inside becomes one line: the file is broken, or another verdict.

    Raises:
        UserError: something was raised but a UserError, a RunFailed, or that the system gave no more, which pass.
    """
    try:
        yield
    except (UserError, RunFailed):
        raise
    except Exception as error:  # the libraries' errors share no base class
        if why_exhausted(error):  # which says nothing of the file
            raise
        raise UserError(f"{path} {verdict}: {first_line(error)}. {advice}") from error


def first_line(error: BaseException) -> str:
    """What an error says, on one line and without its full stop."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].strip().rstrip(".")


def read_bytes(path: Path, missing: str = "no file at {}") -> bytes:
    """A whole file.

    Args:
        missing: what to say where it is not there.

    Raises:
        UserError: it is missing, no regular file (a folder, a pipe), larger than 2 GiB, or may not be read.
        RunFailed: the system cannot.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for whoever writes to it
            raise UserError(f"{path} is not a file. Move it away.")
        if found.st_size > MAX_BYTES:
            raise UserError(f"{path} is broken: {found.st_size:,} bytes are too many. Move it away.")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(missing.format(path)) from error
    except OSError as error:
        kind = UserError if isinstance(error, PermissionError | NotADirectoryError) else RunFailed
        raise kind(f"cannot read {path}: {error.strerror or error}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, then rename it.

    The temporary file keeps the suffix of `path`, by which some writers choose their format.

    Raises:
        RunFailed: the folder or the file cannot be written; what was there before stays.
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less the umask
        write(temporary)
        with temporary.open("rb+") as file:
            _flush(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        raise RunFailed(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        RunFailed: as `write_atomically`.
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def _flush(descriptor: int) -> None:
    """Out of the system's memory onto the disk, where the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise


def _flush_folder(folder: Path) -> None:
    """So that a rename in it outlives a power cut; only some systems open folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        _flush(descriptor)
    finally:
        os.close(descriptor)
