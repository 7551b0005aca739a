"""Where data sets lie on disk: found, checked, or fetched; of the images nothing is read yet. No torch here."""

import contextlib
import itertools
import shlex
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import filelock
import numpy as np
import numpy.typing as npt

from mnist_lab.errors import UserError
from mnist_lab.idx import INT32, MAX_ROWS, UINT8, IdxFile, find_idx

DatasetName = Literal["mnist", "fashion-mnist", "kmnist", "qmnist", "digits"]
DATASETS: tuple[DatasetName, ...] = get_args(DatasetName)
SPLIT_SEED = 20_240_501  # one split for every model and every seed
DOWNLOAD_DIR = Path("data")
DOWNLOAD_TIMEOUT_S = 20
NUM_CLASSES = 10  # of every data set here
IMAGE_SIZE = (28, 28)
# torchvision's classes, which are also the names of their folders.
TORCHVISION_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "qmnist": "QMNIST"}
SplitName = Literal["train", "test"]
# Images and labels of each split.
MNIST_FILES: dict[SplitName, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
QMNIST_FILES: dict[SplitName, tuple[str, str]] = {
    "train": ("qmnist-train-images-idx3-ubyte", "qmnist-train-labels-idx2-int"),
    "test": ("qmnist-test-images-idx3-ubyte", "qmnist-test-labels-idx2-int"),
}
QMNIST_LABEL_SIZE = (8,)  # numbers an image, the first of which is its class
QMNIST_TEST_IMAGES = 60_000  # in its file, the usual 10,000 first
MAX_TEST_IMAGES = 10_000
MIN_IMAGES = 20  # of a split: of fewer, one is more than five points of accuracy
HOW_TO_GET_DATA = (
    "To get {0}: connect to a network once (it is downloaded into ./data), "
    "or point --data-dir or MNIST_LAB_DATA at a folder that holds {0}/raw/."
)


class FoundSplit(NamedTuple):
    """A split on disk: its images, not read yet, and its labels, read and checked."""

    images: IdxFile
    labels: npt.NDArray[np.int64]

    def read(self) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Pixels (N, height, width) as bytes, and labels.

        Raises:
            UserError: the images cannot be read, or are no longer whole.
        """
        return self.images.read(len(self.labels)), self.labels


def find_splits(name: DatasetName, root: Path) -> tuple[FoundSplit, FoundSplit]:
    """The training and the test split.

    Raises:
        UserError: a file is missing or broken, or the files do not belong together.
    """
    train_files, test_files = _find_files(name, root, "train"), _find_files(name, root, "test")
    num_train, num_test = train_files[0].num_rows, test_files[0].num_rows
    if name == "qmnist" and num_test == QMNIST_TEST_IMAGES:
        num_test = MAX_TEST_IMAGES
    if num_test > MAX_TEST_IMAGES:
        raise UserError(
            f"{name} in {root} has {num_train:,} training and {num_test:,} test images, of which there are "
            f"{MAX_TEST_IMAGES:,} at most. Are its files exchanged? Rename them."
        )
    for (images, _), num_images in ((train_files, num_train), (test_files, num_test)):
        if not MIN_IMAGES <= num_images <= MAX_ROWS:
            raise UserError(
                f"{images.path} has {num_images:,} images, and must have {MIN_IMAGES} to {MAX_ROWS:,}. Fetch it again."
            )
    return _read_labels(train_files, num_train), _read_labels(test_files, num_test)


def _find_files(name: DatasetName, root: Path, split: SplitName) -> tuple[IdxFile, IdxFile]:
    """Images and labels of a split. Importing torchvision for it would take a second.

    Raises:
        UserError: a file is missing or broken, or there are not as many labels as images.
    """
    images_path, labels_path = (_raw(name, root) / file for file in _files(name)[split])
    for path in (images_path, labels_path):
        if not _is_there(path):
            raise UserError(f"there is no {name}: {path} does not exist. {advise(name, root)}")
    images = find_idx(images_path, dtype=UINT8, row_shape=IMAGE_SIZE)
    if name == "qmnist":
        labels = find_idx(labels_path, dtype=INT32, row_shape=QMNIST_LABEL_SIZE)
    else:
        labels = find_idx(labels_path, dtype=UINT8)
    if images.num_rows != labels.num_rows:
        raise UserError(
            f"{images_path} has {images.num_rows:,} images, {labels_path.name} beside it {labels.num_rows:,} labels. "
            "Delete both and fetch them again."
        )
    return images, labels


def _read_labels(files: tuple[IdxFile, IdxFile], num_images: int) -> FoundSplit:
    """The labels of the first images.

    Raises:
        UserError: one is no class, or all are the same.
    """
    images, file = files
    labels: npt.NDArray[np.int64] = file.read(num_images).reshape(num_images, -1)[:, 0].astype(np.int64)
    lowest, highest = labels.min(), labels.max()
    if lowest < 0 or highest >= NUM_CLASSES:
        wrong = lowest if lowest < 0 else highest
        raise UserError(
            f"{file.path} is broken or another set's: it has the label {wrong}, and the classes are 0 to "
            f"{NUM_CLASSES - 1}. Delete it and fetch it again."
        )
    if lowest == highest:
        raise UserError(f"{file.path} is broken: every label is {lowest}. Delete it and fetch it again.")
    return FoundSplit(images, labels)


def _raw(name: DatasetName, root: Path) -> Path:
    return root / TORCHVISION_CLASSES[name] / "raw"


def _files(name: DatasetName) -> dict[SplitName, tuple[str, str]]:
    return QMNIST_FILES if name == "qmnist" else MNIST_FILES


def _all_files(name: DatasetName) -> list[str]:
    return list(itertools.chain(*_files(name).values()))


def _is_there(path: Path) -> bool:
    """Whether there is something of that name.

    Raises:
        UserError: the folder may not be searched.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    return True


def advise(name: DatasetName, root: Path) -> str:
    """What to do where files are missing: by what lies there in another form or nearby, else by a network."""
    raw = _raw(name, root)
    for folder in (raw, raw.parent, root, root / "raw"):
        there = _names_in(folder)
        for file in _all_files(name):
            dotted = file.replace("-idx", ".idx")
            if file in there:
                if folder != raw:
                    return _advise_on_place(folder, raw)
            elif packed := there & {f"{file}.gz", f"{dotted}.gz"}:
                return f"{folder / min(packed)} is still packed. Unpack it: gunzip -k {shlex.quote(str(folder))}/*.gz"
            elif dotted in there:
                return f"{folder / dotted} has a dot for a dash: rename it to {file}, and the others likewise."
    return HOW_TO_GET_DATA.format(TORCHVISION_CLASSES[name])


def _advise_on_place(folder: Path, raw: Path) -> str:
    found = folder.absolute()
    if found.parts[-2:] == raw.parts[-2:]:
        return f"Such files lie in {folder}: name the folder {found.parents[1]} instead."
    return f"Such files lie in {folder}: move them to {raw}."


def _names_in(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError:
        return set()


def download(name: DatasetName) -> None:
    """Make sure that the files of `name` lie in ./data; leave nothing behind on failure.

    Raises:
        OSError: the files are not there and cannot be fetched; its text is the reason.
        UserError: the folder may not be searched.
    """
    if not _is_downloaded(name):
        with _only_download_of(name):
            if not _is_downloaded(name):  # by the process that this one waited for
                _fetch(name)


def _is_downloaded(name: DatasetName) -> bool:
    return all(_is_there(_raw(name, DOWNLOAD_DIR) / file) for file in _all_files(name))


@contextlib.contextmanager
def _only_download_of(name: DatasetName) -> Iterator[None]:
    """Make ./data and wait until no other process downloads `name` into it; remove it if it is empty in the end."""
    lock = filelock.FileLock(DOWNLOAD_DIR / f".{name}.lock")
    is_new = False
    try:
        while not lock.is_locked:
            is_new = not DOWNLOAD_DIR.exists()
            DOWNLOAD_DIR.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # one that failed has just removed the folder
                _acquire(lock, f"waiting for another process that downloads {name} into {DOWNLOAD_DIR}")
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                Path(lock.lock_file).unlink()  # those that wait for it notice, and make another
            lock.release()
        if is_new:
            with contextlib.suppress(OSError):
                DOWNLOAD_DIR.rmdir()


def _acquire(lock: filelock.BaseFileLock, notice: str) -> None:
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        print(notice, flush=True)
        lock.acquire()


def _fetch(name: DatasetName) -> None:
    """Download into a folder of this process's own; what is whole and was missing then moves to its place."""
    raw = _raw(name, DOWNLOAD_DIR)
    for left in DOWNLOAD_DIR.glob(f".{name}-*"):  # by a download that was killed
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=DOWNLOAD_DIR, ignore_cleanup_errors=True) as temporary:
        own = Path(temporary)
        for packed in raw.glob("*.gz"):  # torchvision takes them where their checksums are right
            _raw(name, own).mkdir(parents=True, exist_ok=True)
            shutil.copy(packed, _raw(name, own))
        _run_torchvision(name, own)
        try:
            find_splits(name, own)
        except UserError as error:
            raise OSError(f"what was downloaded is not whole: {error}") from error
        raw.mkdir(parents=True, exist_ok=True)
        for file in _all_files(name):
            if not _is_there(raw / file):
                (_raw(name, own) / file).replace(raw / file)


def _run_torchvision(name: DatasetName, root: Path) -> None:
    """Download with torchvision.

    Raises:
        OSError: whatever went wrong, in one line.
    """
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets none, and a silent network would hang
    try:
        import torchvision

        for train in (True, False):
            getattr(torchvision.datasets, TORCHVISION_CLASSES[name])(root, train=train, download=True)
    except Exception as error:  # of the import, network, disk, checksums, archives: no common class
        raise OSError(" ".join(str(error).split()) or type(error).__name__) from error
    finally:
        socket.setdefaulttimeout(timeout_before)
