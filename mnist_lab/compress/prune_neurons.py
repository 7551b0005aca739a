"""Structured pruning: hidden units that matter least are taken out, and the model really becomes smaller.

Each layer loses the same share; each expert its own units, as many as every other, or more where they matter less.

Scores of a unit: the norms of its weights in and out, multiplied; first-order importance, (a·∂L/∂a)² of its activation
(Molchanov et al. 2019, arXiv:1906.10771, with gates); its mean activation times the norm of its weights out; or
without any gradient: units are masked at random and the loss is regressed on the masks (arXiv:2402.05406).

Shapes: D stem width, E experts, H expert width, O expert output width, U units of all layers, M masks.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse.linalg import LinearOperator, lsmr
from torch import Tensor
from torch.nn import functional as F

from mnist_lab.compress.finetune import Finetuning, check_ratio, finetune
from mnist_lab.compress.prune_weights import layer_inputs
from mnist_lab.compress.train import MULTIPLE
from mnist_lab.errors import RunFailed
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.measure import MIB
from mnist_lab.memory import measure_peak
from mnist_lab.models import Model, count_parameters, parameter_bytes
from mnist_lab.models.moe import SparseMoE
from mnist_lab.models.surgery import Places, Units, hidden_shapes, incoming, masked_logits, outgoing, with_units
from mnist_lab.progress import progress_bar

CHOOSING_SIZE = 1000  # training images that the choice is made on
BATCH = 100  # images of one gradient
NUM_MASKS = 1000
MASKS_AT_ONCE = 10
RIDGE = 0.5
NUM_ITERATIONS = 20
Criterion = Literal["norm", "taylor", "activation", "masks"]
Values = npt.NDArray[np.float32]


@dataclass(frozen=True)
class NeuronPruning:
    """How many hidden units go, and which."""

    ratio: float = field(default=0.5, metadata={"tag": ""})
    """Share of each layer's units that are taken out, up to multiples of 8 that stay."""
    criterion: Criterion = field(default="norm", metadata={"tag": ""})
    """What a unit is worth: the norms of its weights; first-order importance by gradients; its activation; or the loss
    regressed on random masks, with forward passes only."""
    widths: Literal["apart", "alike"] = field(default="apart", metadata={"tag": ""})
    """Of experts: units of all of them compete and their widths come apart, or all keep as many."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio)


@torch.no_grad()
def norms(model: Model) -> Units:
    """The norm of each unit's incoming parameters times that of its outgoing weights."""
    out = _outgoing_norms(model)
    return {name: _norm(parts, -2) * out[name] for name, parts in incoming(model).items()}


def _outgoing_norms(model: Model) -> Units:
    return {name: _norm(parts, -1) for name, parts in outgoing(model).items()}


def _norm(parts: Iterable[Tensor], dim: int) -> Tensor:
    squares: Tensor = sum((part.square().sum(dim=dim) for part in parts), start=torch.zeros(()))
    return squares.sqrt()


@torch.no_grad()
def activations(model: Model, pixels: Tensor) -> Units:
    """Mean activation over the images that reach a unit, times the norm of its outgoing weights."""
    rows = {(matrix.parameter, matrix.expert): found.rows for matrix, found in layer_inputs(model, pixels).items()}
    means: Units = {}
    for name, shape in hidden_shapes(model).items():
        if name == "stem":
            assert isinstance(model, SparseMoE)
            means[name] = model.embed(pixels).mean(dim=0)
        elif name == "experts":
            inside = [rows["experts.weight_out", expert] for expert in range(shape[0])]
            means[name] = torch.stack([own.sum(dim=0) / max(1, len(own)) for own in inside])
        else:
            room, _, index = name.partition(".")
            then = f"{room}.{int(index) + 1}" if index else "head.0"
            means[name] = rows[f"{then}.weight", None].mean(dim=0)
    return {name: means[name] * norm for name, norm in _outgoing_norms(model).items()}


def first_order(model: Model, pixels: Tensor, labels: Tensor) -> Units:
    """(∂L/∂m)² of a mask m = 1 on each unit's activation, which is (Σ a·∂L/∂a)²; mean over batches."""
    scores = {name: torch.zeros(shape) for name, shape in hidden_shapes(model).items()}
    for batch, targets in zip(pixels.split(BATCH), labels.split(BATCH), strict=True):
        masks = {name: torch.ones_like(score, requires_grad=True) for name, score in scores.items()}
        loss = F.cross_entropy(masked_logits(model, batch, masks), targets)
        for score, slope in zip(scores.values(), torch.autograd.grad(loss, list(masks.values())), strict=True):
            score += slope.square()
    return scores


@torch.inference_mode()
def regressed(model: Model, pixels: Tensor, labels: Tensor, seed: int) -> Units:
    """Minus the slope of the loss in each unit's mask, by ridge regression on masks that close half of the units.

    Masks are drawn again wherever they are multiplied with, instead of being kept: memory is that of a forward pass.
    """
    shapes = hidden_shapes(model)
    num_units = sum(math.prod(shape) for shape in shapes.values())
    batches = itertools.cycle(zip(pixels.split(BATCH), labels.split(BATCH), strict=True))
    losses = []
    with progress_bar() as progress:
        for masks_MU in progress.track(draw_masks(num_units, seed), NUM_MASKS // MASKS_AT_ONCE, description="masks"):
            for mask_U, (batch, targets) in zip(masks_MU, batches, strict=False):
                logits = masked_logits(model, batch, _by_layer(mask_U, shapes))
                losses.append(float(F.cross_entropy(logits, targets)))

    def multiply(slopes_U: Values) -> Values:
        return np.concatenate([(masks.numpy() - 0.5) @ slopes_U for masks in draw_masks(num_units, seed)])

    def multiply_back(errors_M: Values) -> Values:
        parts = np.split(errors_M, NUM_MASKS // MASKS_AT_ONCE)
        masks_and_parts = zip(draw_masks(num_units, seed), parts, strict=True)
        return np.sum([part @ (masks.numpy() - 0.5) for masks, part in masks_and_parts], axis=0)

    every_mask_MU = LinearOperator((NUM_MASKS, num_units), multiply, multiply_back, dtype=np.float32)
    slopes_U = lsmr(every_mask_MU, np.array(losses) - np.mean(losses), damp=RIDGE, maxiter=NUM_ITERATIONS)[0]
    return _by_layer(-torch.from_numpy(slopes_U).float(), shapes)


def draw_masks(num_units: int, seed: int) -> Iterator[Tensor]:
    """1 on units that are open, half of them on average, some masks at a time; the same ones whenever called."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(NUM_MASKS // MASKS_AT_ONCE):
        yield torch.randint(0, 2, (MASKS_AT_ONCE, num_units), generator=generator, dtype=torch.float32)


def _by_layer(units_U: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Units:
    parts = units_U.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def score_units(model: Model, criterion: Criterion, work: Work) -> Units:
    """What each unit is worth."""
    pixels, labels = work.dataset.train.pixels[:CHOOSING_SIZE], work.dataset.train.labels[:CHOOSING_SIZE]
    if criterion == "norm":
        return norms(model)
    if criterion == "activation":
        return activations(model, pixels)
    return first_order(model, pixels, labels) if criterion == "taylor" else regressed(model, pixels, labels, work.seed)


def num_kept(width: int, ratio: float) -> int:
    """Units of a layer that stay: the nearest multiple of 8, at least 8, and no more than there are."""
    return min(width, max(MULTIPLE, MULTIPLE * round((1 - ratio) * width / MULTIPLE)))


def choose_units(scores: Units, config: NeuronPruning) -> Places:
    """The units that stay."""
    kept = {}
    for name, score in scores.items():
        width = num_kept(score.shape[-1], config.ratio)
        rows = score.unsqueeze(0) if score.ndim == 1 else score
        widths = compete(rows, width) if config.widths == "apart" and score.ndim > 1 else [width] * len(rows)
        kept[name] = [row.topk(own).indices.sort().values for row, own in zip(rows, widths, strict=True)]
    return kept


def compete(score_EH: Tensor, mean_width: int) -> list[int]:
    """Widths of that mean, in multiples of 8, by which the units that stay score most; nobody is left without any."""
    if mean_width < MULTIPLE:
        return [mean_width] * len(score_EH)
    blocks_EB = score_EH.sort(dim=1, descending=True).values.unfold(1, MULTIPLE, MULTIPLE).sum(dim=2)
    blocks_EB[:, 0] = math.inf
    num_blocks = len(blocks_EB) * mean_width // MULTIPLE
    winners_E = blocks_EB.flatten().topk(num_blocks).indices // blocks_EB.shape[1]
    return [MULTIPLE * int(count) for count in torch.bincount(winners_E, minlength=len(blocks_EB))]


def _said(places: Sequence[Tensor]) -> str:
    """How many units stay; of experts of different widths in each."""
    widths = [len(own) for own in places]
    return "/".join(map(str, widths if len(set(widths)) > 1 else widths[:1]))


@dataclass(frozen=True)
class PruneNeurons:
    """A trained model with narrower hidden layers."""

    label: ClassVar[str] = "pruned neurons"
    cost: ClassVar[float] = 0.3
    pruning: NeuronPruning = NeuronPruning()
    finetuning: Finetuning = field(default_factory=Finetuning)

    def make(self, work: Work) -> Made:
        before = work.source
        assert before is not None
        scores, choice_bytes = measure_peak(lambda: score_units(before, self.pruning.criterion, work))
        with torch.inference_mode():
            _, pass_bytes = measure_peak(lambda: before(work.dataset.train.pixels[:BATCH]))
        memory = [(parameter_bytes(before) + some) / MIB for some in (choice_bytes, pass_bytes)]
        kept = choose_units(scores, self.pruning)
        if sum(len(own) for places in kept.values() for own in places) == sum(map(torch.numel, scores.values())):
            raise RunFailed(f"{work.name}: no layer has a unit to spare, as {MULTIPLE} stay")
        model = with_units(before, kept)
        curves = finetune(work, model, before, self.finetuning)
        widths = ", ".join(f"{name} {_said(kept[name])} of {score.shape[-1]}" for name, score in scores.items())
        left = count_parameters(model)[0] / count_parameters(before)[0]
        took = f"the choice took {memory[0]:.2f} MiB, a pass over {BATCH} images takes {memory[1]:.2f}"
        text = f"{left:.1%} of the parameters left: {widths}; {took}"
        return Made(model, curves, {"text": text, "left": left, "choice_mib": memory[0], "pass_mib": memory[1]})
