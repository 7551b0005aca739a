"""Weights of few bits: the textbook's integers in the file, and an engine that computes with them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from test_expert_shapes import APART, SHARED
from tiny import make_dataset, spec

from mnist_lab.compress import weight_only as w
from mnist_lab.compress.weight_only import TYPES, Bits, Rounding, WeightOnly
from mnist_lab.deploy.artifacts import artifact_bytes, read_onnx, save_onnx
from mnist_lab.deploy.onnx import build_onnx
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.experiments.technique import Work
from mnist_lab.models import PRESETS, Model, ModelConfig, build_model, parameter_bytes
from mnist_lab.models.ffn import FFNConfig
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.runtimes import open_session
from mnist_lab.training import Recipe

PRESET = PRESETS["compact"]
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


def write(model: Model, file: Path, rounding: Rounding) -> dict[str, Any]:
    work = Work(make_dataset(), PRESET, Recipe(epochs=1, batch_size=32), 0, "cpu", "x")
    form = WeightOnly(rounding)
    form.write(model, file, work, {"model": "x"})
    return form.prove(model, file)


@pytest.mark.parametrize("bits", TYPES)
def test_integers_are_absmax_by_output_and_group(bits: Bits) -> None:
    weight = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    weight[:16, 1] = 0  # must not divide by zero
    integers, scales = w.quantize_weight(weight, bits, 16)
    q_max = {8: 127, 4: 7, 2: 1}[bits]
    assert (integers.shape, scales.shape) == ((20, 3), (2, 3))
    assert scales[1, 2] == pytest.approx(np.abs(weight[16:, 2]).max() / q_max)
    assert integers[17, 2] == round(weight[17, 2] / scales[1, 2])
    assert (np.abs(integers).max(axis=0) == q_max).all()
    assert not integers[:16, 1].any()


@pytest.mark.parametrize("shape", [(3, 5), (4, 8), (1, 1)])
@pytest.mark.parametrize("bits", TYPES)
def test_packed_integers_are_what_onnx_reads(bits: Bits, shape: tuple[int, int]) -> None:
    q_max = 2 ** (bits - 1)
    integers = np.random.default_rng(0).integers(-q_max, q_max, shape).astype(np.int8)
    stored = TensorProto(data_type=TYPES[bits], dims=shape, raw_data=w.pack(integers, bits))
    assert np.array_equal(numpy_helper.to_array(stored).astype(np.int8), integers)
    assert len(stored.raw_data) == -(-integers.size * bits // 8)


@pytest.mark.parametrize("group_size", ["channel", 64])
@pytest.mark.parametrize("bits", TYPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_engine_multiplies_with_the_bits_of_the_file(name: str, bits: Bits, group_size: Any, tmp_path: Path) -> None:
    model, file = make_model(name), tmp_path / "model.onnx"
    method: Any = "nearest" if name in {"ffn", "moe"} else "gptq"  # large ones take seconds
    proof = write(model, file, Rounding(bits, group_size, method))
    num_layers = sum(node.op_type == "DequantizeLinear" for node in read_onnx(file).graph.node)
    assert sum(proof["products"].values()) == num_layers
    assert set(proof["products"]) <= {str(bits), "4"}
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = open_session("onnxruntime", file, precision=WeightOnly(Rounding(bits)).precision, threads=1)
    for batch in (1, 65):
        assert session.predict(PIXELS[:batch]).shape == (batch, 10)


@pytest.mark.parametrize("name", ["ffn", "moe"])
def test_few_bits_are_a_small_file(name: str, tmp_path: Path) -> None:
    model, file = make_model(name), tmp_path / "model.onnx"
    shares = {}
    for bits in TYPES:
        write(model, file, Rounding(bits, method="nearest"))
        assert artifact_bytes(file) < file.stat().st_size
        shares[bits] = artifact_bytes(file) / parameter_bytes(model)
    assert shares == {
        8: pytest.approx(0.256, abs=0.008),
        4: pytest.approx(0.132, abs=0.008),
        2: pytest.approx(0.07, abs=0.01),
    }


def test_rounded_weights_are_what_the_file_stands_for() -> None:
    graph, fp32 = build_onnx(make_model("ffn")), build_onnx(make_model("ffn"))
    w.round_weights(graph, Rounding(4, 64))
    w.make_float(graph)
    found = {constant.name: numpy_helper.to_array(constant) for constant in graph.graph.initializer}
    for constant in fp32.graph.initializer:
        if constant.name.endswith(".weight"):
            weight = numpy_helper.to_array(constant)
            step = np.abs(weight[:64]).max(axis=0) / 7
            assert (np.abs(found[constant.name] - weight)[:64] <= step / 2 + 1e-6).all()
            assert not np.array_equal(found[constant.name], weight)


def test_outputs_that_the_engine_packs_wrongly_in_2_bits_keep_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = write(make_model("ffn"), tmp_path / "model.onnx", Rounding(2, method="nearest"))
    assert proof["products"] == {"2": 2, "4": 1}  # of 10 classes
    monkeypatch.setattr(w, "OUTPUTS_OF_2_BITS", 1)
    with pytest.raises(WrongPrecision, match="computes something else"):
        write(make_model("ffn"), tmp_path / "model.onnx", Rounding(2, method="nearest"))


def test_product_that_stays_in_float_is_found(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    write(make_model("moe"), file, Rounding(4, method="nearest"))
    model = read_onnx(file)
    for node in model.graph.node:
        if node.op_type == "Max":
            node.op_type = "Relu"
            del node.input[1]
    del model.graph.initializer[[c.name for c in model.graph.initializer].index(w.ZERO)]
    save_onnx(model, file, {"model": "x"})
    with pytest.raises(WrongPrecision, match="in float are"):
        w.prove_weights(file)


def test_bad_groups_are_the_users_error() -> None:
    for size in (0, -1, 8, 48, 512):
        with pytest.raises(UserError, match="--group-size"):
            Rounding(4, size)
    assert replace(Rounding(), group_size=16).group_size == 16
