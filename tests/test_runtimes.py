"""Every runtime gives the plain PyTorch model's logits, in the precision that it is asked for."""

import ctypes
import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from test_expert_shapes import APART, SHARED
from tiny import spec
from torch import Tensor

from mnist_lab import runtimes
from mnist_lab.compress.bfloat16 import has_bfloat16, round_weights
from mnist_lab.compress.int8 import Mode, needs_reduced_range, quantize
from mnist_lab.data import Dataset
from mnist_lab.deploy.artifacts import artifact_bytes
from mnist_lab.deploy.onnx import write_onnx
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.measure import Array
from mnist_lab.models import PRESETS, build_model, parameter_bytes
from mnist_lab.models.checkpoints import read_metadata, read_tensors, save_checkpoint, save_tensors
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import EveryExpert, RoutingConfig, SparseMoE, SparseMoEConfig
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
needs_mkl = pytest.mark.skipif(why_missing("torch-sparse") is not None, reason="sparse products are MKL's")
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


def write_quantized(
    model: FFN | SparseMoE, folder: Path, dataset: Dataset, mode: Mode, *, reduced_range: bool = needs_reduced_range()
) -> Path:
    from mnist_lab.compress import pt2e  # brings torch's compiler

    path = folder / "model.safetensors"
    form = pt2e_form(dataset, mode, reduced_range)
    pt2e.write_quantized(model, path, **form, metadata={"model": "x", "mode": mode})
    return path


def pt2e_form(dataset: Dataset, mode: Mode, reduced_range: bool) -> dict[str, Any]:
    calibration = dataset.train.pixels.split(100)
    return {"is_dynamic": mode == "dynamic", "calibration": calibration, "reduced_range": reduced_range}


def signal_to_noise_db(reference: Array, logits: Array) -> float:
    with np.errstate(divide="ignore"):  # two engines may agree to the last bit
        return float(10 * np.log10(np.square(reference).sum() / np.square(reference - logits).sum()))


@pytest.mark.parametrize("kind", ["ffn", "moe"])
@pytest.mark.parametrize(
    "runtime",
    [
        "pytorch",
        pytest.param("torch-compile", marks=needs_compiler),
        pytest.param("torch-sparse", marks=needs_mkl),
        "onnxruntime",
        "openvino",
    ],
)
def test_fp32_logits_are_the_models(runtime: RuntimeName, kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    write_files(model, tmp_path)
    session = open_in(runtime, tmp_path)
    assert session.runtime == runtime
    np.testing.assert_allclose(session.predict(PIXELS), torch_predictor(model)(PIXELS), atol=1e-4)


@needs_mkl
@pytest.mark.parametrize("config", [APART, SHARED, replace(APART, head_widths=(8,))], ids=["apart", "shared", "head"])
def test_sparse_products_are_of_the_weights_that_are_not_zero(config: SparseMoEConfig, tmp_path: Path) -> None:
    from mnist_lab.runtimes.torch_sparse import TorchSparseSession

    torch.manual_seed(0)
    model = build_model(config).eval()
    assert isinstance(model, SparseMoE)
    with torch.no_grad():
        model.stem.weight *= torch.rand(model.stem.weight.shape) < 0.1
    write_files(model, tmp_path)
    session = TorchSparseSession(tmp_path / "model.safetensors")
    (stem,) = session.network.stem
    assert stem.weight_OI.layout == torch.sparse_csr
    assert stem.weight_OI._nnz() == int((model.stem.weight != 0).sum())
    for pixels in (PIXELS, PIXELS[:1]):  # of one image some experts get nothing
        np.testing.assert_allclose(session.predict(pixels), torch_predictor(model)(pixels), atol=1e-4)


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
    path = write_quantized(model, tmp_path, toy_dataset, mode)
    from mnist_lab.compress import pt2e
    from mnist_lab.runtimes import torchao

    assert pt2e.prove_quantized(model, path)["layers"] == (3 if kind == "ffn" else 10)
    assert torchao.quantized_bytes(path) <= 0.26 * parameter_bytes(model)
    assert read_metadata(path).items() >= {"model": "x", "mode": mode, "kind": "int8"}.items()
    pixels = toy_dataset.validation.pixels.numpy()[:5]
    logits = open_in("torchao", tmp_path, "INT8").predict(pixels)  # raises where a layer is not lowered
    assert 20 < signal_to_noise_db(torch_predictor(model)(pixels), logits) < 60


@pytest.mark.parametrize("kind", ["ffn", "moe"])
@pytest.mark.parametrize("mode", ["static", "dynamic"])
@pytest.mark.parametrize("reduced_range", [False, True])
def test_quantized_network_is_what_torchao_made(
    kind: str, mode: Mode, reduced_range: bool, toy_dataset: Dataset, tmp_path: Path
) -> None:
    from mnist_lab.compress import pt2e
    from mnist_lab.runtimes import torchao

    model = make_model(kind)
    network = torchao.load_quantized(write_quantized(model, tmp_path, toy_dataset, mode, reduced_range=reduced_range))
    converted = pt2e.convert(torchao.linear_network(model), **pt2e_form(toy_dataset, mode, reduced_range))
    with torch.no_grad():
        assert torch.equal(network(toy_dataset.validation.pixels), converted(toy_dataset.validation.pixels))


@needs_compiler
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_torchao_computes_what_inductor_makes_of_torchaos_program(toy_dataset: Dataset, tmp_path: Path) -> None:
    from mnist_lab.compress import pt2e
    from mnist_lab.runtimes import torchao
    from mnist_lab.runtimes.pytorch import compile_module

    model = make_model("moe")
    write_quantized(model, tmp_path, toy_dataset, "static")
    form = pt2e_form(toy_dataset, "static", needs_reduced_range())
    program = compile_module(pt2e.convert(torchao.linear_network(model), **form))
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        expected = program(toy_dataset.validation.pixels).numpy()
    logits = open_in("torchao", tmp_path, "INT8").predict(toy_dataset.validation.pixels.numpy())
    np.testing.assert_array_equal(logits, expected)


@needs_compiler
def test_torchao_runs_in_a_process_that_quantized_nothing(toy_dataset: Dataset, tmp_path: Path) -> None:
    path = write_quantized(make_model("ffn"), tmp_path, toy_dataset, "static")
    code = (
        "import sys, pathlib, numpy; from mnist_lab.runtimes import open_session;"
        "session = open_session('torchao', pathlib.Path(sys.argv[1]), precision='INT8', threads=1);"
        "session.predict(numpy.zeros((2, 1, 28, 28), numpy.float32))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_torchao_layer_that_is_not_lowered_is_found(
    toy_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_quantized(make_model("ffn"), tmp_path, toy_dataset, "static")
    from mnist_lab.runtimes import torchao

    def in_float(layer: torchao.QuantizedLinear, rows: Tensor) -> Tensor:
        return torch.nn.functional.linear(rows, layer.integers * layer.scales.unsqueeze(1), layer.bias)

    monkeypatch.setattr(torchao.QuantizedLinear, "forward", in_float)
    with pytest.raises(WrongPrecision, match="0 of 3"):
        open_in("torchao", tmp_path, "INT8").prepare(PIXELS)


def test_layer_that_torchao_leaves_in_float_is_found(
    toy_dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    set_global = X86InductorQuantizer.set_global
    monkeypatch.setattr(
        X86InductorQuantizer,
        "set_global",
        lambda quantizer, settings: set_global(quantizer, settings).set_module_name_qconfig("layers.1", None),
    )
    with pytest.raises(WrongPrecision, match=r"layers\.1"):
        write_quantized(make_model("ffn"), tmp_path, toy_dataset, "static")
    assert not list(tmp_path.iterdir())


def test_integers_of_another_model_prove_nothing(toy_dataset: Dataset, tmp_path: Path) -> None:
    path = write_quantized(make_model("ffn"), tmp_path, toy_dataset, "dynamic")
    from mnist_lab.compress import pt2e

    with pytest.raises(WrongPrecision, match=r"model\.stem"):
        pt2e.prove_quantized(make_model("moe"), path)


Change = Callable[[dict[str, Tensor], dict[str, Any]], object]
STATIC_CHANGES: dict[str, tuple[Change, str]] = {
    "less": (lambda tensors, _: tensors.pop("layers.1.bias"), "layers.1.bias"),
    "more": (lambda tensors, _: tensors.update({"extra": torch.zeros(2)}), "extra"),
    "shape": (lambda tensors, _: tensors.update({"layers.0.weight": torch.zeros(9, dtype=torch.int8)}), "describes"),
    "type": (lambda tensors, _: tensors.update({"layers.0.weight": tensors["layers.0.weight"].float()}), "describes"),
    "no scale": (lambda tensors, _: tensors["layers.0.weight_scale"].mul_(0), "above 0"),
    "negative scale": (lambda tensors, _: tensors["layers.0.input_scale"].neg_(), "above 0"),
    "infinite scale": (lambda tensors, _: tensors["layers.0.input_scale"].fill_(torch.inf), "finite"),
    "no number": (lambda tensors, _: tensors["layers.0.bias"].fill_(torch.nan), "finite"),
    "zero point": (lambda tensors, _: tensors["layers.0.input_zero_point"].fill_(200), "200, above 127"),
    "input_max": (lambda _, fields: fields.update(input_max=256), "input_max is 256"),
    "no input_max": (lambda _, fields: fields.pop("input_max"), "input_max is None"),
    "kind": (lambda _, fields: fields.pop("kind"), "no INT8 model"),
    "no architecture": (lambda _, fields: fields.pop("architecture"), "architecture"),
    "width": (lambda _, fields: fields["architecture"].update(widths=[10**12, 128]), "describes"),
    "experts": (lambda _, fields: fields.update(architecture=moe_of(experts=1000)), "describes"),
}


def moe_of(experts: int) -> dict[str, Any]:
    return asdict(PRESETS["compact"].moe(spec(), RoutingConfig(experts)))


@pytest.mark.parametrize("name", STATIC_CHANGES)
def test_quantized_file_of_another_content_is_the_users_error(name: str, toy_dataset: Dataset, tmp_path: Path) -> None:
    path = write_quantized(make_model("ffn"), tmp_path, toy_dataset, "static", reduced_range=True)
    tensors, fields = read_tensors(path)
    change, says = STATIC_CHANGES[name]
    change(tensors, fields)
    del fields["format"]
    save_tensors(path, tensors, fields)
    from mnist_lab.runtimes import torchao

    with pytest.raises(UserError, match=rf"model\.safetensors is broken: .*({says})"):
        torchao.load_quantized(path)


@pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "truncated"])
def test_broken_quantized_file_is_the_users_error(toy_dataset: Dataset, tmp_path: Path, content: bytes | None) -> None:
    path = write_quantized(make_model("ffn"), tmp_path, toy_dataset, "dynamic")
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(UserError, match="model.safetensors"):
        open_in("torchao", tmp_path, "INT8")


def test_quantized_file_is_no_checkpoint_and_a_checkpoint_no_quantized_file(
    toy_dataset: Dataset, tmp_path: Path
) -> None:
    write_quantized(make_model("ffn"), tmp_path, toy_dataset, "static")
    with pytest.raises(UserError, match="describes"):
        open_in("pytorch", tmp_path)
    write_files(make_model("ffn"), tmp_path)
    with pytest.raises(UserError, match="no INT8 model"):
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


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_file_that_is_not_the_suites_reaches_no_engine(
    runtime: RuntimeName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(make_model("ffn"), tmp_path)
    artifact = tmp_path / "model.onnx"
    artifact.write_bytes(artifact.read_bytes()[:-1] + b"x")
    engine = "onnxruntime.InferenceSession" if runtime == "onnxruntime" else "openvino.Core.compile_model"
    monkeypatch.setattr(engine, lambda *_, **__: pytest.fail("it did"))
    with pytest.raises(UserError, match="model.onnx is broken"):
        open_in(runtime, tmp_path)


@pytest.mark.parametrize(
    ("runtime", "read", "content"),
    [("onnxruntime", "read_artifact", b"hello"), ("openvino", "read_onnx", onnx.ModelProto(producer_name="hello"))],
)
def test_what_an_engine_says_is_one_line_about_the_file(
    runtime: RuntimeName, read: str, content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(make_model("ffn"), tmp_path)
    monkeypatch.setattr(f"mnist_lab.runtimes.{runtime}.{read}", lambda _: content)
    with pytest.raises(UserError, match="model.onnx is broken") as caught:
        open_in(runtime, tmp_path)
    assert "\n" not in str(caught.value)


class SignalStack(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


def signal_stack() -> int | None:
    """Where this thread's signal handlers run."""
    stack = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    address: int | None = stack.address
    return address


@pytest.mark.skipif(sys.platform != "linux", reason="looks into the system")
def test_openvino_leaves_signal_handlers_the_stack_that_it_gave_them(tmp_path: Path) -> None:
    write_files(make_model("ffn"), tmp_path)
    first = open_in("openvino", tmp_path)
    given = signal_stack()
    second = open_in("openvino", tmp_path)
    assert signal_stack() == given  # and not one that goes with the second session, and brings back one that is gone
    del first, second
    assert signal_stack() == given


def test_versions_are_known_of_builds_under_other_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_name(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    write_files(make_model("ffn"), tmp_path)
    assert open_in("openvino", tmp_path).version == importlib.metadata.version("openvino")
    monkeypatch.setattr(importlib.metadata, "version", no_such_name)
    assert "newer" not in (why_missing("torch-compile") or "")


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_missing("openvino") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert "requirements-extra.txt" in (why_missing("openvino") or "")
    assert "requirements-extra.txt" in (why_missing("torchao") or "")
    assert why_missing("onnxruntime") is None
    monkeypatch.setattr(runtimes, "COMPILING_TORCH", (99, 0))
    assert "torch 99.0" in (why_missing("torch-compile") or "")
    assert why_missing("pytorch") is None


def write_script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@needs_compiler
class TestCompiler:
    """Whether torch.compile could use what CXX names."""

    def test_with_arguments_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wrapper = write_script(tmp_path / "cache", 'exec "$@"')
        for command in ("g++ -O1", f"{wrapper} g++"):
            monkeypatch.setenv("CXX", command)
            assert why_missing("torch-compile") is None

    @pytest.mark.parametrize(
        ("command", "says"),
        [
            ("no-such-compiler", "no-such-compiler is not there"),
            ("", "the empty CXX is not there"),
            ("g++ 'a", "no command"),
            ("false", "false does not"),
            ("true", "true does not"),  # it succeeds, and makes nothing
            ("g++ --no-such-option", "no-such-option"),
            ("./compiler", "compiler"),  # torch.compile runs it from another folder
        ],
    )
    @pytest.mark.parametrize("runtime", ["torch-compile", "torchao"])
    def test_that_does_not_work_is_said(
        self, command: str, says: str, runtime: RuntimeName, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_script(tmp_path / "compiler", 'exec g++ "$@"')
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("CXX", command)
        reason = why_missing(runtime) or ""
        assert reason.startswith(f"{runtime} needs a C++ compiler")
        assert says in reason
        assert "\n" not in reason

    def test_without_openmp_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        refuse = 'case "$*" in *-fopenmp*) echo "no omp.h" >&2; exit 1;; esac; exec g++ "$@"'
        monkeypatch.setenv("CXX", write_script(tmp_path / "compiler", refuse))
        assert "no omp.h" in (why_missing("torch-compile") or "")

    def test_is_tried_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        log = tmp_path / "log"
        monkeypatch.setenv("CXX", write_script(tmp_path / "compiler", f'echo x >> {log}; exec g++ "$@"'))
        for runtime in runtimes.RUNTIMES:
            if runtime not in {"torch-compile", "torchao"}:
                why_missing(runtime)
        assert not log.exists()
        assert why_missing("torch-compile") is why_missing("torchao") is None
        assert log.read_text() == "x\n"

    def test_without_room_for_temporary_files_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "g++ -O2")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        assert "temporary files" in (why_missing("torchao") or "")


def test_every_expert_gives_the_sparse_logits() -> None:
    for routing in (RoutingConfig(), RoutingConfig(5, 1), RoutingConfig(3, 3)):
        model = SparseMoE(PRESETS["wide"].moe(spec(), routing)).eval()
        with torch.no_grad():
            model.experts.bias_in.normal_()
            model.experts.bias_out.normal_()
        np.testing.assert_allclose(
            torch_predictor(EveryExpert(model))(PIXELS), torch_predictor(model)(PIXELS), atol=1e-4
        )
