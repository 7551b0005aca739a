"""Every runtime gives the plain PyTorch model's logits, in the precision that it is asked for."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import spec

from mnist_lab import runtimes
from mnist_lab.compress.bfloat16 import has_bfloat16, round_weights
from mnist_lab.compress.int8 import Mode, needs_reduced_range, quantize
from mnist_lab.data import Dataset
from mnist_lab.deploy.artifacts import artifact_bytes
from mnist_lab.deploy.onnx import write_onnx
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.measure import Array
from mnist_lab.models import PRESETS, build_model, parameter_bytes
from mnist_lab.models.checkpoints import save_checkpoint
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import EveryExpert, RoutingConfig, SparseMoE
from mnist_lab.runtimes import (
    EXTENSIONS,
    FLOAT_PRODUCTS,
    Precision,
    RuntimeName,
    Session,
    open_session,
    why_missing,
)
from mnist_lab.training import torch_predictor

pytestmark = pytest.mark.slow

PIXELS = np.random.default_rng(0).random((5, 1, 28, 28), np.float32)
needs_compiler = pytest.mark.skipif(why_missing("torchao") is not None, reason=str(why_missing("torchao")))
needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no BF16 products")


def make_model(kind: str) -> FFN | SparseMoE:
    torch.manual_seed(0)
    preset = PRESETS["compact"]
    return build_model(preset.ffn(spec()) if kind == "ffn" else preset.moe(spec(), RoutingConfig())).eval()


def write_files(model: FFN | SparseMoE, folder: Path) -> None:
    save_checkpoint(folder / "model.safetensors", model, {})
    write_onnx(model, folder / "model.onnx", {"model": "x"})


def open_in(runtime: RuntimeName, folder: Path, precision: Precision = "FP32") -> Session:
    return open_session(runtime, folder / f"model.{EXTENSIONS[runtime]}", precision=precision, threads=1)


def write_program(model: FFN | SparseMoE, path: Path, dataset: Dataset, mode: Mode) -> None:
    metadata = {"model": "x", "mode": mode}
    from mnist_lab.compress import pt2e  # brings torch's compiler

    pt2e.quantize_program(
        model,
        path,
        is_dynamic=mode == "dynamic",
        calibration=dataset.train.pixels.split(100),
        reduced_range=needs_reduced_range(),
        metadata=metadata,
    )


def signal_to_noise_db(reference: Array, logits: Array) -> float:
    return float(10 * np.log10(np.square(reference).sum() / np.square(reference - logits).sum()))


@pytest.mark.parametrize("kind", ["ffn", "moe"])
@pytest.mark.parametrize(
    "runtime", ["pytorch", pytest.param("torch-compile", marks=needs_compiler), "onnxruntime", "openvino"]
)
def test_fp32_logits_are_the_models(runtime: RuntimeName, kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    write_files(model, tmp_path)
    session = open_in(runtime, tmp_path)
    assert session.runtime == runtime
    np.testing.assert_allclose(session.predict(PIXELS), torch_predictor(model)(PIXELS), atol=1e-4)


@pytest.mark.parametrize("runtime", ["pytorch", "onnxruntime", "openvino"])
def test_every_run_computes_what_lies_in_its_batch(runtime: RuntimeName, tmp_path: Path) -> None:
    model = make_model("ffn")
    write_files(model, tmp_path)
    session = open_in(runtime, tmp_path)
    pixels = PIXELS.copy()
    batch = session.prepare(pixels)
    for values in (PIXELS, 1 - PIXELS):
        pixels[:] = values  # bound in place, so that a run that did nothing would give the old logits
        outcome: Any = session.run(batch)
        if runtime == "openvino":
            outcome = outcome.get_output_tensor().data
        np.testing.assert_allclose(np.asarray(outcome), torch_predictor(model)(values), atol=1e-4)


@needs_bfloat16
@pytest.mark.parametrize("kind", ["ffn", "moe"])
@pytest.mark.parametrize("runtime", ["pytorch", "openvino"])
def test_bf16_is_half_and_close(runtime: RuntimeName, kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    reference, fp32_bytes = torch_predictor(model)(PIXELS), parameter_bytes(model)
    rounded = round_weights(model)
    write_files(rounded, tmp_path)
    assert parameter_bytes(rounded) == fp32_bytes / 2
    assert artifact_bytes(tmp_path / "model.onnx") == pytest.approx(fp32_bytes / 2, rel=2e-3)
    logits = open_in(runtime, tmp_path, "BF16").predict(PIXELS)
    assert logits.dtype == np.float32
    assert 30 < signal_to_noise_db(reference, logits) < 70


@needs_compiler
@pytest.mark.parametrize("kind", ["ffn", "moe"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_torchao_runs_every_layer_in_int8(kind: str, mode: Mode, toy_dataset: Dataset, tmp_path: Path) -> None:
    model = make_model(kind)
    path = tmp_path / "model.pt2"
    write_program(model, path, toy_dataset, mode)
    from mnist_lab.compress import pt2e
    from mnist_lab.runtimes import torchao

    assert pt2e.prove_program(model, path)["layers"] == (3 if kind == "ffn" else 10)
    assert torchao.program_bytes(path) <= 0.28 * parameter_bytes(model)
    assert torchao.read_program_metadata(path) == {"model": "x", "mode": mode}
    pixels = toy_dataset.validation.pixels.numpy()[:5]
    logits = open_in("torchao", tmp_path, "INT8").predict(pixels)  # raises where a layer is not lowered
    assert 20 < signal_to_noise_db(torch_predictor(model)(pixels), logits) < 60


@needs_compiler
def test_torchao_layer_that_is_not_lowered_is_found(
    toy_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_program(make_model("ffn"), tmp_path / "model.pt2", toy_dataset, "static")
    monkeypatch.setattr("mnist_lab.runtimes.torchao.num_quantized_layers", lambda _: 4)
    with pytest.raises(WrongPrecision, match="3 of 4"):
        open_in("torchao", tmp_path, "INT8").prepare(PIXELS)


@pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "truncated"])
def test_broken_program_is_the_users_error(toy_dataset: Dataset, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.pt2"
    write_program(make_model("ffn"), path, toy_dataset, "dynamic")
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(UserError, match="model.pt2"):
        open_in("torchao", tmp_path, "INT8")


def test_openvino_runs_static_int8_in_integers(toy_dataset: Dataset, tmp_path: Path) -> None:
    write_int8(make_model("moe"), tmp_path, toy_dataset, "static")
    pixels = toy_dataset.validation.pixels.numpy()
    ours, theirs = (open_in(runtime, tmp_path, "INT8").predict(pixels) for runtime in ("onnxruntime", "openvino"))
    assert signal_to_noise_db(ours, theirs) > 20


@pytest.mark.parametrize("asked", ["INT8", "BF16"])
def test_openvino_in_another_precision_is_found(asked: Precision, toy_dataset: Dataset, tmp_path: Path) -> None:
    model = make_model("ffn")
    if asked == "INT8":
        write_int8(model, tmp_path, toy_dataset, "dynamic")  # which it computes in FP32
    else:
        write_int8(model, tmp_path, toy_dataset, "static")
    with pytest.raises(WrongPrecision, match=asked):
        open_in("openvino", tmp_path, asked)


def write_int8(model: FFN | SparseMoE, folder: Path, dataset: Dataset, mode: Mode) -> None:
    write_files(model, folder)
    quantize(
        folder / "model.onnx",
        folder / "model.onnx",
        mode=mode,
        calibration=dataset.train.pixels.numpy(),
        keep_float=FLOAT_PRODUCTS,
        reduced_range=needs_reduced_range(),
        metadata={"model": "x"},
    )


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_missing("openvino") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "requirements-extra.txt" in (why_missing("openvino") or "")
    assert "requirements-extra.txt" in (why_missing("torchao") or "")
    assert why_missing("onnxruntime") is None
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert "C++ compiler" in (why_missing("torch-compile") or "")
    monkeypatch.setattr(runtimes, "COMPILING_TORCH", (99, 0))
    assert "torch 99.0" in (why_missing("torch-compile") or "")
    assert why_missing("pytorch") is None


def test_every_expert_gives_the_sparse_logits() -> None:
    for routing in (RoutingConfig(), RoutingConfig(5, 1), RoutingConfig(3, 3)):
        model = SparseMoE(PRESETS["wide"].moe(spec(), routing)).eval()
        with torch.no_grad():
            model.experts.bias_in.normal_()
            model.experts.bias_out.normal_()
        np.testing.assert_allclose(
            torch_predictor(EveryExpert(model))(PIXELS), torch_predictor(model)(PIXELS), atol=1e-4
        )
