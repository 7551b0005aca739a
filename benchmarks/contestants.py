"""What a user would pick instead of this suite: first scripts, classic tools, engines left to their defaults."""

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from torch import Tensor

from benchmarks.mask_loop import mask_loop_forward
from mnist_lab.compress.int8 import needs_reduced_range
from mnist_lab.compress.qmoe import OperatorBits, fuse_experts, replace_experts
from mnist_lab.deploy.onnx import build_onnx
from mnist_lab.measure import Array
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import EveryExpert, SparseMoE
from mnist_lab.runtimes import Precision, RuntimeName, bind, open_session
from mnist_lab.runtimes.onnxruntime import PROVIDERS, bind_batch, session_options

Call = Callable[[], object]
Binder = Callable[[Array], Call]  # a forward pass of these pixels, prepared


@dataclass(frozen=True)
class Contestant:
    """`open(threads)` loads it; torch's own threads are set outside."""

    model: str
    precision: Precision  # that is really executed
    runtime: str
    open: Callable[[int], Binder]


def suite_contestant(
    model: str, precision: Precision, runtime: RuntimeName, file: Path, *, name: str = ""
) -> Contestant:
    """A file in one of the suite's runtimes, under that name or the runtime's own."""

    def open_file(threads: int) -> Binder:
        return partial(bind, open_session(runtime, file, precision=precision, threads=threads))

    return Contestant(model, precision, name or runtime, open_file)


def reference_contestants(ffn: FFN, moe: SparseMoE, folder: Path) -> list[Contestant]:
    """All that can run here. Their files go to `folder`."""
    contestants = [
        Contestant("MoE", "FP32", "mask loop", _open_torch(partial(mask_loop_forward, moe))),
        *_vendor_operators(moe, folder),
    ]
    for name, model in (("FFN", ffn), ("MoE", EveryExpert(moe))):
        if quantized := _quantize_eagerly(model):
            contestants.append(Contestant(name, "INT8", "torch.ao dynamic", _open_torch(quantized)))
        plain = folder / f"{name}-plain.onnx"
        if importlib.util.find_spec("onnxscript") is None:
            print(f"without onnxscript {name} has no plain export, and engines' defaults are left out")
            continue
        export_plainly(model, plain, torch.zeros(2, 1, *moe.config.data.image_size))
        contestants += _default_engines(name, plain)
    return contestants


def _vendor_operators(moe: SparseMoE, folder: Path) -> list[Contestant]:
    """ONNX Runtime's own operators for a mixture, in FP32 and with weights of few bits."""
    graphs: dict[tuple[Precision, str], onnx.ModelProto] = {("FP32", "ORT MoE operator"): use_moe_operator(moe)}
    both: tuple[OperatorBits, ...] = (8, 4)
    for bits in both:
        fused = fuse_experts(moe, bits, reduced_range=needs_reduced_range())
        graphs["INT8", f"ORT QMoE operator, {bits} bits"] = fused
    contestants = []
    for number, ((precision, name), graph) in enumerate(graphs.items()):
        path = folder / f"vendor-moe-{number}.onnx"
        onnx.save(graph, path)
        contestants.append(Contestant("MoE", precision, name, partial(open_onnxruntime, path)))
    return contestants


def export_plainly(model: torch.nn.Module, path: Path, pixels: Tensor) -> None:
    """What torch's exporter makes of a model, all experts on every image."""
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(
            model.eval(),
            (pixels,),
            path,
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )


def _default_engines(name: str, plain: Path) -> list[Contestant]:
    quantized = plain.with_name(f"{plain.stem}-int8.onnx")
    quantization.quantize_dynamic(plain, quantized)
    contestants = [
        Contestant(name, "FP32", "ORT default", partial(_open_default_onnxruntime, plain)),
        Contestant(name, "INT8", "ORT default dynamic", partial(_open_default_onnxruntime, quantized)),
    ]
    if importlib.util.find_spec("openvino") is not None:
        from mnist_lab.runtimes.openvino import compile_onnx, executed_products

        executed = set(executed_products(compile_onnx(plain.read_bytes(), {})).values())
        precision: Precision = "BF16" if executed == {"bf16"} else "FP32"
        contestants.append(Contestant(name, precision, "OpenVINO default", partial(_open_default_openvino, plain)))
    return contestants


def open_onnxruntime(path: Path, threads: int) -> Binder:
    """As the suite runs its own files, a file of another's."""
    return bind_session(onnxruntime.InferenceSession(path, session_options(threads), providers=PROVIDERS))


def bind_session(session: onnxruntime.InferenceSession) -> Binder:
    """With input and output in place, as the suite runs its own."""

    def bind_pixels(pixels: Array) -> Call:
        batch = bind_batch(session, pixels)

        def call() -> Array:
            session.run_with_iobinding(batch.binding)
            return batch.logits

        return call

    return bind_pixels


def _open_default_onnxruntime(path: Path, threads: int) -> Binder:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Its threads would spin on beyond their turn, and slow the next contestant down.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=PROVIDERS)
    return lambda pixels: partial(session.run, None, {"pixels": pixels})


def _open_default_openvino(path: Path, threads: int) -> Binder:
    from mnist_lab.runtimes.openvino import compile_onnx

    model = compile_onnx(path.read_bytes(), {"INFERENCE_NUM_THREADS": threads})

    def bind_pixels(pixels: Array) -> Call:
        model(pixels)  # the first call at a batch size compiles
        return partial(model, pixels)

    return bind_pixels


def use_moe_operator(model: SparseMoE) -> onnx.ModelProto:
    """Our artifact with everything between router and head replaced by ONNX Runtime's own MoE operator."""
    experts = model.experts
    weights = {
        "moe.weight_in": experts.weight_in.transpose(1, 2),  # (E, H, D)
        "moe.bias_in": experts.bias_in,  # (E, H)
        "moe.weight_out": experts.weight_out.transpose(1, 2),  # (E, O, H)
        "moe.bias_out": experts.bias_out,  # (E, O)
    }
    arrays = {name: weight.detach().contiguous().numpy() for name, weight in weights.items()}
    return replace_experts(build_onnx(model), model, "MoE", arrays)


def _quantize_eagerly(model: torch.nn.Module) -> torch.nn.Module | None:
    """The classic eager dynamic quantization, while the installed torch still has it."""
    with warnings.catch_warnings(action="ignore"):
        try:
            from torch.ao.quantization import quantize_dynamic

            torch.backends.quantized.engine = "x86"
            return quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
        except (ImportError, RuntimeError):
            return None


def _open_torch(forward: Callable[[Tensor], Any]) -> Callable[[int], Binder]:
    """What runs on torch's own threads."""

    def bind_pixels(pixels: Array) -> Call:
        batch = torch.from_numpy(pixels)  # (B, 1, height, width)

        def call() -> object:
            with torch.inference_mode():
                return forward(batch)

        return call

    return lambda _threads: bind_pixels
