"""One image file, by Pillow, as grey values; judged by its header before memory is taken for what it holds."""

import io
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from mnist_lab.errors import UserError
from mnist_lab.files import reading
from mnist_lab.own_data.parts import ImageSize, Pixels, check_regular, show

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pbm", ".pgm", ".ppm", ".pnm"
}  # fmt: skip
MAX_IMAGE_PIXELS = 2**26  # of one file before it is resized: more than any telephone takes
MAX_IMAGE_BYTES = 256 * 2**20
ADVICE = "Remove it, or save it anew."


class Grey(NamedTuple):
    """Brightness of an image, and how opaque it is where it is not wholly so; (height, width) each."""

    pixels: Pixels
    alpha: Pixels | None


def read_content(path: Path) -> bytes:
    """All bytes of an image file.

    Raises:
        UserError: it is gone, no regular file, too large, or may not be read.
    """
    if check_regular(path) > MAX_IMAGE_BYTES:
        raise UserError(f"{show(path)} is larger than {MAX_IMAGE_BYTES // 2**20} MiB. {ADVICE}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{show(path)} cannot be read: {error.strerror or error}") from error


def decode(content: bytes, path: Path, size: ImageSize | None = None) -> Grey:
    """The grey values of an image file, turned as its camera says, and of another size where one is given.

    Raises:
        UserError: it is broken, animated, too large, or of a kind that is not read.
    """
    shown = Path(show(path))
    with reading(shown, ADVICE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata that says nothing of the pixels
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise UserError(
                    f"{shown} has {image.width:,}x{image.height:,} pixels, more than {MAX_IMAGE_PIXELS:,}. {ADVICE}"
                )
            num_frames = getattr(image, "n_frames", 1)
            if num_frames > 1 and image.format != "MPO":  # whose second frame is a preview
                raise UserError(f"{shown} holds {num_frames} images, as an animation does. {ADVICE}")
            image.load()
            grey = _to_grey(ImageOps.exif_transpose(image))
        return _split_alpha(grey if size is None else _resize(grey, size))


def resize(pixels: Pixels, size: ImageSize) -> Pixels:
    """Grey images (N, height, width) of another size."""
    return np.stack([np.asarray(_resize(Image.fromarray(own), size)) for own in pixels])


def _resize(grey: Image.Image, size: ImageSize) -> Image.Image:
    """By means over the pixels that become one, or between those that become several."""
    return grey.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def _to_grey(image: Image.Image) -> Image.Image:
    """L, or LA where parts are transparent.

    Raises:
        ValueError: there is no telling which value is white.
    """
    if image.mode.startswith("I"):  # 16 bits
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError("its values are not of 8 or 16 bits")
        return Image.fromarray(((values * 255 + 32_767) // 65_535).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers")
    if image.has_transparency_data:
        return image.convert("RGBA").convert("LA")
    return image.convert("L")


def _split_alpha(grey: Image.Image) -> Grey:
    values = np.array(grey)
    if values.ndim == 2:
        return Grey(values, None)
    alpha = values[..., 1]
    return Grey(values[..., 0].copy(), None if alpha.min() == 255 else alpha.copy())
