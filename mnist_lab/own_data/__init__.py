"""A user's own data, from `folder:DIR`, `idx:DIR` or `csv:FILE` to arrays. No torch here.

It is filed under its folder's or file's name and a short digest of its content, so that other images never stand for
these. What is not split yet is split by a fixed seed before anything else is done.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mnist_lab.errors import UserError
from mnist_lab.own_data.folder import digest_folder, is_ground_light, read_folder
from mnist_lab.own_data.idx_files import digest_idx_files, read_idx_files
from mnist_lab.own_data.parts import ImageSize, Labels, Part, Reading, show
from mnist_lab.own_data.table import digest_table, read_table
from mnist_lab.sources import DATASETS, MIN_IMAGES, SPLIT_SEED

__all__ = [
    "DATASET_TEXTS",
    "OwnData",
    "OwnSource",
    "find_own",
    "find_size",
    "is_filed_name",
    "is_ground_light",
    "read_own",
]


class _Kind(NamedTuple):
    place: str
    read: Callable[[Path, ImageSize | None], Reading]
    digest: Callable[[Path], str]


KINDS = {
    "folder": _Kind("DIR", read_folder, digest_folder),
    "idx": _Kind("DIR", read_idx_files, digest_idx_files),
    "csv": _Kind("FILE", read_table, digest_table),
}
DATASET_TEXTS = (*DATASETS, *(f"{kind}:{own.place}" for kind, own in KINDS.items()))  # that name data
TEST_SHARE = 0.2  # of each class
VALIDATION_SHARE = 0.125  # of what is left of it
MAX_FILED_NAME = 40  # characters
FILED = re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{8}(?:-([0-9]+)x([0-9]+))?")


class OwnSource(NamedTuple):
    """Where own data lies."""

    kind: str
    path: Path

    def __str__(self) -> str:
        return f"{self.kind}:{show(self.path)}"

    def filed_name(self, digest: str) -> str:
        """For example shapes-1a2b3c4d."""
        path = self.path.resolve()
        name = path.stem if self.kind == "csv" else path.name or "data"
        safe = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:MAX_FILED_NAME].strip("._-")
        return f"{safe or 'data'}-{digest[:8]}"

    def find_name(self) -> str:
        """What its results are filed under, but for an --image-size.

        Raises:
            UserError: it cannot be read.
        """
        return self.filed_name(KINDS[self.kind].digest(self.path))


class OwnData(NamedTuple):
    name: str  # that it is filed under
    classes: tuple[str, ...]
    train: Part
    validation: Part
    test: Part
    notices: tuple[str, ...]


def find_own(text: str) -> OwnSource | None:
    """What `folder:DIR`, `idx:DIR` or `csv:FILE` name; None of anything else."""
    kind, _, place = text.partition(":")
    if kind not in KINDS or not place:
        return None
    try:
        return OwnSource(kind, Path(place).expanduser())
    except RuntimeError as error:
        raise UserError(f"{text}: there is no such user's home folder") from error


def is_filed_name(name: str) -> bool:
    """Whether own data may be filed under that name."""
    return FILED.fullmatch(name) is not None


def find_size(name: str) -> ImageSize | None:
    """To which the images were resized that are filed under that name."""
    found = FILED.fullmatch(name)
    return (int(found[1]), int(found[2])) if found and found[1] else None


def read_own(source: OwnSource, size: ImageSize | None = None) -> OwnData:
    """Read all of it once, and split it.

    Args:
        size: that the images are to have; for a CSV file also that they have.

    Raises:
        UserError: it is not what it must be; the message names what is wrong with it.
    """
    found = KINDS[source.kind].read(source.path, size)
    _check_counts(found)
    rng = np.random.default_rng(SPLIT_SEED)
    learned, test = _shuffle(found.train, rng), found.test
    if test is None:
        learned, test = _split(learned, TEST_SHARE)
    else:
        test = _shuffle(test, rng)
    train, validation = _split(learned, VALIDATION_SHARE)
    for part, use in ((learned, "train"), (test, "test")):
        if len(part.labels) < MIN_IMAGES:
            raise UserError(f"there are {len(part.labels)} images to {use} on, and at least {MIN_IMAGES} are needed")
    notices = (*found.notices, *_tell_copies(found.classes, learned, test))
    suffix = "" if size is None else f"-{size[0]}x{size[1]}"
    return OwnData(source.filed_name(found.digest) + suffix, found.classes, train, validation, test, notices)


def _check_counts(found: Reading) -> None:
    """Raise UserError where a class has not an image for each split."""
    counts = np.bincount(found.train.labels, minlength=len(found.classes))
    least = 3 if found.test is None else 2
    if counts.min() < least:
        splits = "train, validate and test on" if found.test is None else "train and validate on"
        name, num = found.classes[counts.argmin()], counts.min()
        raise UserError(f"there are too few images of class {name}, {num}: at least {least} are needed, to {splits}")


def _shuffle(part: Part, rng: np.random.Generator) -> Part:
    return part.take(rng.permutation(len(part.labels)))


def _split(part: Part, share: float) -> tuple[Part, Part]:
    """The rest, and of each class that share, at least one image: the first ones, so that of shuffled images any."""
    is_second = _rank_in_class(part.labels) < np.maximum(1, np.rint(share * np.bincount(part.labels)))[part.labels]
    return part.take(np.flatnonzero(~is_second)), part.take(np.flatnonzero(is_second))


def _rank_in_class(labels: Labels) -> npt.NDArray[np.int64]:
    """How many images of its class stand before each."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    ranks = np.empty_like(labels)
    ranks[order] = np.arange(len(labels)) - starts[labels[order]]
    return ranks


def _tell_copies(classes: tuple[str, ...], learned: Part, test: Part) -> tuple[str, ...]:
    """A sentence each where the same image is in both splits, or stands under two labels.

    Raises:
        UserError: all test images are among those to learn from.
    """
    first: dict[bytes, tuple[str, int]] = {}
    copies: list[str] = []
    doubtful: list[str] = []
    for part in (learned, test):
        for row, (image, label) in enumerate(zip(part.pixels, part.labels.tolist(), strict=True)):
            key, own = hashlib.blake2b(image.tobytes(), digest_size=16).digest(), part.name_of(row)
            if key not in first:
                if part is learned:
                    first[key] = own, label
                continue
            name, other = first[key]
            if part is test:
                copies.append(f"{own} and {name}")
            if label != other:
                doubtful.append(f"{own} ({classes[label]}) and {name} ({classes[other]})")
    if len(copies) == len(test.labels):
        raise UserError(f"all test images are training images too, such as {copies[0]}")
    notices = []
    if copies:
        notices.append(f"{len(copies):,} of {len(test.labels):,} test images are training images too: {copies[0]}.")
    if doubtful:
        notices.append(f"{len(doubtful):,} images stand under two classes: {doubtful[0]}.")
    return tuple(notices)
