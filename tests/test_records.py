import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from builders import make_measurement, make_record

from mnist_lab.errors import UserError
from mnist_lab.files import sha256
from mnist_lab.report import records
from mnist_lab.report.records import first_in


def test_record_survives_the_disk(tmp_path: Path) -> None:
    record = make_record(pytorch=make_measurement(), onnxruntime=make_measurement(b64=None))
    records.save_record(tmp_path, record)
    assert records.load_records(tmp_path) == [record]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "\x00\x81", '{"measurements": []}', '{"schema": 3}', '{"schema": 3, "measurements": {}}'],
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


def test_record_that_lacks_figures_or_has_more_is_read(tmp_path: Path) -> None:
    record = make_record()
    records.save_record(tmp_path, record)
    path = records.record_path(tmp_path, record.run_name)
    fields = json.loads(path.read_text())
    del fields["validation_loss"], fields["measurements"]["onnxruntime"]["test_ece"]
    fields["of_a_later_version"] = fields["measurements"]["onnxruntime"]["of_a_later_version"] = 1
    path.write_text(json.dumps(fields))
    (read,) = records.load_records(tmp_path)
    assert read.validation_loss is None
    assert records.is_lacking(read)
    assert records.is_lacking(read.measurements["onnxruntime"])
    assert not records.is_lacking(record)
    assert not records.is_lacking(record.measurements["onnxruntime"])
    assert "lacks a figure" in records.usable_records([read], tmp_path, "here")[1][0]
    assert replace(read, validation_loss=record.validation_loss, measurements=record.measurements) == record


def test_record_that_does_not_say_whose_it_is_is_the_users_error(tmp_path: Path) -> None:
    record = make_record()
    records.save_record(tmp_path, record)
    path = records.record_path(tmp_path, record.run_name)
    for name in records.IDENTITY:
        fields = json.loads(path.read_text())
        del fields[name]
        other = tmp_path / f"{name}.json"
        other.write_text(json.dumps(fields))
        with pytest.raises(UserError, match=f"no {name}"):
            records.load_record(other)


def test_what_an_interrupted_write_left_is_no_record(tmp_path: Path) -> None:
    records.save_record(tmp_path, make_record())
    (tmp_path / "runs" / ".abc.json").write_text("{")
    assert records.load_records(tmp_path) == [make_record()]


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
        record.config = {"epochs": 5}
    assert records.usable_records(runs, tmp_path, "here")[0] == runs
    runs[1].config["epochs"] = 6
    usable, left_out = records.usable_records(runs, tmp_path, "here")
    assert usable == [runs[0], runs[2]]
    assert "FFN_baseline-seed1" in left_out[0]
    assert records.usable_records(runs, tmp_path, "here", current=[runs[1]])[0] == [runs[1]]


@pytest.mark.parametrize("role", ["source", "teacher"])
@pytest.mark.parametrize("change", ["other weights", "gone"])
def test_table_leaves_out_what_was_made_from_an_older_parent(tmp_path: Path, role: str, change: str) -> None:
    parent, grandchild = make_record(), make_record("KD_FFN_Student_INT8")
    child = make_record("KD_FFN_Student")
    runs = [parent, child, grandchild]
    for record in runs:
        path = tmp_path / record.checkpoint["file"]
        path.write_bytes(record.model.encode())
        record.checkpoint["sha256"] = sha256(path)
    for record, its_parent in ((child, parent), (grandchild, child)):
        record.parents = {role: its_parent.checkpoint | {"model": its_parent.model}}
    assert records.usable_records(runs, tmp_path, "here") == (runs, [])
    path = tmp_path / parent.checkpoint["file"]
    path.write_bytes(b"new weights") if change == "other weights" else path.unlink()
    usable, left_out = records.usable_records([child, grandchild], tmp_path, "here")
    assert usable == []
    assert [line.partition(":")[0] for line in left_out] == ["KD_FFN_Student-seed0", "KD_FFN_Student_INT8-seed0"]


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


def test_latency_is_of_the_first_seed_in_each_runtime() -> None:
    both = {"pytorch": make_measurement(), "onnxruntime": make_measurement()}
    runs = [replace(make_record(seed=1), measurements=both), make_record(seed=0, onnxruntime=make_measurement())]
    timed = [(record.seed, runtime) for record, runtime in first_in(runs, ["pytorch", "onnxruntime"])]
    assert timed == [(1, "pytorch"), (0, "onnxruntime")]
