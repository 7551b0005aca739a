"""What is said of a deployed file: beside it, in it, and in a copy that gives probabilities."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from builders import edit_json
from onnx import numpy_helper
from test_small import make_small
from tiny import SMALL, make_dataset, make_lab, spec

from mnist_lab.compress import int8
from mnist_lab.compress.float32 import Float32
from mnist_lab.compress.int8 import DynamicInt8, StaticInt8
from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.prune_weights import Pruner, weight_matrices
from mnist_lab.compress.qmoe import FusedExperts
from mnist_lab.compress.weight_only import WeightOnly
from mnist_lab.data import Dataset
from mnist_lab.deploy.artifacts import read_onnx, read_onnx_metadata, save_onnx
from mnist_lab.deploy.card import card_path, depends_on_batch, describe, features_needed, load_card, save_card
from mnist_lab.deploy.copy import copy_artifact
from mnist_lab.deploy.onnx import interface_of
from mnist_lab.errors import UserError
from mnist_lab.experiments import make as make_module
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import load_or_make, make
from mnist_lab.experiments.measure_run import find_known
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import FFN, MOE, dynamic_int8, for_any_cpu, static_int8
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.technique import Form, Work
from mnist_lab.files import sha256
from mnist_lab.measure import Array, log_softmax
from mnist_lab.models import PRESETS, Model, build_model
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.runtimes import open_session
from mnist_lab.training import find_recipe

pytestmark = pytest.mark.slow
VNNI = "avx512_vnni or avx_vnni"
DYNAMIC = Row("Dynamic", source=SMALL, form=DynamicInt8(reduced_range=False))
STATIC = Row("Static", source=SMALL, form=StaticInt8(reduced_range=False))
NAMED = replace(spec(), classes=tuple("abcdefghij"), polarity="dark-on-light")


def named(dataset: Dataset) -> Dataset:
    return replace(dataset, spec=replace(dataset.spec, classes=NAMED.classes, polarity=NAMED.polarity))


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path, dataset=named(make_dataset()))


def make_model(kind: str) -> Model:
    torch.manual_seed(0)
    preset = PRESETS["compact"]
    if kind == "small":
        return make_small()
    return build_model(preset.student(NAMED) if kind == "ffn" else preset.moe(NAMED, RoutingConfig(4, 2))).eval()


def write(form: Form, model: Model, file: Path) -> Path:
    work = Work(make_dataset(), PRESETS["compact"], find_recipe("quick", "compact"), seed=0, device="cpu", name="x")
    form.write(model, file, work, {"model": "x", "dataset": "mnist"})
    return file


class TestCard:
    def test_says_what_the_file_takes_and_what_was_measured_of_it(self, lab: Lab) -> None:
        run = Run(lab, DYNAMIC, 0)
        record = make(run)
        card: dict[str, Any] = json.loads(card_path(run.artifact).read_text())
        assert (card["file"], card["sha256"]) == (run.artifact.name, sha256(run.artifact))
        says = card["interface"]
        assert says["classes"] == list("abcdefghij")
        assert (says["image_size"], says["range"], says["polarity"]) == ([28, 28], [0, 1], "dark-on-light")
        session = onnx.load(run.artifact).graph
        assert ([says["input"]], says["outputs"]) == ([i.name for i in session.input], [o.name for o in session.output])
        measured = record.measurements["onnxruntime"]
        test, alone = card["accuracy"]["test"], card["accuracy"]["test, one by one"]
        assert test == {"accuracy": measured.test_acc, "num_images": 100, "runtime": "onnxruntime"}
        assert alone["accuracy"] == measured.test_acc_b1
        assert card["accuracy"]["validation"]["accuracy"] == record.validation_acc
        assert card["parents"]["source"]["sha256"] == sha256(Run(lab, SMALL, 0).output)
        assert (card["cpu_features"], card["depends_on_batch"]) == (VNNI, True)
        assert load_card(run.artifact) is not None

    @pytest.mark.parametrize("harm", ["gone", "damaged", "of before"])
    def test_is_written_again_where_it_is_not_right(self, lab: Lab, harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
        run = Run(lab, SMALL, 0)
        make(run)
        path = card_path(run.artifact)
        whole = path.read_bytes()
        if harm == "gone":
            path.unlink()
        elif harm == "damaged":
            path.write_bytes(whole[:100])
        else:
            edit_json(path, json.loads(whole) | {"accuracy": {}})
        monkeypatch.setattr(make_module, "measure_run", None)  # would fail if it were called
        load_or_make(run)
        assert path.read_bytes() == whole
        before = path.stat().st_mtime_ns
        load_or_make(run)
        assert path.stat().st_mtime_ns == before

    def test_makes_no_older_file_stale(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        """As earlier versions wrote them: without interface, without what 8-bit weights need, without a card."""
        runs = [Run(lab, row, 0) for row in (SMALL, STATIC)]
        for run in runs:
            make(run)
            says = read_onnx_metadata(run.artifact)
            save_onnx(
                read_onnx(run.artifact), run.artifact, {k: says[k] for k in says.keys() - {"interface", "cpu_features"}}
            )
            card_path(run.artifact).unlink()
        written = [run.artifact.read_bytes() for run in runs]
        monkeypatch.setattr(make_module, "produce", None)
        monkeypatch.setattr(make_module, "write_form", None)
        for run in runs:
            load_or_make(run)
            assert describe(run.artifact).interface.classes == NAMED.classes
        assert [run.artifact.read_bytes() for run in runs] == written

    def test_of_another_file_is_no_card_and_an_edited_one_is_refused(self, lab: Lab) -> None:
        run = Run(lab, SMALL, 0)
        make(run)
        content = card_path(run.artifact).read_bytes()
        card_path(run.artifact).write_bytes(content.replace(b'"Small"', b'"Large"'))
        with pytest.raises(UserError, match="Small-seed0.json is broken"):
            describe(run.artifact)
        card_path(run.artifact).write_bytes(content)
        save_onnx(read_onnx(run.artifact), run.artifact, {"model": "Other"})
        assert load_card(run.artifact) is None
        assert (describe(run.artifact).model, describe(run.artifact).accuracy) == ("Other", {})

    def test_that_does_not_fit_its_file_is_refused(self, tmp_path: Path) -> None:
        file = write(Float32(), make_model("ffn"), tmp_path / "x.onnx")
        card = describe(file)
        for interface in (replace(card.interface, classes=("a",)), replace(card.interface, image_size=(8, 8))):
            save_card(file, replace(card, interface=interface))
            with pytest.raises(UserError, match="does not fit"):
                describe(file)


@pytest.mark.parametrize("form", [Float32(), DynamicInt8(), StaticInt8(), WeightOnly()], ids=str)
@pytest.mark.parametrize("kind", ["ffn", "moe"])
def test_file_itself_says_what_it_takes(form: Form, kind: str, tmp_path: Path) -> None:
    file = write(form, make_model(kind), tmp_path / "x.onnx")
    assert read_onnx_metadata(file)["interface"] == json.loads(json.dumps(asdict(interface_of(NAMED))))
    assert describe(file).interface == interface_of(NAMED)


def test_fused_file_says_it_too(tmp_path: Path) -> None:
    assert describe(write(FusedExperts(8), make_model("moe"), tmp_path / "x.onnx")).interface == interface_of(NAMED)


def test_smallest_files_leave_it_to_the_card(tmp_path: Path) -> None:
    file = write(WeightOnly(Rounding(4)), make_model("small"), tmp_path / "x.onnx")
    assert read_onnx_metadata(file) == {"model": "x", "dataset": "mnist"}
    card = describe(file)
    assert card.interface.classes == tuple(map(str, range(10)))
    save_card(file, replace(card, interface=interface_of(NAMED)))
    assert describe(file).interface.polarity == "dark-on-light"


FORMS: dict[str, Callable[[bool], Form]] = {
    "static": lambda reduced: StaticInt8(reduced_range=reduced),
    "dynamic": lambda reduced: DynamicInt8(reduced_range=reduced),
}


@pytest.mark.parametrize("kind", ["ffn", "moe", "small"])
@pytest.mark.parametrize("mode", FORMS)
def test_weights_for_any_cpu_overflow_nowhere(mode: str, kind: str, tmp_path: Path) -> None:
    model = make_model(kind)
    largest = {}
    for reduced in (False, True):
        form = FORMS[mode](reduced)
        file = write(form, model, tmp_path / f"{reduced}.onnx")
        graph = read_onnx(file).graph
        weights = [
            numpy_helper.to_array(c).astype(int) for c in graph.initializer if c.name.endswith("weight_quantized")
        ]
        largest[reduced] = max(np.abs(weight).max() for weight in weights)
        needed = None if reduced else VNNI
        assert (features_needed(graph), read_onnx_metadata(file)["cpu_features"]) == (needed, needed)
        assert ("7-bit weights, for any CPU" in form.prove(model, file)["text"]) == reduced
    assert 255 * 2 * largest[True] < 2**15 <= 255 * 2 * largest[False]  # two products in 16 bits


def test_sparse_weights_need_vnni_as_dense_ones_do(tmp_path: Path) -> None:
    model = make_model("ffn")
    matrices = weight_matrices(model)
    pruner = Pruner(model, dict.fromkeys(matrices, torch.ones(1, 1)), dict.fromkeys(matrices, 0.05))
    pruner.cut()
    pruner.fold()
    file = write(StaticInt8(reduced_range=False), model, tmp_path / "x.onnx")
    assert onnx.load(file).graph.sparse_initializer
    assert describe(file).cpu_features == VNNI


def test_only_products_of_bytes_need_vnni(tmp_path: Path) -> None:
    for form in (Float32(), WeightOnly(Rounding(4)), WeightOnly(Rounding(8))):
        assert features_needed(read_onnx(write(form, make_model("ffn"), tmp_path / "x.onnx")).graph) is None


@pytest.mark.parametrize("flags", [set(), {"avx512_vnni"}])
def test_rows_for_any_cpu(flags: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "cpu_flags", lambda: flags)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    names = {"FFN_PTQ_INT8": static_int8(FFN, StaticInt8()), "Sparse_MoE_INT8": dynamic_int8(MOE)}
    names |= {"FFN_PTQ_INT8-dynamic": dynamic_int8(FFN)}
    for name, row in names.items():
        wanted = for_any_cpu(row)
        assert row.name == name
        assert isinstance(wanted.form, StaticInt8 | DynamicInt8)
        assert wanted.form.reduced_range
        assert wanted.name == (f"{name}-any-cpu" if flags else name)
        assert (wanted == row) == (not flags)


class TestAlone:
    """Images one at a time, where scales are those of a batch."""

    def test_is_measured_of_dynamic_forms_alone(self, lab: Lab) -> None:
        for row in (SMALL, STATIC, Row("Few", source=SMALL, form=WeightOnly())):
            measured = make(Run(lab, row, 0)).measurements["onnxruntime"]
            dynamic = depends_on_batch(read_onnx(Run(lab, row, 0).artifact).graph)
            assert (measured.test_acc_b1 is not None, measured.other_class_b1 is not None) == (dynamic, dynamic)
            assert dynamic == (row.family == "Few")

    def test_is_of_batches_of_one(self, lab: Lab) -> None:
        run = Run(lab, DYNAMIC, 0)
        measured = make(run).measurements["onnxruntime"]
        pixels, labels = lab.test.numpy()
        session = open_session("onnxruntime", run.artifact, precision="INT8", threads=1)
        alone = np.concatenate([session.predict(pixels[i : i + 1]).copy() for i in range(len(pixels))])
        assert measured.test_acc_b1 == pytest.approx((alone.argmax(1) == labels).mean())
        differs = (alone.argmax(1) != session.predict(pixels).argmax(1)).mean()
        assert measured.other_class_b1 == pytest.approx(differs)

    def test_old_record_without_it_is_due_and_no_other(self, lab: Lab) -> None:
        for row in (STATIC, DYNAMIC):
            run = Run(lab, row, 0)
            whole = make(run)
            fields = json.loads(run.record.read_text())
            for measurement in fields["measurements"].values():
                del measurement["test_acc_b1"], measurement["other_class_b1"]
            edit_json(run.record, fields)
            known = find_known(run)
            assert known is not None
            assert set(known.measurements) == (set() if row is DYNAMIC else {"onnxruntime"})
            assert load_or_make(run) == whole

    def test_static_gives_the_same_whatever_the_batch(self, lab: Lab) -> None:
        run = Run(lab, STATIC, 0)
        make(run)
        session, pixels = open_session("onnxruntime", run.artifact, precision="INT8", threads=1), lab.test.numpy()[0]
        alone = np.concatenate([session.predict(pixels[i : i + 1]).copy() for i in range(20)])
        np.testing.assert_array_equal(alone, session.predict(pixels)[:20])


COPIED: dict[str, tuple[str, Form]] = {
    "fp32": ("ffn", Float32()),
    "int8": ("ffn", StaticInt8()),
    "dynamic moe": ("moe", DynamicInt8()),
    "static moe": ("moe", StaticInt8()),
    "4 bits": ("ffn", WeightOnly(Rounding(4))),
    "4 bits in groups": ("moe", WeightOnly(Rounding(4, 16))),
    "smallest": ("small", WeightOnly(Rounding(4))),
    "fused": ("moe", FusedExperts(4)),
}


class TestCopy:
    @pytest.mark.parametrize("name", COPIED)
    def test_gives_probabilities_and_class(self, name: str, tmp_path: Path) -> None:
        kind, form = COPIED[name]
        file, copy = write(form, make_model(kind), tmp_path / "x.onnx"), tmp_path / "copy" / "y.onnx"
        copy_artifact(file, copy, probabilities=True)
        pixels = np.random.default_rng(1).random((5, 1, 28, 28), np.float32)
        logits, probabilities, classes = run(copy, pixels)
        np.testing.assert_array_equal(logits, run(file, pixels)[0])
        np.testing.assert_allclose(probabilities, np.exp(log_softmax(logits)), atol=1e-6)
        np.testing.assert_array_equal(classes, logits.argmax(axis=1))
        assert describe(copy).interface.outputs == ("logits", "probabilities", "class")
        assert open_session("onnxruntime", copy, precision="FP32", threads=1).predict(pixels).shape == (5, 10)
        assert read_onnx_metadata(copy) == read_onnx_metadata(file)

    @pytest.mark.parametrize("name", ["fp32", "int8", "static moe"])
    def test_runs_in_openvino(self, name: str, tmp_path: Path) -> None:
        kind, form = COPIED[name]
        file, copy = write(form, make_model(kind), tmp_path / "x.onnx"), tmp_path / "y.onnx"
        copy_artifact(file, copy, probabilities=True)
        pixels = np.random.default_rng(1).random((5, 1, 28, 28), np.float32)
        compiled = openvino.Core().compile_model(str(copy), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        logits, probabilities, classes = (compiled(pixels)[place] for place in range(3))
        np.testing.assert_allclose(probabilities, np.exp(log_softmax(logits)), atol=1e-6)
        np.testing.assert_array_equal(classes, logits.argmax(axis=1))
        session = open_session("openvino", copy, precision="FP32" if name == "fp32" else "INT8", threads=1)
        np.testing.assert_allclose(session.predict(pixels), logits, atol=1e-4)

    def test_has_a_card_of_its_own_with_what_was_measured(self, lab: Lab, tmp_path: Path) -> None:
        run = Run(lab, STATIC, 0)
        make(run)
        original, copied = describe(run.artifact), copy_artifact(run.artifact, tmp_path / "y.onnx", probabilities=False)
        assert load_card(tmp_path / "y.onnx") == copied
        assert copied.sha256 == sha256(tmp_path / "y.onnx")
        assert (copied.accuracy, copied.cpu_features) == (original.accuracy, VNNI)
        assert copied.parents["copied"]["sha256"] == sha256(run.artifact)

    def test_bad_names_and_second_copies_are_refused(self, tmp_path: Path) -> None:
        file = write(Float32(), make_model("ffn"), tmp_path / "x.onnx")
        before = file.read_bytes()
        for output, says in (("x.onnx", "the artifact itself"), ("x.json", "ends in .onnx"), ("y", "ends in .onnx")):
            with pytest.raises(UserError, match=says):
                copy_artifact(file, tmp_path / output, probabilities=True)
        copy_artifact(file, tmp_path / "y.onnx", probabilities=True)
        with pytest.raises(UserError, match="gives probabilities already"):
            copy_artifact(tmp_path / "y.onnx", tmp_path / "z.onnx", probabilities=True)
        assert file.read_bytes() == before
        assert {path.name for path in tmp_path.iterdir()} == {"x.onnx", "y.onnx", "y.json"}


def run(file: Path, pixels: Array) -> list[Any]:
    """As a client without the suite does."""
    import onnxruntime

    found: list[Any] = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(
        None, {"pixels": pixels}
    )
    return found
