import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from builders import make_measurement, make_record
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from test_claims import make_evidence
from test_claims_compression import make_pruned

from mnist_lab.errors import RunFailed
from mnist_lab.report import drawing, figures, model_figures
from mnist_lab.report.columns import COLUMNS, Cost
from mnist_lab.report.columns import figure as figure_column
from mnist_lab.report.drawing import LONGEST_NAME, Look, choose_looks, shorten, spread, wrap, write_figures
from mnist_lab.report.figures import FIGURES, OF_COMPRESSED, draw_all, pareto_set, radar_radii, within_noise
from mnist_lab.report.records import CONTROL, Epoch, Measurement, Parent, Record
from mnist_lab.report.results import Results, listed
from mnist_lab.report.statistics import binomial_interval
from mnist_lab.studies.claims.compression_figures import PRUNING_CLAIM_FIGURES
from mnist_lab.studies.claims.draw import SUITES, draw_claims
from mnist_lab.studies.claims.evidence import Evidence
from mnist_lab.studies.claims.figures import CLAIM_FIGURES

ROOT = Path(__file__).parents[1]
MODELS = [  # name, test accuracy, file in MB, latency at batch 64 in ms
    ("FFN_baseline", 0.983, 0.94, 0.64),
    ("FFN_PTQ_INT8", 0.983, 0.24, 0.46),
    ("Sparse_MoE", 0.982, 2.93, 1.49),
    ("Sparse_MoE_INT8", 0.982, 0.77, 1.14),
    ("Sparse_MoE_PTQ", 0.982, 0.79, 1.14),
    ("KD_FFN_Student", 0.9796, 0.408, 0.289),
    ("KD_FFN_Student_from_FFN", 0.9787, 0.408, 0.293),
    ("FFN_Student_no_KD", 0.9788, 0.408, 0.292),
    ("KD_FFN_Student_INT8", 0.9792, 0.107, 0.243),
    ("FFN_BF16", 0.983, 0.47, 0.61),  # in PyTorch and OpenVINO only
]
NAMES = [name for name, *_ in MODELS]
TRAINED = [name for name in NAMES if not name.endswith(("INT8", "PTQ", "BF16"))]
LABELS = [name + (" (openvino)" if name.endswith("BF16") else "") for name in NAMES]
FRONTIER = ["FFN_PTQ_INT8", "KD_FFN_Student", "KD_FFN_Student_INT8"]
USUAL = {name: draw for name, draw in FIGURES.items() if name not in OF_COMPRESSED}
# What a figure can show only of some: of trained models, of a teacher and its students, of mixtures.
OF_SOME = {"training_curves", "confidence_histogram", "expert_load"}


def measurement_of(test_acc: float, file_mb: float, b64: float | None) -> Measurement:
    wrong = round(1000 * (1 - test_acc))
    confusion = np.diag([100] * 10)
    confusion[0, 1] += wrong
    confusion[0, 0] -= wrong
    latencies = {} if b64 is None else {"1": b64 / 10, "64": b64, "1024": b64 * 14}
    return replace(
        make_measurement(test_acc, file_mb),
        bins={
            "count": [0.0] * 12 + [4.0, 36.0, 960.0],
            "confidence_sum": [0.0] * 12 + [3.4, 32.0, 950.0],
            "correct": [0.0] * 12 + [3.0, 27.0, 970.0 - wrong],
        },
        confusion=confusion.tolist(),
        latency_ms={
            batch: {"median_ms": ms, "q1_ms": 0.9 * ms, "q3_ms": 1.2 * ms, "num_calls": 9}
            for batch, ms in latencies.items()
        },
    )


def record_of(model: str, seed: int, test_acc: float, file_mb: float, b64: float | None) -> Record:
    is_moe, is_trained = model.startswith("Sparse_MoE"), model in TRAINED
    measurement = measurement_of(test_acc, file_mb, b64)
    measurements = {"onnxruntime": measurement}
    if model.endswith("BF16"):
        measurements = {"pytorch": measurement_of(test_acc, file_mb, b64 and 2 * b64), "openvino": measurement}
    curves: list[Epoch] = [
        {
            "epoch": k,
            "learning_rate": 0.1,
            "train_terms": {"cross_entropy": 0.2} | ({"balance": 0.01} if is_moe else {}),
            "validation_loss": 0.1,
            "validation_acc": 0.9 + 0.02 * k,
            "expert_load": [0.4, 0.6] if is_moe else [],
            "dropped_share": None,
        }
        for k in (1, 2, 3)
    ]
    teacher: Parent = {"model": "Sparse_MoE", "file": f"Sparse_MoE-seed{seed}.safetensors", "sha256": ""}
    record = make_record(model, seed, **measurements)
    return replace(
        record,
        parents={"teacher": teacher} if model == "KD_FFN_Student" else record.parents,
        curves=curves if is_trained else [],
        expert_by_class=[[0.3, 0.7]] * 10 if is_moe and is_trained else None,
    )


def make_records(*, seeds: int = 1, without: tuple[str, ...] = (), untimed: tuple[str, ...] = ()) -> list[Record]:
    """All models; the accuracy of later seeds is a little lower."""
    return [
        record_of(name, seed, acc - 0.001 * seed, size, None if name in untimed else b64)
        for name, acc, size, b64 in MODELS
        for seed in range(seeds)
        if name not in without
    ]


def make_results(*, seeds: int = 1, without: tuple[str, ...] = (), untimed: tuple[str, ...] = ()) -> Results:
    return Results(make_records(seeds=seeds, without=without, untimed=untimed), NAMES)


def legend_names(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [text.get_text() for text in figure.legends[0].get_texts()]


def error_bars(figure: Figure | None, *, vertical: bool) -> list[ErrorbarContainer]:
    assert figure is not None
    bars = [bar for axes in figure.axes for bar in axes.containers if isinstance(bar, ErrorbarContainer)]
    return [bar for bar in bars if (bar.has_yerr if vertical else bar.has_xerr)]


def footnote(figure: Figure | None) -> str:
    assert figure is not None
    return figure.get_supxlabel().replace("\n", " ")


def test_pareto_set_is_the_brute_force_one() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = generator.integers(0, 4, (12, 3)).astype(float)  # few values, so many ties
        table = pd.DataFrame(values, columns=figures.PARETO_COLUMNS)
        expected = []
        for i, (acc, size, ms) in enumerate(values):
            others = [row for j, row in enumerate(values) if j != i]
            if not any(
                a >= acc and s <= size and m <= ms and (a > acc or s < size or m < ms) for a, s, m in others
            ):  # fmt: skip
                expected.append(i)
        assert pareto_set(table) == expected


def test_pareto_set_keeps_equals_and_ignores_blanks() -> None:
    rows = [[0.9, 1, 1], [0.9, 1, 1], [0.9, 1, 2], [0.8, 2, 2], [0.99, 0.1, math.nan]]
    table = pd.DataFrame(rows, columns=figures.PARETO_COLUMNS, index=list("abcde"))
    assert pareto_set(table) == ["a", "b"]
    assert pareto_set(table.tail(1)) == []


def test_pareto_figure_names_the_dominated() -> None:
    names = legend_names(figures.pareto_frontier(make_results()))
    assert names[: len(FRONTIER)] == FRONTIER
    dominated = [label for label in LABELS if label not in FRONTIER]
    assert names[len(FRONTIER) :] == [f"{label} (dominated)" for label in dominated]


def test_pareto_figure_says_which_accuracies_are_noise() -> None:
    results = make_results()
    groups = within_noise([model for model in results.models if model.name in FRONTIER])
    assert [{model.name for model in group} for group in groups] == [set(FRONTIER)]
    text = footnote(figures.pareto_frontier(results))
    assert "FFN_PTQ_INT8, KD_FFN_Student and KD_FFN_Student_INT8 are within noise of each other" in text
    far = Results([record_of("FFN_baseline", 0, 0.98, 1, 2), record_of("Sparse_MoE", 0, 0.92, 0.5, 1)])
    assert within_noise(far.models) == []
    assert "noise" not in footnote(figures.pareto_frontier(far))


@pytest.mark.slow
def test_full_set_gives_a_file_for_every_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "DOTS_PER_INCH", 40)
    paths = list(draw_all(tmp_path, make_results(seeds=2)))
    assert [path.name for path in paths] == [f"{name}.png" for name in USUAL]
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(
    ("figure", "without"),
    [
        ("expert_load", ("Sparse_MoE",)),
        ("confidence_histogram", ("KD_FFN_Student",)),
        ("training_curves", tuple(TRAINED)),
    ],
)
def test_figure_without_data_is_left_out_and_its_file_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: str, without: tuple[str, ...]
) -> None:
    stale = tmp_path / "plots" / f"{figure}.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    monkeypatch.setattr(figures, "FIGURES", {figure: FIGURES[figure]})
    assert list(draw_all(tmp_path, make_results(without=without))) == []
    assert not stale.exists()
    assert list(draw_all(tmp_path, make_results())) == [stale]


def test_nothing_is_drawn_of_no_records(tmp_path: Path) -> None:
    assert list(draw_all(tmp_path, Results([], NAMES))) == []


def small_figure(text: str = "") -> Figure:
    figure = Figure(figsize=(1, 1))
    figure.text(0.5, 0.5, text)
    return figure


def fail() -> Figure:
    raise ValueError("no luck\nat all")


def test_figure_that_fails_costs_no_other_and_is_named_in_the_end(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "first.png").write_bytes(b"of an earlier run")
    drawn = []

    def last() -> Figure:
        drawn.append("last")
        return small_figure()

    # The third fails only once it is rendered.
    draws = {"first": fail, "second": small_figure, "third": lambda: small_figure(r"$\nothing$"), "last": last}
    paths = write_figures(tmp_path, draws)
    assert next(paths) == tmp_path / "plots" / "second.png"
    assert (tmp_path / "plots" / "second.png").exists()
    assert drawn == []
    assert next(paths) == tmp_path / "plots" / "last.png"
    with pytest.raises(RunFailed, match=r"first \(ValueError: no luck\); third \(ValueError: ") as failed:
        next(paths)
    assert "\n" not in str(failed.value)
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["last.png", "second.png"]


def test_folder_that_cannot_be_written_ends_it_at_once(tmp_path: Path) -> None:
    (tmp_path / "plots").write_text("a file")
    drawn = []

    def draw() -> Figure:
        drawn.append(1)
        return small_figure()

    with pytest.raises(RunFailed, match="cannot write"):
        list(write_figures(tmp_path, {"one": draw, "two": draw}))
    assert drawn == [1]


def test_one_figure_of_the_records_or_claims_that_fails_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_on(_: object) -> Figure:
        return fail()

    for found in (FIGURES, *(suite.figures for suite in SUITES.values())):
        assert isinstance(found, dict)
        kept = next(iter(found))
        monkeypatch.setitem(found, kept, lambda _: small_figure())
        for name in list(found)[1:]:
            monkeypatch.setitem(found, name, fail_on)
    of_claims = [draw_claims(tmp_path, [], suite) for suite in SUITES]
    for paths in (draw_all(tmp_path, make_results()), *of_claims):
        assert next(paths).exists()
        with pytest.raises(RunFailed, match="no luck"):
            next(paths)


USER_SETTINGS = {
    "figure.facecolor": "black",
    "savefig.facecolor": "black",
    "text.usetex": True,
    "font.size": 20,
    "lines.linewidth": 5,
    "axes.grid": False,
    "figure.dpi": 50,
    "savefig.dpi": 300,
    "savefig.bbox": "tight",
    "path.sketch": (1, 100, 2),
}


@pytest.mark.slow
def test_files_do_not_hang_on_the_users_settings_which_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "DOTS_PER_INCH", 40)
    results = make_results(seeds=2)
    expected = {path.name: path.read_bytes() for path in draw_all(tmp_path / "own", results)}
    with matplotlib.rc_context(USER_SETTINGS):  # type: ignore[arg-type]
        before = dict(matplotlib.rcParams)
        drawn = {}
        for path in draw_all(tmp_path / "users", results):
            assert dict(matplotlib.rcParams) == before
            drawn[path.name] = path.read_bytes()
        assert dict(matplotlib.rcParams) == before
    assert [name for name in USUAL if drawn[f"{name}.png"] != expected[f"{name}.png"]] == []


DRAWING_MODULES = (
    "report.drawing",
    "report.results",
    "report.model_figures",
    "report.compression_figures",
    "report.few_bits_figures",
    "report.figures",
    "studies.claims.figures",
    "studies.claims.draw",
)


@pytest.mark.slow
@pytest.mark.parametrize("module", DRAWING_MODULES)
def test_backend_that_is_not_there_keeps_nothing_from_being_imported(module: str) -> None:
    backend = "module://matplotlib_inline.backend_inline"  # as Jupyter exports it to all that it starts
    code = f"import os, mnist_lab.{module}; assert os.environ['MPLBACKEND'] == '{backend}'"
    environment = os.environ | {"MPLBACKEND": backend}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 0


@pytest.mark.parametrize("first", ["matplotlib", "mnist_lab.report.drawing"])
def test_backend_that_is_there_stays_chosen(first: str) -> None:
    code = f"import {first}, mnist_lab.report.drawing, matplotlib; assert matplotlib.get_backend() == 'svg'"
    environment = os.environ | {"MPLBACKEND": "svg"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 0


def test_import_does_not_undo_the_users_choice_of_a_backend() -> None:
    code = "import matplotlib; matplotlib.use('pdf'); import mnist_lab.report.drawing; "
    code += "assert matplotlib.get_backend() == 'pdf'"
    environment = os.environ | {"MPLBACKEND": "svg"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=False).returncode == 0


def test_untimed_models_are_left_out_of_time_figures() -> None:
    results = make_results(untimed=("Sparse_MoE",))
    assert "Sparse_MoE" in legend_names(figures.accuracy_vs_size(results))
    assert not any(name.split(" ")[0] == "Sparse_MoE" for name in legend_names(figures.pareto_frontier(results)))
    figure = figures.accuracy_vs_time(results)
    assert "Sparse_MoE" not in legend_names(figure)
    assert figure is not None
    assert [len(axes.containers) for axes in figure.axes] == [len(NAMES) - 1] * 3
    assert figures.accuracy_vs_time(make_results(untimed=tuple(NAMES))) is None


def test_figures_of_untimed_models_have_no_frontier_and_no_latencies() -> None:
    results = make_results(untimed=tuple(NAMES))
    assert legend_names(figures.normalized_comparison(results)) == [model.label for model in results.models]
    bars = figures.comparison_bars(results)
    assert bars is not None
    assert not any("latency" in axes.get_xlabel() for axes in bars.axes)


def test_latencies_of_another_cpu_are_left_out() -> None:
    records = make_records()
    records[2] = elsewhere(records[2])
    results = Results(records, NAMES)
    assert "Sparse_MoE" not in legend_names(figures.accuracy_vs_time(results))
    assert [model.name for model in results.models] == NAMES
    for draw in (figures.accuracy_vs_time, figures.pareto_frontier, figures.comparison_bars):
        text = footnote(draw(results))
        assert "1 thread, here; left out, as it does not compare: latency of Sparse_MoE (1 thread, elsewhere)" in text
    assert "left out" not in footnote(figures.accuracy_vs_size(results))
    bars = figures.comparison_bars(results)
    assert bars is not None
    texts = {axes.get_xlabel(): [text.get_text() for text in axes.texts] for axes in bars.axes}
    assert texts["latency of a batch of 64 (ms)"][2] == "left out"
    assert "left out" not in texts["test error (%)"]


def elsewhere(record: Record) -> Record:
    return replace(record, machine={**record.machine, "cpu": "elsewhere"})


def drawn_times(figure: Figure | None) -> dict[tuple[str, str], float]:
    """By model and runtime, at batch 64."""
    assert figure is not None
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    return {
        (names[round(float(y))], str(line.get_label())): float(x)
        for line in figure.axes[1].lines
        for x, y in zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True)
    }


def test_latencies_by_runtime_are_of_one_cpu_and_thread_count() -> None:
    records = make_records()
    assert len(drawn_times(figures.latency_by_runtime(Results(records, NAMES)))) == len(NAMES) + 1
    records[1] = elsewhere(records[1])
    records[4] = elsewhere(records[4])
    records[9].measurements["openvino"].threads = 4
    records[9].measurements["openvino"].latency_session = "another"
    figure = figures.latency_by_runtime(Results(records, NAMES))
    times = drawn_times(figure)
    assert {model for model, _ in times} == set(NAMES) - {"FFN_PTQ_INT8", "Sparse_MoE_PTQ"}
    assert [runtime for model, runtime in times if model == "FFN_BF16"] == ["pytorch"]
    assert footnote(figure) == (
        "median, 1 thread, here; left out, as it does not compare: latency of FFN_PTQ_INT8 in onnxruntime and "
        "Sparse_MoE_PTQ in onnxruntime (1 thread, elsewhere); left out, as it does not compare: latency of FFN_BF16 "
        "in openvino (4 threads, here)"
    )


def test_first_timed_model_says_on_which_cpu_and_threads_latencies_count() -> None:
    records = [elsewhere(make_records()[0]), *make_records(untimed=("FFN_PTQ_INT8",))[1:]]
    times = drawn_times(figures.latency_by_runtime(Results(records, NAMES)))
    assert {model for model, _ in times} == {"FFN_baseline"}
    records[0].measurements["onnxruntime"].latency_ms = {}
    times = drawn_times(figures.latency_by_runtime(Results(records, NAMES)))
    assert {model for model, _ in times} == set(NAMES) - {"FFN_baseline", "FFN_PTQ_INT8"}


def test_runtime_of_a_model_is_its_fastest_under_the_conditions_that_count() -> None:
    records = make_records()
    records[9].measurements["openvino"].threads = 4  # faster, but not on the others' terms
    model = Results(records, NAMES).models[9]
    assert (model.runtime, model.row["latency_ms_b64"]) == ("pytorch", 1.22)


def test_confidences_and_loads_say_which_seeds_they_are_of() -> None:
    records = [record for record in make_records(seeds=3) if record.model != "Sparse_MoE" or record.seed > 0]
    results = Results(records, NAMES)
    assert "mean of 2–3 seeds" in footnote(model_figures.confidence_histogram(results))
    assert footnote(model_figures.expert_load(results)).startswith("first seed (1)")
    moe = next(record for record in records if record.model == "Sparse_MoE")
    other = replace(moe, row="Sparse_MoE-E8", seed=4)
    assert footnote(model_figures.expert_load(Results([moe, other]))).startswith("first seed of each model")


def test_model_that_onnx_runtime_lacks_is_drawn_in_its_fastest_runtime_which_its_name_and_the_footnote_say() -> None:
    results = make_results()
    model = results.models[NAMES.index("FFN_BF16")]
    assert (model.runtime, model.label) == ("openvino", "FFN_BF16 (openvino)")
    assert model.row["latency_ms_b64"] == 0.61
    assert "or as the name says" in footnote(figures.accuracy_vs_size(results))
    untimed = make_results(untimed=("FFN_BF16",)).models[NAMES.index("FFN_BF16")]
    assert untimed.runtime == "pytorch"  # the first
    others = make_results(without=("FFN_BF16",))
    assert footnote(figures.accuracy_vs_size(others)).startswith("ONNX Runtime; 1 seed")


@pytest.mark.parametrize("name", sorted(set(USUAL) - OF_SOME))
def test_every_model_is_in_every_figure(name: str) -> None:
    figure = USUAL[name](make_results())
    assert figure is not None
    words = "\n".join(text.get_text() for text in drawn_labels(figure))
    expected = NAMES if name == "latency_by_runtime" else LABELS
    assert [label for label in expected if label not in words] == []


def test_accuracy_has_an_interval_over_seeds_or_that_of_the_test_images() -> None:
    single, several = make_results(), make_results(seeds=3)
    for results in (single, several):
        assert len(error_bars(figures.accuracy_vs_size(results), vertical=True)) == len(NAMES)
        assert len(error_bars(figures.accuracy_vs_time(results), vertical=False)) == 3 * len(NAMES)
    assert "error bars: 95 % binomial interval of the 1,000 test images" in footnote(figures.accuracy_vs_size(single))
    assert "error bars: 95 % interval over seeds" in footnote(figures.accuracy_vs_size(several))
    assert single.models[0].accuracy_interval == binomial_interval(0.983, 1000)
    figure = figures.accuracy_vs_size(single)
    (low, high), *_ = [bar.lines[2][0].get_segments()[0][:, 1] for bar in error_bars(figure, vertical=True)]
    assert (low / 100, high / 100) == pytest.approx(binomial_interval(0.983, 1000))
    both = Results([*make_records(seeds=2, without=tuple(NAMES[1:])), *make_records()[1:]], NAMES)
    assert "interval over seeds, of a single seed binomial interval of the" in footnote(figures.accuracy_vs_size(both))


def test_bars_show_the_table() -> None:
    results = make_results(untimed=("Sparse_MoE",))
    figure = figures.comparison_bars(results)
    assert figure is not None
    panels = {axes.get_xlabel(): axes for axes in figure.axes}
    assert list(panels) == [column.cost.label for column in COLUMNS if column.cost]
    widths = {
        label: [patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle)]
        for label, axes in panels.items()
    }
    assert widths["test error (%)"] == pytest.approx([100 * (1 - acc) for _, acc, *_ in MODELS])
    latency = "latency of a batch of 64 (ms)"
    assert widths[latency] == pytest.approx([0 if name == "Sparse_MoE" else b64 for name, *_, b64 in MODELS])
    texts = [text.get_text() for text in panels[latency].texts]
    assert [name for name, text in zip(NAMES, texts, strict=True) if text == "not measured"] == ["Sparse_MoE"]


def test_column_of_a_user_is_in_bars_and_radar() -> None:
    column = figure_column("zeros", lambda model: 0.0, cost=Cost("weights that are not zero (%)", "dense", _dense))
    records = [replace(r, figures={"zeros": 0.1 * (1 + r.seed)}) for r in make_records(seeds=2)]
    results = Results(records, NAMES, (*COLUMNS, column))
    bars, radar = figures.comparison_bars(results), figures.normalized_comparison(results)
    assert bars is not None
    assert radar is not None
    (panel,) = [axes for axes in bars.axes if axes.get_xlabel() == "weights that are not zero (%)"]
    widths = [patch.get_width() for patch in panel.patches if isinstance(patch, Rectangle)]
    assert widths == pytest.approx([85.0] * len(NAMES))
    assert any(isinstance(container, ErrorbarContainer) for container in panel.containers)
    assert "dense" in [label.get_text() for label in radar.axes[0].get_xticklabels()]
    old = Results(make_records(), NAMES, (*COLUMNS, column))  # whose records do not have it
    assert column.name not in [column.name for column, _ in old.costs]


def _dense(zeros: float) -> float:
    return 100 * (1 - zeros)


def test_radar_is_not_clipped() -> None:
    figure = figures.normalized_comparison(make_results(untimed=("FFN_PTQ_INT8",)))
    assert figure is not None
    (axes,) = figure.axes
    radii = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    assert len(radii) == len(NAMES)
    low, high = axes.get_ylim()
    assert low <= np.nanmin([np.nanmin(values) for values in radii])
    assert np.nanmax([np.nanmax(values) for values in radii]) == pytest.approx(1)
    assert high > 1
    assert sum(np.isnan(values).any() for values in radii) == 1  # FFN_PTQ_INT8 has a gap, not a zero


def test_radar_copes_with_a_perfect_model() -> None:
    radii, _ = radar_radii(pd.DataFrame({"test_acc": [0.0, 2.0], "ece": [0.0, 0.0], "file_mb": [1.0, math.nan]}))
    assert radii["test_acc"].tolist() == pytest.approx([1, 1 - math.log10(2)])
    assert radii["ece"].tolist() == [1, 1]
    assert math.isnan(radii["file_mb"][1])


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["$a$", "circle", "a very long name"], [r"\$a\$", "circle", "a ve… name"]),
        ([f"c{place}" for place in range(200)], [f"c{place}" if place % 7 == 0 else "" for place in range(200)]),
    ],
)
def test_classes_of_any_number_are_named_where_there_is_room(names: list[str], shown: list[str]) -> None:
    (record,) = make_records(without=tuple(NAMES[1:]))
    confusion = np.diag([5] * len(names))
    confusion[0, 1] = 3
    for measurement in record.measurements.values():
        measurement.confusion = confusion.tolist()
    record.architecture = {"data": {"classes": names, "num_classes": len(names)}}
    figure = model_figures.confusion_matrices(Results([record]))
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == shown
    assert [text.get_text() for text in axes.texts] == (["3"] if len(names) == 3 else [])
    figure.draw_without_rendering()


def test_older_record_without_bins_or_confusion_is_left_out_of_their_figures() -> None:
    records = make_records()
    old = records[0].measurements["onnxruntime"]
    old.bins, old.confusion = {}, None  # type: ignore[assignment]
    results = Results(records, NAMES)
    for draw in (model_figures.reliability_diagram, model_figures.confusion_matrices):
        figure = draw(results)
        assert figure is not None
        assert [axes.get_title().split("\n")[0] for axes in figure.axes] == LABELS[1:]
    assert model_figures.confusion_matrices(Results(records[:1])) is None
    assert len(error_bars(figures.accuracy_vs_size(results), vertical=True)) == len(NAMES) - 1


def test_reliability_has_no_lines_and_faint_points_for_few_images() -> None:
    figure = model_figures.reliability_diagram(make_results())
    assert figure is not None
    for axes in figure.axes:
        (diagonal,) = [line for line in axes.lines if line.get_linestyle() != "None"]
        assert diagonal.get_linestyle() == "--"
        solid, faint = [points for points in axes.collections if type(points).__name__ == "PathCollection"]
        assert [np.shape(points.get_offsets())[0] for points in (solid, faint)] == [2, 1]
        assert (solid.get_alpha() or 0) > (faint.get_alpha() or 0)
        # Of 36 images with 27 right.
        low, high = binomial_interval(27 / 36, 36)
        segments = axes.containers[0].lines[2][0].get_segments()  # type: ignore[attr-defined]
        assert segments[0][:, 1] == pytest.approx([100 * low, 100 * high])


def test_error_bars_are_never_negative() -> None:
    assert spread(1.0, 1 + 1e-16, 1 - 1e-16).tolist() == [[0.0], [0.0]]
    assert spread([1, 5], [0.75, 3], [1.5, 4.9]).tolist() == [[0.25, 2], [0.5, 0]]


def is_unstable(value: float) -> bool:
    """Whether the mean of three of it lies off it, by rounding."""
    return float(np.mean([value] * 3)) != value


def test_seeds_that_agree_are_drawn() -> None:
    counts = [count for count in range(1, 120) if is_unstable(100 * count / 1000)][:14]
    means = [np.mean([100 * count / 1000] * 3) - 100 * count / 1000 for count in counts]
    assert min(means) < 0 < max(means)
    records = make_records(seeds=3)
    for record in records:
        for measurement in record.measurements.values():
            bins = [*map(float, counts), 1000.0 - sum(counts)]
            measurement.bins = {"count": bins, "confidence_sum": bins, "correct": bins}
            measurement.test_acc = 0.983
    results = Results(records, NAMES)
    for draw in USUAL.values():
        assert draw(results) is not None


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_models_that_are_always_right_or_wrong_are_drawn(accuracy: float) -> None:
    records = [record_of(name, 0, 0.98, size, b64) for name, _, size, b64 in MODELS]
    for record in records:
        for measurement in record.measurements.values():
            measurement.test_acc = accuracy
    for draw in USUAL.values():
        assert draw(Results(records, NAMES)) is not None


def test_loads_of_seeds_that_agree_are_drawn(tmp_path: Path) -> None:
    evidence, _ = make_evidence(tmp_path)
    share = next(count / 1000 for count in range(1, 100) if is_unstable(100 * (count / 1000)))
    for seed in evidence.seeds:
        for model in evidence.find("Sparse_MoE"):
            evidence.run(model, seed).curves[-1]["expert_load"] = [1 - 3 * share, share, share, share]
    assert CLAIM_FIGURES["load_by_balance"](evidence) is not None


def drawn_labels(figure: Figure) -> list[Text]:
    """Every text that shows, so without the ticks beyond the ends of an axis."""
    figure.draw_without_rendering()
    legends = [*figure.legends, *[axes.get_legend() for axes in figure.axes]]
    texts = [text for legend in legends if legend is not None for text in legend.get_texts()] + list(figure.texts)
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in texts if text.get_text() and text.get_visible()]


def assert_readable(figure: Figure | None) -> None:
    """No two texts overlap, none leaves the figure, and the panels are large enough to see something."""
    assert figure is not None
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_labels(figure)]
    assert [(a, b) for (a, box), (b, other) in combinations(boxes, 2) if box.overlaps(other)] == []
    (right, top), dpi = figure.bbox.size, figure.dpi
    assert [a for a, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > right or box.y1 > top] == []
    panels = [axes.bbox for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert [panel for panel in panels if panel.width < 1.5 * dpi or panel.height < 0.9 * dpi] == []
    assert max(right, top) < 2**16  # more dots than Agg draws


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("name", USUAL)
def test_no_two_labels_overlap_or_leave_the_figure(name: str, seeds: int) -> None:
    assert_readable(USUAL[name](make_results(seeds=seeds)))


def many_records(num: int, name_of: Callable[[str, int], str]) -> list[Record]:
    """So many models: the usual ones again and again, each round by names of its own."""
    rounds = [
        replace(
            record,
            row=name_of(record.row, number),
            parents={
                role: {**parent, "model": name_of(parent["model"], number)} for role, parent in record.parents.items()
            },
        )
        for number in range(math.ceil(num / len(NAMES)))
        for record in sorted(make_records(), key=lambda record: not record.model.startswith("Sparse_MoE"))
    ]
    return rounds[:num]


NAMINGS: Mapping[str, Callable[[str, int], str]] = {
    "usual": lambda name, number: f"{name}-E{number + 4}-K2-epochs10" if number else name,
    "long": lambda name, number: f"{name}-{'long' * 20}-{number}-".ljust(200, "x"),
    "wide": lambda name, number: f"{name}{'W' * 80}{number}".ljust(200, "M"),
}


@pytest.mark.slow
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("num", [1, 12, 60])
@pytest.mark.parametrize("name", USUAL)
def test_figures_hold_few_and_many_models_of_any_name(name: str, num: int, naming: str) -> None:
    records = many_records(num, NAMINGS[naming])
    assert len({record.model for record in records}) == num
    if naming != "usual":
        assert {len(record.model) for record in records} == {200}
    figure = USUAL[name](Results(records, NAMES))
    if (name, num) == ("confidence_histogram", 1):
        assert figure is None  # a student and its teacher are two
    else:
        assert_readable(figure)


@pytest.mark.slow
@pytest.mark.parametrize("name", USUAL)
def test_long_names_are_shown_short_and_take_no_height_from_the_panels(name: str) -> None:
    usual, long = (USUAL[name](Results(many_records(12, NAMINGS[naming]), NAMES)) for naming in ("usual", "long"))
    assert usual is not None
    assert long is not None
    words = [word for text in drawn_labels(long) for word in text.get_text().replace("\n", "").split()]
    assert max(map(len, words)) <= LONGEST_NAME
    heights = [min(axes.bbox.height for axes in figure.axes) for figure in (usual, long) if drawn_labels(figure)]
    assert heights[1] >= 0.95 * heights[0]


def test_names_of_many_models_stand_in_several_columns() -> None:
    figure = figures.accuracy_vs_size(Results(many_records(60, NAMINGS["usual"]), NAMES))
    assert figure is not None
    assert max(figure.get_size_inches()) < 15


def test_figure_grows_by_the_lines_of_a_long_footnote_and_title() -> None:
    heights = {}
    for title in ("Title", "A title of many words " * 20):
        for note in ("A note.", "A note of many words. " * 200):
            figure, (axes,) = drawing.make_figure(make_records()[:1], title, size=(6, 4))
            drawing.write_footnote(figure, note)
            assert_readable(figure)
            heights[title, note] = axes.bbox.height / figure.dpi
    assert min(heights.values()) > max(heights.values()) - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIM_FIGURES)
def test_labels_of_claims_do_not_overlap_or_leave_the_figure(name: str, tmp_path: Path) -> None:
    evidence, settings = make_evidence(tmp_path)
    assert_readable(CLAIM_FIGURES[name](settings.grid if name == "temperature_and_alpha" else evidence))


@pytest.mark.slow
@pytest.mark.parametrize("name", PRUNING_CLAIM_FIGURES)
def test_labels_of_claims_about_pruning_do_not_overlap_or_leave_the_figure(name: str, tmp_path: Path) -> None:
    assert_readable(PRUNING_CLAIM_FIGURES[name](make_pruned(tmp_path)))


def test_small_grid_of_temperatures_has_a_title_that_fits(tmp_path: Path) -> None:
    _, settings = make_evidence(tmp_path)
    shown = [f"KD_FFN_Student{tags}" for tags in ("", "-T5", "-a0.9", "-T5-a0.9")]
    records = [settings.grid.run(row, seed) for row in (*shown, CONTROL) for seed in settings.grid.seeds]
    assert_readable(CLAIM_FIGURES["temperature_and_alpha"](Evidence(tmp_path, records, settings.grid.seeds)))


def test_long_names_are_short_and_tell_models_apart() -> None:
    names = [*NAMES, "x" * LONGEST_NAME, *[f"{'a' * 80}{number}{'z' * 80}" for number in range(12)]]
    shown = shorten(names)
    assert [*shown] == names
    assert len(set(shown.values())) == len(names)
    assert [shown[name] for name in names[: len(NAMES) + 1]] == names[: len(NAMES) + 1]
    assert all(len(label) <= LONGEST_NAME for label in shown.values())
    assert all(shown[name].startswith("aaa") and shown[name].endswith("zzz") for name in names[-12:])


def test_lines_are_no_wider_than_they_may_be_and_break_before_hyphens() -> None:
    lines = wrap("KD_FFN_Student_from_FFN-T10-a0.9-epochs10", 2, 9).split("\n")
    assert lines == ["KD_FFN_Student_from_FFN-T10", "-a0.9-epochs10"]
    renderer = FigureCanvasAgg(Figure(dpi=100)).get_renderer()
    for text in ("W" * 100, "usual words in a line " * 10):
        lines = wrap(text, 2, 9).split("\n")
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        widths = [
            Text(text=line, fontsize=9, figure=Figure(dpi=100)).get_window_extent(renderer).width for line in lines
        ]
        assert 150 < max(widths) < 203
    assert wrap("W", 0.01, 9) == "W"


def test_panels_beyond_a_limit_are_said_to_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_figures, "MAX_PANELS", 3)
    for draw in (model_figures.reliability_diagram, model_figures.confusion_matrices):
        figure = draw(make_results())
        assert figure is not None
        assert len(figure.axes) == 3
        assert footnote(figure).endswith(f"{len(NAMES) - 3} more models not shown")
    monkeypatch.setattr(model_figures, "MAX_PANELS", len(NAMES))
    assert "not shown" not in footnote(model_figures.confusion_matrices(make_results()))


def test_footnote_lists_some_of_many_names() -> None:
    names = [f"m{number}" for number in range(10)]
    assert listed(names[:1]) == "m0"
    assert listed(names[:2]) == "m0 and m1"
    assert listed(names[:8]) == "m0, m1, m2, m3, m4, m5, m6 and m7"
    assert listed(names) == "m0, m1, m2, m3, m4, m5, m6, m7 and 2 more"


def test_every_model_has_its_own_look_however_many_there_are() -> None:
    order = [f"Family_{number:02}" for number in range(40)]
    models = [(f"{family}{suffix}", family, "FP32") for family in order for suffix in ("", "-x")]
    models += [(f"{order[0]}-{number}", order[0], "INT8") for number in range(10)]
    models += [(f"Unknown_{number}", f"Unknown_{number}", "BF16") for number in range(10)]
    looks = choose_looks(models, order)
    assert len(looks) == len(models) == 100
    assert set(Counter((look.color, look.marker) for look in looks.values()).values()) == {1}
    for name, family, precision in models:
        assert looks[name].precision == precision
        if family in order:
            assert looks[name].color == looks[family].color
    for family in order:
        assert choose_looks([(family, family, "FP32")], order) == {family: looks[family]}


def test_look_tells_the_precision() -> None:
    full, half, hollow = (Look("#0173b2", "o", precision) for precision in ("FP32", "BF16", "INT8"))
    assert same_color(full.line["markerfacecolor"], "#0173b2")
    assert same_color(hollow.line["markerfacecolor"], "white")
    assert [look.line["fillstyle"] for look in (full, half)] == ["full", "left"]
    assert len({look.face for look in (full, half, hollow)}) == 3


def test_variants_of_a_model_have_its_colour_and_do_not_change_its_look() -> None:
    records = make_records()
    variants = [replace(record, row=f"{record.row}-T10") for record in records[5:7]]
    looks = {model.name: model.look for model in Results([*records, *variants], NAMES).models}
    alone = {model.name: model.look for model in Results(records[5:6], NAMES).models}
    assert looks["KD_FFN_Student"] == alone["KD_FFN_Student"]
    assert looks["KD_FFN_Student"].color == looks["KD_FFN_Student-T10"].color
    assert looks["KD_FFN_Student"].marker != looks["KD_FFN_Student-T10"].marker


def test_titles_say_what_was_run() -> None:
    for draw in USUAL.values():
        figure = draw(make_results())
        assert figure is not None
        assert figure.get_suptitle().endswith("— mnist · compact · quick")


def test_terms_of_the_loss_are_said_to_be_unweighted() -> None:
    assert "before its weight" in footnote(model_figures.training_curves(make_results()))


def test_reports_need_no_torch() -> None:
    modules = ", ".join(f"mnist_lab.report.{name}" for name in ("figures", "text", "table"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'seaborn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
