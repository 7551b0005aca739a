"""Layer by layer (ZeroQuant, arXiv:2206.01861): each layer learns, without labels, what its twin in FP32 gives.

The loss is Σ over layers of ‖y − t‖² / ‖t‖²: y a layer's outputs, of inputs that the changed layers before it give and
to which no gradient goes back; t its twin's. An expert is one layer, and learns from the images that visit its twin.

Shapes: B images, D model width, N (image, expert) pairs, O expert output width.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mnist_lab.models import Model
from mnist_lab.models.ffn import FFN, apply_linear
from mnist_lab.models.moe import Decision, SparseMoE
from mnist_lab.training import Batch, Objective, StepLoss, Term


def layer_objective(twin: Model) -> Objective:
    """The objective of a model with the same layers as `twin`, frozen and in evaluation mode."""

    def objective(model: nn.Module, batch: Batch) -> StepLoss:
        assert isinstance(model, FFN | SparseMoE)
        with torch.no_grad():
            decision = twin.router(twin.embed(batch.pixels)) if isinstance(twin, SparseMoE) else None
            targets = dict(layer_outputs(twin, batch.pixels, decision))
        outputs = layer_outputs(model, batch.pixels, decision)
        terms = {name: Term(relative_error(output, targets[name])) for name, output in outputs}
        if decision is None:
            return StepLoss(terms)
        return StepLoss(terms, torch.bincount(decision.experts_BK.flatten(), minlength=decision.logits_BE.shape[1]))

    return objective


def layer_outputs(model: Model, pixels: Tensor, decision: Decision | None) -> Iterator[tuple[str, Tensor]]:
    """What each layer gives, by name; an MoE's experts for the images that this decision sends them."""
    if not isinstance(model, SparseMoE):
        yield from _chain_outputs(model.layers, model.normalize(pixels), "layer")
        return
    assert decision is not None
    hidden_BD = model.embed(pixels)
    yield "stem", hidden_BD
    hidden_BD = hidden_BD.detach()
    yield "router", hidden_BD @ model.router.gate
    pairs = model.dispatch(decision)
    output_NO = model.experts(hidden_BD.index_select(0, pairs.row_N), pairs.kept_load_E)
    for expert, output in enumerate(output_NO.split(pairs.kept_load_E.tolist())):
        yield f"expert {expert}", output
    mixed_BO = model.combine(output_NO.detach(), pairs, decision)
    yield from _chain_outputs(model.head, mixed_BO.relu(), "head")


def _chain_outputs(layers: nn.ModuleList, rows: Tensor, name: str) -> Iterator[tuple[str, Tensor]]:
    for index, layer in enumerate(layers):
        output = apply_linear(layer, rows)
        yield f"{name} {index}", output.relu() if index < len(layers) - 1 else output
        rows = output.detach().relu()


def relative_error(found: Tensor, target: Tensor) -> Tensor:
    return (found - target).square().sum() / target.square().sum().clamp(min=1e-12)
