"""Which units go, and that what is left is the same model without them."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from test_prune_experts import make_moe, make_work
from tiny import make_dataset, make_lab, spec
from torch import Tensor
from torch.nn import functional as F

from mnist_lab.compress import prune_neurons as p
from mnist_lab.compress.finetune import Finetuning
from mnist_lab.compress.prune_neurons import Criterion, NeuronPruning, PruneNeurons
from mnist_lab.compress.prune_weights import weight_matrices
from mnist_lab.compress.train import TrainFFN, TrainLike, narrower, no_larger
from mnist_lab.deploy.onnx import build_onnx, stored_bytes
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.make import make
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.run import Run
from mnist_lab.models import Model, build_model, parameter_bytes
from mnist_lab.models import surgery as u
from mnist_lab.models.ffn import FFNConfig
from mnist_lab.models.moe import RoutingConfig, SparseMoE, SparseMoEConfig
from mnist_lab.training import Recipe

NO_TRAINING = Finetuning(finetune_epochs=0)
MODELS = ("ffn", "moe")


def make_model(name: str, expert_width: int = 16) -> Model:
    torch.manual_seed(0)
    routing, data = RoutingConfig(num_experts=3), spec(0.18, 0.18)
    config = FFNConfig((24, 16), data) if name == "ffn" else SparseMoEConfig(24, expert_width, 16, (16,), routing, data)
    model = build_model(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if "bias" in parameter_name:
            torch.nn.init.normal_(parameter)
    return model


def some_units(model: Model, seed: int = 0) -> u.Places:
    """Eight of each layer, at random."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in u.hidden_shapes(model).items()}
    return p.choose_units(scores, NeuronPruning(0.99))


def masks_of(model: Model, kept: u.Places) -> u.Units:
    """1 on the units of these places."""
    masks = {name: torch.zeros(shape) for name, shape in u.hidden_shapes(model).items()}
    for name, mask in masks.items():
        for row, places in zip(mask.view(-1, mask.shape[-1]), kept[name], strict=True):
            row[places] = 1
    return masks


def all_open(model: Model) -> u.Units:
    return {name: torch.ones(shape) for name, shape in u.hidden_shapes(model).items()}


@pytest.fixture
def pixels() -> Tensor:
    return make_dataset().train.pixels[:100]


@pytest.mark.parametrize("name", MODELS)
def test_model_without_units_is_as_if_they_were_silent(name: str, pixels: Tensor) -> None:
    model = make_model(name)
    torch.testing.assert_close(u.masked_logits(model, pixels, all_open(model)), model(pixels))
    kept = some_units(model)
    smaller = u.with_units(model, kept)
    torch.testing.assert_close(smaller(pixels), u.masked_logits(model, pixels, masks_of(model, kept)))
    assert all(shape[-1] == 8 for shape in u.hidden_shapes(smaller).values())
    assert sum(w.numel() for w in smaller.parameters()) < 0.7 * sum(w.numel() for w in model.parameters())
    assert len(build_onnx(smaller).graph.node) == len(build_onnx(model).graph.node)


def test_experts_may_end_with_widths_of_their_own(pixels: Tensor) -> None:
    model = make_model("moe", expert_width=32)
    scores = {name: torch.rand(shape) for name, shape in u.hidden_shapes(model).items()}
    scores["experts"][1] += 10
    kept = p.choose_units(scores, NeuronPruning(0.5))
    widths = [len(places) for places in kept["experts"]]
    assert widths[1] == scores["experts"].shape[1]
    assert sum(widths) == len(widths) * p.num_kept(scores["experts"].shape[1], 0.5)
    smaller = u.with_units(model, kept)
    assert isinstance(smaller, SparseMoE)
    assert [len(own.bias_in) for own in smaller.experts.each()] == widths
    torch.testing.assert_close(smaller(pixels), u.masked_logits(model, pixels, masks_of(model, kept)))


def test_experts_around_a_base_end_as_experts_of_their_own(pixels: Tensor) -> None:
    torch.manual_seed(0)
    shared = build_model(SparseMoEConfig(24, 16, 16, (), RoutingConfig(num_experts=3), spec(0.18, 0.18), shared_rank=2))
    kept = some_units(shared.eval())
    smaller = u.with_units(shared, kept)
    torch.testing.assert_close(smaller(pixels), u.masked_logits(shared, pixels, masks_of(shared, kept)))


@pytest.mark.parametrize(
    ("scores", "mean_width", "expected"),
    [
        ([[1.0] * 16, [9.0] * 8 + [0.0] * 8], 8, [8, 8]),
        ([[1.0] * 24, [9.0] * 24], 16, [8, 24]),
        ([[0.0] * 24, [1.0] * 16 + [0.0] * 8, [5.0] * 24], 16, [8, 16, 24]),
        ([[1.0] * 5, [9.0] * 5], 5, [5, 5]),
    ],
)
def test_units_of_all_experts_compete_in_blocks(
    scores: list[list[float]], mean_width: int, expected: list[int]
) -> None:
    assert p.compete(torch.tensor(scores), mean_width) == expected


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_of_what_makes_a_unit_and_what_it_goes_into(name: str) -> None:
    model = make_model(name)
    scores = p.norms(model)
    state = model.state_dict()
    if isinstance(model, SparseMoE):
        into = torch.cat([state["stem.weight"][5], state["stem.bias"][5:6]]).norm()
        out = torch.cat([state["router.gate"][5], state["experts.weight_in"][:, 5].flatten()]).norm()
        assert scores["stem"][5] == pytest.approx(float(into * out), rel=1e-5)
        into = torch.cat([state["experts.weight_in"][1, :, 3], state["experts.bias_in"][1, 3:4]]).norm()
        out = state["experts.weight_out"][1, 3].norm()
        assert scores["experts"][1, 3] == pytest.approx(float(into * out), rel=1e-5)
        into = torch.cat([state["experts.weight_out"][:, :, 2].flatten(), state["experts.bias_out"][:, 2]]).norm()
        assert scores["output"][2] == pytest.approx(float(into * state["head.0.weight"][:, 2].norm()), rel=1e-5)
    else:
        into = torch.cat([state["layers.1.weight"][4], state["layers.1.bias"][4:5]]).norm()
        assert scores["layers.1"][4] == pytest.approx(float(into * state["layers.2.weight"][:, 4].norm()), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_first_order_importance_foretells_what_a_little_less_of_a_unit_costs(name: str, pixels: Tensor) -> None:
    model, labels = make_model(name), make_dataset().train.labels[:100]
    scores = p.first_order(model, pixels, labels)  # of one batch
    step = 1e-2

    def loss_at(layer: str, unit: tuple[int, ...], mask: float) -> float:
        masks = all_open(model)
        masks[layer][unit] = mask
        return float(F.cross_entropy(u.masked_logits(model, pixels, masks).double(), labels).detach())

    for layer, score in scores.items():
        unit = tuple(int(place) for place in torch.unravel_index(score.argmax(), score.shape))
        slope = (loss_at(layer, unit, 1 + step) - loss_at(layer, unit, 1 - step)) / (2 * step)
        assert float(score[unit]) == pytest.approx(slope**2, rel=0.1)


@pytest.mark.parametrize("name", MODELS)
def test_activations_are_means_over_the_images_that_come(name: str, pixels: Tensor) -> None:
    model = make_model(name)
    scores = p.activations(model, pixels)
    if isinstance(model, SparseMoE):
        visits = (model.routed(pixels).experts == 2).any(dim=1)
        inner = (model.embed(pixels)[visits] @ model.experts.weight_in[2] + model.experts.bias_in[2]).relu()
        expected = inner.mean(dim=0) * model.experts.weight_out[2].norm(dim=1)
        torch.testing.assert_close(scores["experts"][2], expected.detach())
    else:
        first = model.layers[0](model.normalize(pixels)).relu().mean(dim=0)
        expected = first * model.get_parameter("layers.1.weight").norm(dim=0)
        torch.testing.assert_close(scores["layers.0"], expected.detach())


def test_masks_find_the_units_that_the_loss_hangs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = make_model("ffn"), make_dataset().train
    with torch.no_grad():
        model.get_parameter("layers.1.weight")[:, 8:] = 0  # the others of the first layer do nothing
    monkeypatch.setattr(p, "NUM_MASKS", 2000)
    worth = p.regressed(model, data.pixels[:100], model(data.pixels[:100]).argmax(dim=1), 0)["layers.0"]
    assert worth[:8].abs().mean() > 5 * worth[8:].abs().mean()
    assert not worth.requires_grad


@pytest.mark.parametrize(
    ("width", "ratio", "expected"),
    [(256, 0.5, 128), (256, 0.75, 64), (128, 0.99, 8), (8, 0.9, 8), (5, 0.5, 5), (20, 0.5, 8)],
)
def test_multiples_of_eight_stay(width: int, ratio: float, expected: int) -> None:
    assert p.num_kept(width, ratio) == expected


@pytest.mark.parametrize("criterion", get_args(Criterion))
@pytest.mark.parametrize("name", MODELS)
def test_every_criterion_makes_a_smaller_model(
    criterion: Criterion, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p, "NUM_MASKS", 50)
    work = replace(make_work(make_moe()), source=make_model(name))
    made = PruneNeurons(NeuronPruning(0.5, criterion), NO_TRAINING).make(work)
    assert {shape[-1] for shape in u.hidden_shapes(made.model).values()} == {8, 16}  # of 16 and 24
    assert 0 < made.proof["left"] < 0.7
    trained = PruneNeurons(NeuronPruning(0.5, criterion), Finetuning(finetune_epochs=1)).make(work)
    assert len(trained.curves) == 1


def test_nothing_to_spare_is_an_error_and_so_is_a_ratio_out_of_range() -> None:
    narrow = build_model(FFNConfig((8,), spec())).eval()
    with pytest.raises(RunFailed, match="no layer has a unit to spare"):
        PruneNeurons(finetuning=NO_TRAINING).make(replace(make_work(make_moe()), source=narrow))
    for ratio in (0, 1, -1, float("nan")):
        with pytest.raises(UserError, match="--ratio"):
            NeuronPruning(ratio)


@pytest.mark.parametrize("name", MODELS)
def test_rival_of_zeros_is_as_narrow_as_their_file_demands(name: str) -> None:
    wide = build_model(FFNConfig((128, 64), spec())).eval()
    model = wide if name == "ffn" else make_model(name, expert_width=64)
    assert no_larger(model.config, stored_bytes(model)) == model.config  # nothing is gained by storing it sparsely
    for matrix in weight_matrices(model):
        weight = matrix.of(model.get_parameter(matrix.parameter).data)
        weight *= torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.1
    num_bytes = stored_bytes(model)
    assert num_bytes < 0.5 * parameter_bytes(model)
    rival = no_larger(model.config, num_bytes)
    assert parameter_bytes(build_model(rival)) <= num_bytes
    assert no_larger(model.config, 1) == narrower(model.config, 0)  # 8 units a layer are the least


def test_rival_has_the_size_of_what_it_rivals_and_learns_from_scratch_for_as_long(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, recipe=Recipe(epochs=5, batch_size=64))
    narrower = Row("Narrower", PruneNeurons(NeuronPruning(0.5, "norm")), source=Row("Wide", TrainFFN((32,))))
    rival = make(Run(lab, Row("Rival", TrainLike(), teacher=narrower), 0))
    assert rival.architecture["widths"] == [16]
    assert len(rival.curves) == 6
    assert rival.original == rival.model
    ours, theirs = (Run(lab, row, 0).load() for row in (Row("Rival", TrainLike(), teacher=narrower), narrower))
    assert not torch.equal(ours.get_parameter("layers.0.weight"), theirs.get_parameter("layers.0.weight"))
