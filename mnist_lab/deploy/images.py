"""Image files -> the pixels that a model takes. No torch here.

MNIST's digits were made so (LeCun et al. 1998, http://yann.lecun.com/exdb/mnist): the ink scaled to 20 pixels at its
longer side, its aspect kept, antialiased; then moved so that its centre of mass lies in the middle of 28x28 pixels. A
model of such digits takes any other one made the same way:

    ink = (grey − ground) / (lightest − ground), of what is light on dark; ground: the median of the outermost pixels
    box = the rows and columns with ink above 1/10, or above three times what nine tenths of the outermost pixels stray
    scaled = ink in the box, by 5/7 of a side of the model's image / the box's longer side
    pixels[y + shift] = scaled[y], shift = round(half a side − the centre of mass), the same for x

Images for models of other data are only made grey, turned to the model's polarity, and resized.
"""

import io
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from mnist_lab.deploy.card import Polarity
from mnist_lab.files import read_bytes, reading
from mnist_lab.measure import Array

SHARE = 5 / 7  # of a side: 20 of 28 pixels
INK = 1 / 10  # at least, above what JPEG leaves around strokes
NOISE = 3  # times the 90th percentile of what is normally distributed is the 99.9999th
LEAST_CONTRAST = 1 / 10  # of black against white
LARGEST_SIDE = 1000  # pixels; of more the mean is taken, which antialiases as well
MAX_PIXELS = 2**27  # of a file
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # of Pillow's, some of which would start programs
TOPS = (1, 2**8 - 1, 2**16 - 1, 2**32 - 1)  # what white may be where a file's numbers are no bytes


def prepare(
    path: Path, *, image_size: tuple[int, int], polarity: Polarity, is_centred: bool, as_is: bool = False
) -> Array:
    """An image file as pixels (1, 1, height, width), whole 255ths from 0 to 1.

    Args:
        polarity: that the model takes.
        is_centred: whether the model is of digits like MNIST's, which are centred.
        as_is: the image is like the model's already: only make it grey, and resize it.

    Raises:
        UserError: the file is missing, no image, too large, or shows nothing.
    """
    content = read_bytes(path, "there is no image {}")
    with reading(path, "Name another file."):
        grey = read_grey(content)
        if not as_is:
            if np.ptp(grey) < LEAST_CONTRAST:
                raise ValueError("it shows nothing, as all its pixels are nearly alike")
            grey = _light_on_dark(grey)
            grey = fit_ink(grey, image_size) if is_centred else grey
            grey = grey if polarity == "light-on-dark" else 1 - grey
        bytes_HW: Array = np.round(255 * _resize(grey, image_size))
        return bytes_HW[None, None] / np.float32(255)


def read_grey(content: bytes) -> Array:
    """What an image file shows (height, width), upright, 0 black and 1 white; of an animation the first frame.

    What is transparent is light behind dark ink, and dark behind light.

    Raises:
        ValueError: it is no image, or one too large.
        OSError: it is damaged.
    """
    with warnings.catch_warnings(action="ignore"):  # of odd metadata, which does no harm
        try:
            file = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError as error:
            raise ValueError(f"it is no image in {', '.join(FORMATS)}") from error
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width:,} x {file.height:,} pixels are too many")
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_scale(np.asarray(image, np.float64), is_short=image.mode.startswith("I;16")))
    elif image.has_transparency_data:
        image = _without_transparency(image.convert("RGBA"))
    else:
        image = image.convert("L")
    image = image.reduce(max(1, -(-max(image.size) // LARGEST_SIDE)))
    grey = np.asarray(image, np.float32)
    return grey if image.mode == "F" else grey / np.float32(255)


def _scale(numbers: npt.NDArray[np.float64], *, is_short: bool) -> Array:
    """Numbers that are no bytes, by what they go up to: of 16 bits known, else the next that is usual."""
    if not np.isfinite(numbers).all():
        raise ValueError("it holds what is no finite number")
    largest = float(numbers.max())
    top = TOPS[2] if is_short else min((top for top in TOPS if largest <= top), default=largest)
    return (numbers / top).clip(0, 1).astype(np.float32)


def _without_transparency(image: Image.Image) -> Image.Image:
    """On white where what can be seen is darker than the middle, else on black."""
    grey, alpha = np.asarray(image.convert("L"), np.float64), np.asarray(image.getchannel("A"), np.float64)
    is_dark = (grey * alpha).sum() <= 127.5 * alpha.sum()
    return Image.alpha_composite(Image.new("RGBA", image.size, "white" if is_dark else "black"), image).convert("L")


def _light_on_dark(grey: Array) -> Array:
    """Inverted where the outermost pixels are lighter than the middle of the range."""
    middle = (float(grey.min()) + float(grey.max())) / 2
    return 1 - grey if np.median(_outermost(grey)) > middle else grey


def _outermost(grey: Array) -> Array:
    return np.concatenate([grey[0], grey[-1], grey[1:-1, 0], grey[1:-1, -1]])


def fit_ink(grey: Array, image_size: tuple[int, int]) -> Array:
    """A light digit on dark ground, of any size and in any place, as MNIST's are."""
    around = _outermost(grey)
    ground = float(np.median(around))
    full = float(grey.max()) - ground
    ink = ((grey - ground) / full).clip(0, 1)
    noise = float(np.percentile(np.abs(around - ground), 90)) / full
    least = min(max(INK, NOISE * noise), 1 / 2)
    ink = ink[_extent(ink.max(axis=1) > least), _extent(ink.max(axis=0) > least)]
    longest = round(SHARE * min(image_size))
    height, width = (max(1, round(side * longest / max(ink.shape))) for side in ink.shape)
    ink = _resize(ink, (height, width))
    placed = np.zeros(image_size, np.float32)
    top, left = _place(ink.sum(axis=1), image_size[0]), _place(ink.sum(axis=0), image_size[1])
    placed[top : top + height, left : left + width] = ink
    return placed


def _extent(has_ink: npt.NDArray[np.bool_]) -> slice:
    """From the first to the last."""
    found = np.flatnonzero(has_ink)
    return slice(found[0], found[-1] + 1)


def _place(mass: Array, side: int) -> int:
    """Where lines of so much ink begin, so that their centre lies nearest to the middle of a side."""
    centre = float(mass @ np.arange(len(mass)) / mass.sum())
    return min(max(round(side / 2 - centre), 0), side - len(mass))


def _resize(grey: Array, size: tuple[int, int]) -> Array:
    """Bicubic, averaging where it shrinks; of the size that it has it stays the same."""
    if grey.shape == size:
        return grey
    image = Image.fromarray(np.ascontiguousarray(grey, np.float32))
    return np.asarray(image.resize(size[::-1], Image.Resampling.BICUBIC), np.float32).clip(0, 1)
