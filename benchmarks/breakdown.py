"""Where the MoE's time goes in ONNX Runtime, FP32 and INT8, and what an INT8 router would change.

python -m benchmarks.breakdown --recipe standard    # expect the experts to take half, and the router 2 to 8 %

Writes breakdown.csv and .md to results/<dataset>-<preset>-<recipe>/benchmarks. The first table comes from the
engine's own profile on one thread; the second compares artifacts with the router in float and in INT8.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from benchmarks.common import BenchmarkOptions, ensure_models, format_table, write_outputs
from mnist_lab.command.console import open_lab
from mnist_lab.command.entry import run_script
from mnist_lab.compress.int8 import Calibration, needs_reduced_range, prove_integer, quantize
from mnist_lab.deploy.inside import JOBS, choose_experts, time_by_job
from mnist_lab.deploy.onnx import build_onnx, write_onnx
from mnist_lab.experiments.rows import MOE, dynamic_int8, static_int8
from mnist_lab.experiments.run import Run
from mnist_lab.measure import TABLE_BATCHES, Array, Labels, accuracy, measure_latency, predict, take_images
from mnist_lab.runtimes import COMBINE, FLOAT_PRODUCTS, bind
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession

BATCHES = TABLE_BATCHES
NUM_ROUNDS = 9


def main(options: BenchmarkOptions) -> None:
    with open_lab(options.suite_options("onnxruntime")) as lab, tempfile.TemporaryDirectory() as temporary:
        runs = ensure_models(lab, [MOE, dynamic_int8(MOE), static_int8(MOE)], options.seed)
        images, labels = lab.test.numpy()
        profiles = pd.DataFrame(
            {"model": run.model, "batch": batch} | time_by_job(run.artifact, take_images(images, batch))
            for run in runs
            for batch in BATCHES
        )
        routers = compare_routers(write_routers(runs[0], Path(temporary)), images, labels)
    write_outputs(lab.results / "benchmarks", "breakdown", profiles, describe(profiles, routers))


def write_routers(moe: Run, folder: Path) -> dict[str, Path]:
    """The MoE's artifact in FP32, and in INT8 with the router in float and without."""
    model = moe.load()
    calibration = moe.work().calibration(Calibration().calibration_size).numpy()
    files = {"FP32": folder / "fp32.onnx"}
    write_onnx(model, files["FP32"], {})
    for name, keep_float in {"INT8, router in float": FLOAT_PRODUCTS, "INT8, router too": (COMBINE,)}.items():
        files[name] = folder / f"{len(files)}.onnx"
        quantize(
            files["FP32"],
            files[name],
            mode="static",
            calibration=calibration,
            keep_float=keep_float,
            reduced_range=needs_reduced_range(),
            metadata={},
        )
        prove_integer(files[name], build_onnx(model), keep_float=keep_float)
    return files


def compare_routers(files: Mapping[str, Path], images: Array, labels: Labels) -> pd.DataFrame:
    """Accuracy, share of images whose chosen experts differ from FP32's, and median milliseconds by batch size."""
    sessions = {name: OnnxRuntimeSession(file, threads=1) for name, file in files.items()}
    experts = {name: choose_experts(file, images) for name, file in files.items()}
    table = pd.DataFrame({"artifact": list(files)})
    table["test_acc"] = [accuracy(predict(session.predict, images), labels) for session in sessions.values()]
    table["routes_changed"] = [float((chosen != experts["FP32"]).any(axis=1).mean()) for chosen in experts.values()]
    for batch in BATCHES:
        calls = {name: bind(session, take_images(images, batch)) for name, session in sessions.items()}
        latencies = measure_latency(calls, num_rounds=NUM_ROUNDS)
        table[f"ms b{batch}"] = [latencies[name].median_ms for name in files]
    return table


def describe(profiles: pd.DataFrame, routers: pd.DataFrame) -> str:
    total = profiles[JOBS].sum(axis=1)
    shares = profiles[JOBS].div(total, axis=0).map("{:.0%}".format)
    shown = pd.concat([profiles[["model", "batch"]], total.rename("µs").round(), shares], axis=1)
    return "\n\n".join(
        [
            "# Where the MoE's time goes",
            "By the engine's profile, which adds about a microsecond to every operator.",
            format_table(shown, "g"),
            "# Router in float or in INT8",
            format_table(routers, ".4g"),
        ]
    )


if __name__ == "__main__":
    run_script(main, BenchmarkOptions, __doc__)
