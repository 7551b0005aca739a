"""Experts as one operator of ONNX Runtime: the same model, and what is not is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from test_expert_shapes import APART, SHARED, make_model
from test_int8 import decibels
from tiny import make_dataset, spec

from mnist_lab.compress.qmoe import FusedExperts, OperatorBits
from mnist_lab.deploy.artifacts import artifact_bytes, read_onnx, read_onnx_metadata, save_onnx
from mnist_lab.deploy.inside import choose_experts, time_by_job
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.experiments.row import describe
from mnist_lab.experiments.technique import Work
from mnist_lab.models import PRESETS, Model, build_model
from mnist_lab.models.moe import RoutingConfig, SparseMoE, SparseMoEConfig
from mnist_lab.models.surgery import with_more_units
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession
from mnist_lab.training import find_recipe, torch_predictor

EVEN = SparseMoEConfig(24, 32, 24, (), RoutingConfig(3), spec(0.18, 0.18))
CONFIGS = {
    "even": EVEN,
    "apart": APART,
    "shared": SHARED,
    "more outputs than inputs": replace(EVEN, output_width=40, head_widths=(20, 12)),
    "wider than a group": replace(EVEN, model_width=272, expert_width=260, output_width=8),
    "one an image": replace(EVEN, routing=RoutingConfig(3, 1)),
    "one an image, of weight 1": replace(EVEN, routing=RoutingConfig(3, 1, gate="chosen")),
    "gate over all": replace(EVEN, routing=RoutingConfig(3, 2, gate="all")),
    "all": replace(EVEN, routing=RoutingConfig(3, 3)),
    "all, gate over all": replace(EVEN, routing=RoutingConfig(3, 3, gate="all")),
    "one expert": replace(EVEN, routing=RoutingConfig(1, 1)),
    "many": replace(EVEN, routing=RoutingConfig(40, 4)),
}
PIXELS = make_dataset().train.pixels
BOTH = pytest.mark.parametrize("bits", [8, 4])


def write(model: Model, form: FusedExperts, file: Path) -> Path:
    work = Work(make_dataset(), PRESETS["compact"], find_recipe("quick", "compact"), seed=0, device="cpu", name="x")
    form.write(model, file, work, {"model": "x"})
    return file


@BOTH
@pytest.mark.parametrize("name", CONFIGS)
def test_experts_are_the_models(name: str, bits: OperatorBits, tmp_path: Path) -> None:
    model = make_model(CONFIGS[name])
    file, form = write(model, FusedExperts(bits), tmp_path / "x.onnx"), FusedExperts(bits)
    assert form.prove(model, file)["bits"] == bits
    chosen, pixels = choose_experts(file, PIXELS.numpy()), PIXELS.numpy()
    with torch.inference_mode():
        is_same = (chosen == model.routed(PIXELS).experts.sort(dim=1).values.numpy()).all(axis=1)
    assert is_same.mean() > 0.8  # rounding the stem reroutes some
    expected, found = torch_predictor(model)(pixels), OnnxRuntimeSession(file, threads=1).predict(pixels)
    assert decibels(expected[is_same], found[is_same]) > {8: 28, 4: 12}[bits]
    one_by_one = np.concatenate([OnnxRuntimeSession(file, threads=1).predict(one) for one in np.split(pixels[:9], 9)])
    assert decibels(expected[:9][is_same[:9]], one_by_one[is_same[:9]]) > {8: 28, 4: 12}[bits]


def test_file_is_one_operator_of_the_bits_asked_for(tmp_path: Path) -> None:
    model = build_model(PRESETS["compact"].moe(spec()))
    sizes = {}
    for bits in (8, 4):
        file = write(model, FusedExperts(bits), tmp_path / f"{bits}.onnx")
        assert [node.name for node in onnx.load(file).graph.node if node.domain] == ["experts"]
        says = read_onnx_metadata(file)
        assert says.keys() == {"model", "layout", "interface"}
        assert says["layout"] == {"name": "fused"}
        sizes[bits] = artifact_bytes(file)
    assert sizes[8] - sizes[4] == 4 * 2 * 256 * 256 / 2  # half a byte a weight of the experts
    assert sizes[4] < 0.17 * sum(4 * weight.numel() for weight in model.parameters())
    assert time_by_job(tmp_path / "4.onnx", PIXELS[:1].numpy())["experts"] > 0


def test_proof_finds_what_is_not_as_it_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, form = make_model(EVEN), FusedExperts(8)
    file = write(model, form, tmp_path / "x.onnx")
    with pytest.raises(WrongPrecision, match=r"one operator of 4 bits, and ONNX Runtime runs \[8\]"):
        FusedExperts(4).prove(model, file)
    with pytest.raises(WrongPrecision, match="something else"):
        form.prove(make_model(replace(EVEN, routing=RoutingConfig(3, 1))), file)
    monkeypatch.setenv("ORT_QMOE_CPU_QNBIT_GEMM", "0")
    with pytest.raises(WrongPrecision, match="in float"):
        form.prove(model, file)
    monkeypatch.undo()
    changed = read_onnx(file)
    scales = next(constant for constant in changed.graph.initializer if constant.name == "experts.scale_out")
    scales.CopyFrom(numpy_helper.from_array(1.1 * numpy_helper.to_array(scales), scales.name))
    save_onnx(changed, tmp_path / "changed.onnx", {})
    with pytest.raises(WrongPrecision, match="something else"):
        form.prove(model, tmp_path / "changed.onnx")


def test_what_the_bytes_depend_on_is_a_setting(tmp_path: Path) -> None:
    model = make_model(EVEN)
    forms = [FusedExperts(8, reduced_range=reduced) for reduced in (False, True)]
    one, other = (write(model, form, tmp_path / "x.onnx").read_bytes() for form in forms)
    assert one != other
    assert describe(forms[0]) == {"kind": "FusedExperts", "bits": 8, "reduced_range": False}
    assert write(model, forms[0], tmp_path / "x.onnx").read_bytes() == one
    assert forms[1].prove(model, write(model, forms[1], tmp_path / "y.onnx"))["reduced_range"]


def test_model_without_experts_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="mixture"):
        write(build_model(PRESETS["compact"].ffn(spec())), FusedExperts(), tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize("config", [EVEN, APART, SHARED, CONFIGS["gate over all"]])
def test_units_of_zeros_change_nothing(config: SparseMoEConfig) -> None:
    model = make_model(config)
    wider = with_more_units(model, stem=50, experts=40, output=30)
    assert wider.config == replace(
        config, model_width=50, expert_width=40, output_width=30, expert_widths=None, shared_rank=None
    )
    assert wider.experts.weight_in.shape == (3, 50, 40)
    torch.testing.assert_close(wider(PIXELS), model(PIXELS), atol=1e-4, rtol=1e-4)
    assert isinstance(wider, SparseMoE)
