"""Weights of few bits: the textbook's integers in the file, and an engine that computes with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from test_expert_shapes import APART, SHARED
from tiny import make_dataset, spec

from mnist_lab.compress import weight_only as w
from mnist_lab.compress.few_bits import stored_bits
from mnist_lab.compress.levels import LEVELS, Bits, Rounded, Rounding
from mnist_lab.compress.weight_only import Method, WeightOnly
from mnist_lab.deploy.artifacts import artifact_bytes, read_onnx, save_onnx
from mnist_lab.errors import WrongPrecision
from mnist_lab.experiments.technique import Work
from mnist_lab.models import PRESETS, Model, ModelConfig, build_model, parameter_bytes
from mnist_lab.models.ffn import FFNConfig
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.runtimes import open_session
from mnist_lab.training import Recipe

PRESET = PRESETS["compact"]
BITS: list[Bits] = [8, 4, 3, 2]
DATA = spec(0.18, 0.18)
CONFIGS: dict[str, ModelConfig] = {
    "ffn": PRESET.ffn(DATA),
    "moe": PRESET.moe(DATA, RoutingConfig()),
    "every expert": replace(APART, expert_widths=None, routing=RoutingConfig(2, 2)),
    "apart": APART,
    "shared": SHARED,
    "narrow": FFNConfig((20, 12), DATA),  # of widths that no group divides
}
PIXELS = make_dataset().validation.pixels.numpy()


def make_model(name: str) -> Model:
    torch.manual_seed(0)
    return build_model(CONFIGS[name]).eval()


def write(model: Model, file: Path, rounding: Rounding, method: Method = Method()) -> dict[str, Any]:
    work = Work(make_dataset(), PRESET, Recipe(epochs=1, batch_size=32), 0, "cpu", "x")
    form = WeightOnly(rounding, method)
    form.write(model, file, work, {"model": "x"})
    return form.prove(model, file)


@pytest.mark.parametrize("bits", BITS)
def test_nearest_integers_are_absmax_by_output_and_group(bits: Bits) -> None:
    weight = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    weight[:16, 1] = 0  # must not divide by zero
    integers, scales, zeros, size = w.round_weight(weight, Rounding(bits, 16), None)
    q_max = LEVELS[bits].highest
    assert (integers.shape, scales.shape, zeros, size) == ((20, 3), (2, 3), None, 16)
    assert scales[1, 2] == pytest.approx(np.abs(weight[16:, 2]).max() / q_max)
    assert integers[17, 2] == round(weight[17, 2] / scales[1, 2])
    assert (np.abs(integers).max(axis=0) == q_max).all()
    assert not integers[:16, 1].any()


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_let_levels_reach_from_the_smallest_to_the_largest(bits: Bits) -> None:
    weight = np.random.default_rng(0).uniform(-1, 3, size=(64, 5)).astype(np.float32)
    weight[:, 4] = 0
    rounded = w.round_weight(weight, Rounding(bits, 32), None, affine=True)
    step = np.repeat(rounded.scales, 32, axis=0)
    assert rounded.scales[0, 0] == pytest.approx((weight[:32, 0].max() - weight[:32, 0].min()) / (LEVELS[bits].num - 1))
    assert (np.abs(rounded.dequantize() - weight) <= step * (0.5 if bits == 8 else 1) + 1e-6).all()
    assert not rounded.dequantize()[:, 4].any()
    zero = Rounded(np.full_like(rounded.integers, 0), rounded.scales, rounded.zeros, 32).dequantize()
    assert (np.abs(np.rint(zero / step) - zero / step) < 1e-4).all()  # zero is a level


@pytest.mark.parametrize(("group_size", "scheme"), [("channel", "symmetric"), ("channel", "affine"), (64, "symmetric")])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CONFIGS)
def test_engine_multiplies_with_few_bits(name: str, bits: Bits, group_size: Any, scheme: Any, tmp_path: Path) -> None:
    model, file = make_model(name), tmp_path / "model.onnx"
    method = Method("nearest" if name in {"ffn", "moe"} else "gptq", scheme)  # large ones take seconds
    proof = write(model, file, Rounding(bits, group_size), method)
    num_layers = len(stored_bits(read_onnx(file).graph))
    in_few = num_layers - (bits in {3, 2})  # the last layer keeps 4
    assert proof["stored"] == {str(bits): in_few} | ({"4": 1} if in_few < num_layers else {})
    if group_size == "channel":
        assert proof["products"] == {"8" if bits == 8 else "INT8": num_layers}
    assert set(proof["products"]) <= ({"8"} if bits == 8 else {"4", "INT8"})  # a layer of few inputs is a single group
    assert sum(proof["products"].values()) == num_layers
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = open_session("onnxruntime", file, precision=WeightOnly(Rounding(bits)).precision, threads=1)
    for batch in (1, 65):
        assert session.predict(PIXELS[:batch]).shape == (batch, 10)


@pytest.mark.parametrize("name", ["ffn", "moe"])
def test_few_bits_are_a_small_file(name: str, tmp_path: Path) -> None:
    model, file = make_model(name), tmp_path / "model.onnx"
    shares = {}
    for bits in BITS:
        write(model, file, Rounding(bits), Method("nearest"))
        assert artifact_bytes(file) < file.stat().st_size
        shares[bits] = artifact_bytes(file) / parameter_bytes(model)
    assert shares == {
        8: pytest.approx(0.256, abs=0.008),
        4: pytest.approx(0.132, abs=0.008),
        3: pytest.approx(0.103, abs=0.008),
        2: pytest.approx(0.072, abs=0.008),
    }


def test_weights_on_levels_stay_as_they_are(tmp_path: Path) -> None:
    model, file = make_model("moe"), tmp_path / "model.onnx"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not name.startswith("router"):
                weight.copy_(weight.sign() * 0.03)
    proof = write(model, file, Rounding(1))  # gptq would move them
    assert proof["stored"] == {"1": 9, "4": 1}
    found = open_session("onnxruntime", file, precision="INT1", threads=1).predict(PIXELS)
    with torch.inference_mode():
        expected = model(torch.from_numpy(PIXELS)).numpy()
    assert np.square(found - expected).sum() < 1e-3 * np.square(expected).sum()


def test_router_takes_few_bits_where_asked(tmp_path: Path) -> None:
    model, file = make_model("moe"), tmp_path / "model.onnx"
    proof = write(model, file, Rounding(4), Method("nearest", router_bits=2))
    assert proof["stored"] == {"4": 10, "2": 1}
    assert "in float: combine" in proof["text"]
    assert "router" not in proof["text"]


def test_engine_that_computes_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w, "agreement", lambda file: 3.0)
    with pytest.raises(WrongPrecision, match="computes something else"):
        write(make_model("ffn"), tmp_path / "model.onnx", Rounding(4), Method("nearest"))


def test_agreement_is_of_the_engine_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    write(make_model("ffn"), file, Rounding(2), Method("nearest"))
    assert w.agreement(file) > 100  # integer products are exact
    write(make_model("ffn"), file, Rounding(2, 64), Method("nearest"))
    assert 30 < w.agreement(file) < 100  # these round rows more than the file says


@pytest.mark.parametrize("bits", [4, 2])
def test_few_bits_by_output_are_multiplied_as_int8(bits: Bits, tmp_path: Path) -> None:
    model, file = make_model("moe"), tmp_path / "model.onnx"
    proof = write(model, file, Rounding(bits), Method("nearest"))
    assert proof["products"] == {"INT8": 10}
    assert "10 as INT8" in proof["text"]
    quantizers = [node for node in read_onnx(file).graph.node if node.op_type == "DynamicQuantizeLinear"]
    assert len(quantizers) == 3 + 4  # pixels, rows of all experts at once, what goes into the head; within each expert


def test_product_that_stays_in_float_is_found(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    write(make_model("moe"), file, Rounding(4, 64), Method("nearest"))
    model = read_onnx(file)
    for node in model.graph.node:
        if node.op_type == "Max":
            node.op_type = "Relu"
            zero = node.input.pop()
    del model.graph.initializer[[c.name for c in model.graph.initializer].index(zero)]
    save_onnx(model, file, {"model": "x"})
    with pytest.raises(WrongPrecision, match="in float are"):
        w.prove_weights(file)


def test_one_bit_to_the_nearest_is_a_sign_times_the_mean_size() -> None:
    weight = np.array([[1.0, -2.0], [-3.0, 4.0]], np.float32)
    rounded = w.round_weight(weight, Rounding(1), None)
    assert np.array_equal(rounded.dequantize(), [[2, -3], [-2, 3]])
