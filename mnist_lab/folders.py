"""Folders that one run at a time writes, and from which what killed runs left goes."""

import atexit
import contextlib
import errno
import getpass
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_lab.errors import FolderInUse, RunFailed, UserError
from mnist_lab.files import TEMPORARY

if TYPE_CHECKING:
    import filelock

LOCK = ".lock"
NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
SCRATCH = "mnist-lab-"  # how the names of folders for temporary files begin


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
            is_locked = _acquire(lock)
            if not is_locked:
                print(f"{folder} lies where nothing can be locked: take care that no other run uses it", flush=True)
        except filelock.Timeout:
            holder = (folder / LOCK).read_text(errors="replace").strip() or "another run"
            if not wait:
                raise FolderInUse(f"{folder} is in use by {holder}. Wait for it to end, or pass --wait.") from None
            print(f"waiting for {holder} to end, which uses {folder}", flush=True)
            lock.acquire()
            is_locked = True
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        with contextlib.suppress(OSError):
            (folder / LOCK).write_text(f"process {os.getpid()} ({Path(sys.argv[0]).name})\n")
        if is_locked:  # or they may be another run's, which is at work
            remove_leftovers(folder)
        yield
    finally:
        if lock.lock_counter <= 1:
            (folder / LOCK).unlink(missing_ok=True)  # still held: who waits for it sees that it is gone
        lock.release()
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _acquire(lock: "filelock.BaseFileLock") -> bool:
    """Take a lock that nobody holds; False where the file system has none, as some of a network have not.

    Raises:
        filelock.Timeout: somebody holds it.
        OSError: its file cannot be written.
    """
    try:
        lock.acquire(timeout=0)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


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
        _acquire(lock)
        folder.mkdir()
        atexit.register(_remove_scratch, folder, lock)  # after libraries have removed what is theirs
    except OSError as error:
        raise RunFailed(f"cannot write temporary files: {error.strerror or error}") from error
    # What torch compiled stays for later runs.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root / f"torchinductor_{_user()}"))
    tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
        os.environ.pop("TMPDIR")
        if in_environment is not None:
            os.environ["TMPDIR"] = in_environment


def _user() -> str:
    """One who has no name, as in many a container, by number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _remove_scratch(folder: Path, lock: "filelock.BaseFileLock") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(LOCK).unlink(missing_ok=True)
    lock.release()
