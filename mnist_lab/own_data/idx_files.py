"""A folder with MNIST's four files, which hold other images."""

from pathlib import Path
from typing import get_args

import numpy as np

from mnist_lab.errors import UserError
from mnist_lab.files import sha256
from mnist_lab.idx import UINT8, IdxFile, find_idx
from mnist_lab.own_data.images import resize
from mnist_lab.own_data.parts import (
    ImageSize,
    Labels,
    Part,
    Reading,
    check_classes,
    check_regular,
    check_size,
    check_total,
    digest_of,
    show,
)
from mnist_lab.sources import MNIST_FILES, SplitName

NAMES = tuple(name for split in get_args(SplitName) for name in MNIST_FILES[split])


def read_idx_files(root: Path, size: ImageSize | None) -> Reading:
    """All images of both splits, and the classes by the labels that there are.

    Raises:
        UserError: a file is missing or broken, or they do not belong together.
    """
    digest = digest_idx_files(root)
    found = {split: _find(root, split) for split in MNIST_FILES}
    labels = {split: file.read(file.num_rows).astype(np.int64) for split, (_, file) in found.items()}
    values = np.unique(labels["train"])
    if unknown := sorted(set(np.unique(labels["test"]).tolist()) ^ set(values.tolist())):
        raise UserError(f"{show(root)} has the class {unknown[0]} in only one of train and test")
    classes = check_classes(map(str, values.tolist()), show(root))
    shapes = {images.shape[1:] for images, _ in found.values()}
    if len(shapes) > 1:
        sizes = " and ".join(sorted("x".join(map(str, shape)) for shape in shapes))
        raise UserError(f"{show(root)} has images of {sizes} pixels to train and to test on: they must be alike")
    height, width = shapes.pop()
    check_size(size or (height, width), show(root))
    for own in {(height, width), size or (height, width)}:
        check_total(sum(images.num_rows for images, _ in found.values()), own, show(root))
    parts = {split: _read(images, np.searchsorted(values, labels[split]), size) for split, (images, _) in found.items()}
    return Reading(classes, parts["train"], parts["test"], digest)


def digest_idx_files(root: Path) -> str:
    """The digest that `read_idx_files` gives."""
    for name in NAMES:
        path = root / name
        if not path.exists() and path.with_name(f"{name}.gz").exists():
            raise UserError(f"{show(path)}.gz is still packed. Unpack it: gunzip -k")
        check_regular(path)
    return digest_of((name, bytes.fromhex(sha256(root / name))) for name in NAMES)


def _find(root: Path, split: SplitName) -> tuple[IdxFile, IdxFile]:
    images_path, labels_path = (root / name for name in MNIST_FILES[split])
    images, labels = find_idx(images_path, dtype=UINT8, row_shape=None), find_idx(labels_path, dtype=UINT8)
    if len(images.shape) != 3:
        raise UserError(f"{show(images_path)} holds no images: its values have {len(images.shape)} dimensions, not 3")
    if images.num_rows != labels.num_rows:
        raise UserError(f"{show(images_path)} has {images.num_rows:,} images, and there are {labels.num_rows:,} labels")
    return images, labels


def _read(images: IdxFile, labels: Labels, size: ImageSize | None) -> Part:
    pixels = images.read(images.num_rows)
    resized = pixels if size is None or pixels.shape[1:] == size else resize(pixels, size)
    return Part(resized, labels, lambda row: f"image {row} of {images.path.name}")
