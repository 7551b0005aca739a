"""What TensorBoard is given: all curves, settings and final figures; and that nothing else changes."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny import SMALL, TAUGHT, FourBits, make_lab

from mnist_lab import training
from mnist_lab.compress.synthetic import DistilOnImages
from mnist_lab.compress.train import TrainMoE
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import load_or_make, make
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.watch import log_folder, log_records
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.training import Recipe

accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
MOE = Row("MoE", TrainMoE(RoutingConfig(num_experts=3)))
RECIPE = Recipe(epochs=2, batch_size=64)
pytestmark = pytest.mark.slow


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path, recipe=RECIPE, log=True)


def read(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Every curve by its name: step and value."""
    found = accumulators.EventAccumulator(str(log_folder(run.lab, run.name))).Reload()
    return {tag: [(one.step, one.value) for one in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_curves_are_those_of_the_record_while_the_model_trains(lab: Lab) -> None:
    run = Run(lab, MOE, 0)
    record = make(run)
    curves = read(run)
    first = record.curves[0]
    for name, expected in {
        "loss/cross_entropy": first["train_terms"]["cross_entropy"],
        "loss/balance": first["train_terms"]["balance"],
        "validation/loss": first["validation_loss"],
        "validation/accuracy": first["validation_acc"],
        "expert load/0": first["expert_load"][0],
        "expert load/2": first["expert_load"][2],
        "dropped share": 0,
        "learning rate": first["learning_rate"],
    }.items():
        assert [step for step, _ in curves[name]] == [1, 2]
        assert curves[name][0][1] == pytest.approx(expected)
    assert not any(name.startswith("final") for name in curves)


def test_each_epoch_is_there_before_the_next_one_begins(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    run, seen = Run(lab, SMALL, 0), []
    real_validate = training._validate

    def spy(*arguments: object) -> object:
        seen.append(len(read(run).get("validation/loss", [])))
        return real_validate(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "_validate", spy)
    make(run)
    assert seen == [0, 1]


def test_same_bits_with_and_without(lab: Lab, tmp_path: Path) -> None:
    plain = make_lab(tmp_path / "plain", recipe=RECIPE)
    for row in (SMALL, MOE, TAUGHT):
        make(Run(lab, row, 0))
        make(Run(plain, row, 0))
        for extension in ("safetensors", "onnx"):
            assert Run(lab, row, 0).file(extension).read_bytes() == Run(plain, row, 0).file(extension).read_bytes()
    assert not (plain.results / "tensorboard").exists()


def test_killed_training_goes_on_with_the_curves_of_before(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(lab, SMALL, 0)
    real_run_epoch = training._Training.run_epoch

    def killed(self: training._Training, epoch: int, on_step: object) -> object:
        if epoch == 2:
            raise KeyboardInterrupt
        return real_run_epoch(self, epoch, on_step)  # type: ignore[arg-type]

    monkeypatch.setattr(training._Training, "run_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        make(run)
    monkeypatch.undo()
    assert [step for step, _ in read(run)["validation/accuracy"]] == [1]
    make(run)
    assert [step for step, _ in read(run)["validation/accuracy"]] == [1, 2]


def test_second_training_of_a_step_follows_the_first(lab: Lab) -> None:
    run = Run(lab, Row("Generated", DistilOnImages("generated", 300, (8,)), teacher=SMALL), 0)
    make(run)
    steps = [step for step, _ in read(run)["learning rate"]]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) > len(make(run).curves)


def test_final_figures_and_settings_stand_beside_the_curves_once(lab: Lab) -> None:
    run = Run(lab, SMALL, 0)
    for _ in range(2):
        log_records(lab, [load_or_make(run)])
    record = load_or_make(run)
    curves = read(run)
    assert len(curves["validation/loss"]) == 2
    expected = record.measurements["onnxruntime"].test_acc
    for name, value in (("test accuracy, onnxruntime", expected), ("validation accuracy", record.validation_acc)):
        ((step, last),) = curves[f"final/{name}"]
        assert step == 2
        assert last == pytest.approx(value)
    found = accumulators.EventAccumulator(str(log_folder(lab, run.name))).Reload()
    content = found.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    for setting in (b"recipe.epochs", b"recipe.learning_rate", b"step.kind", b"TrainFFN"):
        assert setting in content


def test_row_that_was_trained_before_is_written_from_its_record(lab: Lab) -> None:
    plain = replace(lab, log=False)
    rounded = Row("Rounded", source=SMALL, form=FourBits())
    for row in (SMALL, rounded):
        record = make(Run(plain, row, 0))
        for _ in range(2):
            log_records(lab, [record])
    assert len(read(Run(lab, SMALL, 0))["loss/cross_entropy"]) == 2
    curves = read(Run(lab, rounded, 0))
    assert "loss/cross_entropy" not in curves
    assert "final/test loss, pytorch" in curves


def test_curves_of_an_earlier_training_go_with_the_next_one(lab: Lab) -> None:
    run = Run(lab, SMALL, 0)
    make(run)
    make(run)
    assert len(read(run)["validation/loss"]) == 2
    make(replace(run, lab=replace(lab, log=False)))
    assert not log_folder(lab, run.name).exists()
