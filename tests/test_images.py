"""Image files become what MNIST's images are, however they were drawn, scanned or stored."""

import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mnist_lab.data import Dataset, Split, load_dataset
from mnist_lab.deploy.images import prepare
from mnist_lab.errors import UserError
from mnist_lab.measure import Array
from mnist_lab.models import PRESETS, build_model
from mnist_lab.training import find_recipe, fit, torch_predictor

SIZE = (28, 28)
GLYPH = ((20, 10), (60, 10), (60, 40), (25, 90))  # a seven, 40 wide and 80 high


def draw(*, scale: float = 1, at: tuple[int, int] = (0, 0), canvas: tuple[int, int] = (200, 150)) -> Image.Image:
    """A black seven on white, antialiased."""
    large = Image.new("L", (4 * canvas[0], 4 * canvas[1]), 255)
    points = [(4 * (scale * x + at[0]), 4 * (scale * y + at[1])) for x, y in GLYPH]
    ImageDraw.Draw(large).line(points, fill=0, width=round(4 * 8 * scale), joint="curve")
    return large.reduce(4)


def save(folder: Path, image: Image.Image, name: str = "x.png", **how: Any) -> Path:
    image.save(folder / name, **how)
    return folder / name


def digit(path: Path, **how: Any) -> Array:
    options: dict[str, Any] = {"image_size": SIZE, "polarity": "light-on-dark", "is_centred": True}
    return prepare(path, **options | how)[0, 0]


def inverted(image: Image.Image) -> Image.Image:
    return Image.fromarray(255 - np.asarray(image))


def on_transparent(image: Image.Image, ink: int) -> Image.Image:
    """The black parts in one shade, the white ones transparent."""
    cut = Image.new("RGBA", image.size, (ink, ink, ink, 0))
    cut.putalpha(inverted(image))
    return cut


def test_digit_fills_20_pixels_and_is_centred_by_its_mass(tmp_path: Path) -> None:
    pixels = digit(save(tmp_path, draw(at=(70, 20))))
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    assert rows[-1] - rows[0] + 1 == 20
    assert 8 <= columns[-1] - columns[0] + 1 <= 12  # its aspect is kept
    assert pixels.max() == 1
    assert np.abs(255 * pixels - np.round(255 * pixels)).max() < 1e-4  # bytes
    assert ((pixels > 0.1) & (pixels < 0.9)).mean() > 0.05  # antialiased
    for axis in (0, 1):
        mass = pixels.sum(axis=axis)
        assert abs(mass @ np.arange(28) / mass.sum() - 14) <= 0.5


@pytest.mark.parametrize("scale", [0.5, 1, 1.5])
@pytest.mark.parametrize("at", [(0, 0), (100, 10)])
def test_size_and_place_do_not_matter(tmp_path: Path, scale: float, at: tuple[int, int]) -> None:
    expected = digit(save(tmp_path, draw(at=(70, 20))))
    found = digit(save(tmp_path, draw(scale=scale, at=at)))
    assert np.abs(found - expected).mean() < 0.03


KINDS = {
    "light on dark": lambda folder, image: save(folder, inverted(image)),
    "JPEG": lambda folder, image: save(folder, image, "x.jpg", quality=75),
    "a palette": lambda folder, image: save(folder, image.convert("P")),
    "two colours": lambda folder, image: save(folder, image.convert("1")),
    "colours": lambda folder, image: save(folder, image.convert("RGB")),
    "CMYK": lambda folder, image: save(folder, image.convert("CMYK"), "x.tif"),
    "16 bits": lambda folder, image: save(folder, Image.fromarray(np.asarray(image, np.uint16) * 257)),
    "32 bits": lambda folder, image: save(folder, Image.fromarray(np.asarray(image, np.int32) * 257), "x.tif"),
    "floats": lambda folder, image: save(folder, Image.fromarray(np.asarray(image, np.float32) / 255), "x.tif"),
    "pale ink": lambda folder, image: save(folder, image.point(lambda value: 100 + value // 2)),
    "dark ink on nothing": lambda folder, image: save(folder, on_transparent(image, 0)),
    "light ink on nothing": lambda folder, image: save(folder, on_transparent(image, 255)),
    "grey and alpha": lambda folder, image: save(folder, on_transparent(image, 0).convert("LA")),
    "large": lambda folder, image: save(folder, image.resize((3000, 2250))),
    "turned": lambda folder, image: save(folder, image.rotate(90, expand=True), "x.jpg", exif=turned()),
}


def turned() -> Image.Exif:
    """To be shown turned to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("kind", KINDS)
def test_kind_of_file_does_not_matter(tmp_path: Path, kind: str) -> None:
    image = draw(at=(70, 20))
    expected = digit(save(tmp_path, image))
    found = digit(KINDS[kind](tmp_path, image))
    assert np.abs(found - expected).mean() < (0.04 if kind == "two colours" else 0.02)


def test_noise_is_no_ink(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 12, (150, 200))
    noisy = Image.fromarray((np.asarray(draw(at=(70, 20))) * 0.6 + 50 + noise).clip(0, 255).astype(np.uint8))
    assert np.abs(digit(save(tmp_path, noisy)) - digit(save(tmp_path, draw(at=(70, 20))))).mean() < 0.04


def test_model_that_takes_dark_on_light_gets_it(tmp_path: Path) -> None:
    path = save(tmp_path, draw())
    np.testing.assert_allclose(digit(path, polarity="dark-on-light"), 1 - digit(path), atol=1e-6)


def test_other_data_is_neither_cropped_nor_centred(tmp_path: Path) -> None:
    grey = np.zeros((56, 56), np.uint8)
    grey[4:12, 8:40] = 200
    expected = np.zeros(SIZE)
    expected[2:6, 4:20] = 200 / 255
    for image in (grey, 255 - grey):
        found = digit(save(tmp_path, Image.fromarray(image)), is_centred=False)
        np.testing.assert_allclose(found, expected, atol=0.15)
    as_it_is = digit(save(tmp_path, Image.fromarray(255 - grey)), is_centred=False, as_is=True)
    np.testing.assert_allclose(as_it_is, 1 - expected, atol=0.15)


@pytest.fixture(scope="module")
def mnist(mnist_dir: Path) -> Dataset:
    return load_dataset("mnist", mnist_dir)


@pytest.mark.slow
def test_images_of_mnist_come_back(mnist: Dataset, tmp_path: Path) -> None:
    images = mnist.load_test().pixels[:100, 0].numpy()
    gaps = []
    for image in images:
        found = digit(save(tmp_path, Image.fromarray(255 - np.round(255 * image).astype(np.uint8))))
        gaps.append(np.abs(found - image).max())
    assert (np.array(gaps) < 0.01).mean() > 0.7  # of the others the faintest line is cut off


@pytest.mark.slow
def test_digits_of_mnist_are_recognised_when_they_are_redrawn(mnist: Dataset, tmp_path: Path) -> None:
    few = replace(mnist, train=Split(*(part[:20_000] for part in mnist.train)))
    model = build_model(PRESETS["compact"].student(mnist.spec))
    fit(model, few, replace(find_recipe("quick", "compact"), epochs=2), seed=0)
    pixels, labels = mnist.load_test().numpy()
    pixels, labels = pixels[:200], labels[:200]
    generator, redrawn = np.random.default_rng(0), []
    for number, image in enumerate(pixels[:, 0]):
        side = int(generator.integers(28, 121))
        black = Image.fromarray(255 - np.round(255 * image).astype(np.uint8))
        sheet = Image.new("L", (200, 150), 255)
        place = int(generator.integers(0, 201 - side)), int(generator.integers(0, 151 - side))
        sheet.paste(black.resize((side, side), Image.Resampling.BICUBIC), place)
        redrawn.append(digit(save(tmp_path, sheet, f"x.{'jpg' if number % 2 else 'png'}")))
    run = torch_predictor(model.eval())
    as_they_are, found = (run(images).argmax(axis=1) == labels for images in (pixels, np.stack(redrawn)[:, None]))
    assert as_they_are.mean() > 0.93
    assert found.mean() >= as_they_are.mean() - 0.02


def bad(folder: Path, kind: str) -> Path:
    path = folder / "x.png"
    photo, program = io.BytesIO(), io.BytesIO()
    draw().save(photo, "JPEG")
    draw().save(program, "EPS")
    contents = {"empty": b"", "text": b"hello", "cut short": photo.getvalue()[:500], "a program": program.getvalue()}
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "blank":
        save(folder, Image.new("L", (50, 50), 255))
    elif kind == "no numbers":
        save(folder, Image.fromarray(np.full((9, 9), np.nan, np.float32)), "x.png.tif").rename(path)
    elif kind == "too large":
        save(folder, Image.new("1", (13_000, 11_000)))
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "there is no image"),
        ("empty", "no image in PNG"),
        ("text", "no image in PNG"),
        ("cut short", "truncated"),
        ("a program", "no image in PNG"),
        ("a folder", "is not a file"),
        ("a pipe", "is not a file"),
        ("blank", "shows nothing"),
        ("no numbers", "no finite number"),
        ("too large", "pixels"),
    ],
)
def test_what_is_no_image_is_the_users_error(tmp_path: Path, kind: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        digit(bad(tmp_path, kind))
    assert "x.png" in str(caught.value)
    assert "\n" not in str(caught.value)
