"""Data sets as in-memory tensors: train/validation/test, augmentation, calibration set.

Pixels are float32 in [0, 1], shape (N, 1, height, width); labels are int64, shape (N,).
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mnist_lab.errors import UserError
from mnist_lab.own_data import DATASET_TEXTS, OwnSource, find_own, is_ground_light, read_own
from mnist_lab.sources import (
    DATASETS,
    DOWNLOAD_DIR,
    IMAGE_SIZE,
    NUM_CLASSES,
    SPLIT_SEED,
    DatasetName,
    FoundSplit,
    SplitName,
    advise,
    download,
    find_splits,
)

Polarity = Literal["light-on-dark", "dark-on-light"]  # what shows, and its ground
Images = tuple[Tensor, Tensor]  # pixels (N, height, width) as bytes, and labels
VALIDATION_SHARE = {"digits": 180 / 1437}  # elsewhere 5,000 of 60,000


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
    classes: tuple[str, ...] = ()  # their names, where they are no digits
    polarity: Polarity = "light-on-dark"

    def __post_init__(self) -> None:
        if self.classes and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} names are not of {self.num_classes} classes")

    @property
    def num_pixels(self) -> int:
        return math.prod(self.image_size)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes or tuple(map(str, range(self.num_classes)))

    @property
    def ground(self) -> float:
        """Brightness of what lies around that which shows."""
        return 0.0 if self.polarity == "light-on-dark" else 1.0

    @property
    def settings(self) -> dict[str, Any]:
        """What a model depends on of it: all, but for what is as in MNIST."""
        usual = {own.name: own.default for own in fields(self) if own.default is not MISSING}
        return {name: value for name, value in asdict(self).items() if name not in usual or value != usual[name]}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Train and validation splits in memory; the test split stays on disk until `load_test`.

    `notice` is a sentence for the user where this is not the data set that one would expect.
    """

    name: str  # of own data that which it is filed under
    spec: DataSpec
    train: Split
    validation: Split
    notice: str = ""
    load_test: Callable[[], Split] = field(repr=False, kw_only=True)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the pixels, as bytes, and the labels that models are trained and chosen on."""
        digest = hashlib.sha256()
        for pixels, labels in (self.train, self.validation):
            for chunk in pixels.split(1000):  # stays in the cache
                digest.update(chunk.mul(255).round_().byte().numpy().tobytes())
            digest.update(labels.numpy().tobytes())
        return digest.hexdigest()


def load_dataset(
    name: str | None = None, data_dir: Path | None = None, image_size: tuple[int, int] | None = None
) -> Dataset:
    """Load `name` from `data_dir`, from $MNIST_LAB_DATA, or from ./data (downloaded when missing).

    A name like `folder:DIR` is of own data, whose images get another `image_size` (height, width) where one is given.

    With `name=None`, MNIST; or the bundled digits where MNIST can be neither found nor downloaded. Files, sizes and
    labels of all splits are checked; the images of the test split are not read yet.

    Raises:
        UserError: a folder was given that lacks the files or holds broken ones; a data set was
            asked for by name and cannot be had; an option was given that has no use with it.
    """
    if name is not None and (own := find_own(name)) is not None:
        if data_dir is not None:
            raise UserError(f"--data-dir {data_dir} has no use with --dataset {name}, which says itself where it lies")
        return _load_own(own, image_size)
    if image_size is not None:
        raise UserError("--image-size is for own data (--dataset folder:DIR, idx:DIR or csv:FILE): drop it")
    if name == "digits":
        if data_dir is not None:
            raise UserError(f"--data-dir {data_dir} has no use with --dataset digits, which comes with scikit-learn")
        return _load_digits()
    wanted = find_known("mnist" if name is None else name)
    if data_dir is not None:
        return _load_given(wanted, data_dir, f"--data-dir {data_dir}")
    if variable := os.environ.get("MNIST_LAB_DATA"):
        return _load_given(wanted, Path(variable), f"MNIST_LAB_DATA={variable}")
    try:
        download(wanted)
    except OSError as error:
        advice = advise(wanted, DOWNLOAD_DIR)
        if name is not None:
            raise UserError(
                f"--dataset {name} cannot be downloaded ({error}). {advice} "
                "Or take --dataset digits, which comes with scikit-learn."
            ) from error
        notice = (
            f"MNIST is not here and cannot be downloaded ({error}), so this run uses the small bundled data set "
            f"'digits'; its figures say nothing about MNIST. {advice}"
        )
        return _load_digits(notice=notice)
    return _load(wanted, DOWNLOAD_DIR)


def find_known(name: str) -> DatasetName:
    """The known data set of that name.

    Raises:
        UserError: there is none.
    """
    for known in DATASETS:
        if known == name:
            return known
    raise UserError(f"--dataset {name} is none of {', '.join(DATASET_TEXTS)}")


def iterate_batches(num_rows: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch of shuffled row indices, in slices of at most `batch_size`."""
    return iter(torch.randperm(num_rows, generator=generator).split(batch_size))


ELASTIC_GRID = 6  # points a side, 5 pixels apart in an image of MNIST's size


@dataclass(frozen=True)
class Augmentation:
    """Ranges of a random affine map, each drawn evenly from ± its value, and of an elastic one on top.

    Pixels are those of an image of MNIST's size; others move in proportion to theirs.
    """

    rotation_degrees: float = 7.0
    shift_pixels: float = 1.25
    scale: float = 0.07
    shear: float = 0.07
    elastic_pixels: float = 0.5  # standard deviation of the displacement of a coarse grid's points


def augment(pixels: Tensor, augmentation: Augmentation, generator: torch.Generator, *, ground: float = 0.0) -> Tensor:
    """Give every image of a batch (B, 1, height, width) its own random map, bilinear, `ground` outside.

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
    shift_x, shift_y = (draw(2 * augmentation.shift_pixels / side) for side in reversed(IMAGE_SIZE))
    aspect = height / width
    rows_x = torch.stack([scale_x * cos, scale_y * (shear * cos - sin) * aspect, shift_x], dim=1)
    rows_y = torch.stack([scale_x * sin / aspect, scale_y * (shear * sin + cos), shift_y], dim=1)
    drawn = torch.stack([rows_x, rows_y], dim=1)
    if augmentation.elastic_pixels:
        coarse = torch.randn(num_images, 2, ELASTIC_GRID**2, generator=generator)
        drawn = torch.cat([drawn, coarse * (2 * augmentation.elastic_pixels / IMAGE_SIZE[1])], dim=2)
    fields = _displacement_fields(height, width)[: drawn.shape[2]]
    sources = (drawn.to(pixels.device) @ fields.to(pixels.device)).view(num_images, 2, height, width)
    inside = pixels - ground if ground else pixels
    moved = torch.nn.functional.grid_sample(inside, sources.permute(0, 2, 3, 1), align_corners=False)
    return moved + ground if ground else moved


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
    name: DatasetName, images: Images, load_test: Callable[[], Split], *, notice: str = ""
) -> Dataset:
    """Shuffle once with a fixed seed and set the validation share aside.

    Raises:
        UserError: all pixels of a split are the same.
    """
    pixels_u8, labels = images
    num_validation = round(len(labels) * VALIDATION_SHARE.get(name, 1 / 12))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    validation_rows, train_rows = order[:num_validation], order[num_validation:]
    train_pixels = pixels_u8[train_rows]
    return Dataset(
        name=name,
        spec=describe_pixels(train_pixels, NUM_CLASSES),
        train=_to_split(f"{name}'s training", train_pixels, labels[train_rows]),
        validation=_to_split(f"{name}'s validation", pixels_u8[validation_rows], labels[validation_rows]),
        notice=notice,
        load_test=load_test,
    )


def describe_pixels(pixels_u8: Tensor, num_classes: int) -> DataSpec:
    """What training pixels (N, height, width) say of a data set."""
    chunks = [torch.bincount(chunk.flatten().int(), minlength=256) for chunk in pixels_u8.split(10_000)]
    counts = torch.stack(chunks).sum(dim=0).double()
    levels = torch.arange(256).double() / 255
    mean = (counts @ levels / counts.sum()).item()
    variance = (counts @ (levels - mean).square() / counts.sum()).item()
    return DataSpec(num_classes, (pixels_u8.shape[1], pixels_u8.shape[2]), mean=mean, std=math.sqrt(variance))


def _load_own(source: OwnSource, image_size: tuple[int, int] | None) -> Dataset:
    """The classes are called as in the source; light or dark ground is that of the training images' borders."""
    try:
        own = read_own(source, image_size)
    except UserError as error:
        raise UserError(f"--dataset {source}: {error}") from error
    test = (torch.from_numpy(own.test.pixels), torch.from_numpy(own.test.labels))
    train, validation = (
        _to_split(f"{source}'s {use}", torch.from_numpy(part.pixels), torch.from_numpy(part.labels))
        for use, part in (("training", own.train), ("validation", own.validation))
    )
    spec = describe_pixels(torch.from_numpy(own.train.pixels), len(own.classes))
    polarity: Polarity = "dark-on-light" if is_ground_light(own.train.pixels) else "light-on-dark"
    return Dataset(
        name=own.name,
        spec=replace(spec, classes=own.classes if own.classes != spec.class_names else (), polarity=polarity),
        train=train,
        validation=validation,
        notice=" ".join(own.notices),
        load_test=lambda: _to_split(f"{source}'s test", *test),
    )


def _to_split(which: str, pixels_u8: Tensor, labels: Tensor) -> Split:
    lowest, highest = pixels_u8.aminmax()
    if lowest == highest:
        raise UserError(f"every pixel of {which} images is {lowest}: they show nothing. Fetch the files again.")
    return Split(pixels_u8.div(255).unsqueeze(1), labels)


def _load_given(name: DatasetName, folder: Path, given_by: str) -> Dataset:
    """Load from a folder that the user names; errors tell how it was named."""
    try:
        return _load(name, _expand_home(folder))
    except UserError as error:
        raise UserError(f"{given_by}: {error}") from error


def _expand_home(folder: Path) -> Path:
    try:
        return folder.expanduser()
    except RuntimeError as error:
        raise UserError(f"{folder.parts[0]} is no user's home folder. Write the folder in full.") from error


def _load(name: DatasetName, root: Path) -> Dataset:
    train, test = find_splits(name, root)
    return _split_off_validation(name, _read(train), lambda: _to_split(f"{name}'s test", *_read(test)))


def _read(split: FoundSplit) -> Images:
    pixels, labels = split.read()
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def _load_digits(*, notice: str = "") -> Dataset:
    return _split_off_validation(
        "digits", _digits("train"), lambda: _to_split("digits' test", *_digits("test")), notice=notice
    )


def _digits(split: SplitName) -> Images:
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
