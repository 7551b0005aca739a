"""A classifier that was made elsewhere, in all its forms, beside rows of the suite: same figures, timed by turns."""

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from mnist_lab import measure
from mnist_lab.compress.foreign import Quantized, Unquantized, find_executed, quantize_foreign
from mnist_lab.data import calibration_pixels
from mnist_lab.deploy.foreign import ForeignModel, num_parameters, stored_bytes
from mnist_lab.deploy.foreign_session import ForeignSession, are_probabilities
from mnist_lab.deploy.image_input import ImageInput
from mnist_lab.errors import UserError
from mnist_lab.experiments.against_original import mean_divergence, worst_class_points
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.latencies import time_by_turns
from mnist_lab.files import sha256, write_atomically
from mnist_lab.machine import cpu_model, describe_machine, package_versions, usable_cpus
from mnist_lab.measure import Array
from mnist_lab.report.records import FileId, Measurement, Record, load_records, usable_records
from mnist_lab.runtimes import Precision, RuntimeName, Session, open_session

RUNTIME: RuntimeName = "onnxruntime"
TECHNIQUE = "yours"
NO_FILE: FileId = {"file": "", "sha256": ""}
CALIBRATION_SIZE = 1000
TRIED = 1000  # validation images on which other inputs are tried
LOW = 0.5  # an accuracy that is doubted
GAIN = 0.02  # by which another input must be better to be named


@dataclass(frozen=True)
class Original:
    """The user's model as it is, and what it says of the images of this lab."""

    foreign: ForeignModel
    lab: Lab  # with folders of its own
    of_probabilities: bool  # whether its scores are
    validation_acc: float

    @property
    def name(self) -> str:
        """Its row, which is called as its file is."""
        return f"{self.foreign.name}.onnx"

    @property
    def scores(self) -> str:
        return "probabilities" if self.of_probabilities else "logits"

    def open(self, content: bytes, *, threads: int) -> ForeignSession:
        """One of its files."""
        return ForeignSession(self.foreign, content, threads=threads, of_probabilities=self.of_probabilities)


def write_original(foreign: ForeignModel, lab: Lab) -> Original:
    """Write a model as it will be run, and find out what its scores are, on validation images.

    Raises:
        UserError: it cannot be run.
    """
    session = ForeignSession(foreign, foreign.content, threads=usable_cpus())
    pixels, labels = lab.dataset.validation.numpy()
    scores = measure.predict(session.predict, pixels)
    original = Original(foreign, lab, are_probabilities(scores), measure.accuracy(scores, labels))
    write_atomically(lab.checkpoints / original.name, lambda temporary: temporary.write_bytes(foreign.content))
    return original


def doubt(original: Original) -> str:
    """What may be wrong with its input, where another one is better or few images are recognised; empty elsewhere."""
    foreign, dataset = original.foreign, original.lab.dataset
    pixels, labels = dataset.validation.numpy()
    pixels, labels = pixels[:TRIED], labels[:TRIED]

    def try_out(images: ImageInput) -> float:
        session = ForeignSession(replace(foreign, images=images), foreign.content, threads=usable_cpus())
        return measure.accuracy(measure.predict(session.predict, pixels), labels)

    found = {options: try_out(images) for options, images in _other_inputs(foreign.images, original.lab)}
    own, best = try_out(foreign.images), max(found, key=lambda options: found[options], default="")
    if best and found[best] > own + GAIN:
        return f"of {len(labels):,} validation images it recognises {own:.1%}; with {best} {found[best]:.1%}"
    if own >= LOW:
        return ""
    return (
        f"of {len(labels):,} validation images it recognises {own:.1%}: is it trained for {dataset.name}, its classes "
        "in the same order, on pixels as --layout, --scale, --mean and --std say?"
    )


def _other_inputs(images: ImageInput, lab: Lab) -> Iterator[tuple[str, ImageInput]]:
    """Other ways to give it pixels, by the options that say so."""
    if images.dtype is np.uint8:
        return
    mean, std = round(lab.dataset.spec.mean, 4), round(lab.dataset.spec.std, 4)
    for scale, means, stds in ((1, 0.0, 1.0), (255, 0.0, 1.0), (1, mean, std), (1, 0.5, 0.5)):
        other = replace(images, scale=scale, mean=(means,), std=(stds,))
        if other != images:
            yield f"--scale {scale} --mean {means:g} --std {stds:g}", other


def measure_forms(original: Original, *, seed: int) -> Iterator[tuple[Record, str] | Unquantized]:
    """Record of each form, FP32 first, and what the engine executes; or why there is no such form.

    Args:
        seed: which training images static mode is calibrated on.
    """
    foreign, lab = original.foreign, original.lab
    executed = find_executed(foreign.content)
    session = original.open(foreign.content, threads=usable_cpus())
    reference = measure.predict(session.predict, lab.test.numpy()[0])
    precision = executed.precision("INT8")
    fp32 = _record(original, original.name, TECHNIQUE, precision, original.validation_acc, reference, reference)
    yield fp32, executed.text
    size = min(CALIBRATION_SIZE, len(lab.dataset.train))
    calibration = calibration_pixels(lab.dataset.train, size, seed=seed).numpy()
    for form in quantize_foreign(foreign, calibration):
        if isinstance(form, Unquantized):
            yield form
            continue
        try:
            yield _measure(original, form, reference, fp32), form.executed.text
        except UserError as error:  # the others do not hang on it
            yield Unquantized(form.tag, str(error))


def _measure(original: Original, form: Quantized, reference: Array, fp32: Record) -> Record:
    """Write a form, measure it, and set it against what it was made from."""
    lab, name = original.lab, f"{original.foreign.name}_{form.tag}.onnx"
    session = original.open(form.content, threads=usable_cpus())
    (validation_pixels, validation_labels), (test_pixels, test_labels) = (
        lab.dataset.validation.numpy(),
        lab.test.numpy(),
    )
    validation_acc = measure.accuracy(measure.predict(session.predict, validation_pixels), validation_labels)
    logits = measure.predict(session.predict, test_pixels)
    write_atomically(lab.checkpoints / name, lambda temporary: temporary.write_bytes(form.content))
    technique = f"{TECHNIQUE} + {form.technique}"
    record = _record(original, name, technique, form.precision, validation_acc, logits, reference)
    before = fp32.measurements[RUNTIME]
    own = record.measurements[RUNTIME]
    record.proof = {"text": form.executed.text, **form.executed._asdict()}
    record.against_original = {
        "file_ratio": before.file_mb / own.file_mb,
        "acc_points": 100 * (own.test_acc - before.test_acc),
        "kl_to_original": mean_divergence(reference, logits),
        "worst_class_points": worst_class_points(reference, logits, test_labels),
    }
    return record


def _record(
    original: Original,
    name: str,
    technique: str,
    precision: Precision,
    validation_acc: float,
    logits: Array,
    reference: Array,
) -> Record:
    """What is known of one file. How it was trained is not, and what it makes of its training images is not measured:
    they may be others.
    """
    lab, labels = original.lab, original.lab.test.numpy()[1]
    file = lab.checkpoints / name
    model_file: FileId = {"file": name, "sha256": sha256(file)}
    test, num_values = measure.quality(logits, labels), num_parameters(original.foreign.model.graph)
    measurement = Measurement(
        version=ForeignSession.version,
        file=model_file,
        test_acc=test.acc,
        test_loss=test.loss,
        test_ece=test.ece,
        test_brier=test.brier,
        train_acc=None,  # type: ignore[arg-type]  # blank, as what a record lacks
        train_loss=None,  # type: ignore[arg-type]
        size_mib=stored_bytes(file.read_bytes()) / measure.MIB,
        file_mb=file.stat().st_size / 1e6,
        bins=asdict(test.bins),
        confusion=test.confusion,
        same_class=float((logits.argmax(axis=1) == reference.argmax(axis=1)).mean()),
        largest_gap=float(np.abs(logits - reference).max()),
    )
    return Record(
        family=original.name,
        row=name,
        departures="",
        technique=technique,
        precision=precision,
        dataset=lab.dataset.name,
        preset=lab.preset_name,
        recipe=lab.recipe_name,
        seed=0,
        config={},
        architecture={},
        parents={},
        original=original.name,
        checkpoint=model_file,
        artifact=model_file,
        predictions=NO_FILE,
        params_total=num_values,
        params_active=num_values,
        validation_acc=validation_acc,
        validation_loss=0.0,
        curves=[],
        machine=describe_machine(),
        versions=package_versions(),
        measurements={RUNTIME: measurement},
    )


def suite_records(lab: Lab, rows: Sequence[str] | None) -> tuple[list[Record], list[str]]:
    """The suite's records in ONNX Runtime alone whose files are there, and a line for each that cannot be used.

    Args:
        rows: their names; None for all.

    Raises:
        UserError: a record is broken.
    """
    found = [record for record in load_records(lab.results) if rows is None or record.row in rows]
    usable, left_out = usable_records(found, lab.checkpoints, cpu_model())
    return [
        replace(record, measurements={RUNTIME: replace(record.measurements[RUNTIME], latency_ms={})})
        for record in usable
        if RUNTIME in record.measurements
    ], left_out


def time_all(original: Original, own: Sequence[Record], suite_lab: Lab, suite: Sequence[Record]) -> None:
    """Time the user's files and those of the suite by turns, of each row the lowest seed; into these records alone."""
    lab = original.lab
    timed: dict[str, tuple[Record, Session]] = {}
    for record in own:
        file = lab.checkpoints / record.artifact["file"]
        timed[record.model] = record, original.open(file.read_bytes(), threads=lab.threads)
    for record in sorted(suite, key=lambda record: record.seed):
        if record.model not in timed:
            file = suite_lab.file(record.run_name, "onnx")
            timed[record.model] = record, open_session(RUNTIME, file, precision=record.precision, threads=lab.threads)
    sessions = {model: session for model, (_, session) in timed.items()}
    measured, session_id = time_by_turns(sessions, lab.test.numpy()[0], threads=lab.threads), uuid.uuid4().hex
    for model, (record, _) in timed.items():
        measurement = record.measurements[RUNTIME]
        measurement.latency_ms, measurement.latency_session = measured[model], session_id
        measurement.threads, measurement.latency_cpu = lab.threads, cpu_model()
