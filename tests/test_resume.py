"""A killed training goes on from its last finished epoch, to the same bits."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import HALVED, SMALL, TAUGHT, exchange_weights, make_lab

from mnist_lab import training
from mnist_lab.compress.adapters import Adapters, AdaptLowRank
from mnist_lab.compress.distill import Distil
from mnist_lab.compress.distill_mixture import DistilMixture, SmallMixture
from mnist_lab.compress.finetune import Duration, Finetuning
from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.prune_weights import PruneWeights
from mnist_lab.compress.qat import Learning, Quantization, TrainQuantized
from mnist_lab.compress.synthetic import DistilOnImages
from mnist_lab.compress.train import TrainMoE
from mnist_lab.data import Augmentation, Split
from mnist_lab.errors import RunFailed, TrainingDiverged
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import ensure_weights
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import trained_quantized
from mnist_lab.experiments.run import Run
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.training import EpochMetrics, Recipe

pytestmark = pytest.mark.slow

MOE = Row("MoE", TrainMoE(RoutingConfig(num_experts=3, balance="cv", capacity_factor=1.0)))
EPOCHS = 4
FEW = Finetuning(finetune_epochs=EPOCHS)
LEARNING = Learning(finetune_epochs=EPOCHS)
RAMP = PruneWeights(finetuning=FEW)
ROWS = {
    "FFN": SMALL,
    "MoE": MOE,
    "student": Row("Student", Distil(shape=(8,)), teacher=SMALL),
    "student mixture": Row("Student", DistilMixture(student=SmallMixture(2, 8)), teacher=MOE),
    "taught on generated images": Row(
        "Generated", DistilOnImages("generated", 300, (8,)), teacher=SMALL
    ),  # by two trainings
    "pruned": Row("Pruned", RAMP, source=SMALL),
    "rounded": trained_quantized(SMALL, TrainQuantized(Quantization(Rounding(2, 16)), LEARNING)),
    "rounded by layers": trained_quantized(SMALL, TrainQuantized(Quantization(learn="layers"), LEARNING)),
    "adapted": Row("Adapted", AdaptLowRank(Adapters(2), Duration(EPOCHS)), source=MOE),
}


class Killed(BaseException):
    """Nobody catches it."""


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path, recipe=Recipe(epochs=EPOCHS, batch_size=64, augmentation=Augmentation()))


def kill_after(epoch: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """End the training in the middle of the epoch after that one; call the result to let it be."""
    run_epoch = training._Training.run_epoch

    def stop(self: training._Training, number: int, on_step: Callable[[], None]) -> "training._EpochSums":
        def on_first_step() -> None:
            if number == epoch + 1:
                raise Killed
            on_step()

        return run_epoch(self, number, on_first_step)

    monkeypatch.setattr(training._Training, "run_epoch", stop)
    return lambda: monkeypatch.setattr(training._Training, "run_epoch", run_epoch)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("epoch", [1, 3])
def test_bits_are_those_of_a_training_without_interruption(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, epoch: int
) -> None:
    monkeypatch.setattr("mnist_lab.compress.synthetic.GENERATOR_RECIPE", Recipe(epochs=1, batch_size=64))
    whole, killed = Run(lab, ROWS[name], 5), Run(replace(lab, checkpoints=tmp_path / "other"), ROWS[name], 5)
    ensure_weights(whole)
    for parent in killed.parents.values():
        ensure_weights(parent)
    revive = kill_after(epoch, monkeypatch)
    with pytest.raises(Killed):
        ensure_weights(killed)
    revive()
    torch.manual_seed(99)
    trained: list[int] = []
    run_epoch = training._Training.run_epoch

    def spy(self: training._Training, number: int, on_step: Callable[[], None]) -> "training._EpochSums":
        trained.append(number)
        return run_epoch(self, number, on_step)

    monkeypatch.setattr(training._Training, "run_epoch", spy)
    capsys.readouterr()
    ensure_weights(killed)
    assert trained == list(range(epoch + 1, EPOCHS + 1))
    assert f"going on after epoch {epoch}" in capsys.readouterr().out
    assert killed.output.read_bytes() == whole.output.read_bytes()
    assert not list(killed.lab.checkpoints.glob("*.fit*"))


@pytest.mark.parametrize("change", ["settings", "data", "threads", "parent", "damage"])
def test_state_of_another_training_is_not_taken(lab: Lab, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    run = Run(lab, TAUGHT, 0)
    ensure_weights(Run(lab, HALVED, 0))
    revive = kill_after(2, monkeypatch)
    with pytest.raises(Killed):
        ensure_weights(run)
    revive()
    (state,) = lab.checkpoints.glob("*.fit1.safetensors")
    if change == "settings":
        run = Run(replace(lab, recipe=replace(lab.recipe, weight_decay=0.5)), TAUGHT, 0)
        state.rename(run.file("fit1.safetensors"))
    elif change == "data":
        shifted = Split(lab.dataset.train.pixels, lab.dataset.train.labels.roll(1))
        run = Run(replace(lab, dataset=replace(lab.dataset, train=shifted)), TAUGHT, 0)
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    elif change == "parent":
        other = Run(lab, HALVED, 1)
        ensure_weights(other)
        exchange_weights(Run(lab, HALVED, 0), other)
    else:
        content = state.read_bytes()
        state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ensure_weights(run)
    fresh = Run(replace(run.lab, checkpoints=lab.checkpoints.with_name("fresh")), run.row, 0)
    for parent in fresh.parents.values():
        parent.output.parent.mkdir(exist_ok=True)
        parent.output.write_bytes(run.parents["teacher"].output.read_bytes())
        source = Run(run.lab, SMALL, 0)
        Run(fresh.lab, SMALL, 0).output.write_bytes(source.output.read_bytes())
    ensure_weights(fresh)
    assert run.output.read_bytes() == fresh.output.read_bytes()
    assert not list(lab.checkpoints.glob("*.fit*"))


def test_training_that_diverged_does_not_go_on_to_diverge_again(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = training._validate

    def diverge(*args: object) -> EpochMetrics:
        metrics = validate(*args)  # type: ignore[arg-type]
        if metrics.epoch == 3:
            raise TrainingDiverged("x")
        return metrics

    monkeypatch.setattr(training, "_validate", diverge)
    with pytest.raises(TrainingDiverged):
        ensure_weights(Run(lab, SMALL, 0))
    assert not list(lab.checkpoints.glob("*"))


def test_state_that_cannot_be_kept_loses_no_training(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RunFailed("cannot write: No space left on device")

    monkeypatch.setattr("mnist_lab.experiments.resume.save_tensors", fail)
    ensure_weights(Run(lab, SMALL, 0))
    assert Run(lab, SMALL, 0).output.exists()
    assert "No space left on device; were it killed" in capsys.readouterr().out
