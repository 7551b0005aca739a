"""`sweep.py`, as the command line runs it."""

import pandas as pd
import pytest
from test_scripts import Bench, bench  # noqa: F401  a fixture

from mnist_lab.command import sweep
from mnist_lab.compress.train import TrainMoE
from mnist_lab.errors import TrainingDiverged
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.report.records import load_records

pytestmark = pytest.mark.slow
GRID = ("--recipe", "quick", "--epochs", "1", "--dataset", "digits", "--workers", "1")


def run(bench: Bench, *arguments: str) -> "tuple[int, str, str]":  # noqa: F811
    return bench("sweep", *GRID, *arguments, quick=False)


def test_rows_of_several_settings_get_their_tables_and_a_joint_one(bench: Bench) -> None:  # noqa: F811
    arguments = ("--model", "moe,ffn", "--num-experts", "2,3", "--preset", "compact,wide", "--seeds", "0-1")
    outcome = run(bench, *arguments)
    assert outcome[0] == 0, outcome
    rows = ["Sparse_MoE-E2-epochs1", "Sparse_MoE-E3-epochs1", "FFN_baseline-epochs1"]
    joint = pd.read_csv(bench.folder / "results" / "sweep.csv")
    for preset in ("compact", "wide"):
        folder = bench.folder / "results" / f"digits-{preset}-quick"
        table = pd.read_csv(folder / "table.csv")
        assert set(table["model"]) == set(rows)
        assert (table["seeds"] == 2).all()
        assert table["latency_ms_b64"].notna().all()
        own = joint[joint["preset"] == preset]
        assert [*own["model"]] == [row for row in rows for _ in range(2)]
        assert [*own["num_experts"].fillna(0)] == [2, 2, 3, 3, 0, 0]
        assert {record.train_threads for record in load_records(folder)} == {1}
    assert "| wide " in (bench.folder / "results" / "sweep.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in (bench.folder / "checkpoints").rglob("*.*")}
    again = run(bench, *arguments)
    assert again[0] == 0, again
    assert ": validation accuracy" not in again[1]
    assert {path: path.stat().st_mtime_ns for path in (bench.folder / "checkpoints").rglob("*.*")} == before


def test_row_that_fails_is_named_and_the_others_stand_in_the_table(
    bench: Bench,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = TrainMoE.make

    def diverge(self: TrainMoE, work: Work) -> Made:
        if self.routing.num_experts == 3:
            raise TrainingDiverged("the loss is nan")
        return make(self, work)

    monkeypatch.setattr(TrainMoE, "make", diverge)
    code, _, err = run(bench, "--model", "student,moe", "--num-experts", "2,3")
    assert code == 1
    assert "KD_FFN_Student-E3-epochs1-seed0: what it is made from failed" in err
    assert "Sparse_MoE-E3-epochs1-seed0: the loss is nan" in err
    table = pd.read_csv(bench.results / "table.csv")
    assert set(table["model"]) == {"Sparse_MoE-E2-epochs1", "KD_FFN_Student-E2-epochs1"}


def test_rows_that_processes_make_are_those_that_one_makes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(sweep, "usable_cpus", lambda: 2)
    arguments = ("--num-experts", "2,3", "--model", "moe,student")
    assert run(bench, *arguments)[0] == 0
    made = {path.name: path.read_bytes() for path in bench.checkpoints.iterdir()}
    outcome = run(bench, *arguments, "--checkpoints", "c", "--results", "r", "--workers", "2")
    assert outcome[0] == 0, outcome
    assert {path.name: path.read_bytes() for path in (bench.folder / "c" / bench.checkpoints.name).iterdir()} == made


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--top-k 8", "--top-k 8 is in no row"),
        ("--workers 10000", "--workers 10000"),
        ("--train-threads 0", "--train-threads"),
        ("--epochs 0,1", "--epochs 0"),
        ("--seed 3", "--seed"),
        ("--cluster tcp://127.0.0.1:9", "--workers is for this machine"),
    ],
)
def test_bad_input_is_refused_in_one_line(bench: Bench, arguments: str, says: str) -> None:  # noqa: F811
    bench.expect_user_error("sweep", *GRID, *arguments.split(), quick=False, says=says)
