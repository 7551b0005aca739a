"""How a classifier that was made elsewhere takes images: which axis is which, and what numbers pixels are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from mnist_lab.errors import UserError
from mnist_lab.measure import Array

Layout = Literal["nchw", "nhwc", "nhw", "flat"]
LAYOUTS: dict[int, tuple[Layout, ...]] = {2: ("flat",), 3: ("nhw",), 4: ("nchw", "nhwc")}  # by number of axes
CHANNELS: dict[Layout, int] = {"nchw": 1, "nhwc": 3}  # the axis
TYPES: dict[int, Any] = {TensorProto.FLOAT: np.float32, TensorProto.UINT8: np.uint8}
Dims = Sequence[int | None]


@dataclass(frozen=True)
class Preparation:
    """What a model takes pixels as, where its file does not say so."""

    layout: Layout | None = None
    """Axes of its input: images N, channels C, height H, width W; or flat, N rows of pixels. When not given, by its
    shape."""
    scale: Literal[1, 255] | None = None
    """White: 1 or 255, black is 0. When not given, 255 of bytes and 1 of floats."""
    mean: tuple[float, ...] = (0.0,)
    """What is subtracted from pixels after that, one number or one a channel, and"""
    std: tuple[float, ...] = (1.0,)
    """what they are divided by then."""

    def __post_init__(self) -> None:
        for name, values in (("--mean", self.mean), ("--std", self.std)):
            if len(values) not in {1, 3} or not all(map(math.isfinite, values)):
                raise UserError(f"{name} {_listed(values)} must be one number, or three for three channels")
        if min(self.std) <= 0:
            raise UserError(f"--std {_listed(self.std)} must be above 0")

    @property
    def is_normalised(self) -> bool:
        return self.mean != (0.0,) or self.std != (1.0,)


@dataclass(frozen=True)
class ImageInput:
    """A model's input for images of a known size."""

    name: str
    dtype: type[np.float32] | type[np.uint8]
    size: tuple[int, int]  # height, width
    shape: tuple[int, ...]  # of one image, as the model takes it
    layout: Layout
    channels: int
    scale: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def prepare(self, pixels: Array) -> npt.NDArray[Any]:
        """Pixels (N, 1, height, width) in [0, 1] as the model takes them; grey ones in each of its channels."""
        images = np.repeat(pixels * np.float32(self.scale), self.channels, axis=1)
        if self.dtype is np.uint8:
            images = np.rint(images)
        else:
            images = (images - _by_channel(self.mean)) / _by_channel(self.std)
        if self.layout == "nhwc":
            images = images.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(images.reshape(len(pixels), *self.shape), self.dtype)


def _by_channel(values: tuple[float, ...]) -> Array:
    return np.array(values, np.float32).reshape(1, -1, 1, 1)


def describe_input(
    value: onnx.ValueInfoProto, preparation: Preparation, *, image_size: tuple[int, int]
) -> tuple[ImageInput, list[str]]:
    """What a graph's input is, and what was assumed of it, a line each.

    Raises:
        ValueError: it takes no images, or none of that size, or not as the user says.
    """
    tensor = value.type.tensor_type
    dims = dims_of(value)
    if not value.type.HasField("tensor_type") or dims is None or tensor.elem_type not in TYPES:
        kind = TensorProto.DataType.Name(tensor.elem_type).lower() if tensor.elem_type else "no tensor"
        raise ValueError(f"its input {value.name} is {kind} {format_shape(dims)}, not float or uint8 images")
    layout = _find_layout(value.name, dims, preparation.layout)
    axis = CHANNELS.get(layout)
    channels = 1 if axis is None else dims[axis] or 1
    if channels not in {1, 3}:
        raise ValueError(f"its input {value.name} {format_shape(dims)} has {channels} channels, not 1 or 3")
    shape = _shape_of_image(layout, channels, image_size)
    if any(own not in {None, size} for own, size in zip(dims[1:], shape, strict=True)):
        raise ValueError(
            f"its images have the shape {format_shape(dims)}, and those of the data set are of "
            f"{image_size[0]}x{image_size[1]} pixels: the sizes differ (--image-size resizes data of one's own)"
        )
    dtype = TYPES[tensor.elem_type]
    scale = _find_scale(dtype, preparation)
    if max(len(preparation.mean), len(preparation.std)) > channels:
        raise ValueError(f"it has one channel: --mean {_listed(preparation.mean)} --std {_listed(preparation.std)}")
    images = ImageInput(
        value.name, dtype, image_size, shape, layout, channels, scale, preparation.mean, preparation.std
    )
    numbers = f"(pixel - {_listed(images.mean)}) / {_listed(images.std)}, " if preparation.is_normalised else ""
    says = [f"its input is read as {layout}, {np.dtype(dtype).name}, {numbers}black 0 and white {scale}"]
    assumed = [name for name, given in (("--layout", preparation.layout), ("--scale", preparation.scale)) if not given]
    if dtype is np.float32 and not preparation.is_normalised:
        assumed.append("--mean and --std")
    if assumed:
        says[0] += f" ({', '.join(assumed)} not given)"
    return images, says


def _find_layout(name: str, dims: Dims, given: Layout | None) -> Layout:
    """By the number of axes; of four, that of channels is the one with 1 or 3 places."""
    possible = LAYOUTS.get(len(dims), ())
    if not possible or given not in {None, *possible}:
        asked = "" if given is None else f" in --layout {given}"
        raise ValueError(f"its input {name} {format_shape(dims)} holds no images{asked}")
    if given is not None:
        return given
    is_last = len(dims) == 4 and dims[3] in {1, 3} and dims[1] not in {1, 3}
    return "nhwc" if is_last else possible[0]


def _shape_of_image(layout: Layout, channels: int, image_size: tuple[int, int]) -> tuple[int, ...]:
    height, width = image_size
    shapes: dict[Layout, tuple[int, ...]] = {
        "nchw": (channels, height, width),
        "nhwc": (height, width, channels),
        "nhw": (height, width),
        "flat": (height * width,),
    }
    return shapes[layout]


def _find_scale(dtype: type[np.generic], preparation: Preparation) -> int:
    if dtype is not np.uint8:
        return preparation.scale or 1
    if preparation.scale == 1 or preparation.is_normalised:
        raise ValueError("its input is uint8, black 0 and white 255: drop --scale 1, --mean and --std")
    return 255


def dims_of(value: onnx.ValueInfoProto) -> list[int | None] | None:
    """Of a tensor, the unknown ones None; None where not even their number is known."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]


def format_shape(dims: Dims | None) -> str:
    """As documentation of models writes it, the first axis being images."""
    if dims is None:
        return "(of any shape)"
    return f"({', '.join('N' if not place else '?' if dim is None else str(dim) for place, dim in enumerate(dims))})"


def _listed(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)
