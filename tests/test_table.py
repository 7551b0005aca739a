import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import make_measurement, make_record

from mnist_lab.report.columns import COLUMNS
from mnist_lab.report.statistics import binomial_interval
from mnist_lab.report.table import build_table, compare, find_fastest, judge_distillation
from mnist_lab.report.text import DISPENSABLE, format_summary, write_table

ORDER = ("FFN_baseline", "FFN_PTQ_INT8", "Sparse_MoE")


def test_table_starts_with_the_promised_columns() -> None:
    promised = (
        "model technique precision runtime seeds test_acc test_acc_ci95 train_acc train_loss test_loss ece "
        "params_total params_active size_mib file_mb latency_ms_b1 latency_ms_b64 latency_ms_b1024 threads"
    )
    assert list(build_table([make_record()]).columns)[: len(COLUMNS)] == promised.split()


def test_seeds_give_mean_and_student_t_interval_and_the_first_seeds_latency() -> None:
    values = [0.97, 0.98, 0.985]
    runs = [
        make_record(seed=s, onnxruntime=make_measurement(value, b64=float(s)))
        for s, value in zip((2, 3, 4), values, strict=True)
    ]
    (row,) = build_table(runs[::-1]).to_dict("records")
    assert row["seeds"] == 3
    assert row["test_acc"] == pytest.approx(np.mean(values))
    assert row["test_acc_ci95"] == pytest.approx(4.302653 * np.std(values, ddof=1) / math.sqrt(3), rel=1e-5)
    assert row["latency_ms_b64"] == 2.0


def test_what_was_not_measured_is_blank(tmp_path: Path) -> None:
    table = build_table([make_record(onnxruntime=make_measurement(b64=None))])
    write_table(tmp_path, table, title="x", distillation="- as good")
    read = pd.read_csv(tmp_path / "table.csv")
    assert read[["test_acc_ci95", "latency_ms_b1", "latency_ms_b64"]].isna().all(axis=None)
    assert "nan" not in (tmp_path / "table.md").read_text().lower()
    assert "nan" not in format_summary(table, style="simple").lower()


def test_rows_stand_in_the_order_of_their_families_pytorch_first_and_others_last() -> None:
    runs = [
        make_record("Aardvark"),
        make_record("Sparse_MoE-K1"),
        make_record("FFN_PTQ_INT8"),
        make_record("Sparse_MoE"),
        make_record(onnxruntime=make_measurement(), pytorch=make_measurement()),
    ]
    table = build_table(runs, order=ORDER)
    assert table["model"].tolist() == [
        "FFN_baseline",
        "FFN_baseline",
        "FFN_PTQ_INT8",
        "Sparse_MoE",
        "Sparse_MoE-K1",
        "Aardvark",
    ]
    assert table["runtime"].tolist()[:2] == ["pytorch", "onnxruntime"]
    backwards = build_table(runs, order=ORDER[::-1])
    assert backwards["model"].tolist()[:2] == ["Sparse_MoE", "Sparse_MoE-K1"]


def test_int8_is_compared_with_its_own_fp32_in_the_same_runtime() -> None:
    baseline = make_record(pytorch=make_measurement(b64=9.0), onnxruntime=make_measurement(0.98, b64=3.0))
    int8 = make_record("FFN_PTQ_INT8", onnxruntime=make_measurement(0.979, size_mib=0.25, b64=1.5))
    first, _, last = compare(build_table([baseline, int8], order=ORDER)).to_dict("records")
    for label in ("original", "baseline"):
        assert last[f"acc_points_vs_{label}"] == pytest.approx(-0.1)
        assert last[f"size_vs_{label}"] == pytest.approx(0.25)
        assert last[f"speedup_b64_vs_{label}"] == pytest.approx(2.0)
    assert math.isnan(first["speedup_b64_vs_original"])
    assert math.isnan(last["speedup_b1_vs_original"])


def test_accuracy_is_compared_over_the_same_seeds_only() -> None:
    runs = [make_record(seed=0), make_record(seed=1), make_record("FFN_PTQ_INT8", seed=0)]
    _, int8 = compare(build_table(runs, order=ORDER)).to_dict("records")
    assert math.isnan(int8["acc_points_vs_original"])
    assert int8["size_vs_original"] == 1


def test_runs_that_all_depart_from_the_recipe_have_their_own_baseline() -> None:
    table = build_table([make_record("FFN_baseline-epochs1"), make_record("Sparse_MoE-epochs1")])
    assert compare(table)["speedup_b64_vs_baseline"].tolist() == [1.0, 1.0]


def test_fastest_runtime_is_named_per_model_and_batch_size() -> None:
    record = make_record(pytorch=make_measurement(b64=3.0), onnxruntime=make_measurement(b64=2.0))
    other = make_record("Sparse_MoE", openvino=make_measurement(b64=None))
    first, second = find_fastest(build_table([record, other])).to_dict("records")
    assert (first["model"], first["runtime_b64"], first["latency_ms_b64"]) == ("FFN_baseline", "onnxruntime", 2.0)
    assert pd.isna(second["runtime_b64"])
    assert math.isnan(second["latency_ms_b64"])


def test_torchao_is_read_against_the_engine_that_it_shares() -> None:
    measurements = {"torch-compile": make_measurement(b64=4.0), "pytorch": make_measurement(b64=8.0)}
    fp32 = replace(make_record(), measurements=measurements)
    int8 = make_record("FFN_PTQ_INT8", torchao=make_measurement(b64=2.0))
    assert compare(build_table([fp32, int8], order=ORDER))["speedup_b64_vs_original"].iloc[-1] == 2.0


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        ([0.001, 0.002, 0.003], "- KD_FFN_Student does not beat labels alone: +0.20 ± 0.25 points over 3 seeds."),
        ([0.003, 0.003, 0.003], "- KD_FFN_Student beats labels alone: +0.30 ± 0.00 points over 3 seeds."),
        ([-0.004, -0.003, -0.005], "- KD_FFN_Student falls behind labels alone: -0.40 ± 0.25 points over 3 seeds."),
        ([0.002], "- KD_FFN_Student against labels alone: +0.20 points; one seed decides nothing."),
    ],
)
def test_students_are_judged_against_labels_alone(gains: list[float], says: str) -> None:
    runs = []
    for seed, gain in enumerate(gains):
        for model, acc in (("FFN_Student_no_KD", 0.97 + 0.01 * seed), ("KD_FFN_Student", 0.97 + 0.01 * seed + gain)):
            run = make_record(model, seed, pytorch=make_measurement(acc))
            runs.append(replace(run, technique="kd" if model.startswith("KD") else "dense"))
    other_budget = replace(make_record("FFN_Student_no_KD-epochs1", 0), config={"recipe": {"epochs": 1}})
    assert judge_distillation([*runs, other_budget]) == says
    assert judge_distillation([run for run in runs if run.technique == "kd"]) == ""


def test_original_of_a_chain_is_its_first_model_not_the_one_before() -> None:
    first, second = make_record(), make_record("FFN_pruned", onnxruntime=make_measurement(size_mib=0.5, b64=1.0))
    third = make_record("FFN_pruned_INT8", onnxruntime=make_measurement(size_mib=0.125, b64=0.5))
    for record in (second, third):
        record.original = "FFN_baseline"
    rows = compare(build_table([first, second, third])).set_index("model")
    assert rows["size_vs_original"].tolist()[1:] == [0.5, 0.125]
    assert rows["speedup_b64_vs_original"].tolist()[1:] == [2.0, 4.0]


def test_narrow_terminal_gets_fewer_columns_and_a_pipe_all() -> None:
    table = build_table([make_record(), make_record("FFN_PTQ_INT8")], order=ORDER)
    whole = format_summary(table, style="simple")
    assert all(name in whole for name in ("technique", "precision", "runtime", "seeds", "acc", *DISPENSABLE))
    for width, kept in ((120, "technique"), (80, "runtime"), (40, "acc")):
        lines = format_summary(table, style="simple", width=width).splitlines()
        assert max(map(len, lines)) <= width
        assert all(name in lines[0] for name in ("model", kept, "acc", "ms b64"))


def test_technique_tells_rows_of_one_precision_apart_first() -> None:
    header = format_summary(build_table([make_record()]), style="simple").split()
    assert header.index("model") < header.index("technique") < header.index("precision")


@pytest.mark.parametrize(("right", "num"), [(9900, 10_000), (9, 10), (0, 20), (20, 20)])
def test_binomial_interval_is_wilsons(right: int, num: int) -> None:
    from scipy import stats

    expected = stats.binomtest(right, num).proportion_ci(method="wilson")
    assert binomial_interval(right / num, num) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_figure_that_an_older_seed_lacks_is_blank_in_its_means_and_interval() -> None:
    whole, older = make_record(seed=0), make_record(seed=1)
    older.measurements["onnxruntime"].test_acc = None  # type: ignore[assignment]
    (row,) = build_table([whole, older]).to_dict("records")
    assert math.isnan(row["test_acc"])
    assert math.isnan(row["test_acc_ci95"])
    assert row["seeds"] == 2
    assert row["size_mib"] == 1.0


def test_times_on_other_numbers_of_threads_are_not_compared() -> None:
    fast = make_measurement(b64=0.5)
    fast.threads = 8
    rows = [make_record(pytorch=make_measurement(b64=2.0), onnxruntime=fast), make_record("FFN_PTQ_INT8")]
    rows[1].measurements = {"onnxruntime": make_measurement(b64=1.0)}
    table = build_table(rows)
    assert compare(table)["speedup_b64_vs_original"].isna().all()
    fastest = find_fastest(table).set_index("model")["runtime_b64"].to_dict()
    assert fastest == {"FFN_baseline": "pytorch", "FFN_PTQ_INT8": "onnxruntime"}
