"""That adapters on a base of 4 bits are what the papers say, and that nothing but them is trained."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import make_dataset, spec

from mnist_lab.compress.adapters import (
    BLOCK,
    NF4_LEVELS,
    AdaptedWeight,
    Adapters,
    AdaptLowRank,
    FinetuneAll,
    add_adapters,
    base_bits,
    dequantize,
    fold,
    quantize,
    relative_error,
    step_bytes,
    take_over,
    undo_rounding,
)
from mnist_lab.compress.finetune import Duration
from mnist_lab.errors import UserError
from mnist_lab.experiments.technique import Work
from mnist_lab.models import PRESETS, Model, build_model
from mnist_lab.models.ffn import FFN, FFNConfig
from mnist_lab.models.moe import RoutingConfig, SparseMoEConfig
from mnist_lab.training import Recipe

PIXELS = make_dataset().train.pixels
WEIGHT = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(0))  # a matrix of it is five blocks
BOTH_KINDS = pytest.mark.parametrize("kind", ["ffn", "moe"])


def make_source(kind: str) -> Model:
    """A model of data with another mean and deviation than the toy data's."""
    torch.manual_seed(7)
    data = spec(0.1, 0.3)
    config = FFNConfig((16, 12), data) if kind == "ffn" else SparseMoEConfig(16, 12, 8, (6,), RoutingConfig(), data)
    return build_model(config).eval()


def make_network(kind: str, adapters: Adapters = Adapters(2)) -> tuple[Model, Model]:
    """A model, and the same with adapters, none of which is at nothing."""
    model = make_source(kind)
    network = add_adapters(model, adapters, seed=0).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("right"):
                parameter.normal_()
    return model, network


def work_on(source: Model) -> Work:
    recipe = Recipe(epochs=2, batch_size=32, learning_rate=1e-2)
    return Work(make_dataset(), PRESETS["compact"], recipe, 0, "cpu", "x", source)


def test_levels_are_quantiles_of_the_normal_distribution() -> None:
    end = (1 - 1 / 32 + 1 - 1 / 30) / 2  # as in the paper's own code; it says the same in section 3
    below = torch.special.ndtri(torch.linspace(1 - end, 0.5, 8, dtype=torch.float64))
    above = torch.special.ndtri(torch.linspace(0.5, end, 9, dtype=torch.float64))
    quantiles = torch.cat([below, above[1:]])
    torch.testing.assert_close(NF4_LEVELS.double(), quantiles / quantiles.max(), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_levels_and_codes_are_torchaos() -> None:
    theirs = pytest.importorskip("torchao.quantization").NF4Tensor.from_tensor(WEIGHT[0], BLOCK, 1)
    torch.testing.assert_close(theirs.nf4, NF4_LEVELS, atol=1e-4, rtol=0)  # which it computes less exactly
    high, low = theirs.quantized_data // 16, theirs.quantized_data % 16  # the first of two is in the upper bits
    codes = quantize(WEIGHT[:1]).codes.flatten()
    assert torch.equal(codes, low * 16 + high)


def test_every_weight_becomes_the_nearest_level_of_its_block() -> None:
    rounded = dequantize(quantize(WEIGHT), 20, 16).flatten(1).unflatten(1, (-1, BLOCK))
    blocks = WEIGHT.flatten(1).unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(dim=2, keepdim=True)
    nearest = (blocks.unsqueeze(3) - scales.unsqueeze(3) * NF4_LEVELS).abs().amin(dim=3)
    torch.testing.assert_close((rounded - blocks).abs(), nearest)
    assert torch.equal(rounded.abs().amax(dim=2, keepdim=True), scales)


@pytest.mark.parametrize("shape", [(1, 7, 5), (2, 9, 13), (1, 64, 1)])
def test_any_shape_and_zeros_come_back(shape: tuple[int, int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    again = dequantize(quantize(weight), *shape[1:])
    assert again.shape == shape
    assert (again - weight).norm() < 0.15 * weight.norm()
    levels = dequantize(quantize(again), *shape[1:])
    torch.testing.assert_close(levels, again)
    assert torch.equal(dequantize(quantize(torch.zeros(shape)), *shape[1:]), torch.zeros(shape))


def test_loftq_is_nearer_than_rounding_and_the_more_so_the_higher_the_rank() -> None:
    errors = [(dequantize(quantize(WEIGHT), 20, 16) - WEIGHT).norm()]
    for rank in (1, 4, 8):
        base, left, right = undo_rounding(WEIGHT, rank)
        assert (left.shape, right.shape) == ((3, 20, rank), (3, rank, 16))
        errors.append((dequantize(base, 20, 16) + left @ right - WEIGHT).norm())
    assert errors == sorted(errors, reverse=True)
    base, left, right = undo_rounding(WEIGHT, 16)  # of full rank, nothing is left of it
    torch.testing.assert_close(dequantize(base, 20, 16) + left @ right, WEIGHT, atol=1e-5, rtol=1e-5)


@BOTH_KINDS
def test_adapters_at_zero_are_the_rounded_model(kind: str) -> None:
    model = make_source(kind)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if name in {"stem.weight", "head.0.weight", "layers.0.weight", "layers.1.weight"}:
                weight.copy_(dequantize(quantize(weight.T[None]), *weight.T.shape)[0].T)
            elif name.startswith("experts.weight"):
                weight.copy_(dequantize(quantize(weight), *weight.shape[1:]))
    network = add_adapters(model, Adapters(2, "zero"), seed=0).eval()
    torch.testing.assert_close(network(PIXELS), rounded(PIXELS))
    assert relative_error(rounded, model) > 0.01
    assert relative_error(fold(network), rounded) == 0


@BOTH_KINDS
@pytest.mark.parametrize("init", ["zero", "loftq"])
def test_folded_model_says_the_same_as_the_network(kind: str, init: str) -> None:
    model, network = make_network(kind, Adapters(3, init))  # type: ignore[arg-type]
    folded = fold(network)
    assert folded.config == model.config
    assert [(n, p.shape, p.is_contiguous()) for n, p in folded.named_parameters()] == [
        (n, p.shape, True) for n, p in model.named_parameters()
    ]
    torch.testing.assert_close(folded(PIXELS), network(PIXELS), atol=1e-3, rtol=1e-3)
    assert not torch.allclose(folded(PIXELS), model(PIXELS), atol=0.1)


@BOTH_KINDS
def test_gradients_are_those_of_the_folded_model(kind: str) -> None:
    _, network = make_network(kind)
    folded, weights = fold(network), torch.randn(len(PIXELS), 10)
    for each in (network, folded):
        (each(PIXELS) * weights).sum().backward()
    name = "layers.0" if kind == "ffn" else "stem"
    adapted = network.get_submodule(f"{name}.adapted")
    assert isinstance(adapted, AdaptedWeight)
    gradient = folded.get_parameter(f"{name}.weight").grad
    assert gradient is not None
    assert adapted.left.grad is not None
    assert adapted.right.grad is not None
    torch.testing.assert_close(adapted.left.grad[0], gradient.T @ adapted.right[0].T, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(adapted.right.grad[0], adapted.left[0].T @ gradient.T, atol=1e-3, rtol=1e-3)
    bias, expected = network.get_parameter(f"{name}.bias").grad, folded.get_parameter(f"{name}.bias").grad
    torch.testing.assert_close(bias, expected, atol=1e-3, rtol=1e-3)


@BOTH_KINDS
def test_only_adapters_and_what_is_small_is_trained(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    networks: list[Model] = []
    real_fit = Work.fit

    def spy(work: Work, model: Model, **options: object) -> object:
        networks.extend([copy.deepcopy(model), model])
        return real_fit(work, model, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Work, "fit", spy)
    made = AdaptLowRank(Adapters(2), Duration(1)).make(work_on(make_source(kind)))
    before, after = (network.state_dict() for network in networks)
    frozen = {name for name in before if name.endswith(("codes", "scales", "mean", "std"))}
    assert len(frozen) == 2 + 2 * (2 if kind == "ffn" else 4)
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    assert {name for name, _ in networks[0].named_parameters()} == before.keys() - frozen
    torch.testing.assert_close(made.model(PIXELS), networks[1](PIXELS), atol=1e-3, rtol=1e-3)
    assert made.proof["trained"] == sum(parameter.numel() for parameter in networks[0].parameters())


@BOTH_KINDS
@pytest.mark.parametrize("step", [AdaptLowRank(Adapters(2)), FinetuneAll()], ids=lambda step: type(step).__name__)
def test_model_learns_the_new_data_and_normalises_as_that_is(kind: str, step: AdaptLowRank | FinetuneAll) -> None:
    work = work_on(make_source(kind))
    made = replace(step, duration=Duration(8)).make(work)
    assert made.model.config == replace(make_source(kind).config, data=work.dataset.spec)
    assert float(made.model.normalize.std) == pytest.approx(work.dataset.spec.std)
    assert len(made.curves) == 8
    assert made.curves[-1].validation_acc > made.curves[0].validation_acc
    assert made.curves[-1].validation_loss < 0.7 * made.curves[0].validation_loss


@BOTH_KINDS
def test_last_layer_starts_at_zero_and_all_else_where_it_was(kind: str) -> None:
    source = make_source(kind)
    torch.nn.init.ones_(source.get_parameter("layers.2.bias" if kind == "ffn" else "head.1.bias"))
    taken, was = take_over(work_on(source)).state_dict(), source.state_dict()
    last = {name for name in taken if name.startswith(("layers.2.", "head.1."))}
    assert not any(taken[name].any() for name in last)
    different = {name for name in was if not torch.equal(taken[name], was[name])}
    assert different == last | {"normalize.mean", "normalize.std"}


def test_step_takes_less_memory_than_one_of_all_parameters_by_what_needs_no_gradient() -> None:
    torch.manual_seed(0)
    model = FFN(FFNConfig((256, 256), make_dataset().spec))
    work = work_on(model)
    network, before = add_adapters(model, Adapters(2), seed=0), model.state_dict()
    saved = step_bytes(model, work) - step_bytes(network, work)
    frozen = 784 * 256 + 256 * 256
    # Of each frozen weight: value, gradient and two moments of AdamW, 16 bytes; less its 4.5 bits, what makes FP32
    # of a layer's at a time (6 bytes), and the adapters.
    assert 9 * frozen < saved < 16 * frozen
    assert base_bits(network) == 4.5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_proof_says_what_was_trained_and_what_it_takes() -> None:
    proof = AdaptLowRank(Adapters(2, "loftq"), Duration(0)).make(work_on(make_source("moe"))).proof
    assert 0 < proof["start_error"] < proof["rounding_error"] < 0.2
    assert proof["step_bytes"] < proof["step_bytes_of_all"]
    assert f"{proof['trained']:,} parameters trained" in proof["text"]
    everything = FinetuneAll(Duration(0)).make(work_on(make_source("moe"))).proof
    assert everything["step_bytes"] == proof["step_bytes_of_all"]
    assert proof["trained"] == pytest.approx(proof["trained_share"] * everything["trained"])


def test_same_seed_gives_the_same_bits_whatever_was_drawn_before() -> None:
    source, made = make_source("moe"), []
    for draws in (1, 2):
        torch.manual_seed(draws)
        made.append(AdaptLowRank(Adapters(2), Duration(1)).make(work_on(source)).model.state_dict())
    one, two = made
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_bad_input_is_named() -> None:
    for rank in (0, -1, 10**7):
        with pytest.raises(UserError, match="--rank"):
            Adapters(rank)
    with pytest.raises(UserError, match="--finetune-epochs -1"):
        Duration(-1)
    with pytest.raises(UserError, match="--rank 7 must be at most 6"):
        AdaptLowRank(Adapters(7)).make(work_on(make_source("moe")))
    for other in (make_dataset(num_classes=5), make_dataset(image_size=(26, 26))):
        for step in (AdaptLowRank(), FinetuneAll()):
            with pytest.raises(UserError, match=r"10 classes .*\(28, 28\).*Take data alike"):
                step.make(replace(work_on(make_source("ffn")), dataset=other))


def test_first_layer_has_twice_the_rank_as_far_as_it_is_wide() -> None:
    for rank, of_first in ((2, 4), (5, 8)):  # the first layer is 8 wide
        network = add_adapters(FFN(FFNConfig((8, 6), spec(0.2, 0.3))), Adapters(rank), seed=0)
        ranks = [module.left.shape[2] for module in network.modules() if isinstance(module, AdaptedWeight)]
        assert ranks == [of_first, rank]
