"""fit(): the only training loop, and the recipes that say how long and with what it trains."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adamw import adamw

from mnist_lab import measure
from mnist_lab.data import Augmentation, Dataset, Split, augment, iterate_batches
from mnist_lab.errors import TrainingDiverged
from mnist_lab.models import PresetName
from mnist_lab.models.moe import SparseMoE
from mnist_lab.progress import progress_bar

RecipeName = Literal["quick", "standard", "best"]


class Term(NamedTuple):
    """One part of an objective, and how much it counts."""

    value: Tensor
    weight: float = 1.0


LossTerms = dict[str, Term]


@dataclass(frozen=True)
class Recipe:
    """Budget and schedule, shared by every model of a table so that rows differ only in the technique."""

    epochs: int
    batch_size: int = field(metadata={"tag": "batch"})
    learning_rate: float = field(default=2e-3, metadata={"tag": "lr"})  # at its peak: linear warm-up, then to zero
    warmup_share: float = 0.15  # of all steps
    weight_decay: float = 0.02
    augmentation: Augmentation | None = None


STRONG = Augmentation(rotation_degrees=8, shift_pixels=1.5, scale=0.08, shear=0.08, elastic_pixels=0.6)
RECIPES: dict[RecipeName, Recipe] = {
    "quick": Recipe(epochs=5, batch_size=256, learning_rate=5e-3),
    "standard": Recipe(epochs=32, batch_size=256, learning_rate=4e-3, weight_decay=0.1, augmentation=Augmentation()),
    "best": Recipe(epochs=100, batch_size=256, learning_rate=4e-3, weight_decay=0.1, augmentation=STRONG),
}
WIDE_BEST = replace(RECIPES["best"], epochs=200, learning_rate=2e-3)  # wide models gain from smaller steps for longer


def find_recipe(name: RecipeName, preset: PresetName) -> Recipe:
    """The recipe of that name for the models of a preset."""
    return WIDE_BEST if (name, preset) == ("best", "wide") else RECIPES[name]


@dataclass
class StepLoss:
    """What one training step minimises, the weighted sum of its terms; what the router did on the way (MoE only)."""

    terms: LossTerms
    expert_load: Tensor | None = None  # (E,) pairs that chose each expert
    dropped_share: float = 0.0


class Batch(NamedTuple):
    pixels: Tensor  # (B, 1, height, width), augmented
    labels: Tensor  # (B,)
    rows: Tensor  # (B,), of the training split


Objective = Callable[[nn.Module, Batch], StepLoss]


@dataclass(frozen=True)
class EpochMetrics:
    """One point of the learning curves. Training figures are means over the epoch as it ran, with noise,
    augmentation and changing weights; validation figures are in evaluation mode.
    """

    epoch: int
    learning_rate: float
    train_terms: dict[str, float]  # each before its weight
    validation_loss: float
    validation_acc: float
    expert_load: list[float] = field(default_factory=list)  # share of pairs per expert
    dropped_share: float | None = None


class Pass(NamedTuple):
    """A forward pass in training: the logits, and what a mixture of experts adds to any objective."""

    logits: Tensor  # (B, C)
    terms: LossTerms  # the MoE's load balancing
    expert_load: Tensor | None
    dropped_share: float

    def loss(self, terms: LossTerms) -> StepLoss:
        """An objective's own terms, and those of the pass."""
        return StepLoss(terms | self.terms, self.expert_load, self.dropped_share)


def run_forward(model: nn.Module, pixels: Tensor) -> Pass:
    """One pass of a model of any kind."""
    if not isinstance(model, SparseMoE):
        return Pass(model(pixels), {}, None, 0.0)
    routed = model.routed(pixels)
    raw = sum(routed.auxiliary.values(), start=routed.logits.new_zeros(()))
    balance = Term(raw, model.config.routing.balance_weight)
    return Pass(routed.logits, {"balance": balance}, routed.expert_load, routed.dropped_share)


def supervised_loss(model: nn.Module, batch: Batch) -> StepLoss:
    """Cross-entropy, and for the MoE its weighted load-balancing loss."""
    forward = run_forward(model, batch.pixels)
    return forward.loss({"cross_entropy": Term(F.cross_entropy(forward.logits, batch.labels))})


class Kept(NamedTuple):
    """A training's state after an epoch: all that the next one depends on."""

    tensors: dict[str, Tensor]  # weights, optimizer, generators
    curves: list[EpochMetrics]


class Keeper(Protocol):
    """Keeps a training's state, so that after a kill it goes on from the last finished epoch."""

    def restore(self, like: Mapping[str, Tensor]) -> Kept | None:
        """What was kept of this very training, with tensors of the same names, shapes and types."""

    def keep(self, kept: Kept) -> None:
        """Keep a state in the place of that of the epoch before."""


def fit(
    model: nn.Module,
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    objective: Objective = supervised_loss,
    device: str = "cpu",
    name: str = "model",
    keeper: Keeper | None = None,
) -> list[EpochMetrics]:
    """Train `model` in place and return its learning curves; the last epoch's weights stay in it.

    The same seed and number of threads give the same bits, whether or not the training was killed on the way and went
    on from what `keeper` has. Torch's default generator is left as it was.

    Raises:
        TrainingDiverged: the loss is NaN or infinite.
    """
    with torch.random.fork_rng(_cuda_devices(device)), progress_bar() as progress:
        torch.manual_seed(seed)  # the router's noise
        training = _Training(model.to(device), dataset, recipe, objective, device, name, seed)
        curves: list[EpochMetrics] = []
        if keeper is not None and (kept := keeper.restore(training.state())) is not None:
            training.load(kept.tensors)
            curves = kept.curves
        task = progress.add_task(name, total=training.num_steps, completed=len(curves) * training.steps_per_epoch)
        for epoch in range(len(curves) + 1, recipe.epochs + 1):
            sums = training.run_epoch(epoch, lambda: progress.advance(task))
            curves.append(_validate(training, sums, epoch, dataset.validation))
            if keeper is not None:
                keeper.keep(Kept(training.state(), curves))
            progress.update(task, description=f"{name}  val {curves[-1].validation_acc:.2%}")
    model.to("cpu")
    model.eval()
    return curves


def _cuda_devices(device: str) -> list[torch.device]:
    """Those whose generators a training draws from: none on the CPU, where CUDA is not to be touched."""
    return [torch.device(device)] if torch.device(device).type == "cuda" else []


def _validate(training: "_Training", sums: "_EpochSums", epoch: int, validation: Split) -> EpochMetrics:
    """The point of the learning curves after an epoch."""
    pixels, labels = validation.numpy()
    logits = measure.predict(torch_predictor(training.model, training.device), pixels)
    loss = measure.cross_entropy(logits, labels)
    if not math.isfinite(loss):  # the last step's update may be what broke the weights
        raise TrainingDiverged(f"{training.name}: the validation loss is {loss} after epoch {epoch}; nothing was saved")
    rate = training.rate_at(epoch * training.steps_per_epoch)
    return sums.metrics(epoch, rate, loss, measure.accuracy(logits, labels))


class _Training:
    """A model in training, and all that its next step depends on."""

    def __init__(
        self, model: nn.Module, data: Dataset, recipe: Recipe, objective: Objective, device: str, name: str, seed: int
    ) -> None:
        self.model, self.train, self.recipe, self.objective = model, data.train.to(device), recipe, objective
        self.device, self.name, self.ground = device, name, data.spec.ground
        self.steps_per_epoch = math.ceil(len(self.train) / recipe.batch_size)
        self.num_steps = recipe.epochs * self.steps_per_epoch
        self.rate_at = _warm_up_then_decay(recipe.learning_rate, self.num_steps, recipe.warmup_share)
        self.optimizer = AdamW(model, recipe.weight_decay)
        self.generator = torch.Generator().manual_seed(seed)

    def run_epoch(self, epoch: int, on_step: Callable[[], None]) -> "_EpochSums":
        self.model.train()
        sums = _EpochSums()
        batches = iterate_batches(len(self.train), self.recipe.batch_size, self.generator)
        for step, rows in enumerate(batches, start=1):
            rows = rows.to(self.device)
            pixels, labels = self.train.pixels.index_select(0, rows), self.train.labels.index_select(0, rows)
            if self.recipe.augmentation is not None:
                pixels = augment(pixels, self.recipe.augmentation, self.generator, ground=self.ground)
            loss = self.objective(self.model, Batch(pixels, labels, rows))
            total = sum_terms(loss.terms)
            if not math.isfinite(total.item()):
                raise TrainingDiverged(
                    f"{self.name}: the loss is {total.item()} at step {step} of epoch {epoch}; nothing was saved"
                )
            self.optimizer.zero_grad()
            total.backward()
            self.optimizer.step(self.rate_at((epoch - 1) * self.steps_per_epoch + step - 1))
            sums.add(loss, len(rows))
            on_step()
        return sums

    def state(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        tensors |= {"generator.batches": self.generator.get_state(), "generator.default": torch.get_rng_state()}
        for device in _cuda_devices(self.device):
            tensors["generator.device"] = torch.cuda.get_rng_state(device)
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                if not name.startswith("generator."):
                    tensor.copy_(tensors[name])
        self.generator.set_state(tensors["generator.batches"])
        torch.set_rng_state(tensors["generator.default"])
        for device in _cuda_devices(self.device):
            torch.cuda.set_rng_state(tensors["generator.device"], device)


class AdamW:
    """AdamW (arXiv:1711.05101) with torch's defaults, fused: one pass over memory updates all parameters.

    The same as `torch.optim.AdamW`, by its own functional form: the class would import torch's compiler first, which
    takes longer than to train a small model.
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self._parameters = list(model.parameters())
        self._state = [
            (torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device)) for p in self._parameters
        ]

    def state(self) -> dict[str, Tensor]:
        """Means, mean squares and step counts of all parameters, by name; the tensors themselves."""
        kinds = ("mean", "square", "steps")
        return {
            f"{place}.{kind}": tensor
            for place, state in enumerate(self._state)
            for kind, tensor in zip(kinds, state, strict=True)
        }

    def zero_grad(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter that has a gradient."""
        pairs = zip(self._parameters, self._state, strict=True)
        moving = [(p, p.grad, *state) for p, state in pairs if p.grad is not None]
        parameters, gradients, means, squares, steps = map(list, zip(*moving, strict=True))
        adamw(
            parameters,
            gradients,
            means,
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )


def sum_terms(terms: LossTerms) -> Tensor:
    """What a step minimises."""
    return torch.stack([term.value * term.weight for term in terms.values()]).sum()


def torch_predictor(model: nn.Module, device: str = "cpu") -> Callable[[measure.Array], measure.Array]:
    """The model in evaluation mode as a function from numpy pixels to numpy logits."""
    model.eval()

    def run(pixels: measure.Array) -> measure.Array:
        with torch.inference_mode():
            logits: measure.Array = model(torch.from_numpy(pixels).to(device)).cpu().numpy()
        return logits

    return run


@dataclass
class _EpochSums:
    """Sums over the steps of one epoch."""

    num_rows: int = 0
    terms: dict[str, float] = field(default_factory=dict)
    load: Tensor | None = None
    dropped: float = 0.0

    def add(self, loss: StepLoss, num_rows: int) -> None:
        self.num_rows += num_rows
        for name, term in loss.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + term.value.item() * num_rows
        if loss.expert_load is not None:
            self.load = loss.expert_load if self.load is None else self.load + loss.expert_load
            self.dropped += loss.dropped_share * num_rows

    def metrics(self, epoch: int, learning_rate: float, validation_loss: float, validation_acc: float) -> EpochMetrics:
        return EpochMetrics(
            epoch=epoch,
            learning_rate=learning_rate,
            train_terms={name: total / self.num_rows for name, total in self.terms.items()},
            validation_loss=validation_loss,
            validation_acc=validation_acc,
            expert_load=[] if self.load is None else (self.load / self.load.sum()).tolist(),
            dropped_share=None if self.load is None else self.dropped / self.num_rows,
        )


def _warm_up_then_decay(peak: float, num_steps: int, warmup_share: float) -> Callable[[int], float]:
    """The learning rate by step: linearly up to its peak, then linearly to zero."""
    warmup_steps = max(1, round(num_steps * warmup_share))

    def rate_at(step: int) -> float:
        return peak * min((step + 1) / warmup_steps, (num_steps - step) / max(1, num_steps - warmup_steps))

    return rate_at
