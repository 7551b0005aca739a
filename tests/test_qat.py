"""Quantization-aware training: weights that learned on their levels, and an artifact that holds just them."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from test_prune_experts import make_moe
from tiny import make_dataset, spec

from mnist_lab.compress import qat
from mnist_lab.compress.fake_quant import fold, roundings
from mnist_lab.compress.layer_by_layer import layer_objective
from mnist_lab.compress.levels import LEVELS, Bits, Rounding, on_levels
from mnist_lab.compress.qat import Learning, Quantization, TrainQuantized
from mnist_lab.compress.weight_only import AsTrained
from mnist_lab.data import Augmentation
from mnist_lab.deploy.artifacts import read_artifact
from mnist_lab.errors import RunFailed, UserError, WrongPrecision
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.measure import Array
from mnist_lab.models import PRESETS, Model
from mnist_lab.models.ffn import FFN, FFNConfig
from mnist_lab.models.moe import RoutingConfig, SparseMoE
from mnist_lab.runtimes import open_session
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options
from mnist_lab.training import Batch, Recipe, fit, torch_predictor

DATA = make_dataset()
RECIPE = Recipe(epochs=3, batch_size=32, learning_rate=5e-3)
PIXELS = DATA.validation.pixels.numpy()
UNTRAINED = Learning(finetune_epochs=0)


def make_source(name: str) -> Model:
    torch.manual_seed(0)
    model: Model = FFN(FFNConfig((24, 12), spec(0.18, 0.18))) if name == "ffn" else make_moe()
    fit(model, DATA, replace(RECIPE, epochs=6), seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def sources() -> dict[str, Model]:
    return {name: make_source(name) for name in ("ffn", "moe")}


def make_work(source: Model) -> Work:
    return Work(DATA, PRESETS["compact"], RECIPE, 0, "cpu", "x", source=copy.deepcopy(source))


def make(source: Model, quantization: Quantization, training: Learning = Learning()) -> Made:
    return TrainQuantized(quantization, training).make(make_work(source))


def write(made: Made, quantization: Quantization, file: Path) -> dict[str, Any]:
    form = AsTrained(quantization.rounding, quantization.router_bits, quantization.activation_bits)
    form.write(made.model, file, make_work(made.model), {"model": "x"})
    return form.prove(made.model, file)


def as_it_stands(file: Path) -> Array:
    """Logits of a file that no engine has optimized."""
    options = session_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(read_artifact(file), options, providers=PROVIDERS)
    logits: Array = session.run(None, {"pixels": PIXELS})[0]
    return logits


@pytest.mark.parametrize("group_size", ["channel", 16])
@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("name", ["ffn", "moe"])
def test_artifact_holds_what_was_learned(
    sources: dict[str, Model], tmp_path: Path, name: str, bits: Bits, group_size: Any
) -> None:
    config = Quantization(Rounding(bits, group_size), router_bits=2 if name == "moe" else None)
    made = make(sources[name], config)
    assert not made.model.training
    assert len(made.curves) == (2 if bits in {"ternary", 1} else 1)  # half of three epochs, or a fifth
    for weight, rounding in roundings(made.model, config.rounding, config.router_bits):
        assert all(on_levels(matrix.numpy(), rounding) is not None for matrix in weight.matrices())
    proof = write(made, config, tmp_path / "model.onnx")
    num_products = 3 if name == "ffn" else 11  # stem, 4 experts of two layers, two of the head
    expected = {str(bits): num_products} if bits in {8, 4} else {str(bits): num_products - 1, "4": 1}
    if name == "moe":
        expected["2"] = expected.get("2", 0) + 1
    assert proof["stored"] == expected
    expected_logits = torch_predictor(made.model)(PIXELS)
    if group_size == "channel" and bits != 8:  # whose rows the file itself rounds to 8 bits
        found = as_it_stands(tmp_path / "model.onnx")
        assert np.square(found - expected_logits).sum() < 0.01 * np.square(expected_logits).sum()
    elif name == "ffn":
        found = as_it_stands(tmp_path / "model.onnx")
        assert np.array_equal(found.argmax(axis=1), expected_logits.argmax(axis=1))
    session = open_session(
        "onnxruntime", tmp_path / "model.onnx", precision=AsTrained(Rounding(bits)).precision, threads=1
    )
    top = np.sort(expected_logits, axis=1)
    is_sure = top[:, -1] - top[:, -2] > 0.3  # its kernels round rows to 8 bits
    assert is_sure.mean() > 0.3
    same = session.predict(PIXELS).argmax(axis=1) == expected_logits.argmax(axis=1)
    assert same[is_sure].mean() >= 0.98


@pytest.mark.parametrize("name", ["ffn", "moe"])
def test_proof_counts_weights_by_their_bits(sources: dict[str, Model], name: str) -> None:
    made = make(sources[name], Quantization(Rounding(1), router_bits=8 if name == "moe" else None))
    expected = {
        "ffn": {"1": 784 * 24 + 24 * 12, "4": 12 * 10},
        "moe": {"1": 784 * 16 + 4 * (16 * 12 + 12 * 8) + 8 * 6, "4": 6 * 10, "8": 16 * 4},
    }[name]
    assert made.proof["weights"] == expected
    assert made.proof["epochs"] == 2
    assert made.proof["text"].startswith(f"weights: {expected['1']:,} of 1 bit, {expected['4']} of 4 bits")
    assert made.proof["text"].endswith("learned the task over 2 epochs")


@pytest.mark.parametrize("learn", ["task", "layers"])
def test_no_epochs_are_rounding_alone(sources: dict[str, Model], learn: Any) -> None:
    made = make(sources["ffn"], Quantization(Rounding(2), learn=learn), UNTRAINED)
    assert made.curves == []
    ours, theirs = made.model.state_dict(), sources["ffn"].state_dict()
    assert torch.equal(ours["layers.0.bias"], theirs["layers.0.bias"])
    assert not torch.equal(ours["layers.0.weight"], theirs["layers.0.weight"])


def test_training_wins_back_what_rounding_loses(sources: dict[str, Model]) -> None:
    for name, source in sources.items():
        loss = {}
        for epochs in (0, 6):
            made = make(source, Quantization(Rounding(1)), Learning(epochs))
            logits = torch.from_numpy(torch_predictor(made.model)(PIXELS))
            loss[epochs] = float(torch.nn.functional.cross_entropy(logits, DATA.validation.labels))
        assert loss[6] < 0.7 * loss[0], name


@pytest.mark.parametrize("name", ["ffn", "moe"])
@pytest.mark.parametrize("bits", [2, "ternary", 1])
def test_layers_come_closer_to_their_twins_than_by_rounding_alone(
    sources: dict[str, Model], name: str, bits: Bits
) -> None:
    source = sources[name]
    batch = Batch(DATA.validation.pixels, DATA.validation.labels, torch.arange(100))
    errors, right = {}, {}
    for epochs in (0, 6):
        made = make(source, Quantization(Rounding(bits), learn="layers"), Learning(epochs))
        terms = layer_objective(source)(made.model.eval(), batch).terms
        errors[epochs] = {layer: float(term.value.detach()) for layer, term in terms.items() if layer != "router"}
        right[epochs] = (torch_predictor(made.model)(PIXELS).argmax(axis=1) == DATA.validation.labels.numpy()).mean()
    assert sum(errors[6].values()) < 0.8 * sum(errors[0].values())
    assert right[6] >= right[0]
    assert made.proof["text"].endswith("learned their layers' outputs before over 6 epochs")


def test_layers_learn_from_no_label_and_from_few_images(
    sources: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qat, "CALIBRATION_SIZE", 64)
    seen = []

    def spy(self: Work, model: Model, objective: object, **settings: Any) -> list[Any]:
        seen.append((self.dataset, settings))
        return []

    monkeypatch.setattr(Work, "fit", spy)
    make(sources["ffn"], Quantization(learn="layers"), Learning(2))
    ((dataset, settings),) = seen
    assert len(dataset.train) == 64
    assert not dataset.train.labels.any()
    assert settings["epochs"] == 10  # 2 · 10 steps on the whole split are 10 · 2 on these
    images = {image.numpy().tobytes() for image in DATA.train.pixels}
    assert all(image.numpy().tobytes() in images for image in dataset.train.pixels)


def test_layers_learn_where_experts_have_room_for_few() -> None:
    made = make(make_moe(RoutingConfig(capacity_factor=0.5)), Quantization(Rounding(2), learn="layers"))
    assert made.curves[0].dropped_share == 0


def test_activations_have_a_say_in_training(sources: dict[str, Model]) -> None:
    for name, source in sources.items():
        weights = [
            make(source, Quantization(activation_bits=bits)).model.state_dict().values() for bits in (None, 8, 4)
        ]
        for one, two in ((0, 1), (1, 2)):
            assert any(not torch.equal(a, b) for a, b in zip(weights[one], weights[two], strict=True)), name


@pytest.mark.parametrize("name", ["ffn", "moe"])
def test_teacher_that_learns_nothing_is_not_rounded(sources: dict[str, Model], name: str) -> None:
    work = make_work(sources[name])
    if isinstance(work.source, SparseMoE):
        with torch.no_grad():
            work.source.router.gate[:, 3] = -10  # an expert without a row
    work = replace(work, recipe=replace(RECIPE, augmentation=Augmentation()))  # it is asked in every step
    made = TrainQuantized(Quantization(activation_bits=4), Learning(teacher="self")).make(work)
    assert {"distillation", "cross_entropy"} <= made.curves[0].train_terms.keys()


def test_scratch_starts_from_fresh_weights_and_trains_for_the_whole_recipe(sources: dict[str, Model]) -> None:
    source = sources["ffn"]
    work = replace(make_work(source), seed=1)  # the source's seed would draw its first weights
    trained, scratch = Quantization(), Quantization(start="scratch")
    for quantization, is_alike, epochs in ((trained, True, 1), (scratch, False, RECIPE.epochs)):
        made = TrainQuantized(quantization).make(work)
        both = torch.stack([of.state_dict()["layers.0.weight"].flatten() for of in (made.model, source)])
        assert (float(torch.corrcoef(both)[0, 1]) > 0.8) == is_alike
        assert len(made.curves) == epochs


def test_artifact_of_weights_that_are_not_on_levels_is_refused(sources: dict[str, Model], tmp_path: Path) -> None:
    form = AsTrained(Rounding(2))
    made = make(sources["moe"], Quantization(Rounding(2)))
    assert isinstance(made.model, SparseMoE)
    with torch.no_grad():
        made.model.experts.weight_in[2, 3, 4] += 0.01
    with pytest.raises(WrongPrecision, match=r"the weights of expert2\.\w+ do not lie"):
        form.write(made.model, tmp_path / "model.onnx", make_work(made.model), {"model": "x"})
    assert not any(tmp_path.iterdir())
    with pytest.raises(WrongPrecision, match="do not lie"):
        write(make(sources["ffn"], Quantization(Rounding(4))), Quantization(Rounding(2)), tmp_path / "model.onnx")


def test_training_that_leaves_the_levels_fails(sources: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(model: FFN) -> None:
        fold(model)
        with torch.no_grad():
            model.state_dict()["layers.1.weight"].mul_(1 + 0.2 * torch.rand(12, 24))

    monkeypatch.setattr(qat, "fold", spoil)
    with pytest.raises(RunFailed, match="do not lie on levels of 2 bits"):
        make(sources["ffn"], Quantization(Rounding(2)))


def test_a_model_does_not_change_what_it_is_made_of(sources: dict[str, Model]) -> None:
    for source in sources.values():
        for quantization in (Quantization(Rounding(2)), Quantization(Rounding(2), learn="layers")):
            work = make_work(source)
            TrainQuantized(quantization).make(work)
            assert work.source is not None
            for ours, theirs in zip(work.source.state_dict().values(), source.state_dict().values(), strict=True):
                assert torch.equal(ours, theirs)


def test_what_does_not_go_together_is_the_users_error() -> None:
    refused: list[dict[str, Any]] = [{"start": "scratch"}, {"activation_bits": 8}]
    for fields in refused:
        with pytest.raises(UserError, match="--learn layers"):
            Quantization(learn="layers", **fields)
    with pytest.raises(UserError, match=re.escape("--start scratch")):
        TrainQuantized(Quantization(start="scratch"), Learning(3))
    with pytest.raises(UserError, match="--teacher"):
        TrainQuantized(Quantization(learn="layers"), Learning(teacher="self"))
