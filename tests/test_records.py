import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import HERE, edit_json, make_measurement, make_record

from mnist_lab.errors import UserError
from mnist_lab.files import sha256
from mnist_lab.report import records
from mnist_lab.report.records import Record, first_in
from mnist_lab.report.table import build_table


def test_record_survives_the_disk(tmp_path: Path) -> None:
    record = make_record(pytorch=make_measurement(), onnxruntime=make_measurement(b64=None))
    records.save_record(tmp_path, record)
    assert records.load_records(tmp_path) == [record]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "\x00\x81", '{"measurements": []}', '{"schema": 4}', '{"schema": 4, "measurements": {}}'],
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
    with pytest.raises(UserError, match="schema is 99"):
        records.load_records(tmp_path)


def test_record_that_lacks_figures_or_has_more_is_read(tmp_path: Path) -> None:
    record = make_record()
    records.save_record(tmp_path, record)
    path = records.record_path(tmp_path, record.run_name)
    fields = json.loads(path.read_text())
    del fields["validation_loss"], fields["measurements"]["onnxruntime"]["test_ece"]
    fields["of_a_later_version"] = fields["measurements"]["onnxruntime"]["of_a_later_version"] = 1
    edit_json(path, fields)
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
        edit_json(other, fields)
        with pytest.raises(UserError, match=f"does not say {name}"):
            records.load_record(other)


def test_what_an_interrupted_write_left_is_no_record(tmp_path: Path) -> None:
    records.save_record(tmp_path, make_record())
    (tmp_path / "runs" / ".tmp-abc.json").write_text("{")
    assert records.load_records(tmp_path) == [make_record()]


def write_files(folder: Path, record: Record) -> None:
    """The files that a record is of, with what they hold as it says."""
    for file in (record.checkpoint, record.artifact, *(m.file for m in record.measurements.values())):
        (folder / file["file"]).write_bytes(f"weights of {record.run_name}".encode())
        file["sha256"] = sha256(folder / file["file"])


def test_table_takes_records_of_any_cpu_whose_files_are_here_or_never_were(tmp_path: Path) -> None:
    good, gone = make_record(), make_record("Sparse_MoE")
    for record in (good, gone):
        record.measurements["onnxruntime"].file = {**record.artifact}
    write_files(tmp_path, good)
    elsewhere = [replace(record, machine=HERE | {"cpu": "there"}) for record in (good, gone)]
    assert records.usable_records([good, elsewhere[1]], tmp_path, "here") == ([good, elsewhere[1]], [])
    assert records.usable_records(elsewhere, tmp_path, "here") == (elsewhere, [])
    (line,) = records.usable_records([gone], tmp_path, "here")[1]
    assert "is gone" in line
    (tmp_path / good.artifact["file"]).write_bytes(b"another's")
    assert "has changed" in records.usable_records(elsewhere[:1], tmp_path, "here")[1][0]
    (tmp_path / good.artifact["file"]).unlink()  # some of its files are here, so all must be
    assert "is gone" in records.usable_records(elsewhere[:1], tmp_path, "here")[1][0]


def test_latencies_of_one_cpu_stand_in_a_table(tmp_path: Path) -> None:
    here, there = make_record(), make_record("Sparse_MoE", seed=1, pytorch=make_measurement())
    there.machine = HERE | {"cpu": "there"}
    moved = replace(make_record("FFN_BF16"), machine=there.machine)
    moved.measurements["onnxruntime"].latency_cpu = "here"  # made there, timed here
    there.time_by_job_us = {"sort": 1.0}
    shown, left_out = records.timed_on("here", [here, there, moved])
    assert [shown[0], shown[2]] == [here, moved]
    assert shown[1].measurements["pytorch"] == replace(
        there.measurements["pytorch"], latency_ms={}, threads=None, latency_session=""
    )
    assert shown[1].time_by_job_us is None
    assert left_out == ["latency of Sparse_MoE-seed1 in pytorch: measured on another CPU (there)"]
    assert records.timed_on("there", [there]) == ([there], [])
    table = build_table(shown).set_index("model")
    assert table["test_acc"].notna().all()
    assert table["latency_ms_b64"].notna().to_dict() == {"FFN_baseline": True, "Sparse_MoE": False, "FFN_BF16": True}


@pytest.mark.parametrize("kind", ["checkpoint", "artifact", "measured"])
def test_record_whose_file_has_changed_since_is_left_out_where_files_are_at_hand(tmp_path: Path, kind: str) -> None:
    record = make_record()
    record.measurements["onnxruntime"].file = {"file": "measured", "sha256": ""}
    record.checkpoint["file"], record.artifact["file"] = "checkpoint", "artifact"
    write_files(tmp_path, record)
    (tmp_path / kind).write_bytes(b"another's")
    assert records.usable_records([record], tmp_path, "here")[1] == [
        f"{record.run_name}: {kind} is gone or has changed"
    ]
    assert records.usable_records([record], None, "here") == ([record], [])


def test_table_pools_seeds_of_the_same_settings_and_threads_only(tmp_path: Path) -> None:
    runs = [make_record(seed=seed) for seed in (0, 1, 2)]
    for record in runs:
        record.measurements["onnxruntime"].file = {"file": record.artifact["file"], "sha256": ""}
        write_files(tmp_path, record)
        record.config = {"epochs": 5}
    assert records.usable_records(runs, tmp_path, "here")[0] == runs
    others = (
        replace(runs[1], config={"epochs": 6}),
        replace(runs[1], train_threads=1),
        replace(runs[1], device="cuda"),
    )
    for other in others:
        mixed = [runs[0], other, runs[2]]
        usable, left_out = records.usable_records(mixed, tmp_path, "here")
        assert usable == [runs[0], runs[2]]
        assert "FFN_baseline-seed1" in left_out[0]
        assert records.usable_records(mixed, tmp_path, "here", current=[other])[0] == [other]


@pytest.mark.parametrize("role", ["source", "teacher"])
@pytest.mark.parametrize("change", ["other weights", "gone"])
def test_table_leaves_out_what_was_made_from_an_older_parent(tmp_path: Path, role: str, change: str) -> None:
    parent, grandchild = make_record(), make_record("KD_FFN_Student_INT8")
    child = make_record("KD_FFN_Student")
    runs = [parent, child, grandchild]
    for record in runs:
        record.measurements["onnxruntime"].file = {"file": record.artifact["file"], "sha256": ""}
        write_files(tmp_path, record)
    for record, its_parent in ((child, parent), (grandchild, child)):
        record.parents = {role: {**its_parent.checkpoint, "model": its_parent.model}}
    assert records.usable_records(runs, tmp_path, "here") == (runs, [])
    path = tmp_path / parent.checkpoint["file"]
    path.write_bytes(b"new weights") if change == "other weights" else path.unlink()
    usable, left_out = records.usable_records([child, grandchild], tmp_path, "here")
    assert usable == []
    assert [line.partition(":")[0] for line in left_out] == ["KD_FFN_Student-seed0", "KD_FFN_Student_INT8-seed0"]


def test_edited_copied_or_renamed_record_is_refused(tmp_path: Path) -> None:
    record = make_record()
    records.save_record(tmp_path, record)
    path = records.record_path(tmp_path, record.run_name)
    content = path.read_text()
    path.with_name("FFN_baseline-seed1.json").write_text(content)
    with pytest.raises(UserError, match="seed1.json is broken: it is the record of FFN_baseline-seed0"):
        records.load_records(tmp_path)
    path.write_text(content.replace('"test_acc": 0.98', '"test_acc": 0.99'))
    with pytest.raises(UserError, match="not what was written"):
        records.load_record(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("test_acc", "0.98"),
        ("test_acc", 1.5),
        ("test_loss", -0.1),
        ("bins", {"count": [1.0]}),
        ("latency_ms", {"64": {"median_ms": 1.0}}),
        ("machine", None),
        ("machine", {"cpu": "here"}),
        ("seed", -1),
        ("seed", 0.5),
        ("row", "../../../escaped"),
        ("checkpoint", {"file": "x"}),
        ("curves", [{"epoch": 1}]),
        ("versions", {"torch": 2}),
        ("measurements", {"tensorrt": {}}),
        ("measurements", []),
    ],
)
def test_record_of_wrong_types_or_ranges_is_the_users_error(tmp_path: Path, name: str, value: Any) -> None:
    record = make_record()
    records.save_record(tmp_path, record)
    path = records.record_path(tmp_path, record.run_name)
    fields = json.loads(path.read_text())
    measurement = fields["measurements"]["onnxruntime"]
    (measurement if name in measurement else fields)[name] = value
    edit_json(path, fields)
    with pytest.raises(UserError, match="FFN_baseline-seed0.json is broken"):
        records.load_record(path)


def test_not_a_number_is_no_figure(tmp_path: Path) -> None:
    record = make_record()
    records.save_record(tmp_path, record)
    path = records.record_path(tmp_path, record.run_name)
    edit_json(path, json.loads(path.read_text()) | {"validation_loss": float("nan")})
    with pytest.raises(UserError, match="is broken"):
        records.load_record(path)


def save(folder: Path) -> Record:
    """A record of two images and three classes, and their predictions."""
    record = make_record()
    record.measurements["onnxruntime"].confusion = [[0, 1, 0], [0, 0, 0], [0, 0, 1]]
    logits = np.array([[5.0, 5.0001, 0.0], [-3.0, 0.0, 3.0]], np.float32)
    record.predictions = records.save_predictions(folder, record.run_name, logits, np.array([0, 2]))
    return record


def test_predictions_keep_the_exact_class(tmp_path: Path) -> None:
    predictions = records.load_predictions(tmp_path, save(tmp_path))
    assert predictions.predicted.tolist() == [1, 2]
    assert predictions.labels.tolist() == [0, 2]
    assert np.allclose(predictions.probabilities.sum(axis=1), 1, atol=1e-2)


def test_predictions_that_are_damaged_or_another_runs_are_named(tmp_path: Path) -> None:
    record = save(tmp_path)
    path = records.predictions_path(tmp_path, record.run_name)
    whole = path.read_bytes()
    for content in (None, b"", whole[:-1], whole[:60] + bytes([whole[60] ^ 1]) + whole[61:]):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match="FFN_baseline-seed0.npz"):
            records.load_predictions(tmp_path, record)


@pytest.mark.parametrize("bomb", ["size", "shape", "object"])
def test_predictions_of_other_shapes_are_refused_before_they_take_memory(tmp_path: Path, bomb: str) -> None:
    record = save(tmp_path)
    path = records.predictions_path(tmp_path, record.run_name)
    arrays = {name: np.zeros(2, np.uint8) for name in records.Predictions._fields}
    if bomb == "size":
        arrays["labels"] = np.zeros(10**8, np.uint8)
    elif bomb == "object":
        arrays["labels"] = np.array([{}, {}])
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    record.predictions["sha256"] = sha256(path)
    with pytest.raises(UserError, match="FFN_baseline-seed0.npz is broken"):
        records.load_predictions(tmp_path, record)


def test_latency_is_of_the_first_seed_in_each_runtime() -> None:
    both = {"pytorch": make_measurement(), "onnxruntime": make_measurement()}
    runs = [replace(make_record(seed=1), measurements=both), make_record(seed=0, onnxruntime=make_measurement())]
    timed = [(record.seed, runtime) for record, runtime in first_in(runs, ["pytorch", "onnxruntime"])]
    assert timed == [(1, "pytorch"), (0, "onnxruntime")]
