"""Activations of few bits: their scales, and a graph that gives just the rounded values."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_fake_quant import MODELS, make_ffn
from test_prune_experts import make_moe
from tiny import make_dataset

from mnist_lab.compress import weight_only
from mnist_lab.compress.levels import ActivationBits, Rounding
from mnist_lab.compress.round_activations import (
    GATHERED,
    KINDS,
    best_scale,
    bytes_to_and_from_experts,
    count_rounded,
    round_activations,
)
from mnist_lab.compress.weight_only import Method, WeightOnly
from mnist_lab.deploy.artifacts import read_onnx
from mnist_lab.deploy.onnx import build_onnx
from mnist_lab.errors import WrongPrecision
from mnist_lab.experiments.technique import Proof, Work
from mnist_lab.measure import Array
from mnist_lab.models import PRESETS, Model
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.runtimes import open_session
from mnist_lab.runtimes.onnxruntime import PROVIDERS
from mnist_lab.training import Recipe

DATA = make_dataset()
PIXELS = DATA.validation.pixels.numpy()
Scale = Array | np.float32
RANDOM = np.random.default_rng(0)
BITS: tuple[ActivationBits, ...] = (None, 8, 4)
EVERY_BITS = pytest.mark.parametrize("bits", [8, 4])


def write(model: Model, file: Path, method: Method) -> Proof:
    work = Work(DATA, PRESETS["compact"], Recipe(epochs=1, batch_size=32), 0, "cpu", "x")
    form = WeightOnly(Rounding(4), method)
    form.write(model, file, work, {"model": "x"})
    return form.prove(model, file)


def rounded_by_hand(values: Array, scale: Scale, bits: int, *, is_signed: bool) -> Array:
    lowest = -(2 ** (bits - 1)) if is_signed else 0
    rounded: Array = scale * np.clip(np.rint(values / scale), lowest, lowest + 2**bits - 1)
    return rounded


def scales_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {
        constant.name.removesuffix(".scale"): numpy_helper.to_array(constant)
        for constant in model.graph.initializer
        if constant.name.endswith(".scale")
    }


def read_out(model: onnx.ModelProto, *names: str) -> list[Array]:
    """As the file says, without an engine's optimizations."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    inside = [name for name in names if name != "logits"]
    opened.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inside)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(opened.SerializeToString(), options, providers=PROVIDERS)
    found: list[Array] = session.run(names, {"pixels": PIXELS})
    return found


@pytest.mark.parametrize("is_signed", [False, True])
@EVERY_BITS
def test_scale_is_of_least_error(bits: int, is_signed: bool) -> None:
    kind = KINDS[bits, is_signed]
    assert (kind.lowest, kind.highest) == ((-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1))
    exact = 0.5 * np.arange(kind.lowest, kind.highest + 1, dtype=np.float32)
    assert best_scale(exact, kind) == pytest.approx(0.5)
    values = RANDOM.normal(size=5000).astype(np.float32)
    values = values if is_signed else values.clip(min=0)
    scale = best_scale(values, kind)
    assert scale.shape == ()
    assert scale.dtype == np.float32

    def error(scale: Scale) -> float:
        return float(np.square(values - rounded_by_hand(values, scale, bits, is_signed=is_signed)).sum())

    reach = np.float32(np.abs(values).max() / kind.highest)
    assert error(scale) <= 1.05 * min(error(reach * np.float32(share)) for share in np.linspace(0.1, 1, 200))
    if bits == 4:
        assert error(scale) < 0.9 * error(reach)  # to cut off a few saves more


def test_nothing_to_calibrate_on_still_gives_a_scale() -> None:
    for kind in KINDS.values():
        for values in (np.zeros((5, 3), np.float32), np.zeros((0, 3), np.float32)):
            assert best_scale(values, kind) > 0


@EVERY_BITS
def test_graph_of_a_dense_model_computes_with_rounded_activations(bits: ActivationBits) -> None:
    model, graph = make_ffn(), build_onnx(make_ffn())
    assert bits is not None
    round_activations(graph, bits, DATA.train.pixels.numpy())
    onnx.checker.check_model(graph, full_check=True)
    scales = scales_of(graph)
    assert len(scales) == 2
    with torch.no_grad():
        rows = model.normalize(torch.from_numpy(PIXELS))
        *inner, last = model.layers
        for layer, scale in zip(inner, scales.values(), strict=True):
            rows = torch.from_numpy(rounded_by_hand(layer(rows).relu().numpy(), scale, bits, is_signed=False))
        expected = last(rows).numpy()
    (found,) = read_out(graph, "logits")
    np.testing.assert_allclose(found, expected, atol=float(np.abs(expected).max()) / 2**bits)
    assert np.abs(found - expected).mean() < 1e-3


@EVERY_BITS
def test_graph_of_a_mixture_rounds_what_goes_from_layer_to_layer(bits: ActivationBits) -> None:
    graph = build_onnx(make_moe())
    assert bits is not None
    round_activations(graph, bits, DATA.train.pixels.numpy())
    onnx.checker.check_model(graph, full_check=True)
    scales = scales_of(graph)
    experts = {f"expert{expert}.relu" for expert in range(4)}
    assert scales.keys() == {"hidden", *experts, GATHERED, "mixed.relu", "head0.relu"}
    assert count_rounded(graph.graph) == {bits: 8}
    consumers = Counter(name for node in graph.graph.node for name in node.input)
    for name, scale in scales.items():
        assert consumers[name] == 1  # its rounding alone
        values, rounded = read_out(graph, name, f"{name}.rounded")
        expected = rounded_by_hand(values, scale, bits, is_signed=name == GATHERED)
        np.testing.assert_allclose(rounded, expected, rtol=1e-5, atol=1e-6)
        assert (rounded < 0).any() == (name == GATHERED)


@EVERY_BITS
@pytest.mark.parametrize("name", ["ffn", "moe"])
def test_engine_rounds_them_and_the_proof_says_how_many(name: str, bits: ActivationBits, tmp_path: Path) -> None:
    model, file = MODELS[name](), tmp_path / "model.onnx"
    proof = write(model, file, Method(activation_bits=bits))
    num_rounded = {"ffn": 2, "moe": 8}[name]
    assert proof["activations"] == {str(bits): num_rounded}
    assert f"activations: {num_rounded} in {bits} bits" in proof["text"]
    assert proof["products"] == {"INT8": {"ffn": 3, "moe": 11}[name]}
    found = open_session("onnxruntime", file, precision="INT4", threads=1).predict(PIXELS)
    (expected,) = read_out(read_onnx(file), "logits")
    assert np.square(found - expected).sum() < 0.02 * np.square(expected).sum()
    write(model, file, Method())
    (in_float,) = read_out(read_onnx(file), "logits")
    assert 0 < np.abs(in_float - expected).max() < 0.5 * np.abs(in_float).max()


def test_proof_says_what_travels_to_and_from_experts(tmp_path: Path) -> None:
    model = make_moe()
    proofs = {bits: write(model, tmp_path / "model.onnx", Method(activation_bits=bits)) for bits in BITS}
    for bits, num_bytes in zip(BITS, (192, 48, 24), strict=True):  # 2 experts, 16 values there and 8 back
        assert proofs[bits]["bytes_to_and_from_experts"] == {"32": 192, "8": 48, "4": 24}
        told = f"to and from experts {num_bytes} bytes an image, 192 in FP32"
        assert (told in proofs[bits]["text"]) == (bits is not None)
    assert "activations" not in proofs[None]
    odd = replace(model.config, model_width=17, output_width=6, routing=RoutingConfig(top_k=1))
    assert bytes_to_and_from_experts(odd, 4) == 12
    assert "experts" not in write(make_ffn(), tmp_path / "model.onnx", Method(activation_bits=8))["text"]


def test_engine_that_leaves_a_rounding_out_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.onnx"
    write(make_ffn(), file, Method(activation_bits=8))
    counts = iter([Counter({8: 1}), Counter({8: 2})])
    monkeypatch.setattr(weight_only, "count_rounded", lambda graph: next(counts))
    with pytest.raises(WrongPrecision, match="of 2 activations ONNX Runtime rounds 1"):
        weight_only.prove_rounded(make_ffn(), file)
