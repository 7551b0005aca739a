"""A row for one seed: its files, whose they are, and when they are stale."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import CHAIN, HALVED, OTHER, ROUNDED, SMALL, TAUGHT, exchange_weights, make_dataset, make_lab

from mnist_lab.compress.prune_weights import PruneWeights
from mnist_lab.compress.train import TrainFFN
from mnist_lab.errors import UserError
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import ensure_weights, load_or_make
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.run import Run
from mnist_lab.models.checkpoints import read_metadata, save_checkpoint
from mnist_lab.training import find_recipe

pytestmark = pytest.mark.slow


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return make_lab(tmp_path)


def runs_of(lab: Lab, rows: tuple[Row, ...] = CHAIN) -> dict[str, Run]:
    return {row.family: Run(lab, row, 0) for row in rows}


def make_chain(lab: Lab) -> dict[str, Run]:
    runs = runs_of(lab)
    for run in runs.values():
        ensure_weights(run)
    return runs


def test_parents_are_made_when_they_are_needed(lab: Lab) -> None:
    runs = runs_of(lab)
    assert {run.why_stale() for run in runs.values()} == {"missing"}
    ensure_weights(runs["Rounded"])
    assert [family for family, run in runs.items() if run.why_stale() is None] == [
        "Small",
        "Halved",
        "Taught",
        "Rounded",
    ]


def test_change_makes_all_that_depends_on_it_stale_in_both_roles_and_load_remakes_just_that(lab: Lab) -> None:
    runs = make_chain(lab)
    another = Run(lab, SMALL, 1)
    ensure_weights(another)
    exchange_weights(runs["Small"], another)
    assert {family: run.why_stale() for family, run in runs.items()} == {
        "Small": None,
        "Halved": "stale: Small has changed since",
        "Taught": "stale: Halved is stale: Small has changed since",
        "Rounded": "stale: Taught is stale: Halved is stale: Small has changed since",
        "Other": None,
    }
    before = {family: run.output.stat().st_mtime_ns for family, run in runs.items()}
    for run in runs.values():
        load_or_make(run)
    after = {family: run.output.stat().st_mtime_ns for family, run in runs.items()}
    assert {family for family in runs if before[family] != after[family]} == {"Halved", "Taught", "Rounded"}
    assert {run.why_stale() for run in runs.values()} == {None}


def test_teacher_that_changes_makes_its_student_stale_and_what_the_student_became(lab: Lab) -> None:
    runs = make_chain(lab)
    halved = Run(lab, HALVED, 1)
    ensure_weights(halved)
    exchange_weights(runs["Halved"], halved)
    stale = [family for family, run in runs.items() if run.why_stale()]
    assert stale == ["Taught", "Rounded"]


@pytest.mark.parametrize("family", ["Small", "Halved", "Taught"])
def test_parent_that_is_gone_does_not_count_as_unchanged(lab: Lab, family: str) -> None:
    runs = make_chain(lab)
    runs[family].output.unlink()
    below = list(runs)[list(runs).index(family) + 1 : -1]
    assert all("missing" in (runs[child].why_stale() or "") for child in below)
    assert runs["Other"].why_stale() is None


def test_zeros_are_measured_where_they_are_skipped(lab: Lab) -> None:
    pruned = Row("Pruned", PruneWeights(), source=SMALL)
    lab = replace(lab, runtimes=("pytorch", "torch-sparse"))
    assert Run(lab, pruned, 0).runtimes == ["pytorch", "torch-sparse"]
    assert Run(lab, SMALL, 0).runtimes == ["pytorch"]


def test_settings_come_from_the_dataclasses_themselves(lab: Lab) -> None:
    runs = make_chain(lab)
    other_recipe = replace(lab, recipe=replace(lab.recipe, weight_decay=0.5))
    assert "-weight_decay0.5" in Run(other_recipe, SMALL, 0).model
    for step in (TrainFFN((9,)), TrainFFN("student")):
        assert Run(lab, replace(SMALL, step=step), 0).why_stale() == "stale: made with other settings"
    metadata = read_metadata(runs["Small"].output)
    metadata["config"]["recipe"]["weight_decay"] = 0.5
    model = runs["Small"].load()
    for key in ("architecture", "format"):
        del metadata[key]
    save_checkpoint(runs["Small"].output, model, metadata)
    assert runs["Small"].why_stale() == "stale: made with other settings"


def test_name_is_the_rows_and_what_departs_from_the_recipe(lab: Lab) -> None:
    assert Run(lab, SMALL, 3).name == "Small-seed3"
    changed = replace(lab, recipe=replace(find_recipe("quick", "compact"), epochs=2, batch_size=64))
    run = Run(changed, TAUGHT, 3)
    assert run.model == "Taught-epochs2-batch64"
    assert run.output.name == "Taught-epochs2-batch64-seed3.safetensors"
    assert run.parents["teacher"].model == "Halved-epochs2-batch64"


def test_original_is_the_first_of_the_chain_of_sources(lab: Lab) -> None:
    assert Run(lab, HALVED, 0).original.row == SMALL
    assert Run(lab, ROUNDED, 0).original.row == TAUGHT  # a teacher is no source
    assert Run(lab, OTHER, 0).original.row == OTHER


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"preset_name": "wide"}, "preset"), ({"recipe_name": "best"}, "recipe")],
)
def test_file_of_another_lab_is_refused_and_kept(lab: Lab, changes: dict[str, str], says: str) -> None:
    run = make_chain(lab)["Small"]
    before = run.output.read_bytes()
    other = replace(lab, **changes)  # type: ignore[arg-type]
    stranger = Run(replace(other, recipe=find_recipe(other.recipe_name, other.preset_name)), SMALL, 0)
    with pytest.raises(UserError, match=says):
        ensure_weights(stranger)
    assert run.output.read_bytes() == before


def test_file_of_another_seed_is_refused(lab: Lab) -> None:
    run = make_chain(lab)["Small"]
    copy = Run(lab, SMALL, 1)
    copy.output.write_bytes(run.output.read_bytes())
    with pytest.raises(UserError, match="seed 0, not 1"):
        copy.why_stale()


@pytest.mark.parametrize("role", ["source", "teacher"])
def test_source_or_teacher_may_be_of_another_data_set(tmp_path: Path, role: str) -> None:
    lab = make_lab(tmp_path, dataset=replace(make_dataset(), name="mnist"))
    lab = replace(lab, checkpoints=tmp_path / "checkpoints" / "mnist-compact-quick")
    foreign = replace(SMALL, dataset="digits")
    child = replace(HALVED, source=foreign) if role == "source" else replace(TAUGHT, teacher=foreign)
    run = Run(lab, child, 0)
    record = load_or_make(run)
    parent = run.parents[role]
    assert parent.output.parent.name == "digits-compact-quick"
    assert read_metadata(parent.output)["dataset"] == "digits"
    assert lab.checkpoints / record.parents[role]["file"] != lab.checkpoints / parent.output.name
    assert (lab.checkpoints / record.parents[role]["file"]).resolve() == parent.output.resolve()
    assert run.why_stale() is None
    another = Run(parent.lab, foreign, 1)
    ensure_weights(another)
    exchange_weights(parent, another)
    assert run.why_stale() == "stale: Small has changed since"
    assert not Run(lab, SMALL, 0).output.exists()


def test_every_file_says_whose_it_is_and_what_it_was_made_of(lab: Lab) -> None:
    runs = make_chain(lab)
    load_or_make(runs["Rounded"])
    for run in (runs["Taught"], runs["Rounded"]):
        metadata = read_metadata(run.output)
        assert metadata["model"] == run.model
        assert json.dumps(metadata["config"], sort_keys=True) == json.dumps(run.settings, sort_keys=True)
        (role,) = metadata["parents"]
        assert metadata["parents"][role]["file"] == run.parents[role].output.name
        assert not run.is_due(run.artifact)
    another = Run(lab, TAUGHT, 1)
    ensure_weights(another)
    exchange_weights(runs["Taught"], another)
    assert runs["Taught"].is_due(runs["Taught"].artifact)
    assert runs["Rounded"].is_due(runs["Rounded"].artifact)
