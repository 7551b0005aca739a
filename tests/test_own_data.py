"""A user's own data: what is read, how it is split, and what is refused in one line."""

import functools
import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from own_images import draw_letters, draw_shapes
from PIL import Image, ImageFile
from test_idx import write_idx

from mnist_lab.command.options import Options
from mnist_lab.data import Augmentation, augment, load_dataset
from mnist_lab.errors import UserError
from mnist_lab.own_data import OwnSource, find_own, find_size, is_filed_name, read_own
from mnist_lab.own_data.folder import digest_folder, find_images, read_folder
from mnist_lab.own_data.images import decode
from mnist_lab.own_data.parts import natural_key
from mnist_lab.own_data.table import read_table
from mnist_lab.sources import MNIST_FILES


def save(path: Path, pixels: np.ndarray | Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def noise(seed: int, height: int = 6, width: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three images each of two classes."""
    for place in range(6):
        save(tmp_path / "set" / "ab"[place % 2] / f"{place}.png", noise(place))
    return tmp_path / "set"


def make_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def assert_read_or_refused(read: Callable[[], object]) -> None:
    """Refused in one line."""
    message = ""
    try:
        read()
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) <= 1


def decoded(path: Path, **options: Any) -> np.ndarray:
    return decode(path.read_bytes(), path, **options).pixels


class TestFolder:
    def test_classes_are_the_folders_in_natural_order(self, tmp_path: Path) -> None:
        for place, name in enumerate(["10", "2", "b", "A", "1"]):
            save(tmp_path / name / "x.png", np.full((5, 7), 10 * place, np.uint8))
        found = read_folder(tmp_path, None)
        assert found.classes == ("1", "2", "10", "A", "b")
        by_class = dict(zip(found.train.labels.tolist(), found.train.pixels[:, 0, 0].tolist(), strict=True))
        assert by_class == {0: 40, 1: 10, 2: 0, 3: 30, 4: 20}

    def test_pixels_are_those_of_the_files(self, small: Path) -> None:
        found = read_folder(small, None)
        assert found.train.pixels.shape == (6, 6, 9)
        for row in range(6):
            path = Path(found.train.name_of(row))
            np.testing.assert_array_equal(found.train.pixels[row], noise(int(path.stem)))
            assert path.parent.name == "ab"[found.train.labels[row]]

    def test_folders_train_and_test_are_a_split(self, tmp_path: Path) -> None:
        for split, seeds in (("train", range(6)), ("test", range(6, 10))):
            for seed in seeds:
                save(tmp_path / split / "ab"[seed % 2] / f"{seed}.png", noise(seed))
        found = read_folder(tmp_path, None)
        assert found.test is not None
        assert (len(found.train.labels), len(found.test.labels)) == (6, 4)
        np.testing.assert_array_equal(found.test.pixels[0], noise(6))

    def test_a_class_of_one_split_alone_is_refused(self, tmp_path: Path) -> None:
        for place in ("train/a", "train/b", "test/a"):
            save(tmp_path / place / "x.png", noise(0))
        with pytest.raises(UserError, match="the class b in only one of train and test"):
            read_folder(tmp_path, None)

    def test_hidden_files_are_passed_over_and_others_named(self, small: Path) -> None:
        (small / "a" / ".DS_Store").write_bytes(b"x")
        (small / ".git").mkdir()
        assert read_folder(small, None).notices == ()
        (small / "a" / "notes.txt").write_text("x")
        (small / "readme.md").write_text("x")
        (notice,) = read_folder(small, None).notices
        assert "2 files or folders" in notice
        assert str(small / "a" / "notes.txt") in notice or str(small / "readme.md") in notice

    def test_links_are_followed(self, small: Path, tmp_path: Path) -> None:
        (small / "c").symlink_to(small / "a")
        save(tmp_path / "elsewhere.png", noise(9))
        (small / "b" / "linked.png").symlink_to(tmp_path / "elsewhere.png")
        assert len(read_folder(small, None).train.labels) == 10

    @pytest.mark.parametrize(
        ("spoil", "says"),
        [
            (lambda root: shutil.rmtree(root / "b"), "the one class a"),
            (lambda root: shutil.rmtree(root), "cannot be read"),
            (lambda root: (root / "empty").mkdir(), "empty holds no image"),
            (lambda root: [*map(shutil.rmtree, root.iterdir())], "no class folders"),
            (lambda root: save(root / "a" / "wide.png", noise(0, 6, 10)), "give --image-size"),
            (lambda root: (root / "a" / "gone.png").symlink_to("nowhere"), "gone.png cannot be read"),
            (lambda root: make_pipe(root / "a" / "pipe.png"), "pipe.png is not a file"),
            (lambda root: (root / "a" / "folder.png").mkdir(), "folder.png is not a file"),
            (lambda root: save(root / "odd\nname" / "x.png", noise(0)), r"'odd\\nname': rename it"),
            (lambda root: save(root / os.fsdecode(b"\xff") / "x.png", noise(0)), "rename it"),
            (lambda root: save(root / ("x" * 101) / "x.png", noise(0)), "rename it"),
            (lambda root: [save(root / str(n) / "x.png", noise(0)) for n in range(257)], "at most 256"),
            (lambda root: (root / "a" / "br\nken.png").write_bytes(b"x"), r"br\\nken.png' is broken"),
        ],
    )
    def test_what_is_refused(self, small: Path, spoil: Callable[[Path], Any], says: str) -> None:
        spoil(small)
        with pytest.raises(UserError, match=says) as error_info:
            read_folder(small, None)
        assert len(str(error_info.value).splitlines()) == 1

    def test_large_and_tiny_images_need_another_size(self, tmp_path: Path) -> None:
        for place, side in enumerate((300, 3)):
            for name in "ab":
                save(tmp_path / str(side) / name / "x.png", noise(place, side, 20))
            with pytest.raises(UserError, match=rf"{side}x20 pixels .*--image-size"):
                read_folder(tmp_path / str(side), None)
            assert read_folder(tmp_path / str(side), (28, 32)).train.pixels.shape == (2, 28, 32)

    def test_too_many_pixels_are_refused_before_memory_is_taken(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mnist_lab.own_data.parts.MAX_PIXELS", 6 * 6 * 9 - 1)
        monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("memory was taken"))
        with pytest.raises(UserError, match="6 images of 6x9 pixels"):
            read_folder(small, None)

    def test_digest_is_of_names_and_content_and_needs_no_decoding(self, small: Path, tmp_path: Path) -> None:
        digest = read_folder(small, None).digest
        assert digest_folder(small) == digest == read_folder(small, (8, 8)).digest
        assert digest_folder(shutil.copytree(small, tmp_path / "copy")) == digest
        (small / "a" / "0.png").rename(small / "a" / "7.png")
        assert digest_folder(small) != digest
        save(small / "a" / "0.png", noise(1))
        (small / "a" / "7.png").unlink()
        assert digest_folder(small) != digest


class TestImages:
    @pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif", "pgm", "webp"])
    def test_grey_values_come_back(self, tmp_path: Path, suffix: str) -> None:
        options = {"lossless": True} if suffix == "webp" else {}
        found = decoded(save(tmp_path / f"x.{suffix}", noise(0), **options))
        np.testing.assert_array_equal(found, noise(0))

    def test_sixteen_bits_become_eight(self, tmp_path: Path) -> None:
        values = np.array([[0, 128, 129, 257], [32_768, 40_000, 65_406, 65_535]], np.uint16)
        for suffix in ("png", "tif"):
            found = decoded(save(tmp_path / f"x.{suffix}", values))
            np.testing.assert_array_equal(found, np.rint(values / 257).astype(np.uint8))

    def test_colour_and_palette_become_grey(self, tmp_path: Path) -> None:
        colours = np.stack([noise(seed) for seed in range(3)], axis=2)
        image = Image.fromarray(colours)
        np.testing.assert_array_equal(decoded(save(tmp_path / "x.png", image)), np.asarray(image.convert("L")))
        palette = image.quantize(16)
        np.testing.assert_array_equal(
            decoded(save(tmp_path / "p.png", palette)), np.asarray(palette.convert("RGB").convert("L"))
        )
        bits = Image.fromarray(noise(0) > 127)
        np.testing.assert_array_equal(decoded(save(tmp_path / "1.png", bits)), 255 * (noise(0) > 127))
        assert decoded(save(tmp_path / "c.jpg", image.convert("CMYK"))).shape == (6, 9)

    def test_a_camera_says_which_way_is_up(self, tmp_path: Path) -> None:
        image = Image.fromarray(noise(0))
        exif = image.getexif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise
        np.testing.assert_array_equal(decoded(save(tmp_path / "x.png", image, exif=exif)), np.rot90(noise(0), -1))

    @pytest.mark.parametrize(("ink", "ground"), [(0, 255), (40, 255), (255, 0)])
    def test_what_is_transparent_gets_the_ground_on_which_the_rest_shows(
        self, tmp_path: Path, ink: int, ground: int
    ) -> None:
        pixels = np.zeros((6, 6, 4), np.uint8)
        pixels[2:4, 2:4] = (ink, ink, ink, 255)
        pixels[2, 2, 3] = 128
        for name in "ab":
            save(tmp_path / name / "x.png", Image.fromarray(pixels, "RGBA"))
        found = read_folder(tmp_path, None).train.pixels[0]
        assert found[0, 0] == ground
        assert found[3, 3] == ink
        assert found[2, 2] == pytest.approx((ink + ground) / 2, abs=1)

    def test_opaque_images_say_what_the_ground_of_the_others_is(self, tmp_path: Path) -> None:
        pixels = np.zeros((6, 6, 4), np.uint8)
        pixels[2:4, 2:4] = 255
        save(tmp_path / "a" / "clear.png", Image.fromarray(pixels, "RGBA"))
        save(tmp_path / "b" / "opaque.png", np.full((6, 6), 230, np.uint8))
        assert read_folder(tmp_path, None).train.pixels[0, 0, 0] == 255

    def test_an_alpha_that_hides_nothing_changes_nothing(self, tmp_path: Path) -> None:
        path = save(tmp_path / "x.png", Image.fromarray(noise(0)).convert("RGBA"))
        assert decode(path.read_bytes(), path).alpha is None
        np.testing.assert_array_equal(decoded(path), noise(0))

    def test_another_size_keeps_the_mean(self, tmp_path: Path) -> None:
        path = save(tmp_path / "x.png", np.kron(noise(0), np.ones((8, 8), np.uint8)))
        found = decoded(path, size=(6, 9))
        assert found.shape == (6, 9)
        assert found.mean() == pytest.approx(noise(0).mean(), abs=3)

    def test_animations_bombs_and_floats_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        frames = [Image.fromarray(noise(seed)) for seed in range(3)]
        for suffix in ("gif", "png", "webp", "tif"):
            path = save(tmp_path / f"moving.{suffix}", frames[0], save_all=True, append_images=frames[1:])
            with pytest.raises(UserError, match=rf"moving.{suffix} holds 3 images"):
                decoded(path)
        with pytest.raises(UserError, match="floating-point"):
            decoded(save(tmp_path / "x.tif", np.zeros((4, 4), np.float32)))
        bombs = {side: save(tmp_path / f"{side}.png", Image.new("1", (side, side))) for side in (9000, 14_000)}
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("memory was taken"))
        with pytest.raises(UserError, match="9000.png has 9,000x9,000 pixels"):
            decoded(bombs[9000])
        with pytest.raises(UserError, match="14000.png"):  # which Pillow refuses itself
            decoded(bombs[14_000])

    @pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif"])
    def test_what_was_cut_off_is_named(self, tmp_path: Path, suffix: str) -> None:
        path = save(tmp_path / f"x.{suffix}", noise(0, 60, 60))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match=rf"x.{suffix} is broken"):
            decoded(path)

    @given(content=st.binary(max_size=200), start=st.sampled_from(["PNG", "BMP", "GIF", "TIFF", "PPM", "WEBP", "JPEG"]))
    def test_any_bytes_are_an_image_or_a_user_error(self, content: bytes, start: str) -> None:
        buffer = io.BytesIO()
        Image.fromarray(noise(0)).save(buffer, start)
        whole = buffer.getvalue()
        place = len(content) * 7 % len(whole)
        for spoilt in (content, whole[:place] + content, whole[:place] + content + whole[place + len(content) :]):
            assert_read_or_refused(functools.partial(decode, spoilt, Path("x.png")))


class TestTable:
    def write(self, folder: Path, text: str | bytes) -> Path:
        path = folder / "x.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    @pytest.mark.parametrize(
        "header",
        ["", "label,pixel1,pixel2\n", "label," + ",".join(map(str, range(16))) + "\n", "\ufefflabel,a\n", "\n\n"],
    )
    def test_lines_are_images_with_or_without_a_header(self, tmp_path: Path, header: str) -> None:
        lines = [f"{name},{','.join(map(str, noise(seed, 4, 4).ravel()))}\n" for seed, name in enumerate("1002")]
        found = read_table(self.write(tmp_path, header + "".join(lines)), None)
        assert found.classes == ("0", "1", "2")
        assert found.train.labels.tolist() == [1, 0, 0, 2]
        np.testing.assert_array_equal(found.train.pixels[3], noise(3, 4, 4))

    def test_labels_may_be_names(self, tmp_path: Path) -> None:
        text = "".join(f'"{name}",{"7," * 15}9\r\n' for name in ("cat, wild", "10", "dog"))
        found = read_table(self.write(tmp_path, text), None)
        assert found.classes == ("10", "cat, wild", "dog")
        assert found.train.name_of(1) == "line 2"

    def test_images_that_are_no_squares_need_their_size(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "".join(f"{n},{','.join(map(str, noise(n, 4, 6).ravel()))}\n" for n in range(2)))
        with pytest.raises(UserError, match="24 pixels an image, which is no square.*--image-size"):
            read_table(path, None)
        np.testing.assert_array_equal(read_table(path, (4, 6)).train.pixels[1], noise(1, 4, 6))

    def test_squares_are_resized(self, tmp_path: Path) -> None:
        path = self.write(tmp_path, "".join(f"{n},{','.join(['9'] * 64)}\n" for n in range(2)))
        assert read_table(path, (10, 12)).train.pixels.shape == (2, 10, 12)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "holds no image"),
            ("label,a,b\n", "holds no image"),
            ("a,{15},1\nb,{14},1\n", "line 2, has 16 cells, and those before 17"),
            ("a,{15},1\nb,{15},x\n", "line 2, cell 17: 'x' is no whole number"),
            ("a,{15},1\nb,{15},nan\n", "'nan' is no whole"),
            ("a,{15},1\nb,{15},inf\n", "'inf' is no whole"),
            ("a,{15},1\nb,{15},\n", "'' is no whole"),
            ("a,{15},1\nb,{15},256\n", "'256' is no whole number from 0 to 255"),
            ("a,{15},1\nb,{15},-1\n", "'-1' is no whole"),
            ("a,{15},1\nb,{15},0.5\n", "'0.5' is no whole"),
            ("a,{15},1\n,{15},1\n", "line 2, has no label"),
            ("a,{15},1\na,{15},1\n", "the one class a"),
            ("a;1;2\nb;1;2\n", "no square|no image|sides"),
            ("a\nb\n", "sides must lie"),
            ("a,{15},1\nb,{15},1\n\x00", "x.csv"),
            (b"a,1\xff\xfe\n", "x.csv is broken"),
            ('a,{15},1\n"b,{15},1\n', "line 2"),
            ("a," + "1," * 10**6 + "1", "longer than any"),
        ],
    )
    def test_what_is_refused(self, tmp_path: Path, text: str | bytes, says: str) -> None:
        if isinstance(text, str):
            text = text.replace("{15}", ",".join("1" * 15)).replace("{14}", ",".join("1" * 14))
        with pytest.raises(UserError, match=says) as error_info:
            read_table(self.write(tmp_path, text), None)
        assert len(str(error_info.value).splitlines()) == 1

    @given(content=st.one_of(st.binary(max_size=80), st.text('ab01259.,-\n" e', max_size=80).map(str.encode)))
    def test_any_bytes_are_images_or_a_user_error(self, content: bytes, tmp_path_factory: Any) -> None:
        path = self.write(tmp_path_factory.mktemp("csv"), content)
        assert_read_or_refused(lambda: read_table(path, None))


class TestIdx:
    def write(self, root: Path, *, size: tuple[int, int] = (5, 7), labels: tuple[int, ...] = (1, 2, 26)) -> Path:
        root.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        for num, (images, of) in zip((90, 30), MNIST_FILES.values(), strict=True):
            write_idx(root / images, rng.integers(0, 256, (num, *size), np.uint8))
            write_idx(root / of, np.resize(np.array(labels, np.uint8), num))
        return root

    def test_classes_are_the_labels_that_there_are(self, tmp_path: Path) -> None:
        dataset = load_dataset(f"idx:{self.write(tmp_path)}")
        assert (dataset.spec.class_names, dataset.spec.image_size) == (("1", "2", "26"), (5, 7))
        assert [len(dataset.train) + len(dataset.validation), len(dataset.load_test())] == [90, 30]
        assert torch.bincount(dataset.load_test().labels).tolist() == [10, 10, 10]
        resized = load_dataset(f"idx:{tmp_path}", image_size=(8, 8))
        assert resized.spec.image_size == (8, 8)
        assert resized.name == f"{dataset.name}-8x8"

    def test_what_is_refused(self, tmp_path: Path) -> None:
        (train_images, train_labels), (test_images, test_labels) = MNIST_FILES.values()
        root = self.write(tmp_path)

        def refuses(says: str) -> None:
            with pytest.raises(UserError, match=says):
                load_dataset(f"idx:{root}")
            self.write(tmp_path)

        write_idx(root / test_labels, np.full(30, 9, np.uint8))
        refuses("the class 1 in only one of train and test")
        write_idx(root / test_images, noise(0, 30, 4).reshape(30, 2, 2))
        refuses("2x2 and 5x7 pixels")
        write_idx(root / train_labels, np.zeros(80, np.uint8))
        refuses("90 images, and there are 80 labels")
        write_idx(root / train_images, noise(0, 90, 35))
        refuses("2 dimensions, not 3")
        (root / train_images).unlink()
        refuses(f"{train_images} cannot be read")
        (root / train_images).rename(root / f"{train_images}.gz")
        refuses("still packed")


class TestDataset:
    def test_letters_become_a_data_set(self, tmp_path: Path) -> None:
        root = draw_letters(tmp_path / "letters", num_each=10)
        dataset = load_dataset(f"folder:{root}")
        test = dataset.load_test()
        assert dataset.spec.class_names == tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
        assert (dataset.spec.image_size, dataset.spec.polarity, dataset.spec.ground) == ((28, 28), "dark-on-light", 1)
        for split, num in ((dataset.train, 7), (dataset.validation, 1), (test, 2)):
            assert torch.bincount(split.labels).tolist() == [num] * 26
            assert split.pixels.dtype == torch.float32
            assert len(split.labels[:26].unique()) > 10  # in no order of classes
        assert dataset.spec.mean == pytest.approx(float(dataset.train.pixels.mean()))
        again = load_dataset(f"folder:{root}")
        assert torch.equal(again.load_test().pixels, test.pixels)
        assert again.fingerprint == dataset.fingerprint

    def test_shapes_are_light_and_not_square(self, tmp_path: Path) -> None:
        spec = load_dataset(f"folder:{draw_shapes(tmp_path / 'shapes')}").spec
        assert (spec.num_classes, spec.image_size, spec.polarity) == (3, (20, 30), "light-on-dark")

    def test_classes_called_as_digits_are_need_no_names(self, tmp_path: Path) -> None:
        for seed in range(120):
            save(tmp_path / str(seed % 3) / f"{seed}.png", noise(seed))
        assert load_dataset(f"folder:{tmp_path}").spec.classes == ()

    def test_it_is_filed_under_its_name_and_content(self, small: Path) -> None:
        for seed in range(6, 130):
            save(small / "ab"[seed % 2] / f"{seed}.png", noise(seed))
        name = load_dataset(f"folder:{small}").name
        assert name.startswith("set-")
        assert name == OwnSource("folder", small).find_name()
        assert load_dataset(f"folder:{small}", image_size=(8, 9)).name == f"{name}-8x9"
        moved = small.rename(small.with_name("Größe & maß/..".split("/")[0]))
        filed = load_dataset(f"folder:{moved}").name
        assert filed == f"Gr_e_ma-{name[-8:]}"
        assert all(map(is_filed_name, (name, filed, f"{name}-8x9")))
        assert [find_size(own) for own in (name, f"{name}-8x9", "mnist")] == [None, (8, 9), None]

    @pytest.mark.parametrize(
        ("name", "filed"), [("日本", "data"), ("...", "data"), ("a" * 300, "a" * 40), ("mnist", "mnist")]
    )
    def test_its_name_suits_any_file_system(self, name: str, filed: str) -> None:
        assert OwnSource("csv", Path(f"/x/{name}.csv")).filed_name("0123456789") == f"{filed}-01234567"

    def test_too_few_images_are_refused(self, small: Path) -> None:
        source = OwnSource("folder", small)
        with pytest.raises(UserError, match="4 images to train on, and at least 20"):
            read_own(source)
        (small / "b" / "1.png").unlink()
        with pytest.raises(UserError, match="too few images of class b, 2: at least 3 are needed, to train, validate"):
            read_own(source)

    def test_copies_are_told(self, tmp_path: Path) -> None:
        for seed in range(120):
            save(tmp_path / "ab"[seed % 2] / f"{seed}.png", noise(seed))
        assert load_dataset(f"folder:{tmp_path}").notice == ""
        for seed in range(0, 120, 2):
            shutil.copy(tmp_path / "a" / f"{seed}.png", tmp_path / "a" / f"{seed}-copy.png")
        shutil.copy(tmp_path / "a" / "0.png", tmp_path / "b" / "0.png")
        notice = load_dataset(f"folder:{tmp_path}").notice
        assert "test images are training images too: " in notice
        assert "images stand under two classes: " in notice
        assert f"{tmp_path / 'a' / '0'}" in notice

    def test_a_test_split_that_is_all_of_the_training_split_is_refused(self, tmp_path: Path) -> None:
        for seed in range(40):
            save(tmp_path / "train" / "ab"[seed % 2] / f"{seed}.png", noise(seed))
        shutil.copytree(tmp_path / "train", tmp_path / "test")
        with pytest.raises(UserError, match="all test images are training images too"):
            load_dataset(f"folder:{tmp_path}")

    def test_options_without_use_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="--data-dir"):
            load_dataset(f"folder:{tmp_path}", tmp_path)
        with pytest.raises(UserError, match="--image-size is for own data"):
            load_dataset("digits", image_size=(32, 32))
        for name in ("", "cifar", "folder", "folder:", "zip:x"):
            with pytest.raises(UserError, match="is none of mnist, .*folder:DIR, idx:DIR, csv:FILE"):
                load_dataset(name)
        for sizes in ((1,), (28, 28, 28), (28, 257)):
            with pytest.raises(UserError, match="--image-size"):
                Options(image_size=sizes)
        assert (Options(image_size=(20,)).height_and_width, Options().height_and_width) == ((20, 20), None)

    def test_a_home_folder_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/there")
        assert find_own("folder:~/x") == ("folder", Path("/there/x"))


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_numbers_in_names_are_in_the_order_of_their_values(numbers: list[int]) -> None:
    names = [f"class {number}" for number in numbers]
    random.Random(0).shuffle(names)
    assert sorted(names, key=natural_key) == [f"class {number}" for number in sorted(numbers)]


def test_augmentation_fills_with_the_ground() -> None:
    white = torch.ones(50, 1, 20, 30)
    strong = Augmentation(rotation_degrees=30, shift_pixels=6)
    moved = augment(white, strong, torch.Generator().manual_seed(0), ground=1.0)
    torch.testing.assert_close(moved, white)
    assert augment(white, strong, torch.Generator().manual_seed(0)).min() == 0


def test_augmentation_turns_images_that_are_not_square_without_bending_them() -> None:
    y, x = torch.meshgrid(torch.arange(24) - 11.5, torch.arange(48) - 23.5, indexing="ij")
    disc = (9 - (x.square() + y.square()).sqrt()).clamp(0, 1).expand(20, 1, 24, 48)
    turning = Augmentation(rotation_degrees=90, shift_pixels=0, scale=0, shear=0, elastic_pixels=0)
    moved = augment(disc, turning, torch.Generator().manual_seed(0))
    assert float((moved - disc).abs().mean()) < 0.01


def test_augmentation_that_is_left_out_shows_in_names_where_the_recipe_has_one() -> None:
    from mnist_lab.experiments.row import departures
    from mnist_lab.training import find_recipe

    for recipe, names in (("standard", ["no-augmentation"]), ("quick", [])):
        options = Options(recipe=recipe, augmentation=False)  # type: ignore[arg-type]
        assert departures(options.make_recipe(), find_recipe(options.recipe, options.preset)) == names


def test_find_images_lists_them_in_natural_order(tmp_path: Path) -> None:
    for name in ("a/10.PNG", "a/9.jpeg", "b/1.png"):
        save(tmp_path / name, noise(0))
    assert [file.path.relative_to(tmp_path).as_posix() for file in find_images(tmp_path).files] == [
        "a/9.jpeg",
        "a/10.PNG",
        "b/1.png",
    ]
