"""Training a little more after something was taken out of a model: on the labels, or towards what it said before."""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.nn.utils import parametrize

from mnist_lab.compress.distill import DistillationConfig, distil_from
from mnist_lab.errors import UserError
from mnist_lab.experiments.technique import Work
from mnist_lab.models import Model
from mnist_lab.training import EpochMetrics, Objective, supervised_loss

BUDGET = 0.2  # of the recipe's epochs
MAX_EPOCHS = 10**6
RECOVERY_STEPS = 100  # with fewer, steps of the recipe's size would cost more than what is left can win back
Wrap = Callable[[Objective], Objective]


@dataclass(frozen=True)
class Duration:
    """How long a model is trained afterwards."""

    finetune_epochs: int | None = field(default=None, metadata={"tag": "ft"})
    """Passes over the training images afterwards; when not given, a fifth of the recipe's, 0 for none."""

    def __post_init__(self) -> None:
        if self.finetune_epochs is not None and not 0 <= self.finetune_epochs <= MAX_EPOCHS:
            raise UserError(f"--finetune-epochs {self.finetune_epochs} must lie between 0 and {MAX_EPOCHS:,}")

    def num_epochs(self, work: Work, budget: float = BUDGET) -> int:
        """Those given, or that share of the recipe's."""
        if self.finetune_epochs is not None:
            return self.finetune_epochs
        return max(1, round(budget * work.recipe.epochs))


@dataclass(frozen=True)
class Finetuning(Duration):
    """How long a model is trained afterwards, and on what."""

    teacher: Literal["none", "self"] = field(default="none", metadata={"tag": ""})
    """Whom the model learns from besides the labels: nobody, or itself as it was before."""


def check_ratio(ratio: float) -> None:
    """Raise UserError for a --ratio that would leave nothing, or everything."""
    if not 0 < ratio < 1:
        raise UserError(f"--ratio {ratio} must lie between 0 and 1, and be neither")


def as_it_is(objective: Objective) -> Objective:
    return objective


def finetune(
    work: Work,
    model: Model,
    before: Model,
    config: Finetuning,
    *,
    only: Iterable[str] | None = None,
    wrap: Wrap = as_it_is,
    rate: float = 1.0,
) -> list[EpochMetrics]:
    """Train `model` in place; the learning curves.

    Args:
        before: the model that it was made from; not changed.
        only: parameters to train, by name; all when not given.
        wrap: of the objective, for a technique that changes the model on the way.
        rate: of learning, as a share of the recipe's.
    """
    epochs = config.num_epochs(work)
    if epochs == 0:
        return []
    with _training_only(model, only):
        return recover(work, model, wrap(objective_of(work, before, config)), epochs=epochs, rate=rate)


def recover(work: Work, model: Model, objective: Objective, *, epochs: int, rate: float = 1.0) -> list[EpochMetrics]:
    """Train `model` in place at the recipe's rate of learning, at less of it over few steps; the learning curves.

    Weights that an earlier step left at zero stay zero.
    """
    learning_rate = rate * work.recipe.learning_rate * min(1, num_steps(work, epochs) / RECOVERY_STEPS)
    with zeros_kept(model):
        return work.fit(model, objective, epochs=epochs, learning_rate=learning_rate)


class Mask(nn.Module):
    """Multiplies a parameter wherever it is used; part of the model while it trains, and of its state."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@contextlib.contextmanager
def zeros_kept(model: nn.Module) -> Iterator[None]:
    """Matrices of products with weights at zero keep those there, but for the ones that a technique holds itself."""
    masked = []
    for name, weight in [*model.named_parameters()]:
        room, _, own = name.rpartition(".")
        is_multiplied = weight.ndim > 1 and not own.startswith("bias") and own != "noise"
        if is_multiplied and "parametrizations" not in name and bool((weight == 0).any()):
            masked.append((model.get_submodule(room), own))
            parametrize.register_parametrization(*masked[-1], Mask((weight != 0).to(weight.dtype)))
    try:
        yield
    finally:
        for module, own in masked:
            if parametrize.is_parametrized(module, own):
                parametrize.remove_parametrizations(module, own, leave_parametrized=True)


def objective_of(work: Work, before: Model, config: Finetuning) -> Objective:
    """The labels', or beside them what the model said before."""
    if config.teacher == "none":
        return supervised_loss
    return distil_from(copy.deepcopy(before), DistillationConfig(), work)


def num_steps(work: Work, epochs: int) -> int:
    """Of so many epochs on the recipe's batches."""
    return epochs * math.ceil(len(work.dataset.train) / work.recipe.batch_size)


@contextlib.contextmanager
def _training_only(model: nn.Module, names: Iterable[str] | None) -> Iterator[None]:
    """All other parameters stay as they are."""
    chosen = None if names is None else set(names)
    frozen = [p for name, p in model.named_parameters() if chosen is not None and name not in chosen]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
