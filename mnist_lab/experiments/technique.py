"""What a technique is: a step makes weights, a form puts weights into another kind of file.

A technique is one frozen dataclass beside its formula, in `mnist_lab/compress/`, and one line in `rows.py`. Its fields
are all the settings that there are: a file is stale when they change, and a row is named after those that depart from
their defaults, by the field's name or the `tag` in its metadata (`None` names nothing).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from mnist_lab.data import Dataset, calibration_pixels
from mnist_lab.models import Model, ModelConfig, Preset, build_model
from mnist_lab.models.ensemble import Ensemble
from mnist_lab.runtimes import Precision, RuntimeName
from mnist_lab.training import EpochMetrics, Keeper, Objective, Recipe, fit, supervised_loss

# What a technique did or an engine executes, as JSON can hold it; "text" says it in a line.
Proof = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """All that a technique may see: no paths, no folders."""

    dataset: Dataset
    preset: Preset
    recipe: Recipe
    seed: int
    device: str
    name: str
    source: Model | None = None  # whose weights it starts from; its own copy
    teacher: Model | Ensemble | None = None  # whom it learns from
    images_of: Dataset | None = None  # another data set, whose images it takes
    keepers: Iterator[Keeper] | None = None  # of each training in turn, so that a killed one goes on

    def build(self, config: ModelConfig) -> Model:
        """A freshly initialised model, of this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build_model(config)

    def fit(
        self,
        model: torch.nn.Module,
        objective: Objective = supervised_loss,
        *,
        budget: float = 1.0,
        epochs: int | None = None,
        learning_rate: float | None = None,
    ) -> list[EpochMetrics]:
        """Train `model` in place; the learning curves.

        Args:
            budget: share of the recipe's epochs, at least one.
            epochs: that many in place of a share.
            learning_rate: at its peak; the recipe's when not given.
        """
        epochs = epochs or max(1, round(budget * self.recipe.epochs))
        recipe = replace(self.recipe, epochs=epochs, learning_rate=learning_rate or self.recipe.learning_rate)
        return fit(
            model,
            self.dataset,
            recipe,
            seed=self.seed,
            objective=objective,
            device=self.device,
            name=f"{self.name} seed {self.seed}",
            keeper=next(self.keepers) if self.keepers is not None else None,
        )

    def calibration(self, num_images: int) -> Tensor:
        """Training pixels (N, 1, height, width) of this seed, as many as asked for or as there are."""
        train = self.dataset.train
        return calibration_pixels(train, min(num_images, len(train)), seed=self.seed)


class Made(NamedTuple):
    """What a step made: a plain model, with masks, adapters and the like folded in."""

    model: Model
    curves: list[EpochMetrics]
    proof: Proof


class Step(Protocol):
    """Makes weights: trains them, or changes its source's."""

    cost: ClassVar[float]  # of an epoch, as a multiple of the dense FFN's: by it the time left is told

    @property
    def label(self) -> str:
        """In the table's technique, which joins the labels along the chain; empty for none."""

    def make(self, work: Work) -> Made:
        """A model from scratch, from `work.source` or from `work.teacher`.

        Raises:
            RunFailed: the technique took no effect, or the training diverged.
        """


class Form(Protocol):
    """Puts a model's weights into another kind of file."""

    label: ClassVar[str]

    @property
    def precision(self) -> Precision:
        """Of its weights."""

    @property
    def runtimes(self) -> tuple[RuntimeName, ...]:
        """That can run it. What the first of them loads is the row's own file; the others' files derive from it."""

    def write(self, model: Model, file: Path, work: Work, metadata: Mapping[str, Any]) -> None:
        """Write what runtimes load of files with this ending (.safetensors, .onnx).

        Args:
            model: in FP32; not to be changed.
            metadata: that the file must carry, anything JSON can hold.
        """

    def prove(self, model: Model, file: Path) -> Proof:
        """What this machine executes of a file that `write` wrote of `model`.

        Raises:
            WrongPrecision: not what the form promises.
        """
