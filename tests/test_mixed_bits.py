"""Mixed bits: the best choice that fits, of bytes as they lie on disk and of what rounding really does."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from test_expert_shapes import APART, SHARED
from test_expert_shapes import make_model as make_moe
from tiny import make_dataset, spec
from torch.nn import functional as F

from mnist_lab.compress import mixed_bits as m
from mnist_lab.compress.few_bit_products import products_of
from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.mixed_bits import MixedBits, Sizes
from mnist_lab.compress.weight_only import Method, round_weight
from mnist_lab.deploy.artifacts import read_onnx
from mnist_lab.deploy.onnx import build_onnx
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.experiments.technique import Work
from mnist_lab.models import PRESETS, Model, build_model
from mnist_lab.models.ffn import FFNConfig
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.runtimes import open_session
from mnist_lab.training import Recipe

DATA = make_dataset()
PIXELS = DATA.train.pixels
WIDTHS = m.WIDTHS


def make_ffn() -> Model:
    torch.manual_seed(0)
    return build_model(FFNConfig((20, 12), spec(0.18, 0.18))).eval()


MODELS: dict[str, Callable[[], Model]] = {
    "ffn": make_ffn,
    "apart": lambda: make_moe(APART),
    "every expert": lambda: make_moe(replace(APART, expert_widths=None, routing=RoutingConfig(2, 2))),
    "shared": lambda: make_moe(SHARED),
}


def write(model: Model, file: Path, form: MixedBits, *, seed: int = 0) -> dict[str, Any]:
    form.write(model, file, Work(DATA, PRESETS["compact"], Recipe(epochs=1, batch_size=32), seed, "cpu", "Mine"), {})
    return form.prove(model, file)


def draw_problem(seed: int) -> tuple[dict[m.Choice, float], Sizes]:
    """Four products, one of which has no choice."""
    random = np.random.default_rng(seed)
    choices = [(name, rounding) for name in "abc" for rounding in WIDTHS] + [("d", WIDTHS[2])]
    rises = {choice: float(random.exponential()) / int(choice[1].bits) ** 4 for choice in choices}
    own = {choice: int(random.integers(50, 200)) * int(choice[1].bits) for choice in choices}
    return rises, Sizes(1000, own, {rounding.bits: int(random.integers(0, 400)) for rounding in WIDTHS})


def every_plan(rises: dict[m.Choice, float]) -> list[dict[str, Rounding]]:
    names = list(dict.fromkeys(name for name, _ in rises))
    own = [[rounding for name, rounding in rises if name == wanted] for wanted in names]
    return [dict(zip(names, plan, strict=True)) for plan in product(*own)]


@pytest.mark.parametrize("seed", range(8))
def test_choice_is_the_best_of_all_that_fit(seed: int) -> None:
    rises, sizes = draw_problem(seed)
    plans = every_plan(rises)
    all_bytes = sorted(sizes.of(plan) for plan in plans)
    before = np.inf
    for num_bytes in all_bytes[:: len(all_bytes) // 6]:
        chosen = m.allocate(rises, sizes, num_bytes)
        fitting = [plan for plan in plans if sizes.of(plan) <= num_bytes]
        least = min(sum(rises[choice] for choice in plan.items()) for plan in fitting)
        rise = sum(rises[choice] for choice in chosen.items())
        assert sizes.of(chosen) <= num_bytes
        assert rise == pytest.approx(least, rel=1e-6)
        assert rise <= before  # more bytes are never worse
        before = rise


def test_products_whose_rounding_does_nothing_get_the_fewest_bits() -> None:
    rises, sizes = draw_problem(0)
    rises |= {choice: 0.0 for choice in rises if choice[0] == "b"}
    sizes = sizes._replace(shared=dict.fromkeys(sizes.shared, 0), own={c: 100 * int(c[1].bits) for c in sizes.own})
    assert m.allocate(rises, sizes, 10**6)["b"] == WIDTHS[0]


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("name", MODELS)
def test_file_is_as_large_as_foreseen_and_never_above_its_budget(
    name: str, scheme: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = MODELS[name](), tmp_path / "model.onnx"
    method = Method("nearest", scheme)
    smallest, largest = ends(model, file, method)
    seen: list[Sizes] = []
    measure = m.measure_sizes

    def watch(*args: Any) -> Sizes:
        seen.append(measure(*args))
        return seen[-1]

    monkeypatch.setattr(m, "measure_sizes", watch)
    for allocation, share in product(("sensitivity", "even"), (0.0, 0.3, 1.0)):
        budget = smallest + share * (largest - smallest)
        proof = write(model, file, MixedBits(budget, allocation=allocation, method=method))  # type: ignore[arg-type]
        plan = {product: Rounding(bits) for product, bits in proof["bits"].items()}
        spare = m.SPARE_BYTES * len(plan)
        assert seen[-1].of(plan) - 4 * spare <= file.stat().st_size <= seen[-1].of(plan) <= budget * 1024
        found = open_session("onnxruntime", file, precision="mixed", threads=1).predict(PIXELS[:5].numpy())
        assert found.shape == (5, 10)


def ends(model: Model, file: Path, method: Method) -> tuple[float, float]:
    """The smallest and the largest budget, as a user is told them."""
    with pytest.raises(UserError, match=r"Mine, which takes \S+ KiB in the fewest bits to \S+ KiB in") as error:
        write(model, file, MixedBits(1e-3, method=method))
    words = str(error.value).partition("takes ")[2].split()
    return float(words[0]), float(words[-5])


def test_budget_that_no_file_has_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    smallest, largest = ends(make_ffn(), file, Method())
    assert smallest < largest
    for budget in (smallest - 0.2, largest + 0.2, 1e9):
        with pytest.raises(UserError, match=re.escape(f"--size-budget {budget:g} ")):
            write(make_ffn(), file, MixedBits(budget))
    assert not file.exists()


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf")])
def test_budget_is_a_number_of_kib(budget: float) -> None:
    with pytest.raises(UserError, match="--size-budget"):
        MixedBits(budget)


def test_rise_is_the_kl_of_the_logits_from_those_with_one_product_rounded() -> None:
    model = make_ffn()
    graph = build_onnx(model)
    coarse = round_weight(weight_of(graph, "fc1"), Rounding(2), None)
    found = m.measure_rises(graph, {("fc1", Rounding(2)): coarse}, PIXELS.numpy())
    with torch.no_grad():
        before = model(PIXELS).log_softmax(dim=1)
        model.get_parameter("layers.1.weight").copy_(torch.from_numpy(coarse.dequantize().T))
        after = model(PIXELS).log_softmax(dim=1)
    expected = F.kl_div(after, before, reduction="batchmean", log_target=True)
    assert found == {("fc1", Rounding(2)): pytest.approx(float(expected), rel=1e-3)}


def test_expert_that_no_image_visits_gets_the_fewest_bits(tmp_path: Path) -> None:
    wide = replace(APART, model_width=64, expert_width=64, output_width=64, expert_widths=None)
    model, file = make_moe(wide), tmp_path / "model.onnx"
    with torch.no_grad():
        model.router.gate[:, 1] = -10.0  # of what is never negative
    smallest, largest = ends(model, file, Method())
    proof = write(model, file, MixedBits((smallest + largest) / 2))
    bits = proof["bits"]
    assert bits["expert1.in"] == bits["expert1.out"] == 2
    assert max(bits.values()) > 2
    assert proof["load"] == [pytest.approx(0.5), 0.0, pytest.approx(0.5)]
    assert "expert1 2+2 (load 0%)" in proof["text"]


def test_proof_says_what_the_file_stores(tmp_path: Path) -> None:
    model, file = make_moe(APART), tmp_path / "model.onnx"
    proof = write(
        model, file, MixedBits(sum(ends(model, file, Method())) / 2, method=Method(router_bits=4, activation_bits=8))
    )
    graph = read_onnx(file).graph
    stored = {constant.name: constant for constant in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    assert list(proof["bits"]) == [
        "stem",
        "router",
        *(f"expert{e}.{p}" for e in range(3) for p in ("in", "out")),
        "logits",
    ]
    assert proof["bits"]["router"] == 4
    for name, bits in proof["bits"].items():
        outputs = (f"{name}{part}" for part in (".product.int32", ".int32", ".product", ""))
        product = next(made_by[output] for output in outputs if output in made_by)
        integers = stored.get(made_by[product.input[1]].input[0])
        assert (integers is not None) == (bits in {8, 4})
        if integers is not None:
            assert len(integers.raw_data) == -(-np.prod(integers.dims) * bits // 8)
    assert proof["bytes"] == file.stat().st_size <= proof["budget"]
    assert sum(proof["load"]) == pytest.approx(1, abs=1e-3)
    assert f"stem {proof['bits']['stem']}, router 4, expert0" in proof["text"]


def test_predicted_rise_is_about_what_happens_to_the_logits(tmp_path: Path) -> None:
    model, file = make_ffn(), tmp_path / "model.onnx"
    smallest, largest = ends(model, file, Method())
    proof = write(model, file, MixedBits(smallest + 0.2 * (largest - smallest)))
    with torch.no_grad():
        before = model(PIXELS).log_softmax(dim=1)
    after = open_session("onnxruntime", file, precision="mixed", threads=1).predict(PIXELS.numpy())
    rise = F.kl_div(torch.from_numpy(after).log_softmax(dim=1), before, reduction="batchmean", log_target=True)
    assert 0.3 < float(rise) / proof["rise"] < 3


def test_file_above_its_budget_is_found(tmp_path: Path) -> None:
    file, form = tmp_path / "model.onnx", MixedBits(10)
    write(make_ffn(), file, form)
    with pytest.raises(WrongPrecision, match="more than the budget of 5.0 KiB"):
        MixedBits(5).prove(make_ffn(), file)


def even_problem(names: str, shared: int) -> tuple[list[dict[str, Rounding]], Sizes]:
    own = {(name, rounding): 100 * int(rounding.bits) for name in names for rounding in WIDTHS}
    plans = [dict.fromkeys(names, rounding) for rounding in WIDTHS]
    return plans, Sizes(0, own, {rounding.bits: shared for rounding in WIDTHS})


def test_even_allocation_has_at_most_two_neighbouring_widths_drawn_by_seed() -> None:
    plans, sizes = even_problem("abcdef", 0)
    drawn = [m.allocate_evenly(plans, sizes, 1500, seed=seed) for seed in range(5)]
    assert all(sorted(int(r.bits) for r in plan.values()) == [2, 2, 2, 3, 3, 3] for plan in drawn)
    assert len({tuple(plan.items()) for plan in drawn}) > 1
    for num_bytes, plan in ((1800, plans[1]), (9999, plans[3])):
        assert m.allocate_evenly(plans, sizes, num_bytes, seed=0) == plan


def test_uniform_bits_are_even_though_words_of_two_kinds_would_not_fit() -> None:
    plans, sizes = even_problem("ab", 150)
    assert m.allocate_evenly(plans, sizes, 750, seed=0) == plans[1]


def weight_of(graph: Any, name: str) -> Any:
    constants = {constant.name: constant for constant in graph.graph.initializer}
    return numpy_helper.to_array(constants[products_of(graph)[name].input[1]])
