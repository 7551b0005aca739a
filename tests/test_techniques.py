"""A step, a form and a column of the tests' own go all the way, and nothing in the package knows of them."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from tiny import HALVED, ROUNDED, SMALL, TAUGHT, ZEROS, make_lab, share_of_zeros

from mnist_lab.command.console import run_rows
from mnist_lab.compress.train import TrainMoE
from mnist_lab.experiments import latencies
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import load_or_make
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import FFN, STUDENT, STUDENT_WITHOUT_TEACHER, families
from mnist_lab.experiments.run import Run
from mnist_lab.report.columns import COLUMNS
from mnist_lab.report.few_bits_figures import FEW_BITS_FIGURES
from mnist_lab.report.figures import FIGURES, OF_COMPRESSED
from mnist_lab.report.records import load_records
from mnist_lab.report.results import Results
from mnist_lab.report.table import build_table

pytestmark = pytest.mark.slow

MIXTURE = Row("Sparse_MoE", TrainMoE())
ROWS = (FFN, SMALL, HALVED, MIXTURE, STUDENT, TAUGHT, ROUNDED, STUDENT_WITHOUT_TEACHER)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = make_lab(tmp_path_factory.mktemp("finished"), columns=(*COLUMNS, ZEROS))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(latencies, "NUM_ROUNDS", 1)
        run_rows(lab, ROWS, mode="load", seeds=range(1))
    return lab


def test_rows_are_in_the_table_in_the_lists_order_with_their_techniques(finished: Lab) -> None:
    table = pd.read_csv(finished.results / "table.csv")
    assert list(dict.fromkeys(table["model"])) == [row.name for row in ROWS]
    technique = table.drop_duplicates("model").set_index("model")["technique"]
    assert technique["Halved"] == "zeroed"
    assert technique["Rounded"] == "kd + 4 bits"
    runtimes = table.groupby("model")["runtime"].apply(set)
    assert runtimes["Rounded"] == {"pytorch", "onnxruntime"}
    assert table["latency_ms_b64"].notna().all()


def test_column_is_in_csv_and_markdown_and_measured_on_the_model(finished: Lab) -> None:
    zeros = pd.read_csv(finished.results / "table.csv").drop_duplicates("model").set_index("model")["zeros"]
    for row in (HALVED, FFN, ROUNDED):  # a form's own weights, not those that it was made from
        assert zeros[row.name] == pytest.approx(share_of_zeros(Run(finished, row, 0).load()))
    assert zeros["Rounded"] > zeros["Taught"]
    assert zeros["Halved"] >= 0.5 > zeros["Small"]
    text = (finished.results / "table.md").read_text()
    header = next(line for line in text.splitlines() if "params_total" in line)
    assert "zeros" in header
    assert f"{zeros['Halved']:.1%}" in text


def test_rows_and_column_are_in_every_figure(finished: Lab) -> None:
    results = Results(load_records(finished.results), families(ROWS), finished.columns)
    drawn = {path.stem for path in (finished.results / "plots").iterdir()}
    of_others = {"expert_criteria", "expert_similarity", "routing_vs_ratio", "waterfall", *FEW_BITS_FIGURES}
    assert drawn == FIGURES.keys() - of_others  # of smaller mixtures, long chains, few bits
    figures = {name: FIGURES[name](results) for name in drawn}
    words: dict[str, str] = {}
    for name, figure in figures.items():
        assert figure is not None
        texts = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        for axes in figure.axes:
            labels = [*axes.get_xticklabels(), *axes.get_yticklabels()]
            texts += [axes.get_title(), axes.get_xlabel(), *(label.get_text() for label in labels)]
        words[name] = "\n".join(texts)
    of_some = {"training_curves", "confidence_histogram", "expert_load"}  # of trained models, teachers, mixtures
    for name in drawn - of_some - OF_COMPRESSED.keys():
        assert all(row.name in words[name] for row in (HALVED, ROUNDED)), name
    assert "Taught" in words["training_curves"]
    for name in ("accuracy_vs_nonzero", "accuracy_vs_bytes"):
        assert words[name].splitlines()[:2] == ["Small (original)", "Halved"]
    cost = ZEROS.cost
    assert cost is not None
    assert cost.label in words["comparison_bars"]
    assert cost.spoke in words["normalized_comparison"]


def test_fidelity_is_in_the_record(finished: Lab) -> None:
    halved = next(record for record in load_records(finished.results) if record.row == "Halved")
    assert halved.original == "Small"
    assert halved.measurements["onnxruntime"].largest_gap > 0
    assert halved.proof == {"text": "50% of the weights are zero"}


def test_row_inserted_in_the_middle_leaves_old_records_readable_and_in_the_lists_order(tmp_path: Path) -> None:
    lab = make_lab(tmp_path)
    old = (SMALL, TAUGHT)
    for row in old:
        load_or_make(Run(lab, row, 0))
    stored = {path: json.loads(path.read_text()) for path in (lab.results / "runs").glob("*.json")}
    assert not any(key in fields for fields in stored.values() for key in ("order", "place"))
    new = (SMALL, HALVED, TAUGHT)
    load_or_make(Run(lab, HALVED, 0))
    assert {path: json.loads(path.read_text()) for path in stored} == stored
    table = build_table(load_records(lab.results), order=families(new))
    assert list(dict.fromkeys(table["model"])) == ["Small", "Halved", "Taught"]
    turned = build_table(load_records(lab.results), order=families(new[::-1]))
    assert list(dict.fromkeys(turned["model"])) == ["Taught", "Halved", "Small"]


def test_column_added_later_has_old_rows_measured_again_but_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = make_lab(tmp_path)
    load_or_make(Run(lab, HALVED, 0))
    monkeypatch.setattr(type(HALVED.step), "make", None)
    later = replace(lab, columns=(*COLUMNS, ZEROS))
    record = load_or_make(Run(later, HALVED, 0))
    zeros = record.figures["zeros"]
    assert zeros is not None
    assert zeros >= 0.5
    table = build_table([record], columns=later.columns)
    assert table["zeros"].tolist() == [zeros] * 2
