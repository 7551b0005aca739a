import itertools
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from mnist_lab import data
from mnist_lab.data import Augmentation, augment, calibration_pixels, load_dataset
from mnist_lab.errors import UserError


def rows_as_set(pixels: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in pixels}


def test_digits_have_their_sizes_and_the_contract_of_every_data_set() -> None:
    dataset = load_dataset("digits")
    test = dataset.load_test()
    assert [len(dataset.train), len(dataset.validation), len(test)] == [1257, 180, 360]
    for split in (dataset.train, dataset.validation, test):
        assert split.pixels.shape[1:] == (1, 28, 28)
        assert split.pixels.dtype == torch.float32
        assert split.labels.dtype == torch.int64
        assert split.pixels.min() == 0
        assert 0.9 < split.pixels.max() <= 1


def test_splits_share_no_image() -> None:
    dataset = load_dataset("digits")
    train, validation, test = map(
        rows_as_set, (dataset.train.pixels, dataset.validation.pixels, dataset.load_test().pixels)
    )
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_mean_and_std_are_those_of_the_training_pixels() -> None:
    dataset = load_dataset("digits")
    assert dataset.spec.mean == pytest.approx(dataset.train.pixels.double().mean().item(), abs=1e-7)
    assert dataset.spec.std == pytest.approx(dataset.train.pixels.double().std(unbiased=False).item(), abs=1e-7)


def test_mnist_is_split_the_same_way_every_time(mnist_dir: Path) -> None:
    first, second = load_dataset("mnist", mnist_dir), load_dataset(None, mnist_dir)
    assert second.name == "mnist"
    assert [len(first.train), len(first.validation), len(first.load_test())] == [55_000, 5_000, 10_000]
    assert torch.equal(first.validation.pixels, second.validation.pixels)
    assert first.spec.mean == pytest.approx(0.1307, abs=5e-4)
    assert first.spec.std == pytest.approx(0.3081, abs=5e-4)
    assert torch.bincount(first.load_test().labels).tolist()[:3] == [980, 1135, 1032]


def write_idx(path: Path, array: np.ndarray) -> None:
    """The format of the MNIST files: type, dimensions, sizes, data; all big-endian."""
    kind = {1: 8, 4: 12}[array.dtype.itemsize]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(array.dtype.newbyteorder(">")).tobytes())


@pytest.fixture(params=["fashion-mnist", "kmnist", "qmnist"])
def small_set(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[data.DatasetName, Path]:
    """A data set of 120 + 60 images in torchvision's layout."""
    name: data.DatasetName = request.param
    raw = tmp_path / data.TORCHVISION_CLASSES[name] / "raw"
    rng = np.random.default_rng(0)
    for file in itertools.chain(*data._files(name).values()):
        num_images = 120 if "train" in file else 60
        if "images" in file:
            write_idx(raw / file, rng.integers(0, 256, (num_images, 28, 28), np.uint8))
        elif name == "qmnist":  # eight numbers an image, the first of which is its class
            write_idx(raw / file, np.arange(num_images * 8, dtype=np.int32).reshape(-1, 8) // 8 % 10)
        else:
            write_idx(raw / file, (np.arange(num_images) % 10).astype(np.uint8))
    return name, tmp_path


def test_other_sets_of_torchvision_are_read(small_set: tuple[data.DatasetName, Path]) -> None:
    dataset = load_dataset(*small_set)
    test = dataset.load_test()
    assert [len(dataset.train), len(dataset.validation), len(test)] == [110, 10, 60]
    assert test.labels.tolist() == [index % 10 for index in range(60)]
    assert sorted(torch.cat([dataset.train.labels, dataset.validation.labels]).tolist()) == sorted([*range(10)] * 12)


def test_qmnist_is_tested_on_the_first_10_000_of_its_60_000(tmp_path: Path) -> None:
    raw = tmp_path / "QMNIST" / "raw"
    for (images, labels), num_images in zip(data.QMNIST_FILES.values(), (12, 10_003), strict=True):
        write_idx(raw / images, np.ones((num_images, 28, 28), np.uint8))
        write_idx(raw / labels, np.repeat(np.arange(num_images, dtype=np.int32) // 10_000, 8).reshape(-1, 8))
    test = load_dataset("qmnist", tmp_path).load_test()
    assert len(test) == 10_000
    assert test.labels.max() == 0


def test_labels_of_another_split_are_found(small_set: tuple[data.DatasetName, Path]) -> None:
    name, root = small_set
    raw = root / data.TORCHVISION_CLASSES[name] / "raw"
    train, test = (next(raw.glob(f"*{split}*labels*")) for split in ("train", "t*k" if name != "qmnist" else "test"))
    shutil.copyfile(test, train)
    with pytest.raises(UserError, match="120 train images of 28x28, 60 labels"):
        load_dataset(name, root)


def test_missing_folder_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_dataset("mnist", tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["truncate", "remove", "replace"])
def test_damaged_file_is_named(tmp_path: Path, mnist_dir: Path, damage: str) -> None:
    shutil.copytree(mnist_dir / "MNIST", tmp_path / "MNIST", copy_function=shutil.copyfile)
    victim = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    if damage == "truncate":
        with victim.open("rb+") as file:
            file.truncate(1_000_000)
    elif damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(b"hello")
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte"):
        load_dataset(None, tmp_path)


def test_folder_of_the_environment_counts_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIST_LAB_DATA", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="gone"):
        load_dataset()


class TestWithoutNetwork:
    @pytest.fixture(autouse=True)
    def no_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MNIST_LAB_DATA", raising=False)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torchvision.datasets.MNIST, "download", self.leave_folders_and_fail)

    @staticmethod
    def leave_folders_and_fail(dataset: object) -> None:
        Path(dataset.raw_folder).mkdir(parents=True)  # type: ignore[attr-defined]
        raise RuntimeError("no mirror")

    def test_unnamed_data_set_becomes_digits_with_a_notice(self) -> None:
        dataset = load_dataset()
        assert dataset.name == "digits"
        assert "MNIST" in dataset.notice
        assert "--data-dir" in dataset.notice

    def test_named_data_set_is_an_error(self) -> None:
        with pytest.raises(UserError, match="cannot be downloaded"):
            load_dataset("mnist")

    def test_failed_download_leaves_nothing(self, tmp_path: Path) -> None:
        load_dataset()
        assert list(tmp_path.iterdir()) == []


def test_augmentation_of_no_range_changes_nothing() -> None:
    pixels = torch.rand(5, 1, 28, 28)
    still = Augmentation(rotation_degrees=0, shift_pixels=0, scale=0, shear=0, elastic_pixels=0)
    torch.testing.assert_close(augment(pixels, still, torch.Generator()), pixels, atol=1e-5, rtol=0)


def test_augmentation_moves_each_image_its_own_way_and_repeats_with_its_seed() -> None:
    pixels = load_dataset("digits").train.pixels[:1].repeat(8, 1, 1, 1)
    once = augment(pixels, Augmentation(), torch.Generator().manual_seed(1))
    again = augment(pixels, Augmentation(), torch.Generator().manual_seed(1))
    assert torch.equal(once, again)
    assert len(rows_as_set(once)) == 8
    assert once.min() >= 0
    assert once.max() <= 1


def test_elastic_map_is_a_smoothed_grid_on_top_of_the_affine_one() -> None:
    pixels, count = load_dataset("digits").train.pixels[:4], 4
    still = Augmentation(rotation_degrees=0, shift_pixels=0, scale=0, shear=0, elastic_pixels=1.5)
    generator = torch.Generator().manual_seed(0)
    torch.rand(count * 6, generator=generator)  # what the affine map draws
    coarse = torch.randn(count, 2, 6, 6, generator=generator) * 1.5 * 2 / 28
    smooth = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bicubic", align_corners=False)
    identity = torch.nn.functional.affine_grid(torch.eye(2, 3).repeat(count, 1, 1), [count, 1, 28, 28], False)
    expected = torch.nn.functional.grid_sample(pixels, identity + smooth.permute(0, 2, 3, 1), align_corners=False)
    moved = augment(pixels, still, torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved, expected, atol=1e-4, rtol=0)
    assert (moved - pixels).abs().max() > 0.1


def test_augmentation_shifts_by_whole_pixels() -> None:
    pixels = torch.zeros(200, 1, 28, 28)
    pixels[:, :, 14, 14] = 1
    moved = augment(
        pixels,
        Augmentation(rotation_degrees=0, shift_pixels=3, scale=0, shear=0, elastic_pixels=0),
        torch.Generator().manual_seed(0),
    )
    rows = (moved.sum(dim=(1, 3)) * torch.arange(28)).sum(dim=1) - 14
    assert rows.abs().max() <= 3.001
    assert rows.min() < -2
    assert rows.max() > 2


def test_calibration_takes_training_images_only() -> None:
    dataset = load_dataset("digits")
    chosen = calibration_pixels(dataset.train, 50, seed=0)
    assert len(rows_as_set(chosen) & rows_as_set(dataset.train.pixels)) == len(rows_as_set(chosen))
    with pytest.raises(UserError, match="1257|1,257"):
        calibration_pixels(dataset.train, 1258, seed=0)
