"""The family of small students: pooled pixels, windows that share their weights, narrow hidden layers."""

import re
from dataclasses import dataclass

from mnist_lab.data import DataSpec
from mnist_lab.errors import UserError
from mnist_lab.models.ffn import FFNConfig, Windows

MAX_LAYERS = 16  # of a kind
MAX_WIDTH = 10_000


@dataclass(frozen=True)
class SmallShape:
    """Of a model from a few hundred to some 100,000 weights."""

    hidden: tuple[int, ...] = ()
    pool: int = 1
    windows: tuple[Windows, ...] = ()

    def __post_init__(self) -> None:
        for option, layers in (("--hidden", self.hidden), ("--windows", self.windows)):
            if len(layers) > MAX_LAYERS:
                raise UserError(f"{option} has {len(layers)} layers; at most {MAX_LAYERS} are allowed")
        numbers = {"--hidden": self.hidden, "--pool": (self.pool,)}
        numbers |= {f"--windows {own.name}:": (own.channels, own.size, own.stride) for own in self.windows}
        for option, values in numbers.items():
            if wrong := [value for value in values if not 1 <= value <= MAX_WIDTH]:
                raise UserError(f"{option} {wrong[0]} must lie between 1 and {MAX_WIDTH:,}")

    @property
    def name(self) -> str:
        """For example `pool2-w8x5s2-w16x3s2-h32`."""
        pool = [f"pool{self.pool}"] if self.pool > 1 else []
        windows = [f"w{own.name}" for own in self.windows]
        return "-".join([*pool, *windows, *(f"h{width}" for width in self.hidden)]) or "linear"

    def config(self, data: DataSpec) -> FFNConfig:
        """Of a model for this data.

        Raises:
            UserError: the shape does not fit its images.
        """
        return FFNConfig(self.hidden, data, pool=self.pool, windows=self.windows)


@dataclass(frozen=True)
class SmallOptions:
    """The shape of a small student, which it becomes as soon as one of these is given."""

    hidden: tuple[int, ...] = ()
    """Widths of a small student's dense hidden layers."""
    pool: int = 1
    """Pixels of a side that become one inside a small student."""
    windows: tuple[str, ...] = ()
    """Layers of a small student that share their weights between windows: channels, x, pixels of a window's side, s,
    pixels from one window to the next, as 8x5s2."""

    def __post_init__(self) -> None:
        self.shape  # noqa: B018

    @property
    def shape(self) -> SmallShape | None:
        """None where none was given."""
        shape = SmallShape(self.hidden, self.pool, tuple(map(parse_windows, self.windows)))
        return None if shape == SmallShape() else shape


def parse_windows(text: str) -> Windows:
    """`8x5s2`: 8 channels of 5 by 5 pixels, one every 2 pixels.

    Raises:
        UserError: the text is no such thing.
    """
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})s(\d{1,9})", text, re.ASCII)
    if found is None:
        raise UserError(f"--windows {text} must be channels, x, size, s and stride, as 8x5s2")
    return Windows(*map(int, found.groups()))


def parse_shape(name: str) -> SmallShape:
    """The shape of that name, as `SmallShape.name` gives it.

    Raises:
        UserError: there is no such shape.
    """
    parts: dict[str, list[str]] = {"pool": [], "w": [], "h": []}
    for part in name.split("-"):
        kind = next((kind for kind in parts if part.startswith(kind)), None)
        if kind is None:
            raise UserError(f"{name} is no shape: {part} must begin with pool, w or h, as in pool2-w8x5s2-h32")
        parts[kind].append(part.removeprefix(kind))
    try:
        (pool,) = map(int, parts["pool"] or ["1"])
        return SmallShape(tuple(map(int, parts["h"])), pool, tuple(map(parse_windows, parts["w"])))
    except ValueError as error:
        raise UserError(f"{name} is no shape as pool2-w8x5s2-h32 is") from error
