"""Which weights become zero, that they stay so, and that the rest learns."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import make_dataset, spec
from torch import Tensor
from torch.nn import functional as F

from mnist_lab.compress import prune_weights as p
from mnist_lab.compress.finetune import Finetuning, finetune
from mnist_lab.compress.prune_weights import Matrix, PruneWeights, WeightPruning, weight_matrices
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.models import PRESETS, Model, ModelConfig
from mnist_lab.models.ffn import FFNConfig
from mnist_lab.models.moe import RoutingConfig, SparseMoE, SparseMoEConfig
from mnist_lab.training import Recipe

MOE = SparseMoEConfig(16, 12, 8, (6,), RoutingConfig(num_experts=3), spec(0.18, 0.18))
CONFIGS: dict[str, ModelConfig] = {"ffn": FFNConfig((16, 8), spec(0.18, 0.18)), "moe": MOE}


def make_work(name: str, epochs: int = 2) -> Work:
    work = Work(make_dataset(), PRESETS["compact"], Recipe(epochs=epochs, batch_size=32), 0, "cpu", name)
    return replace(work, source=work.build(CONFIGS[name]).eval())


def prune(work: Work, finetuning: Finetuning = Finetuning(finetune_epochs=2), **settings: Any) -> tuple[Model, Made]:
    """The pruned model and all that is said of it; the work's own source stays as it is."""
    made = PruneWeights(WeightPruning(**settings), finetuning).make(replace(work, source=copy.deepcopy(work.source)))
    return made.model, made


def zeros_of(model: Model) -> dict[Matrix, float]:
    return {m: float((m.of(model.get_parameter(m.parameter)) == 0).float().mean()) for m in weight_matrices(model)}


@pytest.mark.parametrize("name", CONFIGS)
def test_matrices_are_all_weights_but_the_routers(name: str) -> None:
    model = make_work(name).source
    assert model is not None
    found = sum(m.of(model.get_parameter(m.parameter)).numel() for m in weight_matrices(model))
    sizes = {n: w.numel() for n, w in model.named_parameters() if w.ndim > 1 and "bias" not in n and "router" not in n}
    assert found == sum(sizes.values())


@torch.no_grad()
def test_inputs_of_a_mixture_are_those_of_its_forward_pass() -> None:
    work = make_work("moe")
    model, pixels = work.source, work.dataset.train.pixels[:50]
    assert isinstance(model, SparseMoE)
    inputs = p.layer_inputs(model, pixels)
    assert inputs.keys() == set(weight_matrices(model))
    last = model.head[-1]
    torch.testing.assert_close(last(inputs[Matrix("head.1.weight", None, True)].rows), model(pixels))
    routed = model.routed(pixels)
    for expert in range(3):
        visits = routed.experts == expert
        found = inputs[Matrix("experts.weight_in", expert)]
        assert len(found.rows) == int(visits.sum())
        assert found.mean_gate == pytest.approx(float(routed.weights[visits].mean()))
        torch.testing.assert_close(found.rows, model.embed(pixels)[visits.any(dim=1)])


@pytest.mark.parametrize("name", CONFIGS)
def test_wanda_scores_a_weight_by_its_input_and_an_experts_by_its_gate(name: str) -> None:
    work = make_work(name)
    model, pixels = work.source, work.calibration(100)
    assert model is not None
    inputs = p.layer_inputs(model, pixels)
    for matrix, scale in p.importance(model, "wanda", pixels).items():
        rows, gate = inputs[matrix]
        expected = [gate * math.sqrt(float((rows[:, i] ** 2).sum())) for i in range(rows.shape[1])]
        torch.testing.assert_close(scale.flatten(), torch.tensor(expected))


def test_layers_keep_their_share_and_all_together_theirs() -> None:
    torch.manual_seed(0)
    scores: dict[Matrix, Tensor] = {Matrix("a"): torch.rand(5, 4), Matrix("b"): 100 * torch.rand(10, 3) ** 4}
    kept = dict.fromkeys(scores, 0.3)
    by_layer = p.choose_kept(scores, kept, "layer")
    assert [int(mask.sum()) for mask in by_layer.values()] == [6, 9]
    for matrix, mask in by_layer.items():
        assert scores[matrix][mask == 1].min() > scores[matrix][mask == 0].max()
    overall = p.choose_kept(scores, kept, "global")
    assert sum(int(mask.sum()) for mask in overall.values()) == 15
    scaled = {matrix: score / score.mean() for matrix, score in scores.items()}
    bar = min(float(scaled[matrix][mask == 1].min()) for matrix, mask in overall.items())
    assert all(bool((scaled[matrix][mask == 0] < bar).all()) for matrix, mask in overall.items())


@pytest.mark.parametrize("worth", [[1.0, 1, 1, 1], [10, 1, 1, 1], [0, 0, 0, 0], [5, 0, 0, 0], [3, 2, 1, 0]])
@pytest.mark.parametrize("mean", [0.05, 0.5, 0.9])
def test_shares_have_the_mean_asked_for_and_follow_worth(worth: list[float], mean: float) -> None:
    shares = p.share_out(torch.tensor(worth, dtype=torch.float32), mean)
    assert float(shares.mean()) == pytest.approx(mean, abs=1e-6)
    assert 0 < shares.min() <= shares.max() <= 1
    assert shares.tolist() == sorted(shares.tolist(), reverse=True)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("schedule", ["one-shot", "ramp"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
def test_zeros_are_as_many_as_asked_for_and_the_rest_learns(name: str, schedule: str, criterion: str) -> None:
    work = make_work(name)
    model, made = prune(work, ratio=0.75, schedule=schedule, criterion=criterion)
    assert all(share == pytest.approx(0.75, abs=0.01) for share in zeros_of(model).values())
    assert made.proof["zeros"] == pytest.approx(0.75, abs=0.01)
    assert len(made.curves) == 2
    assert made.curves[1].train_terms["cross_entropy"] < made.curves[0].train_terms["cross_entropy"]
    assert work.source is not None
    assert model.state_dict().keys() == work.source.state_dict().keys()
    assert [*model.named_parameters()]
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())


def test_one_shot_without_training_zeroes_the_smallest_and_touches_nothing_else() -> None:
    work = make_work("moe")
    model, made = prune(work, Finetuning(finetune_epochs=0), ratio=0.5, schedule="one-shot")
    assert made.curves == []
    before = work.source
    assert before is not None
    for matrix in weight_matrices(model):
        was, now = (matrix.of(m.get_parameter(matrix.parameter)) for m in (before, model))
        torch.testing.assert_close(now[now != 0], was[now != 0])
        assert was[now == 0].abs().max() < now[now != 0].abs().min()
    assert torch.equal(model.get_parameter("router.gate"), before.get_parameter("router.gate"))


def test_ramp_is_cubic() -> None:
    work = make_work("ffn")
    assert work.source is not None
    scale = p.importance(work.source, "magnitude", work.calibration(10))
    pruner = p.Pruner(work.source, scale, dict.fromkeys(scale, 0.2))
    for progress in (0.0, 0.25, 0.5, 1.0, 2.0):
        pruner.cut(progress)
        pruned = torch.cat([(w == 0).flatten() for n, w in _masked(work.source)]).float().mean()
        assert float(pruned) == pytest.approx(0.8 * (1 - (1 - min(progress, 1)) ** 3), abs=0.01)


def _masked(model: Model) -> list[tuple[str, Tensor]]:
    return [(name, layer.weight) for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]


@pytest.mark.parametrize("allocation", ["utilization", "sensitivity"])
def test_experts_share_out_what_they_keep(allocation: str) -> None:
    work = make_work("moe")
    even, _ = prune(work, Finetuning(finetune_epochs=0), ratio=0.6)
    adapted, _ = prune(work, Finetuning(finetune_epochs=0), ratio=0.6, allocation=allocation)
    ours, others = zeros_of(adapted), zeros_of(even)
    experts = [matrix for matrix in ours if matrix.parameter == "experts.weight_in"]
    assert sum(ours[m] for m in experts) == pytest.approx(sum(others[m] for m in experts), abs=0.02)
    assert len({round(ours[m], 3) for m in experts}) > 1
    assert all(ours[m] == others[m] for m in ours if m.expert is None)
    if allocation == "utilization":
        assert isinstance(work.source, SparseMoE)
        pixels = work.dataset.train.pixels[: p.CALIBRATION_SIZE]
        visits = torch.bincount(work.source.routed(pixels).experts.flatten(), minlength=3)
        assert ours[experts[int(visits.argmax())]] < ours[experts[int(visits.argmin())]]


def test_loss_by_expert_is_that_of_the_images_that_visited_it() -> None:
    work = make_work("moe")
    before = work.build(replace(MOE, routing=RoutingConfig(num_experts=4))).eval()
    assert isinstance(before, SparseMoE)
    with torch.no_grad():
        before.router.gate[:, 3] = before.router.gate[:, :3].min(dim=1).values - 1  # the last for everyone
    model, made = prune(replace(work, source=before), Finetuning(finetune_epochs=0), ratio=0.9)
    found, (pixels, labels) = made.proof["by_expert"], work.dataset.validation
    visits = [(before.routed(pixels).experts == expert).any(dim=1) for expert in range(4)]
    assert found["load"] == [float(own.sum()) / (2 * len(labels)) for own in visits]
    assert len(set(found["load"])) == 4
    for own, rise in zip(visits[:3], found["loss_rise"], strict=False):
        was, now = (F.cross_entropy(m(pixels[own]), labels[own]).item() for m in (before, model))
        assert rise == pytest.approx(now - was, abs=1e-5)
    assert found["loss_rise"][3] is None
    assert "by_expert" not in prune(make_work("ffn"), Finetuning(finetune_epochs=0), ratio=0.9)[1].proof


def test_teaching_itself_pulls_towards_what_it_was() -> None:
    work = make_work("ffn")
    _, alone = prune(work, ratio=0.5)
    _, taught = prune(work, Finetuning(finetune_epochs=2, teacher="self"), ratio=0.5)
    assert "distillation" in taught.curves[0].train_terms
    assert "distillation" not in alone.curves[0].train_terms


def test_only_what_is_named_is_trained() -> None:
    work = make_work("moe")
    assert work.source is not None
    before = copy.deepcopy(work.source)
    finetune(work, work.source, before, Finetuning(finetune_epochs=1), only=["router.gate"])
    changed = {n for n, w in work.source.named_parameters() if not torch.equal(w, before.get_parameter(n))}
    assert changed == {"router.gate"}
    assert all(parameter.requires_grad for parameter in work.source.parameters())


def test_fine_tuning_is_a_fifth_of_the_recipe_unless_told() -> None:
    work = make_work("ffn", epochs=10)
    assert len(prune(work, Finetuning(), ratio=0.5)[1].curves) == 2
    assert len(prune(work, Finetuning(finetune_epochs=1), ratio=0.5)[1].curves) == 1


def test_what_changes_nothing_is_an_error() -> None:
    work = make_work("ffn")
    model, _ = prune(work, Finetuning(finetune_epochs=0), ratio=0.9)
    with pytest.raises(RunFailed, match="no weight became zero"):
        prune(replace(work, source=model), Finetuning(finetune_epochs=0), ratio=0.5)
    with pytest.raises(RunFailed, match="no experts"):
        prune(work, ratio=0.5, allocation="utilization")


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratio_out_of_range_is_the_users_error(ratio: float) -> None:
    with pytest.raises(UserError, match="--ratio"):
        WeightPruning(ratio=ratio)
    with pytest.raises(UserError, match="--allocation"):
        WeightPruning(scope="global", allocation="sensitivity")
    with pytest.raises(UserError, match="--finetune-epochs"):
        Finetuning(finetune_epochs=-1)
