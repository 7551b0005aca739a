"""Every model, precision and runtime by turns, beside what a user would pick instead and the machine's limit.

python -m benchmarks.latency                       # quick models, about three minutes
python -m benchmarks.latency --recipe standard     # the suite's default models, trained where they are missing

Expect ONNX Runtime and OpenVINO at 80 to 106 % of the limit in FP32 from batch 64 on, on one thread, and ONNX Runtime
two to three times as fast in INT8. Writes latency.csv, .md, .json and .png to
results/<dataset>-<preset>-<recipe>/benchmarks. The limit is the shortest time that this machine allows: the useful
operations (2 per active parameter and image) at the rate of the best matrix product of that precision and thread count,
or the weights touched at the rate of reading a buffer of their size, whichever takes longer.
"""

import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch

from benchmarks.common import BenchmarkOptions, ensure_models, format_table, show_progress, write_outputs
from benchmarks.contestants import Contestant, reference_contestants, suite_contestant
from benchmarks.limits import product_rate, read_rate, shortest_ms
from mnist_lab.command.console import open_lab
from mnist_lab.command.entry import run_script
from mnist_lab.compress.bfloat16 import has_bfloat16
from mnist_lab.deploy.onnx import write_onnx
from mnist_lab.experiments import rows as suite
from mnist_lab.experiments.latencies import torch_threads
from mnist_lab.experiments.run import Run
from mnist_lab.machine import cpu_model
from mnist_lab.measure import Array, measure_latency, take_images
from mnist_lab.models import Model, count_parameters, dense_rival
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import SparseMoE
from mnist_lab.report.drawing import COLORS, MARKERS, Figure, make_logarithmic
from mnist_lab.runtimes import EXTENSIONS, RUNTIMES, Precision, RuntimeName

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
        rows = {
            "FFN": [suite.FFN, suite.static_int8(suite.FFN)],
            "MoE": [suite.MOE, suite.dynamic_int8(suite.MOE), suite.static_int8(suite.MOE)],
        }
        if has_bfloat16():
            rows = {model: [*group, suite.bfloat16(group[0])] for model, group in rows.items()}
        runs = {model: ensure_models(lab, group, options.seed) for model, group in rows.items()}
        ffn, moe = (group[0].load() for group in runs.values())
        assert isinstance(ffn, FFN)
        assert isinstance(moe, SparseMoE)
        peer = build_equal_active(moe)
        contestants = [contestant for model, group in runs.items() for contestant in ours(model, group)]
        contestants += peers(peer, Path(temporary), lab.runtimes)
        contestants += reference_contestants(ffn, moe, Path(temporary))
        models: dict[str, Model] = {"FFN": ffn, "MoE": moe, "FFN of equal active": peer}
        limits: dict[str, dict[str, float]] = {}
        frames = []
        for threads in sorted({1, os.cpu_count() or 1}):
            with torch_threads(threads):
                limits[str(threads)] = {precision: product_rate(precision) for precision in WEIGHT_BYTES}
                timed = time_all(contestants, lab.test.numpy()[0], threads=threads)
                frames.append(add_limits(timed, models, limits[str(threads)]))
        table = add_speedups(pd.concat(frames, ignore_index=True))
    write_outputs(
        lab.results / "benchmarks",
        "latency",
        table,
        describe(table, limits, cpu_model()),
        draw=lambda: draw(table, cpu_model()),
        product_rates_per_s=limits,
    )


def ours(model: str, runs: Sequence[Run]) -> list[Contestant]:
    """The suite's own rows of a model, each in all its runtimes; named after those, and of INT8 the mode."""
    return [
        suite_contestant(
            model,
            run.row.form.precision,
            runtime,
            run.file(EXTENSIONS[runtime]),
            name=" ".join([runtime, *run.row.form.label.split()[:1]]),
        )
        for run in runs
        for runtime in run.runtimes
    ]


def build_equal_active(moe: SparseMoE) -> FFN:
    """The dense FFN with as many parameters as the MoE uses per image."""
    return FFN(dense_rival(moe.config, moe.config.routing.top_k)).eval()


def peers(peer: FFN, folder: Path, runtimes: tuple[RuntimeName, ...]) -> list[Contestant]:
    artifact = folder / "peer.onnx"
    write_onnx(peer, artifact, {})
    own: tuple[RuntimeName, ...] = ("onnxruntime", "openvino")
    return [suite_contestant("FFN of equal active", "FP32", name, artifact) for name in own if name in runtimes]


def time_all(contestants: list[Contestant], images: Array, *, threads: int) -> pd.DataFrame:
    """One row per contestant and batch size, all by turns."""
    binders = [contestant.open(threads) for contestant in contestants]
    rows = []
    with show_progress(f"{threads} thread(s)", len(contestants) * len(BATCHES) * NUM_ROUNDS) as advance:
        for batch in BATCHES:
            pixels = take_images(images, batch)
            calls = {index: bind_pixels(pixels) for index, bind_pixels in enumerate(binders)}
            for index, latency in measure_latency(calls, num_rounds=NUM_ROUNDS, on_block=advance).items():
                identity = {key: getattr(contestants[index], key) for key in ("model", "precision", "runtime")}
                rows.append(identity | {"threads": threads, "batch": batch} | asdict(latency))
    return pd.DataFrame(rows)


def add_limits(table: pd.DataFrame, models: Mapping[str, Model], rates: Mapping[str, float]) -> pd.DataFrame:
    """Useful operations per second, and the share of the machine's limit."""
    read_rates: dict[int, float] = {}

    def shortest(model: Model, precision: Precision, batch: int) -> float:
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


def operations(model: Model) -> int:
    """Multiplications and additions that one image needs."""
    return 2 * count_parameters(model)[1]


def weights_touched(model: Model, batch: int) -> int:
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


def describe(table: pd.DataFrame, limits: Mapping[str, Mapping[str, float]], cpu: str) -> str:
    rates_of = {
        threads: ", ".join(f"{precision} {rate / 1e9:,.0f} G operations/s" for precision, rate in rates.items())
        for threads, rates in limits.items()
    }
    conditions = [f"- limit on {threads} thread(s): {rates}" for threads, rates in rates_of.items()]
    conditions.append(f"- {cpu}, torch {torch.__version__}")
    text = ["# Latency: every model, precision and runtime by turns", "\n".join(conditions)]
    for threads, group in table.groupby("threads"):
        for title, column, style in (
            ("median milliseconds", "median_ms", ".3f"),
            ("share of the machine's limit, %", "limit_share", ".0%"),
            ("times as fast as a first script", "speedup", ".2f"),
        ):
            text += [f"## {threads} thread(s): {title}", pivot(group, column, style)]
    return "\n\n".join(text)


def pivot(table: pd.DataFrame, column: str, style: str) -> str:
    wide = table.pivot_table(index=["model", "precision", "runtime"], columns="batch", values=column, sort=False)
    texts = wide.map(lambda value: "" if pd.isna(value) else format(value, style))
    return format_table(texts.reset_index())


class Look(NamedTuple):
    """How a contestant shows: the suite's own rows solid, the others dashed."""

    color: str
    marker: str
    linestyle: Literal["-", "--"]


def choose_looks(table: pd.DataFrame) -> dict[str, Look]:
    """By runtime: those of one panel share neither colour nor marker; an engine keeps its own if it is there once."""
    names = list(dict.fromkeys(table["runtime"]))
    engines = list(dict.fromkeys(_engine(name) for name in names))
    own = {name: engines.index(_engine(name)) for name in names}
    panels = [set(rows["runtime"]) for _, rows in table.groupby(["model", "precision"])]
    places: dict[str, int] = {}
    for name in names:
        rivals = {rival for panel in panels if name in panel for rival in panel - {name}}
        taken = {places[rival] for rival in rivals & places.keys()}
        reserved = taken | {own[rival] for rival in rivals}
        free = next(place for place in itertools.count() if place not in reserved)
        places[name] = free if own[name] in taken else own[name]
    return {
        name: Look(
            COLORS[place % len(COLORS)],
            MARKERS[(place + place // len(COLORS)) % len(MARKERS)],
            "-" if _engine(name) in RUNTIMES else "--",
        )
        for name, place in places.items()
    }


def _engine(name: str) -> str:
    return name.split()[0]


def draw(table: pd.DataFrame, cpu: str) -> Figure:
    """Microseconds per image over the batch size on one thread, a panel for each model and precision."""
    figure = Figure(figsize=(15, 9), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    one_thread = table[(table["threads"] == 1) & table["model"].isin(["FFN", "MoE"])]
    looks = choose_looks(one_thread)
    for axes, (model, precision) in zip(panels.flat, itertools.product(("FFN", "MoE"), WEIGHT_BYTES), strict=True):
        axes.set_title(f"{model}, {precision}", fontsize=11)
        axes.grid(visible=True, color="#e3e3e3", linewidth=0.7)
        rows = one_thread[(one_thread["model"] == model) & (one_thread["precision"] == precision)]
        if rows.empty:
            continue
        for runtime, group in rows.groupby("runtime", sort=False):
            us_per_image = 1e3 * group["median_ms"] / group["batch"]
            axes.plot(group["batch"], us_per_image, **looks[str(runtime)]._asdict(), label=runtime)
        shortest = (1e3 * rows["median_ms"] * rows["limit_share"] / rows["batch"]).groupby(rows["batch"]).min()
        axes.fill_between(shortest.index, shortest, 1e-3, color="#dddddd", label="limit")
        make_logarithmic(axes, "x", "batch size")
        make_logarithmic(axes, "y", "µs per image")
        axes.set_ylim(0.5 * shortest.min())
        axes.legend(fontsize=9, handlelength=3.5)
    figure.suptitle(f"Median time per image on one thread: the suite's rows solid, others dashed — {cpu}")
    return figure


if __name__ == "__main__":
    run_script(main, LatencyOptions, __doc__)
