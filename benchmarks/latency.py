"""Every model, precision and runtime by turns, beside what a user would pick instead and the machine's limit.

python -m benchmarks.latency                       # quick models, about three minutes
python -m benchmarks.latency --recipe standard     # the suite's default models, trained where they are missing

Writes latency.csv, .md, .json and .png to results/<dataset>-<preset>-<recipe>/benchmarks. The limit is the
shortest time that this machine allows: the useful operations (2 per active parameter and image) at the rate of the best
matrix product of that precision and thread count, or the weights touched at the rate of reading a buffer of
their size, whichever takes longer.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from benchmarks.common import BenchmarkOptions
from benchmarks.contestants import Call, Contestant, reference_contestants
from benchmarks.limits import product_rate, read_rate, shortest_ms
from mnist_lab.compress.bfloat16 import has_bfloat16
from mnist_lab.command.console import open_lab
from mnist_lab.convert import ensure_file
from mnist_lab.report.drawing import COLORS, MARKERS, make_logarithmic
from mnist_lab.experiments.measure_run import torch_threads
from mnist_lab.experiments.make import load_or_make_row
from mnist_lab.deploy.onnx import export_onnx
from mnist_lab.files import write_atomically
from mnist_lab.experiments.lab import Lab, load_parent
from mnist_lab.machine import cpu_flags, describe_machine, package_versions
from mnist_lab.measure import Array, measure_latency
from mnist_lab.models import build_model, count_parameters, dense_rival
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import SparseMoE
from mnist_lab.experiments.rows import Quantized, Row, ffn_baseline, quantized, rounded, sparse_moe
from mnist_lab.runtimes import RUNTIMES, Precision, RuntimeName, open_session
from mnist_lab.command.entry import run_script
from mnist_lab.training import progress_bar

BATCHES = (1, 8, 64, 256, 1024, 10_000)
NUM_ROUNDS = 7
WEIGHT_BYTES: dict[Precision, int] = {"FP32": 4, "BF16": 2, "INT8": 1}
FIRST_SCRIPT = {"FFN": "pytorch", "MoE": "mask loop"}


@dataclass(frozen=True)
class LatencyOptions(BenchmarkOptions):
    runtime: tuple[RuntimeName | Literal["best"], ...] = ("best",)
    """Runtimes to measure in, one or more; best measures in all that can run here."""


def main(options: LatencyOptions) -> None:
    with open_lab(options.suite_options(*options.runtime)) as lab, tempfile.TemporaryDirectory() as temporary:
        ffns: list[Row] = [ffn_baseline(), quantized("ffn")]
        moes: list[Row] = [sparse_moe(), quantized("moe"), quantized("moe", "static")]
        if has_bfloat16():
            ffns.append(rounded("ffn"))
            moes.append(rounded("moe"))
        rows = ffns + moes
        for row in rows:
            load_or_make_row(lab, row, options.seed)
        ffn, moe = load_parent(lab, "FFN_baseline", options.seed), load_parent(lab, "Sparse_MoE", options.seed)
        assert isinstance(ffn, FFN)
        assert isinstance(moe, SparseMoE)
        peer = build_equal_active(moe)
        contestants = [
            ours(lab, row, options.seed, runtime, model=model)
            for model, group in (("FFN", ffns), ("MoE", moes))
            for row in group
            for runtime in lab.runtimes_of(row)
        ]
        contestants += peers(peer, Path(temporary), lab.runtimes)
        contestants += reference_contestants(ffn, moe, Path(temporary))
        models: dict[str, FFN | SparseMoE] = {"FFN": ffn, "MoE": moe, "FFN of equal active": peer}
        limits: dict[str, dict[str, float]] = {}
        frames = []
        for threads in sorted({1, os.cpu_count() or 1}):
            with torch_threads(threads):
                limits[str(threads)] = {precision: product_rate(precision) for precision in WEIGHT_BYTES}
                timed = time_all(contestants, lab.test.numpy()[0], threads=threads)
                frames.append(add_limits(timed, models, limits[str(threads)]))
        table = add_speedups(pd.concat(frames, ignore_index=True))
    write_outputs(lab.results / "benchmarks", table, limits)


def ours(lab: Lab, row: Row, seed: int, runtime: RuntimeName, *, model: str) -> Contestant:
    """One of the suite's own rows in one runtime."""
    file = ensure_file(lab, row, seed, runtime)
    mode = f" {row.mode}" if isinstance(row, Quantized) else ""
    open_file = partial(open_suite_session, runtime, file, row.precision)
    return Contestant(model, row.precision, runtime + mode, open_file)


def open_suite_session(runtime: RuntimeName, file: Path, precision: Precision, threads: int) -> Any:
    session = open_session(runtime, file, precision=precision, threads=threads)
    return lambda pixels: partial(session.run, session.prepare(pixels))


def build_equal_active(moe: SparseMoE) -> FFN:
    """The dense FFN with as many parameters as the MoE uses per image."""
    peer = build_model(dense_rival(moe.config, moe.config.routing.top_k)).eval()
    assert isinstance(peer, FFN)
    return peer


def peers(peer: FFN, folder: Path, runtimes: tuple[RuntimeName, ...]) -> list[Contestant]:
    artifact = folder / "peer.onnx"
    export_onnx(peer, artifact, {})
    return [
        Contestant("FFN of equal active", "FP32", runtime, partial(open_suite_session, runtime, artifact, "FP32"))
        for runtime in ("onnxruntime", "openvino")
        if runtime in runtimes
    ]


def time_all(contestants: list[Contestant], images: Array, *, threads: int) -> pd.DataFrame:
    """One row per contestant and batch size, all by turns."""
    binders = [contestant.open(threads) for contestant in contestants]
    rows = []
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task(f"{threads} thread(s)", total=len(contestants) * len(BATCHES) * NUM_ROUNDS)

        def on_block() -> None:
            progress.advance(task)
            progress.refresh()

        for batch in BATCHES:
            pixels = np.resize(images, (batch, *images.shape[1:]))
            calls: dict[int, Call] = {index: bind(pixels) for index, bind in enumerate(binders)}
            for index, latency in measure_latency(calls, num_rounds=NUM_ROUNDS, on_block=on_block).items():
                identity = {key: getattr(contestants[index], key) for key in ("model", "precision", "runtime")}
                rows.append(identity | {"threads": threads, "batch": batch} | asdict(latency))
    return pd.DataFrame(rows)


def add_limits(table: pd.DataFrame, models: dict[str, FFN | SparseMoE], rates: dict[str, float]) -> pd.DataFrame:
    """Useful operations per second, and the share of the machine's limit."""
    read_rates: dict[int, float] = {}

    def shortest(model: FFN | SparseMoE, precision: Precision, batch: int) -> float:
        num_bytes = weights_touched(model, batch) * WEIGHT_BYTES[precision]
        if num_bytes not in read_rates:
            read_rates[num_bytes] = read_rate(num_bytes)
        return shortest_ms(
            operations=operations(model) * batch,
            num_bytes=num_bytes,
            operations_per_s=rates[precision],
            bytes_per_s=read_rates[num_bytes],
        )

    cases = zip(table["model"].map(models), table["precision"], table["batch"], strict=True)
    limits = np.array([shortest(*case) for case in cases])
    useful = table["model"].map(models).map(operations) * table["batch"]
    return table.assign(gops=useful / table["median_ms"] / 1e6, limit_share=limits / table["median_ms"])


def operations(model: FFN | SparseMoE) -> int:
    """Multiplications and additions that one image needs."""
    return 2 * count_parameters(model)[1]


def weights_touched(model: FFN | SparseMoE, batch: int) -> int:
    """Parameters that a batch needs: of the experts those that it can reach."""
    total, active = count_parameters(model)
    if not isinstance(model, SparseMoE):
        return total
    routing = model.config.routing
    per_expert = (total - active) // max(1, routing.num_experts - routing.top_k)
    return active + per_expert * (min(routing.num_experts, routing.top_k * batch) - routing.top_k)


def add_speedups(table: pd.DataFrame) -> pd.DataFrame:
    """How many times as fast as what a first script does: eager PyTorch, for the MoE a loop with masks."""
    keys = ["model", "threads", "batch"]
    is_first = (table["precision"] == "FP32") & (table["runtime"] == table["model"].map(FIRST_SCRIPT))
    first = table[is_first].set_index(keys)["median_ms"]
    return table.assign(speedup=first.reindex(pd.MultiIndex.from_frame(table[keys])).to_numpy() / table["median_ms"])


def write_outputs(folder: Path, table: pd.DataFrame, limits: dict[str, dict[str, float]]) -> None:
    record = {
        "machine": describe_machine() | {"flags": sorted(cpu_flags())},
        "versions": package_versions(),
        "product_rates_per_s": limits,
        "rows": table.astype(object).where(table.notna(), None).to_dict("records"),
    }
    text = "# Latency: every model, precision and runtime by turns\n\n" + "\n".join(
        f"- limit on {threads} thread(s): "
        + ", ".join(f"{precision} {rate / 1e9:,.0f} G operations/s" for precision, rate in rates.items())
        for threads, rates in limits.items()
    )
    text += f"\n- {describe_machine()['cpu']}, torch {torch.__version__}\n"
    for threads, group in table.groupby("threads"):
        text += f"\n## {threads} thread(s): median milliseconds\n\n{pivot(group, 'median_ms', '.3f')}\n"
        text += f"\n## {threads} thread(s): share of the machine's limit, %\n\n{pivot(group, 'limit_share', '.0%')}\n"
        text += f"\n## {threads} thread(s): times as fast as a first script\n\n{pivot(group, 'speedup', '.2f')}\n"
    write_atomically(folder / "latency.csv", lambda path: table.to_csv(path, index=False))
    write_atomically(
        folder / "latency.json", lambda path: path.write_text(json.dumps(record, indent=1, allow_nan=False))
    )
    write_atomically(folder / "latency.md", lambda path: path.write_text(text))
    write_atomically(folder / "latency.png", partial(draw(table).savefig, dpi=120))
    print(text + f"\nwritten: {folder}/latency.csv, .md, .json, .png")


def pivot(table: pd.DataFrame, column: str, style: str) -> str:
    wide = table.pivot_table(index=["model", "precision", "runtime"], columns="batch", values=column, sort=False)
    rows = [
        [*index, *("" if pd.isna(v) else format(v, style) for v in row)]
        for index, row in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    return tabulate(rows, ["model", "precision", "runtime", *map(str, wide.columns)], "github", disable_numparse=True)


def draw(table: pd.DataFrame) -> Figure:
    """Microseconds per image over the batch size on one thread: the suite's rows solid, the others dashed."""
    matplotlib.use("agg")
    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    one_thread = table[table["threads"] == 1]
    names = list(dict.fromkeys(one_thread["runtime"]))
    families = list(dict.fromkeys(name.split()[0] for name in names))
    for place, (model, precision) in enumerate((m, p) for m in ("FFN", "MoE") for p in WEIGHT_BYTES):
        axes = panels.flat[place]
        rows = one_thread[(one_thread["model"] == model) & (one_thread["precision"] == precision)]
        for runtime, group in rows.groupby("runtime", sort=False):
            family = str(runtime).split()[0]
            axes.plot(
                group["batch"],
                1e3 * group["median_ms"] / group["batch"],
                "-" if family in RUNTIMES else "--",
                marker=MARKERS[names.index(str(runtime)) % len(MARKERS)],
                color=COLORS[families.index(family) % len(COLORS)],
                label=runtime,
            )
        if len(rows):
            shortest = rows.assign(ms=rows["median_ms"] * rows["limit_share"]).groupby("batch")["ms"].min()
            axes.fill_between(shortest.index, 1e3 * shortest / shortest.index, 1e-3, color="#dddddd", label="limit")
            make_logarithmic(axes, "x", "batch size")
            make_logarithmic(axes, "y", "µs per image")
            axes.set_ylim(0.5 * 1e3 * (shortest / shortest.index).min())
        axes.set_title(f"{model}, {precision}", fontsize=11)
        axes.legend(fontsize=8)
        axes.grid(visible=True, color="#e3e3e3", linewidth=0.7)
    figure.suptitle(f"Median time per image on one thread — {describe_machine()['cpu']}")
    return figure


if __name__ == "__main__":
    run_script(main, LatencyOptions, __doc__ or "")
