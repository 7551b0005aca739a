"""Data sets as in-memory tensors: train/validation/test, augmentation, calibration set.

Pixels are float32 in [0, 1], shape (N, 1, height, width); labels are int64, shape (N,).
"""

import contextlib
import functools
import math
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnist_lab.errors import UserError

DatasetName = Literal["mnist", "fashion-mnist", "kmnist", "qmnist", "digits"]
DOWNLOAD_DIR = Path("data")
DOWNLOAD_TIMEOUT_S = 20
SPLIT_SEED = 20_240_501  # one split for every model and every seed
VALIDATION_SHARE = {"digits": 180 / 1437}  # elsewhere 5,000 of 60,000
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
NUM_TEST_IMAGES = 10_000  # QMNIST's file holds 60,000, the usual ones first
IDX_TYPES: dict[int, np.dtype[Any]] = {8: np.dtype("u1"), 12: np.dtype(">i4")}
HOW_TO_GET_DATA = (
    "To get {0}: connect to a network once (it is downloaded into ./data), "
    "or point --data-dir or MNIST_LAB_DATA at a folder that holds {0}/raw/."
)


class Split(NamedTuple):
    pixels: Tensor
    labels: Tensor

    def to(self, device: str | torch.device) -> "Split":
        return Split(self.pixels.to(device), self.labels.to(device))

    def numpy(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Pixels and labels as arrays that share the tensors' memory."""
        return self.pixels.numpy(), self.labels.numpy()

    def __len__(self) -> int:  # a split's length is its number of images, not of fields
        return self.labels.shape[0]


@dataclass(frozen=True)
class DataSpec:
    """What a model must know of its data; it travels in the model's configuration, and nothing else knows it."""

    num_classes: int
    image_size: tuple[int, int]  # height, width
    mean: float  # of the training pixels; models normalise with both
    std: float

    @property
    def num_pixels(self) -> int:
        return math.prod(self.image_size)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Train and validation splits in memory; the test split stays on disk until `load_test`.

    `notice` is a sentence for the user where this is not the data set that one would expect.
    """

    name: DatasetName
    spec: DataSpec
    train: Split
    validation: Split
    notice: str = ""
    load_test: Callable[[], Split] = field(repr=False, kw_only=True)


def load_dataset(name: DatasetName | None = None, data_dir: Path | None = None) -> Dataset:
    """Load `name` from `data_dir`, from $MNIST_LAB_DATA, or from ./data (downloaded when missing).

    With `name=None`, MNIST; or the bundled digits where MNIST can be neither found nor downloaded.

    Raises:
        UserError: a folder was given that lacks the files or holds broken ones; a data set was
            asked for by name and cannot be had; a folder was given for the bundled digits.
    """
    if name == "digits":
        if data_dir is not None:
            raise UserError(f"--data-dir {data_dir} has no use with --dataset digits, which comes with scikit-learn")
        return _load_digits()
    given = data_dir or (Path(d) if (d := os.environ.get("MNIST_LAB_DATA")) else None)
    try:
        root = given if given is not None else _download(name or "mnist")
    except OSError as error:
        if name is not None:
            raise UserError(
                f"--dataset {name} cannot be downloaded ({error}). {_how_to_get(name)} "
                "Or take --dataset digits, which needs neither."
            ) from error
        notice = (
            "MNIST is not here and cannot be downloaded, so this run uses the small bundled data set "
            f"'digits'; its figures say nothing about MNIST. {_how_to_get('mnist')}"
        )
        return _load_digits(notice=notice)
    found: DatasetName = name or "mnist"
    train, test = _map_split(found, root, "train"), _map_split(found, root, "test")
    return _split_off_validation(found, _read(train), lambda: _to_split(*_read(test)))


def iterate_batches(num_rows: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch of shuffled row indices, in slices of at most `batch_size`."""
    return iter(torch.randperm(num_rows, generator=generator).split(batch_size))


ELASTIC_GRID = 6  # points a side, 5 pixels apart


@dataclass(frozen=True)
class Augmentation:
    """Ranges of a random affine map, each drawn evenly from ± its value, and of an elastic one on top."""

    rotation_degrees: float = 7.0
    shift_pixels: float = 1.25
    scale: float = 0.07
    shear: float = 0.07
    elastic_pixels: float = 0.5  # standard deviation of the displacement of a coarse grid's points


def augment(pixels: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Give every image of a batch (B, 1, height, width) its own random map, bilinear, zero outside.

    Elastic displacements (Simard et al. 2003) are drawn on a coarse grid and smoothed by cubic interpolation.
    Both kinds of map are linear in what is drawn, so one product with fixed fields gives every pixel its source.
    """
    num_images, _, height, width = pixels.shape

    def draw(limit: float) -> Tensor:
        return (torch.rand(num_images, generator=generator) * 2 - 1) * limit

    angle = draw(math.radians(augmentation.rotation_degrees))
    scale_x, scale_y = 1 + draw(augmentation.scale), 1 + draw(augmentation.scale)
    shear = draw(augmentation.shear)
    cos, sin = angle.cos(), angle.sin()
    shift_x, shift_y = draw(2 * augmentation.shift_pixels / width), draw(2 * augmentation.shift_pixels / height)
    rows_x = torch.stack([scale_x * cos, scale_y * (shear * cos - sin), shift_x], dim=1)
    rows_y = torch.stack([scale_x * sin, scale_y * (shear * sin + cos), shift_y], dim=1)
    drawn = torch.stack([rows_x, rows_y], dim=1)
    if augmentation.elastic_pixels:
        coarse = torch.randn(num_images, 2, ELASTIC_GRID**2, generator=generator)
        drawn = torch.cat([drawn, coarse * (2 * augmentation.elastic_pixels / width)], dim=2)
    fields = _displacement_fields(height, width)[: drawn.shape[2]]
    sources = (drawn.to(pixels.device) @ fields.to(pixels.device)).view(num_images, 2, height, width)
    return torch.nn.functional.grid_sample(pixels, sources.permute(0, 2, 3, 1), align_corners=False)


@functools.cache
def _displacement_fields(height: int, width: int) -> Tensor:
    """Over all pixels (H·W): x, y and 1, in [-1, 1], then what each point of the coarse grid does to them."""
    x = (torch.arange(width) * 2 + 1) / width - 1
    y = (torch.arange(height) * 2 + 1) / height - 1
    affine = torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width)])
    points = torch.eye(ELASTIC_GRID**2).view(-1, 1, ELASTIC_GRID, ELASTIC_GRID)
    smooth = torch.nn.functional.interpolate(points, size=(height, width), mode="bicubic", align_corners=False)
    return torch.cat([affine.flatten(1), smooth.flatten(1)])


def calibration_pixels(train: Split, num_images: int, *, seed: int) -> Tensor:
    """`num_images` training images, drawn without replacement, to calibrate quantization on.

    Raises:
        UserError: more images are asked for than the training split has.
    """
    if num_images > len(train):
        raise UserError(f"--calibration-size {num_images} is more than the {len(train)} training images")
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:num_images]
    return train.pixels[chosen]


def _split_off_validation(
    name: DatasetName, images: tuple[Tensor, Tensor], load_test: Callable[[], Split], *, notice: str = ""
) -> Dataset:
    """Shuffle once with a fixed seed and set the validation share aside."""
    pixels_u8, labels = images
    num_validation = round(len(labels) * VALIDATION_SHARE.get(name, 1 / 12))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    validation_rows, train_rows = order[:num_validation], order[num_validation:]
    counts = torch.bincount(pixels_u8[train_rows].flatten().int(), minlength=256).double()
    levels = torch.arange(256).double() / 255
    mean = (counts @ levels / counts.sum()).item()
    variance = (counts @ (levels - mean).square() / counts.sum()).item()
    spec = DataSpec(
        num_classes=int(labels.max()) + 1,
        image_size=(pixels_u8.shape[1], pixels_u8.shape[2]),
        mean=mean,
        std=math.sqrt(variance),
    )
    return Dataset(
        name=name,
        spec=spec,
        train=_to_split(pixels_u8[train_rows], labels[train_rows]),
        validation=_to_split(pixels_u8[validation_rows], labels[validation_rows]),
        notice=notice,
        load_test=load_test,
    )


def _to_split(pixels_u8: Tensor, labels: Tensor) -> Split:
    return Split(pixels_u8.div(255).unsqueeze(1), labels)


def _read(split: tuple[npt.NDArray[Any], npt.NDArray[Any]]) -> tuple[Tensor, Tensor]:
    """Pixels (N, height, width) as bytes, and labels, off the disk."""
    images, labels = split
    return torch.from_numpy(np.array(images)), torch.from_numpy(labels.astype(np.int64))


def _map_split(name: DatasetName, root: Path, split: SplitName) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Images and labels of a split, checked and mapped, not read. Importing torchvision for it would take a second.

    Raises:
        UserError: the folder or a file is missing or broken, or the two do not belong together.
    """
    raw = root / TORCHVISION_CLASSES[name] / "raw"
    if not raw.is_dir():
        raise UserError(f"no {name} in {root}: the folder {raw} does not exist. {_how_to_get(name)}")
    images_file, labels_file = _files(name)[split]
    for file in (images_file, labels_file):
        if not (raw / file).is_file():
            raise UserError(f"{name} in {root} is incomplete: {raw / file} is missing. {_how_to_get(name)}")
    images, labels = _map_idx(raw / images_file), _map_idx(raw / labels_file)
    if labels.ndim == 2:  # QMNIST has more to say of each image
        labels = labels[:, 0]
    if images.shape != (len(labels), 28, 28):
        size = "x".join(map(str, images.shape[1:]))
        raise UserError(f"{name} in {root} is broken: {len(images):,} {split} images of {size}, {len(labels):,} labels")
    return (images, labels) if split == "train" else (images[:NUM_TEST_IMAGES], labels[:NUM_TEST_IMAGES])


def _map_idx(path: Path) -> npt.NDArray[Any]:
    """The array of an IDX file: two zeros, type, number of dimensions, the sizes, the data; all big-endian.

    Raises:
        UserError: the file cannot be read, or is not as long as its header says.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4).ljust(4, b"\0")
            sizes = file.read(4 * start[3])
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    kind, num_dimensions = IDX_TYPES.get(start[2]), start[3]
    if kind is None or not 1 <= num_dimensions <= 3 or len(sizes) < 4 * num_dimensions:
        raise UserError(f"{path} is broken: it is not an IDX file. Delete it and fetch it again.")
    shape = struct.unpack(f">{num_dimensions}I", sizes)
    header_bytes = 4 + len(sizes)
    found_bytes, expected_bytes = path.stat().st_size, header_bytes + kind.itemsize * math.prod(shape)
    if found_bytes != expected_bytes or found_bytes == header_bytes:
        raise UserError(
            f"{path} is broken: it has {found_bytes:,} bytes, its header promises {expected_bytes:,}. "
            "Delete it and fetch it again."
        )
    return np.memmap(path, kind, "r", offset=header_bytes, shape=shape)


def _how_to_get(name: DatasetName) -> str:
    return HOW_TO_GET_DATA.format(TORCHVISION_CLASSES[name])


def _files(name: DatasetName) -> dict[SplitName, tuple[str, str]]:
    return QMNIST_FILES if name == "qmnist" else MNIST_FILES


def _download(name: DatasetName) -> Path:
    """Make sure that `name` lies in ./data, and return that folder; leave nothing behind on failure.

    Raises:
        OSError: the files are not there and cannot be fetched.
    """
    folder = DOWNLOAD_DIR / TORCHVISION_CLASSES[name]
    if all((folder / "raw" / file).exists() for files in _files(name).values() for file in files):
        return DOWNLOAD_DIR
    import torchvision

    is_new, is_new_root = not folder.exists(), not DOWNLOAD_DIR.exists()
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets none, and a silent network would hang
    try:
        for train in (True, False):
            getattr(torchvision.datasets, TORCHVISION_CLASSES[name])(DOWNLOAD_DIR, train=train, download=True)
    except BaseException as error:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        if is_new_root:
            with contextlib.suppress(OSError):
                DOWNLOAD_DIR.rmdir()
        if isinstance(error, RuntimeError):
            raise OSError("no mirror could be reached") from error
        raise
    finally:
        socket.setdefaulttimeout(timeout_before)
    return DOWNLOAD_DIR


def _load_digits(*, notice: str = "") -> Dataset:
    return _split_off_validation("digits", _digits("train"), lambda: _to_split(*_digits("test")), notice=notice)


def _digits(split: SplitName) -> tuple[Tensor, Tensor]:
    """scikit-learn's UCI digits, 8x8, enlarged to 20x20 and padded to 28x28 as MNIST is."""
    from sklearn.datasets import load_digits

    images, targets = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16
    enlarged = torch.nn.functional.interpolate(pixels, size=(20, 20), mode="bicubic", align_corners=False)
    pixels_u8 = torch.nn.functional.pad(enlarged.clamp(0, 1) * 255, (4, 4, 4, 4)).round().byte().squeeze(1)
    labels = torch.from_numpy(targets).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    rows = order[:360] if split == "test" else order[360:]
    return pixels_u8[rows], labels[rows]
