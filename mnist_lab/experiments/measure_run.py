"""Every figure of a finished run but its latency: quality and size in each runtime, kept as a record."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mnist_lab import measure
from mnist_lab.deploy.artifacts import artifact_bytes, read_onnx
from mnist_lab.deploy.card import depends_on_batch
from mnist_lab.experiments.against_original import compare_with_original
from mnist_lab.experiments.cards import ensure_card
from mnist_lab.experiments.experts import acc_without_expert, expert_by_class, routes_changed
from mnist_lab.experiments.run import Provenance, Run, read_provenance
from mnist_lab.experiments.technique import Proof
from mnist_lab.files import as_json, sha256
from mnist_lab.machine import cpu_model, describe_machine, package_versions, usable_cpus
from mnist_lab.models import Model, count_parameters, parameter_bytes
from mnist_lab.models.checkpoints import load_checkpoint
from mnist_lab.models.moe import SparseMoE
from mnist_lab.report.records import (
    FileId,
    Measurement,
    Record,
    is_lacking,
    load_record,
    predictions_path,
    save_predictions,
    save_record,
)
from mnist_lab.runtimes import EXTENSIONS, RUNTIMES, RuntimeName, Session, open_session
from mnist_lab.runtimes.pytorch import PyTorchSession


def measure_run(
    run: Run,
    *,
    model: Model | None = None,
    proof: Proof | None = None,
    train_seconds: float | None = None,
    known: Record | None = None,
) -> Record:
    """Accuracy, loss, calibration and size of a finished run in each runtime asked for. Keeps the record.

    Args:
        model: that the run's files were written from, and
        proof: what they were proved to be, where both are at hand.
        known: the record of before, with the measurements that need not be made again.

    Raises:
        WrongPrecision: a runtime does not run the model in its precision.
    """
    model = model or run.weights.load()
    found = read_provenance(run.output)
    if proof is None:
        proof = run.row.form.prove(model, run.output) if run.row.step is None else found.proof
    own = run.row.form.runtimes[0]
    asked = [runtime for runtime in run.runtimes if known is None or runtime not in known.measurements]
    sessions = {runtime: _open(run, runtime) for runtime in dict.fromkeys([own, *asked])}
    validation_pixels, validation_labels = run.lab.dataset.validation.numpy()
    validation_logits = measure.predict(sessions[own].predict, validation_pixels)
    test_pixels, test_labels = run.lab.test.numpy()
    logits_in = {runtime: measure.predict(session.predict, test_pixels) for runtime, session in sessions.items()}
    test_logits = logits_in[own]
    reference = _reference_logits(run, test_logits)
    measurements = {} if known is None else dict(known.measurements)
    for runtime in asked:
        measurements[runtime] = _measure_quality(run, runtime, sessions[runtime], logits_in[runtime], reference)
    params_total, params_active = count_parameters(model)
    moe = model if isinstance(model, SparseMoE) and run.row.step is not None else None  # trained, not converted
    stored = _stored_model(run, model)
    record = Record(
        **_identity(run, found),
        predictions=save_predictions(run.lab.results, run.name, test_logits, test_labels),
        original=run.original.model if run.original.lab == run.lab else run.original.lab.folder.name,
        architecture=as_json(asdict(model.config)),
        params_total=params_total,
        params_active=params_active,
        validation_acc=measure.accuracy(validation_logits, validation_labels),
        validation_loss=measure.cross_entropy(validation_logits, validation_labels),
        train_seconds=known.train_seconds if known is not None else train_seconds,
        measurements=measurements,
        expert_by_class=expert_by_class(moe, run.lab.test) if moe else None,
        proof=proof,
        scaled=_scale_temperature(validation_logits, validation_labels, test_logits, test_labels),
        acc_without_expert=acc_without_expert(moe, run.lab.test) if moe else None,
        routes_changed=routes_changed(run, model),
        against_original=compare_with_original(run, model, stored, proof, logits=test_logits, reference=reference),
        figures=_figures(run, stored),
    )
    save_record(run.lab.results, record)
    ensure_card(run, record)
    return record


def _identity(run: Run, found: Provenance) -> dict[str, Any]:
    """The fields of a record that say what it is of, from the run and what its own file says."""
    return {
        "family": run.row.family,
        "row": run.row.name,
        "departures": run.lab.departures,
        "technique": run.row.technique,
        "precision": run.row.form.precision,
        "dataset": run.lab.dataset.name,
        "preset": run.lab.preset_name,
        "recipe": run.lab.recipe_name,
        "seed": run.seed,
        "config": found.config,
        "parents": found.parents,
        "checkpoint": {"file": run.output.name, "sha256": sha256(run.output)},
        "artifact": {"file": run.artifact.name, "sha256": sha256(run.artifact)},
        "layout": read_provenance(run.artifact).layout,
        "train_threads": found.train_threads,
        "device": found.device,
        "curves": found.curves,
        "machine": describe_machine(),
        "versions": package_versions(),
    }


def _stored_model(run: Run, model: Model) -> Model | None:
    """The model with the weights that a run's own file stores; None of a file that holds no PyTorch model."""
    if run.row.step is not None:
        return model
    return run.load() if run.output.suffix == ".safetensors" else None


def _figures(run: Run, stored: Model | None) -> dict[str, float | None]:
    """What columns with a measurement of their own say of the weights as stored."""
    columns = [column for column in run.lab.columns if column.measure is not None]
    return {column.name: column.measure(stored) if stored and column.measure else None for column in columns}


def find_known(run: Run) -> Record | None:
    """What is known of this very checkpoint: its record with the measurements that still hold.

    Those do not that are of other files or library versions, or lack a figure; none does where the record lacks one.
    They may be of another machine, which the record names: what INT8 makes of an image hangs on the CPU, and a row's
    accuracy is then that of the CPU which measured it. All of a record's are of one machine: where one of another's
    must be made again, all are.
    """
    record = load_record(run.record) if run.record.exists() else None
    if record is None or record.checkpoint["sha256"] != sha256(run.output):
        return None
    is_whole = (
        not is_lacking(record)
        and all(column.measure is None or column.name in record.figures for column in run.lab.columns)
        and record.artifact["sha256"] == sha256(run.artifact)
        and _is_there(predictions_path(run.lab.results, run.name), record.predictions)
        and record.versions == package_versions()
    )

    def holds(runtime: RuntimeName) -> bool:
        file, measurement = run.file(EXTENSIONS[runtime]), record.measurements[runtime]
        is_lacking_alone = measurement.test_acc_b1 is None and _differs_alone(run, runtime)
        return not is_lacking(measurement) and not is_lacking_alone and _is_there(file, measurement.file)

    measured = [runtime for runtime in RUNTIMES if runtime in record.measurements]
    held: dict[str, Measurement] = {name: record.measurements[name] for name in measured if is_whole and holds(name)}
    if record.machine["cpu"] != cpu_model() and not held.keys() >= set(run.runtimes):
        held = {}
    return replace(record, measurements=held)


def _differs_alone(run: Run, runtime: RuntimeName) -> bool:
    """Whether what ONNX Runtime says of an image depends on the others in its batch."""
    return runtime == "onnxruntime" and depends_on_batch(read_onnx(run.artifact).graph)


def _is_there(file: Path, known: FileId) -> bool:
    return file.is_file() and sha256(file) == known["sha256"]


def _open(run: Run, runtime: RuntimeName) -> Session:
    file = run.file(EXTENSIONS[runtime])
    return open_session(runtime, file, precision=run.row.form.precision, threads=usable_cpus())


def _reference_logits(run: Run, own_logits: measure.Array) -> measure.Array:
    """What the original says of the test images, in PyTorch."""
    original = run.original

    def predict() -> measure.Array:
        if original == run:
            return own_logits
        return measure.predict(PyTorchSession(original.output).predict, run.lab.test.numpy()[0])

    return run.lab.once("test logits", original.output, predict)


def _stored_bytes(runtime: RuntimeName, file: Path) -> int:
    """Bytes of the parameters in the file that a runtime loads, as inference needs them."""
    if file.suffix == ".onnx":
        return artifact_bytes(file)
    if runtime == "torchao":
        from mnist_lab.runtimes.torchao import quantized_bytes

        return quantized_bytes(file)
    return parameter_bytes(load_checkpoint(file).model)


def _measure_quality(
    run: Run, runtime: RuntimeName, session: Session, test_logits: measure.Array, reference: measure.Array
) -> Measurement:
    file = run.file(EXTENSIONS[runtime])
    train_pixels, train_labels = run.lab.dataset.train.numpy()
    train_logits = measure.predict(session.predict, train_pixels)
    test_pixels, test_labels = run.lab.test.numpy()
    test = measure.quality(test_logits, test_labels)
    alone = measure.predict(session.predict, test_pixels, batch=1) if _differs_alone(run, runtime) else None
    return Measurement(
        version=session.version,
        file={"file": file.name, "sha256": sha256(file)},
        test_acc=test.acc,
        test_loss=test.loss,
        test_ece=test.ece,
        test_brier=test.brier,
        train_acc=measure.accuracy(train_logits, train_labels),
        train_loss=measure.cross_entropy(train_logits, train_labels),
        size_mib=_stored_bytes(runtime, file) / measure.MIB,
        file_mb=file.stat().st_size / 1e6,
        same_class=_same_class(test_logits, reference),
        largest_gap=float(np.abs(test_logits - reference).max()),
        bins=asdict(test.bins),
        confusion=test.confusion,
        test_acc_b1=None if alone is None else measure.accuracy(alone, test_labels),
        other_class_b1=None if alone is None else 1 - _same_class(alone, test_logits),
    )


def _same_class(logits: measure.Array, others: measure.Array) -> float:
    return float((logits.argmax(axis=1) == others.argmax(axis=1)).mean())


def _scale_temperature(
    validation_logits: measure.Array, validation_labels: measure.Labels, logits: measure.Array, labels: measure.Labels
) -> dict[str, Any]:
    """Calibration on the test split after one temperature, fitted on validation, has divided the logits."""
    temperature = measure.fit_temperature(validation_logits, validation_labels)
    test = measure.quality(logits / np.float32(temperature), labels)
    return {
        "temperature": temperature,
        "test_loss": test.loss,
        "test_ece": test.ece,
        "test_brier": test.brier,
        "bins": asdict(test.bins),
    }
