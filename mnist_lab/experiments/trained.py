"""Rows that were trained before, as their checkpoints tell them: any of them is a source or a teacher by its name."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from mnist_lab.errors import UserError
from mnist_lab.experiments import rows
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.row import Row, describe
from mnist_lab.experiments.run import Provenance, read_provenance
from mnist_lab.experiments.technique import Step
from mnist_lab.files import as_json, reading
from mnist_lab.models import ModelConfig, PresetName, config_from_dict
from mnist_lab.models.checkpoints import read_metadata
from mnist_lab.report.records import Parent
from mnist_lab.sources import DatasetName
from mnist_lab.training import Recipe

# By the name that a file gives them: rows.py has a line for each, and so imports it.
STEPS: dict[str, type[Step]] = {
    name: kind for name, kind in vars(rows).items() if isinstance(kind, type) and hasattr(kind, "make")
}


class Trained(NamedTuple):
    """A row with a checkpoint."""

    lab: Lab  # that it was asked for in, with whatever departs from the recipe in the row's name
    row: Row
    config: ModelConfig  # of its model


def find_trained(lab: Lab, name: str, seed: int, *, dataset: DatasetName | None = None) -> Trained:
    """The row whose checkpoint of this seed bears that name, `Sparse_MoE-E8` or `FFN_baseline-epochs3`.

    A lab with the recipe's own settings becomes one with the file's.

    Args:
        dataset: that it was trained on; the lab's when not given.

    Raises:
        UserError: there is no such file, or it holds no trained weights, or is broken; it was trained by a recipe that
            departs in other ways than this lab's; or by a version that trained otherwise.
    """
    there = lab.on(dataset)
    names = _names(there, seed)
    if name not in names:
        others = f"there are {', '.join(names)}" if names else "there is none yet"
        raise UserError(f"{name} is no trained model of seed {seed} in {there.checkpoints}; {others}")
    file = there.file(f"{name}-seed{seed}", "safetensors")
    found = read_provenance(file)
    lab = _with_recipe_of(lab, found, file)
    row = _rebuild(lab.on(dataset), found, file)
    with reading(file):
        return Trained(lab, row, config_from_dict(read_metadata(file)["architecture"]))


def _names(lab: Lab, seed: int) -> list[str]:
    ending = f"-seed{seed}.safetensors"
    return sorted(path.name.removesuffix(ending) for path in lab.checkpoints.glob(f"[!.]*{ending}"))


def _with_recipe_of(lab: Lab, found: Provenance, file: Path) -> Lab:
    if "recipe" not in found.config:
        return lab
    with reading(file):
        recipe = msgspec.convert(found.config["recipe"], Recipe)
    if recipe == lab.recipe:
        return lab
    if lab.departures:
        raise UserError(
            f"{found.model} was trained otherwise than {lab.departures.removeprefix('-')} says: drop --epochs, "
            "--batch-size and --learning-rate, to take over those that it was trained with"
        )
    return lab.with_recipe(recipe)


def _rebuild(lab: Lab, found: Provenance, file: Path) -> Row:
    """The row of a checkpoint, from what it and those that it was made from say."""
    parents = {role: _parent(lab, parent) for role, parent in found.parents.items() if role in {"source", "teacher"}}
    source, teacher = parents.get("source"), parents.get("teacher")
    if found.config.get("step") is None:
        other = f": name {source.name}" if source is not None else ""
        raise UserError(f"{found.model} holds a trained model's weights in another form, and nothing follows it{other}")
    with reading(file):
        step = _build(found.config["step"])
        name = found.model.removesuffix(lab.departures)
        family = re.split("[-+]", name, maxsplit=1)[0]
        num_teachers = sum(role.startswith("teacher") for role in found.parents)
        row = Row(family, step, source, teacher, teacher_seeds=max(1, num_teachers))
        ending = row.name.removeprefix(family)
        row = replace(row, variant=name.removeprefix(family).removesuffix(ending).removeprefix("-"))
    if row.name != name or as_json(describe(step)) != found.config["step"]:
        raise UserError(f"{found.model} was made with settings of another version: make it anew")
    return row


def _parent(lab: Lab, parent: Parent) -> Row:
    """A row that another was made from, of its own data set and preset where those are not the other's."""
    file = lab.checkpoints / parent["file"]
    found = read_provenance(file)
    with reading(file):
        dataset, preset = msgspec.convert((found.dataset, found.preset), tuple[DatasetName, PresetName])
        row = _rebuild(lab.on(dataset, preset), found, file)
        return replace(
            row,
            dataset=None if dataset == lab.dataset.name else dataset,
            preset=None if preset == lab.preset_name else preset,
        )


def _build(settings: dict[str, Any]) -> Step:
    kind = STEPS.get(settings["kind"])
    if kind is None:
        raise ValueError(f"no technique is called {settings['kind']}")
    return msgspec.convert(settings, kind)
