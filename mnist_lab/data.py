"""Data sets as in-memory tensors: train/validation/test, augmentation, calibration set.

Pixels are float32 in [0, 1], shape (N, 1, 28, 28); labels are int64, shape (N,).
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
NUM_CLASSES = 10
DOWNLOAD_DIR = Path("data")
DOWNLOAD_TIMEOUT_S = 20
SPLIT_SEED = 20_240_501  # one split for every model and every seed
VALIDATION_SHARE = {"digits": 180 / 1437}  # elsewhere 5,000 of 60,000
# torchvision's classes, which are also the names of their folders.
TORCHVISION_CLASSES = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "qmnist": "QMNIST"}
# QMNIST's own train=False is the 60,000 set; "test10k" is the usual one.
SPLIT_ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "qmnist": {"train": {"what": "train"}, "test": {"what": "test10k"}},
}
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
class Dataset:
    """Train and validation splits in memory; the test split stays on disk until `load_test`.

    `mean` and `std` describe the training pixels; models normalise with them. `notice` is a
    sentence for the user where this is not the data set that one would expect.
    """

    name: DatasetName
    train: Split
    validation: Split
    mean: float
    std: float
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
    _check_files(found, root)
    return _split_off_validation(
        found, _read_torchvision(found, root, "train"), lambda: _to_split(*_read_torchvision(found, root, "test"))
    )


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
    """Give every image of a batch (B, 1, 28, 28) its own random map, bilinear, zero outside.

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
    return Dataset(
        name=name,
        train=_to_split(pixels_u8[train_rows], labels[train_rows]),
        validation=_to_split(pixels_u8[validation_rows], labels[validation_rows]),
        mean=mean,
        std=math.sqrt(variance),
        notice=notice,
        load_test=load_test,
    )


def _to_split(pixels_u8: Tensor, labels: Tensor) -> Split:
    return Split(pixels_u8.float().div_(255).unsqueeze(1), labels)


def _torchvision_class(name: DatasetName) -> Any:
    import torchvision  # here, as importing it takes longer than most commands without it

    return getattr(torchvision.datasets, TORCHVISION_CLASSES[name])


def _torchvision_dataset(name: DatasetName, root: Path, split: Literal["train", "test"], **options: Any) -> Any:
    arguments = SPLIT_ARGUMENTS.get(name, {}).get(split, {"train": split == "train"})
    return _torchvision_class(name)(root, **arguments, **options)


def _read_torchvision(name: DatasetName, root: Path, split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Pixels (N, 28, 28) as bytes, and labels."""
    try:
        data = _torchvision_dataset(name, root, split)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        raise UserError(f"{name} in {root} cannot be read: {error}") from error
    labels = data.targets if data.targets.ndim == 1 else data.targets[:, 0]  # QMNIST has more to say of each image
    if len(labels) != len(data.data):
        raise UserError(f"{name} in {root} is broken: {len(data.data):,} {split} images, {len(labels):,} labels")
    return data.data, labels


def _check_files(name: DatasetName, root: Path) -> None:
    """Compare every IDX file with its own header: torchvision only checks that files exist.

    Raises:
        UserError: the folder or a file is missing, or a file is not as long as its header says.
    """
    raw = root / TORCHVISION_CLASSES[name] / "raw"
    if not raw.is_dir():
        raise UserError(f"no {name} in {root}: the folder {raw} does not exist. {_how_to_get(name)}")
    for file_name in _file_names(name):
        path = raw / file_name
        if not path.is_file():
            raise UserError(f"{name} in {root} is incomplete: {path} is missing. {_how_to_get(name)}")
        try:
            with path.open("rb") as file:
                header = file.read(16)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        num_dimensions = header[3] if len(header) >= 4 else 0
        item_bytes = {8: 1, 12: 4}.get(header[2] if len(header) >= 4 else 0, 0)
        header_bytes = 4 + 4 * num_dimensions
        if not item_bytes or not 1 <= num_dimensions <= 3 or len(header) < min(header_bytes, 16):
            raise UserError(f"{name} in {root} is broken: {path} is not an IDX file. Delete it and fetch it again.")
        expected_bytes = header_bytes + item_bytes * math.prod(
            struct.unpack(f">{num_dimensions}I", header[4:header_bytes])
        )
        if path.stat().st_size != expected_bytes:
            raise UserError(
                f"{name} in {root} is broken: {path} has {path.stat().st_size:,} bytes, its header promises "
                f"{expected_bytes:,}. Delete it and fetch it again."
            )


def _how_to_get(name: DatasetName) -> str:
    return HOW_TO_GET_DATA.format(TORCHVISION_CLASSES[name])


def _file_names(name: DatasetName) -> list[str]:
    resources = _torchvision_class(name).resources
    entries = resources if isinstance(resources, list) else resources["train"] + resources["test"]
    return [Path(address).stem for address, _ in entries]


def _download(name: DatasetName) -> Path:
    """Make sure that `name` lies in ./data, and return that folder; leave nothing behind on failure.

    Raises:
        OSError: the files are not there and cannot be fetched.
    """
    folder = DOWNLOAD_DIR / TORCHVISION_CLASSES[name]
    if all((folder / "raw" / file_name).exists() for file_name in _file_names(name)):
        return DOWNLOAD_DIR
    is_new, is_new_root = not folder.exists(), not DOWNLOAD_DIR.exists()
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)  # torchvision sets none, and a silent network would hang
    try:
        for split in ("train", "test"):
            _torchvision_dataset(name, DOWNLOAD_DIR, split, download=True)
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


def _digits(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
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
