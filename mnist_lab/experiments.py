"""Rows of the table in the making: train or convert → save → export → measure → record."""

import functools
import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mnist_lab import measure
from mnist_lab.artifacts import artifact_bytes, read_onnx_metadata
from mnist_lab.checkpoints import load_checkpoint, read_metadata, save_checkpoint
from mnist_lab.compress.distill import distillation_objective
from mnist_lab.compress.quantize import needs_reduced_range, prove_integer, quantize
from mnist_lab.data import NUM_CLASSES, Dataset, Split, calibration_pixels
from mnist_lab.dispatch import write_fastest
from mnist_lab.errors import UserError
from mnist_lab.export import FLOAT_PRODUCTS, Dispatch, export_onnx
from mnist_lab.files import sha256
from mnist_lab.machine import describe_machine, package_versions
from mnist_lab.models import PRESETS, ModelConfig, PresetName, build_model, count_parameters, parameter_bytes
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import SparseMoE
from mnist_lab.records import TABLE_BATCHES, Measurement, Record, load_record, save_predictions, save_record
from mnist_lab.rows import Quantized, Row, Trained, place_in_table
from mnist_lab.runtimes import Session, open_session
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession
from mnist_lab.training import Objective, Recipe, RecipeName, fit, progress_bar, supervised_loss

LATENCY_ROUNDS = 7


@dataclass(frozen=True)
class Lab:
    """One data set, preset and recipe, and the two folders that hold what comes of them."""

    dataset: Dataset
    preset: PresetName
    recipe_name: RecipeName
    recipe: Recipe
    device: str
    threads: int  # of latency measurements
    checkpoints: Path  # …/<dataset>-<preset>-<recipe>
    results: Path

    @functools.cached_property
    def test(self) -> Split:
        """The test split, read from disk once, when the first finished model is measured."""
        return self.dataset.load_test()

    def checkpoint(self, model: str, seed: int, extension: str = "safetensors") -> Path:
        return self.checkpoints / f"{model}-seed{seed}.{extension}"

    def artifact(self, model: str, seed: int) -> Path:
        return self.checkpoint(model, seed, "onnx")

    def record(self, model: str, seed: int) -> Path:
        return self.results / "runs" / f"{model}-seed{seed}.json"

    def output(self, row: Row, seed: int) -> Path:
        """The file that this row makes first, and that others derive from."""
        return self.checkpoint(row.model, seed, row.extension)


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
        or record.artifact["sha256"] != sha256(_artifact_of(lab, row, seed))
        or record.machine != describe_machine()
        or record.versions != package_versions()
    ):
        return measure_row(lab, row, seed)
    return record


def find_reason_to_make(lab: Lab, row: Row, seed: int) -> str | None:
    """Why a row's file must be made anew: "missing", or "stale: …"; None where it is up to date.

    Raises:
        UserError: the file is broken, or belongs to another preset, recipe or data set: it is not overwritten.
    """
    artifact = lab.artifact(row.model, seed)
    if artifact.exists():
        _check_owner(lab, artifact, row.model, read_onnx_metadata(artifact))
    path = lab.output(row, seed)
    if not path.exists():
        return "missing"
    metadata = read_metadata(path) if isinstance(row, Trained) else read_onnx_metadata(path)
    _check_owner(lab, path, row.model, metadata)
    if row.parent is not None:
        parent = lab.checkpoint(row.parent, seed)
        if not parent.exists() or metadata["parent_sha256"] != sha256(parent):
            return f"stale: {row.parent} has changed since"
    if metadata["config"] != _config(lab, row, seed):
        return "stale: made with other settings"
    return None


def train_row(lab: Lab, row: Trained, seed: int) -> None:
    """Train a model and write its checkpoint and its ONNX artifact."""
    objective: Objective = supervised_loss
    lineage = {}
    if row.parent is not None:
        assert row.distillation is not None
        teacher = _load_parent(lab, row.parent, seed)
        fixed_pixels = lab.dataset.train.pixels if lab.recipe.augmentation is None else None
        objective = distillation_objective(teacher, row.distillation, device=lab.device, fixed_pixels=fixed_pixels)
        lineage = {"parent_sha256": sha256(lab.checkpoint(row.parent, seed))}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(_model_config(lab, row))
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
    save_checkpoint(lab.output(row, seed), model, _identity(lab, row, seed) | lineage | outcome)
    ensure_artifact(lab, row.model, seed)


def quantize_row(lab: Lab, row: Quantized, seed: int) -> None:
    """Convert the parent to INT8 and write it."""
    parent = _load_parent(lab, row.parent, seed)
    ensure_artifact(lab, row.parent, seed)
    calibration = None
    if row.mode == "static":
        calibration = calibration_pixels(lab.dataset.train, row.calibration_size, seed=seed).numpy()
    lineage = {"parent_sha256": sha256(lab.checkpoint(row.parent, seed))}

    def write(path: Path, dispatch: Dispatch) -> None:
        with _exported(parent, dispatch) as fp32_artifact:
            quantize(
                fp32_artifact,
                path,
                mode=row.mode,
                calibration=calibration,
                keep_float=FLOAT_PRODUCTS,
                metadata=_identity(lab, row, seed) | lineage,
            )

    _write_artifact(lab, lab.output(row, seed), parent, write)


@contextmanager
def _exported(model: FFN | SparseMoE, dispatch: Dispatch) -> Iterator[Path]:
    """A passing FP32 artifact of `model` in one form."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fp32.onnx"
        export_onnx(model, path, {}, dispatch=dispatch)
        yield path


def _write_artifact(lab: Lab, path: Path, model: FFN | SparseMoE, write: Callable[[Path, Dispatch], None]) -> None:
    """An MoE's artifact in the form that is fastest here; a dense model's in its only one."""
    if isinstance(model, SparseMoE):
        write_fastest(path, write, lab.dataset.train.numpy()[0][: max(TABLE_BATCHES)])
    else:
        write(path, "sparse")


def ensure_artifact(lab: Lab, model: str, seed: int) -> Path:
    """The ONNX file of a checkpoint, exported anew where it is missing or older than the checkpoint."""
    path, checkpoint = lab.artifact(model, seed), lab.checkpoint(model, seed)
    checkpoint_sha256 = sha256(checkpoint)
    if not path.exists() or read_onnx_metadata(path).get("parent_sha256") != checkpoint_sha256:
        loaded = load_checkpoint(checkpoint)
        identity = {key: loaded.metadata[key] for key in ("model", "dataset", "preset", "recipe", "seed")}
        metadata = identity | {"parent_sha256": checkpoint_sha256}

        def write(path: Path, dispatch: Dispatch) -> None:
            export_onnx(loaded.model, path, metadata, dispatch=dispatch)

        _write_artifact(lab, path, loaded.model, write)
    return path


def measure_row(lab: Lab, row: Row, seed: int, *, train_seconds: float | None = None) -> Record:
    """Accuracy, loss, calibration and size of a finished model in each of its runtimes. Keeps the record."""
    artifact = _artifact_of(lab, row, seed)
    if isinstance(row, Trained):
        checkpoint = load_checkpoint(lab.output(row, seed))
        model, metadata, proof = checkpoint.model, checkpoint.metadata, None
    else:
        model, metadata = _load_parent(lab, row.parent, seed), read_onnx_metadata(artifact)
        proof = _prove(lab, row, seed)
    sessions = {runtime: _open(lab, row.model, seed, runtime, threads=os.cpu_count() or 1) for runtime in row.runtimes}
    measurements = {
        runtime: _measure_quality(lab, session, lab.output(row, seed) if runtime == "pytorch" else artifact, model)
        for runtime, session in sessions.items()
    }
    first_session = sessions[row.runtimes[0]]
    validation_pixels, validation_labels = lab.dataset.validation.numpy()
    validation_logits = measure.predict(first_session.predict, validation_pixels)
    params_total, params_active = count_parameters(model)
    record = Record(
        model=row.model,
        technique=row.technique,
        precision=row.precision,
        dataset=lab.dataset.name,
        preset=lab.preset,
        recipe=lab.recipe_name,
        seed=seed,
        order=place_in_table(row.model),
        config=metadata["config"],
        parent=None if row.parent is None else {"model": row.parent, "sha256": metadata["parent_sha256"]},
        checkpoint={"file": lab.output(row, seed).name, "sha256": sha256(lab.output(row, seed))},
        artifact={"file": artifact.name, "sha256": sha256(artifact)},
        params_total=params_total,
        params_active=params_active,
        validation_acc=measure.accuracy(validation_logits, validation_labels),
        validation_loss=measure.cross_entropy(validation_logits, validation_labels),
        train_seconds=train_seconds,
        train_threads=metadata.get("train_threads"),
        curves=metadata.get("curves", []),
        machine=describe_machine(),
        versions=package_versions(),
        measurements=measurements,
        expert_by_class=_expert_by_class(model, lab.test) if isinstance(row, Trained) else None,
        dispatch=read_onnx_metadata(artifact).get("dispatch"),
        proof=proof,
    )
    save_predictions(lab.results, record.run_name, measure.predict(first_session.predict, lab.test.numpy()[0]))
    save_record(lab.results, record)
    return record


def measure_latencies(lab: Lab, records: Sequence[Record]) -> None:
    """Time all these models by turns, in every runtime and batch size, and add that to their records."""
    pixels = lab.test.numpy()[0]
    for record in records:
        if record.precision == Trained.precision:
            ensure_artifact(lab, record.model, record.seed)
    sessions = {
        f"{record.run_name}/{runtime}": _open(lab, record.model, record.seed, runtime, threads=lab.threads)
        for record in records
        for runtime in record.measurements
    }
    session_id = uuid.uuid4().hex
    measured: dict[str, dict[str, dict[str, float]]] = {key: {} for key in sessions}
    # The bar is redrawn between blocks only, not from a thread that would run beside what is timed.
    with torch_threads(lab.threads), progress_bar(auto_refresh=False) as progress:
        task = progress.add_task("latency", total=len(sessions) * len(TABLE_BATCHES) * LATENCY_ROUNDS)

        def on_block() -> None:
            progress.advance(task)
            progress.refresh()

        for batch in TABLE_BATCHES:
            images = np.resize(pixels, (batch, *pixels.shape[1:]))  # repeats a test set smaller than the batch
            calls = {key: functools.partial(session.run, session.prepare(images)) for key, session in sessions.items()}
            latencies = measure.measure_latency(calls, num_rounds=LATENCY_ROUNDS, on_block=on_block)
            for key, latency in latencies.items():
                measured[key][str(batch)] = asdict(latency)
    for record in records:
        for runtime, measurement in record.measurements.items():
            measurement.latency_ms = measured[f"{record.run_name}/{runtime}"]
            measurement.threads, measurement.latency_session = lab.threads, session_id
        save_record(lab.results, record)


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute on that many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open(lab: Lab, model: str, seed: int, runtime: str, *, threads: int) -> Session:
    return open_session(
        runtime, checkpoint=lab.checkpoint(model, seed), artifact=lab.artifact(model, seed), threads=threads
    )


def _artifact_of(lab: Lab, row: Row, seed: int) -> Path:
    """The file to deploy: exported where it is due, or itself the row's output."""
    return ensure_artifact(lab, row.model, seed) if isinstance(row, Trained) else lab.output(row, seed)


def _prove(lab: Lab, row: Quantized, seed: int) -> dict[str, Any]:
    """That the file on disk runs in integers here, and on how many test images it agrees with its parent."""
    artifact, parent_artifact = lab.output(row, seed), ensure_artifact(lab, row.parent, seed)
    dispatch: Dispatch = read_onnx_metadata(artifact).get("dispatch", {}).get("form", "sparse")
    with _exported(_load_parent(lab, row.parent, seed), dispatch) as same_form:
        integer_products = asdict(prove_integer(artifact, same_form, keep_float=FLOAT_PRODUCTS))
    int8_classes, fp32_classes = (
        measure.predict(OnnxRuntimeSession(path, threads=os.cpu_count() or 1).predict, lab.test.numpy()[0]).argmax(1)
        for path in (artifact, parent_artifact)
    )
    return integer_products | {"same_class_as_fp32": float((int8_classes == fp32_classes).mean())}


def _measure_quality(lab: Lab, session: Session, file: Path, model: FFN | SparseMoE) -> Measurement:
    train_pixels, train_labels = lab.dataset.train.numpy()
    test_pixels, test_labels = lab.test.numpy()
    train_logits = measure.predict(session.predict, train_pixels)
    test_logits = measure.predict(session.predict, test_pixels)
    test = measure.quality(test_logits, test_labels)
    size_bytes = artifact_bytes(file) if file.suffix == ".onnx" else parameter_bytes(model)
    return Measurement(
        version=session.version,
        test_acc=test.acc,
        test_loss=test.loss,
        test_ece=test.ece,
        train_acc=measure.accuracy(train_logits, train_labels),
        train_loss=measure.cross_entropy(train_logits, train_labels),
        size_mib=size_bytes / measure.MIB,
        file_mb=file.stat().st_size / 1e6,
        bins=asdict(test.bins),
        confusion=test.confusion,
    )


def _expert_by_class(model: FFN | SparseMoE, split: Split) -> list[list[float]] | None:
    """Share of each class's (image, expert) pairs that go to each expert: [class][expert]."""
    if not isinstance(model, SparseMoE):
        return None
    with torch.inference_mode():
        experts = torch.cat([model.routed(pixels).experts for pixels in split.pixels.split(measure.EVALUATION_BATCH)])
    num_experts = model.config.routing.num_experts
    pair_class = split.labels.repeat_interleave(experts.shape[1])
    counts = torch.bincount(pair_class * num_experts + experts.flatten(), minlength=NUM_CLASSES * num_experts)
    by_class = counts.view(NUM_CLASSES, num_experts).double()
    shares: list[list[float]] = (by_class / by_class.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
    return shares


def _identity(lab: Lab, row: Row, seed: int) -> dict[str, Any]:
    """What a file says of where it belongs and how it was made."""
    return {
        "model": row.model,
        "dataset": lab.dataset.name,
        "preset": lab.preset,
        "recipe": lab.recipe_name,
        "seed": seed,
        "config": _config(lab, row, seed),
    }


def _config(lab: Lab, row: Row, seed: int) -> dict[str, Any]:
    """Every setting that the row's file depends on, as JSON gives it back."""
    settings: dict[str, Any]
    if isinstance(row, Trained):
        settings = {
            "architecture": asdict(_model_config(lab, row)),
            "recipe": asdict(lab.recipe),
            "distillation": asdict(row.distillation) if row.distillation else None,
        }
    else:
        settings = {
            "mode": row.mode,
            "calibration_size": row.calibration_size if row.mode == "static" else None,
            "reduce_range": needs_reduced_range(),
        }
    decoded: dict[str, Any] = json.loads(json.dumps(settings | {"seed": seed}))
    return decoded


def _model_config(lab: Lab, row: Trained) -> ModelConfig:
    preset, mean, std = PRESETS[lab.preset], lab.dataset.mean, lab.dataset.std
    if row.architecture == "moe":
        return preset.moe(mean, std, row.routing)
    return preset.ffn(mean, std) if row.architecture == "ffn" else preset.student(mean, std)


def _load_parent(lab: Lab, model: str, seed: int) -> FFN | SparseMoE:
    path = lab.checkpoint(model, seed)
    if not path.exists():
        script = {"FFN_baseline": "baseline_mnist.py", "Sparse_MoE": "moe_mnist.py"}.get(
            model.partition("-")[0], "kd_mnist.py"
        )
        raise UserError(
            f"{model} is needed first, and {path} does not exist. Train it with: python {script}, and the same "
            "options --preset, --recipe, --dataset, --seed, --epochs, --batch-size and --checkpoints."
        )
    checkpoint = load_checkpoint(path)
    _check_owner(lab, path, model, checkpoint.metadata)
    return checkpoint.model


def _check_owner(lab: Lab, path: Path, model: str, metadata: dict[str, Any]) -> None:
    """Raise UserError where a file lies in the place of another model, preset, recipe or data set."""
    expected_owner = {
        "model": model,
        "preset": lab.preset,
        "recipe": lab.recipe_name,
        "dataset": lab.dataset.name,
    }
    for key, expected in expected_owner.items():
        if metadata.get(key) != expected:
            raise UserError(
                f"{path} belongs to {key} {metadata.get(key)}, not {expected}. "
                "Move it away, or name another folder with --checkpoints."
            )
