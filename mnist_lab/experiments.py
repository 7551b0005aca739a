"""Rows of the table in the making: train or convert → save → export → measure → record."""

import time
from dataclasses import asdict

import torch

from mnist_lab.checkpoints import save_checkpoint
from mnist_lab.compress.distill import distillation_objective
from mnist_lab.convert import artifact_of, ensure_artifact, quantize_row, round_row
from mnist_lab.evaluate import measure_row
from mnist_lab.files import sha256
from mnist_lab.lab import Lab, find_reason_to_make, identity, load_parent, model_config
from mnist_lab.machine import describe_machine, package_versions
from mnist_lab.models import build_model
from mnist_lab.records import Measurement, Record, load_record
from mnist_lab.rows import Quantized, Rounded, Row, Trained
from mnist_lab.runtimes import RUNTIMES, RuntimeName
from mnist_lab.training import Objective, fit, supervised_loss


def make_row(lab: Lab, row: Row, seed: int) -> Record:
    """Train or convert one model, save and export it, measure its quality, and keep the record.

    Raises:
        UserError: its parent's checkpoint is missing or broken; a file in its place is not its own; a folder
            cannot be written.
        TrainingDiverged: the loss is no longer finite. The previous checkpoint stays.
    """
    find_reason_to_make(lab, row, seed)  # refuses to overwrite what is not this row's
    if isinstance(row, Quantized):
        quantize_row(lab, row, seed)
        return measure_row(lab, row, seed)
    if isinstance(row, Rounded):
        round_row(lab, row, seed)
        return measure_row(lab, row, seed)
    start = time.perf_counter()
    train_row(lab, row, seed)
    return measure_row(lab, row, seed, train_seconds=time.perf_counter() - start)


def load_or_make_row(lab: Lab, row: Row, seed: int) -> Record:
    """Take what is on disk where it is up to date; make or measure the rest."""
    if find_reason_to_make(lab, row, seed):
        return make_row(lab, row, seed)
    return load_or_measure_row(lab, row, seed)


def load_or_measure_row(lab: Lab, row: Row, seed: int) -> Record:
    """The record of a finished model, measured anew where it is missing or not of this file and machine."""
    path = lab.record(row.model, seed)
    record = load_record(path) if path.exists() else None
    if (
        record is None
        or record.checkpoint["sha256"] != sha256(lab.output(row, seed))
        or record.artifact["sha256"] != sha256(artifact_of(lab, row, seed))
        or record.machine != describe_machine()
        or record.versions != package_versions()
    ):
        return measure_row(lab, row, seed)
    known: dict[RuntimeName, Measurement] = {}
    for runtime in RUNTIMES:
        measurement, file = record.measurements.get(runtime), lab.file(row.model, seed, runtime)
        if measurement and file.is_file() and measurement.file["sha256"] == sha256(file):
            known[runtime] = measurement
    if known.keys() >= set(lab.runtimes_of(row)):
        return record
    return measure_row(lab, row, seed, train_seconds=record.train_seconds, known=known)


def train_row(lab: Lab, row: Trained, seed: int) -> None:
    """Train a model and write its checkpoint and its ONNX artifact."""
    objective: Objective = supervised_loss
    lineage = {}
    if row.parent is not None:
        assert row.distillation is not None
        teacher = load_parent(lab, row.parent, seed)
        fixed_pixels = lab.dataset.train.pixels if lab.recipe.augmentation is None else None
        objective = distillation_objective(teacher, row.distillation, device=lab.device, fixed_pixels=fixed_pixels)
        lineage = {"parent_sha256": sha256(lab.checkpoint(row.parent, seed))}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(model_config(lab, row))
    curves = fit(
        model,
        lab.dataset,
        lab.recipe,
        seed=seed,
        objective=objective,
        device=lab.device,
        name=f"{row.model} seed {seed}",
    )
    outcome = {
        "train_threads": torch.get_num_threads(),
        "device": lab.device,
        "validation_acc": curves[-1].validation_acc,
        "validation_loss": curves[-1].validation_loss,
        "curves": [asdict(epoch) for epoch in curves],
        "versions": package_versions(),
    }
    save_checkpoint(lab.output(row, seed), model, identity(lab, row, seed) | lineage | outcome)
    ensure_artifact(lab, row.model, seed)
