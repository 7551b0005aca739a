"""`compare_onnx.py`, as the command line runs it, on bars in the place of the bundled digits."""

from pathlib import Path

import foreign_models as made
import pandas as pd
import pytest
from test_scripts import Bench, bench  # noqa: F401  a fixture
from tiny import make_dataset, make_lab

from mnist_lab.experiments.make import make
from mnist_lab.experiments.rows import MODELS
from mnist_lab.experiments.run import Run
from mnist_lab.report.columns import COLUMNS

pytestmark = pytest.mark.slow
SUITE = "digits-compact-quick"
FOLDER = "digits-onnx-net"
OPTIONS = ["--dataset", "digits", "--recipe", "quick"]


@pytest.fixture(autouse=True)
def bars_for_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compare_onnx.load_dataset", lambda *_: make_dataset(num_train=1100))


@pytest.fixture
def file(bench: Bench) -> Path:  # noqa: F811
    return made.save(made.cnn(), bench.folder / "net.onnx")


def make_suite(bench: Bench) -> None:  # noqa: F811
    """Two rows of the suite, for two seeds."""
    lab = make_lab(bench.folder, dataset=make_dataset(num_train=1100), runtimes=("onnxruntime",))
    folders = {name: bench.folder / name / SUITE for name in ("checkpoints", "results")}
    for seed in (0, 1):
        for row in (row for row in MODELS if row.name in {"FFN_baseline", "FFN_PTQ_INT8"}):
            make(Run(make_lab(bench.folder, dataset=lab.dataset, runtimes=lab.runtimes, **folders), row, seed))


def compare(bench: Bench, *arguments: str) -> str:  # noqa: F811
    outcome = bench("compare_onnx", "net.onnx", *OPTIONS, *arguments, quick=False)
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_forms_stand_beside_the_suites_rows_timed_by_turns(bench: Bench, file: Path) -> None:  # noqa: F811
    make_suite(bench)
    before = bench.files()
    out = compare(bench)
    table = pd.read_csv(bench.folder / "results" / FOLDER / "table.csv")
    assert list(table.columns)[: len(COLUMNS)] == [column.name for column in COLUMNS]
    own = ["net.onnx", "net_INT4.onnx", "net_INT8-dynamic.onnx", "net_INT8.onnx"]
    assert list(table["model"]) == [*own, "FFN_baseline", "FFN_PTQ_INT8"]
    assert list(table["seeds"]) == [1, 1, 1, 1, 2, 2]
    assert set(table["runtime"]) == {"onnxruntime"}
    measured = ["test_acc", "size_mib", "file_mb", "latency_ms_b1", "latency_ms_b64", "latency_ms_b1024", "threads"]
    assert table[measured].notna().all(axis=None)
    assert table["train_acc"].isna().sum() == len(own)  # what hers was trained on is not known
    assert table.set_index("model")["same_class"][own[1:]].notna().all()
    text = (bench.folder / "results" / FOLDER / "table.md").read_text()
    assert "net_INT8.onnx: integer products: 1 QLinearConv, 1 QGemm; in float: none" in text
    assert "read as nchw" in out
    assert {path.name for path in (bench.folder / "checkpoints" / FOLDER).iterdir()} == set(own)
    for figure in ("accuracy_vs_time", "accuracy_vs_size"):
        assert (bench.folder / "results" / FOLDER / "plots" / f"{figure}.png").is_file()
    after = bench.files()
    assert {name: after[name] for name in before} == before


def test_without_results_it_stands_alone(bench: Bench, file: Path) -> None:  # noqa: F811
    assert "nothing stands beside it" in compare(bench)
    assert "nothing stands beside it" not in compare(bench, "--beside", "none")


def test_row_whose_file_has_changed_is_left_out_with_a_line(bench: Bench, file: Path) -> None:  # noqa: F811
    make_suite(bench)
    (bench.folder / "checkpoints" / SUITE / "FFN_PTQ_INT8-seed0.onnx").unlink()
    assert "not beside it: FFN_PTQ_INT8-seed0: FFN_PTQ_INT8-seed0.onnx is gone" in compare(bench, "--beside", "all")


def test_a_wrong_input_is_doubted_twice(bench: Bench) -> None:  # noqa: F811
    model = made.mlp()
    for constant in model.graph.initializer:
        if constant.name == "last":
            constant.raw_data = bytes(len(constant.raw_data))
    made.save(model, bench.folder / "net.onnx")
    assert compare(bench).count("NOTE: of 100 validation images it recognises") == 2


@pytest.mark.parametrize(
    ("content", "arguments", "says"),
    [
        (b"text", [], "net.onnx cannot be compared: it is no ONNX file"),
        (None, ["--layout", "flat"], "holds no images in --layout flat"),
        (None, ["--output", "other"], "no --output other"),
        (None, ["--std", "0"], "--std 0"),
        (None, ["--mean", "0", "0"], "--mean 0 0"),
        (None, ["--scale", "2"], "--scale"),
        (None, ["--beside", "some"], "--beside"),
        (None, ["--threads", "0"], "--threads 0"),
        (None, ["--seed", "-1"], "--seed -1"),
    ],
)
def test_bad_input_ends_with_exit_code_2(
    bench: Bench,  # noqa: F811
    file: Path,
    content: bytes | None,
    arguments: list[str],
    says: str,
) -> None:
    file.write_bytes(content or file.read_bytes())
    bench.expect_user_error("compare_onnx", "net.onnx", *OPTIONS, *arguments, says=says, quick=False)


def test_missing_file(bench: Bench) -> None:  # noqa: F811
    bench.expect_user_error("compare_onnx", "none.onnx", *OPTIONS, says="no model at none.onnx", quick=False)
    bench.expect_user_error("compare_onnx", *OPTIONS, says="PATH", quick=False)
