"""Files that are whole or not there, that say when they are damaged, and folders that one run at a time writes."""

import atexit
import contextlib
import errno
import getpass
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_lab.errors import FolderInUse, RunFailed, UserError

if TYPE_CHECKING:
    import filelock

TEMPORARY = ".tmp-"  # how the names of unfinished files begin
LOCK = ".lock"
SCRATCH = "mnist-lab-"  # how the names of folders for temporary files begin
BLANK = f"sha256:{'0' * 64}"  # where a file's own digest goes
DIGEST = re.compile(rb"sha256:([0-9a-f]{64})")
MAX_BYTES = 2**31  # of a file that is read whole; ONNX allows no more
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
        raise ValueError("it holds no digest of its content")
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
def reading(path: Path, advice: str = "Move it away and make it again.") -> Iterator[None]:
    """Whatever a library says of a file inside becomes one line: the file is broken.

    Raises:
        UserError: something was raised but a UserError, RunFailed or MemoryError, which pass.
    """
    try:
        yield
    except (UserError, RunFailed, MemoryError):
        raise
    except Exception as error:  # the libraries' errors share no base class
        raise UserError(f"{path} is broken: {first_line(error)}. {advice}") from error


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


def ensure_writable(folder: Path) -> None:
    """Find out before the work, not after it, whether `folder` can be made and written. Makes nothing.

    Raises:
        UserError: it cannot.
    """
    try:
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        temporary = existing / f"{TEMPORARY}{secrets.token_hex(8)}"
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


@contextlib.contextmanager
def only_run_in(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other runs out of a folder as long as this one writes there; what killed ones left unfinished goes.

    A folder that was made for it and in which nothing is in the end is not left behind.

    Raises:
        FolderInUse: another run is at work there, and this one is not to wait.
        UserError: the folder cannot be made or written.
    """
    import filelock

    ensure_writable(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / LOCK, is_singleton=True)  # which one process may take twice
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            holder = (folder / LOCK).read_text(errors="replace").strip() or "another run"
            if not wait:
                raise FolderInUse(f"{folder} is in use by {holder}. Wait for it to end, or pass --wait.") from None
            print(f"waiting for {holder} to end, which uses {folder}", flush=True)
            lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        with contextlib.suppress(OSError):
            (folder / LOCK).write_text(f"process {os.getpid()} ({Path(sys.argv[0]).name})\n")
        remove_leftovers(folder)
        yield
    finally:
        if lock.lock_counter == 1:
            (folder / LOCK).unlink(missing_ok=True)  # still held: who waits for it sees that it is gone
        lock.release()
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Delete what killed runs left unfinished in a folder and below."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def own_temporary_folder() -> Iterator[None]:
    """Keep temporary files, of libraries and children too, in a folder that goes with this process.

    What killed runs left of theirs goes now: each folder has a lock beside it, which the system frees with its owner.

    Raises:
        RunFailed: there is nowhere to write temporary files.
    """
    import filelock

    before, in_environment = tempfile.tempdir, os.environ.get("TMPDIR")
    try:
        root = Path(tempfile.gettempdir())
        for left in root.glob(f"{SCRATCH}*{LOCK}"):
            with contextlib.suppress(OSError, filelock.Timeout), filelock.FileLock(left, timeout=0):
                shutil.rmtree(left.with_suffix(""), ignore_errors=True)
                left.unlink()
        folder = root / f"{SCRATCH}{secrets.token_hex(8)}"
        lock = filelock.FileLock(folder.with_suffix(LOCK))
        lock.acquire(timeout=0)
        folder.mkdir()
        atexit.register(_remove_scratch, folder, lock)  # after libraries have removed what is theirs
    except OSError as error:
        raise RunFailed(f"cannot write temporary files: {error.strerror or error}") from error
    # What torch compiled stays for later runs.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root / f"torchinductor_{getpass.getuser()}"))
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        os.environ.pop("TMPDIR")
        if in_environment is not None:
            os.environ["TMPDIR"] = in_environment


def _remove_scratch(folder: Path, lock: "filelock.BaseFileLock") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(LOCK).unlink(missing_ok=True)
    lock.release()
