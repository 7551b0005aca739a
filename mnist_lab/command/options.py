"""The options that every training and converting script takes."""

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from mnist_lab.command.entry import DatasetText, Folder
from mnist_lab.errors import UserError
from mnist_lab.machine import usable_cpus
from mnist_lab.models import PresetName
from mnist_lab.own_data.parts import MAX_SIDE, MIN_SIDE
from mnist_lab.training import Recipe, RecipeName, find_recipe

MAX_COUNT = 10**9
MAX_RUN_SEEDS = 1000
NUM_SEEDS = 2**32  # as many as torch's and numpy's generators tell apart


@dataclass(frozen=True)
class DataOptions:
    """Which data, which seed, and where files lie: what every script and benchmark that needs models takes."""

    dataset: DatasetText | None = None
    """Data set; when not given, MNIST, or the bundled digits where MNIST can be neither found nor downloaded. Or own
    data: a folder of class folders of images, one with MNIST's four files, or a CSV file (docs/own-data.md)."""
    image_size: tuple[int, ...] = ()
    """Pixels of a side, or height and width, that the images of own data are resized to."""
    data_dir: Folder | None = None
    """Folder that holds MNIST/raw/ and the like; when not given, $MNIST_LAB_DATA, else ./data (downloaded into)."""
    seed: int = 0
    """Seed of initial weights, batches, augmentation and router noise."""
    checkpoints: Folder = Path("checkpoints")
    """Folder for trained and converted models."""
    results: Folder = Path("results")
    """Folder for records, tables and plots."""
    wait: bool = False
    """Wait for another run that uses the same folders to end, instead of giving up."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < NUM_SEEDS:
            raise UserError(f"--seed {self.seed} must lie between 0 and {NUM_SEEDS - 1}")
        if len(self.image_size) > 2:
            raise UserError(f"--image-size takes one or two numbers, not {len(self.image_size)}")
        for side in self.image_size:
            if not MIN_SIDE <= side <= MAX_SIDE:
                raise UserError(f"--image-size {side} must lie between {MIN_SIDE} and {MAX_SIDE}")

    @property
    def height_and_width(self) -> tuple[int, int] | None:
        """Of the images of own data, where they are to be resized."""
        return (self.image_size[0], self.image_size[-1]) if self.image_size else None


@dataclass(frozen=True)
class Options(DataOptions):
    """What every training and converting script takes."""

    preset: PresetName = "compact"
    """Set of architectures."""
    recipe: RecipeName = "standard"
    """Training budget: quick (seconds a model), standard (up to two minutes), best (as good as it gets)."""
    epochs: int | None = None
    """Passes over the training images, in place of the recipe's."""
    batch_size: int | None = None
    """Images per training step, in place of the recipe's."""
    learning_rate: float | None = None
    """Of AdamW at its peak, in place of the recipe's."""
    augmentation: bool = True
    """Shift, turn and bend training images as the recipe says, which suits digits and letters."""
    threads: int = 1
    """CPU threads for measuring latency; training uses all cores."""
    runtime: tuple[Literal["pytorch", "torch-compile", "onnxruntime", "openvino", "torchao", "best"], ...] = (
        "pytorch",
        "onnxruntime",
    )
    """Runtimes to measure in, one or more; best measures in all that can run here."""
    device: str = "cpu"
    """Device for training, by torch's name (cpu, cuda); measuring is on the CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--epochs", self.epochs)
        check_count("--batch-size", self.batch_size)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UserError(f"--learning-rate {self.learning_rate} must be a finite number above 0")
        check_count("--threads", self.threads)
        if not self.runtime:
            raise UserError("--runtime needs at least one name")
        if self.threads > usable_cpus():
            raise UserError(f"--threads {self.threads} is more than the {usable_cpus()} CPUs that this process may use")
        check_device(self.device)

    def make_recipe(self) -> Recipe:
        """The named recipe with this run's departures."""
        given = {"epochs": self.epochs, "batch_size": self.batch_size, "learning_rate": self.learning_rate}
        departing: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if not self.augmentation:
            departing["augmentation"] = None
        return replace(find_recipe(self.recipe, self.preset), **departing)


@dataclass(frozen=True)
class RowOptions(Options):
    """What a script takes that makes rows and prints their figures."""

    seeds: int = 1
    """Number of seeds, from --seed upward."""
    latency: bool = True
    """Measure latency; with --no-latency it stays blank."""
    log: Literal["tensorboard"] | None = None
    """Write learning curves, settings and final figures for TensorBoard, below the results, while models train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        seeds_from(self.seed, self.seeds)
        if self.log is not None and find_spec("tensorboard") is None:
            raise UserError("--log tensorboard needs a package that is not here: pip install -r requirements-extra.txt")

    @property
    def all_seeds(self) -> range:
        return seeds_from(self.seed, self.seeds)


def seeds_from(first: int, num: int) -> range:
    """The seeds of a run, from --seed upward.

    Raises:
        UserError: there are none, too many, or none of that number.
    """
    if not 1 <= num <= MAX_RUN_SEEDS:
        raise UserError(f"--seeds {num} must lie between 1 and {MAX_RUN_SEEDS:,}")
    if first + num > NUM_SEEDS:
        raise UserError(f"--seed {first} and --seeds {num} go beyond {NUM_SEEDS - 1}, the largest seed")
    return range(first, first + num)


def check_count(name: str, value: int | None) -> None:
    """Reject what is no sensible count; None is an option not given.

    Raises:
        UserError: with the option's name.
    """
    if value is not None and not 1 <= value <= MAX_COUNT:
        raise UserError(f"{name} {value} must lie between 1 and {MAX_COUNT:,}")


def check_device(device: str) -> None:
    """Raise UserError where torch cannot compute on a device."""
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error
