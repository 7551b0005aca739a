"""Experts of different widths, and experts that share a base: the same model in every form."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from test_int8 import decibels
from tiny import make_dataset, spec

from mnist_lab.compress.bfloat16 import BFloat16
from mnist_lab.compress.int8 import DynamicInt8, StaticInt8
from mnist_lab.deploy.artifacts import artifact_bytes
from mnist_lab.deploy.inside import choose_experts, count_rows, time_by_job
from mnist_lab.deploy.onnx import write_onnx
from mnist_lab.experiments.technique import Form, Work
from mnist_lab.models import PRESETS, build_model, config_from_dict, count_parameters, parameter_bytes
from mnist_lab.models.checkpoints import load_checkpoint, save_checkpoint
from mnist_lab.models.moe import EveryExpert, RoutingConfig, SparseMoE, SparseMoEConfig
from mnist_lab.models.surgery import as_dense, with_experts
from mnist_lab.runtimes import open_session
from mnist_lab.training import Recipe, fit, torch_predictor

APART = SparseMoEConfig(24, 32, 16, (), RoutingConfig(num_experts=3), spec(0.18, 0.18), expert_widths=(8, 32, 16))
SHARED = SparseMoEConfig(24, 32, 16, (), RoutingConfig(num_experts=3), spec(0.18, 0.18), shared_rank=2)
ALL = RoutingConfig(num_experts=3, top_k=3)  # rounding then changes no route
CONFIGS = pytest.mark.parametrize(
    "config",
    [APART, replace(APART, routing=ALL), SHARED, replace(SHARED, routing=ALL)],
    ids=["apart", "apart, all", "shared", "shared, all"],
)
PIXELS = make_dataset().train.pixels


def make_model(config: SparseMoEConfig) -> SparseMoE:
    torch.manual_seed(0)
    model = build_model(config)
    assert isinstance(model, SparseMoE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()
        for bias, width in zip(model.experts.bias_in, model.experts.widths, strict=True):
            bias[width:] = 0
    return model.eval()


@CONFIGS
def test_training_evaluation_and_the_pass_over_every_expert_agree(config: SparseMoEConfig) -> None:
    model = make_model(config)
    logits = model(PIXELS)
    torch.testing.assert_close(EveryExpert(model)(PIXELS), logits, atol=1e-4, rtol=1e-4)
    model.train().router.noisy = False
    torch.testing.assert_close(model(PIXELS), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@CONFIGS
def test_artifact_gives_the_models_logits(config: SparseMoEConfig, runtime: Any, tmp_path: Path) -> None:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    model, file = make_model(config), tmp_path / "model.onnx"
    write_onnx(model, file, {})
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = open_session(runtime, file, precision="FP32", threads=1)
    for batch in (1, 65):
        pixels = PIXELS[:batch].numpy()
        np.testing.assert_allclose(session.predict(pixels), torch_predictor(model)(pixels), atol=1e-3, rtol=1e-4)
    assert artifact_bytes(file) == pytest.approx(parameter_bytes(model), rel=0.1)  # besides, shapes and axes
    assert sum(time_by_job(file, PIXELS[:2].numpy()).values()) > 0


@pytest.mark.parametrize("form", [StaticInt8(), DynamicInt8()], ids=lambda form: form.label)
@CONFIGS
def test_int8_computes_all_but_the_routing_in_integers(config: SparseMoEConfig, form: Form, tmp_path: Path) -> None:
    model, dataset, file = make_model(config), make_dataset(), tmp_path / "model.onnx"
    work = Work(dataset, PRESETS["compact"], Recipe(epochs=1, batch_size=32), 0, "cpu", "x")
    form.write(model, file, work, {})
    proof = form.prove(model, file)
    assert set(proof["float_products"]) <= {"router", "combine", "combine_biases"}
    pixels = dataset.load_test().pixels.numpy()
    fp32 = tmp_path / "fp32.onnx"
    write_onnx(model, fp32, {})
    on_their_routes = (choose_experts(fp32, pixels) == choose_experts(file, pixels)).all(axis=1)
    assert on_their_routes.mean() > 0.9
    found = open_session("onnxruntime", file, precision="INT8", threads=1).predict(pixels)
    assert decibels(torch_predictor(model)(pixels)[on_their_routes], found[on_their_routes]) > 25


@CONFIGS
def test_bf16_is_close(config: SparseMoEConfig, tmp_path: Path) -> None:
    model, file = make_model(config), tmp_path / "model.safetensors"
    work = Work(make_dataset(), PRESETS["compact"], Recipe(epochs=1, batch_size=32), 0, "cpu", "x")
    BFloat16().write(model, file, work, {})
    BFloat16().prove(model, file)
    found = open_session("pytorch", file, precision="BF16", threads=1).predict(PIXELS.numpy())
    assert decibels(torch_predictor(model)(PIXELS.numpy()), found) > 25


@CONFIGS
def test_checkpoint_gives_it_back(config: SparseMoEConfig, tmp_path: Path) -> None:
    model = make_model(config)
    save_checkpoint(tmp_path / "model.safetensors", model, {})
    loaded = load_checkpoint(tmp_path / "model.safetensors").model
    assert loaded.config == config
    torch.testing.assert_close(loaded(PIXELS), model(PIXELS), rtol=0, atol=0)


def test_parameters_are_those_of_the_units_that_there_are() -> None:
    around = 784 * 24 + 24 + 24 * 3 + 16 * 10 + 10  # stem, gate, head
    assert count_parameters(make_model(APART)) == (
        around + (8 + 32 + 16) * (24 + 1 + 16) + 3 * 16,
        around + ((8 + 32 + 16) * (24 + 1 + 16) + 3 * 16) * 2 // 3,
    )
    base, own = 24 * 32 + 32 * 16, 2 * (24 + 32) + 32 + 2 * (32 + 16) + 16
    assert count_parameters(make_model(SHARED)) == (around + base + 3 * own, around + base + 2 * own)


def test_counting_a_skeleton_imports_no_compiler() -> None:
    code = """
import sys
from dataclasses import replace
from mnist_lab.data import DataSpec
from mnist_lab.models import PRESETS, build_skeleton, parameter_bytes
moe = PRESETS["compact"].moe(DataSpec(10, (28, 28), 0.18, 0.18))
apart = replace(moe, expert_width=32, expert_widths=(32, 8, 8, 8))
assert parameter_bytes(build_skeleton(apart)) > parameter_bytes(build_skeleton(replace(moe, shared_rank=1))) / 2
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_units_that_are_not_there_stay_away_in_training() -> None:
    model, dataset = make_model(APART), make_dataset()
    before = model.experts.weight_in.detach().clone()
    fit(model.train(), dataset, Recipe(epochs=2, batch_size=32), seed=0)
    for expert, width in enumerate((8, 32, 16)):
        assert not model.experts.weight_in[expert, :, width:].any()
        assert not model.experts.bias_in[expert, width:].any()
        assert not model.experts.weight_out[expert, width:].any()
    assert not torch.equal(model.experts.weight_in, before)


@pytest.mark.parametrize("config", [APART, SHARED], ids=["apart", "shared"])
@pytest.mark.parametrize("kept", [[0, 2], [1]])
def test_fewer_experts_are_as_if_the_others_could_not_be_chosen(config: SparseMoEConfig, kept: list[int]) -> None:
    model = make_model(config)
    smaller = with_experts(model, kept)
    with torch.no_grad():
        for network in (model, smaller):
            network.get_parameter("stem.bias").fill_(1.0)  # no image without anything to score
        for expert in {0, 1, 2} - set(kept):
            model.router.gate[:, expert] = -1e3
    model = with_top_k(model, len(kept))
    torch.testing.assert_close(smaller(PIXELS), model(PIXELS), atol=1e-4, rtol=1e-4)
    if len(kept) == 1:
        torch.testing.assert_close(as_dense(smaller)(PIXELS), smaller(PIXELS), atol=1e-4, rtol=1e-4)


def with_top_k(model: SparseMoE, top_k: int) -> SparseMoE:
    routing = replace(model.config.routing, top_k=top_k, gate="chosen")
    other = SparseMoE(replace(model.config, routing=routing)).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_layout_of_a_shared_base_sorts_nothing(tmp_path: Path) -> None:
    write_onnx(make_model(SHARED), tmp_path / "model.onnx", {})
    assert count_rows(tmp_path / "model.onnx", PIXELS.numpy()) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields | {"expert_widths": [8, 32]},
        lambda fields: fields | {"expert_widths": [8, 16, 16]},
        lambda fields: fields | {"expert_widths": [0, 32, 16]},
        lambda fields: fields | {"expert_widths": []},
        lambda fields: fields | {"shared_rank": 2},
        lambda fields: fields | {"shared_rank": 0, "expert_widths": None},
    ],
)
def test_widths_that_cannot_be_are_refused(change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    fields = {
        "model_width": 24, "expert_width": 32, "output_width": 16, "head_widths": [], "kind": "moe",
        "routing": {"num_experts": 3}, "expert_widths": [8, 32, 16],
        "data": {"num_classes": 10, "image_size": [28, 28], "mean": 0.18, "std": 0.18},
    }  # fmt: skip
    assert config_from_dict(fields) == APART
    with pytest.raises(ValueError, match=r"widths|base|rank"):
        config_from_dict(change(fields))
