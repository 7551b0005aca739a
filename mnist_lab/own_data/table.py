"""A CSV file of images: a line each, first the label, a number or a name, then the pixels, row by row."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

from mnist_lab.errors import UserError
from mnist_lab.files import reading, sha256
from mnist_lab.idx import MAX_ROWS
from mnist_lab.own_data.images import resize
from mnist_lab.own_data.parts import (
    MAX_PIXELS,
    MAX_SIDE,
    ImageSize,
    Part,
    Pixels,
    Reading,
    check_classes,
    check_regular,
    check_size,
    check_total,
    digest_of,
    show,
)

MAX_LINE = 8 * MAX_SIDE**2  # characters
MAX_FILE_BYTES = 4 * MAX_PIXELS  # of the longest numbers and their commas


def read_table(path: Path, size: ImageSize | None) -> Reading:
    """All images, and the classes by their labels.

    Raises:
        UserError: the file cannot be read, or a line of it is not what it must be.
    """
    if (num_bytes := check_regular(path)) > MAX_FILE_BYTES:
        raise UserError(f"{show(path)} has {num_bytes:,} bytes, and at most {MAX_FILE_BYTES:,} are possible")
    names: list[str] = []
    images: list[Pixels] = []
    lines: list[int] = []
    with reading(path, "Mend it, or write it anew."), path.open(encoding="utf-8-sig", newline="") as file:
        for number, cells in _rows(path, file):
            if images and len(cells) != 1 + len(images[0]):
                raise UserError(
                    f"{show(path)}, line {number}, has {len(cells):,} cells, and those before {1 + len(images[0]):,}"
                )
            if not cells[0].strip():
                raise UserError(f"{show(path)}, line {number}, has no label in its first cell")
            names.append(cells[0].strip())
            images.append(_parse_pixels(path, number, cells))
            lines.append(number)
            if len(images) > MAX_ROWS or len(images) * len(images[0]) > MAX_PIXELS:
                check_total(len(images), (1, len(images[0])), show(path))
                raise UserError(f"{show(path)} has more than {MAX_ROWS:,} images")
    if not images:
        raise UserError(f"{show(path)} holds no image: a line has a label, then pixels from 0 to 255, with commas")
    classes = check_classes(set(names), show(path))
    place_of = {name: place for place, name in enumerate(classes)}
    labels = np.array([place_of[name] for name in names])
    pixels = _shape(np.stack(images), size, path)
    whole = Part(pixels, labels, lambda row: f"line {lines[row]}")
    return Reading(classes, whole, None, digest_table(path))


def digest_table(path: Path) -> str:
    """The digest that `read_table` gives."""
    check_regular(path)
    return digest_of([("", bytes.fromhex(sha256(path)))])


def _rows(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Cells by line number, without empty lines and a header.

    Raises:
        UserError: a line is too long to be one of images.
    """
    rows = csv.reader(_lines(path, file))
    is_first = True
    for cells in rows:
        if cells and any(cells):
            if not (is_first and _is_header(cells)):
                yield rows.line_num, cells
            is_first = False


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise UserError(f"{show(path)}, line {number}, is longer than any of {MAX_SIDE}x{MAX_SIDE} pixels")
        yield line


def _is_header(cells: list[str]) -> bool:
    """Whether a first line names its columns: by anything but numbers, or by their places."""
    names = [cell.strip() for cell in cells[1:]]
    if len(names) > 1 and names in ([str(start + place) for place in range(len(names))] for start in (0, 1)):
        return True
    return not all(_is_number(name) for name in names) and not any(_is_number(name) for name in names)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_pixels(path: Path, number: int, cells: list[str]) -> Pixels:
    """A line's pixels as bytes.

    Raises:
        UserError: one is no whole number from 0 to 255.
    """
    try:
        values = np.array(cells[1:], dtype=np.float64)
    except ValueError:
        values = np.array([float(cell) if _is_number(cell) else np.nan for cell in cells[1:]])
    is_wrong = ~((values >= 0) & (values <= 255) & (values == np.floor(values)))  # of NaN too
    if is_wrong.any():
        column = 1 + int(is_wrong.argmax())
        raise UserError(
            f"{show(path)}, line {number}, cell {column + 1}: {cells[column][:40]!a} is no whole number from 0 to "
            "255, as pixels are"
        )
    return values.astype(np.uint8)


def _shape(rows: Pixels, size: ImageSize | None, path: Path) -> Pixels:
    """Rows of pixels (N, pixels) as images: of the size that is given, else square; resized where that is another.

    Raises:
        UserError: they are not square, and no size is given that has as many pixels.
    """
    num_images, num_pixels = rows.shape
    if size is None or math.prod(size) != num_pixels:
        side = math.isqrt(num_pixels)
        if side**2 != num_pixels:
            raise UserError(
                f"{show(path)} has {num_pixels:,} pixels an image, which is no square: give height and width of as "
                "many with --image-size"
            )
        pixels = rows.reshape(num_images, side, side)
    else:
        pixels = rows.reshape(num_images, *size)
    check_size(size or (pixels.shape[1], pixels.shape[2]), show(path))
    if size is None or pixels.shape[1:] == size:
        return pixels
    check_total(num_images, size, show(path))
    return resize(pixels, size)
