from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import spec

import moe_mnist
from benchmarks.mask_loop import mask_loop_forward
from mnist_lab.errors import UserError
from mnist_lab.experiments.rows import sparse_moe
from mnist_lab.models import PRESETS, PresetName, build_model, count_parameters
from mnist_lab.models.ffn import FFN, relu_chain
from mnist_lab.models.moe import (
    EveryExpert,
    Gate,
    RoutingConfig,
    SparseMoE,
    entropy_loss,
    limit_capacity,
    smooth_load,
    squared_cv,
    switch_loss,
)
from mnist_lab.models.surgery import without_expert


def make_moe(routing: RoutingConfig = RoutingConfig(), seed: int = 0) -> SparseMoE:
    torch.manual_seed(seed)
    model = build_model(PRESETS["compact"].moe(spec(), routing))
    assert isinstance(model, SparseMoE)
    torch.nn.init.normal_(model.experts.bias_in)
    torch.nn.init.normal_(model.experts.bias_out)
    return model.eval()


def silence_noise(model: SparseMoE) -> None:
    """Training mode without noise: softplus of a very negative number is zero."""
    with torch.no_grad():
        model.stem.bias.fill_(10.0)  # hidden activations above zero
        model.router.noise.fill_(-100.0)


@pytest.mark.parametrize(
    ("preset", "ffn", "moe", "student"),
    [("compact", 235_146, 730_890, 101_770), ("wide", 567_434, 1_226_634, 235_146)],
)
def test_presets_have_their_parameter_counts(preset: PresetName, ffn: int, moe: int, student: int) -> None:
    sizes = PRESETS[preset]
    assert count_parameters(build_model(sizes.ffn(spec(0, 1))))[0] == ffn
    assert count_parameters(build_model(sizes.moe(spec(0, 1), RoutingConfig())))[0] == moe
    assert count_parameters(build_model(sizes.student(spec(0, 1))))[0] == student


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    total, active = count_parameters(make_moe(RoutingConfig(num_experts=4, top_k=1)))
    assert total - active == 3 * (2 * 256 * 256 + 2 * 256)


def test_ffn_normalises_inside() -> None:
    torch.manual_seed(0)
    model = build_model(PRESETS["compact"].ffn(spec(0.25, 0.5)))
    assert isinstance(model, FFN)
    hidden = (torch.full((1, 784), 0.75) - 0.25) / 0.5
    for layer in model.layers[:-1]:
        hidden = layer(hidden).relu()
    torch.testing.assert_close(model(torch.full((1, 1, 28, 28), 0.75)), model.layers[-1](hidden))


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (1, 1), (8, 1), (3, 3)])
def test_sorted_dispatch_agrees_with_the_mask_loop(num_experts: int, top_k: int, batch: int) -> None:
    model = make_moe(RoutingConfig(num_experts=num_experts, top_k=top_k, gate="chosen"))
    pixels = torch.rand(batch, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(model(pixels), mask_loop_forward(model, pixels), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_gate_over_all_weighs_by_the_probability_among_all(top_k: int) -> None:
    model = make_moe(RoutingConfig(num_experts=5, top_k=top_k, gate="all"))
    pixels = torch.rand(40, 1, 28, 28)
    with torch.inference_mode():
        hidden, routed = model.embed(pixels), model.routed(pixels)
        probs = (hidden @ model.router.gate).softmax(dim=1)
        assert torch.equal(routed.experts, probs.topk(top_k).indices)
        torch.testing.assert_close(routed.weights, probs.topk(top_k).values)
        experts = model.experts
        inner = torch.einsum("bd,edh->ebh", hidden, experts.weight_in) + experts.bias_in.unsqueeze(1)
        outputs = torch.einsum("ebh,eho->ebo", inner.relu(), experts.weight_out) + experts.bias_out.unsqueeze(1)
        gates = probs * (probs >= routed.weights[:, -1:])
        logits = relu_chain(model.head, torch.einsum("be,ebo->bo", gates, outputs).relu())
        torch.testing.assert_close(routed.logits, logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(EveryExpert(model)(pixels), logits, atol=1e-4, rtol=1e-4)


def test_training_and_evaluation_agree_without_noise() -> None:
    model = make_moe()
    silence_noise(model)
    pixels = torch.rand(33, 1, 28, 28)
    evaluated = model(pixels)
    torch.testing.assert_close(model.train()(pixels), evaluated, atol=1e-4, rtol=1e-4)


def test_training_gradients_agree_with_the_mask_loop() -> None:
    model = make_moe().train()
    silence_noise(model)
    pixels = torch.rand(16, 1, 28, 28)
    model(pixels).square().sum().backward()
    dispatched = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    mask_loop_forward(model, pixels).square().sum().backward()
    for name in ("router.gate", "experts.weight_in", "experts.bias_in", "experts.weight_out", "experts.bias_out"):
        expected = model.get_parameter(name).grad
        assert expected is not None
        torch.testing.assert_close(dispatched[name], expected, atol=1e-3, rtol=1e-3)


def test_training_step_of_one_image_leaves_most_experts_without_rows() -> None:
    model = make_moe(RoutingConfig(num_experts=8, top_k=1)).train()
    routed = model.routed(torch.rand(1, 1, 28, 28))
    routed.logits.sum().backward()
    gradient = model.experts.weight_in.grad
    assert gradient is not None
    assert ((gradient != 0).any(dim=(1, 2)) == (routed.expert_load > 0)).all()


def test_routes_are_fixed_in_evaluation_and_noisy_in_training() -> None:
    model = make_moe()
    pixels = torch.rand(200, 1, 28, 28)
    assert torch.equal(model.routed(pixels).experts, model.routed(pixels).experts)
    model.train()
    assert not torch.equal(model.routed(pixels).experts, model.routed(pixels).experts)


def test_weights_are_the_softmax_of_the_kept_logits() -> None:
    model = make_moe()
    routed = model.routed(torch.rand(20, 1, 28, 28))
    torch.testing.assert_close(routed.weights.sum(dim=1), torch.ones(20))
    kept = routed.router_probs.gather(1, routed.experts)
    torch.testing.assert_close(routed.weights, kept / kept.sum(dim=1, keepdim=True))
    assert (kept.min(dim=1).values >= routed.router_probs.topk(3).values[:, 2]).all()


def gate_gradient(routing: RoutingConfig) -> float:
    """Largest of the task's gradients of the router."""
    model = make_moe(routing).train()
    labels = torch.arange(64) % 10
    torch.nn.functional.cross_entropy(model(torch.rand(64, 1, 28, 28)), labels).backward()
    gradient = model.router.gate.grad
    return 0.0 if gradient is None else gradient.abs().max().item()


@pytest.mark.parametrize("noise", [True, False])
def test_task_teaches_the_router_unless_one_expert_weighs_1(noise: bool) -> None:
    assert gate_gradient(RoutingConfig(top_k=1, noise=noise)) > 1e-6
    assert gate_gradient(RoutingConfig(top_k=2, noise=noise)) > 1e-6
    assert gate_gradient(RoutingConfig(top_k=1, noise=noise, gate="chosen")) == 0


@pytest.mark.parametrize(("top_k", "gate", "expected"), [(1, None, "all"), (2, None, "chosen"), (2, "all", "all")])
def test_gate_fits_the_number_of_experts_chosen(top_k: int, gate: Gate | None, expected: Gate) -> None:
    assert RoutingConfig(top_k=top_k, gate=gate).weighed_over == expected


def test_gate_names_the_model_where_it_was_given() -> None:
    assert sparse_moe(RoutingConfig(top_k=1)).name == "Sparse_MoE-K1"
    assert sparse_moe(RoutingConfig(top_k=1, gate="chosen")).name == "Sparse_MoE-K1-chosen"


AT_ALL, BALANCE_ALONE, NOTHING = "it does not learn at all", "it learns from the balance loss alone", "nothing to route"


@pytest.mark.parametrize(
    ("routing", "says"),
    [
        (RoutingConfig(), ""),
        (RoutingConfig(top_k=4), ""),
        (RoutingConfig(top_k=1), ""),
        (RoutingConfig(balance="none", noise=False), ""),
        (RoutingConfig(top_k=1, gate="chosen"), BALANCE_ALONE),
        (RoutingConfig(top_k=1, gate="chosen", balance="cv"), BALANCE_ALONE),
        (RoutingConfig(top_k=1, gate="chosen", balance="cv", noise=False), AT_ALL),
        (RoutingConfig(top_k=1, gate="chosen", balance="none"), AT_ALL),
        (RoutingConfig(top_k=1, gate="chosen", balance_weight=0), AT_ALL),
        (RoutingConfig(num_experts=1, top_k=1), NOTHING),
        (RoutingConfig(num_experts=1, top_k=1, gate="chosen"), NOTHING),
    ],
)
def test_router_that_the_task_does_not_teach_is_said_and_has_that_gradient(routing: RoutingConfig, says: str) -> None:
    assert says in routing.warning
    assert bool(routing.warning) == bool(says)
    model = make_moe(routing).train()
    routed = model.routed(torch.rand(64, 1, 28, 28))
    task = torch.nn.functional.cross_entropy(routed.logits, torch.arange(64) % 10)
    (task + routed.auxiliary_loss).backward()
    gradient = model.router.gate.grad
    learns = gradient is not None and gradient.abs().max() > 1e-8
    assert learns == (says in {"", BALANCE_ALONE})


def test_warning_is_printed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(moe_mnist, "make_and_print", lambda *_: print("now it trains") or [])
    monkeypatch.setattr(moe_mnist, "print_expert_load", lambda _: None)
    folders: Any = {"checkpoints": tmp_path / "c", "results": tmp_path / "r"}
    for routing in (RoutingConfig(top_k=1, gate="chosen"), RoutingConfig()):
        moe_mnist.main(moe_mnist.MoEOptions(dataset="digits", routing=routing, **folders))
        said = capsys.readouterr().out.partition("now it trains")[0]
        assert (f"NOTE: {routing.warning}" in said) == bool(routing.warning)


def test_routed_gives_the_logits_of_forward_and_counts_every_pair() -> None:
    model = make_moe()
    pixels = torch.rand(50, 1, 28, 28)
    routed = model.routed(pixels)
    assert torch.equal(routed.logits, model(pixels))
    assert torch.equal(routed.expert_load, torch.bincount(routed.experts.flatten(), minlength=4))


def test_capacity_drops_the_overflow_in_batch_order() -> None:
    experts = torch.tensor([0, 0, 1, 0, 1, 0])
    order, load = experts.argsort(stable=True), torch.bincount(experts, minlength=2)
    kept, kept_load = limit_capacity(order, load, capacity_factor=1.0)  # ⌈1.0·6/2⌉ = 3
    assert kept.tolist() == [0, 1, 3, 2, 4]
    assert kept_load.tolist() == [3, 2]
    assert limit_capacity(order, load, capacity_factor=1e300)[0].tolist() == order.tolist()


def test_capacity_holds_in_training_only() -> None:
    model = make_moe(RoutingConfig(capacity_factor=0.5))
    pixels = torch.rand(64, 1, 28, 28)
    assert model.routed(pixels).dropped_share == 0
    assert model.train().routed(pixels).dropped_share >= 0.5
    torch.testing.assert_close(model.eval()(pixels), mask_loop_forward(model, pixels), atol=1e-5, rtol=1e-5)


class TestBalance:
    even = torch.zeros(8, 4)
    collapsed = torch.tensor([[20.0, 0, 0, 0]]).repeat(8, 1)

    def test_entropy_is_zero_when_even_and_log_e_when_collapsed(self) -> None:
        assert entropy_loss(self.even).item() == pytest.approx(0, abs=1e-6)
        assert entropy_loss(self.collapsed).item() == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-4)

    def test_entropy_of_decided_but_even_routes_is_zero(self) -> None:
        assert entropy_loss(40 * torch.eye(4)).item() == pytest.approx(0, abs=1e-6)

    def test_descending_the_entropy_loss_evens_the_load(self) -> None:
        logits = torch.tensor([[2.0, 0, 0, 0]]).repeat(8, 1).requires_grad_()
        entropy_loss(logits).backward()
        assert logits.grad is not None
        after = (logits - logits.grad).softmax(dim=1).mean(dim=0)
        assert after.max() < logits.softmax(dim=1).mean(dim=0).max()

    def test_switch_is_one_when_even_and_e_when_collapsed(self) -> None:
        assert switch_loss(self.even, torch.tensor([4, 4, 4, 4])).item() == pytest.approx(1)
        assert switch_loss(self.collapsed, torch.tensor([8, 0, 0, 0])).item() == pytest.approx(4, abs=1e-4)

    def test_squared_cv(self) -> None:
        assert squared_cv(torch.tensor([3.0, 3, 3])).item() == 0
        assert squared_cv(torch.tensor([4.0, 0, 0, 0])).item() == pytest.approx(3)

    def test_smooth_load_is_the_chance_of_being_chosen_with_fresh_noise(self) -> None:
        model = make_moe().train()
        hidden = torch.rand(1, 256)
        torch.manual_seed(3)
        routing = model.router(hidden)
        assert routing.noise_std_BE is not None
        redrawn = routing.clean_logits_BE + torch.randn(200_000, 4) * routing.noise_std_BE
        others = routing.logits_BE.repeat(4, 1)[~torch.eye(4, dtype=torch.bool)].view(4, 3)
        bar = others.topk(2, dim=1).values[:, 1]  # the second largest of the others
        chance = (redrawn > bar).double().mean(dim=0)
        torch.testing.assert_close(smooth_load(routing).double(), chance, atol=5e-3, rtol=0)

    @pytest.mark.parametrize(
        ("balance", "parts"),
        [("entropy", {"entropy"}), ("switch", {"switch"}), ("cv", {"importance_cv2", "load_cv2"}), ("none", set())],
    )
    def test_auxiliary_loss_is_the_weighted_sum_and_reaches_the_router(self, balance: str, parts: set[str]) -> None:
        model = make_moe(RoutingConfig(balance=balance, balance_weight=0.5)).train()  # type: ignore[arg-type]
        routed = model.routed(torch.rand(64, 1, 28, 28))
        assert set(routed.auxiliary) == parts
        assert set(routed.weighted) == parts
        torch.testing.assert_close(routed.auxiliary_loss, 0.5 * sum(routed.auxiliary.values(), torch.zeros(())))
        if parts:
            routed.auxiliary_loss.backward()
            gradient = model.router.gate.grad
            assert gradient is not None
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"num_experts": 2, "top_k": 3},
        {"top_k": 0},
        {"num_experts": 0},
        {"balance_weight": float("nan")},
        {"balance_weight": -1.0},
        {"capacity_factor": 0.0},
        {"capacity_factor": float("inf")},
    ],
)
def test_impossible_routing_is_the_users_error(settings: dict[str, float]) -> None:
    with pytest.raises(UserError):
        RoutingConfig(**settings)  # type: ignore[arg-type]


def test_closed_expert_sends_its_images_to_the_best_of_the_others() -> None:
    model = make_moe()
    pixels = torch.rand(64, 1, 28, 28)
    with torch.inference_mode():
        before, after = model.routed(pixels), without_expert(model, 1).routed(pixels)
        scores = (model.embed(pixels) @ model.router.gate)[:, [0, 2, 3]]
    unaffected = (before.experts != 1).all(dim=1)
    assert 0 < unaffected.sum() < 64
    torch.testing.assert_close(after.logits[unaffected], before.logits[unaffected])
    assert torch.equal(after.experts, scores.topk(2).indices)
    assert after.expert_load.tolist() == [int((after.experts == expert).sum()) for expert in range(3)]


def test_closed_expert_leaves_a_gate_over_all_the_others() -> None:
    model = make_moe(RoutingConfig(top_k=1))
    pixels = torch.rand(64, 1, 28, 28)
    with torch.inference_mode():
        after = without_expert(model, 1).routed(pixels)
        probs = (model.embed(pixels) @ model.router.gate)[:, [0, 2, 3]].softmax(dim=1)
    torch.testing.assert_close(after.weights, probs.max(dim=1, keepdim=True).values)


def test_last_expert_cannot_be_closed() -> None:
    with pytest.raises(ValueError, match="one expert"):
        without_expert(make_moe(RoutingConfig(num_experts=1, top_k=1)), 0)
