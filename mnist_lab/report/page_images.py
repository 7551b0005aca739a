"""Test images on the page: where models err or differ, and what experts get. No torch here.

Shapes: N test images, M models, K experts an image.
"""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mnist_lab.report.page_figures import as_source

NUM_MISSED, NUM_DIVIDED = 36, 24
NUM_OF_EXPERT = 18

Pixels = npt.NDArray[np.uint8]  # (N, height, width)
Classes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class TestImages:
    """The test split as it is on disk, and which experts mixtures choose for it."""

    pixels: Pixels
    labels: Classes  # (N,)
    experts: Mapping[str, npt.NDArray[np.int64]]  # by model (N, K)

    __test__ = False  # no test of pytest's


class Answer(NamedTuple):
    """A class, and who says it."""

    name: str
    is_right: bool
    models: list[str]


class Mistake(NamedTuple):
    """One test image, and what the models say, most of them first."""

    number: int
    label: str
    answers: list[Answer]
    source: str  # the image; empty where it is not at hand


class OfExpert(NamedTuple):
    """What one expert of a mixture gets."""

    expert: int
    share: float  # of all (image, expert) pairs
    classes: str  # those that it gets most of
    sources: list[str]  # the first images


def choose_images(predicted_MN: npt.NDArray[np.uint8], labels: Classes) -> tuple[list[int], list[int]]:
    """Images that most models miss; then, of the others, those with the most even split of answers."""
    num_wrong = (predicted_MN != labels).sum(axis=0)
    missed = [int(index) for index in np.argsort(-num_wrong, kind="stable")[:NUM_MISSED] if num_wrong[index]]
    counts = np.stack([(predicted_MN == own).sum(axis=0) for own in range(int(predicted_MN.max()) + 1)])
    shares = counts / len(predicted_MN)
    entropy = -np.sum(shares * np.log(np.maximum(shares, 1e-12)), axis=0)
    divided = np.argsort(-entropy, kind="stable")[: NUM_MISSED + NUM_DIVIDED]
    chosen = [int(index) for index in divided if entropy[index] > 1e-9 and index not in missed]
    return missed, chosen[:NUM_DIVIDED]


def describe_mistake(
    index: int, predicted: Mapping[str, Classes], labels: Classes, names: Sequence[str], images: TestImages | None
) -> Mistake:
    """What each model says of one image.

    Args:
        predicted: by model (N,).
        names: of the classes.
    """
    by_class: dict[int, list[str]] = {}
    for model, own in predicted.items():
        by_class.setdefault(int(own[index]), []).append(model)
    most_first = sorted(by_class.items(), key=lambda pair: -len(pair[1]))
    answers = [Answer(names[own], own == labels[index], models) for own, models in most_first]
    return Mistake(index, names[labels[index]], answers, as_png(images.pixels[index]) if images else "")


def describe_experts(
    model: str,
    by_class: Sequence[Sequence[float]],
    class_sizes: Sequence[int],
    names: Sequence[str],
    images: TestImages | None,
) -> list[OfExpert]:
    """Who gets which classes, and the first test images that each gets, where they are at hand.

    Args:
        by_class: [class][expert], share of the class's pairs.
        class_sizes: test images of each.
    """  # fmt: skip
    pairs = np.array(by_class) * np.array(class_sizes)[:, None]  # [class][expert], but for a factor K
    chosen = images.experts.get(model) if images else None
    found = []
    for expert, own in enumerate(pairs.T):
        most = [own_class for own_class in np.argsort(-own, kind="stable")[:3] if own[own_class] > 0]
        classes = ", ".join(f"{names[own_class]} ({100 * own[own_class] / own.sum():.0f} %)" for own_class in most)
        sources = []
        if images is not None and chosen is not None:
            indices = np.flatnonzero((chosen == expert).any(axis=1))[:NUM_OF_EXPERT]
            sources = [as_png(images.pixels[index]) for index in indices]
        found.append(OfExpert(expert, float(own.sum() / pairs.sum()), classes or "none", sources))
    return found


def as_png(pixels: npt.NDArray[np.uint8]) -> str:
    """A grey image (height, width) as a data address (PNG, RFC 2083)."""
    height, width = pixels.shape
    lines = b"".join(b"\0" + line.tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    content = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return as_source("image/png", b"\x89PNG\r\n\x1a\n" + content)
