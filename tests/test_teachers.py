"""Better teachers: several seeds of a row, one of another preset, one that stopped early."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import SMALL, TAUGHT, exchange_weights, make_dataset, make_lab

from mnist_lab.compress.distill import Distil
from mnist_lab.compress.train import TrainEarlyMoE
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import ensure_weights, load_or_make
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import EARLY_MOE, FFN, MOE, TeacherName, student, student_on_images, taught_by
from mnist_lab.experiments.run import Run
from mnist_lab.files import sha256
from mnist_lab.folders import LOCK
from mnist_lab.models.checkpoints import read_metadata
from mnist_lab.models.ensemble import Ensemble
from mnist_lab.training import find_recipe

TOGETHER = Row("Together", Distil(shape=(8,)), teacher=SMALL, teacher_seeds=3)
FROM_WIDE = Row("From_wide", Distil(shape=(8,)), teacher=replace(FFN, preset="wide"))


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    lab = make_lab(tmp_path, recipe=replace(find_recipe("quick", "compact"), epochs=1))
    folder = "digits-compact-quick"
    return replace(lab, checkpoints=tmp_path / "checkpoints" / folder, results=tmp_path / "results" / folder)


def test_ensemble_is_the_mean_of_its_members_logits_and_the_geometric_mean_at_every_temperature() -> None:
    torch.manual_seed(0)
    members = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)) for _ in range(3)]
    pixels = torch.rand(5, 1, 2, 2)
    logits = Ensemble(members)(pixels)
    torch.testing.assert_close(logits, sum(member(pixels) for member in members) / 3)
    for temperature in (1.0, 4.0):
        chances = torch.stack([(member(pixels) / temperature).softmax(dim=1) for member in members])
        geometric = chances.log().mean(dim=0).exp()
        softened = (logits / temperature).softmax(dim=1)
        torch.testing.assert_close(softened, geometric / geometric.sum(dim=1, keepdim=True))


@pytest.mark.slow
def test_members_are_seeds_from_the_rows_own_upward_and_made_when_missing(lab: Lab) -> None:
    run = Run(lab, TOGETHER, 4)
    assert {role: parent.seed for role, parent in run.parents.items()} == {
        "teacher": 4,
        "teacher+1": 5,
        "teacher+2": 6,
    }
    ensure_weights(Run(lab, SMALL, 5))
    before = Run(lab, SMALL, 5).output.stat().st_mtime_ns
    record = load_or_make(run)
    assert Run(lab, SMALL, 5).output.stat().st_mtime_ns == before
    assert {role: parent["file"] for role, parent in record.parents.items()} == {
        role: f"Small-epochs1-seed{seed}.safetensors"
        for role, seed in (("teacher", 4), ("teacher+1", 5), ("teacher+2", 6))
    }
    work = run.work(run.load_parents())
    members = [Run(lab, SMALL, seed).load() for seed in (4, 5, 6)]
    pixels = lab.dataset.validation.pixels
    assert work.teacher is not None
    torch.testing.assert_close(work.teacher(pixels), sum(member(pixels) for member in members) / 3)


@pytest.mark.slow
@pytest.mark.parametrize("member", [0, 1, 2])
def test_member_that_changes_or_goes_makes_the_student_stale(lab: Lab, member: int) -> None:
    run = Run(lab, TOGETHER, 0)
    ensure_weights(run)
    assert run.why_stale() is None
    another = Run(lab, SMALL, 9)
    ensure_weights(another)
    exchange_weights(Run(lab, SMALL, member), another)
    assert run.why_stale() == "stale: Small-epochs1 has changed since"
    Run(lab, SMALL, member).output.unlink()
    assert run.why_stale() == "stale: Small-epochs1 is missing"
    ensure_weights(run)
    assert run.why_stale() is None


@pytest.mark.slow
def test_another_number_of_seeds_is_another_student(lab: Lab) -> None:
    alone, together = Run(lab, replace(TOGETHER, teacher_seeds=1), 0), Run(lab, TOGETHER, 0)
    ensure_weights(together)
    assert alone.why_stale() == "stale: made with other settings"
    of_three = sha256(together.output)
    ensure_weights(alone)
    assert sha256(alone.output) != of_three
    assert together.why_stale() == "stale: Small-epochs1 has changed since"  # or was no parent


@pytest.mark.slow
def test_wide_teachers_files_lie_in_their_own_folder_which_is_free_again(lab: Lab) -> None:
    run = Run(lab, FROM_WIDE, 0)
    record = load_or_make(run)
    teacher = run.parents["teacher"]
    assert teacher.output.parent.name == "digits-wide-quick"
    assert teacher.model == "FFN_baseline-epochs1"
    assert teacher.load().config.widths == (512, 256, 128)  # type: ignore[union-attr]
    assert record.parents["teacher"]["file"] == f"../digits-wide-quick/{teacher.output.name}"
    metadata = read_metadata(teacher.output)
    assert (metadata["preset"], metadata["dataset"]) == ("wide", "digits")
    assert read_metadata(run.output)["preset"] == "compact"
    assert not (teacher.output.parent / LOCK).exists()
    assert not Run(lab, FFN, 0).output.exists()
    assert run.why_stale() is None
    other = Run(teacher.lab, FFN, 1)
    ensure_weights(other)
    exchange_weights(teacher, other)
    assert run.why_stale() == "stale: FFN_baseline-epochs1 has changed since"


def test_other_presets_lab_shares_data_and_departures_and_takes_its_own_recipe(tmp_path: Path) -> None:
    recipe = replace(find_recipe("best", "compact"), epochs=7)
    lab = make_lab(tmp_path, dataset=make_dataset(), recipe_name="best", recipe=recipe)
    wide = lab.on(preset="wide")
    assert wide.dataset is lab.dataset
    assert wide.recipe == replace(find_recipe("best", "wide"), epochs=7)
    assert wide.departures == lab.departures == "-epochs7"
    assert lab.on(preset="wide") is wide
    assert lab.on(preset="compact") is lab
    assert lab.on() is lab
    assert wide.on(preset="compact").checkpoints.name == "digits-compact-best"


@pytest.mark.slow
def test_early_mixture_is_trained_for_a_quarter_of_the_epochs(tmp_path: Path) -> None:
    lab = make_lab(tmp_path, recipe=replace(find_recipe("quick", "compact"), epochs=8))
    run = Run(lab, EARLY_MOE, 0)
    ensure_weights(run)
    assert len(read_metadata(run.output)["curves"]) == 2
    assert run.name == "Sparse_MoE_early-epochs8-seed0"
    assert EARLY_MOE.technique == "early moe"
    assert replace(EARLY_MOE, step=TrainEarlyMoE(0.5)).name == "Sparse_MoE_early-budget0.5"


@pytest.mark.parametrize(
    ("teacher", "name", "seeds", "preset"),
    [
        ("moe", "KD_FFN_Student", 1, None),
        ("ffn", "KD_FFN_Student_from_FFN", 1, None),
        ("ensemble", "KD_FFN_Student-ensemble3", 3, None),
        ("wide-moe", "KD_FFN_Student-wide", 1, "wide"),
        ("wide-ffn", "KD_FFN_Student_from_FFN-wide", 1, "wide"),
        ("early-moe", "KD_FFN_Student-early", 1, None),
    ],
)
def test_students_are_named_after_their_teachers(
    teacher: TeacherName, name: str, seeds: int, preset: str | None
) -> None:
    row = taught_by(teacher, student)
    assert row.teacher is not None
    assert (row.name, row.teacher_seeds, row.teacher.preset) == (name, seeds, preset)
    assert row.teacher.family in {FFN.family, MOE.family, EARLY_MOE.family}
    made = taught_by(teacher, lambda own: student_on_images(student(own), "mixed"))
    assert made.name.startswith(row.family + "-mixed")
    assert (made.teacher, made.teacher_seeds) == (row.teacher, row.teacher_seeds)


def test_rows_of_before_are_what_they_were() -> None:
    assert taught_by("moe", student) == student()
    assert taught_by("ffn", student) == student(FFN)
    assert TAUGHT.parents.keys() == {"teacher"}
