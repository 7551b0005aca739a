"""At which size does a sparse MoE start to win? Time and memory against experts, width and batch size.

python -m benchmarks.scaling        # about four minutes

The MoE (top-2, FP32, sparse form, in ONNX Runtime on one thread) against two dense FFNs: one of as many parameters
in all (one expert as wide as all E), one of as many as an image uses (one expert as wide as K). Weights and pixels
are random, and the router spreads such images over all experts. Writes scaling.csv, .md, .json and .png to
results/benchmarks.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tabulate import tabulate

from mnist_lab.report.drawing import COLORS, make_logarithmic
from mnist_lab.deploy.onnx import export_onnx
from mnist_lab.files import ensure_writable, write_atomically
from mnist_lab.machine import cpu_flags, describe_machine, package_versions
from mnist_lab.measure import Array, measure_latency
from mnist_lab.models import PRESETS, ModelConfig, build_model, count_parameters, dense_rival
from mnist_lab.models.ffn import FFN, FFNConfig
from mnist_lab.models.moe import RoutingConfig, SparseMoE, SparseMoEConfig
from mnist_lab.command.options import check_count
from mnist_lab.deploy.inside import choose_experts
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession
from mnist_lab.command.entry import run_script
from mnist_lab.training import progress_bar

TOP_K = 2
MEAN, STD = 0.5, 12**-0.5  # of the uniform noise that serves as pixels: else most images would choose the same experts
MEMORY_SCRIPT = """
import re, sys
import numpy, onnxruntime
def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
before = kib("VmRSS")
session = onnxruntime.InferenceSession(sys.argv[1], options)
session.run(None, {"pixels": numpy.zeros((int(sys.argv[2]), 1, 28, 28), numpy.float32)})
print(kib("VmHWM") - before)
"""
KINDS = ("sparse", "dense, equal total", "dense, equal active")


@dataclass(frozen=True)
class ScalingOptions:
    results: Path = Path("results")
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
        return SparseMoEConfig(self.width, self.width, self.width, (), routing, MEAN, STD)

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
    with progress_bar(auto_refresh=False) as progress:
        task = progress.add_task("scaling", total=len(points) + 1)
        for point in points:
            rows += measure_point(point, options.rounds)
            progress.advance(task)
            progress.refresh()
        wide = measure_wide(options.rounds, (4, 64))
        progress.advance(task)
    write_outputs(folder, pd.DataFrame(rows), wide)


def measure_point(point: Point, num_rounds: int) -> list[dict[str, object]]:
    """A row per kind: median milliseconds by turns, parameters, and memory that loading and running added."""
    models: tuple[ModelConfig, ...] = (point.moe(), point.dense(point.experts), point.dense(TOP_K))
    configs = dict(zip(KINDS, models, strict=True))
    pixels = np.random.default_rng(0).random((point.batch, 1, 28, 28), np.float32)
    rows: list[dict[str, object]] = []
    calls = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind, config in configs.items():
            artifact = Path(temporary) / f"{kind}.onnx"
            total, active = count_parameters(export_random(config, artifact))
            calls[kind] = bind(artifact, pixels)
            memory_mib = measure_memory(artifact, point.batch)
            used = len(np.unique(choose_experts(artifact, pixels))) if kind == "sparse" else None
            rows.append(
                asdict(point)
                | {"kind": kind, "parameters": total, "active": active, "memory_mib": memory_mib, "experts_used": used}
            )
    latencies = measure_latency(calls, num_rounds=num_rounds)
    return [row | asdict(latencies[str(row["kind"])]) for row in rows]


def export_random(config: ModelConfig, artifact: Path) -> FFN | SparseMoE:
    """A model with random weights, written to `artifact`."""
    torch.manual_seed(0)
    model = build_model(config).eval()
    export_onnx(model, artifact, {})
    return model


def bind(artifact: Path, pixels: Array) -> Callable[[], Array]:
    session = OnnxRuntimeSession(artifact, threads=1)
    return partial(session.run, session.prepare(pixels))


def measure_memory(artifact: Path, batch: int) -> float:
    """MiB that loading an artifact and running a batch add to a fresh process at their peak; NaN outside Linux."""
    if not Path("/proc/self/status").exists():
        return math.nan
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(artifact), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def measure_wide(num_rounds: int, num_experts: Sequence[int]) -> dict[int, float]:
    """Milliseconds of the wide preset's MoE at batch 1024 by its number of experts."""
    pixels = np.random.default_rng(0).random((1024, 1, 28, 28), np.float32)
    calls = {}
    with tempfile.TemporaryDirectory() as temporary:
        for experts in num_experts:
            artifact = Path(temporary) / f"{experts}.onnx"
            export_random(PRESETS["wide"].moe(MEAN, STD, RoutingConfig(num_experts=experts)), artifact)
            calls[experts] = bind(artifact, pixels)
    return {experts: latency.median_ms for experts, latency in measure_latency(calls, num_rounds=num_rounds).items()}


def ratios(table: pd.DataFrame, sweep: str) -> pd.DataFrame:
    """Time of the sparse MoE as a multiple of each dense FFN's, by the size that changes."""
    wide = table[table["sweep"] == sweep].pivot_table(index=sweep, columns="kind", values="median_ms")
    return pd.DataFrame({kind: wide["sparse"] / wide[kind] for kind in KINDS[1:]})


def find_crossover(ratio: pd.Series) -> float | None:
    """The size at which a ratio first falls through 1, between two sizes by the straight line in logarithms."""
    sizes, values = np.log(ratio.index.to_numpy(float)), np.log(ratio.to_numpy())
    if values[0] <= 0:
        return float(ratio.index[0])
    for i in range(1, len(values)):
        if values[i] <= 0:
            return float(np.exp(np.interp(0, [values[i], values[i - 1]], [sizes[i], sizes[i - 1]])))
    return None


def write_outputs(folder: Path, table: pd.DataFrame, wide: dict[int, float]) -> None:
    few, many = wide
    conditions = f"Top-{TOP_K}, FP32, ONNX Runtime, one thread, {describe_machine()['cpu']}"
    text = [
        "# Sparse MoE against dense FFNs",
        f"{conditions}; of 64 experts {table['experts_used'].max():.0f} are in use.",
        "Time of the MoE as a multiple of a dense FFN's: below 1 the MoE wins.",
    ]
    for sweep in ("experts", "width", "batch"):
        ratio = ratios(table, sweep)
        found = {kind: find_crossover(ratio[kind]) for kind in ratio}
        fixed = table[table["sweep"] == sweep][[c for c in ("experts", "width", "batch") if c != sweep]].iloc[0]
        text += [
            f"## Against {sweep} ({', '.join(f'{name} {value}' for name, value in fixed.items())})",
            tabulate(ratio.reset_index().to_dict("list"), "keys", "github", floatfmt=".2f"),
            *(
                f"- {kind}: {f'the MoE wins from {sweep} {x:.3g} on' if x else 'the MoE never wins'}"
                for kind, x in found.items()
            ),
        ]
    times = f"{few} experts take {wide[few]:.2f} ms, {many} take {wide[many]:.2f}"
    text.append(f"Wide preset, batch 1024: {times}, {wide[many] / wide[few]:.2f} times as long.")
    record = {
        "machine": describe_machine() | {"flags": sorted(cpu_flags())},
        "versions": package_versions(),
        "wide_ms_b1024": wide,
        "rows": table.astype(object).where(table.notna(), None).to_dict("records"),
    }
    write_atomically(folder / "scaling.csv", lambda path: table.to_csv(path, index=False))
    write_atomically(folder / "scaling.json", lambda path: path.write_text(json.dumps(record, indent=1)))
    write_atomically(folder / "scaling.md", lambda path: path.write_text("\n\n".join(text) + "\n"))
    write_atomically(folder / "scaling.png", partial(draw(table).savefig, dpi=120))
    print("\n\n".join(text) + f"\n\nwritten: {folder}/scaling.csv, .md, .json, .png")


def draw(table: pd.DataFrame) -> Figure:
    """Above, the time ratios with their crossovers; below, the memory of all three."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    panels = figure.subplots(2, 3, sharex="col")
    for column, sweep in enumerate(("experts", "width", "batch")):
        above, below = panels[0, column], panels[1, column]
        ratio = ratios(table, sweep)
        for kind, color in zip(ratio, COLORS[1:], strict=False):
            above.plot(ratio.index, ratio[kind], "-o", color=color, label=f"against {kind}")
            crossover = find_crossover(ratio[kind])
            if crossover is not None:
                above.axvline(crossover, color=color, linestyle=":", label=f"crossover at {crossover:.3g}")
        above.axhline(1, color="#767676", linestyle="--")
        make_logarithmic(above, "y", "time of the MoE / of the dense FFN")
        for kind, color in zip(KINDS, COLORS, strict=False):
            rows = table[(table["sweep"] == sweep) & (table["kind"] == kind)]
            below.plot(rows[sweep], rows["memory_mib"], "-o", color=color, label=kind)
        make_logarithmic(below, "y", "memory of session and run (MiB)")
        below.set_xscale("log", base=2)
        below.set_xticks(ratio.index, [str(value) for value in ratio.index])
        below.set_xlabel({"experts": "experts E", "width": "width D", "batch": "batch size"}[sweep])
        for axes in (above, below):
            axes.grid(visible=True, color="#e3e3e3", linewidth=0.7)
            axes.legend(fontsize=8)
    figure.suptitle(f"Sparse MoE, top-{TOP_K}, FP32, one thread — {describe_machine()['cpu']}")
    return figure


if __name__ == "__main__":
    run_script(main, ScalingOptions, __doc__ or "")
