"""Rows rebuilt from their own checkpoints, by name."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import exchange_weights, make_lab, spec

from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.compress.prune_experts import PruneExperts
from mnist_lab.compress.qat import TrainQuantized
from mnist_lab.compress.train import MixtureWidths
from mnist_lab.errors import UserError
from mnist_lab.experiments.curve_rows import CURVE
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.pipeline import chain_from, parse_pipeline
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import (
    COMPRESSION,
    FFN,
    MOE,
    STUDENTS,
    TABLE,
    adapted,
    bfloat16,
    dense,
    pruned_experts,
    sparse_moe,
    student,
    taught_by,
    trained_quantized,
)
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.trained import find_trained
from mnist_lab.models import PRESETS, build_model
from mnist_lab.models.checkpoints import load_checkpoint, save_checkpoint
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.training import find_recipe

TINY = PRESETS["compact"].student(spec())


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    folder = "digits-compact-quick"
    return make_lab(tmp_path, checkpoints=tmp_path / "checkpoints" / folder, results=tmp_path / "results" / folder)


def chain_of(row: Row) -> Iterator[Row]:
    """A row and all that it needs."""
    for parent in row.parents.values():
        yield from chain_of(parent)
    yield row


def pretend(run: Run) -> None:
    """Checkpoints of a run and of all that it needs, which say of themselves what real ones say."""
    for parent in run.parents.values():
        if not parent.output.exists():
            pretend(parent)
    torch.manual_seed(0)
    save_checkpoint(run.output, build_model(TINY), run.metadata(run.output))


def expect_same(lab: Lab, row: Row, seed: int = 0) -> None:
    run = Run(lab, row, seed)
    pretend(run)
    found = find_trained(lab, run.model, seed)
    assert found.row == row
    assert Run(found.lab, found.row, seed).why_stale() is None
    assert found.config == TINY


EVERY = {row.name: row for top in (*TABLE, *COMPRESSION, *STUDENTS, *CURVE) for row in chain_of(top) if row.step}


def test_every_row_with_weights_of_its_own_is_found_again(lab: Lab) -> None:
    assert len(EVERY) > 80
    for row in EVERY.values():
        expect_same(lab, row)


@pytest.mark.parametrize(
    "row",
    [
        sparse_moe(RoutingConfig(8, 1, gate="chosen")),
        sparse_moe(widths=MixtureWidths(expert_width=64)),
        dense((64, 32)),
        student(sparse_moe(RoutingConfig(8)), DistillationConfig(10, 1)),
        parse_pipeline("experts 2 teacher=self > neurons 0.25 > distil self finetune-epochs=3")[-1],
        parse_pipeline("ffn > small pool2-w4x5s2 temperature=5 > layers 2")[-2],
        taught_by("ensemble", student, 3),
        taught_by("wide-ffn", student),
    ],
    ids=lambda row: row.name,
)
def test_so_is_one_with_settings_of_its_own(lab: Lab, row: Row) -> None:
    expect_same(lab, row, seed=3)


def test_row_of_another_data_set_is_found_with_it(lab: Lab, mnist_dir: Path) -> None:
    lab = replace(lab, data_dir=mnist_dir)
    expect_same(lab, adapted(pruned_experts(PruneExperts()), "mnist"))


def test_what_departs_from_the_recipe_is_taken_over_from_the_file(lab: Lab) -> None:
    usual = find_recipe("quick", "compact")
    departing = lab.with_recipe(replace(usual, epochs=3, learning_rate=0.001))
    pretend(Run(departing, FFN, 0))
    pretend(Run(lab, MOE, 0))
    found = find_trained(lab, "FFN_baseline-epochs3-lr0.001", 0)
    assert found.row == FFN
    assert found.lab.recipe == departing.recipe
    assert find_trained(departing, "FFN_baseline-epochs3-lr0.001", 0).lab == departing
    for asking, name in ((departing, "Sparse_MoE"), (lab.with_recipe(replace(usual, epochs=2)), found.lab.departures)):
        with pytest.raises(UserError, match="drop --epochs"):
            find_trained(asking, "FFN_baseline-epochs3-lr0.001" if name.startswith("-") else name, 0)


def test_name_that_is_not_there_is_told_with_those_that_are(lab: Lab) -> None:
    with pytest.raises(UserError, match="FFN is no trained model of seed 0 in .*; there is none yet"):
        find_trained(lab, "FFN", 0)
    for row in (FFN, sparse_moe(RoutingConfig(8))):
        pretend(Run(lab, row, 0))
    pretend(Run(lab, MOE, 1))
    Run(lab, FFN, 0).file("fit1.safetensors").write_bytes(b"a training that was killed")
    for name in ("", "FFN", "Sparse_MoE", "../digits-compact-quick/FFN_baseline", "FFN_baseline-seed0", "*"):
        with pytest.raises(UserError, match="; there are FFN_baseline, Sparse_MoE-E8$"):
            find_trained(lab, name, 0)


def test_another_form_of_weights_is_no_row_to_start_from(lab: Lab) -> None:
    pretend(Run(lab, bfloat16(FFN), 0))
    with pytest.raises(UserError, match="FFN_BF16 holds .* another form.*: name FFN_baseline$"):
        find_trained(lab, "FFN_BF16", 0)


def test_file_whose_parent_is_gone_says_which(lab: Lab) -> None:
    run = Run(lab, trained_quantized(FFN, TrainQuantized()), 0)
    pretend(run)
    Run(lab, FFN, 0).output.unlink()
    with pytest.raises(UserError, match="no checkpoint at .*FFN_baseline-seed0"):
        find_trained(lab, run.model, 0)


def test_parent_that_changed_makes_the_row_stale(lab: Lab) -> None:
    run = Run(lab, student(FFN), 0)
    pretend(run)
    other = Run(lab, MOE, 0)
    torch.manual_seed(1)
    save_checkpoint(other.output, build_model(TINY), other.metadata(other.output))
    exchange_weights(Run(lab, FFN, 0), other)
    found = find_trained(lab, run.model, 0)
    assert "has changed since" in str(Run(found.lab, found.row, 0).why_stale())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("step", {"kind": "TrainGPT"}, "no technique is called TrainGPT"),
        ("step", {"kind": "TrainFFN", "shape": 3.5}, "is broken"),
        ("step", {"kind": "PruneExperts"}, "settings of another version"),
        ("recipe", {"epochs": "many"}, "is broken"),
        ("step", {}, "is broken"),
    ],
)
def test_file_that_says_nonsense_ends_in_one_line(lab: Lab, field: str, value: object, says: str) -> None:
    run = Run(lab, student(FFN, DistillationConfig(temperature=5)), 0)
    pretend(run)
    model, metadata = load_checkpoint(run.output)
    del metadata["architecture"], metadata["format"]
    save_checkpoint(run.output, model, metadata | {"config": metadata["config"] | {field: value}})
    with pytest.raises(UserError, match=says):
        find_trained(lab, run.model, 0)


def test_chain_knows_what_the_file_holds() -> None:
    preset = PRESETS["compact"]
    assert chain_from(FFN, preset.ffn(spec())).num_experts == 1
    config = preset.moe(spec(), RoutingConfig(8))
    assert chain_from(MOE, config).num_experts == 8
    apart = replace(config, expert_widths=(256,) + (8,) * 7)
    assert chain_from(MOE, apart).has_widths
    assert chain_from(MOE, replace(config, shared_rank=4)).has_base
