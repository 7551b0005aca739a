"""Where the MoE's time goes in ONNX Runtime, FP32 and INT8, and what an INT8 router would change.

python -m benchmarks.breakdown --recipe standard

Writes breakdown.csv and .md to results/<dataset>-<preset>-<recipe>/benchmarks. The first table comes from the
engine's own profile on one thread; the second compares artifacts with the router in float and in INT8.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from benchmarks.common import BenchmarkOptions
from mnist_lab import measure
from mnist_lab.compress.int8 import Calibration, quantize
from mnist_lab.command.console import open_lab
from mnist_lab.convert import ensure_file
from mnist_lab.data import calibration_pixels
from mnist_lab.experiments.make import load_or_make_row
from mnist_lab.deploy.onnx import COMBINE, FLOAT_PRODUCTS, export_onnx
from mnist_lab.files import write_atomically
from mnist_lab.experiments.lab import load_parent
from mnist_lab.measure import Array, accuracy, measure_latency
from mnist_lab.deploy.inside import JOBS, choose_experts, time_by_job
from mnist_lab.experiments.rows import Row, quantized, sparse_moe
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession
from mnist_lab.command.entry import run_script

BATCHES = (1, 64, 1024)
NUM_ROUNDS = 9


def main(options: BenchmarkOptions) -> None:
    rows: list[Row] = [sparse_moe(), quantized("moe"), quantized("moe", "static")]
    with open_lab(options.suite_options("onnxruntime")) as lab:
        for row in rows:
            load_or_make_row(lab, row, options.seed)
        images, labels = lab.test.numpy()
        profiles = [
            {"model": row.model, "batch": batch}
            | time_by_job(ensure_file(lab, row, options.seed, "onnxruntime"), take(images, batch))
            for row in rows
            for batch in BATCHES
        ]
        model = load_parent(lab, "Sparse_MoE", options.seed)
        calibration = calibration_pixels(lab.dataset.train, Calibration().calibration_size, seed=options.seed).numpy()
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
