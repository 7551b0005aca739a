"""Does anything on this CPU compute sparsely? A dense FFN whose weights are mostly zeros, in engines told so and not.

python -m benchmarks.sparse         # about half a minute

The FFN 784-256-128-10 in FP32 on one thread, weights, zeros and pixels random. Each sparse form stands beside the
dense one of the same engine, SciPy's beside PyTorch's. OpenVINO's property is documented for INT8 weights and the
matrix unit AMX, so that it is timed in INT8 too. Writes sparse.csv and .md to results/benchmarks.
"""

import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pandas as pd
import torch
from onnx import numpy_helper
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import format_table, show_progress, write_outputs
from benchmarks.contestants import Binder, Call, open_onnxruntime
from benchmarks.scaling import NOISE, draw_noise
from mnist_lab.command.entry import Folder, run_script
from mnist_lab.command.options import check_count
from mnist_lab.compress.int8 import needs_reduced_range, quantize
from mnist_lab.compress.prune_weights import keep_highest, weight_matrices
from mnist_lab.deploy.artifacts import read_onnx
from mnist_lab.deploy.onnx import build_onnx, write_onnx
from mnist_lab.experiments.latencies import torch_threads
from mnist_lab.folders import ensure_writable
from mnist_lab.machine import cpu_flags, cpu_model
from mnist_lab.measure import TABLE_BATCHES, Array, measure_latency
from mnist_lab.models import PRESETS
from mnist_lab.models.ffn import FFN
from mnist_lab.runtimes import why_missing

BATCHES = TABLE_BATCHES
SHARES_OF_ZEROS = (0.8, 0.9, 0.95, 0.98, 0.99)
DECOMPRESSION_RATE = 0.5  # the share of zeros from which on OpenVINO is to take weights as sparse


@dataclass(frozen=True)
class SparseOptions:
    results: Folder = Path("results")
    """Folder for the table."""
    rounds: int = 7
    """Turns of at least 30 ms that each engine gets at each size."""

    def __post_init__(self) -> None:
        check_count("--rounds", self.rounds)


class Contestant(NamedTuple):
    """An engine with the weights in one form, and the form that its time is compared with."""

    engine: str
    form: str
    bind: Binder
    rival: tuple[str, str]


def main(options: SparseOptions) -> None:
    folder = options.results / "benchmarks"
    ensure_writable(folder)
    frames = []
    with torch_threads(1), torch.inference_mode(), show_progress("sparse", len(SHARES_OF_ZEROS)) as advance:
        for share in SHARES_OF_ZEROS:
            frames.append(time_all(make_ffn(share), options.rounds).assign(zeros=share))
            advance()
    table = pd.concat(frames, ignore_index=True)
    write_outputs(folder, "sparse", table, describe(table, cpu_model()))


def make_ffn(share_of_zeros: float) -> FFN:
    """With random weights, of which so many are zero in every layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FFN(PRESETS["compact"].ffn(NOISE)).eval()
        for matrix in weight_matrices(model):
            weight = matrix.of(model.get_parameter(matrix.parameter).data)
            weight *= keep_highest(torch.rand(weight.shape), round((1 - share_of_zeros) * weight.numel()))
    return model


def time_all(model: FFN, num_rounds: int) -> pd.DataFrame:
    """A row per engine, form and batch size, all by turns; `ratio` is to the time of the rival."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        contestants = list(find_contestants(model, Path(temporary)))
        for batch in BATCHES:
            pixels = draw_noise(batch)
            calls = {(found.engine, found.form): found.bind(pixels) for found in contestants}
            latencies = measure_latency(calls, num_rounds=num_rounds)
            for found in contestants:
                latency = latencies[found.engine, found.form]
                ratio = latency.median_ms / latencies[found.rival].median_ms
                identity = {"engine": found.engine, "form": found.form, "batch": batch}
                rows.append(identity | asdict(latency) | {"ratio": ratio})
    return pd.DataFrame(rows)


def find_contestants(model: FFN, folder: Path) -> Iterator[Contestant]:
    """All that can run here. Their files go to `folder`."""
    layers = folded_layers(model)
    torch_dense, ort_dense = ("torch", "dense"), ("onnxruntime", "dense")
    yield Contestant(*torch_dense, partial(bind_torch, layers), torch_dense)
    yield Contestant("torch", "CSR", partial(bind_torch_csr, layers), torch_dense)
    yield Contestant("scipy", "CSR", partial(bind_scipy, layers), torch_dense)
    dense, artifact = folder / "dense.onnx", folder / "sparse.onnx"
    onnx.save(build_onnx(model), dense)
    write_onnx(model, artifact, {})
    yield Contestant(*ort_dense, open_onnxruntime(dense, 1), ort_dense)
    yield Contestant("onnxruntime", "sparse file", open_onnxruntime(artifact, 1), ort_dense)
    if why_missing("openvino") is None:
        yield from openvino_contestants(artifact, folder)


def openvino_contestants(artifact: Path, folder: Path) -> Iterator[Contestant]:
    """FP32 and INT8, with and without the property that is for sparse weights."""
    int8 = folder / "int8.onnx"
    calibration = draw_noise(100)
    quantize(artifact, int8, mode="static", calibration=calibration, reduced_range=needs_reduced_range(), metadata={})
    for engine, file in (("openvino", artifact), ("openvino INT8", int8)):
        for form, rate in (("dense", 1.0), ("sparse weights", DECOMPRESSION_RATE)):
            yield Contestant(engine, form, open_openvino(file, rate), (engine, "dense"))


def folded_layers(model: FFN) -> list[tuple[Array, Array]]:
    """Weights (inputs, outputs) and bias of each layer, for raw pixels: those that the engines' files hold."""
    arrays = [numpy_helper.to_array(constant).copy() for constant in build_onnx(model).graph.initializer]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def bind_torch(layers: list[tuple[Array, Array]], pixels: Array) -> Call:
    weights = [(torch.from_numpy(np.ascontiguousarray(weight.T)), torch.from_numpy(bias)) for weight, bias in layers]
    flat = torch.from_numpy(pixels).flatten(1)  # (B, P)

    def call() -> Tensor:
        rows = flat
        for weight, bias in weights[:-1]:
            rows = F.linear(rows, weight, bias).relu_()
        return F.linear(rows, *weights[-1])

    return call


def bind_torch_csr(layers: list[tuple[Array, Array]], pixels: Array) -> Call:
    with warnings.catch_warnings(action="ignore"):  # says that such tensors are in beta state
        weights = [(torch.from_numpy(weight).T.to_sparse_csr(), torch.from_numpy(bias)) for weight, bias in layers]
    flat = torch.from_numpy(pixels).flatten(1).T.contiguous()  # (P, B)

    def call() -> Tensor:
        columns = flat
        for weight, bias in weights[:-1]:
            columns = torch.addmm(bias.unsqueeze(1), weight, columns).relu_()
        weight, bias = weights[-1]
        return torch.addmm(bias.unsqueeze(1), weight, columns).T

    return call


def bind_scipy(layers: list[tuple[Array, Array]], pixels: Array) -> Call:
    weights = [(csr_array(weight.T), bias[:, np.newaxis]) for weight, bias in layers]
    flat = np.ascontiguousarray(pixels.reshape(len(pixels), -1).T)  # (P, B)

    def call() -> Array:
        columns = flat
        for weight, bias in weights[:-1]:
            columns = weight @ columns + bias
            np.maximum(columns, 0, out=columns)
        weight, bias = weights[-1]
        logits: Array = (weight @ columns + bias).T
        return logits

    return call


def open_openvino(artifact: Path, decompression_rate: float) -> Binder:
    from mnist_lab.runtimes.openvino import bind_request, compile_onnx

    options: dict[str, str | float] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": decompression_rate,
    }
    model = compile_onnx(read_onnx(artifact).SerializeToString(), options)

    def bind_pixels(pixels: Array) -> Call:
        request = bind_request(model, pixels).request

        def call() -> Array:
            request.infer()
            logits: Array = request.get_output_tensor().data
            return logits

        return call

    return bind_pixels


def describe(table: pd.DataFrame, cpu: str) -> str:
    has_amx = "amx_int8" in cpu_flags()
    lines = [
        "# Does anything compute sparsely?",
        f"Median milliseconds on one thread and, in brackets, as a multiple of the dense form's in the same engine "
        f"(SciPy's of PyTorch's); {cpu}, {'with' if has_amx else 'without'} AMX.",
    ]
    cells = [f"{row.median_ms:.3f} ({row.ratio:.2f})" for row in table.itertuples()]
    wide = table.assign(zeros=table["zeros"].map("{:.0%}".format), cell=cells).pivot_table(
        index=["zeros", "engine", "form"], columns="batch", values="cell", aggfunc="first", sort=False
    )
    wide.columns = [f"batch {batch}" for batch in wide.columns]
    return "\n\n".join([*lines, format_table(wide.reset_index())])


if __name__ == "__main__":
    run_script(main, SparseOptions, __doc__)
