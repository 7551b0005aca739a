"""At which size does a sparse MoE start to win? Time and memory against experts, width and batch size.

python -m benchmarks.scaling        # about four minutes

The MoE (top-2, FP32, sparse form, in ONNX Runtime on one thread) against two dense FFNs: one of as many parameters
in all (one expert as wide as all E), one of as many as an image uses (one expert as wide as K). Weights and pixels
are random, and the router spreads such images over all experts. Expect the MoE to win from 3 experts or width 64 on
against the first, and never against the second. Writes scaling.csv, .md, .json and .png to results/benchmarks.
"""

import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.common import format_table, show_progress, write_outputs
from mnist_lab.command.entry import Folder, run_script
from mnist_lab.command.options import check_count
from mnist_lab.data import DataSpec
from mnist_lab.deploy.inside import choose_experts
from mnist_lab.deploy.onnx import write_onnx
from mnist_lab.folders import ensure_writable
from mnist_lab.machine import cpu_model
from mnist_lab.measure import Array, measure_latency
from mnist_lab.models import PRESETS, Model, ModelConfig, build_model, count_parameters, dense_rival
from mnist_lab.models.ffn import FFNConfig
from mnist_lab.models.moe import RoutingConfig, SparseMoEConfig
from mnist_lab.report.drawing import COLORS, Figure, make_logarithmic
from mnist_lab.runtimes import bind
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession

TOP_K = 2
# Mean and deviation of the uniform noise that serves as pixels: else most images would choose the same experts.
NOISE = DataSpec(num_classes=10, image_size=(28, 28), mean=0.5, std=12**-0.5)
MEMORY_SCRIPT = """
import re, sys
import numpy, onnxruntime
def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
before = kib("VmRSS")
session = onnxruntime.InferenceSession(sys.argv[1], options)
session.run(None, {"pixels": numpy.zeros([int(size) for size in sys.argv[2:]], numpy.float32)})
print(kib("VmHWM") - before)
"""
KINDS = ("sparse", "dense, equal total", "dense, equal active")
SIZES = {"experts": "experts E", "width": "width D", "batch": "batch size"}  # that change, and their axes' labels


@dataclass(frozen=True)
class ScalingOptions:
    results: Folder = Path("results")
    """Folder for the table and the plot."""
    rounds: int = 5
    """Turns of at least 30 ms that each model gets at each size."""

    def __post_init__(self) -> None:
        check_count("--rounds", self.rounds)


@dataclass(frozen=True)
class Point:
    """One size: D is the width of model, experts and their outputs."""

    sweep: str
    experts: int
    width: int
    batch: int

    def moe(self) -> SparseMoEConfig:
        routing = RoutingConfig(num_experts=self.experts, top_k=TOP_K)
        return SparseMoEConfig(self.width, self.width, self.width, (), routing, NOISE)

    def dense(self, num_experts: int) -> FFNConfig:
        return dense_rival(self.moe(), num_experts)


def sweeps() -> list[Point]:
    """One size changes, the others stay."""
    base = Point("", experts=8, width=512, batch=256)
    return [
        *(replace(base, sweep="experts", experts=value) for value in (2, 4, 8, 16, 32, 64)),
        *(replace(base, sweep="width", width=value) for value in (32, 64, 128, 256, 512, 1024, 2048)),
        *(replace(base, sweep="batch", batch=value) for value in (1, 8, 64, 256, 1024, 4096)),
    ]


def main(options: ScalingOptions) -> None:
    folder = options.results / "benchmarks"
    ensure_writable(folder)
    points = sweeps()
    rows: list[dict[str, object]] = []
    with show_progress("scaling", len(points) + 1) as advance:
        for point in points:
            rows += measure_point(point, options.rounds)
            advance()
        wide = measure_wide(options.rounds, (4, 64))
        advance()
    table = pd.DataFrame(rows)
    text = describe(table, wide, cpu_model())
    write_outputs(folder, "scaling", table, text, draw=lambda: draw(table, cpu_model()), wide_ms_b1024=wide)


def measure_point(point: Point, num_rounds: int) -> list[dict[str, object]]:
    """A row per kind: median milliseconds by turns, parameters, and memory that loading and running added."""
    models: tuple[ModelConfig, ...] = (point.moe(), point.dense(point.experts), point.dense(TOP_K))
    pixels = draw_noise(point.batch)
    rows: list[dict[str, object]] = []
    calls = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind, config in zip(KINDS, models, strict=True):
            artifact = Path(temporary) / f"{kind}.onnx"
            total, active = count_parameters(write_random(config, artifact))
            calls[kind] = bind(OnnxRuntimeSession(artifact, threads=1), pixels)
            memory_mib = measure_memory(artifact, pixels)
            used = len(np.unique(choose_experts(artifact, pixels))) if kind == "sparse" else None
            rows.append(
                asdict(point)
                | {"kind": kind, "parameters": total, "active": active, "memory_mib": memory_mib, "experts_used": used}
            )
    latencies = measure_latency(calls, num_rounds=num_rounds)
    return [row | asdict(latencies[str(row["kind"])]) for row in rows]


def draw_noise(batch: int) -> Array:
    return np.random.default_rng(0).random((batch, 1, *NOISE.image_size), np.float32)


def write_random(config: ModelConfig, artifact: Path) -> Model:
    """A model with random weights, written to `artifact`."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    write_onnx(model, artifact, {}, layout="sparse")
    return model


def measure_memory(artifact: Path, pixels: Array) -> float:
    """MiB that loading an artifact and running a batch of that shape add to a fresh process at their peak.

    NaN outside Linux.
    """
    if not Path("/proc/self/status").exists():
        return math.nan
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(artifact), *map(str, pixels.shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def measure_wide(num_rounds: int, num_experts: Sequence[int]) -> dict[int, float]:
    """Milliseconds of the wide preset's MoE at batch 1024 by its number of experts."""
    pixels = draw_noise(1024)
    calls = {}
    with tempfile.TemporaryDirectory() as temporary:
        for experts in num_experts:
            artifact = Path(temporary) / f"{experts}.onnx"
            write_random(PRESETS["wide"].moe(NOISE, RoutingConfig(num_experts=experts)), artifact)
            calls[experts] = bind(OnnxRuntimeSession(artifact, threads=1), pixels)
    return {experts: latency.median_ms for experts, latency in measure_latency(calls, num_rounds=num_rounds).items()}


def ratios(table: pd.DataFrame, sweep: str) -> pd.DataFrame:
    """Time of the sparse MoE as a multiple of each dense FFN's, by the size that changes."""
    wide = table[table["sweep"] == sweep].pivot_table(index=sweep, columns="kind", values="median_ms")
    return pd.DataFrame({kind: wide["sparse"] / wide[kind] for kind in KINDS[1:]})


def find_crossover(ratio: pd.Series) -> float | None:
    """The size at which a ratio falls through 1 for good, between two sizes by the straight line in logarithms.

    None where nothing crosses: it is below 1 at every size, or not at the last.
    """
    sizes, values = np.log(ratio.index.to_numpy(float)), np.log(ratio.to_numpy())
    not_below = np.flatnonzero(values >= 0)
    if len(not_below) in {0, len(values)} or not_below[-1] == len(values) - 1:
        return None
    last, first = not_below[-1], not_below[-1] + 1
    return float(np.exp(np.interp(0, [values[first], values[last]], [sizes[first], sizes[last]])))


def judge(ratio: pd.Series) -> str:
    """Where the MoE wins, by its time as a multiple of another's; the index names the size that changes."""
    wins = ratio.index[ratio < 1]
    if len(wins) == len(ratio):
        return "wins at every size measured"
    if wins.empty:
        return "never wins"
    crossover = find_crossover(ratio)
    if crossover is None:
        return f"wins at {ratio.index.name} {', '.join(map(str, wins))} only"
    return f"wins from {ratio.index.name} {crossover:.3g} on"


def describe(table: pd.DataFrame, wide: Mapping[int, float], cpu: str) -> str:
    text = [
        "# Sparse MoE against dense FFNs",
        f"Top-{TOP_K}, FP32, ONNX Runtime, one thread, {cpu}; "
        f"of {table['experts'].max()} experts {table['experts_used'].max():.0f} are in use.",
        "Time of the MoE as a multiple of a dense FFN's: below 1 the MoE wins.",
    ]
    for sweep in SIZES:
        ratio = ratios(table, sweep)
        fixed = table[table["sweep"] == sweep].iloc[0][[size for size in SIZES if size != sweep]]
        text += [
            f"## Against {sweep} ({', '.join(f'{name} {value}' for name, value in fixed.items())})",
            format_table(ratio.reset_index(), ".2f"),
            *(f"- {kind}: the MoE {judge(ratio[kind])}" for kind in ratio),
        ]
    few, many = wide
    times = f"{few} experts take {wide[few]:.2f} ms, {many} take {wide[many]:.2f}"
    text.append(f"Wide preset, batch 1024: {times}, {wide[many] / wide[few]:.2f} times as long.")
    return "\n\n".join(text)


def draw(table: pd.DataFrame, cpu: str) -> Figure:
    """Above, the time ratios, with a dotted line where one falls through 1; below, the memory of all three."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    panels = figure.subplots(2, len(SIZES), sharex="col")
    colors = dict(zip(KINDS, COLORS, strict=False))
    for (above, below), (sweep, size_label) in zip(panels.T, SIZES.items(), strict=True):
        ratio = ratios(table, sweep)
        for kind in KINDS[1:]:
            label = f"against {kind}: {judge(ratio[kind])}"
            above.plot(ratio.index, ratio[kind], "-o", color=colors[kind], label=label)
            crossover = find_crossover(ratio[kind])
            if crossover is not None:
                above.axvline(crossover, color=colors[kind], linestyle=":", label=f"crosses 1 at {crossover:.3g}")
        above.axhline(1, color="#767676", linestyle="--")
        make_logarithmic(above, "y", "time of the MoE / of the dense FFN")
        for kind in KINDS:
            rows = table[(table["sweep"] == sweep) & (table["kind"] == kind)]
            below.plot(rows[sweep], rows["memory_mib"], "-o", color=colors[kind], label=kind)
        make_logarithmic(below, "y", "memory of session and run (MiB)")
        below.set_xscale("log", base=2)
        below.set_xticks(ratio.index, [str(value) for value in ratio.index])
        below.set_xlabel(size_label)
        for axes in (above, below):
            axes.grid(visible=True, color="#e3e3e3", linewidth=0.7)
        above.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=8)  # inside it would hide lines
        below.legend(fontsize=8)
    figure.suptitle(f"Sparse MoE, top-{TOP_K}, FP32, one thread — {cpu}")
    return figure


if __name__ == "__main__":
    run_script(main, ScalingOptions, __doc__)
