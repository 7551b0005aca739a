"""The same model without some of its hidden units, or of its experts; or with more units, that do nothing.

Units are those of the FFN's hidden layers, windows apart; of an MoE its stem, the inside of its experts, their outputs
and its head.

Shapes: B images, D stem width, E experts, H expert width, O expert output width, N images of an expert.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lab.models import Model, ModelConfig, build_skeleton
from mnist_lab.models.ffn import FFN, FFNConfig
from mnist_lab.models.moe import BASES, ExpertWeights, SparseMoE, linear_of

Units = dict[str, Tensor]  # by layer: (width,), and (E, H) inside experts
Places = dict[str, list[Tensor]]  # by layer: of its units, in order; inside experts of each


def hidden_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """The layers whose units may go, and how many they have."""
    if isinstance(model, FFN):
        return {f"layers.{index}": (width,) for index, width in enumerate(model.config.widths, _num_windows(model))}
    assert isinstance(model, SparseMoE)
    experts = (model.config.routing.num_experts, model.config.expert_width)
    inner: dict[str, tuple[int, ...]] = {
        "stem": (model.config.model_width,),
        "experts": experts,
        "output": (model.config.output_width,),
    }
    return inner | {f"head.{index}": (width,) for index, width in enumerate(model.config.head_widths)}


def incoming(model: Model) -> dict[str, list[Tensor]]:
    """By layer the parameters that make its units, each (…, inputs or 1, units)."""
    if isinstance(model, FFN):
        start = _num_windows(model)
        return {f"layers.{i}": _into(layer) for i, layer in enumerate(model.layers[start:-1], start)}
    assert isinstance(model, SparseMoE)
    experts = model.experts
    inner: dict[str, list[Tensor]] = {
        "stem": _into(model.stem),
        "experts": [experts.weight_in, experts.bias_in.unsqueeze(1)],
        "output": [experts.weight_out.flatten(0, 1), experts.bias_out],
    }
    return inner | {f"head.{i}": _into(layer) for i, layer in enumerate(model.head[:-1])}


def outgoing(model: Model) -> dict[str, list[Tensor]]:
    """By layer the weights that its units go into, each (…, units, outputs)."""
    if isinstance(model, FFN):
        start = _num_windows(model)
        return {f"layers.{i}": _out_of(layer) for i, layer in enumerate(model.layers[start + 1 :], start)}
    assert isinstance(model, SparseMoE)
    experts = model.experts
    into_experts = experts.weight_in.transpose(0, 1).flatten(1)  # (D, E·H)
    inner: dict[str, list[Tensor]] = {
        "stem": [model.router.gate, into_experts],
        "experts": [experts.weight_out],
        "output": _out_of(model.head[0]),
    }
    return inner | {f"head.{i}": _out_of(layer) for i, layer in enumerate(model.head[1:])}


def _num_windows(model: FFN) -> int:
    """Layers before the dense ones."""
    return len(model.config.windows)


def _linear(layer: nn.Module) -> nn.Linear:
    assert isinstance(layer, nn.Linear)
    return layer


def _into(layer: nn.Module) -> list[Tensor]:
    return [_linear(layer).weight.T, _linear(layer).bias.unsqueeze(0)]


def _out_of(layer: nn.Module) -> list[Tensor]:
    return [_linear(layer).weight.T]


def masked_logits(model: Model, pixels: Tensor, masks: Units) -> Tensor:
    """The forward pass with every hidden unit's activation multiplied by its mask; of 0, as if the unit were gone."""
    if isinstance(model, FFN):
        return _masked_chain(model.layers, "layers", model.normalize(pixels), masks)
    assert isinstance(model, SparseMoE)
    hidden_BD = model.embed(pixels) * masks["stem"]
    decision, experts = model.router(hidden_BD), model.experts
    mixed_BO = hidden_BD.new_zeros(len(hidden_BD), model.config.output_width)
    for e in range(model.config.routing.num_experts):
        image_N, place_N = (decision.experts_BK == e).nonzero(as_tuple=True)
        inner_NH = (
            torch.addmm(experts.bias_in[e], hidden_BD[image_N], experts.weight_in[e]).relu() * masks["experts"][e]
        )
        output_NO = torch.addmm(experts.bias_out[e], inner_NH, experts.weight_out[e])
        mixed_BO = mixed_BO.index_add(0, image_N, output_NO * decision.weights_BK[image_N, place_N].unsqueeze(1))
    return _masked_chain(model.head, "head", mixed_BO.relu() * masks["output"], masks)


def _masked_chain(layers: nn.ModuleList, name: str, rows: Tensor, masks: Units) -> Tensor:
    for index, layer in enumerate(layers[:-1]):
        rows = layer(rows).relu()
        if (mask := masks.get(f"{name}.{index}")) is not None:
            rows = rows * mask
    logits: Tensor = layers[-1](rows)
    return logits


def with_units(model: Model, kept: Places) -> Model:
    """The same model with these units only, in evaluation mode; experts that shared a base end without one."""
    return _smaller_ffn(model, kept) if isinstance(model, FFN) else _smaller_moe(model, kept)


def with_more_units(model: SparseMoE, *, stem: int, experts: int, output: int) -> SparseMoE:
    """The same mixture in layers of these widths, in evaluation mode: whatever a unit is short of is filled with zeros.

    Experts that shared a base end without one, and those of different widths with one.
    """
    config, own = model.config, model.experts
    more_stem, more_output = stem - config.model_width, output - config.output_width
    more_inside = experts - config.expert_width
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("experts.")}
    weights |= {
        "stem.weight": F.pad(_linear(model.stem).weight, (0, 0, 0, more_stem)),
        "stem.bias": F.pad(_linear(model.stem).bias, (0, more_stem)),
        "router.gate": F.pad(model.router.gate, (0, 0, 0, more_stem)),
        "router.noise": F.pad(model.router.noise, (0, 0, 0, more_stem)),
        "experts.weight_in": F.pad(own.weight_in, (0, more_inside, 0, more_stem)),
        "experts.bias_in": F.pad(own.bias_in, (0, more_inside)),
        "experts.weight_out": F.pad(own.weight_out, (0, more_output, 0, more_inside)),
        "experts.bias_out": F.pad(own.bias_out, (0, more_output)),
        "head.0.weight": F.pad(_linear(model.head[0]).weight, (0, more_output)),
    }
    wider = replace(
        config, model_width=stem, expert_width=experts, expert_widths=None, output_width=output, shared_rank=None
    )
    loaded = _load(wider, weights)
    assert isinstance(loaded, SparseMoE)
    return loaded


def _smaller_ffn(model: FFN, kept: Places) -> Model:
    places, start = [own for (own,) in kept.values()], _num_windows(model)
    weights = model.state_dict()
    weights |= _smaller_chain(model.layers[start:], "layers", [None, *places, None], start)
    return _load(replace(model.config, widths=tuple(map(len, places))), weights)


def _smaller_moe(model: SparseMoE, kept: Places) -> Model:
    (stem,), inside, (output,) = kept["stem"], kept["experts"], kept["output"]
    head = [own for name, (own, *_) in kept.items() if name.startswith("head.")]
    widths = tuple(map(len, inside))
    weights = dict(model.normalize.state_dict(prefix="normalize."))
    weights |= {"stem.weight": _linear(model.stem).weight[stem], "stem.bias": _linear(model.stem).bias[stem]}
    weights |= {"router.gate": model.router.gate[stem], "router.noise": model.router.noise[stem]}
    stacked = model.experts
    before = map(ExpertWeights, stacked.weight_in, stacked.bias_in, stacked.weight_out, stacked.bias_out)
    after = [_smaller_expert(own, stem, units, output, max(widths)) for own, units in zip(before, inside, strict=True)]
    for name, parts in zip(ExpertWeights._fields, zip(*after, strict=True), strict=True):
        weights[f"experts.{name}"] = torch.stack(parts)
    weights |= _smaller_chain(model.head, "head", [output, *head, None])
    config = replace(
        model.config,
        model_width=len(stem),
        expert_width=max(widths),
        expert_widths=widths if len(set(widths)) > 1 else None,
        output_width=len(output),
        head_widths=tuple(map(len, head)),
        shared_rank=None,
    )
    return _load(config, weights)


def _smaller_expert(own: ExpertWeights, stem: Tensor, units: Tensor, output: Tensor, width: int) -> ExpertWeights:
    """With these units, and zeros up to a width."""
    more = width - len(units)
    return ExpertWeights(
        F.pad(own.weight_in[stem][:, units], (0, more)),
        F.pad(own.bias_in[units], (0, more)),
        F.pad(own.weight_out[units][:, output], (0, 0, 0, more)),
        own.bias_out[output],
    )


def _smaller_chain(
    layers: nn.ModuleList, name: str, kept: Sequence[Tensor | None], start: int = 0
) -> dict[str, Tensor]:
    """Weights of linear layers, numbered from `start`, between each two of these sets of units; None for all."""
    weights = {}
    for index, (layer, (before, after)) in enumerate(zip(layers, itertools.pairwise(kept), strict=True), start):
        weight, bias = _linear(layer).weight, _linear(layer).bias
        weight = weight if before is None else weight[:, before]
        weights[f"{name}.{index}.weight"] = weight if after is None else weight[after]
        weights[f"{name}.{index}.bias"] = bias if after is None else bias[after]
    return weights


def _load(config: ModelConfig, weights: Mapping[str, Tensor]) -> Model:
    model = build_skeleton(config)
    model.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()}, assign=True)
    return model.eval()


def without_expert(model: SparseMoE, expert: int) -> SparseMoE:
    """The same mixture with one expert closed.

    Raises:
        ValueError: there is no other expert.
    """
    return with_experts(model, [index for index in range(model.config.routing.num_experts) if index != expert])


def with_experts(model: SparseMoE, kept: Sequence[int]) -> SparseMoE:
    """The same mixture with these experts only, in evaluation mode: images of the others go to the best of these.

    A gate over all experts is then one over all that are left, and K falls to their number.

    Raises:
        ValueError: none is left.
    """
    if not kept:
        raise ValueError("a mixture of one expert has none to spare")
    chosen, config = list(kept), model.config
    weights = model.state_dict()
    for name, weight in weights.items():
        if name.startswith("router."):
            weights[name] = weight[:, chosen]
        elif name.startswith("experts.") and name not in BASES:
            weights[name] = weight[chosen]
    rest = replace(config.routing, num_experts=len(chosen), top_k=min(config.routing.top_k, len(chosen)))
    own_widths: dict[str, Any] = {}
    if config.expert_widths is not None:
        widths = tuple(config.expert_widths[expert] for expert in chosen)
        own_widths = {"expert_width": max(widths), "expert_widths": widths}
        for name, axis in (("weight_in", 2), ("bias_in", 1), ("weight_out", 1)):
            weights[f"experts.{name}"] = weights[f"experts.{name}"].narrow(axis, 0, max(widths)).contiguous()
    with torch.device("meta"):  # draws no weights
        smaller = SparseMoE(replace(config, routing=rest, **own_widths))
    smaller.load_state_dict(weights, assign=True)
    return smaller.eval()


def as_dense(model: SparseMoE) -> FFN:
    """A mixture of one expert as the dense FFN that it is: every image goes there, with weight 1."""
    config, (only,) = model.config, model.experts.each()
    hidden = [linear_of(only.weight_in, only.bias_in), linear_of(only.weight_out, only.bias_out)]
    widths = (config.model_width, config.expert_width, config.output_width, *config.head_widths)
    with torch.device("meta"):
        dense = FFN(FFNConfig(widths, config.data, pool=config.pool))
    layers = nn.ModuleList([model.stem, *hidden, *model.head])
    weights = {f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}
    weights |= {f"normalize.{name}": tensor for name, tensor in model.normalize.state_dict().items()}
    dense.load_state_dict(weights, assign=True)
    return dense.eval()
