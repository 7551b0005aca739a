"""The benchmarks' arithmetic, and that their contestants compute the same models."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from tiny import make_dataset, spec

from benchmarks import breakdown, contestants, few_bits, latency, limits, scaling, sparse, training
from benchmarks.common import BenchmarkOptions
from benchmarks.contestants import bind_session, reference_contestants
from benchmarks.few_bit_graphs import as_file, as_float, as_nbits, round_all
from benchmarks.limits import shortest_ms
from mnist_lab.compress.bfloat16 import has_bfloat16
from mnist_lab.compress.levels import Bits, GroupSize, Rounding
from mnist_lab.compress.weight_only import Method, WeightOnly
from mnist_lab.deploy import inside
from mnist_lab.deploy.onnx import graph_metadata, write_onnx
from mnist_lab.experiments.technique import Work
from mnist_lab.measure import Latency, measure_latency
from mnist_lab.models import PRESETS, Model, ModelConfig, build_model, count_parameters
from mnist_lab.models.ffn import FFN, FFNConfig
from mnist_lab.models.moe import EveryExpert, RoutingConfig, SparseMoE, SparseMoEConfig
from mnist_lab.runtimes import RUNTIMES
from mnist_lab.training import find_recipe, torch_predictor

PIXELS = np.random.default_rng(0).random((70, 1, 28, 28), np.float32)


@pytest.fixture(scope="module")
def models() -> tuple[FFN, SparseMoE]:
    torch.manual_seed(0)
    preset = PRESETS["compact"]
    return FFN(preset.ffn(spec())).eval(), SparseMoE(preset.moe(spec())).eval()


@pytest.mark.slow
def test_contestants_compute_the_same_models(models: tuple[FFN, SparseMoE], tmp_path: Path) -> None:
    found = reference_contestants(*models, tmp_path)
    names = {(contestant.model, contestant.runtime) for contestant in found}
    assert {("MoE", "mask loop"), ("MoE", "ORT MoE operator"), ("FFN", "ORT default"), ("MoE", "ORT default")} <= names
    assert {("MoE", f"ORT QMoE operator, {bits} bits") for bits in (8, 4)} <= names
    assert {("FFN", "OpenVINO default"), ("MoE", "OpenVINO default")} <= names
    for contestant in found:
        expected = torch_predictor(models[0] if contestant.model == "FFN" else models[1])(PIXELS)
        outcome: Any = contestant.open(1)(PIXELS)()
        logits = np.asarray(outcome if isinstance(outcome, torch.Tensor | np.ndarray) else outcome[0])
        noise_db = 10 * np.log10(np.square(expected).sum() / np.square(expected - logits).sum())
        least = {"FP32": 80, "BF16": 30, "INT8": 15}[contestant.precision]
        if contestant.runtime.endswith("4 bits"):
            least = 10
        assert noise_db > least, (contestant.model, contestant.runtime, noise_db)
        if contestant.precision != "FP32":
            assert noise_db < 80  # or it would have run in FP32
    default = next(c for c in found if c.runtime == "OpenVINO default")
    assert default.precision == ("BF16" if has_bfloat16() else "FP32")


@pytest.mark.slow
def test_engines_compute_the_same_mostly_zero_model(tmp_path: Path) -> None:
    model = sparse.make_ffn(0.95)
    weights = [weight for weight in model.parameters() if weight.ndim == 2]
    assert [float((weight == 0).double().mean()) for weight in weights] == [pytest.approx(0.95, abs=1e-3)] * 3
    expected = torch_predictor(model)(PIXELS)
    found = list(sparse.find_contestants(model, tmp_path))
    assert {contestant.rival for contestant in found} <= {(contestant.engine, contestant.form) for contestant in found}
    with torch.inference_mode():
        for contestant in found:
            outcome: Any = contestant.bind(PIXELS)()
            atol = 0.05 if "INT8" in contestant.engine else 1e-4
            np.testing.assert_allclose(np.asarray(outcome), expected, atol=atol, err_msg=str(contestant[:2]))
    assert onnx.load(tmp_path / "sparse.onnx").graph.sparse_initializer
    assert not onnx.load(tmp_path / "dense.onnx").graph.sparse_initializer


@pytest.mark.slow
def test_sparse_benchmark_sets_every_form_beside_its_dense_rival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "BATCHES", (1, 8))
    monkeypatch.setattr(sparse, "SHARES_OF_ZEROS", (0.9, 0.99))
    monkeypatch.setattr(sparse, "measure_latency", partial(measure_latency, block_s=1e-3))
    sparse.main(sparse.SparseOptions(results=tmp_path, rounds=1))
    table = pd.read_csv(tmp_path / "benchmarks/sparse.csv")
    assert len(table) == 2 * 2 * 9
    ms = table.set_index(["zeros", "batch", "engine", "form"])["median_ms"]
    ratio = table.set_index(["zeros", "batch", "engine", "form"])["ratio"]
    assert ratio[0.9, 8, "torch", "dense"] == 1
    assert ratio[0.9, 8, "scipy", "CSR"] == pytest.approx(ms[0.9, 8, "scipy", "CSR"] / ms[0.9, 8, "torch", "dense"])
    assert (tmp_path / "benchmarks/sparse.md").read_text().startswith("# ")


TINY: dict[str, ModelConfig] = {  # whose widths no group divides
    "ffn": FFNConfig((40, 24), scaling.NOISE),
    "moe": SparseMoEConfig(40, 24, 24, (), RoutingConfig(3), scaling.NOISE),
}


def make_tiny(name: str) -> Model:
    torch.manual_seed(0)
    return build_model(TINY[name]).eval()


@pytest.mark.parametrize("group", ["channel", 32, 64])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_engines_own_nodes_hold_the_same_weights(bits: Bits, group: GroupSize) -> None:
    weights = round_all(make_tiny("ffn"), Rounding(bits, group))
    expected = few_bits.logits_of(as_float(weights))
    for level, least, most in ((0, 100, np.inf), (1, 100, np.inf), (4, 25, 70)):  # rows in FP32, or in INT8
        way = few_bits.Way("", as_nbits(weights, level).SerializeToString(), expected)
        found = few_bits.check(way)
        assert least < found.decibels <= most
        assert f"MatMulNBits {bits}/" in found.products
        assert found.level == str(level)
        bind_session(way.open())(PIXELS[:1])()  # a batch of one has kernels of its own


def test_file_is_the_suites_own(tmp_path: Path) -> None:
    model, rounding = make_tiny("moe"), Rounding(3, 32)
    work = Work(make_dataset(), PRESETS["compact"], find_recipe("quick", "compact"), 0, "cpu", "x")
    as_file(round_all(model, rounding), tmp_path / "ours.onnx")
    WeightOnly(rounding, Method("nearest")).write(model, tmp_path / "suite.onnx", work, graph_metadata(model))
    assert (tmp_path / "ours.onnx").read_bytes() == (tmp_path / "suite.onnx").read_bytes()


@pytest.mark.slow
def test_few_bits_benchmark_times_what_agrees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways of the tiny models, one of them against weights that are not its own."""
    usual_ways = few_bits.usual_ways

    def with_wrong(model: Model, folder: Path) -> Any:
        (fp32, *_) = ways = list(usual_ways(model, folder))
        return [*ways, few_bits.Way("wrong", fp32.content, -fp32.expected, 4)]

    monkeypatch.setattr(few_bits, "BATCHES", (1, 8))
    monkeypatch.setattr(few_bits, "LEAST_DECIBELS", 10)
    monkeypatch.setattr(few_bits, "NUM_LOADS", 1)
    monkeypatch.setattr(few_bits, "ROUNDINGS", (Rounding(4), Rounding(2, 32)))
    monkeypatch.setattr(few_bits, "make_models", lambda: {name: make_tiny(name) for name in TINY})
    monkeypatch.setattr(few_bits, "measure_latency", partial(measure_latency, block_s=1e-3))
    monkeypatch.setattr(few_bits, "usual_ways", with_wrong)
    few_bits.main(few_bits.FewBitsOptions(results=tmp_path, rounds=1))
    table = pd.read_csv(tmp_path / "benchmarks/few_bits.csv")
    is_wrong = table["way"] == "wrong"
    assert is_wrong.sum() == 2 * 2
    assert table["median_ms"].isna().equals(is_wrong)
    moe = table[(table["model"] == "moe") & (table["batch"] == 8)]
    int8_ms = moe[moe["way"].isin(few_bits.INT8)]["median_ms"].min()
    own = moe[(moe["way"] == few_bits.FILE) & (moe["bits"] == 4)]
    assert own["of_int8"].item() == pytest.approx(own["median_ms"].item() / int8_ms)
    text = (tmp_path / "benchmarks/few_bits.md").read_text()
    assert text.startswith("# ")
    assert text.count(": wrong") == 2


def test_limit_is_the_best_of_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_ms_each(calls: dict[int, Any], **_: Any) -> dict[int, Latency]:
        for call in calls.values():
            call()
        return {size: Latency(1.0, 1.0, 1.0, 1) for size in calls}

    monkeypatch.setattr(limits, "measure_latency", one_ms_each)
    monkeypatch.setattr(limits, "SIZES", (16, 32))
    for precision in latency.WEIGHT_BYTES:
        assert limits.product_rate(precision) == pytest.approx(2 * 32**3 / 1e-3)


def test_share_is_the_limits_time_over_the_measured(
    models: tuple[FFN, SparseMoE], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "read_rate", lambda _: 1e30)
    row = {"model": "FFN", "precision": "FP32", "runtime": "pytorch", "batch": 10, "median_ms": 4.0}
    table = latency.add_limits(pd.DataFrame([row]), {"FFN": models[0]}, {"FP32": 2 * 235_146 * 10 / 1e-3})
    assert table["limit_share"][0] == pytest.approx(0.25)  # the limit takes 1 ms
    assert table["gops"][0] == pytest.approx(2 * 235_146 * 10 / 4e-3 / 1e9)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Empty at first: the first benchmark trains the models, the second finds them."""
    return tmp_path_factory.mktemp("checkpoints")


def export_quickly(model: FFN | EveryExpert, path: Path, _: torch.Tensor) -> None:
    """In place of torch's exporter, which takes seconds and which the contestants' own test runs."""
    write_onnx(model.model if isinstance(model, EveryExpert) else model, path, {}, layout="dense")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latency", "breakdown"])
def test_benchmark_runs_from_nothing(
    name: str, checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = {"latency": latency, "breakdown": breakdown}[name]
    monkeypatch.setattr(module, "BATCHES", (1, 8))
    for timing in (module, limits):
        monkeypatch.setattr(timing, "NUM_ROUNDS", 1)
        monkeypatch.setattr(timing, "measure_latency", partial(measure_latency, block_s=1e-3))
    monkeypatch.setattr(inside, "NUM_CALLS", 2)
    monkeypatch.setattr(limits, "SIZES", (16,))
    monkeypatch.setattr(contestants, "export_plainly", export_quickly)
    fields: dict[str, Any] = {"dataset": "digits", "checkpoints": checkpoints, "results": tmp_path}
    folder = tmp_path / "digits-compact-quick" / "benchmarks"
    if name == "latency":
        latency.main(latency.LatencyOptions(runtime=("onnxruntime",), **fields))
        record = json.loads((folder / "latency.json").read_text())
        assert {(row["model"], row["batch"]) for row in record["rows"]} >= {("FFN", 1), ("MoE", 8)}
        assert (folder / "latency.png").stat().st_size > 0
    else:
        breakdown.main(BenchmarkOptions(**fields))
    assert len(pd.read_csv(folder / f"{name}.csv")) >= 6
    assert (folder / f"{name}.md").read_text().startswith("# ")


@pytest.mark.slow
def test_training_benchmark_times_every_part_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "NUM_ROUNDS", 1)
    monkeypatch.setattr(training, "NUM_EPOCHS", 1)
    monkeypatch.setattr(training, "product_rate", lambda _: 1e9)
    training.main(training.TrainingOptions("digits", checkpoints=tmp_path / "c", results=tmp_path / "r"))
    table = pd.read_csv(tmp_path / "r/digits-compact-standard/benchmarks/training.csv")
    assert table["model"].tolist() == ["FFN_baseline", "Sparse_MoE", "KD_FFN_Student", "FFN_Student_no_KD"]
    parts = table[["batch", "augmentation", "forward and backward", "update"]]
    assert (parts > 0).all(axis=None)
    # The FFN's three products, forward and backward, but for the gradient of the pixels.
    operations = 6 * (784 * 256 + 256 * 128 + 128 * 10) - 2 * 784 * 256
    assert table["share of limit"][0] == pytest.approx(operations * table["images/s"][0] / 1e9, rel=1e-2)


def test_roofline_is_the_longer_of_products_and_reading() -> None:
    rates = {"operations_per_s": 1e9, "bytes_per_s": 1e6}
    assert shortest_ms(operations=5e6, num_bytes=1e3, **rates) == pytest.approx(5)
    assert shortest_ms(operations=5e6, num_bytes=9e3, **rates) == pytest.approx(9)


def test_weights_touched_grow_from_the_active_to_all(models: tuple[FFN, SparseMoE]) -> None:
    ffn, moe = models
    total, active = count_parameters(moe)
    assert latency.weights_touched(moe, 1) == active
    assert latency.weights_touched(moe, 2) == latency.weights_touched(moe, 10_000) == total
    assert latency.weights_touched(ffn, 1) == latency.weights_touched(ffn, 64) == 235_146
    assert latency.operations(ffn) == 2 * 235_146
    assert latency.operations(moe) == 2 * active


def test_peer_has_as_many_parameters_as_an_image_uses(models: tuple[FFN, SparseMoE]) -> None:
    active = count_parameters(models[1])[1]
    assert count_parameters(latency.build_equal_active(models[1]))[0] == pytest.approx(active, rel=0.01)


def test_speedup_is_against_the_first_script_at_the_same_batch_and_threads() -> None:
    columns = ["model", "precision", "runtime", "threads", "batch", "median_ms"]
    rows = [
        ("MoE", "FP32", "mask loop", 1, 1, 8.0),
        ("MoE", "FP32", "mask loop", 1, 64, 20.0),
        ("MoE", "INT8", "onnxruntime", 1, 1, 2.0),
        ("MoE", "INT8", "onnxruntime", 1, 64, 2.0),
        ("FFN", "FP32", "pytorch", 1, 1, 3.0),
    ]
    table = latency.add_speedups(pd.DataFrame(rows, columns=columns))
    assert table["speedup"].tolist() == [1, 1, 4, 10, 1]


# Some of each panel, and all of the two in which most engines stand twice.
CONTESTANTS = [
    *(("FFN", "FP32", name) for name in ("pytorch", "torch-compile", "onnxruntime", "openvino", "ORT default")),
    *(("FFN", "INT8", name) for name in ("onnxruntime static", "torch.ao dynamic", "ORT default dynamic")),
    *(("MoE", "FP32", name) for name in ("pytorch", "onnxruntime", "mask loop", "ORT MoE operator", "ORT default")),
    *(("MoE", "INT8", f"{name} {mode}") for name in ("onnxruntime", "torchao") for mode in ("dynamic", "static")),
    *(("MoE", "INT8", name) for name in ("openvino static", "torch.ao dynamic", "ORT default dynamic")),
    *(("MoE", "BF16", name) for name in ("pytorch", "openvino", "OpenVINO default")),
]


def test_contestants_of_a_panel_all_look_different() -> None:
    columns = ["model", "precision", "runtime"]
    table = pd.DataFrame(CONTESTANTS, columns=columns).assign(threads=1, median_ms=1.0, limit_share=0.5)
    table = pd.concat([table.assign(batch=batch) for batch in (1, 64)], ignore_index=True)
    panels = {axes.get_title(): axes for axes in latency.draw(table, "a CPU").axes}
    for (model, precision), rows in table.groupby(["model", "precision"]):
        lines = {str(line.get_label()): line for line in panels[f"{model}, {precision}"].lines}
        assert set(lines) == set(rows["runtime"])
        assert len({line.get_color() for line in lines.values()}) == len(lines)
        assert len({line.get_marker() for line in lines.values()}) == len(lines)
        for name, line in lines.items():
            assert line.get_linestyle() == ("-" if name.split()[0] in RUNTIMES else "--")


@pytest.mark.parametrize(
    ("ratios", "crossover", "verdict"),
    [
        ([2.0, 1.0, 0.5], 4.0, "wins from experts 4 on"),
        ([2.0, 0.5, 0.2], 8**0.5, "wins from experts 2.83 on"),
        ([0.9, 0.5, 0.2], None, "wins at every size measured"),
        ([3.0, 2.0, 1.5], None, "never wins"),
        ([3.0, 2.0, 1.0], None, "never wins"),
        ([2.0, 0.5, 1.2], None, "wins at experts 4 only"),
        ([0.5, 0.9, 1.2], None, "wins at experts 2, 4 only"),
        ([0.5, 2.0, 0.5], 32**0.5, "wins from experts 5.66 on"),
    ],
)
def test_crossover_is_where_the_ratio_falls_through_one(
    ratios: list[float], crossover: float | None, verdict: str
) -> None:
    ratio = pd.Series(ratios, index=pd.Index([2, 4, 8], name="experts"))
    assert scaling.find_crossover(ratio) == (None if crossover is None else pytest.approx(crossover))
    assert scaling.judge(ratio) == verdict


def test_only_a_real_crossover_is_drawn() -> None:
    """Against experts it crosses one rival, against width none but wins, against batch it never wins."""
    times = {"experts": (2.0, 1.5, 0.5), "width": (0.9, 0.5, 0.2), "batch": (3.0, 2.0, 1.5)}
    rows = [
        {"sweep": sweep, **dict.fromkeys(times, 8), sweep: size, "kind": kind, "median_ms": ms, "memory_mib": 1.0}
        for sweep, of_moe in times.items()
        for size, ms_of_moe in zip((2, 4, 8), of_moe, strict=True)
        for kind, ms in zip(scaling.KINDS, (ms_of_moe, 1.0, 4.0), strict=True)
    ]
    above = scaling.draw(pd.DataFrame(rows), "a CPU").axes[:3]
    crossings = [[line for line in axes.lines if line.get_linestyle() == ":"] for axes in above]
    assert [len(lines) for lines in crossings] == [1, 0, 0]
    text = scaling.describe(pd.DataFrame(rows).assign(experts_used=8), {4: 1.0, 64: 2.0}, "a CPU")
    assert [line for line in text.splitlines() if line.startswith("- dense, equal total")] == [
        "- dense, equal total: the MoE wins from experts 5.17 on",
        "- dense, equal total: the MoE wins at every size measured",
        "- dense, equal total: the MoE never wins",
    ]


def test_dense_rivals_have_as_many_parameters_in_all_and_per_image() -> None:
    point = scaling.Point("experts", experts=8, width=64, batch=2)
    rows = {row["kind"]: row for row in scaling.measure_point(point, 1)}
    sparse = rows["sparse"]
    assert rows["dense, equal total"]["parameters"] == pytest.approx(sparse["parameters"], rel=0.02)
    assert rows["dense, equal active"]["parameters"] == pytest.approx(sparse["active"], rel=0.02)
    assert all(float(str(row["median_ms"])) > 0 for row in rows.values())
