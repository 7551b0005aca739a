"""Which way runs weights of few bits fastest in ONNX Runtime, beside FP32 and INT8?

python -m benchmarks.few_bits       # about three minutes

The compact FFN and MoE on one thread, weights and pixels random. Before a way is timed, its products are looked up in
the graph that the engine executes, and its logits are compared with those of the same weights in FP32: one that
computes something else is listed, not timed. Writes few_bits.csv and .md to results/benchmarks.
"""

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import torch
from onnx import helper

from benchmarks.common import format_table, show_progress, write_outputs
from benchmarks.contestants import bind_session
from benchmarks.few_bit_graphs import as_file, as_float, as_nbits, round_all
from benchmarks.scaling import NOISE, draw_noise
from mnist_lab.command.entry import Folder, run_script
from mnist_lab.command.options import check_count
from mnist_lab.compress.int8 import FLOAT_OPERATORS, INTEGER_OPERATORS, needs_reduced_range, quantize
from mnist_lab.compress.levels import Bits, GroupSize, Rounding
from mnist_lab.compress.weight_only import LEAST_DECIBELS
from mnist_lab.deploy.artifacts import name_nodes
from mnist_lab.deploy.onnx import build_onnx, write_onnx
from mnist_lab.folders import ensure_writable
from mnist_lab.machine import cpu_model
from mnist_lab.measure import TABLE_BATCHES, Array, decibels, measure_latency
from mnist_lab.models import PRESETS, Model, build_model
from mnist_lab.runtimes import FLOAT_PRODUCTS
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

BATCHES = TABLE_BATCHES
ROUNDINGS = (
    *(Rounding(bits) for bits in (8, 4, 3, 2)),
    *(Rounding(bits, size) for bits in (8, 4, 2) for size in (32, 64, 128)),
)
ACCURACY_LEVELS = (0, 1, 4)  # of MatMulNBits: none asked for, rows in FP32, rows in INT8 as it is by default
BLOCK_SIZES = (16, 64, 128, 256, -1)  # that the engine may cut weights of one scale into: by default 32; -1: it chooses
CHECKED_IMAGES = 200
CALIBRATION_IMAGES = 100
NUM_LOADS = 5
FP32, INT8 = "FP32", ("INT8 dynamic", "INT8 static")
FILE = "file"  # the suite's own, as the suite runs it


@dataclass(frozen=True)
class FewBitsOptions:
    results: Folder = Path("results")
    """Folder for the table."""
    rounds: int = 5
    """Turns of at least 30 ms that each way gets at each size."""

    def __post_init__(self) -> None:
        check_count("--rounds", self.rounds)


class Checked(NamedTuple):
    """What a way is, what it executes, and how far its logits are from those of its weights in FP32."""

    way: str
    bits: Bits | None
    group: GroupSize | None
    products: str
    level: str
    file_kb: float
    decibels: float

    @property
    def is_right(self) -> bool:
        return self.decibels >= LEAST_DECIBELS


@dataclass(frozen=True)
class Way:
    """A model's file, and the session options that it runs with."""

    name: str
    content: bytes = field(repr=False)
    expected: Array = field(repr=False)  # logits of its weights in FP32
    bits: Bits | None = None
    group: GroupSize | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def open(self, optimized: Path | None = None) -> onnxruntime.InferenceSession:
        """On one thread; the graph that runs goes to that file."""
        options = session_options(1)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        for key, value in self.options.items():
            options.add_session_config_entry(key, value)
        return onnxruntime.InferenceSession(self.content, options, providers=PROVIDERS)


def main(options: FewBitsOptions) -> None:
    folder = options.results / "benchmarks"
    ensure_writable(folder)
    models = make_models()
    frames = []
    with show_progress("few bits", len(models)) as advance:
        for name, model in models.items():
            frames.append(time_all(find_ways(model), options.rounds).assign(model=name))
            advance()
    table = pd.concat(frames, ignore_index=True)
    write_outputs(folder, "few_bits", table, describe(table, cpu_model()))


def make_models() -> dict[str, Model]:
    """With random weights."""
    preset = PRESETS["compact"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {"FFN": build_model(preset.ffn(NOISE)).eval(), "MoE": build_model(preset.moe(NOISE)).eval()}


def find_ways(model: Model) -> list[Way]:
    """The suite's FP32 and INT8 artifacts, then all ways of all roundings."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ways = list(usual_ways(model, folder))
        for rounding in ROUNDINGS:
            ways += few_bit_ways(model, rounding, folder)
    return ways


def usual_ways(model: Model, folder: Path) -> Iterator[Way]:
    fp32, int8 = folder / "fp32.onnx", folder / "int8.onnx"
    write_onnx(model, fp32, {})
    expected = logits_of(build_onnx(model))
    yield Way(FP32, fp32.read_bytes(), expected)
    for name in INT8:
        quantize(
            fp32,
            int8,
            mode="static" if "static" in name else "dynamic",
            calibration=draw_noise(CALIBRATION_IMAGES),
            keep_float=FLOAT_PRODUCTS,
            reduced_range=needs_reduced_range(),
            metadata={},
        )
        yield Way(name, int8.read_bytes(), expected)


def few_bit_ways(model: Model, rounding: Rounding, folder: Path) -> Iterator[Way]:
    """The suite's file under every option, and nodes of the engine's own."""
    weights = round_all(model, rounding)
    bits, group = rounding.bits, rounding.group_size
    expected = logits_of(as_float(weights))
    file = folder / "few.onnx"
    as_file(weights, file)
    content = file.read_bytes()
    for name, options in options_of(rounding).items():
        yield Way(name, content, expected, bits, group, options)
    if bits == 3:
        return  # the operator has none
    for level in ACCURACY_LEVELS:
        nodes = as_nbits(weights, level).SerializeToString()
        yield Way("nodes", nodes, expected, bits, group)
    if bits == 2:
        yield Way("nodes, lookup tables", nodes, expected, bits, group, {"mlas.use_lut_gemm": "1"})


def options_of(rounding: Rounding) -> dict[str, dict[str, str]]:
    """Session options by a name, under which the suite's file of such weights is worth a try."""
    found: dict[str, dict[str, str]] = {FILE: {}}
    if rounding.group_size != "channel" and rounding.bits != 4:
        return found
    for level in ACCURACY_LEVELS[:-1]:
        found[f"{FILE}, level {level}"] = {"session.qdq_matmulnbits_accuracy_level": str(level)}
    if rounding.group_size == "channel" and rounding.bits in {8, 4}:  # fewer are 4 when they are loaded
        for size in BLOCK_SIZES:
            label = "the engine's choice" if size < 0 else size
            found[f"{FILE}, blocks of {label}"] = {"session.qdq_matmulnbits_block_size": str(size)}
    if rounding.bits == 4:
        found[f"{FILE}, second fusion"] = {"session.enable_dq_matmulnbits_fusion": "1"}
    found[f"{FILE}, unpacked to FP32"] = {"session.disable_quant_qdq": "1"}
    return found


def logits_of(model: onnx.ModelProto) -> Array:
    return run(Way("", model.SerializeToString(), np.empty(0, np.float32)))


def run(way: Way) -> Array:
    logits: Array = way.open().run(None, {"pixels": draw_noise(CHECKED_IMAGES)})[0]
    return logits


def time_all(ways: list[Way], num_rounds: int) -> pd.DataFrame:
    """A row per way and batch size, those that agree timed by turns; ratios are to FP32 and to the faster INT8."""
    checked = [check(way) for way in ways]
    right = {index: way for index, way in enumerate(ways) if checked[index].is_right}
    opened = {index: way.open for index, way in right.items()}
    loads = measure_latency(opened, num_rounds=NUM_LOADS, block_s=1e-3, num_dropped=0)
    binders = {index: bind_session(way.open()) for index, way in right.items()}
    rows = []
    for batch in BATCHES:
        pixels = draw_noise(batch)
        calls = {index: bind_pixels(pixels) for index, bind_pixels in binders.items()}
        latencies = measure_latency(calls, num_rounds=num_rounds)
        for index, found in enumerate(checked):
            row: dict[str, object] = found._asdict() | {"batch": batch}
            if index in right:
                row |= {"load_ms": loads[index].median_ms} | asdict(latencies[index])
            rows.append(row)
    return add_ratios(pd.DataFrame(rows))


def check(way: Way) -> Checked:
    operators, levels = executed(way)
    size_kb = len(way.content) / 1e3
    return Checked(way.name, way.bits, way.group, operators, levels, size_kb, decibels(run(way), way.expected))


def executed(way: Way) -> tuple[str, str]:
    """The products in the graph that runs, counted, and their accuracy levels."""
    counts: Counter[str] = Counter()
    levels: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        way.open(Path(folder) / "optimized.onnx")
        graph = onnx.load(Path(folder) / "optimized.onnx").graph
    name_nodes(graph)
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            counts["MatMulNBits {bits}/{block_size}".format(**attributes)] += 1
            levels.add(str(attributes.get("accuracy_level", 0)))
        elif node.op_type in INTEGER_OPERATORS | FLOAT_OPERATORS and node.name not in FLOAT_PRODUCTS:
            counts[node.op_type] += 1
    return ", ".join(f"{num} {name}" for name, num in counts.items()), ", ".join(sorted(levels))


def add_ratios(table: pd.DataFrame) -> pd.DataFrame:
    fp32 = table[table["way"] == FP32].set_index("batch")["median_ms"]
    int8 = table[table["way"].isin(INT8)].groupby("batch")["median_ms"].min()
    ratios = {name: table["median_ms"] / table["batch"].map(of) for name, of in (("of_fp32", fp32), ("of_int8", int8))}
    return table.assign(**ratios)


def describe(table: pd.DataFrame, cpu: str) -> str:
    lines = [
        "# Weights of few bits in ONNX Runtime",
        "Median milliseconds on one thread and, in brackets, as a multiple of FP32's and of the faster INT8's; "
        f"{cpu}, ONNX Runtime {onnxruntime.__version__}.",
    ]
    for model, rows in table.groupby("model", sort=False):
        lines += [f"## {model}", *fastest(rows), format_table(wide(rows))]
    return "\n\n".join(lines)


def fastest(rows: pd.DataFrame) -> Iterator[str]:
    """Of few bits, at each batch size."""
    few = rows[rows["bits"].notna()].sort_values("median_ms")
    for best in few.groupby("batch").head(1).sort_values("batch").itertuples():
        yield (
            f"Batch {best.batch}: fastest is {best.way} of {best.bits:.0f} bits, group {best.group}, with "
            f"{best.median_ms:.3f} ms, {best.of_fp32:.2f} of FP32's, {best.of_int8:.2f} of INT8's."
        )


def wide(rows: pd.DataFrame) -> pd.DataFrame:
    """A row per way."""
    first = rows[rows["batch"] == rows["batch"].min()]
    shown = first[["way", "products"]].assign(
        bits=texts(first["bits"], ".0f"), group=first["group"], level=first["level"]
    )
    is_right = first["median_ms"].notna()
    shown["kB"] = texts(first["file_kb"], ".0f")
    shown["dB"] = texts(first["decibels"], ".0f").where(is_right, texts(first["decibels"], ".0f") + ": wrong")
    shown["load ms"] = texts(first["load_ms"], ".1f")
    for batch, own in rows.groupby("batch"):
        cells = (
            texts(own["median_ms"], ".3f")
            + " ("
            + texts(own["of_fp32"], ".2f")
            + ", "
            + texts(own["of_int8"], ".2f")
            + ")"
        )
        shown[f"batch {batch}"] = cells.where(own["median_ms"].notna(), "").to_numpy()
    return shown.fillna("")


def texts(values: pd.Series, style: str) -> pd.Series:
    return values.map(lambda value: "" if pd.isna(value) else format(value, style))


if __name__ == "__main__":
    run_script(main, FewBitsOptions, __doc__)
