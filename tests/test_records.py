import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from builders import make_measurement, make_record

from mnist_lab import records
from mnist_lab.errors import UserError
from mnist_lab.files import sha256
from mnist_lab.report.records import COLUMNS, build_table, compare, find_fastest, first_in


def test_record_survives_the_disk(tmp_path: Path) -> None:
    record = make_record(pytorch=make_measurement(), onnxruntime=make_measurement(b64=None))
    records.save_record(tmp_path, record)
    assert records.load_records(tmp_path) == [record]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "\x00\x81", '{"measurements": []}', '{"schema": 1, "measurements": {}}']
)
def test_broken_record_is_the_users_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="x.json"):
        records.load_records(tmp_path)


def test_record_of_another_schema_is_the_users_error(tmp_path: Path) -> None:
    record = make_record()
    record.schema = 99
    records.save_record(tmp_path, record)
    with pytest.raises(UserError, match="schema 99"):
        records.load_records(tmp_path)


def test_what_an_interrupted_write_left_is_no_record(tmp_path: Path) -> None:
    records.save_record(tmp_path, make_record())
    (tmp_path / "runs" / ".abc.json").write_text("{")
    assert records.load_records(tmp_path) == [make_record()]


def test_table_starts_with_the_promised_columns() -> None:
    promised = (
        "model technique precision runtime seeds test_acc test_acc_ci95 train_acc train_loss test_loss ece "
        "params_total params_active size_mib file_mb latency_ms_b1 latency_ms_b64 latency_ms_b1024 threads"
    )
    assert list(build_table([make_record()]).columns)[: len(COLUMNS)] == promised.split() == COLUMNS


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
    records.write_table(tmp_path, table, title="x", distillation="- as good")
    read = pd.read_csv(tmp_path / "table.csv")
    assert read[["test_acc_ci95", "latency_ms_b1", "latency_ms_b64"]].isna().all(axis=None)
    assert "nan" not in (tmp_path / "table.md").read_text().lower()
    assert "nan" not in records.format_summary(table, style="simple").lower()


def test_baseline_comes_first_and_pytorch_before_the_others() -> None:
    runs = [
        make_record("Sparse_MoE", order=2),
        make_record(order=0, onnxruntime=make_measurement(), pytorch=make_measurement()),
    ]
    table = build_table(runs)
    assert table["model"].tolist() == ["FFN_baseline", "FFN_baseline", "Sparse_MoE"]
    assert table["runtime"].tolist() == ["pytorch", "onnxruntime", "onnxruntime"]


def test_int8_is_compared_with_its_own_fp32_in_the_same_runtime() -> None:
    baseline = make_record(pytorch=make_measurement(b64=9.0), onnxruntime=make_measurement(0.98, b64=3.0))
    int8 = make_record("FFN_PTQ_INT8", order=1, onnxruntime=make_measurement(0.979, size_mib=0.25, b64=1.5))
    first, _, last = compare(build_table([baseline, int8])).to_dict("records")
    for label in ("fp32", "baseline"):
        assert last[f"acc_points_vs_{label}"] == pytest.approx(-0.1)
        assert last[f"size_vs_{label}"] == pytest.approx(0.25)
        assert last[f"speedup_b64_vs_{label}"] == pytest.approx(2.0)
    assert math.isnan(first["speedup_b64_vs_fp32"])
    assert math.isnan(last["speedup_b1_vs_fp32"])


def test_accuracy_is_compared_over_the_same_seeds_only() -> None:
    runs = [make_record(seed=0), make_record(seed=1), make_record("FFN_PTQ_INT8", seed=0, order=1)]
    _, int8 = compare(build_table(runs)).to_dict("records")
    assert math.isnan(int8["acc_points_vs_fp32"])
    assert int8["size_vs_fp32"] == 1


def test_runs_that_all_depart_from_the_recipe_have_their_own_baseline() -> None:
    table = build_table([make_record("FFN_baseline-epochs1"), make_record("Sparse_MoE-epochs1", order=2)])
    assert compare(table)["speedup_b64_vs_baseline"].tolist() == [1.0, 1.0]


def test_table_takes_only_this_cpus_records_with_their_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "FFN_baseline-seed0.safetensors"
    path.write_bytes(b"weights")
    good = make_record()
    good.checkpoint["sha256"] = sha256(path)
    elsewhere = replace(good, machine={"cpu": "there"})
    changed = replace(good, checkpoint={**good.checkpoint, "sha256": "other"})
    gone = make_record("Sparse_MoE")
    assert records.usable_records([good], tmp_path, "here") == ([good], [])
    for record, reason in ((elsewhere, "another CPU"), (changed, "changed"), (gone, "gone")):
        usable, left_out = records.usable_records([record], tmp_path, "here")
        assert usable == []
        assert reason in left_out[0]


def test_table_pools_seeds_of_the_same_settings_only(tmp_path: Path) -> None:
    runs = [make_record(seed=seed) for seed in (0, 1, 2)]
    for record in runs:
        path = tmp_path / record.checkpoint["file"]
        path.write_bytes(b"weights")
        record.checkpoint["sha256"] = sha256(path)
        record.config = {"seed": record.seed, "epochs": 5}
    assert records.usable_records(runs, tmp_path, "here")[0] == runs
    runs[1].config["epochs"] = 6
    usable, left_out = records.usable_records(runs, tmp_path, "here")
    assert usable == [runs[0], runs[2]]
    assert "FFN_baseline-seed1" in left_out[0]
    assert records.usable_records(runs, tmp_path, "here", current=[runs[1]])[0] == [runs[1]]


def test_table_leaves_out_what_was_made_from_an_older_parent(tmp_path: Path) -> None:
    path, parent = tmp_path / "FFN_PTQ_INT8-seed0.safetensors", tmp_path / "FFN_baseline-seed0.safetensors"
    path.write_bytes(b"int8")
    parent.write_bytes(b"old weights")
    record = make_record("FFN_PTQ_INT8")
    record.checkpoint["sha256"] = sha256(path)
    record.parent = {"model": "FFN_baseline", "sha256": sha256(parent)}
    assert records.usable_records([record], tmp_path, "here") == ([record], [])
    parent.write_bytes(b"new weights")
    usable, left_out = records.usable_records([record], tmp_path, "here")
    assert usable == []
    assert "FFN_PTQ_INT8-seed0" in left_out[0]


def test_predictions_keep_the_exact_class(tmp_path: Path) -> None:
    logits = np.array([[5.0, 5.0001, 0.0], [-3.0, 0.0, 3.0]], np.float32)
    records.save_predictions(tmp_path, "x-seed0", logits, np.array([0, 2]))
    predictions = records.load_predictions(tmp_path, "x-seed0")
    assert predictions.predicted.tolist() == [1, 2]
    assert predictions.labels.tolist() == [0, 2]
    assert np.allclose(predictions.probabilities.sum(axis=1), 1, atol=1e-2)


def test_broken_predictions_are_named(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    path = tmp_path / "runs" / "x-seed0.npz"
    for content in (None, b"", b"PK\x03\x04 truncated"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match="x-seed0.npz"):
            records.load_predictions(tmp_path, "x-seed0")


def test_fastest_runtime_is_named_per_model_and_batch_size() -> None:
    record = make_record(pytorch=make_measurement(b64=3.0), onnxruntime=make_measurement(b64=2.0))
    other = make_record("Sparse_MoE", order=2, openvino=make_measurement(b64=None))
    first, second = find_fastest(build_table([record, other])).to_dict("records")
    assert (first["model"], first["runtime_b64"], first["latency_ms_b64"]) == ("FFN_baseline", "onnxruntime", 2.0)
    assert pd.isna(second["runtime_b64"])
    assert math.isnan(second["latency_ms_b64"])


def test_torchao_is_read_against_the_engine_that_it_shares() -> None:
    measurements = {"torch-compile": make_measurement(b64=4.0), "pytorch": make_measurement(b64=8.0)}
    fp32 = replace(make_record(), measurements=measurements)
    int8 = make_record("FFN_PTQ_INT8", order=1, torchao=make_measurement(b64=2.0))
    assert compare(build_table([fp32, int8]))["speedup_b64_vs_fp32"].iloc[-1] == 2.0


def test_latency_is_of_the_first_seed_in_each_runtime() -> None:
    both = {"pytorch": make_measurement(), "onnxruntime": make_measurement()}
    runs = [replace(make_record(seed=1), measurements=both), make_record(seed=0, onnxruntime=make_measurement())]
    timed = [(record.seed, runtime) for record, runtime in first_in(runs, ["pytorch", "onnxruntime"])]
    assert timed == [(1, "pytorch"), (0, "onnxruntime")]


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
    assert records.judge_distillation([*runs, other_budget]) == says
    assert records.judge_distillation([run for run in runs if run.technique == "kd"]) == ""
