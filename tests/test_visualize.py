"""The script that draws the plots again."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pandas as pd
import pytest
from builders import make_record
from own_images import draw_shapes
from test_figures import NAMES, ROOT, elsewhere, fail, make_records, small_figure

import visualize_results
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.machine import cpu_model
from mnist_lab.models import PresetName
from mnist_lab.own_data import OwnSource
from mnist_lab.report import figures
from mnist_lab.report.records import BASELINE, FileId, Record, save_record
from mnist_lab.report.table import build_table
from mnist_lab.report.text import write_table
from mnist_lab.training import RecipeName
from visualize_results import PlotOptions


def visualize(*arguments: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "visualize_results.py", *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_script_draws_the_same_with_a_notebooks_backend_and_a_matplotlibrc(tmp_path: Path) -> None:
    save_record(tmp_path / "results" / "one", make_record())
    plots = tmp_path / "results" / "one" / "plots"
    assert visualize(cwd=tmp_path).returncode == 0
    expected = {path.name: path.read_bytes() for path in plots.iterdir()}
    assert expected
    (tmp_path / "matplotlibrc").write_text("figure.facecolor: black\ntext.usetex: True\n")
    done = visualize(cwd=tmp_path, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in plots.iterdir()} == expected


@pytest.mark.slow
def test_script_draws_what_it_finds_or_is_told(tmp_path: Path) -> None:
    one, other = tmp_path / "results" / "one", tmp_path / "results" / "other"
    for record in make_records(without=tuple(NAMES[1:])):
        save_record(one, record)
        save_record(other, replace(record, recipe="best"))
    visualize_results.main(PlotOptions(tmp_path / "results", recipe="best"))
    assert (other / "plots" / "accuracy_vs_size.png").exists()
    assert not (one / "plots").exists()
    done = visualize("--results", one, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plots = [line.removeprefix("plot: ") for line in done.stdout.splitlines() if line.startswith("plot: ")]
    assert sorted(plots) == sorted(str(path) for path in (one / "plots").iterdir())
    assert (one / "table.md").read_text().startswith("# mnist, compact models, quick recipe\n")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """By folder: the runs that the script draws, with a file that stands for their figures."""
    found: dict[str, list[str]] = {}

    def draw(folder: Path, records: Sequence[Record], name: str) -> list[Path]:
        found[folder.name] = [record.run_name for record in records]
        return [folder / "plots" / name]

    monkeypatch.setattr(figures, "draw_all", lambda folder, results: draw(folder, results.records, "table.png"))
    monkeypatch.setattr(
        "mnist_lab.studies.claims.draw.draw_claims", lambda folder, records, *_: draw(folder, records, "claims.png")
    )
    return found


def make_own(seed: int = 0, model: str = BASELINE) -> Record:
    """A record of this machine's."""
    record = make_record(model, seed)
    return replace(record, machine={**record.machine, "cpu": cpu_model()})


def save_runs(results: Path, checkpoints: Path | None, *records: Record) -> None:
    """Records, and the one file that each says it is of."""
    for record in records:
        name, content = record.checkpoint["file"], record.run_name.encode()
        file: FileId = {"file": name, "sha256": hashlib.sha256(content).hexdigest()}
        measurements = {name: replace(measurement, file=file) for name, measurement in record.measurements.items()}
        save_record(results, replace(record, checkpoint=file, artifact=file, measurements=measurements))
        if checkpoints is not None:
            checkpoints.mkdir(parents=True, exist_ok=True)
            (checkpoints / name).write_bytes(content)


def test_script_draws_what_a_table_takes(
    tmp_path: Path, drawn: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    results, checkpoints = tmp_path / "r", tmp_path / "c"
    options = PlotOptions(results, checkpoints)
    for folder in ("one", "one/claims"):
        save_runs(results / folder, checkpoints / folder, *[make_own(seed) for seed in range(3)])
        (checkpoints / folder / "FFN_baseline-seed1.safetensors").write_bytes(b"trained anew")
    (checkpoints / "one" / "FFN_baseline-seed2.safetensors").unlink()
    visualize_results.main(options)
    assert drawn == {"one": ["FFN_baseline-seed0"], "claims": ["FFN_baseline-seed0", "FFN_baseline-seed2"]}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[:2] for line in lines if "not drawn" in line] == [
        ["not drawn", "FFN_baseline-seed1"],
        ["not drawn", "FFN_baseline-seed2"],
        ["not drawn", "FFN_baseline-seed1"],
    ]
    assert [line for line in lines if line.startswith("plot: ")] == [
        f"plot: {results / 'one' / 'plots' / 'table.png'}",
        f"plot: {results / 'one' / 'claims' / 'plots' / 'claims.png'}",
    ]


@pytest.mark.parametrize(("folder", "plot"), [("one", "table.png"), ("one/claims", "claims.png")])
def test_script_told_the_very_folder_knows_what_it_is(
    tmp_path: Path,
    drawn: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    folder: str,
    plot: str,
) -> None:
    save_runs(tmp_path / "r" / folder, tmp_path / "c" / folder, make_own(), make_own(1))
    (tmp_path / "c" / folder / "FFN_baseline-seed1.safetensors").unlink()
    monkeypatch.chdir(tmp_path / "r" / folder)
    visualize_results.main(PlotOptions(Path(), tmp_path / "c"))
    assert list(drawn.values()) == [["FFN_baseline-seed0"]]
    assert capsys.readouterr().out.endswith(f"plot: {Path('plots') / plot}\n")


def read_table(folder: Path) -> dict[str, tuple[float, bool]]:
    """By model: its accuracy, and whether it has a latency."""
    table = pd.read_csv(folder / "table.csv").set_index("model")
    assert "| Sparse_MoE " in (folder / "table.md").read_text()
    return {str(model): (row["test_acc"], pd.notna(row["latency_ms_b64"])) for model, row in table.iterrows()}


def test_records_of_several_machines_stand_in_one_table_with_the_latencies_of_one(
    tmp_path: Path, drawn: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, options = tmp_path / "r" / "one", PlotOptions(tmp_path / "r", tmp_path / "c")
    save_runs(folder, None, make_record(), replace(make_record(seed=1), versions={"torch": "0"}))
    save_runs(folder, tmp_path / "c" / "one", make_own(model="Sparse_MoE"))
    visualize_results.main(options)
    assert drawn == {"one": ["FFN_baseline-seed0", "Sparse_MoE-seed0"]}
    assert read_table(folder) == {"FFN_baseline": (0.98, False), "Sparse_MoE": (0.98, True)}  # timed on this machine
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("not drawn")]
    assert lines == [
        "not drawn: FFN_baseline-seed1: made with other library versions than FFN_baseline-seed0; make it again",
        "not drawn: latency of FFN_baseline-seed0 in onnxruntime: measured on another CPU (here)",
    ]
    save_runs(folder, None, elsewhere(make_record("Sparse_MoE")))
    (tmp_path / "c" / "one" / "Sparse_MoE-seed0.safetensors").unlink()
    visualize_results.main(options)
    assert read_table(folder) == {"FFN_baseline": (0.98, True), "Sparse_MoE": (0.98, False)}  # none: the first one's


@pytest.mark.slow
def test_script_writes_the_report_where_it_is_asked(
    tmp_path: Path, drawn: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mnist_lab.runtimes.onnxruntime_web.fetch_runtime", lambda: "no network")
    monkeypatch.setattr(figures, "FIGURES", {})
    for folder in ("one", "one/claims"):
        save_runs(tmp_path / "r" / folder, None, replace(make_record(), dataset="digits"))
    visualize_results.main(PlotOptions(tmp_path / "r", tmp_path / "c"))
    assert not list(tmp_path.rglob("report.html"))
    visualize_results.main(PlotOptions(tmp_path / "r", tmp_path / "c", report=True))
    assert list(tmp_path.rglob("report.html")) == [tmp_path / "r" / "one" / "report.html"]
    lines = capsys.readouterr().out.splitlines()
    assert "reports without a demo: no network" in lines
    assert f"report: {tmp_path / 'r' / 'one' / 'report.html'}" in lines


def test_script_draws_the_seeds_that_the_table_holds(tmp_path: Path, drawn: dict[str, list[str]]) -> None:
    folder, current = tmp_path / "r" / "one", replace(make_record(seed=1), versions={"torch": "1"})
    save_runs(folder, None, make_record(), current, replace(current, seed=2))
    write_table(folder, build_table([current]), title="x", distillation="")
    visualize_results.main(PlotOptions(tmp_path / "r", tmp_path / "c"))
    assert drawn == {"one": ["FFN_baseline-seed1", "FFN_baseline-seed2"]}
    (folder / "table.csv").write_text("model\nx\n")
    with pytest.raises(UserError, match=r"table.csv is broken"):
        visualize_results.main(PlotOptions(tmp_path / "r", tmp_path / "c"))


def test_script_goes_on_after_a_folder_that_fails(tmp_path: Path, drawn: dict[str, list[str]]) -> None:
    for folder in ("a", "b", "c", "d"):
        save_runs(tmp_path / "r" / folder, None, make_own())
    (tmp_path / "r" / "a" / "runs" / "FFN_baseline-seed0.json").write_text("{")
    (tmp_path / "c" / "c").mkdir(parents=True)  # so that it must hold the file
    options = PlotOptions(tmp_path / "r", tmp_path / "c")
    with pytest.raises(UserError, match=r"a/runs/FFN_baseline-seed0.json.*; no record in .*/c can be drawn"):
        visualize_results.main(options)
    assert [*drawn] == ["b", "d"]


def test_script_names_the_figures_that_fail_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FIGURES", {"good": lambda _: small_figure(), "bad": lambda _: fail()})
    for folder in ("a", "b"):
        save_runs(tmp_path / "r" / folder, None, make_record())
    (tmp_path / "r" / "c" / "runs").mkdir(parents=True)
    (tmp_path / "r" / "c" / "runs" / "x.json").write_text("{")
    with pytest.raises(RunFailed, match=r"a/plots: bad \(ValueError: no luck\); .*b/plots: bad .*c/runs/x.json"):
        visualize_results.main(PlotOptions(tmp_path / "r", tmp_path / "c"))
    assert sorted(path.parts[-3] for path in tmp_path.rglob("good.png")) == ["a", "b"]


def test_script_tells_a_user_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        visualize_results.main(PlotOptions(Path("nowhere")))
    (record,) = make_records(without=tuple(NAMES[1:]))
    save_record(tmp_path / "results" / "one", record)
    with pytest.raises(UserError, match="--dataset kmnist"):
        visualize_results.main(PlotOptions(tmp_path / "results", dataset="kmnist"))
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
    for field, names in (("preset", PresetName), ("recipe", RecipeName)):
        literal = next(part for part in get_args(hints[field]) if part is not type(None))
        assert get_args(literal) == get_args(names)


def test_own_data_is_found_by_where_it_lies_and_by_its_name(tmp_path: Path, drawn: dict[str, list[str]]) -> None:
    draw_shapes(tmp_path / "mnist", num_each=2)
    name = OwnSource("folder", tmp_path / "mnist").find_name()
    for folder, dataset in (("own", name), ("resized", f"{name}-8x8"), ("other", "mnist-00000000"), ("usual", "mnist")):
        save_runs(tmp_path / "r" / folder, None, replace(make_record(), dataset=dataset))
    for given, found in (
        (f"folder:{tmp_path / 'mnist'}", ["own", "resized"]),
        (name, ["own"]),
        ("mnist", ["usual"]),
    ):
        drawn.clear()
        visualize_results.main(PlotOptions(tmp_path / "r", dataset=given))
        assert [*drawn] == found
    with pytest.raises(UserError, match="gone cannot be read"):
        visualize_results.main(PlotOptions(tmp_path / "r", dataset=f"folder:{tmp_path / 'gone'}"))
    with pytest.raises(UserError, match="--dataset cifar is none of"):
        PlotOptions(dataset="cifar")
