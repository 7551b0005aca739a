"""What a small mixture learns from a larger one: each term by its formula, of all experts, through a map that goes."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_prune_experts import make_moe
from tiny import make_dataset, make_lab
from torch import Tensor, nn

from mnist_lab.compress.distill_mixture import (
    DistilMixture,
    MappedStudent,
    Matching,
    SmallMixture,
    match_experts,
    mixture_objective,
    router_divergence,
)
from mnist_lab.compress.train import TrainMoE
from mnist_lab.errors import UserError
from mnist_lab.experiments.make import ensure_weights
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.technique import Work
from mnist_lab.models import PRESETS
from mnist_lab.models.ffn import FFN, FFNConfig
from mnist_lab.models.moe import RoutingConfig, SparseMoE, SparseMoEConfig
from mnist_lab.training import Batch, EpochMetrics, LossTerms, Objective, Recipe, StepLoss

SPLIT = make_dataset().train
BATCH = Batch(SPLIT.pixels[:64], SPLIT.labels[:64], torch.arange(64))
RECIPE = Recipe(epochs=2, batch_size=64, learning_rate=3e-3)
ROUTING = RoutingConfig(num_experts=3, balance="switch", balance_weight=0.05)
MOE = Row("MoE", TrainMoE(ROUTING))

# Of how many experts of teacher and student which are in a group: the teacher's, the student's.
GROUPS: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {
    (2, 2): [([0], [0]), ([1], [1])],
    (4, 2): [([0, 2], [0]), ([1, 3], [1])],
    (2, 4): [([0], [0, 2]), ([1], [1, 3])],
    (3, 2): [([0, 2], [0]), ([1], [1])],
    (2, 3): [([0], [0, 2]), ([1], [1])],
}
EVERY_GROUPING = pytest.mark.parametrize("numbers", GROUPS)


def make_student(teacher: SparseMoE, num_experts: int = 2, width: int = 12, seed: int = 1) -> MappedStudent:
    """In training."""
    torch.manual_seed(seed)
    config = SmallMixture(num_experts, width).config(teacher, teacher.config.data)
    return MappedStudent(SparseMoE(config), nn.Linear(width, teacher.config.output_width, bias=False)).train()


def terms_of(teacher: SparseMoE, model: MappedStudent) -> LossTerms:
    """Those of router and experts."""
    return mixture_objective(no_terms, teacher, Matching(0.3, 0.5))(model, BATCH).terms


def no_terms(model: nn.Module, batch: Batch) -> StepLoss:
    return StepLoss({})


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(logit) for logit in logits]
    return [power / sum(powers) for power in powers]


def one_by_one(model: SparseMoE) -> list[Tensor]:
    """What each expert gives of every image."""
    hidden = model.embed(BATCH.pixels)
    return [(hidden @ e.weight_in + e.bias_in).relu() @ e.weight_out + e.bias_out for e in model.experts.each()]


@EVERY_GROUPING
def test_router_term_is_the_divergence_of_groups(numbers: tuple[int, int]) -> None:
    teacher = make_moe(RoutingConfig(numbers[0]))
    model = make_student(teacher, numbers[1])
    with torch.no_grad():
        theirs, ours = (m.embed(BATCH.pixels) @ m.router.gate for m in (teacher, model.student))
    expected = 0.0
    for their_logits, our_logits in zip(theirs.tolist(), ours.tolist(), strict=True):
        p, q = softmax(their_logits), softmax(our_logits)
        for of_teacher, of_student in GROUPS[numbers]:
            share = sum(p[i] for i in of_teacher)
            expected += share * math.log(share / sum(q[i] for i in of_student))
    term = terms_of(teacher, model)["router"]
    assert term.value.item() == pytest.approx(expected / len(BATCH.pixels), rel=1e-4)
    assert term.weight == 0.3


@EVERY_GROUPING
def test_experts_term_is_the_relative_error_of_all_experts_on_all_images(numbers: tuple[int, int]) -> None:
    teacher = make_moe(RoutingConfig(numbers[0], 1))
    model = make_student(teacher, numbers[1])
    theirs, ours = one_by_one(teacher), one_by_one(model.student)
    error, norm = torch.zeros(()), torch.zeros(())
    for of_teacher, of_student in GROUPS[numbers]:
        target = sum((theirs[i] for i in of_teacher), torch.zeros(())) / len(of_teacher)
        for i in of_student:
            error, norm = error + (model.mapping(ours[i]) - target).square().sum(), norm + target.square().sum()
    term = terms_of(teacher, model)["experts"]
    torch.testing.assert_close(term.value, error / norm)
    assert term.weight == 0.5
    assert match_experts(*numbers) == GROUPS[numbers]


def test_experts_that_no_image_chooses_learn_too() -> None:
    teacher = make_moe(RoutingConfig(3, 1))
    model = make_student(teacher, 3)
    with torch.no_grad():
        for mixture in (teacher, model.student):
            mixture.router.gate[:, 0] = 1.0  # what it sees is never negative
            mixture.router.gate[:, 1:] = -1.0
            assert mixture.routed(BATCH.pixels).expert_load[1:].sum() <= 3  # noise sends hardly any elsewhere
    terms_of(teacher, model)["experts"].value.backward()
    gradient = model.student.experts.get_parameter("weight_out").grad
    assert gradient is not None
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_student_that_is_its_teacher_pays_nothing_for_it() -> None:
    teacher = make_moe()
    model = MappedStudent(copy.deepcopy(teacher), nn.Identity()).train()
    values = {name: term.value.item() for name, term in terms_of(teacher, model).items()}
    assert values == pytest.approx({"router": 0, "experts": 0}, abs=1e-6)


def test_teacher_is_frozen_and_no_noise_counts() -> None:
    teacher = make_moe()
    model = make_student(teacher, 4)
    first, second = (sum(term.value for term in terms_of(teacher, model).values()) for _ in range(2))
    assert isinstance(first, Tensor)
    first.backward()
    assert torch.equal(first, torch.as_tensor(second))
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert model.student.router.gate.grad is not None


def test_router_that_is_all_but_certain_has_a_finite_term_and_gradient() -> None:
    ours, theirs = torch.tensor([[500.0, -500.0]], requires_grad=True), torch.tensor([[-500.0, 500.0]])
    divergence = router_divergence(ours, theirs)
    divergence.backward()
    assert ours.grad is not None
    assert math.isfinite(divergence.item())
    assert ours.grad.isfinite().all()


@pytest.mark.parametrize(
    ("matching", "names"),
    [
        (Matching(0.1, 0.2), {"router", "experts"}),
        (Matching(0.0, 0.2), {"experts"}),
        (Matching(0.1, 0.0), {"router"}),
        (Matching(0.0, 0.0), set()),
    ],
)
def test_a_weight_of_zero_switches_a_term_off(matching: Matching, names: set[str]) -> None:
    lab_work = Work(make_dataset(), PRESETS["compact"], RECIPE, 0, "cpu", "x", teacher=make_moe())
    made = DistilMixture(student=SmallMixture(2, 12), matching=matching).make(lab_work)
    for epoch in made.curves:
        assert set(epoch.train_terms) == {"distillation", "cross_entropy", "balance"} | names
        assert len(epoch.expert_load) == 2
        assert sum(epoch.expert_load) == pytest.approx(1)
    assert ("groups" in made.proof) == bool(names)


def test_logits_alone_can_be_any_models() -> None:
    teacher = FFN(FFNConfig((8,), make_dataset().spec))
    work = Work(make_dataset(), PRESETS["compact"], RECIPE, 0, "cpu", "x", teacher=teacher)
    made = DistilMixture(student=SmallMixture(3, 8), matching=Matching(0, 0)).make(work)
    assert isinstance(made.model, SparseMoE)
    assert made.model.config.routing == RoutingConfig(3)


@pytest.mark.parametrize(("width", "has_map"), [(12, True), (8, False)])  # the teacher's experts give 8
def test_map_is_learned_where_widths_differ_and_then_dropped(
    monkeypatch: pytest.MonkeyPatch, width: int, has_map: bool
) -> None:
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    real_fit = Work.fit

    def spy(self: Work, model: nn.Module, objective: Objective, **options: Any) -> list[EpochMetrics]:
        before.update({name: tensor.clone() for name, tensor in model.named_parameters()})
        curves = real_fit(self, model, objective, **options)
        after.update(model.named_parameters())
        return curves

    monkeypatch.setattr(Work, "fit", spy)
    work = Work(make_dataset(), PRESETS["compact"], RECIPE, 0, "cpu", "x", teacher=make_moe())
    made = DistilMixture(student=SmallMixture(2, width)).make(work)
    in_map = {name for name in before if name.startswith("mapping.")}
    assert bool(in_map) == has_map
    assert all(not torch.equal(before[name], after[name]) for name in in_map)
    assert set(made.model.state_dict()) == set(SparseMoE(made.model.config).state_dict())  # type: ignore[arg-type]


def test_student_is_routed_and_balanced_as_its_teacher_and_of_one_width() -> None:
    routing = RoutingConfig(8, 3, "switch", 0.1, 1.5, noise=False, gate="all")
    teacher = SparseMoE(SparseMoEConfig(16, 12, 8, (6,), routing, make_dataset().spec))
    config = SmallMixture(4, 20).config(teacher, make_dataset().spec)
    assert config.routing == replace(routing, num_experts=4)
    assert (config.model_width, config.expert_width, config.output_width, config.head_widths) == (20, 20, 20, ())
    assert SmallMixture(2, 20).config(teacher, make_dataset().spec).routing.top_k == 2


@pytest.mark.parametrize("num_experts", [1, 5])
def test_row_makes_a_plain_mixture_and_says_which_experts_match(tmp_path: Path, num_experts: int) -> None:
    lab = make_lab(tmp_path, recipe=RECIPE)
    ensure_weights(Run(lab, MOE, 0))
    run = Run(lab, Row("Small", DistilMixture(student=SmallMixture(num_experts, 4)), teacher=MOE), 0)
    ensure_weights(run)
    model = run.load()
    assert isinstance(model, SparseMoE)
    assert model.config.routing == replace(ROUTING, num_experts=num_experts, top_k=min(2, num_experts))


def test_settings_beyond_use_are_the_users_error() -> None:
    for wrong in (0, -1, 2000):
        with pytest.raises(UserError, match=f"--student-experts {wrong}"):
            SmallMixture(student_experts=wrong)
    for wrong in (0, -4, 2, 30, 5000):
        with pytest.raises(UserError, match=f"--student-width {wrong}"):
            SmallMixture(student_width=wrong)
    for weight in (-0.1, math.nan, math.inf):
        with pytest.raises(UserError, match="--router-weight"):
            Matching(router_weight=weight)
        with pytest.raises(UserError, match="--experts-weight"):
            Matching(experts_weight=weight)
