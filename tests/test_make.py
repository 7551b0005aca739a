"""A row in the making: its parents, weights, files, figures and record, on tiny models."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from builders import edit_json
from tiny import CHAIN, HALVED, OTHER, ROUNDED, SMALL, TAUGHT, ZEROS, FourBits, ZeroSmallest, exchange_weights, make_lab

from mnist_lab.compress.bfloat16 import BFloat16
from mnist_lab.compress.int8 import Calibration, DynamicInt8, StaticInt8
from mnist_lab.compress.train import TrainFFN, TrainMoE
from mnist_lab.errors import RunFailed, WrongPrecision
from mnist_lab.experiments import make as make_module
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import (
    ensure_files,
    ensure_weights,
    find_finished,
    load_or_make,
    load_or_measure,
    make,
    make_all,
)
from mnist_lab.experiments.measure_run import measure_run
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.technique import Form, Made, Proof, Work
from mnist_lab.files import sha256
from mnist_lab.machine import cpu_model
from mnist_lab.models import Model
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.report.columns import COLUMNS
from mnist_lab.report.records import Record, load_record, save_record

pytestmark = pytest.mark.slow

MOE = Row("MoE", TrainMoE(RoutingConfig(num_experts=3)))


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path)


def test_record_tells_how_the_row_came_to_be_and_what_was_measured(lab: Lab) -> None:
    record = make(Run(lab, ROUNDED, 0))
    assert (record.family, record.model, record.technique) == ("Rounded", "Rounded", "kd + 4 bits")
    assert record.original == "Taught"
    assert record.parents["source"]["sha256"] == sha256(Run(lab, TAUGHT, 0).output)
    assert record.config["form"]["kind"] == "FourBits"
    assert record.architecture["widths"] == [8]
    assert record.proof == {"text": "at most 15 levels a matrix"}
    assert record.measurements.keys() == {"pytorch", "onnxruntime"}
    for measurement in record.measurements.values():
        assert 0.5 < measurement.same_class <= 1
        assert measurement.largest_gap > 1e-4  # rounding is against the original, not against itself
    assert load_record(Run(lab, ROUNDED, 0).record).model == "Rounded"


def test_fidelity_is_against_the_chains_original(lab: Lab) -> None:
    further = Row("Further", ZeroSmallest(0.9), source=HALVED)
    record = make(Run(lab, further, 0))
    assert (record.original, record.technique) == ("Small", "zeroed + zeroed")
    original, own = (make(Run(lab, row, 0)) for row in (SMALL, further))
    assert original.measurements["pytorch"].same_class == 1
    assert own.measurements["pytorch"].largest_gap > make(Run(lab, HALVED, 0)).measurements["pytorch"].largest_gap


def test_same_seed_writes_the_same_bytes(lab: Lab) -> None:
    for row in (SMALL, MOE, TAUGHT):
        run = Run(lab, row, 3)
        make(run)
        first = run.output.read_bytes()
        make(run)
        assert run.output.read_bytes() == first


def test_figure_of_a_file_that_holds_no_model_is_blank_and_not_due_for_ever(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(replace(lab, columns=(*COLUMNS, ZEROS)), Row("Int8", source=SMALL, form=StaticInt8(Calibration(100))), 0)
    assert make(run).figures == {"zeros": None}
    monkeypatch.setattr(make_module, "measure_run", None)
    assert load_or_make(run).figures == {"zeros": None}


def test_source_and_teacher_are_loaded_once_and_proved_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(lab, Row("Int8", source=MOE, form=StaticInt8(Calibration(100))), 0)
    make(Run(lab, MOE, 0))
    loaded: list[str] = []
    proved: list[str] = []
    load, prove = Run.load, StaticInt8.prove

    def spy_load(self: Run) -> Model:
        loaded.append(self.row.family)
        return load(self)

    def spy_prove(self: StaticInt8, model: Model, file: Path) -> Proof:
        proved.append(file.suffix)
        return prove(self, model, file)

    monkeypatch.setattr(Run, "load", spy_load)
    monkeypatch.setattr(StaticInt8, "prove", spy_prove)
    record = make(run)
    assert loaded == ["MoE"]
    assert proved == [".onnx"]
    assert record.proof is not None
    assert "QGemm" in record.proof["text"] or "QLinearMatMul" in record.proof["text"]
    assert record.routes_changed is not None


def test_every_form_of_a_mixture_of_experts(lab: Lab) -> None:
    forms: dict[str, Form] = {"INT8": DynamicInt8(), "BF16": BFloat16(), "FP32": FourBits()}
    for precision, form in forms.items():
        record = make(Run(lab, Row(f"MoE_{precision}", source=MOE, form=form), 0))
        assert record.precision == precision
        assert record.layout is not None
        assert record.original == "MoE-E3"
        assert record.params_total > record.params_active


def test_other_classes_and_image_sizes_reach_model_artifact_and_record(tmp_path: Path) -> None:
    from tiny import make_dataset

    lab = make_lab(tmp_path, dataset=make_dataset(num_classes=3, image_size=(20, 24)))
    for row in (SMALL, MOE, Row("MoE_INT8", source=MOE, form=StaticInt8(Calibration(100)))):
        record = make(Run(lab, row, 0))
        assert record.architecture["data"]["num_classes"] == 3
        assert len(record.measurements["onnxruntime"].confusion) == 3
        if record.expert_by_class is not None:
            assert len(record.expert_by_class) == 3


@dataclass(frozen=True)
class Nothing:
    """A step that takes no effect."""

    label: ClassVar[str] = "nothing"
    cost: ClassVar[float] = 0.0

    def make(self, work: Work) -> Made:
        assert work.source is not None
        return Made(work.source, [], {"text": ""})


def test_technique_that_changes_nothing_is_an_error_and_writes_nothing(lab: Lab) -> None:
    run = Run(lab, Row("Same", Nothing(), source=SMALL), 0)
    with pytest.raises(RunFailed, match="changed none of Small's weights"):
        make(run)
    assert not run.output.exists()


@dataclass(frozen=True)
class Broken(FourBits):
    """A form that is not what it promises."""

    def prove(self, model: Model, file: Path) -> Proof:
        raise WrongPrecision("not four bits")


def test_form_that_is_disproved_leaves_the_old_file(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(lab, ROUNDED, 0)
    make(run)
    before = {path: path.read_bytes() for path in lab.checkpoints.iterdir()}
    monkeypatch.setattr(FourBits, "prove", Broken.prove)
    with pytest.raises(WrongPrecision):
        make(run)
    assert {path: path.read_bytes() for path in lab.checkpoints.iterdir()} == before


def test_finished_runs_are_neither_made_nor_measured_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Run(lab, row, 0) for row in CHAIN]
    made = [load_or_make(run) for run in runs]
    before = {path: path.stat().st_mtime_ns for path in [*lab.checkpoints.iterdir(), *(lab.results / "runs").iterdir()]}
    monkeypatch.setattr(make_module, "produce", None)  # would fail if they were called
    monkeypatch.setattr(make_module, "measure_run", None)
    assert [load_or_make(run) for run in runs] == made
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("missing", ["test_brier", "validation_loss", "zeros"])
def test_record_that_lacks_a_figure_is_measured_again_without_training(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    lab = replace(lab, columns=(*COLUMNS, ZEROS))
    run = Run(lab, HALVED, 0)
    whole = make(run)
    fields: dict[str, Any] = json.loads(run.record.read_text())
    for measurement in fields["measurements"].values():
        measurement.pop(missing, None)
    fields["figures"].pop(missing, None)
    fields.pop(missing, None)
    edit_json(run.record, fields)
    load_record(run.record)  # can be read as it is
    monkeypatch.setattr(make_module, "produce", None)
    again = load_or_make(run)
    assert again == whole
    assert load_record(run.record) == whole


def test_artifact_that_is_gone_is_written_again_and_one_that_was_exchanged_measured_anew(lab: Lab) -> None:
    run = Run(lab, SMALL, 0)
    record = make(run)
    content = run.artifact.read_bytes()
    run.artifact.unlink()
    assert load_or_make(run) == record
    assert run.artifact.read_bytes() == content
    another = Run(lab, SMALL, 1)
    make(another)
    exchange_weights(run, another)
    after = load_or_make(run)
    for runtime in ("pytorch", "onnxruntime"):
        assert after.measurements[runtime].test_loss != record.measurements[runtime].test_loss


def test_runtime_asked_for_later_is_measured_beside_what_is_known(lab: Lab) -> None:
    first = make(Run(lab, SMALL, 0))
    assert first.measurements.keys() == {"pytorch", "onnxruntime"}
    only = replace(lab, runtimes=("openvino",))
    second = load_or_measure(Run(only, SMALL, 0))
    assert second.measurements.keys() == {"pytorch", "onnxruntime", "openvino"}
    assert second.measurements["pytorch"] == first.measurements["pytorch"]
    assert second.train_seconds == first.train_seconds


def test_measured_alone_a_run_gives_what_making_it_gave(lab: Lab) -> None:
    for row in (SMALL, ROUNDED):
        run = Run(lab, row, 0)
        record = make(run)
        assert replace(measure_run(run), train_seconds=record.train_seconds) == record


def test_fewer_training_images_than_the_calibration_takes_are_all_calibrated_on(lab: Lab) -> None:
    record = make(Run(lab, Row("Int8", source=SMALL, form=StaticInt8(Calibration(5000))), 0))
    assert record.proof is not None
    assert "300 images" in record.proof["text"]


def test_time_left_weighs_runs_by_their_cost(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    records: list[str] = []

    def make_one(run: Run) -> Record:
        records.append(run.name)
        return make(Run(lab, OTHER, 0))

    forms = [Run(lab, Row(f"Form{number}", source=OTHER, form=FourBits()), 0) for number in range(9)]
    make_all([Run(lab, OTHER, 0), *forms], make_one)
    first = capsys.readouterr().out.splitlines()
    lines = [line for line in first if line.startswith("[")]
    assert lines[0].startswith("[1/10, ")
    assert lines[-1].startswith("[10/10, ")
    assert "about 0 s left" in lines[-1]
    # Five epochs and a measurement against nine measurements: what is left takes 1.5 times what was done.
    assert make_module.cost_of(Run(lab, OTHER, 0)) == pytest.approx(6)
    assert sum(make_module.cost_of(run) for run in forms) == pytest.approx(9)


def test_figures_of_another_cpu_stand_until_some_must_be_made_again(lab: Lab) -> None:
    run = Run(lab, SMALL, 0)
    there = make(run)
    there.machine["cpu"] = "there"
    there.measurements["pytorch"].test_acc = there.measurements["onnxruntime"].test_acc = 0.5
    save_record(lab.results, there)
    assert load_or_measure(run) == find_finished(run) == there
    there.measurements["pytorch"].file["sha256"] = ""
    save_record(lab.results, there)
    assert find_finished(run) is None
    again = load_or_measure(run)
    assert again.machine["cpu"] == cpu_model()
    assert 0.5 not in {measurement.test_acc for measurement in again.measurements.values()}


def test_interrupted_run_leaves_what_was_finished(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(self: TrainFFN, work: Work) -> Made:
        raise KeyboardInterrupt

    ensure_weights(Run(lab, SMALL, 0))
    before = {path: path.read_bytes() for path in lab.checkpoints.iterdir()}
    monkeypatch.setattr(TrainFFN, "make", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(Run(lab, OTHER, 0))
    assert {path: path.read_bytes() for path in lab.checkpoints.iterdir()} == before


def test_files_of_the_original_are_there_to_compare_with(lab: Lab) -> None:
    ensure_weights(Run(lab, MOE, 0))
    assert not Run(lab, MOE, 0).artifact.exists()
    run = Run(lab, Row("MoE_INT8", source=MOE, form=DynamicInt8()), 0)
    ensure_weights(run)
    ensure_files(run)
    assert Run(lab, MOE, 0).artifact.exists()
