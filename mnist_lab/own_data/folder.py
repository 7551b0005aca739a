"""A folder with a sub-folder of images for each class; or with two such folders, train and test."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mnist_lab.errors import UserError
from mnist_lab.idx import MAX_ROWS
from mnist_lab.own_data.images import SUFFIXES, Grey, decode, read_content
from mnist_lab.own_data.parts import (
    ImageSize,
    Part,
    Pixels,
    Reading,
    check_classes,
    check_size,
    check_total,
    digest_of,
    natural_key,
    show,
)
from mnist_lab.progress import progress_bar

SPLITS = ("train", "test")
MANY = 2000  # images, of which reading takes seconds


class ImageFile(NamedTuple):
    path: Path
    class_name: str
    split: str  # "train", "test", or "" where the split is ours to make


class ImageFolder(NamedTuple):
    """What lies there, not read yet."""

    files: list[ImageFile]
    ignored: list[Path]  # neither hidden nor an image


def find_images(root: Path) -> ImageFolder:
    """Every image in the class folders of a folder, by split and class in natural order.

    Raises:
        UserError: it cannot be searched, has no class folders, or one without images.
    """
    below = _entries(root)
    folders = {path.name for path in below if _is_folder(path)}
    parts = {split: root / split for split in SPLITS} if folders.issuperset(SPLITS) else {"": root}
    files: list[ImageFile] = []
    ignored = [path for path in below if path.name not in SPLITS] if "" not in parts else []
    for split, part in parts.items():
        found, others = _find_classes(part, split)
        files += found
        ignored += others
    if len(files) > MAX_ROWS:
        raise UserError(f"{show(root)} has {len(files):,} images, and at most {MAX_ROWS:,} are possible")
    return ImageFolder(files, ignored)


def read_folder(root: Path, size: ImageSize | None) -> Reading:
    """All images, and the classes by the names of their folders.

    Raises:
        UserError: a file or the folder as a whole is not what it must be.
    """
    files, ignored = find_images(root)
    names = {split: {file.class_name for file in files if file.split == split} for split in {f.split for f in files}}
    classes = check_classes({file.class_name for file in files}, show(root))
    if "test" in names and names["test"] != names["train"]:
        alone = min(names["test"] ^ names["train"], key=natural_key)
        raise UserError(f"{show(root)} has the class {alone} in only one of train and test")
    place_of = {name: place for place, name in enumerate(classes)}
    digests: list[bytes] = []
    pixels = _read_all(root, [file.path for file in files], size, digests)
    labels = np.array([place_of[file.class_name] for file in files])
    whole = Part(pixels, labels, lambda row: show(files[row].path))
    digest = _digest(root, files, digests)
    notices = _tell_ignored(ignored)
    if "test" not in names:
        return Reading(classes, whole, None, digest, notices)
    is_test = np.array([file.split == "test" for file in files])
    return Reading(classes, whole.take(np.flatnonzero(~is_test)), whole.take(np.flatnonzero(is_test)), digest, notices)


def digest_folder(root: Path) -> str:
    """The digest that `read_folder` gives, without looking into the images."""
    files = find_images(root).files
    return _digest(root, files, (hashlib.sha256(read_content(file.path)).digest() for file in files))


def _digest(root: Path, files: Sequence[ImageFile], digests: Iterable[bytes]) -> str:
    names = (file.path.relative_to(root).as_posix() for file in files)
    return digest_of(zip(names, digests, strict=True))


def _entries(folder: Path) -> list[Path]:
    """What is not hidden in a folder, in natural order.

    Raises:
        UserError: it is not there, no folder, or may not be read.
    """
    try:
        found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{show(folder)} cannot be read: {error.strerror or error}") from error
    return sorted(found, key=lambda path: natural_key(path.name))


def _is_folder(path: Path) -> bool:
    """Also of a link to one.

    Raises:
        UserError: the folder around it may not be searched.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise UserError(f"{show(path)} cannot be read: {error.strerror or error}") from error


def _find_classes(part: Path, split: str) -> tuple[list[ImageFile], list[Path]]:
    files: list[ImageFile] = []
    ignored: list[Path] = []
    for entry in _entries(part):
        if not _is_folder(entry):
            ignored.append(entry)
            continue
        found = _entries(entry)
        images = [path for path in found if path.suffix.lower() in SUFFIXES]
        if not images:
            raise UserError(
                f"{show(entry)} holds no image ({', '.join(sorted(SUFFIXES))}): a class's images lie in its folder. "
                "Remove it, or fill it"
            )
        files += [ImageFile(path, entry.name, split) for path in images]
        ignored += [path for path in found if path.suffix.lower() not in SUFFIXES]
    if not files:
        raise UserError(f"{show(part)} has no class folders: put the images of each class into a folder of its name")
    return files, ignored


def _read_all(root: Path, paths: Sequence[Path], size: ImageSize | None, digests: list[bytes]) -> Pixels:
    """Every image (N, height, width), and the digests of their files."""
    if size is not None:
        check_total(len(paths), size, show(root))
    pixels: Pixels | None = None
    alphas: dict[int, Pixels] = {}
    for row, path in enumerate(_track(paths, f"reading {root.name}")):
        content = read_content(path)
        digests.append(hashlib.sha256(content).digest())
        grey = decode(content, path, size)
        if pixels is None:
            pixels = _make_room(root, len(paths), grey)
        if grey.pixels.shape != pixels.shape[1:]:
            first, own = ("x".join(map(str, shape)) for shape in (pixels.shape[1:], grey.pixels.shape))
            raise UserError(
                f"{show(paths[0])} has {first} pixels (height x width) and {show(path)} {own}: give --image-size, to "
                "which all are resized, for example --image-size 28"
            )
        pixels[row] = grey.pixels
        if grey.alpha is not None:
            alphas[row] = grey.alpha
    assert pixels is not None
    _lay_on_ground(pixels, alphas)
    return pixels


def _make_room(root: Path, num_images: int, first: Grey) -> Pixels:
    height, width = first.pixels.shape
    check_size((height, width), show(root))
    check_total(num_images, (height, width), show(root))
    return np.empty((num_images, height, width), np.uint8)


def _lay_on_ground(pixels: Pixels, alphas: dict[int, Pixels]) -> None:
    """Fill what is transparent with the ground: that of the opaque images, else what shows best what is opaque."""
    if not alphas:
        return
    opaque = np.ones(len(pixels), bool)
    opaque[list(alphas)] = False
    if opaque.any():
        ground = 255 * is_ground_light(pixels[opaque])
    else:
        weights = np.array([alpha.sum(dtype=np.int64) for alpha in alphas.values()])
        shown = sum(int((pixels[row].astype(np.int64) * alpha).sum()) for row, alpha in alphas.items())
        ground = 255 * (shown < 127.5 * weights.sum())
    for row, alpha in alphas.items():
        values = pixels[row].astype(np.int64) * alpha + ground * (255 - alpha.astype(np.int64))
        pixels[row] = (values + 127) // 255


def is_ground_light(pixels: Pixels) -> bool:
    """Whether half of the pixels along the borders of images (N, height, width) are lighter than mid-grey."""
    border = np.concatenate([pixels[:, [0, -1]].ravel(), pixels[:, 1:-1, [0, -1]].ravel()])
    return bool((border > 127).mean() > 0.5)


def _track(paths: Sequence[Path], what: str) -> Iterator[Path]:
    """The same, with a bar where there are many."""
    with progress_bar() if len(paths) > MANY else nullcontext() as progress:
        yield from paths if progress is None else progress.track(paths, description=what)


def _tell_ignored(ignored: Sequence[Path]) -> tuple[str, ...]:
    if not ignored:
        return ()
    return (f"Left out as no images of a class: {len(ignored):,} files or folders, such as {show(ignored[0])}.",)
