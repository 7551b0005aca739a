"""The loss by layers: by its formula, without labels, and with no gradient from one layer to another."""

import copy
from collections.abc import Callable

import pytest
import torch
from test_fake_quant import make_ffn
from test_prune_experts import make_moe
from tiny import make_dataset

from mnist_lab.compress.layer_by_layer import layer_objective
from mnist_lab.models import Model
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import RoutingConfig, SparseMoE
from mnist_lab.training import Batch, LossTerms

SPLIT = make_dataset().train
BATCH = Batch(SPLIT.pixels[:64], SPLIT.labels[:64], torch.arange(64))
MODELS: dict[str, Callable[[], Model]] = {
    "ffn": make_ffn,
    "moe": make_moe,
    "top 1": lambda: make_moe(RoutingConfig(top_k=1)),
    "room for few": lambda: make_moe(RoutingConfig(capacity_factor=0.5)),
}
EVERY_MODEL = pytest.mark.parametrize("name", MODELS)


def changed(model: Model) -> Model:
    """A copy with other weights, in training."""
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other.train()


def terms_of(twin: Model, model: Model, batch: Batch = BATCH) -> LossTerms:
    return layer_objective(twin)(model, batch).terms


@EVERY_MODEL
def test_loss_is_nothing_for_the_twin_itself(name: str) -> None:
    twin = MODELS[name]()
    for term in terms_of(twin, copy.deepcopy(twin).train()).values():
        assert float(term.value.detach()) == pytest.approx(0, abs=1e-10)
        assert term.weight == 1


def test_loss_is_a_share_of_what_the_twin_gives() -> None:
    twin = make_ffn()
    model = changed(twin)
    assert isinstance(model, FFN)
    with torch.no_grad():
        hidden, theirs = (m.layers[0](m.normalize(BATCH.pixels)).relu() for m in (model, twin))
        found, target = model.layers[1](hidden).relu(), twin.layers[1](theirs).relu()
        expected = (found - target).square().sum() / target.square().sum()
    terms = terms_of(twin, model)
    assert [*terms] == ["layer 0", "layer 1", "layer 2"]
    torch.testing.assert_close(terms["layer 1"].value, expected)


@EVERY_MODEL
def test_each_layer_learns_from_its_own_error_alone(name: str) -> None:
    twin = MODELS[name]()
    model = changed(twin)
    parameters = dict(model.named_parameters())
    learned = set()
    for layer, term in terms_of(twin, model).items():
        kind, _, place = layer.partition(" ")
        found = torch.autograd.grad(term.value, [*parameters.values()], retain_graph=True, allow_unused=True)
        moving = {key: gradient for key, gradient in zip(parameters, found, strict=True) if gradient is not None}
        prefix = {"layer": f"layers.{place}.", "head": f"head.{place}.", "expert": "experts."}.get(kind, f"{kind}.")
        assert moving, layer
        assert all(key.startswith(prefix) for key in moving), layer
        if kind == "expert":
            for gradient in moving.values():
                others = [gradient[e] for e in range(4) if e != int(place)]
                assert not torch.stack(others).any()
        learned |= {key for key, gradient in moving.items() if gradient.any()}
    assert learned == set(parameters) - {"router.noise"}


@pytest.mark.parametrize("name", ["moe", "top 1", "room for few"])
def test_an_expert_learns_from_the_images_that_visit_its_twin(name: str) -> None:
    twin = MODELS[name]()
    model = changed(twin)
    assert isinstance(twin, SparseMoE)
    assert isinstance(model, SparseMoE)
    with torch.no_grad():
        model.router.gate.mul_(-1)  # where it would send them itself has no say
    visits = twin.routed(BATCH.pixels).experts
    step = layer_objective(twin)(model, BATCH)
    assert step.expert_load is not None
    assert step.expert_load.tolist() == torch.bincount(visits.flatten(), minlength=4).tolist()
    for expert in range(4):
        come = (visits == expert).any(dim=1)
        with torch.no_grad():
            found, target = (
                (m.embed(BATCH.pixels[come]) @ own.weight_in + own.bias_in).relu() @ own.weight_out + own.bias_out
                for m in (model, twin)
                for own in [list(m.experts.each())[expert]]
            )
            expected = (found - target).square().sum() / target.square().sum().clamp(min=1e-12)
        torch.testing.assert_close(step.terms[f"expert {expert}"].value.detach(), expected, rtol=1e-4, atol=1e-7)


@EVERY_MODEL
def test_labels_have_no_say(name: str) -> None:
    twin = MODELS[name]()
    model = changed(twin)
    other = BATCH._replace(labels=torch.zeros_like(BATCH.labels))
    ours, theirs = terms_of(twin, model), terms_of(twin, model, other)
    assert {key: float(term.value.detach()) for key, term in ours.items()} == {
        key: float(term.value.detach()) for key, term in theirs.items()
    }
