"""A classifier that was made elsewhere, in all its forms: what runs in integers, what is measured, what is doubted."""

from dataclasses import replace
from pathlib import Path

import foreign_models as made
import numpy as np
import onnx
import pytest
from onnx import helper
from tiny import make_lab

from mnist_lab import measure
from mnist_lab.compress.foreign import Quantized, Unquantized, find_executed, quantize_foreign
from mnist_lab.compress.int8 import Calibration, optimize
from mnist_lab.deploy.foreign import ForeignModel, read_foreign
from mnist_lab.deploy.foreign_session import ForeignSession
from mnist_lab.deploy.image_input import Preparation
from mnist_lab.experiments.lab import Lab
from mnist_lab.report.records import Record
from mnist_lab.studies.compare import doubt, measure_forms, time_all, write_original


def read(model: onnx.ModelProto, folder: Path, preparation: Preparation = Preparation()) -> ForeignModel:
    file = made.save(model, folder / "net.onnx")
    return read_foreign(file, preparation, image_size=(28, 28), num_classes=10)


def forms_of(foreign: ForeignModel, lab: Lab) -> dict[str, Quantized | Unquantized]:
    return {form.tag: form for form in quantize_foreign(foreign, lab.dataset.train.pixels[:200].numpy())}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path)


@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
def test_all_products_of_an_mlp_run_in_integers(operator: str, lab: Lab, tmp_path: Path) -> None:
    foreign = read(made.mlp(operator=operator), tmp_path)
    pixels, labels = lab.test.numpy()
    for tag, form in forms_of(foreign, lab).items():
        assert isinstance(form, Quantized)
        assert form.precision == ("INT4" if tag == "INT4" else "INT8")
        assert sum(form.executed.integer.values()) == 2
        assert form.executed.floats == {}
        assert len(form.content) < 0.3 * len(foreign.content)
        session = ForeignSession(foreign, form.content, threads=1)
        assert measure.accuracy(measure.predict(session.predict, pixels), labels) > 0.98
        found = measure.predict(session.predict, pixels)
        expected = measure.predict(ForeignSession(foreign, foreign.content, threads=1).predict, pixels)
        assert 15 < measure.decibels(found, expected) < 60
        (last,) = (node for node in optimize(form.content).node if "scores" in node.output)
        assert last.op_type != "DequantizeLinear"  # of bytes, in which classes would tie


def test_a_form_with_convolutions_in_float_is_called_mixed(lab: Lab, tmp_path: Path) -> None:
    forms = forms_of(read(made.cnn(), tmp_path), lab)
    precisions = {tag: form.precision for tag, form in forms.items() if isinstance(form, Quantized)}
    assert precisions == {"INT8": "INT8", "INT8-dynamic": "mixed", "INT4": "mixed"}
    static = forms["INT8"]
    assert isinstance(static, Quantized)
    assert static.executed.integer == {"QLinearConv": 1, "QGemm": 1}
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load_from_string(static.content).graph.node)


def test_a_form_in_which_nothing_becomes_integer_is_none(lab: Lab, tmp_path: Path) -> None:
    forms = forms_of(read(made.cnn(head=False), tmp_path), lab)
    assert isinstance(forms["INT8"], Quantized)
    for tag in ("INT8-dynamic", "INT4"):
        form = forms[tag]
        assert isinstance(form, Unquantized)
        assert "no product" in form.reason


def test_what_is_quantized_already_is_not_quantized_again(lab: Lab, tmp_path: Path) -> None:
    static = forms_of(read(made.mlp(), tmp_path), lab)["INT8"]
    assert isinstance(static, Quantized)
    again = read(onnx.load_from_string(static.content), tmp_path)
    (form,) = quantize_foreign(again, lab.dataset.train.pixels[:200].numpy())
    assert isinstance(form, Unquantized)
    assert find_executed(again.content).precision("INT8") == "INT8"


def test_what_the_converter_cannot_do_is_told_and_the_others_are_made(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", fail)
    forms = forms_of(read(made.mlp(), tmp_path), lab)
    assert forms["INT8"] == Unquantized("INT8", "ONNX Runtime's converter cannot: no such luck")
    assert isinstance(forms["INT4"], Quantized)


def test_a_fixed_batch_is_calibrated_too(lab: Lab, tmp_path: Path) -> None:
    model = made.mlp(shape=(64, 1, 28, 28), batch=64)
    model.graph.node[-1].op_type = "Softmax"
    model.graph.node[-1].attribute.append(helper.make_attribute("axis", 0))
    foreign = read(model, tmp_path)
    assert foreign.fixed_batch == 64
    assert isinstance(forms_of(foreign, lab)["INT8"], Quantized)


def records_of(model: onnx.ModelProto, lab: Lab, folder: Path) -> list[Record]:
    original = write_original(read(model, folder), lab)
    return [form[0] for form in measure_forms(original, seed=0) if not isinstance(form, Unquantized)]


def test_figures_are_of_the_files_that_were_written(lab: Lab, tmp_path: Path) -> None:
    fp32, *others = records_of(made.mlp(softmax=True), lab, tmp_path)
    names = [record.model for record in (fp32, *others)]
    assert names == ["net.onnx", "net_INT8.onnx", "net_INT8-dynamic.onnx", "net_INT4.onnx"]
    assert fp32.against_original is None
    assert fp32.params_total == 784 * 32 + 32 * 10 + 42
    before = fp32.measurements["onnxruntime"]
    assert before.size_mib == pytest.approx(4 * fp32.params_total / 2**20)
    for record in (fp32, *others):
        own = record.measurements["onnxruntime"]
        file = lab.checkpoints / record.artifact["file"]
        assert own.file_mb == file.stat().st_size / 1e6
        assert own.test_acc > 0.98
        assert own.test_loss < 0.1  # of probabilities as such
        assert own.same_class > 0.98
        assert own.train_acc is None
    for record in others:
        assert record.original == "net.onnx"
        assert record.against_original is not None
        assert record.against_original["file_ratio"] > 3
        assert record.measurements["onnxruntime"].size_mib < 0.3 * before.size_mib


def test_times_come_from_one_session(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mnist_lab.experiments.latencies.NUM_ROUNDS", 1)
    original = write_original(read(made.mlp(), tmp_path), lab)
    records = [form[0] for form in measure_forms(original, seed=0) if not isinstance(form, Unquantized)]
    time_all(original, records, lab, [])
    measurements = [record.measurements["onnxruntime"] for record in records]
    assert all(set(measurement.latency_ms) == {"1", "64", "1024"} for measurement in measurements)
    assert len({measurement.latency_session for measurement in measurements}) == 1


def test_nothing_is_left_of_a_model_that_cannot_be_run(lab: Lab, tmp_path: Path) -> None:
    model = made.mlp()
    broken = np.full(model.graph.initializer[0].dims, np.inf, np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(broken, model.graph.initializer[0].name))
    with pytest.raises(ValueError, match="no finite numbers"):
        write_original(read(model, tmp_path), lab)
    assert not lab.checkpoints.exists()


class TestDoubt:
    def of(self, model: onnx.ModelProto, lab: Lab, folder: Path, preparation: Preparation = Preparation()) -> str:
        return doubt(write_original(read(model, folder, preparation), lab))

    def test_what_is_as_assumed_is_not_doubted(self, lab: Lab, tmp_path: Path) -> None:
        assert self.of(made.mlp(), lab, tmp_path) == ""

    def test_another_input_that_is_better_is_named(self, lab: Lab, tmp_path: Path) -> None:
        model = made.mlp()
        flat = model.graph.node[0]
        flat.output[0] = "pixels"  # which are white only where they say 255, and all alike below 100
        nodes = [
            helper.make_node("Sub", ["pixels", "dark"], ["above"]),
            helper.make_node("Relu", ["above"], ["flat"]),
        ]
        others = [*model.graph.node[1:]]
        del model.graph.node[1:]
        model.graph.node.extend([*nodes, *others])
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(100, np.float32), "dark"))
        says = self.of(model, lab, tmp_path)
        assert "with --scale 255 --mean 0 --std 1 100.0%" in says
        assert self.of(model, lab, tmp_path, Preparation(scale=255)) == ""

    def test_near_chance_without_a_better_input_asks(self, lab: Lab, tmp_path: Path) -> None:
        model = made.mlp()
        last = next(constant for constant in model.graph.initializer if constant.name == "last")
        values = np.roll(onnx.numpy_helper.to_array(last), 1, axis=0)  # other classes in their places
        last.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), "last"))
        says = self.of(model, lab, tmp_path)
        assert "recognises 0.0%" in says
        assert "in the same order" in says


def test_fewer_training_images_than_calibration_asks_for_will_do(lab: Lab, tmp_path: Path) -> None:
    few = replace(
        lab, dataset=replace(lab.dataset, train=type(lab.dataset.train)(*(part[:50] for part in lab.dataset.train)))
    )
    assert len(few.dataset.train) < Calibration().calibration_size
    assert len(records_of(made.mlp(), few, tmp_path)) == 4
