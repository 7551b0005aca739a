"""What every kind of own data is read into, and what is asked of all of them."""

import hashlib
import math
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mnist_lab.errors import UserError
from mnist_lab.idx import MAX_ROWS
from mnist_lab.sources import IMAGE_SIZE

Pixels = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
ImageSize = tuple[int, int]  # height, width

MAX_CLASSES = 256  # predictions are kept as bytes
MAX_NAME = 100  # characters of a class
MIN_SIDE, MAX_SIDE = 4, 256  # pixels
MAX_PIXELS = MAX_ROWS * math.prod(IMAGE_SIZE)  # of all images together: 3 GB as float32


class Part(NamedTuple):
    """Images of one split, or of all."""

    pixels: Pixels  # (N, height, width)
    labels: Labels  # (N,) places among the classes
    name_of: Callable[[int], str]  # where an image came from, for messages

    def take(self, rows: npt.NDArray[np.intp]) -> "Part":
        return Part(self.pixels[rows], self.labels[rows], lambda row: self.name_of(int(rows[row])))


class Reading(NamedTuple):
    """What a folder or file holds."""

    classes: tuple[str, ...]
    train: Part
    test: Part | None  # None where the split is ours to make
    digest: str  # hexadecimal, of the content
    notices: tuple[str, ...] = ()


def natural_key(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """By which "2" comes before "10"."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    keys = [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part.casefold()) for part in parts]
    return keys, name


def show(path: Path) -> str:
    """A path on one line, however odd its name."""
    return str(path) if str(path).isprintable() else ascii(str(path))


def check_classes(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Their names in natural order.

    Raises:
        UserError: there are too few or too many, or one is no text that can be shown.
    """
    classes = tuple(sorted(names, key=natural_key))
    for name in classes:
        if not name.isprintable() or len(name) > MAX_NAME:
            raise UserError(
                f"{where} has a class called {ascii(name)[:200]}: rename it, to at most {MAX_NAME} characters that can "
                "be shown"
            )
    if len(classes) < 2:
        found = f"the one class {classes[0]}" if classes else "no class"
        raise UserError(f"{where} has {found}, and at least two are needed")
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{where} has {len(classes):,} classes, and at most {MAX_CLASSES} are possible")
    return classes


def check_size(size: ImageSize, where: str) -> None:
    """Raise UserError where images are too small or too large for the models."""
    if not all(MIN_SIDE <= side <= MAX_SIDE for side in size):
        raise UserError(
            f"{where} has images of {size[0]}x{size[1]} pixels (height x width), and sides must lie between {MIN_SIDE} "
            f"and {MAX_SIDE}: give --image-size, for example --image-size {IMAGE_SIZE[0]}"
        )


def check_total(num_images: int, size: ImageSize, where: str) -> None:
    """Raise UserError where all images together take too much memory, before any is taken."""
    if num_images * math.prod(size) > MAX_PIXELS:
        raise UserError(
            f"{where} has {num_images:,} images of {size[0]}x{size[1]} pixels: {MAX_PIXELS:,} pixels in all are "
            "possible. Give a smaller --image-size, or fewer images"
        )


def check_regular(path: Path) -> int:
    """The bytes of a file.

    Raises:
        UserError: it is not there, no regular file (a pipe would wait for ever), or may not be read.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UserError(f"{show(path)} is not a file")
        return found.st_size
    except OSError as error:
        raise UserError(f"{show(path)} cannot be read: {error.strerror or error}") from error


def digest_of(files: Iterable[tuple[str, bytes]]) -> str:
    """One digest of several files' names and digests."""
    return hashlib.sha256(b"".join(name.encode(errors="surrogateescape") + b"\0" + d for name, d in files)).hexdigest()
