"""Where the MoE's time goes in ONNX Runtime, FP32 and INT8, and what an INT8 router would change.

python -m benchmarks.breakdown --recipe standard

Writes breakdown.csv and .md to results/<dataset>-<preset>-<recipe>/benchmarks. The first table comes from the
engine's own profile on one thread; the second compares artifacts with the router in float and in INT8.
"""

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pandas as pd
from onnx import TensorProto, helper
from tabulate import tabulate

from benchmarks.common import BenchmarkOptions
from mnist_lab import measure
from mnist_lab.compress.quantize import quantize
from mnist_lab.console import open_lab
from mnist_lab.convert import ensure_file
from mnist_lab.data import calibration_pixels
from mnist_lab.experiments import load_or_make_row
from mnist_lab.export import COMBINE, FLOAT_PRODUCTS, export_onnx
from mnist_lab.files import write_atomically
from mnist_lab.lab import load_parent
from mnist_lab.measure import Array, accuracy, measure_latency
from mnist_lab.rows import CALIBRATION_SIZE, Row, quantized, sparse_moe
from mnist_lab.runtimes.onnxruntime import PROVIDERS, OnnxRuntimeSession, session_options
from mnist_lab.scripts import run_script

BATCHES = (1, 64, 1024)
NUM_CALLS = 200
NUM_ROUNDS = 9
ROUTING = {"router", "top_logits", "expert_weights"}
SORTING = {"expert_of_pair", "num_pairs", "ones", "load", "sorted_experts", "image"}
SORTING |= {"end", "pairs", "place", "place_by_image"}
MOVING = {"sorted_rows", "expert0.rows", "sorted_outputs", "by_image"}
GATING = {"no_gates", "gates", "gates_as_column", "by_expert", "gated", "gated_rows"}
JOBS = ["stem and head", "experts", "router", "sort", "move rows", "combine", "gate", "quantize"]


def main(options: BenchmarkOptions) -> None:
    rows: list[Row] = [sparse_moe(), quantized("moe"), quantized("moe", "static")]
    with open_lab(options.suite_options("onnxruntime")) as lab:
        for row in rows:
            load_or_make_row(lab, row, options.seed)
        images, labels = lab.test.numpy()
        profiles = [
            {"model": row.model, "batch": batch}
            | profile(ensure_file(lab, row, options.seed, "onnxruntime"), take(images, batch))
            for row in rows
            for batch in BATCHES
        ]
        model = load_parent(lab, "Sparse_MoE", options.seed)
        calibration = calibration_pixels(lab.dataset.train, CALIBRATION_SIZE, seed=options.seed).numpy()
        with tempfile.TemporaryDirectory() as temporary:
            files = {"FP32": Path(temporary) / "fp32.onnx"}
            export_onnx(model, files["FP32"], {})
            for name, keep_float in (("INT8, router in float", FLOAT_PRODUCTS), ("INT8, router too", (COMBINE,))):
                files[name] = Path(temporary) / f"{len(files)}.onnx"
                quantize(
                    files["FP32"],
                    files[name],
                    mode="static",
                    calibration=calibration,
                    keep_float=keep_float,
                    metadata={},
                )
            routers = compare_routers(files, images, labels)
    write_outputs(lab.results / "benchmarks", pd.DataFrame(profiles), routers)


def take(images: Array, batch: int) -> Array:
    """A batch of that size; a smaller test set repeats."""
    return np.resize(images, (batch, *images.shape[1:]))


def profile(artifact: Path, pixels: Array) -> dict[str, float]:
    """Median microseconds per job of one call, as the engine itself takes the time of every node."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(1)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(artifact, options, providers=PROVIDERS)
        for _ in range(NUM_CALLS):
            session.run(None, {"pixels": pixels})
        events = json.loads(Path(session.end_profiling()).read_text())
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event["dur"])
    jobs = dict.fromkeys(JOBS, 0.0)
    for (node, operator), samples in durations.items():
        jobs[job_of(node, operator)] += float(np.median(samples))
    return jobs


def job_of(node: str, operator: str) -> str:
    """What a node of the optimized graph is for, by the name that `export.py` gave it."""
    if operator in {"QuantizeLinear", "DequantizeLinear"}:
        return "quantize"
    name = node.removeprefix("fused ").replace("_MatMul", "").replace("_quant", "")
    for job, names in (("router", ROUTING), ("sort", SORTING), ("move rows", MOVING), ("gate", GATING)):
        if name in names:
            return job
    if name.startswith("expert"):
        return "experts"
    return "combine" if name in {"weights_as_row", COMBINE, "mixed"} else "stem and head"


def compare_routers(files: dict[str, Path], images: Array, labels: measure.Labels) -> pd.DataFrame:
    """Accuracy, share of images whose chosen experts differ from FP32's, and median milliseconds by batch size."""
    sessions = {name: OnnxRuntimeSession(file, threads=1) for name, file in files.items()}
    experts = {name: choose_experts(file, images) for name, file in files.items()}
    table = pd.DataFrame({"artifact": list(files)})
    table["test_acc"] = [accuracy(measure.predict(session.predict, images), labels) for session in sessions.values()]
    table["routes_changed"] = [float((chosen != experts["FP32"]).any(axis=1).mean()) for chosen in experts.values()]
    for batch in BATCHES:
        calls = {name: _bind(session, take(images, batch)) for name, session in sessions.items()}
        latencies = measure_latency(calls, num_rounds=NUM_ROUNDS)
        table[f"ms b{batch}"] = [latencies[name].median_ms for name in files]
    return table


def _bind(session: OnnxRuntimeSession, pixels: Array) -> Any:
    batch = session.prepare(pixels)
    return lambda: session.run(batch)


def choose_experts(artifact: Path, images: Array) -> npt.NDArray[np.int64]:
    """The set of experts (N, K) that an artifact chooses for each image, in the order of their numbers."""
    model = onnx.load(artifact)
    model.graph.output.append(helper.make_tensor_value_info("top_experts", TensorProto.INT64, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1), providers=PROVIDERS)
    chosen = [
        session.run(["top_experts"], {"pixels": images[start : start + measure.EVALUATION_BATCH]})[0]
        for start in range(0, len(images), measure.EVALUATION_BATCH)
    ]
    return np.sort(np.concatenate(chosen), axis=1)


def write_outputs(folder: Path, profiles: pd.DataFrame, routers: pd.DataFrame) -> None:
    total = profiles[JOBS].sum(axis=1)
    shares = profiles[JOBS].div(total, axis=0).map("{:.0%}".format)
    shown = pd.concat([profiles[["model", "batch"]], total.rename("µs").round(), shares], axis=1)
    text = (
        "# Where the MoE's time goes\n\nBy the engine's profile, which adds about a microsecond to every operator.\n\n"
    )
    text += tabulate(shown.to_dict("list"), "keys", "github")
    text += "\n\n# Router in float or in INT8\n\n" + tabulate(routers.to_dict("list"), "keys", "github", floatfmt=".4g")
    write_atomically(folder / "breakdown.csv", lambda path: profiles.to_csv(path, index=False))
    write_atomically(folder / "breakdown.md", lambda path: path.write_text(text + "\n"))
    print(f"{text}\n\nwritten: {folder}/breakdown.csv and .md")


if __name__ == "__main__":
    run_script(main, BenchmarkOptions, __doc__ or "")
