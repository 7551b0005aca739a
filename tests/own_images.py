"""Folders of images that the tests draw themselves."""

import random
import string
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Draw = Callable[[ImageDraw.ImageDraw, str, random.Random, tuple[int, int]], None]


def draw_letters(root: Path, *, num_each: int = 20, size: tuple[int, int] = (28, 28)) -> Path:
    """Black capitals on white, each shifted and scaled a little; `size` is width and height."""
    return _draw(root, string.ascii_uppercase, _letter, num_each, size, ground="white")


def draw_shapes(root: Path, *, num_each: int = 60, size: tuple[int, int] = (30, 20)) -> Path:
    """Light circles, squares and triangles on black."""
    return _draw(root, ("circle", "square", "triangle"), _shape, num_each, size, ground="black")


def _draw(root: Path, classes: tuple[str, ...] | str, draw: Draw, num: int, size: tuple[int, int], ground: str) -> Path:
    rng = random.Random(0)
    for name in classes:
        folder = root / name
        folder.mkdir(parents=True)
        for place in range(num):
            image = Image.new("L", size, ground)
            draw(ImageDraw.Draw(image), name, rng, size)
            image.save(folder / f"{place}.png")
    return root


def _letter(draw: ImageDraw.ImageDraw, name: str, rng: random.Random, size: tuple[int, int]) -> None:
    place = size[0] / 2 + rng.uniform(-2, 2), size[1] / 2 + rng.uniform(-2, 2)
    font = ImageFont.load_default(rng.uniform(0.65, 0.85) * min(size))
    draw.text(place, name, fill=rng.randint(0, 60), font=font, anchor="mm")


def _shape(draw: ImageDraw.ImageDraw, name: str, rng: random.Random, size: tuple[int, int]) -> None:
    side = rng.randint(9, min(size) - 4)
    left, top = rng.randint(1, size[0] - side - 2), rng.randint(1, size[1] - side - 2)
    box, fill = (left, top, left + side, top + side), rng.randint(180, 255)
    if name == "circle":
        draw.ellipse(box, fill=fill)
    elif name == "square":
        draw.rectangle(box, fill=fill)
    else:
        draw.polygon([(left, top + side), (left + side, top + side), (left + side / 2, top)], fill=fill)
