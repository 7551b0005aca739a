"""One run's record: its schema, its files, and which records a table may take. No torch here.

`results/<dataset>-<preset>-<recipe>/runs/<model>-seed<k>.json` holds a record; beside it a small
.npz holds the test predictions, whose hash the record keeps. A record carries its own digest: one that is edited or
damaged is refused. Accuracy is a fraction, losses are nats, latencies milliseconds.
"""

import functools
import hashlib
import io
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict, TypeVar, get_type_hints

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from mnist_lab.files import BLANK, check_seal, read_bytes, reading, seal, sha256, write_atomically
from mnist_lab.machine import Machine
from mnist_lab.measure import NUM_BINS
from mnist_lab.runtimes import Precision, RuntimeName

SCHEMA = 4
BASELINE = "FFN_baseline"
MIXTURE = "Sparse_MoE"
CONTROL = "FFN_Student_no_KD"
RIVAL = "_rival"  # ends the families of models that are as large as a compressed one, and from scratch
RECORD_PATTERN = "[!.]*.json"  # not what an interrupted write left
CLAIMS_FOLDER = "claims"  # below a results folder: the runs that only claims compare
# What a record must say to be one; it can lack any figure.
IDENTITY = {"family", "row", "departures", "seed", "dataset", "config", "checkpoint", "artifact", "machine", "parents"}
R = TypeVar("R")

Share = Annotated[float, Meta(ge=0, le=1)]
Amount = Annotated[float, Meta(ge=0)]  # finite, as JSON has no other numbers
Count = Annotated[int, Meta(ge=0)]
Bins = dict[str, Annotated[list[Amount], Meta(min_length=NUM_BINS, max_length=NUM_BINS)]]


class FileId(TypedDict):
    """A file's name, without its folder, and the SHA-256 of its content."""

    file: str
    sha256: str


class Parent(FileId):
    """A file that a run was made from, as seen from the checkpoints folder, and its model."""

    model: str


class Timing(TypedDict):
    """Milliseconds of one forward pass: median and quartiles over all timed calls."""

    median_ms: Amount
    q1_ms: Amount
    q3_ms: Amount
    num_calls: Count


class Conditions(NamedTuple):
    """Under which latencies were measured: those of others do not compare."""

    cpu: str
    threads: int | None

    def __str__(self) -> str:
        return f"{self.threads} thread{'s' if self.threads != 1 else ''}, {self.cpu}"


class Epoch(TypedDict):
    """One point of the learning curves, as `training.EpochMetrics`."""

    epoch: Count
    learning_rate: Amount
    train_terms: dict[str, float]
    validation_loss: Amount
    validation_acc: Share
    expert_load: list[Share]
    dropped_share: Share | None


@dataclass
class Measurement:
    """What one runtime made of one trained model."""

    version: str  # of the runtime
    file: FileId  # that the runtime loaded
    test_acc: Share
    test_loss: Amount
    test_ece: Share
    test_brier: Annotated[float, Meta(ge=0, le=2)]
    train_acc: Share  # evaluation mode, no augmentation
    train_loss: Amount
    size_mib: Amount  # parameters as stored
    file_mb: Amount  # the deployed file, 10^6 bytes
    bins: Bins  # test images by confidence: count, confidence_sum, correct
    confusion: list[list[Count]]  # test images, [true][predicted]
    same_class: Share  # of test images with the class that the original gives in PyTorch
    largest_gap: Amount  # between its logits and those of the original in PyTorch, on the test images
    threads: Annotated[int, Meta(ge=1)] | None = None  # of the latencies
    latency_ms: dict[str, Timing] = field(default_factory=dict)  # by batch
    test_acc_b1: Share | None = None  # one image at a time, where an artifact takes scales from the whole batch
    other_class_b1: Share | None = None  # of test images whose class is then another than in batches of 1000
    latency_session: str = ""  # latencies of one session were measured by turns, and compare
    latency_cpu: str | None = None  # of the latencies; None: that of the record's machine


@dataclass
class Record:
    """One model, one seed: how it came to be, and every figure measured on it."""

    family: str  # which gives it its place in the table
    row: str  # the row's name
    departures: str  # from the recipe, as they show in the model's name
    technique: str
    precision: Precision
    dataset: str
    preset: str
    recipe: str
    seed: Count
    config: dict[str, Any]  # every setting of its step or form
    architecture: dict[str, Any]  # of the model
    parents: dict[str, Parent]  # by role, source or teacher
    original: str  # the first model of the chain of sources; itself, where there is no source
    checkpoint: FileId
    artifact: FileId
    predictions: FileId  # of the test split
    params_total: Count
    params_active: Count
    validation_acc: Share
    validation_loss: Amount
    curves: list[Epoch]  # empty for a converted model
    machine: Machine
    versions: dict[str, str]
    measurements: dict[str, Measurement]  # by runtime
    train_seconds: Amount | None = None
    train_threads: Count | None = None
    device: str | None = None  # of training
    expert_by_class: list[list[Share]] | None = None  # [class][expert], share of the class's test pairs
    layout: dict[str, Any] | None = None  # of an MoE's artifact
    proof: dict[str, Any] | None = None  # what the technique did, or what the engine executes
    scaled: dict[str, Any] | None = None  # temperature fitted on validation, then test_loss, …, bins
    acc_without_expert: list[list[Share]] | None = None  # [expert][class], test accuracy with that expert closed
    routes_changed: Share | None = None  # of test images whose experts are not the original's
    against_original: dict[str, float] | None = None  # what was lost and saved, and routing; None of an original
    time_by_job_us: dict[str, Amount] | None = None  # of an MoE's pass at batch 64, by ONNX Runtime's own profile
    figures: dict[str, float | None] = field(default_factory=dict)  # of columns that bring their own measurement
    schema: int = SCHEMA

    @property
    def model(self) -> str:
        return self.row + self.departures

    def timed_on(self, runtime: str) -> str:
        """The CPU of the latencies in a runtime."""
        return self.measurements[runtime].latency_cpu or self.machine["cpu"]

    @property
    def class_names(self) -> list[str]:
        """What the classes are called; their numbers where they have no names."""
        data = self.architecture.get("data", {})
        num_classes = data.get("num_classes", len(next(iter(self.measurements.values())).confusion))
        return [str(name) for name in data.get("classes") or range(num_classes)]

    @property
    def run_name(self) -> str:
        return f"{self.model}-seed{self.seed}"


def record_path(folder: Path, run_name: str) -> Path:
    """Where a run's record lies below a results folder."""
    return folder / "runs" / f"{run_name}.json"


def predictions_path(folder: Path, run_name: str) -> Path:
    """Where its test predictions lie."""
    return folder / "runs" / f"{run_name}.npz"


def save_record(folder: Path, record: Record) -> None:
    """Write a record below a results folder, atomically and sealed."""
    content = msgspec.json.format(msgspec.json.encode({"digest": BLANK} | asdict(record)), indent=1)
    path = record_path(folder, record.run_name)
    write_atomically(path, lambda temporary: temporary.write_bytes(seal(content + b"\n")))


def load_record(path: Path) -> Record:
    """Read one record. A figure that it lacks is None, whatever it was: measuring the run again fills it in.

    Raises:
        UserError: the file is missing, damaged, edited, another run's, of another schema, or no record.
    """
    content = read_bytes(path, "no record at {}")
    with reading(path, "Delete it and run the model again."):
        found = msgspec.json.decode(content, type=dict[str, Any])
        if found["schema"] != SCHEMA:
            raise ValueError(f"its schema is {found['schema']}, this version reads {SCHEMA}")
        check_seal(content)
        if missing := IDENTITY - found.keys():
            raise ValueError(f"it does not say {', '.join(sorted(missing))}")
        by_runtime = msgspec.convert(found.pop("measurements"), dict[RuntimeName, dict[str, Any]])
        record = _fill(Record, found | {"measurements": {}})
        record.measurements = {runtime: _fill(Measurement, values) for runtime, values in by_runtime.items()}
        if record.run_name != path.stem:
            raise ValueError(f"it is the record of {record.run_name}")
    return record


def _fill(kind: type[R], values: dict[str, Any]) -> R:
    """A dataclass of the values that it knows, each of its type and in its range; what is missing gets its default,
    or None where it has none.
    """
    hints: dict[str, Any] = get_type_hints(kind, include_extras=True)
    known = {name: msgspec.convert(values[name], hint) for name, hint in hints.items() if name in values}
    return kind(**dict.fromkeys(_required(kind)) | known)


def _required(kind: Any) -> list[str]:
    """The fields without a default: what every measurement gives."""
    return [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]


def is_lacking(found: Record | Measurement) -> bool:
    """Whether a figure is missing that the suite had not yet when this was measured."""
    return any(getattr(found, name) is None for name in _required(found))


def load_records(folder: Path) -> list[Record]:
    """All records below a results folder, by name and seed."""
    records = [load_record(path) for path in sorted((folder / "runs").glob(RECORD_PATTERN))]
    return sorted(records, key=lambda record: (record.model, record.seed))


class Predictions(NamedTuple):
    """What one run says of the N test images."""

    probabilities: npt.NDArray[np.float16]  # (N, C)
    predicted: npt.NDArray[np.uint8]  # (N,), exact, where rounded probabilities may tie
    labels: npt.NDArray[np.uint8]  # (N,)


def save_predictions(
    folder: Path, run_name: str, logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]
) -> FileId:
    """Keep the test predictions for plots and paired tests; their file, for the record."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float16)
    predictions = Predictions(probabilities, logits.argmax(axis=1).astype(np.uint8), labels.astype(np.uint8))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **predictions._asdict())
    path = predictions_path(folder, run_name)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))
    return {"file": path.name, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}


def load_predictions(folder: Path, record: Record) -> Predictions:
    """What `save_predictions` kept of a record's run.

    Raises:
        UserError: the file is missing, damaged, or not the record's.
    """
    path = predictions_path(folder, record.run_name)
    content = read_bytes(path, "no predictions at {}; delete the record and run the model again")
    with reading(path, "Delete it and its record, and run the model again."):
        if hashlib.sha256(content).hexdigest() != record.predictions["sha256"]:
            raise ValueError("it is not the file that its record is of")
        confusion = next(iter(record.measurements.values())).confusion
        num_images, num_classes = sum(map(sum, confusion)), len(confusion)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > num_images * (2 * num_classes + 2) + 1000:  # the arrays, and their headers
            raise ValueError(f"it holds {size:,} bytes")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            predictions = Predictions(*(arrays[name] for name in Predictions._fields))
        shapes = [(num_images, num_classes), (num_images,), (num_images,)]
        if [array.shape for array in predictions] != shapes:
            raise ValueError(f"its arrays are not of {num_images:,} images and {num_classes} classes")
    return predictions


def usable_records(
    records: Sequence[Record], checkpoints: Path | None, cpu: str, *, current: Sequence[Record] = ()
) -> tuple[list[Record], list[str]]:
    """The records that a table may take, and one line for each that it may not.

    Those lack a figure, or a file that they are of is gone or has changed since, or one that they were made from has,
    or their settings, training threads or library versions are not those of the model's other seeds. They may be of
    any machine: `timed_on` takes from them what holds on one only.

    Args:
        checkpoints: the folder of the files that the records are of; None where they are not at hand, nor checked. Of
            a record of another CPU than
        cpu: none need be there, as of one that was copied alone.
        current: the records just made, or that a table holds, whose settings a model's other seeds must share; a
            model that is not among them goes by its lowest seed.
    """
    references = {record.model: record for record in [*reversed(first_seeds(records)), *reversed(current)]}
    by_name = {record.run_name: record for record in records}

    def is_other(file: FileId, *, may_be_gone: bool) -> bool:
        if checkpoints is None:
            return False
        path = checkpoints / file["file"]
        return sha256(path) != file["sha256"] if path.is_file() else not may_be_gone

    @functools.cache
    def why_not(run_name: str) -> str | None:
        record = by_name[run_name]
        reference = references[record.model]
        if is_lacking(record) or any(map(is_lacking, record.measurements.values())):
            return "lacks a figure that this version measures; make it again"
        is_copied = checkpoints is not None and _is_copied(record, checkpoints, cpu)
        if changed := next((file["file"] for file in _files_of(record) if is_other(file, may_be_gone=is_copied)), None):
            return f"{changed} is gone or has changed"
        own, its = _settings(record), _settings(reference)
        if differing := [name for name in own | its if own.get(name) != its.get(name)]:
            return f"made with other {' and '.join(differing)} than {reference.run_name}; make it again"
        for parent in record.parents.values():
            parent_name = Path(parent["file"]).stem
            here = by_name.get(parent_name)  # or it is of another folder
            is_left_out = here is not None and here.checkpoint["file"] == parent["file"] and why_not(parent_name)
            if is_left_out or is_other(parent, may_be_gone=is_copied):
                return f"{parent_name}, from which it was made, is left out, gone or changed since"
        return None

    reasons = {run_name: reason for run_name in by_name if (reason := why_not(run_name))}
    usable = [record for record in records if record.run_name not in reasons]
    return usable, [f"{run_name}: {reason}" for run_name, reason in reasons.items()]


def _files_of(record: Record) -> list[FileId]:
    return [record.checkpoint, record.artifact, *(m.file for m in record.measurements.values())]


def _is_copied(record: Record, checkpoints: Path, cpu: str) -> bool:
    """Whether a record was made elsewhere, and came without any of its files."""
    return record.machine["cpu"] != cpu and not any((checkpoints / f["file"]).exists() for f in _files_of(record))


def timed_on(cpu: str, records: Iterable[Record]) -> tuple[list[Record], list[str]]:
    """The records without latencies of other CPUs, which do not compare; and a line for each of those."""
    left_out: dict[str, list[str]] = {}
    own = [_timed_on(cpu, record, left_out) for record in records]
    return own, [
        f"latency of {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: "
        f"measured on another CPU ({other})"
        for other, names in left_out.items()
    ]


def _timed_on(cpu: str, record: Record, left_out: dict[str, list[str]]) -> Record:
    measurements = dict(record.measurements)
    others = {runtime: record.timed_on(runtime) for runtime, own in measurements.items() if own.latency_ms}
    for runtime, other in others.items():
        if other != cpu:
            measurements[runtime] = replace(measurements[runtime], latency_ms={}, threads=None, latency_session="")
            left_out.setdefault(other, []).append(f"{record.run_name} in {runtime}")
    time_by_job_us = None if others and cpu not in others.values() else record.time_by_job_us
    return replace(record, measurements=measurements, time_by_job_us=time_by_job_us)


def _settings(record: Record) -> dict[str, Any]:
    others = {"library versions": record.versions, "training threads": record.train_threads, "device": record.device}
    return {**record.config, **others}


def first_seeds(records: Iterable[Record]) -> list[Record]:
    """Each model's run with the lowest seed: the one whose latency stands in the table."""
    first: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: record.seed):
        first.setdefault(record.model, record)
    return list(first.values())


def first_in(records: Iterable[Record], runtimes: Sequence[RuntimeName]) -> list[tuple[Record, RuntimeName]]:
    """For every model and runtime the run with the lowest seed that was measured there: that whose latency counts."""
    records = list(records)
    return [
        (record, runtime)
        for runtime in runtimes
        for record in first_seeds(record for record in records if runtime in record.measurements)
    ]
