"""Layer by layer (ZeroQuant, arXiv:2206.01861): each layer learns, without labels, what its twin in FP32 gives.

The loss is Σ over layers of ‖y − t‖² / ‖t‖²: y a layer's outputs, of inputs that the changed layers before it give and
to which no gradient goes back; t its twin's. An expert is one layer, and learns from the images that visit its twin.

Shapes: B images, D model width, N (image, expert) pairs, O expert output width.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mnist_lab.models import Model
from mnist_lab.models.ffn import FFN, apply_linear
from mnist_lab.models.moe import Decision, Pairs, SparseMoE
from mnist_lab.training import Batch, Objective, StepLoss, Term


def layer_objective(twin: Model) -> Objective:
    """The objective of a model with the same layers as `twin`, frozen and in evaluation mode."""

    def objective(model: nn.Module, batch: Batch) -> StepLoss:
        assert isinstance(model, FFN | SparseMoE)
        with torch.no_grad():
            routes = find_routes(twin, batch.pixels) if isinstance(twin, SparseMoE) else None
            targets = dict(layer_outputs(twin, batch.pixels, routes))
        outputs = layer_outputs(model, batch.pixels, routes)
        terms = {name: Term(relative_error(output, targets[name])) for name, output in outputs}
        return StepLoss(terms, routes.pairs.load_E if routes is not None else None)

    return objective


class Routes(NamedTuple):
    """Where an MoE sends a batch."""

    decision: Decision
    pairs: Pairs


def find_routes(model: SparseMoE, pixels: Tensor) -> Routes:
    decision: Decision = model.router(model.embed(pixels))
    return Routes(decision, model.dispatch(decision))


def layer_outputs(model: Model, pixels: Tensor, routes: Routes | None) -> Iterator[tuple[str, Tensor]]:
    """What each layer gives, by name; an MoE's experts for the images that these routes send them."""
    if not isinstance(model, SparseMoE):
        yield from _chain_outputs(model.layers, model.normalize(pixels), "layer")
        return
    assert routes is not None
    decision, pairs = routes
    hidden_BD = model.embed(pixels)
    yield "stem", hidden_BD
    hidden_BD = hidden_BD.detach()
    yield "router", hidden_BD @ model.router.gate
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
    """‖y − t‖² / ‖t‖² of tensors of one shape."""
    return (found - target).square().sum() / target.square().sum().clamp(min=1e-12)
