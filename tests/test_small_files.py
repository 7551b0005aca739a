"""Small students as they are deployed: convolutions in the graph, and few bytes beside the weights."""

import copy
import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from test_expert_shapes import APART
from test_small import PIXELS, SHAPE, make_small
from tiny import make_dataset, spec

from mnist_lab.compress.bfloat16 import round_weights
from mnist_lab.compress.fake_quant import roundings
from mnist_lab.compress.gptq import input_grams
from mnist_lab.compress.int8 import DynamicInt8, StaticInt8
from mnist_lab.compress.levels import LEVELS, Bits, Rounding
from mnist_lab.compress.mixed_bits import MixedBits
from mnist_lab.compress.qat import Quantization, TrainQuantized
from mnist_lab.compress.weight_only import AsTrained, Method, WeightOnly, round_weight
from mnist_lab.deploy import safety
from mnist_lab.deploy.artifacts import read_onnx_metadata, save_onnx
from mnist_lab.deploy.onnx import build_onnx, write_onnx
from mnist_lab.deploy.safety import check_graph
from mnist_lab.errors import UserError
from mnist_lab.experiments.row import describe
from mnist_lab.experiments.technique import Work
from mnist_lab.files import as_json
from mnist_lab.measure import decibels
from mnist_lab.models import PRESETS, Model, build_model
from mnist_lab.models.ffn import FFN, Windows, linear_layers
from mnist_lab.models.small import SmallShape
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession
from mnist_lab.training import find_recipe, torch_predictor

SHAPES = [
    SHAPE,
    SmallShape((), 1, (Windows(8, 5, 3),)),
    SmallShape((12, 8), 4),
    SmallShape((), 2, (Windows(8, 3, 1), Windows(16, 3, 2), Windows(8, 5, 1))),
]


def run(path: Path, pixels: torch.Tensor = PIXELS) -> np.ndarray:
    return OnnxRuntimeSession(path, threads=1).predict(pixels.numpy())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_artifact_gives_the_models_logits(shape: SmallShape, tmp_path: Path) -> None:
    model = make_small(shape)
    write_onnx(model, tmp_path / "small.onnx", {"model": "x"})
    for batch in (1, 7):
        pixels = PIXELS[:batch]
        expected = torch_predictor(model)(pixels.numpy())
        np.testing.assert_allclose(run(tmp_path / "small.onnx", pixels), expected, atol=1e-4, rtol=1e-4)
    graph = build_onnx(model)
    onnx.checker.check_model(graph, full_check=True)
    counted = [node.op_type for node in graph.graph.node]
    assert counted.count("Conv") == len(shape.windows)
    assert counted.count("AveragePool") == (shape.pool > 1)


def test_mixture_that_pools_gives_the_models_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(replace(APART, data=spec(), pool=2)).eval()
    write_onnx(model, tmp_path / "moe.onnx", {"model": "x"})
    np.testing.assert_allclose(run(tmp_path / "moe.onnx"), torch_predictor(model)(PIXELS.numpy()), atol=1e-4)


def test_weights_of_bf16_are_stored_so(tmp_path: Path) -> None:
    model = round_weights(make_small())
    write_onnx(model, tmp_path / "small.onnx", {"model": "x"})
    stored = {constant.data_type for constant in build_onnx(model).graph.initializer}
    assert stored == {onnx.TensorProto.BFLOAT16}
    expected = torch_predictor(model.float())(PIXELS.numpy())
    np.testing.assert_allclose(run(tmp_path / "small.onnx"), expected, atol=0.05, rtol=0.05)


def spoil(change: str, model: onnx.ModelProto) -> None:
    by_type = {node.op_type: node for node in reversed(model.graph.node)}
    if change == "padding":
        by_type["Conv"].attribute.append(helper.make_attribute("pads", [10**6] * 4))
    elif change == "dilation":
        by_type["Conv"].attribute.append(helper.make_attribute("dilations", [2, 2]))
    elif change == "mode":
        by_type["AveragePool"].attribute.append(helper.make_attribute("ceil_mode", 1))
    else:
        dims = model.graph.input[0].type.tensor_type.shape.dim
        dims[2].dim_value = dims[3].dim_value = 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("padding", "told what"),
        ("dilation", "told what"),
        ("mode", "told what"),
        ("image", "an image may be of any size"),
    ],
)
def test_graphs_that_could_take_memory_without_measure_are_refused(change: str, message: str) -> None:
    model = build_onnx(make_small())
    check_graph(model)
    spoil(change, model)
    with pytest.raises(ValueError, match=message):
        check_graph(model)


def test_windows_make_no_more_of_an_image_than_models_may(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_onnx(make_small(SmallShape((), 1, (Windows(8, 3, 1), Windows(1, 20, 1)))))
    check_graph(model)  # 8 x 26 x 26 values, and fewer weights
    monkeypatch.setattr(safety, "MAX_VALUES", 1000)
    with pytest.raises(ValueError, match="windows0 may be of any size"):
        check_graph(model)


def work_of(model: Model) -> Work:
    recipe = find_recipe("quick", "compact")
    return Work(make_dataset(), PRESETS["compact"], recipe, seed=0, device="cpu", name="x", source=model)


def with_rounded(model: FFN, form: WeightOnly) -> FFN:
    """A copy whose weights lie on levels as they do after training there."""
    rounded = copy.deepcopy(model)
    for weight, rounding in roundings(rounded, form.rounding, None):
        values = round_weight(weight.matrices()[0].numpy(), rounding, None).dequantize()
        weight.value.data.copy_(torch.from_numpy(values.T))
    return rounded


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("bits", LEVELS)
def test_learned_weights_of_few_bits_come_back(bits: Bits, shape: SmallShape, tmp_path: Path) -> None:
    file, form = tmp_path / "small.onnx", AsTrained(Rounding(bits))
    model = with_rounded(make_small(shape), WeightOnly(Rounding(bits)))
    form.write(model, file, work_of(model), {"model": "x"})
    pixels = make_dataset().validation.pixels
    expected, found = torch_predictor(model)(pixels.numpy()), run(file, pixels)
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-3)
    assert (found.argmax(axis=1) == expected.argmax(axis=1)).all()
    proof, num_layers = form.prove(model, file), len(model.layers)
    assert proof["products"] == {"float": num_layers}
    assert sum(proof["stored"].values()) == num_layers
    assert "all convolved and multiplied in float, which is made of them" in proof["text"]
    assert read_onnx_metadata(file) == {"model": "x"}
    onnx.checker.check_model(str(file), full_check=True)


@pytest.mark.parametrize("bits", [4, 2])
@pytest.mark.parametrize(
    "method", [Method(), Method(scheme="affine"), Method(activation_bits=8), Method(activation_bits=4)], ids=str
)
def test_weights_are_rounded_with_feedback_from_what_windows_see(bits: Bits, method: Method, tmp_path: Path) -> None:
    file, model = tmp_path / "small.onnx", make_small()
    form = WeightOnly(Rounding(bits), method)
    form.write(model, file, work_of(model), {"model": "x"})
    proof = form.prove(model, file)
    assert proof["products"] == {"float": 4}
    assert proof.get("activations") == (None if method.activation_bits is None else {str(method.activation_bits): 3})


def test_feedback_sees_every_window() -> None:
    graph, pixels = build_onnx(make_small(SmallShape((), 1, (Windows(4, 5, 3),)))), PIXELS.numpy()
    (gram,) = input_grams(graph, ["pixels"], pixels).values()
    windows = np.stack(
        [pixels[:, 0, i : i + 5, j : j + 5].reshape(7, -1) for i in range(0, 24, 3) for j in range(0, 24, 3)]
    ).reshape(-1, 25)
    np.testing.assert_allclose(gram, windows.T.astype(np.float64) @ windows, rtol=1e-6)


def test_file_has_few_bytes_beside_its_weights(tmp_path: Path) -> None:
    """Three layers of windows and one to the logits: 3,608 weights and biases, in a file that says all of itself."""
    shape = SmallShape((), 2, (Windows(8, 3, 1), Windows(16, 3, 2), Windows(10, 3, 1)))
    form, name = WeightOnly(Rounding(4)), f"KD_small_from_FFN_QAT-scratch-self-{shape.name}"
    says = {
        "model": name,
        "dataset": "mnist",
        "preset": "compact",
        "recipe": "standard",
        "seed": 0,
        "config": as_json({"step": None, "form": describe(AsTrained(form.rounding))}),
        "parents": {
            "source": {
                "model": name.replace("QAT", "QAT_FP32"),
                "file": f"{name.replace('QAT', 'QAT_FP32')}-seed0.safetensors",
                "sha256": hashlib.sha256(b"").hexdigest(),
            }
        },
    }
    model, file = make_small(shape), tmp_path / "small.onnx"
    form.write(model, file, work_of(model), says)
    assert read_onnx_metadata(file) == says
    constants = onnx.load(file).graph.initializer
    weights = sum(len(constant.raw_data) for constant in constants)
    assert weights == sum(layer.weight.numel() / 2 + 8 * len(layer.bias) for layer in linear_layers(model.layers))
    assert file.stat().st_size - weights <= 1000


def test_metadata_that_would_become_long_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "small.onnx"
    save_onnx(build_onnx(make_small()), file, {"model": "x" * 2**21}, packed=True)
    with pytest.raises(UserError, match="cut short, or of any size"):
        read_onnx_metadata(file)


def test_groups_and_mixed_bits_are_for_larger_models(tmp_path: Path) -> None:
    model, grouped = make_small(), Rounding(4, 16)
    work = work_of(model)
    with pytest.raises(UserError, match="--group-size 16"):
        WeightOnly(grouped).write(model, tmp_path / "x.onnx", work, {})
    with pytest.raises(UserError, match="--group-size 16"):
        TrainQuantized(Quantization(grouped)).make(work)
    with pytest.raises(UserError, match="x is too small to gain from mixed bits"):
        MixedBits().write(model, tmp_path / "x.onnx", work, {})


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_static_int8_convolves_in_integers(shape: SmallShape, tmp_path: Path) -> None:
    file, model, form = tmp_path / "small.onnx", make_small(shape), StaticInt8()
    form.write(model, file, work_of(model), {"model": "x"})
    proof = form.prove(model, file)
    assert proof["integer_products"].get("QLinearConv", 0) == len(shape.windows)
    assert proof["float_products"] == []
    pixels = make_dataset().validation.pixels
    assert decibels(run(file, pixels), torch_predictor(model)(pixels.numpy())) > 25


def test_dynamic_int8_says_what_it_convolves_in_float(tmp_path: Path) -> None:
    file, model, form = tmp_path / "small.onnx", make_small(), DynamicInt8()
    form.write(model, file, work_of(model), {"model": "x"})
    proof = form.prove(model, file)
    assert sum(proof["integer_products"].values()) == 2
    assert proof["float_products"] == ["windows0", "windows1"]
    assert "in float: windows0, windows1" in proof["text"]
