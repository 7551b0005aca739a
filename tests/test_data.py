import functools
import gzip
import hashlib
import http.server
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torchvision
from test_idx import write_idx, write_sparse_idx

from mnist_lab import data, sources
from mnist_lab.data import Augmentation, DataSpec, Split, augment, calibration_pixels, load_dataset
from mnist_lab.errors import UserError
from mnist_lab.sources import DatasetName


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


def test_settings_are_those_of_before_where_nothing_departs_from_mnist() -> None:
    spec = DataSpec(10, (28, 28), 0.13, 0.31)
    assert spec.settings == {"num_classes": 10, "image_size": (28, 28), "mean": 0.13, "std": 0.31}
    named = replace(spec, num_classes=2, classes=("cat", "dog"), polarity="dark-on-light")
    assert named.settings == spec.settings | {
        "num_classes": 2,
        "classes": ("cat", "dog"),
        "polarity": "dark-on-light",
    }
    assert (spec.class_names[3], named.class_names) == ("3", ("cat", "dog"))
    with pytest.raises(ValueError, match="2 names are not of 3 classes"):
        replace(named, num_classes=3)


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


NAMES: tuple[DatasetName, ...] = ("mnist", "fashion-mnist", "kmnist", "qmnist")


def raw_folder(name: DatasetName, root: Path) -> Path:
    return root / sources.TORCHVISION_CLASSES[name] / "raw"


def file_of(name: DatasetName, root: Path, split: sources.SplitName, kind: Literal["images", "labels"]) -> Path:
    return raw_folder(name, root) / sources._files(name)[split][kind == "labels"]


def write_labels(name: DatasetName, root: Path, split: sources.SplitName, labels: np.ndarray) -> None:
    if name == "qmnist":  # eight numbers an image, the first of which is its class
        write_idx(
            file_of(name, root, split, "labels"),
            np.pad(labels.astype(np.int32)[:, None], ((0, 0), (0, 7)), constant_values=99),
        )
    else:
        write_idx(file_of(name, root, split, "labels"), labels.astype(np.uint8))


def write_split(name: DatasetName, root: Path, split: sources.SplitName, num_images: int) -> None:
    """A few random images, then black ones; labels from 0 to 9 in turn."""
    start = np.random.default_rng(num_images).integers(0, 256, min(num_images, 200) * 28 * 28, np.uint8)
    write_sparse_idx(file_of(name, root, split, "images"), (num_images, 28, 28), start.tobytes())
    write_labels(name, root, split, np.arange(num_images) % 10)


def write_set(name: DatasetName, root: Path, *, num_train: int = 120, num_test: int = 60) -> None:
    """A data set in torchvision's layout."""
    write_split(name, root, "train", num_train)
    write_split(name, root, "test", num_test)


@pytest.fixture(params=NAMES)
def small_set(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[DatasetName, Path]:
    """A data set of 120 + 60 images."""
    write_set(request.param, tmp_path)
    return request.param, tmp_path


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder that holds 120 + 60 images under the name of MNIST."""
    write_set("mnist", tmp_path)
    return tmp_path


def test_other_sets_of_torchvision_are_read(small_set: tuple[DatasetName, Path]) -> None:
    dataset = load_dataset(*small_set)
    test = dataset.load_test()
    assert [len(dataset.train), len(dataset.validation), len(test)] == [110, 10, 60]
    assert test.labels.tolist() == [index % 10 for index in range(60)]
    assert sorted(torch.cat([dataset.train.labels, dataset.validation.labels]).tolist()) == sorted([*range(10)] * 12)


def test_six_hundred_images_are_enough(tmp_path: Path) -> None:
    write_set("mnist", tmp_path, num_train=600, num_test=100)
    dataset = load_dataset("mnist", tmp_path)
    assert [len(dataset.train), len(dataset.validation), len(dataset.load_test())] == [550, 50, 100]


def test_no_file_is_mapped_which_some_file_systems_refuse(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(np, "memmap", refuse)
    assert len(load_dataset("mnist", mnist).load_test()) == 60


def test_test_images_are_read_by_load_test_alone(mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    fromfile = np.fromfile

    def note_and_read(path: Path, *args: Any, **options: Any) -> np.ndarray:
        read.append(path.name)
        return fromfile(path, *args, **options)

    monkeypatch.setattr(np, "fromfile", note_and_read)
    dataset = load_dataset("mnist", mnist)
    assert "t10k-images-idx3-ubyte" not in read
    read.clear()
    dataset.load_test()
    assert read == ["t10k-images-idx3-ubyte"]


class TestLabels:
    def test_number_of_classes_does_not_depend_on_those_that_occur(self, mnist: Path) -> None:
        write_labels("mnist", mnist, "train", np.arange(120) % 3)
        assert load_dataset("mnist", mnist).spec.num_classes == 10

    @pytest.mark.parametrize("split", ["train", "test"])
    @pytest.mark.parametrize("label", [10, 25, -1])
    def test_what_is_no_class_is_found_before_the_work(
        self, small_set: tuple[DatasetName, Path], split: sources.SplitName, label: int
    ) -> None:
        name, root = small_set
        labels = np.arange(120 if split == "train" else 60) % 10
        labels[7] = label
        write_labels(name, root, split, labels)
        file = file_of(name, root, split, "labels").name
        found = label if name == "qmnist" else label % 256
        with pytest.raises(UserError, match=f"{file} is .* the label {found}, and the classes are 0 to 9"):
            load_dataset(name, root)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_one_class_alone_teaches_nothing(
        self, small_set: tuple[DatasetName, Path], split: sources.SplitName
    ) -> None:
        name, root = small_set
        write_labels(name, root, split, np.full(120 if split == "train" else 60, 4))
        with pytest.raises(UserError, match=f"{file_of(name, root, split, 'labels').name} .*every label is 4"):
            load_dataset(name, root)

    def test_those_of_another_split_are_found(self, small_set: tuple[DatasetName, Path]) -> None:
        name, root = small_set
        shutil.copyfile(file_of(name, root, "test", "labels"), file_of(name, root, "train", "labels"))
        with pytest.raises(UserError, match="train-images.* has 120 images, .*train-labels.* 60 labels"):
            load_dataset(name, root)


class TestSizes:
    @pytest.mark.parametrize(("num_train", "num_test", "fewest"), [(3, 3, 3), (19, 19, 19), (120, 19, 19)])
    def test_too_few_images(self, tmp_path: Path, num_train: int, num_test: int, fewest: int) -> None:
        write_set("mnist", tmp_path, num_train=num_train, num_test=num_test)
        with pytest.raises(UserError, match=f"images-idx3-ubyte has {fewest} images, and must have 20 to"):
            load_dataset("mnist", tmp_path)

    def test_fewest_images(self, tmp_path: Path) -> None:
        write_set("mnist", tmp_path, num_train=20, num_test=20)
        dataset = load_dataset("mnist", tmp_path)
        assert [len(dataset.train), len(dataset.validation), len(dataset.load_test())] == [18, 2, 20]

    def test_training_and_test_files_are_exchanged(self, tmp_path: Path) -> None:
        write_set("mnist", tmp_path, num_train=10_000, num_test=60_000)
        with pytest.raises(UserError, match="10,000 training and 60,000 test images.* exchanged"):
            load_dataset("mnist", tmp_path)

    def test_few_training_images_may_be_tested_on_many(self, tmp_path: Path) -> None:
        write_set("mnist", tmp_path, num_train=600, num_test=10_000)
        assert len(load_dataset("mnist", tmp_path).load_test()) == 10_000

    @pytest.mark.parametrize(("name", "num_test"), [("mnist", 10_001), ("mnist", 60_000), ("qmnist", 10_001)])
    def test_too_many_test_images_are_not_cut_in_silence(
        self, tmp_path: Path, name: DatasetName, num_test: int
    ) -> None:
        write_set(name, tmp_path, num_train=60_000, num_test=num_test)
        with pytest.raises(UserError, match=f"{num_test:,} test images, of which there are 10,000 at most"):
            load_dataset(name, tmp_path)

    def test_qmnist_is_tested_on_the_first_10_000_of_its_60_000(self, tmp_path: Path) -> None:
        write_set("qmnist", tmp_path, num_train=10_000, num_test=60_000)
        write_labels("qmnist", tmp_path, "test", np.arange(60_000) // 5_000 % 10)
        test = load_dataset("qmnist", tmp_path).load_test()
        assert len(test) == 10_000
        assert test.labels.unique().tolist() == [0, 1]

    def test_huge_images_are_refused_before_memory_is_taken(self, mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_sparse_idx(file_of("mnist", mnist, "train", "images"), (60_000, 10_000, 10_000))
        monkeypatch.delattr(np, "fromfile")
        with pytest.raises(UserError, match="it holds 60000x10000x10000 values .* not Nx28x28"):
            load_dataset("mnist", mnist)


@pytest.mark.parametrize("value", [0, 7])
def test_constant_images_show_nothing(mnist: Path, value: int) -> None:
    write_idx(file_of("mnist", mnist, "test", "images"), np.full((60, 28, 28), value, np.uint8))
    dataset = load_dataset("mnist", mnist)
    with pytest.raises(UserError, match=f"every pixel of mnist's test images is {value}"):
        dataset.load_test()
    write_idx(file_of("mnist", mnist, "train", "images"), np.full((120, 28, 28), value, np.uint8))
    with pytest.raises(UserError, match=f"every pixel of mnist's training images is {value}"):
        load_dataset("mnist", mnist)


class TestFolder:
    @pytest.fixture(autouse=True)
    def no_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("MNIST_LAB_DATA", raising=False)

    def test_missing_one_is_the_users_error(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="--data-dir .*nowhere: .* does not exist. To get MNIST"):
            load_dataset("mnist", tmp_path / "nowhere")

    def test_that_of_the_environment_counts_as_given_and_is_said_to_be_its(
        self, mnist: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MNIST_LAB_DATA", str(mnist))
        assert load_dataset().name == "mnist"
        monkeypatch.setenv("MNIST_LAB_DATA", str(mnist / "gone"))
        with pytest.raises(UserError, match="^MNIST_LAB_DATA=.*gone: "):
            load_dataset()

    @pytest.mark.parametrize("by", ["variable", "option"])
    def test_tilde_is_the_home_folder(self, mnist: Path, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(folder: str) -> data.Dataset:
            if by == "option":
                return load_dataset("mnist", Path(folder))
            monkeypatch.setenv("MNIST_LAB_DATA", folder)
            return load_dataset("mnist")

        monkeypatch.setenv("HOME", str(mnist.parent))
        assert len(load(f"~/{mnist.name}").train) == 110
        with pytest.raises(UserError, match="~nosuchuser/data: ~nosuchuser is no user's home folder"):
            load("~nosuchuser/data")

    @pytest.mark.parametrize("below", ["MNIST", "MNIST/raw"])
    def test_one_that_is_too_deep(self, mnist: Path, below: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UserError, match=f"lie in {mnist}/MNIST/raw: name the folder {mnist} instead"):
            load_dataset("mnist", mnist / below)
        monkeypatch.chdir(mnist / below)
        with pytest.raises(UserError, match=f"name the folder {mnist} instead"):
            load_dataset("mnist", Path())

    def test_files_at_another_place(self, mnist: Path, tmp_path: Path) -> None:
        shutil.move(mnist / "MNIST" / "raw", tmp_path / "flat")
        with pytest.raises(UserError, match=f"lie in {tmp_path}/flat: move them to {tmp_path}/flat/MNIST/raw"):
            load_dataset("mnist", tmp_path / "flat")

    @pytest.mark.parametrize("which", ["all", "one"])
    def test_files_that_are_still_packed(self, small_set: tuple[DatasetName, Path], which: str) -> None:
        name, root = small_set
        for file in sorted(raw_folder(name, root).iterdir())[: None if which == "all" else 1]:
            file.rename(f"{file}.gz")
        with pytest.raises(UserError, match=f"ubyte.gz is still packed. Unpack it: gunzip -k {root}/.*/raw/\\*.gz"):
            load_dataset(name, root)

    def test_packed_files_beside_the_unpacked_are_no_reason(self, mnist: Path) -> None:
        for file in sorted((mnist / "MNIST" / "raw").iterdir()):
            shutil.copyfile(file, f"{file}.gz")
        assert load_dataset("mnist", mnist).name == "mnist"
        file_of("mnist", mnist, "train", "images").with_name("train-images-idx3-ubyte.gz").unlink()
        file_of("mnist", mnist, "train", "images").unlink()
        with pytest.raises(UserError, match="train-images-idx3-ubyte does not exist. To get MNIST"):
            load_dataset("mnist", mnist)

    @pytest.mark.parametrize("suffix", ["", ".gz"])
    def test_names_with_a_dot(self, mnist: Path, suffix: str) -> None:
        for file in sorted((mnist / "MNIST" / "raw").iterdir()):
            file.rename(file.with_name(file.name.replace("-idx", ".idx") + suffix))
        says = "still packed" if suffix else "rename it to train-images-idx3-ubyte"
        with pytest.raises(UserError, match=f"train-images.idx3-ubyte{suffix} .*{says}"):
            load_dataset("mnist", mnist)

    def test_one_that_may_not_be_searched(self, mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.forbid(mnist / "MNIST", monkeypatch)
        with pytest.raises(UserError, match="train-images-idx3-ubyte cannot be read: Permission denied$"):
            load_dataset("mnist", mnist)

    def test_advice_looks_into_no_folder_that_may_not_be_read(
        self, mnist: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.forbid(mnist / "MNIST", monkeypatch)
        with pytest.raises(UserError, match="does not exist. To get FashionMNIST"):
            load_dataset("fashion-mnist", mnist)

    @staticmethod
    def forbid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As for a user who is not root, below a folder without permissions."""

        def refuse_below(call: Callable[..., Any]) -> Callable[..., Any]:
            def checked(path: Path, *args: Any, **options: Any) -> Any:
                if folder in path.parents:
                    raise PermissionError(13, "Permission denied", str(path))
                return call(path, *args, **options)

            return checked

        for name in ("stat", "open", "iterdir"):
            monkeypatch.setattr(Path, name, refuse_below(getattr(Path, name)))

    @pytest.mark.parametrize("damage", ["truncate", "remove", "replace", "folder"])
    def test_damaged_file_is_named(self, mnist: Path, damage: str) -> None:
        victim = file_of("mnist", mnist, "test", "images")
        content = victim.read_bytes()
        victim.unlink()
        if damage == "truncate":
            victim.write_bytes(content[:1000])
        elif damage == "replace":
            victim.write_bytes(b"hello")
        elif damage == "folder":
            victim.mkdir()
        with pytest.raises(UserError, match="t10k-images-idx3-ubyte"):
            load_dataset(None, mnist)


class TestFingerprint:
    def test_same_data_have_the_same(self, mnist: Path) -> None:
        first, second = load_dataset("mnist", mnist), load_dataset(None, mnist)
        assert "fingerprint" not in vars(first)
        assert first.fingerprint == second.fingerprint
        assert len(bytes.fromhex(first.fingerprint)) == 32
        assert vars(first)["fingerprint"] == first.fingerprint  # kept

    def test_it_is_that_of_the_bytes(self, mnist: Path) -> None:
        dataset = load_dataset("mnist", mnist)
        digest = hashlib.sha256()
        for split in (dataset.train, dataset.validation):
            digest.update(bytes(round(pixel * 255) for pixel in split.pixels.flatten().tolist()))
            digest.update(np.array(split.labels.tolist(), np.int64).tobytes())
        assert dataset.fingerprint == digest.hexdigest()

    @pytest.mark.parametrize("role", ["train", "validation"])
    def test_each_pixel_and_label_counts(self, mnist: Path, role: Literal["train", "validation"]) -> None:
        dataset = load_dataset("mnist", mnist)
        split: Split = getattr(dataset, role)
        brighter, relabelled = split.pixels.clone(), split.labels.clone()
        brighter[3, 0, 5, 5] += 1 / 255 if brighter[3, 0, 5, 5] < 1 else -1 / 255
        relabelled[3] = (relabelled[3] + 1) % 10
        others = (Split(brighter, split.labels), Split(split.pixels, relabelled))
        for other in others:
            changed = replace(dataset, train=other) if role == "train" else replace(dataset, validation=other)
            assert changed.fingerprint != dataset.fingerprint

    def test_test_split_does_not_count_and_is_not_read(self, mnist: Path) -> None:
        dataset = load_dataset("mnist", mnist)
        file_of("mnist", mnist, "test", "images").unlink()
        assert len(dataset.fingerprint) == 64


class Mirror:
    """A server of this machine that torchvision takes for the one of MNIST."""

    def __init__(self, folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        self.serve()

    def serve(self, num_labels: int = 60) -> None:
        write_set("mnist", self.folder)
        write_labels("mnist", self.folder, "test", np.arange(num_labels) % 10)
        resources = []
        for file in sorted((self.folder / "MNIST" / "raw").iterdir()):
            packed = gzip.compress(file.read_bytes())
            (self.folder / f"{file.name}.gz").write_bytes(packed)
            resources.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))
        self.monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)

    def close(self) -> None:
        for packed in self.folder.glob("*.gz"):
            packed.unlink()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    folder = tmp_path / "mirror"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield Mirror(folder, f"http://127.0.0.1:{server.server_port}/", monkeypatch)
        server.shutdown()


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


WHOLE = sorted(f"data/MNIST/raw/{file}" for files in sources.MNIST_FILES.values() for file in files)


@pytest.mark.usefixtures("mirror")
class TestDownload:
    @pytest.fixture(autouse=True)
    def here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.delenv("MNIST_LAB_DATA", raising=False)
        monkeypatch.chdir(here)
        return here

    def expect_reason(self, reason: str) -> None:
        """In the notice where no data set was named, and in the error where one was."""
        dataset = load_dataset()
        assert dataset.name == "digits"
        assert reason in dataset.notice
        assert "MNIST is not here and cannot be downloaded (" in dataset.notice
        assert "\n" not in dataset.notice
        with pytest.raises(UserError, match="^--dataset mnist cannot be downloaded .*--dataset digits") as raised:
            load_dataset("mnist")
        assert reason in str(raised.value)
        assert "\n" not in str(raised.value)

    def test_leaves_the_files_and_nothing_else(self, here: Path) -> None:
        dataset = load_dataset()
        assert dataset.name == "mnist"
        assert not dataset.notice
        assert files_below(here) == WHOLE

    def test_is_done_once(self, here: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
        load_dataset()
        mirror.close()
        monkeypatch.setitem(sys.modules, "torchvision", None)
        assert load_dataset("mnist").name == "mnist"

    def test_without_network(self, here: Path, mirror: Mirror) -> None:
        mirror.close()
        self.expect_reason("HTTP Error 404")
        assert "--data-dir" in load_dataset().notice
        assert list(here.iterdir()) == []

    def test_wrong_checksum(self, here: Path, mirror: Mirror) -> None:
        (mirror.folder / "train-images-idx3-ubyte.gz").write_bytes(b"cut off")
        self.expect_reason("File not found or corrupted")
        assert list(here.iterdir()) == []

    def test_files_that_are_not_whole(self, here: Path, mirror: Mirror) -> None:
        mirror.serve(num_labels=59)
        self.expect_reason("what was downloaded is not whole")
        assert list(here.iterdir()) == []

    @pytest.mark.parametrize("failure", ["none", "version"])
    def test_torchvision_that_cannot_be_imported(
        self, here: Path, failure: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if failure == "none":
            monkeypatch.setitem(sys.modules, "torchvision", None)
        else:  # what a torchvision says that was built for another torch
            monkeypatch.delitem(sys.modules, "torchvision")
            (here.parent / "torchvision.py").write_text("raise RuntimeError('torchvision::nms does not exist')")
            monkeypatch.syspath_prepend(here.parent)
        self.expect_reason("torchvision")
        assert list(here.iterdir()) == []

    def test_folder_that_cannot_be_made(self, here: Path) -> None:
        (here / "data").write_text("mine")
        self.expect_reason("File exists: 'data'")
        assert (here / "data").read_text() == "mine"

    def test_folder_that_cannot_be_written(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", "data")

        monkeypatch.setattr(Path, "mkdir", refuse)
        self.expect_reason("Permission denied: 'data'")

    def test_folder_that_cannot_be_read(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (here / "data").mkdir()
        TestFolder.forbid(Path("data"), monkeypatch)
        with pytest.raises(UserError, match="^data/MNIST/raw/.* cannot be read: Permission denied$"):
            load_dataset()

    def test_what_was_there_stays_whether_it_fails_or_not(self, here: Path, mirror: Mirror) -> None:
        old = file_of("mnist", here / "data", "test", "labels")
        write_labels("mnist", here / "data", "test", np.arange(60) % 7)
        content = old.read_bytes()
        (here / "data" / "notes").write_text("mine")
        mirror.close()
        self.expect_reason("HTTP Error 404")
        assert files_below(here) == ["data/MNIST/raw/t10k-labels-idx1-ubyte", "data/notes"]
        mirror.serve()
        assert load_dataset("mnist").load_test().labels.max() == 6
        assert old.read_bytes() == content
        assert files_below(here) == [*WHOLE, "data/notes"]

    def test_an_empty_folder_stays_empty(self, here: Path, mirror: Mirror) -> None:
        (here / "data").mkdir()
        mirror.close()
        self.expect_reason("HTTP Error 404")
        assert list(here.rglob("*")) == [here / "data"]

    def test_packed_files_in_the_folder_need_no_network(self, here: Path, mirror: Mirror) -> None:
        raw = here / "data" / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for packed in mirror.folder.glob("*.gz"):
            shutil.copy(packed, raw)
        mirror.close()
        assert load_dataset().name == "mnist"

    def test_advice_names_what_is_in_the_folder(self, here: Path, mirror: Mirror) -> None:
        raw = here / "data" / "MNIST" / "raw"
        raw.mkdir(parents=True)
        (raw / "train-images-idx3-ubyte.gz").write_bytes(b"of another origin")
        mirror.close()
        self.expect_reason("data/MNIST/raw/train-images-idx3-ubyte.gz is still packed")

    @pytest.mark.parametrize("first_fails", [False, True])
    def test_two_at_once(
        self, here: Path, first_fails: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """The second waits; then it finds the files, or downloads them itself."""
        downloads: list[Path] = []
        may_end = threading.Event()
        download = torchvision.datasets.MNIST.download

        def slow_download(dataset: torchvision.datasets.MNIST) -> None:
            download(dataset)
            downloads.append(dataset.root)
            if len(downloads) == 1:
                assert may_end.wait(20)
                if first_fails:
                    raise RuntimeError("the network went away")

        def until(happened: Callable[[], object]) -> None:
            deadline = time.monotonic() + 20
            while not happened():
                assert time.monotonic() < deadline
                time.sleep(0.01)

        monkeypatch.setattr(torchvision.datasets.MNIST, "download", slow_download)
        with ThreadPoolExecutor() as pool:
            first = pool.submit(load_dataset)
            until(lambda: downloads)
            second = pool.submit(load_dataset)
            until(lambda: "waiting for another process that downloads mnist" in capfd.readouterr().out)
            assert not second.done()
            may_end.set()
            assert first.result().name == ("digits" if first_fails else "mnist")
            assert second.result().name == "mnist"
        assert len(set(downloads)) == 1 + first_fails
        assert files_below(here) == WHOLE


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
