"""Unstructured pruning: weights that matter least become zero, and stay zero while the rest is trained a little more.

The score of a weight is |w| (magnitude), or |w|·‖x‖ with x its input over calibration images (Wanda, arXiv:2306.11695),
for an expert's weights over the images that come to it and times their mean gate (MoE-Pruner, arXiv:2410.12013). Zeros
are zeros in every file; an artifact leaves them out where that takes fewer bytes (`deploy/sparse.py`).

Shapes: I inputs, O outputs, E experts, N rows.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from mnist_lab.compress.finetune import Finetuning, Mask, Wrap, as_it_is, check_ratio, finetune, num_steps
from mnist_lab.data import Split
from mnist_lab.deploy.onnx import build_onnx
from mnist_lab.deploy.sparse import bytes_by_form, describe_storage, store_sparsely
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.technique import Made, Proof, Work
from mnist_lab.models import Model
from mnist_lab.models.ffn import WindowLayer, apply_linear
from mnist_lab.models.moe import SparseMoE
from mnist_lab.training import Batch, EpochMetrics, Objective, StepLoss

CALIBRATION_SIZE = 1000
RAMP_SHARE = 0.5  # of fine-tuning, in which the zeros grow to their share; the rest trains with all of them
STEPS_BETWEEN_CUTS = 10
Criterion = Literal["magnitude", "wanda"]
Scope = Literal["layer", "global"]
Allocation = Literal["even", "utilization", "sensitivity"]
Schedule = Literal["one-shot", "ramp"]


@dataclass(frozen=True)
class WeightPruning:
    """How many weights become zero, and which."""

    ratio: float = field(default=0.8, metadata={"tag": ""})
    """Share of all weights, biases and router apart, that become zero."""
    criterion: Criterion = field(default="magnitude", metadata={"tag": ""})
    """What a weight is worth: its size, or its size times that of its input."""
    scope: Scope = field(default="layer", metadata={"tag": ""})
    """Where weights compete: within each layer, or all with all, scaled by their layer's mean."""
    allocation: Allocation = field(default="even", metadata={"tag": ""})
    """What each expert keeps of the experts' share: the same, more where more images come, or more where pruning it
    alone costs more."""
    schedule: Schedule = field(default="ramp", metadata={"tag": ""})
    """All at once, or along a cubic ramp while the model is fine-tuned."""

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        if self.scope == "global" and self.allocation != "even":
            raise UserError(f"--allocation {self.allocation} shares out within layers: drop --scope global")


class Matrix(NamedTuple):
    """One layer's weights within a parameter."""

    parameter: str
    expert: int | None = None  # of stacked ones
    is_transposed: bool = False  # stored (O, I), as linear layers are

    def of(self, tensor: Tensor) -> Tensor:
        """Its part (I, O) of a tensor in the parameter's shape; a view."""
        own = tensor if self.expert is None else tensor[self.expert]
        return own.T if self.is_transposed else own


def weight_matrices(model: nn.Module) -> list[Matrix]:
    """Every matrix that products of the model's layers and experts use; not the router's."""
    found = [Matrix(f"{name}.weight", None, True) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    if isinstance(model, SparseMoE):
        stacked = ("experts.weight_in", "experts.weight_out")
        found += [Matrix(name, e) for name in stacked for e in range(model.config.routing.num_experts)]
    return found


class Input(NamedTuple):
    """What a matrix multiplies on calibration images."""

    rows: Tensor  # (N, I)
    mean_gate: float = 1.0  # of an expert, over the rows that come to it


@torch.no_grad()
def layer_inputs(model: Model, pixels: Tensor) -> dict[Matrix, Input]:
    """The inputs of every matrix; an expert's are those of the images that come to it."""
    rows = model.normalize(pixels)
    if not isinstance(model, SparseMoE):
        return _chain_inputs(model.layers, "layers", rows)
    inputs = {Matrix("stem.weight", None, True): Input(rows)}
    hidden_BD = model.embed(pixels)
    decision = model.router(hidden_BD)
    experts = model.experts
    mixed_BO = hidden_BD.new_zeros(len(hidden_BD), model.config.output_width)
    for e in range(model.config.routing.num_experts):
        image_N, place_N = (decision.experts_BK == e).nonzero(as_tuple=True)
        gate_N, rows_ND = decision.weights_BK[image_N, place_N], hidden_BD[image_N]
        mean_gate = float(gate_N.mean()) if len(gate_N) else 0.0
        inner_NH = torch.addmm(experts.bias_in[e], rows_ND, experts.weight_in[e]).relu_()
        inputs[Matrix("experts.weight_in", e)] = Input(rows_ND, mean_gate)
        inputs[Matrix("experts.weight_out", e)] = Input(inner_NH, mean_gate)
        output_NO = torch.addmm(experts.bias_out[e], inner_NH, experts.weight_out[e])
        mixed_BO.index_add_(0, image_N, output_NO * gate_N.unsqueeze(1))
    return inputs | _chain_inputs(model.head, "head", mixed_BO.relu_())


def _chain_inputs(layers: nn.ModuleList, name: str, rows: Tensor) -> dict[Matrix, Input]:
    inputs = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, WindowLayer):
            inputs[Matrix(f"{name}.{index}.linear.weight", None, True)] = Input(layer.split(rows))
        else:
            inputs[Matrix(f"{name}.{index}.weight", None, True)] = Input(rows)
        rows = apply_linear(layer, rows).relu()
    return inputs


def importance(model: Model, criterion: Criterion, pixels: Tensor) -> dict[Matrix, Tensor]:
    """What scales |w| by input: (I, 1) for every matrix."""
    if criterion == "magnitude":
        return {matrix: torch.ones(1, 1) for matrix in weight_matrices(model)}
    inputs = layer_inputs(model, pixels)
    return {matrix: found.mean_gate * found.rows.norm(dim=0).unsqueeze(1) for matrix, found in inputs.items()}


def keep_highest(score: Tensor, num_kept: int) -> Tensor:
    """1 for the highest scores, exactly so many, and 0 for the others."""
    order = np.argpartition(score.flatten().numpy(), -num_kept)  # topk would sort them all
    mask = np.zeros(len(order), np.float32)
    mask[order[len(order) - num_kept :]] = 1
    return torch.from_numpy(mask).view(score.shape)


def choose_kept(
    scores: Mapping[Matrix, Tensor], kept_share: Mapping[Matrix, float], scope: Scope
) -> dict[Matrix, Tensor]:
    """A mask (I, O) for every matrix.

    Args:
        kept_share: of each matrix's weights where they compete within layers; overall it is their mean.
    """
    if scope == "layer":
        return {m: keep_highest(score, round(kept_share[m] * score.numel())) for m, score in scores.items()}
    scaled = torch.cat([(score / score.mean().clamp(min=1e-12)).flatten() for score in scores.values()])
    total = sum(kept_share[m] * score.numel() for m, score in scores.items())
    parts = keep_highest(scaled, round(total)).split([score.numel() for score in scores.values()])
    return {m: part.view(score.shape) for (m, score), part in zip(scores.items(), parts, strict=True)}


def share_out(worth: Tensor, mean_share: float) -> Tensor:
    """Shares in proportion to `worth`, none above 1, of that mean; what one cannot take goes to the others.

    Nobody counts for less than a tenth of the mean.
    """
    worth = worth.clamp(min=float(worth.mean()) / 10) + 1e-12
    is_full = torch.zeros_like(worth, dtype=torch.bool)
    while True:
        left = mean_share * len(worth) - float(is_full.sum())
        shares = torch.where(is_full, 1.0, worth * left / worth[~is_full].sum())
        if (shares <= 1).all():
            return shares
        is_full |= shares > 1


def kept_shares(model: Model, config: WeightPruning, work: Work) -> dict[Matrix, float]:
    """What each matrix keeps: as much as every other, or of the experts' share what is theirs."""
    kept = 1 - config.ratio
    shares = dict.fromkeys(weight_matrices(model), kept)
    if config.allocation == "even":
        return shares
    assert isinstance(model, SparseMoE)
    pixels, labels = work.dataset.train.pixels[:CALIBRATION_SIZE], work.dataset.train.labels[:CALIBRATION_SIZE]
    num_experts = model.config.routing.num_experts
    with torch.no_grad():
        if config.allocation == "utilization":
            worth_E = torch.bincount(model.routed(pixels).experts.flatten(), minlength=num_experts).float()
        else:
            losses = [
                F.cross_entropy(_with_one_pruned(model, expert, kept)(pixels), labels) for expert in range(num_experts)
            ]
            worth_E = (torch.stack(losses) - F.cross_entropy(model(pixels), labels)).clamp(min=0)
    by_expert = share_out(worth_E, kept).tolist()
    return {m: share if m.expert is None else by_expert[m.expert] for m, share in shares.items()}


def _with_one_pruned(model: SparseMoE, expert: int, kept: float) -> SparseMoE:
    """A copy in which one expert's smallest weights are zero."""
    pruned = copy.deepcopy(model)
    for matrix in weight_matrices(pruned):
        if matrix.expert == expert:
            weight = matrix.of(pruned.get_parameter(matrix.parameter))
            weight *= keep_highest(weight.abs(), round(kept * weight.numel()))
    return pruned


class Pruner:
    """Masks on matrices of a model, which it cuts, and in the end folds into the weights.

    Args:
        scale: what |w| is multiplied with for its score, by matrix.
        kept_shares: of each matrix's weights.
    """

    def __init__(
        self, model: Model, scale: Mapping[Matrix, Tensor], kept_shares: Mapping[Matrix, float], scope: Scope = "layer"
    ) -> None:
        self.model, self.scale, self.kept_shares, self.scope = model, scale, kept_shares, scope
        self.parameters = list(dict.fromkeys(matrix.parameter for matrix in self.kept_shares))
        for name in self.parameters:
            module, weight = self._place(name)
            parametrize.register_parametrization(module, weight, Mask(torch.ones_like(getattr(module, weight))))
        model.register_buffer("pruning_step", torch.zeros((), dtype=torch.int64))

    def _place(self, parameter: str) -> tuple[nn.Module, str]:
        room, _, weight = parameter.rpartition(".")
        return self.model.get_submodule(room), weight

    def _stored(self, parameter: str) -> tuple[Tensor, Tensor]:
        """A parameter as it is trained, and its mask."""
        module, weight = self._place(parameter)
        held: Any = module.parametrizations[weight]  # type: ignore[index]
        return held.original, held[0].mask

    @torch.no_grad()
    def cut(self, progress: float = 1.0) -> None:
        """Keep what scores highest, of as much as is due: s = s_end·(1 − (1 − t)³) (arXiv:1710.01878)."""
        due = 1 - (1 - min(progress, 1.0)) ** 3
        stored = {name: self._stored(name) for name in self.parameters}
        scores = {m: (m.of(stored[m.parameter][0]).abs().cpu() * scale) for m, scale in self.scale.items()}
        kept = {matrix: 1 - due * (1 - share) for matrix, share in self.kept_shares.items()}
        for matrix, mask in choose_kept(scores, kept, self.scope).items():
            matrix.of(stored[matrix.parameter][1]).copy_(mask)

    def on_the_way(self, objective: Objective, num_steps: int) -> Objective:
        """The same objective, which cuts as training goes on."""
        ramp = min(max(1, round(RAMP_SHARE * num_steps)), num_steps - 1)  # few images make few steps

        def cut_and_lose(model: nn.Module, batch: Batch) -> StepLoss:
            step = self.model.get_buffer("pruning_step")
            if step == ramp or (step < ramp and step % STEPS_BETWEEN_CUTS == 0):
                self.cut(1.0 if step == ramp else float(step) / ramp)
            step += 1
            return objective(model, batch)

        return cut_and_lose

    def train(self, work: Work, before: Model, finetuning: Finetuning, schedule: Schedule) -> list[EpochMetrics]:
        """Cut at once or along a ramp, train what is left, and fold; the learning curves."""
        epochs = finetuning.num_epochs(work)
        wrap: Wrap = as_it_is
        if schedule == "one-shot" or epochs == 0:
            self.cut()
        else:
            wrap = partial(self.on_the_way, num_steps=num_steps(work, epochs))
        curves = finetune(work, self.model, before, finetuning, wrap=wrap)
        self.fold()
        return curves

    def fold(self) -> None:
        """Leave a plain model whose zeros are zeros."""
        for name in self.parameters:
            module, weight = self._place(name)
            parametrize.remove_parametrizations(module, weight, leave_parametrized=True)
        del self.model.pruning_step


def share_of_zeros(model: nn.Module) -> float:
    """Of the weights that may be pruned."""
    weights = [matrix.of(model.get_parameter(matrix.parameter)) for matrix in weight_matrices(model)]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


@torch.no_grad()
def loss_by_expert(before: SparseMoE, after: Model, images: Split) -> dict[str, list[float | None]]:
    """What the images lose that visited each expert of the model before: "load", its share of all visits, and
    "loss_rise", by how many nats their mean cross-entropy rose, None where nobody came.
    """
    routed = before.routed(images.pixels)
    was, now = (F.cross_entropy(z, images.labels, reduction="none") for z in (routed.logits, after(images.pixels)))
    visits_BE = torch.zeros_like(routed.router_probs).scatter(1, routed.experts, 1.0).double()
    num_E = visits_BE.sum(dim=0)
    rise_E = (now - was).double() @ visits_BE / num_E
    rises = [rise if num else None for rise, num in zip(rise_E.tolist(), num_E.tolist(), strict=True)]
    return {"load": (num_E / num_E.sum()).tolist(), "loss_rise": rises}


@dataclass(frozen=True)
class PruneWeights:
    """A trained model with most of its weights at zero."""

    label: ClassVar[str] = "pruned weights"
    cost: ClassVar[float] = 0.4
    pruning: WeightPruning = WeightPruning()
    finetuning: Finetuning = field(default_factory=Finetuning)

    def make(self, work: Work) -> Made:
        model = work.source
        assert model is not None
        if self.pruning.allocation != "even" and not isinstance(model, SparseMoE):
            raise RunFailed(f"{work.name}: a dense model has no experts to share out among")
        before, zeros_before = copy.deepcopy(model), share_of_zeros(model)
        scale = importance(model, self.pruning.criterion, work.calibration(CALIBRATION_SIZE))
        pruner = Pruner(model, scale, kept_shares(model, self.pruning, work), self.pruning.scope)
        curves = pruner.train(work, before, self.finetuning, self.pruning.schedule)
        zeros = share_of_zeros(model)
        if zeros <= zeros_before:
            raise RunFailed(f"{work.name}: no weight became zero")
        proof = describe_zeros(model, zeros)
        if isinstance(before, SparseMoE):
            proof["by_expert"] = loss_by_expert(before, model, work.dataset.validation)
        return Made(model, curves, proof)


def describe_zeros(model: Model, share: float) -> Proof:
    """How many there are, what the artifact makes of them, and which form of the model would be the smallest."""
    graph = build_onnx(model).graph
    store_sparsely(graph)
    sizes = bytes_by_form(graph)
    smallest = min(sizes, key=sizes.__getitem__)
    text = (
        f"{share:.1%} of the weights are zero; {describe_storage(graph)}; "
        f"smallest would be {smallest}, {sizes[smallest] / 1e6:.3g} MB"
    )
    return {"text": text, "zeros": share, "bytes_by_form": sizes}
