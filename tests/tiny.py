"""Small data, techniques, rows and labs of the tests' own."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from mnist_lab.compress.distill import Distil
from mnist_lab.compress.float32 import Float32
from mnist_lab.compress.train import TrainFFN
from mnist_lab.data import Dataset, DataSpec, Split
from mnist_lab.errors import WrongPrecision
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.technique import Made, Proof, Work
from mnist_lab.models import Model
from mnist_lab.models.checkpoints import load_checkpoint, save_checkpoint
from mnist_lab.report.columns import Cost, figure
from mnist_lab.runtimes import RuntimeName
from mnist_lab.training import Recipe, find_recipe


def spec(mean: float = 0.13, std: float = 0.31) -> DataSpec:
    """Ten classes of 28x28 pixels."""
    return DataSpec(num_classes=10, image_size=(28, 28), mean=mean, std=std)


def make_dataset(num_classes: int = 10, image_size: tuple[int, int] = (28, 28), num_train: int = 300) -> Dataset:
    """Noisy images of one bar a class, 100 each to validate and test: learnable in a second."""
    generator = torch.Generator().manual_seed(0)

    def draw(num_images: int) -> Split:
        labels = torch.randint(0, num_classes, (num_images,), generator=generator)
        pixels = 0.3 * torch.rand(num_images, 1, *image_size, generator=generator)
        pixels[torch.arange(num_images), 0, 4 + 2 * labels] += 0.7
        return Split(pixels, labels)

    test = draw(100)
    data = DataSpec(num_classes, image_size, 0.18, 0.18)
    return Dataset("digits", data, draw(num_train), draw(100), load_test=lambda: test)


def make_lab(folder: Path, *, dataset: Dataset | None = None, **changes: Any) -> Lab:
    """A lab on bars and one epoch, which shows in no name."""
    lab = Lab(
        dataset=dataset or make_dataset(),
        preset_name="compact",
        recipe_name="quick",
        recipe=find_recipe("quick", "compact"),
        checkpoints=folder / "checkpoints",
        results=folder / "results",
    )
    return replace(lab, **changes)


ONE_EPOCH = Recipe(epochs=1, batch_size=32, learning_rate=3e-3)


@dataclass(frozen=True)
class ZeroSmallest:
    """A step: the smallest half of each weight matrix becomes zero."""

    label: ClassVar[str] = "zeroed"
    cost: ClassVar[float] = 0.0
    share: float = 0.5

    def make(self, work: Work) -> Made:
        assert work.source is not None
        with torch.no_grad():
            for weight in work.source.parameters():
                weight[weight.abs() <= weight.abs().quantile(self.share)] = 0
        return Made(work.source, [], {"text": f"{self.share:.0%} of the weights are zero"})


@dataclass(frozen=True)
class FourBits(Float32):
    """A form: weights rounded to 4 bits, stored and computed in FP32."""

    label: ClassVar[str] = "4 bits"
    runtimes: ClassVar[tuple[RuntimeName, ...]] = ("pytorch", "onnxruntime")

    def write(self, model: Model, file: Path, work: Work, metadata: Mapping[str, Any]) -> None:
        rounded = work.build(model.config)
        rounded.load_state_dict({name: _round(tensor) for name, tensor in model.state_dict().items()})
        super().write(rounded.eval(), file, work, metadata)

    def prove(self, model: Model, file: Path) -> Proof:
        if file.suffix == ".safetensors":
            levels = max(weight.unique().numel() for weight in load_checkpoint(file).model.parameters())
            if levels > 15:
                raise WrongPrecision(f"{file.name} has {levels} levels")
        return {"text": "at most 15 levels a matrix"}


def _round(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim == 0:  # mean and deviation of the pixels
        return tensor
    scale = tensor.abs().max().clamp(min=1e-12) / 7
    return (tensor / scale).round() * scale


def share_of_zeros(model: Model) -> float:
    """Of all parameters."""
    zeros = sum(int((weight == 0).sum()) for weight in model.parameters())
    return zeros / sum(weight.numel() for weight in model.parameters())


# A column: what it measures, and how it is drawn.
ZEROS = figure(
    "zeros", share_of_zeros, format=".1%", cost=Cost("weights that are not zero (%)", "dense", lambda z: 100 * (1 - z))
)

# A chain of four rows, one a teacher of another, and a row that has nothing to do with them.
SMALL = Row("Small", TrainFFN((8,)))
HALVED = Row("Halved", ZeroSmallest(), source=SMALL)
TAUGHT = Row("Taught", Distil(shape=(8,)), teacher=HALVED)
ROUNDED = Row("Rounded", source=TAUGHT, form=FourBits())
OTHER = Row("Other", TrainFFN((4,)))
CHAIN = (SMALL, HALVED, TAUGHT, ROUNDED, OTHER)


def exchange_weights(run: Run, other: Run) -> None:
    """Put another run's weights into a run's checkpoint, as if it had been trained again and come out differently."""
    metadata = load_checkpoint(run.output).metadata
    for key in ("architecture", "format"):
        del metadata[key]
    save_checkpoint(run.output, other.load(), metadata)
