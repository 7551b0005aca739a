from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from tiny import spec

from mnist_lab.compress import int8 as q
from mnist_lab.compress.int8 import Mode
from mnist_lab.data import Dataset
from mnist_lab.deploy.artifacts import artifact_bytes, read_onnx_metadata
from mnist_lab.deploy.onnx import write_onnx
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.models import PRESETS, build_model
from mnist_lab.runtimes import FLOAT_PRODUCTS
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession

pytestmark = pytest.mark.slow

NUM_LAYERS = {"ffn": 3, "moe-sparse": 10, "moe-dense": 4}


@pytest.fixture(params=NUM_LAYERS)
def fp32(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    preset = PRESETS["compact"]
    model = build_model(preset.ffn(spec(0.18, 0.18)) if request.param == "ffn" else preset.moe(spec(0.18, 0.18)))
    path = tmp_path / f"{request.param}.onnx"
    write_onnx(model.eval(), path, {"model": "x"}, layout="dense" if request.param == "moe-dense" else "sparse")
    return path


def convert(fp32: Path, dataset: Dataset, mode: Mode) -> Path:
    output = fp32.with_name(f"{fp32.stem}-{mode}.onnx")
    q.quantize(
        fp32,
        output,
        mode=mode,
        calibration=dataset.train.pixels.numpy(),
        keep_float=FLOAT_PRODUCTS,
        reduced_range=q.needs_reduced_range(),
        metadata={"model": "x", "config": {"mode": mode}},
    )
    return output


class TestFormulas:
    def test_affine_is_torchs(self) -> None:
        r = torch.linspace(-1.3, 2.9, 1000)
        scale, zero_point = q.affine_parameters(-1.3, 2.9)
        expected = torch.fake_quantize_per_tensor_affine(r, scale, zero_point, 0, 255)
        restored = q.affine_dequantize(q.affine_quantize(r.numpy(), scale, zero_point), scale, zero_point)
        assert np.allclose(restored, expected.numpy(), atol=1e-6)
        assert np.abs(restored - r.numpy()).max() <= scale / 2 + 1e-6

    @pytest.mark.parametrize(("r_min", "r_max"), [(-1.3, 2.9), (0.5, 2.0), (-2.0, -0.5), (0.0, 1.0), (0.0, 0.0)])
    def test_zero_is_exact_in_every_range(self, r_min: float, r_max: float) -> None:
        scale, zero_point = q.affine_parameters(r_min, r_max)
        assert scale > 0
        assert 0 <= zero_point <= 255
        zero = np.zeros(1, np.float32)
        assert q.affine_dequantize(q.affine_quantize(zero, scale, zero_point), scale, zero_point) == 0

    def test_affine_clips_outside_the_range(self) -> None:
        scale, zero_point = q.affine_parameters(0.0, 1.0)
        assert q.affine_quantize(np.array([-5.0, 9.0], np.float32), scale, zero_point).tolist() == [0, 255]

    def test_raw_pixels_lose_nothing(self) -> None:
        levels = (np.arange(256) / 255).astype(np.float32)
        scale, zero_point = q.affine_parameters(0.0, 1.0)
        assert zero_point == 0
        assert np.array_equal(q.affine_quantize(levels, scale, zero_point), np.arange(256))

    def test_absmax_uses_the_whole_range_and_keeps_zero(self) -> None:
        values, scale = q.absmax_quantize(np.array([-2.0, 0.0, 0.5, 1.0], np.float32))
        assert values.tolist() == [-127, 0, 32, 64]
        assert scale.item() == pytest.approx(2 / 127)

    def test_absmax_of_zeros_does_not_divide_by_zero(self) -> None:
        values, scale = q.absmax_quantize(np.zeros((3, 2), np.float32), axis=1)
        assert not values.any()
        assert np.isfinite(scale).all()

    def test_per_channel_scales_are_per_channel(self) -> None:
        r = np.array([[1.0, 10.0], [-0.5, 20.0]], np.float32)
        values, scale = q.absmax_quantize(r, axis=1)
        assert scale.shape == (1, 2)
        assert values[0, 0] == 127
        assert values[1, 1] == 127


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_engine_runs_every_layer_in_integers(fp32: Path, toy_dataset: Dataset, mode: Mode) -> None:
    proof = q.prove_integer(convert(fp32, toy_dataset, mode), onnx.load(fp32), keep_float=FLOAT_PRODUCTS)
    assert sum(proof.integer_products.values()) == NUM_LAYERS[fp32.stem]
    assert proof.float_products == ([] if fp32.stem == "ffn" else ["combine", "router"])


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_int8_is_a_quarter_and_close(fp32: Path, toy_dataset: Dataset, mode: Mode) -> None:
    output = convert(fp32, toy_dataset, mode)
    assert artifact_bytes(output) <= 0.28 * artifact_bytes(fp32)
    assert output.stat().st_size <= 0.28 * fp32.stat().st_size
    pixels = toy_dataset.validation.pixels.numpy()
    reference, quantized = (OnnxRuntimeSession(path, threads=1).predict(pixels) for path in (fp32, output))
    noise = np.square(reference - quantized).sum()
    assert 10 * np.log10(np.square(reference).sum() / noise) > 20  # decibels
    assert read_onnx_metadata(output)["config"] == {"mode": mode}


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_engines_weights_are_the_textbooks(fp32: Path, toy_dataset: Dataset, mode: Mode) -> None:
    output = convert(fp32, toy_dataset, mode)
    constants = {c.name: numpy_helper.to_array(c) for c in onnx.load(output).graph.initializer}
    originals = {c.name: numpy_helper.to_array(c) for c in onnx.load(fp32).graph.initializer}
    weights = [name for name in originals if name.endswith(".weight")]
    assert len(weights) == NUM_LAYERS[fp32.stem]
    for name in weights:
        # The engine stores weights (inputs, outputs), one scale per output.
        expected, scale = q.absmax_quantize(originals[name], q_max=64 if q.needs_reduced_range() else 127, axis=1)
        actual = constants[f"{name}_quantized"]
        assert actual.dtype == np.int8
        np.testing.assert_allclose(constants[f"{name}_scale"].ravel(), scale.ravel(), rtol=1e-5)
        # Where r/S lies on the half between two integers, float rounding may go either way.
        assert (actual != expected).mean() < 1e-3
        assert np.abs(actual.astype(int) - expected).max() <= 1


def test_layer_left_in_float_is_found(fp32: Path, toy_dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(WrongPrecision, match="integer products"):
        q.prove_integer(fp32, onnx.load(fp32), keep_float=FLOAT_PRODUCTS)
    output = tmp_path / "partly.onnx"
    q.quantize(
        fp32,
        output,
        mode="static",
        calibration=toy_dataset.train.pixels.numpy(),
        keep_float=[*FLOAT_PRODUCTS, "logits"],
        reduced_range=q.needs_reduced_range(),
        metadata={"model": "x"},
    )
    with pytest.raises(WrongPrecision, match="logits"):
        q.prove_integer(output, onnx.load(fp32), keep_float=FLOAT_PRODUCTS)


def test_integer_router_is_found(tmp_path: Path) -> None:
    fp32 = tmp_path / "moe.onnx"
    write_onnx(build_model(PRESETS["compact"].moe(spec(0.18, 0.18))), fp32, {"model": "x"})
    output = tmp_path / "int8.onnx"
    q.quantize(fp32, output, mode="dynamic", keep_float=["combine"], reduced_range=False, metadata={"model": "x"})
    with pytest.raises(WrongPrecision, match="router"):
        q.prove_integer(output, onnx.load(fp32), keep_float=FLOAT_PRODUCTS)


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_histogram_methods_calibrate_experts_of_unequal_load(
    toy_dataset: Dataset, tmp_path: Path, method: q.CalibrationMethod
) -> None:
    fp32, output = tmp_path / "moe.onnx", tmp_path / "int8.onnx"
    write_onnx(build_model(PRESETS["compact"].moe(spec(0.18, 0.18))), fp32, {})
    calibration = toy_dataset.train.pixels.numpy()
    assert len(calibration) > q.CALIBRATION_BATCH
    minmax = tmp_path / "minmax.onnx"
    for path, how in ((output, method), (minmax, "minmax")):
        q.quantize(
            fp32,
            path,
            mode="static",
            calibration=calibration,
            method=how,
            keep_float=FLOAT_PRODUCTS,
            reduced_range=False,
            metadata={},
        )
    pixels = toy_dataset.validation.pixels.numpy()
    reference, clipped, whole = (OnnxRuntimeSession(path, threads=1).predict(pixels) for path in (fp32, output, minmax))
    assert np.square(reference - clipped).sum() < 0.1 * np.square(reference).sum()
    assert not np.array_equal(clipped, whole)


def test_calibration_size_is_checked() -> None:
    with pytest.raises(UserError, match="--calibration-size 0"):
        q.Calibration(calibration_size=0)
