"""IDX, the format of MNIST's files: two zeros, type, number of dimensions, the sizes, the data; all big-endian.

A file is judged by its header and its length, before memory is taken for what it holds.
"""

import math
import stat
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mnist_lab.errors import UserError

UINT8, INT32 = np.dtype("u1"), np.dtype(">i4")
TYPES: dict[int, np.dtype[Any]] = {8: UINT8, 12: INT32}
MAX_DIMENSIONS = 3
MAX_ROWS = 1_000_000  # sixteen times MNIST: 3 GB of its images as float32


class IdxFile(NamedTuple):
    """A file of rows of one shape, which was whole when it was found."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def header_bytes(self) -> int:
        return 4 + 4 * len(self.shape)

    @property
    def expected_bytes(self) -> int:
        return self.header_bytes + self.dtype.itemsize * math.prod(self.shape)

    def read(self, num_rows: int) -> npt.NDArray[Any]:
        """The first `num_rows` rows.

        Raises:
            UserError: the file cannot be read, or has become shorter.
        """
        row_shape = self.shape[1:]
        num_values = num_rows * math.prod(row_shape)
        try:  # not mapped into memory: some file systems refuse that
            values = np.fromfile(self.path, self.dtype, num_values, offset=self.header_bytes)
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
        if len(values) < num_values:
            raise UserError(f"{self.path} has become shorter since this run began. Fetch it again.")
        return values.reshape(num_rows, *row_shape)


def find_idx(path: Path, *, dtype: np.dtype[Any], row_shape: tuple[int, ...] | None = ()) -> IdxFile:
    """A whole file of 1 to `MAX_ROWS` rows of that type and shape; with None of any shape.

    Raises:
        UserError: it holds something else, is not whole, is no regular file, or cannot be read.
    """
    header, found_bytes = _read_header(path)
    file = _parse(path, header)
    if file is None:
        raise UserError(f"{path} is broken: it is not an IDX file. Delete it and fetch it again.")
    if row_shape is None:
        row_shape = file.shape[1:]
    if (file.dtype, file.shape[1:]) != (dtype, row_shape) or not 1 <= file.num_rows <= MAX_ROWS:
        found, allowed = ("x".join(map(str, shape)) for shape in (file.shape, ("N", *row_shape)))
        raise UserError(
            f"{path} is broken or another file: it holds {found} values of type {file.dtype.name}, not {allowed} "
            f"of type {dtype.name} with N from 1 to {MAX_ROWS:,}. Delete it and fetch it again."
        )
    if found_bytes != file.expected_bytes:
        raise UserError(
            f"{path} is broken: it has {found_bytes:,} bytes, its header promises {file.expected_bytes:,}. "
            "Delete it and fetch it again."
        )
    return file


def _read_header(path: Path) -> tuple[bytes, int]:
    """The first bytes of a file, and its length. What is no regular file is not opened: a pipe would wait for ever."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
            raise UserError(f"{path} is {kind}, not a file. Move it away and fetch the file.")
        with path.open("rb") as file:
            return file.read(4 + 4 * MAX_DIMENSIONS), found.st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(path: Path, header: bytes) -> IdxFile | None:
    """What a header says; None where it is none."""
    if len(header) < 4:
        return None
    zeros, kind, num_dimensions = struct.unpack_from(">HBB", header)
    if zeros or kind not in TYPES or not 1 <= num_dimensions <= MAX_DIMENSIONS or len(header) < 4 + 4 * num_dimensions:
        return None
    return IdxFile(path, TYPES[kind], struct.unpack_from(f">{num_dimensions}I", header, 4))
