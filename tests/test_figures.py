import math
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pandas as pd
import pytest
from builders import make_measurement, make_record
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from mnist_lab import plots
from mnist_lab.data import DatasetName
from mnist_lab.models import PresetName
from mnist_lab.report.drawing import LATENCIES, find_models
from mnist_lab.report.figures import FIGURES, draw_all, pareto_set
from mnist_lab.report.records import Measurement, Record, save_record
from mnist_lab.training import RecipeName
from visualize_results import PlotOptions

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
]


def measurement_of(test_acc: float, file_mb: float, b64: float | None) -> Measurement:
    wrong = round(1000 * (1 - test_acc))
    confusion = np.diag([100] * 10)
    confusion[0, 1] += wrong
    confusion[0, 0] -= wrong
    latencies = {} if b64 is None else {"1": b64 / 10, "64": b64, "1024": b64 * 14}
    return replace(
        make_measurement(test_acc, file_mb),
        bins={
            "count": [0.0] * 13 + [40.0, 960.0],
            "confidence_sum": [0.0] * 13 + [36.0, 950.0],
            "correct": [0.0] * 13 + [30.0, 970.0 - wrong],
        },
        confusion=confusion.tolist(),
        latency_ms={
            batch: {"median_ms": ms, "q1_ms": 0.9 * ms, "q3_ms": 1.2 * ms, "num_calls": 9}
            for batch, ms in latencies.items()
        },
    )


def record_of(model: str, order: int, seed: int, measurement: Measurement) -> Record:
    is_moe, is_int8 = model.startswith("Sparse_MoE"), model.endswith(("INT8", "PTQ"))
    epoch = {
        "learning_rate": 0.1,
        "train_terms": {"cross_entropy": 0.2} | ({"balance": 0.01} if is_moe else {}),
        "validation_loss": 0.1,
        "expert_load": [0.4, 0.6] if is_moe else [],
    }
    return replace(
        make_record(model, seed, order, onnxruntime=measurement),
        parent={"model": "Sparse_MoE", "sha256": ""} if model == "KD_FFN_Student" else None,
        curves=[] if is_int8 else [epoch | {"epoch": k, "validation_acc": 0.9 + 0.02 * k} for k in (1, 2, 3)],
        expert_by_class=[[0.3, 0.7]] * 10 if is_moe and not is_int8 else None,
    )


def make_records(*, seeds: int = 1, without: tuple[str, ...] = (), untimed: tuple[str, ...] = ()) -> list[Record]:
    """All nine models; the accuracy of later seeds is a little lower."""
    return [
        record_of(name, order, seed, measurement_of(acc - 0.001 * seed, size, None if name in untimed else b64))
        for order, (name, acc, size, b64) in enumerate(MODELS)
        for seed in range(seeds)
        if name not in without
    ]


def legend_names(figure: Figure | None) -> list[str]:
    assert figure is not None
    return [text.get_text() for text in figure.legends[0].get_texts()]


def error_bars(figure: Figure | None, *, vertical: bool) -> list[ErrorbarContainer]:
    assert figure is not None
    bars = [bar for axes in figure.axes for bar in axes.containers if isinstance(bar, ErrorbarContainer)]
    return [bar for bar in bars if (bar.has_yerr if vertical else bar.has_xerr)]


def visualize(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "visualize_results.py", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_pareto_set_is_the_brute_force_one() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = generator.integers(0, 4, (12, 3)).astype(float)  # few values, so many ties
        table = pd.DataFrame(values, columns=plots.PARETO_COLUMNS)
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
    table = pd.DataFrame(rows, columns=plots.PARETO_COLUMNS, index=list("abcde"))
    assert pareto_set(table) == ["a", "b"]
    assert pareto_set(table.tail(1)) == []


def test_pareto_figure_names_the_dominated() -> None:
    names = legend_names(plots.pareto_frontier(make_records()))
    assert names[:3] == ["FFN_PTQ_INT8", "KD_FFN_Student", "KD_FFN_Student_INT8"]
    assert len(names) == 9
    assert all(name.endswith("(dominated)") for name in names[3:])


def test_full_set_gives_eleven_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DOTS_PER_INCH", 40)
    paths = draw_all(tmp_path, make_records(seeds=2, without=tuple(name for name, *_ in MODELS if "PTQ" in name)))
    names = [
        "accuracy_vs_size",
        "accuracy_vs_time",
        "pareto_frontier",
        "comparison_bars",
        "normalized_comparison",
        "training_curves",
        "confidence_histogram",
        "reliability_diagram",
        "expert_load",
        "confusion_matrices",
        "latency_by_runtime",
    ]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert sorted((tmp_path / "plots").iterdir()) == sorted(paths)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize(
    ("figure", "without"),
    [
        ("expert_load", ("Sparse_MoE",)),
        ("confidence_histogram", ("KD_FFN_Student",)),
        ("training_curves", tuple(name for name, *_ in MODELS if not name.endswith(("INT8", "PTQ")))),
    ],
)
def test_figure_without_data_is_left_out_and_its_file_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: str, without: tuple[str, ...]
) -> None:
    stale = tmp_path / "plots" / f"{figure}.png"
    stale.parent.mkdir()
    stale.write_bytes(b"old")
    monkeypatch.setattr(plots, "FIGURES", {figure: FIGURES[figure]})
    assert draw_all(tmp_path, make_records(without=without)) == []
    assert not stale.exists()
    assert draw_all(tmp_path, make_records()) == [stale]


def test_nothing_is_drawn_of_no_records(tmp_path: Path) -> None:
    assert draw_all(tmp_path, []) == []


def test_untimed_models_are_left_out_of_time_figures() -> None:
    records = make_records(untimed=("Sparse_MoE",))
    assert "Sparse_MoE" in legend_names(plots.accuracy_vs_size(records))
    assert not any(name.split(" ")[0] == "Sparse_MoE" for name in legend_names(plots.pareto_frontier(records)))
    figure = plots.accuracy_vs_time(records)
    assert "Sparse_MoE" not in legend_names(figure)
    assert figure is not None
    assert [len(axes.containers) for axes in figure.axes] == [8, 8, 8]
    assert plots.accuracy_vs_time(make_records(untimed=tuple(name for name, *_ in MODELS))) is None


def test_latencies_of_another_cpu_are_left_out() -> None:
    records = make_records()
    records[2] = replace(records[2], machine={"cpu": "elsewhere"})
    assert "Sparse_MoE" not in legend_names(plots.accuracy_vs_time(records))
    assert len(find_models(records)) == 9


def test_accuracy_has_error_bars_with_several_seeds_only() -> None:
    assert len(error_bars(plots.accuracy_vs_size(make_records(seeds=3)), vertical=True)) == 9
    assert error_bars(plots.accuracy_vs_size(make_records()), vertical=True) == []
    assert len(error_bars(plots.accuracy_vs_time(make_records()), vertical=False)) == 27


def test_bars_show_the_table() -> None:
    figure = plots.comparison_bars(make_records(untimed=("Sparse_MoE",)))
    assert figure is not None
    errors, *_, latencies, _ = (
        [patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle)] for axes in figure.axes
    )
    assert errors == pytest.approx([100 * (1 - acc) for _, acc, *_ in MODELS])
    assert latencies == pytest.approx([b64 for name, *_, b64 in MODELS if name != "Sparse_MoE"])
    assert "not measured" in [text.get_text() for text in figure.axes[4].texts]


def test_radar_is_not_clipped() -> None:
    figure = plots.normalized_comparison(make_records(untimed=("FFN_PTQ_INT8",)))
    assert figure is not None
    radii = [np.asarray(line.get_ydata(), dtype=float) for axes in figure.axes for line in axes.lines]
    low, high = figure.axes[0].get_ylim()
    assert low <= np.nanmin([np.nanmin(values) for values in radii])
    assert np.nanmax([np.nanmax(values) for values in radii]) == pytest.approx(1)
    assert high > 1
    assert np.isnan(radii[2]).any()  # FFN_PTQ_INT8 has a gap, not a zero


def test_radar_copes_with_a_perfect_model() -> None:
    table = pd.DataFrame([dict.fromkeys(["ece", "params_active", "file_mb", *LATENCIES], 1.0)] * 2)
    radii, _ = plots.radar_radii(table.assign(test_acc=[1.0, 0.98], ece=0.0))
    assert radii["error"].tolist() == pytest.approx([1, 1 - math.log10(2)])
    assert radii["ece"].tolist() == [1, 1]


def drawn_labels(figure: Figure) -> list[Text]:
    """Every text that shows, so without the ticks beyond the ends of an axis."""
    figure.canvas.draw()
    texts = [text for legend in figure.legends for text in legend.get_texts()] + list(figure.texts)
    for axes in figure.axes:
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [text for text in texts if text.get_text() and text.get_visible()]


@pytest.mark.parametrize("name", FIGURES)
def test_no_two_labels_overlap_or_leave_the_figure(name: str) -> None:
    figure = FIGURES[name](make_records(seeds=2))
    assert figure is not None
    boxes = [(text.get_text(), text.get_window_extent()) for text in drawn_labels(figure)]
    assert [(a, b) for (a, box), (b, other) in combinations(boxes, 2) if box.overlaps(other)] == []
    width, height = figure.bbox.size
    assert [a for a, box in boxes if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height] == []


def test_every_model_has_its_own_look() -> None:
    records = make_records()
    records += [replace(record, model=f"{record.model}-T10") for record in records[5:7]]
    looks = {model.name: (model.color, model.marker) for model in find_models(records)}
    assert len(set(looks.values())) == 11
    assert looks["KD_FFN_Student"][0] == looks["KD_FFN_Student-T10"][0]
    assert looks["KD_FFN_Student"] == {m.name: (m.color, m.marker) for m in find_models(records[5:6])}["KD_FFN_Student"]


def test_titles_say_what_was_run() -> None:
    for draw in FIGURES.values():
        figure = draw(make_records())
        assert figure is not None
        assert figure.get_suptitle().endswith("— mnist · compact · quick")


def test_plots_need_no_torch() -> None:
    code = "import sys, mnist_lab.report.figures, visualize_results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_script_draws_what_it_finds_or_is_told(tmp_path: Path) -> None:
    one, other = tmp_path / "results" / "one", tmp_path / "results" / "other"
    for record in make_records(without=tuple(name for name, *_ in MODELS[1:])):
        save_record(one, record)
        save_record(other, replace(record, recipe="best"))
    done = visualize("--recipe", "best", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (other / "plots" / "accuracy_vs_size.png").exists()
    assert not (one / "plots").exists()
    done = visualize("--results", one, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()[1::2]) == sorted(str(path) for path in (one / "plots").iterdir())


def test_script_tells_a_user_error_in_one_line(tmp_path: Path) -> None:
    done = visualize("--results", "nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    (record,) = make_records(without=tuple(name for name, *_ in MODELS[1:]))
    save_record(tmp_path / "results" / "one", record)
    done = visualize("--dataset", "kmnist", cwd=tmp_path)
    assert done.returncode == 2
    assert "--dataset kmnist" in done.stderr
    path = tmp_path / "results" / "one" / "runs" / "FFN_baseline-seed0.json"
    path.write_text(path.read_text()[:200])
    done = visualize(cwd=tmp_path)
    assert done.returncode == 2
    assert str(path.name) in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "results" / "one" / "plots").exists()


def test_script_admits_every_name_that_the_suite_has() -> None:
    """The script repeats the names, as the modules that define them import torch."""
    hints = get_type_hints(PlotOptions)
    for field, names in (("dataset", DatasetName), ("preset", PresetName), ("recipe", RecipeName)):
        literal = next(part for part in get_args(hints[field]) if part is not type(None))
        assert get_args(literal) == get_args(names)
