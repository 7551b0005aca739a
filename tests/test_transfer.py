"""Rows that start on another data set, beside the table's and among those of claims, and the script that compares them.

Bars take the place of data sets that cannot be had.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_scripts import Bench, bench  # noqa: F401  a fixture
from tiny import SMALL, make_dataset, make_lab

from mnist_lab import data
from mnist_lab.compress.adapters import FinetuneAll
from mnist_lab.errors import UserError
from mnist_lab.experiments import make as make_module
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.make import ensure_weights, make
from mnist_lab.experiments.rows import adapted
from mnist_lab.experiments.run import Run
from mnist_lab.studies.claims import run as claims_run

ADAPTED = adapted(SMALL, "mnist")
QUICK = ["--dataset", "kmnist", "--recipe", "quick", "--epochs", "1", "--suite", "transfer", "--seeds", "2"]
TARGET, SOURCE = "kmnist-compact-quick", "mnist-compact-quick"


@pytest.fixture(autouse=True)
def bars(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The data sets that can be had."""
    found = {"mnist", "kmnist"}

    def load(name: Any = None, data_dir: Path | None = None, _: Any = None) -> data.Dataset:
        if name not in found:
            raise UserError(f"there is no {name}")
        return replace(make_dataset(num_train=300 if name == "mnist" else 200), name=name)

    for module in ("mnist_lab.command.console", "mnist_lab.experiments.lab"):
        monkeypatch.setattr(f"{module}.load_dataset", load)
    return found


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    folders = {kind: tmp_path / kind / TARGET for kind in ("checkpoints", "results")}
    return make_lab(tmp_path, dataset=replace(make_dataset(), name="kmnist"), **folders)


def test_another_data_sets_lab_is_beside_this_one_and_its_claims_beside_claims(lab: Lab, tmp_path: Path) -> None:
    claims = lab.for_claims()
    for own, other, within in ((lab, lab.on("mnist"), ""), (claims, claims.on("mnist"), "claims")):
        assert other.dataset.name == "mnist"
        assert other.checkpoints == tmp_path / "checkpoints" / SOURCE / within
        assert other.results == tmp_path / "results" / SOURCE / within
        assert other.folder == tmp_path / "checkpoints" / SOURCE
        assert own.on("kmnist") is own
        assert own.on("mnist") is other
    assert lab.for_claims().on("mnist").checkpoints.name == "claims"  # though the table's is known already


def test_another_data_sets_lab_trains_on_as_many_threads(lab: Lab) -> None:
    assert replace(lab.for_claims(), train_threads=1).on("mnist").train_threads == 1


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Folders that are locked by what makes a row."""
    found: list[Path] = []

    @contextlib.contextmanager
    def lock(folder: Path, *, wait: bool) -> Iterator[None]:
        assert wait
        found.append(folder)
        yield

    monkeypatch.setattr(make_module, "only_run_in", lock)
    return found


def test_folder_of_another_data_set_is_locked_as_long_as_something_is_made_there(lab: Lab, locked: list[Path]) -> None:
    claims = lab.for_claims()
    ensure_weights(Run(claims, ADAPTED, 0))
    assert locked == [claims.on("mnist").folder]
    ensure_weights(Run(claims, adapted(SMALL, "mnist", FinetuneAll()), 0))
    assert len(locked) == 1  # where all is there, nobody waits for who is at work there
    Run(claims.on("mnist"), SMALL, 0).output.unlink()
    ensure_weights(Run(claims, ADAPTED, 0))
    assert len(locked) == 2


def test_record_among_claims_names_the_other_data_sets_folder(lab: Lab) -> None:
    record = make(Run(lab.for_claims(), ADAPTED, 0))
    assert record.original == SOURCE
    assert record.parents["source"]["file"] == f"../../{SOURCE}/claims/Small-seed0.safetensors"


@pytest.mark.slow
class TestScript:
    @pytest.fixture(autouse=True)
    def in_this_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claims_run, "_num_workers", lambda *_: 1)

    def test_source_is_made_first_then_what_becomes_of_it(
        self,
        bench: Bench,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        outcome = bench("claims_mnist", *QUICK, quick=False)
        assert outcome.code == 0, outcome.err
        assert "claims_transfer.md and claims_transfer.json" in outcome.out
        results = bench.folder / "results" / TARGET
        findings = json.loads((results / "claims_transfer.json").read_text())
        assert {(finding["claim"], finding["n"]) for finding in findings} == {(24, 2)}
        assert "a model from mnist, tested: kmnist, compact models" in (results / "claims_transfer.md").read_text()
        made: dict[str, list[str]] = {}
        for path in sorted(bench.folder.glob("checkpoints/*/claims/*.onnx")):
            made.setdefault(path.parent.parent.name, []).append(path.stem)
        seeds = ("seed0", "seed1")
        assert made == {
            SOURCE: [f"Sparse_MoE-epochs1-{seed}" for seed in seeds],
            TARGET: [
                f"Sparse_MoE_{way}-epochs1-{seed}"
                for way in ("adapted-mnist", "adapted-mnist-loftq", "finetuned-mnist")
                for seed in seeds
            ],
        }
        assert not [*bench.folder.rglob(".*")]
        monkeypatch.setattr("mnist_lab.experiments.technique.fit", None)  # would fail if it were called
        assert bench("claims_mnist", *QUICK, quick=False).out.count(" 0 of 2 seeds to make") == 2

    @pytest.mark.parametrize("missing", ["mnist", "kmnist"])
    def test_data_that_cannot_be_had_ends_it_before_anything_is_made(
        self,
        missing: str,
        bench: Bench,  # noqa: F811
        bars: set[str],
    ) -> None:
        bars.remove(missing)
        bench.expect_user_error("claims_mnist", *QUICK, says=f"there is no {missing}", quick=False)
        assert not [*bench.folder.iterdir()]

    def test_no_two_data_sets_are_held_at_once(
        self,
        bench: Bench,  # noqa: F811
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        held: list[str] = []
        most = 0

        @contextlib.contextmanager
        def hold(folder: Path, *, wait: bool) -> Iterator[None]:
            nonlocal most
            held.append(folder.name)
            most = max(most, len(set(held)))
            yield
            held.remove(folder.name)

        for module in ("mnist_lab.command.console", "mnist_lab.experiments.make"):
            monkeypatch.setattr(f"{module}.only_run_in", hold)
        assert bench("claims_mnist", *QUICK, quick=False).code == 0
        assert most == 1
