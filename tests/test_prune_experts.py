"""Which experts stay, and that what is left is the same mixture without the others."""

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import get_args

import pytest
import torch
from tiny import make_dataset, spec

from mnist_lab.compress import prune_experts as p
from mnist_lab.compress.finetune import Finetuning
from mnist_lab.compress.prune_experts import Criterion, ExpertPruning, PruneExperts
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.technique import Work
from mnist_lab.models import PRESETS
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import RoutingConfig, SparseMoE, SparseMoEConfig
from mnist_lab.models.surgery import as_dense, with_experts
from mnist_lab.training import Recipe

NO_TRAINING = Finetuning(finetune_epochs=0)


def make_moe(routing: RoutingConfig = RoutingConfig(), seed: int = 0) -> SparseMoE:
    torch.manual_seed(seed)
    model = SparseMoE(SparseMoEConfig(16, 12, 8, (6,), routing, spec(0.18, 0.18))).eval()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    return model


def make_work(model: SparseMoE) -> Work:
    work = Work(make_dataset(), PRESETS["compact"], Recipe(epochs=2, batch_size=32), 0, "cpu", "x")
    return replace(work, source=model)


@pytest.fixture
def pixels() -> torch.Tensor:
    return make_dataset().train.pixels


@pytest.mark.parametrize("routing", [RoutingConfig(), RoutingConfig(top_k=1), RoutingConfig(gate="all")], ids=str)
def test_mixture_of_some_experts_is_as_if_the_others_could_not_be_chosen(
    routing: RoutingConfig, pixels: torch.Tensor
) -> None:
    model, kept = make_moe(routing), [1, 3]
    hidden = model.embed(pixels)
    logits = (hidden @ model.router.gate)[:, kept]
    top, places = logits.topk(routing.top_k, dim=1)
    weights = logits.softmax(dim=1).gather(1, places) if routing.weighed_over == "all" else top.softmax(dim=1)
    mixed = torch.zeros(len(pixels), 8)
    for weight, place in zip(weights.T, places.T, strict=True):
        for index, expert in enumerate(kept):
            own = (place == index).unsqueeze(1)
            inner = (hidden @ model.experts.weight_in[expert] + model.experts.bias_in[expert]).relu()
            output = inner @ model.experts.weight_out[expert] + model.experts.bias_out[expert]
            mixed += own * weight.unsqueeze(1) * output
    expected = model.head[1](model.head[0](mixed.relu()).relu())
    torch.testing.assert_close(with_experts(model, kept)(pixels), expected)


def test_all_experts_are_the_same_mixture_and_k_falls_to_what_is_left(pixels: torch.Tensor) -> None:
    model = make_moe(RoutingConfig(num_experts=4, top_k=3))
    torch.testing.assert_close(with_experts(model, range(4))(pixels), model(pixels))
    assert with_experts(model, [0, 2]).config.routing.top_k == 2
    with pytest.raises(ValueError, match="none to spare"):
        with_experts(model, [])


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_expert_is_a_dense_network(pixels: torch.Tensor, top_k: int) -> None:
    one = with_experts(make_moe(RoutingConfig(top_k=top_k)), [2])
    dense = as_dense(one)
    assert isinstance(dense, FFN)
    assert dense.config.widths == (16, 12, 8, 6)
    torch.testing.assert_close(dense(pixels), one(pixels))


def test_scores_are_those_of_their_formulas(pixels: torch.Tensor) -> None:
    model = make_moe()
    seen, routed = p.look(model, pixels), model.routed(pixels)
    for expert in range(4):
        visits = routed.experts == expert
        image = visits.any(dim=1)
        inner = (model.embed(pixels) @ model.experts.weight_in[expert] + model.experts.bias_in[expert]).relu()
        outputs = inner @ model.experts.weight_out[expert] + model.experts.bias_out[expert]
        torch.testing.assert_close(seen.outputs_EBO[expert], outputs)
        assert p.utilization(seen)[expert] == pytest.approx(float(image.float().mean()))
        gates = (routed.weights * visits).sum(dim=1)[image]
        expected = float((gates * outputs[image].norm(dim=1)).mean().detach())
        assert float(p.reap(seen)[expert]) == pytest.approx(expected, rel=1e-4)


def test_an_expert_that_says_the_same_as_another_is_the_first_to_go(pixels: torch.Tensor) -> None:
    model = make_moe()
    with torch.no_grad():
        for name in ("weight_in", "bias_in", "weight_out", "bias_out"):
            stacked = model.experts.get_parameter(name)
            stacked[2] = stacked[0] * (1.5 if "out" in name else 1)
    distinct = p.distinctness(p.look(model, pixels))
    assert set(distinct.argsort()[:2].tolist()) == {0, 2}
    assert float(distinct[0]) == pytest.approx(0, abs=1e-5)


def test_exact_is_the_best_subset_and_ablation_goes_one_by_one(pixels: torch.Tensor) -> None:
    model = make_moe()
    work = make_work(model)
    labels = work.dataset.train.labels

    def best(experts: Iterable[int], num: int) -> tuple[int, ...]:
        losses = {kept: p.loss_with(model, kept, pixels, labels) for kept in itertools.combinations(experts, num)}
        return min(losses, key=lambda kept: losses[kept])

    exact, ablation = (p.choose_experts(model, ExpertPruning(2, name), work) for name in ("exact", "ablation"))
    assert tuple(exact) == best(range(4), 2)
    assert tuple(ablation) == best(best(range(4), 3), 2)


def test_exact_grades_what_the_other_criteria_choose_on_validation_images() -> None:
    work = make_work(make_moe())
    made = PruneExperts(ExpertPruning(2, "exact"), finetuning=NO_TRAINING).make(work)
    grades, split = made.proof["grades"], work.dataset.validation
    assert set(grades) == set(get_args(Criterion))
    assert grades["exact"]["kept"] == made.proof["kept"]
    for criterion, grade in grades.items():
        source = make_moe()
        assert grade["kept"] == p.choose_experts(source, ExpertPruning(2, criterion), make_work(source))
        logits = with_experts(source, grade["kept"])(split.pixels)
        assert grade["acc"] == pytest.approx(float((logits.argmax(dim=1) == split.labels).double().mean()))
        assert grade["loss"] == pytest.approx(
            float(torch.nn.functional.cross_entropy(logits, split.labels).detach()), rel=1e-4
        )
    as_good = [name for name in grades if name != "exact" and grades[name]["kept"] == grades["exact"]["kept"]]
    assert all(name in made.proof["text"] for name in as_good)


def test_router_growth_is_since_the_models_own_first_weights(pixels: torch.Tensor) -> None:
    work = make_work(make_moe())
    assert isinstance(work.source, SparseMoE)
    initial = work.build(work.source.config)
    work.source.load_state_dict(initial.state_dict())
    with torch.no_grad():
        work.source.router.gate[:, [1, 2]] *= 3
    assert p.choose_experts(work.source, ExpertPruning(criterion="router-norm"), work) == [1, 2]


@pytest.mark.parametrize("criterion", get_args(Criterion))
@pytest.mark.parametrize("keep", [1, 2, 3])
def test_every_criterion_keeps_as_many_as_asked_for(criterion: Criterion, keep: int) -> None:
    made = PruneExperts(ExpertPruning(keep, criterion), finetuning=NO_TRAINING).make(make_work(make_moe()))
    assert len(made.proof["kept"]) == keep
    assert isinstance(made.model, FFN if keep == 1 else SparseMoE)
    if isinstance(made.model, SparseMoE):
        assert made.model.config.routing.num_experts == keep
        assert made.model.router.gate.shape[1] == keep


def test_router_alone_is_trained_towards_what_the_mixture_was() -> None:
    step = PruneExperts(ExpertPruning(2), train="router", finetuning=Finetuning(finetune_epochs=1, teacher="self"))
    model = make_moe()
    made = step.make(make_work(model))
    untrained = with_experts(model, made.proof["kept"])
    changed = {n for n, w in made.model.named_parameters() if not torch.equal(w, untrained.get_parameter(n))}
    assert changed == {"router.gate", "router.noise"}
    assert "distillation" in made.curves[0].train_terms
    with pytest.raises(UserError, match="--train router"):
        replace(step, pruning=ExpertPruning(1))


def test_experts_to_which_nothing_comes_are_no_loss_and_so_an_error() -> None:
    model = make_moe(RoutingConfig(num_experts=4, top_k=2))
    with torch.no_grad():
        model.router.gate[:, 2:] = -1e3  # what the stem gives is never negative
        model.stem.bias.add_(1)
    with pytest.raises(RunFailed, match="no image comes"):
        PruneExperts(ExpertPruning(2, "utilization"), finetuning=NO_TRAINING).make(make_work(model))


def test_bad_input_is_the_users_error() -> None:
    with pytest.raises(UserError, match="--keep"):
        ExpertPruning(0)
    with pytest.raises(UserError, match="--keep 4"):
        p.check_experts(4, ExpertPruning(4))
    with pytest.raises(UserError, match="exact"):
        p.check_experts(13, ExpertPruning(2, "exact"))
    p.check_experts(12, ExpertPruning(2, "exact"))
