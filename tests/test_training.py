import copy
from dataclasses import replace

import pytest
import torch
from tiny import spec
from torch import nn
from torch.nn.utils import parameters_to_vector

from mnist_lab import measure
from mnist_lab.command.options import Options
from mnist_lab.compress.distill import DistillationConfig, distillation_objective
from mnist_lab.data import Augmentation, Dataset
from mnist_lab.errors import TrainingDiverged
from mnist_lab.models import PRESETS, ModelConfig, build_model
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.training import AdamW, Batch, Recipe, StepLoss, Term, fit, sum_terms, torch_predictor

pytestmark = pytest.mark.slow

RECIPE = Recipe(epochs=8, batch_size=32, learning_rate=3e-3, augmentation=Augmentation())
FFN_CONFIG = PRESETS["compact"].student(spec(0.18, 0.18))
MOE_CONFIG = PRESETS["compact"].moe(spec(0.18, 0.18), RoutingConfig(capacity_factor=1.0))


@pytest.mark.parametrize("config", [FFN_CONFIG, MOE_CONFIG], ids=["ffn", "moe"])
def test_same_seed_gives_the_same_bits_and_another_seed_does_not(config: ModelConfig, toy_dataset: Dataset) -> None:
    recipe = replace(RECIPE, epochs=2)
    torch.manual_seed(0)
    untrained = build_model(config)
    weights = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(untrained)
        fit(model, toy_dataset, recipe, seed=seed)
        weights.append(parameters_to_vector(model.parameters()))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("config", [FFN_CONFIG, MOE_CONFIG], ids=["ffn", "moe"])
def test_fit_learns_and_says_so_in_its_curves(config: ModelConfig, toy_dataset: Dataset) -> None:
    torch.manual_seed(0)
    model = build_model(config)
    curves = fit(model, toy_dataset, replace(RECIPE, augmentation=None), seed=0)
    pixels, labels = toy_dataset.validation.numpy()
    reached = measure.accuracy(measure.predict(torch_predictor(model), pixels), labels)
    assert reached > 0.9
    assert curves[-1].validation_acc == reached
    assert curves[-1].validation_loss < curves[0].validation_loss
    assert [epoch.epoch for epoch in curves] == list(range(1, 9))
    assert not model.training


def test_moe_curves_carry_load_and_dropped_share(toy_dataset: Dataset) -> None:
    torch.manual_seed(0)
    curves = fit(build_model(MOE_CONFIG), toy_dataset, replace(RECIPE, epochs=1), seed=0)
    assert sum(curves[0].expert_load) == pytest.approx(1)
    assert set(curves[0].train_terms) == {"cross_entropy", "balance"}
    assert curves[0].dropped_share is not None
    assert 0 < curves[0].dropped_share < 1


def test_loss_that_is_not_finite_stops_with_its_step(toy_dataset: Dataset) -> None:
    calls = 0

    def objective(model: nn.Module, batch: Batch) -> StepLoss:
        nonlocal calls
        calls += 1
        return StepLoss({"cross_entropy": Term(model(batch.pixels).sum() * (float("nan") if calls == 13 else 0.0))})

    with pytest.raises(TrainingDiverged, match="step 3 of epoch 2"):
        fit(build_model(FFN_CONFIG), toy_dataset, RECIPE, seed=0, objective=objective)


def test_weights_that_the_last_update_broke_stop_the_run(toy_dataset: Dataset) -> None:
    steps = 8 * 10

    def objective(model: nn.Module, batch: Batch) -> StepLoss:
        nonlocal steps
        steps -= 1
        loss = model(batch.pixels).sum() * 0.0
        if steps == 0:
            loss.register_hook(lambda gradient: gradient * float("nan"))
        return StepLoss({"cross_entropy": Term(loss)})

    with pytest.raises(TrainingDiverged, match="after epoch 8"):
        fit(build_model(FFN_CONFIG), toy_dataset, RECIPE, seed=0, objective=objective)


def test_default_generator_is_left_alone(toy_dataset: Dataset) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fit(build_model_without_draws(), toy_dataset, replace(RECIPE, epochs=1), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def build_model_without_draws() -> nn.Module:
    with torch.random.fork_rng():
        return build_model(MOE_CONFIG)


def test_learning_rate_warms_up_then_falls_to_zero(toy_dataset: Dataset) -> None:
    curves = fit(build_model(FFN_CONFIG), toy_dataset, replace(RECIPE, warmup_share=0.5), seed=0)
    rates = [epoch.learning_rate for epoch in curves]
    assert rates[:4] == sorted(rates[:4])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert max(rates) <= RECIPE.learning_rate
    assert rates[-1] < 0.02 * RECIPE.learning_rate


def test_wide_models_have_a_best_recipe_of_their_own() -> None:
    wide, compact = Options(preset="wide", recipe="best"), Options(recipe="best")
    assert wide.make_recipe().epochs > compact.make_recipe().epochs
    assert Options(preset="wide").make_recipe() == Options().make_recipe()


def test_optimizer_is_torchs_adamw_bit_by_bit_and_leaves_out_what_has_no_gradient() -> None:
    models = [nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    ours = AdamW(models[0], weight_decay=0.1)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    for step in range(1, 6):
        rows = torch.randn(16, 20)
        for model in models:
            model.zero_grad()
            model(rows).square().mean().backward()
        theirs.param_groups[0]["lr"] = 1e-3 / step
        ours.step(1e-3 / step)
        theirs.step()
    for own, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(own, other)
    assert models[0].get_parameter("idle").tolist() == [1, 1, 1]


def test_students_terms_are_told_before_their_weights_and_an_moe_keeps_its_balance(toy_dataset: Dataset) -> None:
    teacher = build_model(FFN_CONFIG)
    config = DistillationConfig(temperature=2, alpha=0.5)
    objective = distillation_objective(teacher, config, device="cpu")
    student = build_model(MOE_CONFIG)
    curves = fit(student, toy_dataset, replace(RECIPE, epochs=1), seed=0, objective=objective)
    assert set(curves[0].train_terms) == {"distillation", "cross_entropy", "balance"}
    assert sum(curves[0].expert_load) == pytest.approx(1)
    batch = Batch(*toy_dataset.train, torch.arange(300))
    terms = objective(student.eval(), batch).terms
    told = torch.nn.functional.cross_entropy(student(batch.pixels), batch.labels)
    assert terms["cross_entropy"].value.item() == pytest.approx(told.item())
    assert (terms["cross_entropy"].weight, terms["distillation"].weight, terms["balance"].weight) == (0.5, 2.0, 0.02)
    weighted = 0.5 * terms["cross_entropy"].value + 2 * terms["distillation"].value + 0.02 * terms["balance"].value
    assert sum_terms(terms).item() == pytest.approx(weighted.item(), rel=1e-6)
