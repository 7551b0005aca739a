"""Every figure of a finished model: quality, size and latency in each runtime, kept as a record."""

import functools
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from mnist_lab import measure
from mnist_lab.artifacts import artifact_bytes, read_onnx_metadata
from mnist_lab.checkpoints import load_checkpoint
from mnist_lab.compress.quantize import prove_integer
from mnist_lab.convert import artifact_of, ensure_artifact, ensure_file, exported
from mnist_lab.data import NUM_CLASSES, Split
from mnist_lab.export import FLOAT_PRODUCTS, Dispatch
from mnist_lab.files import sha256
from mnist_lab.lab import Lab, load_parent
from mnist_lab.machine import describe_machine, package_versions
from mnist_lab.models import count_parameters, parameter_bytes
from mnist_lab.models.ffn import FFN
from mnist_lab.models.moe import SparseMoE, without_expert
from mnist_lab.records import TABLE_BATCHES, Measurement, Record, save_predictions, save_record
from mnist_lab.routes import choose_experts, time_by_job
from mnist_lab.rows import Quantized, Row, Trained, place_in_table
from mnist_lab.runtimes import RuntimeName, Session, open_session
from mnist_lab.runtimes.pytorch import PyTorchSession
from mnist_lab.training import progress_bar, torch_predictor

LATENCY_ROUNDS = 5


def measure_row(
    lab: Lab,
    row: Row,
    seed: int,
    *,
    train_seconds: float | None = None,
    known: Mapping[RuntimeName, Measurement] = MappingProxyType({}),
) -> Record:
    """Accuracy, loss, calibration and size of a finished model in each runtime asked for. Keeps the record.

    Args:
        known: measurements of this very file from before, which are not made again.

    Raises:
        WrongPrecision: a runtime does not run the model in its precision.
    """
    artifact = artifact_of(lab, row, seed)
    output = lab.output(row, seed)
    if isinstance(row, Quantized):
        model, metadata = load_parent(lab, row.parent, seed), read_onnx_metadata(output)
    else:
        model, metadata = load_checkpoint(output)
    own = row.runtimes[0]
    sessions = {runtime: _open(lab, row, seed, runtime) for runtime in dict.fromkeys([own, *lab.runtimes_of(row)])}
    validation_pixels, validation_labels = lab.dataset.validation.numpy()
    validation_logits = measure.predict(sessions[own].predict, validation_pixels)
    test_pixels, test_labels = lab.test.numpy()
    logits_in = {runtime: measure.predict(session.predict, test_pixels) for runtime, session in sessions.items()}
    test_logits = logits_in[own]
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
        checkpoint={"file": output.name, "sha256": sha256(output)},
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
        measurements=_measure_runtimes(lab, row, seed, sessions, logits_in, model, known),
        expert_by_class=_expert_by_class(model, lab.test) if isinstance(row, Trained) else None,
        dispatch=read_onnx_metadata(artifact).get("dispatch"),
        proof=_prove(lab, row, seed) if isinstance(row, Quantized) else None,
        scaled=_scale_temperature(validation_logits, validation_labels, test_logits, test_labels),
        acc_without_expert=_acc_without_expert(model, lab.test) if isinstance(row, Trained) else None,
        routes_changed=_routes_changed(lab, row, seed, model) if isinstance(row, Quantized) else None,
    )
    save_predictions(lab.results, record.run_name, test_logits, test_labels)
    save_record(lab.results, record)
    return record


def _measure_runtimes(
    lab: Lab,
    row: Row,
    seed: int,
    sessions: Mapping[RuntimeName, Session],
    logits_in: Mapping[RuntimeName, measure.Array],
    model: FFN | SparseMoE,
    known: Mapping[RuntimeName, Measurement],
) -> dict[str, Measurement]:
    """What is known already, and the measurements of the other runtimes."""
    if isinstance(row, Trained):
        reference = logits_in[row.runtimes[0]]
    else:
        reference = measure.predict(PyTorchSession(lab.checkpoint(row.parent, seed)).predict, lab.test.numpy()[0])
    measurements: dict[str, Measurement] = {str(runtime): measurement for runtime, measurement in known.items()}
    for runtime in lab.runtimes_of(row):
        if runtime not in known:
            file = lab.file(row.model, seed, runtime)
            measurements[runtime] = _measure_quality(
                lab, sessions[runtime], file, model, test_logits=logits_in[runtime], reference=reference
            )
    return measurements


def _open(lab: Lab, row: Row, seed: int, runtime: RuntimeName) -> Session:
    file = ensure_file(lab, row, seed, runtime)
    return open_session(runtime, file, precision=row.precision, threads=os.cpu_count() or 1)


def _stored_bytes(file: Path, model: FFN | SparseMoE) -> int:
    """Bytes of the parameters in a file, as inference needs them."""
    if file.suffix == ".onnx":
        return artifact_bytes(file)
    if file.suffix == ".pt2":
        from mnist_lab.compress.pt2e import program_bytes

        return program_bytes(file)
    return parameter_bytes(model)


def measure_latencies(lab: Lab, timed: Sequence[tuple[Record, RuntimeName]]) -> None:
    """Time these models by turns, each in its runtime and at every batch size, and add that to their records.

    A file that is no longer the one whose quality was measured is left out.
    """
    pixels = lab.test.numpy()[0]
    sessions: dict[tuple[str, RuntimeName], Session] = {}
    for record, runtime in timed:
        file = lab.file(record.model, record.seed, runtime)
        if file.is_file() and sha256(file) == record.measurements[runtime].file["sha256"]:
            session = open_session(runtime, file, precision=record.precision, threads=lab.threads)
            sessions[record.run_name, runtime] = session
    session_id = uuid.uuid4().hex
    measured: dict[tuple[str, RuntimeName], dict[str, dict[str, float]]] = {key: {} for key in sessions}
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
    for record, runtime in timed:
        if (record.run_name, runtime) in sessions:
            measurement = record.measurements[runtime]
            measurement.latency_ms = measured[record.run_name, runtime]
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


def profile_routing(lab: Lab, records: Sequence[Record]) -> None:
    """Add to the records of MoEs where a pass at batch 64 spends its time."""
    images = np.resize(lab.test.pixels.numpy(), (64, *lab.test.pixels.shape[1:]))
    for record in records:
        record.time_by_job_us = time_by_job(lab.artifact(record.model, record.seed), images)
        save_record(lab.results, record)


def _prove(lab: Lab, row: Quantized, seed: int) -> dict[str, Any]:
    """That ONNX Runtime runs the file on disk in integers here."""
    artifact = lab.output(row, seed)
    dispatch: Dispatch = read_onnx_metadata(artifact).get("dispatch", {}).get("form", "sparse")
    with exported(load_parent(lab, row.parent, seed), dispatch) as same_form:
        return asdict(prove_integer(artifact, same_form, keep_float=FLOAT_PRODUCTS))


def _measure_quality(
    lab: Lab,
    session: Session,
    file: Path,
    model: FFN | SparseMoE,
    *,
    test_logits: measure.Array,
    reference: measure.Array,
) -> Measurement:
    train_pixels, train_labels = lab.dataset.train.numpy()
    train_logits = measure.predict(session.predict, train_pixels)
    test = measure.quality(test_logits, lab.test.numpy()[1])
    return Measurement(
        version=session.version,
        file={"file": file.name, "sha256": sha256(file)},
        test_acc=test.acc,
        test_loss=test.loss,
        test_ece=test.ece,
        test_brier=test.brier,
        train_acc=measure.accuracy(train_logits, train_labels),
        train_loss=measure.cross_entropy(train_logits, train_labels),
        size_mib=_stored_bytes(file, model) / measure.MIB,
        file_mb=file.stat().st_size / 1e6,
        same_class=float((test_logits.argmax(axis=1) == reference.argmax(axis=1)).mean()),
        largest_gap=float(np.abs(test_logits - reference).max()),
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


def _acc_without_expert(model: FFN | SparseMoE, split: Split) -> list[list[float]] | None:
    """Accuracy on each class with one expert closed: [expert][class]."""
    if not isinstance(model, SparseMoE) or model.config.routing.num_experts == 1:
        return None
    pixels, labels = split.numpy()
    images = np.maximum(np.bincount(labels, minlength=NUM_CLASSES), 1)
    table = []
    for expert in range(model.config.routing.num_experts):
        logits = measure.predict(torch_predictor(without_expert(model, expert)), pixels)
        right = labels[logits.argmax(axis=1) == labels]
        table.append((np.bincount(right, minlength=NUM_CLASSES) / images).tolist())
    return table


def _routes_changed(lab: Lab, row: Quantized, seed: int, model: FFN | SparseMoE) -> float | None:
    """Share of test images that the INT8 artifact sends to other experts than the FP32 artifact does."""
    if not isinstance(model, SparseMoE):
        return None
    pixels = lab.test.numpy()[0]
    before = choose_experts(ensure_artifact(lab, row.parent, seed), pixels)
    after = choose_experts(lab.output(row, seed), pixels)
    return float((before != after).any(axis=1).mean())


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
