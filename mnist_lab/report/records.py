"""One run's record: its schema, its files, and which records a table may take. No torch here.

`results/<dataset>-<preset>-<recipe>/runs/<model>-seed<k>.json` holds a record; beside it a small
.npz holds the test predictions. Accuracy is a fraction, losses are nats, latencies milliseconds.
"""

import functools
import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mnist_lab.errors import UserError
from mnist_lab.files import sha256, write_atomically
from mnist_lab.runtimes import Precision, RuntimeName

SCHEMA = 3
BASELINE = "FFN_baseline"
CONTROL = "FFN_Student_no_KD"
RECORD_PATTERN = "[!.]*.json"  # not what an interrupted write left
CLAIMS_FOLDER = "claims"  # below a results folder: the runs that only claims compare
# What a record must say to be one; it can lack any figure.
IDENTITY = {"family", "row", "departures", "seed", "dataset", "config", "checkpoint", "artifact", "machine", "parents"}
R = TypeVar("R")


@dataclass
class Measurement:
    """What one runtime made of one trained model."""

    version: str  # of the runtime
    file: dict[str, str]  # that the runtime loaded: its name and sha256
    test_acc: float
    test_loss: float
    test_ece: float
    test_brier: float
    train_acc: float  # evaluation mode, no augmentation
    train_loss: float
    size_mib: float  # parameters as stored
    file_mb: float  # the deployed file, 10^6 bytes
    bins: dict[str, list[float]]  # test images by confidence: count, confidence_sum, correct
    confusion: list[list[int]]  # test images, [true][predicted]
    same_class: float  # share of test images with the class that the original gives in PyTorch
    largest_gap: float  # between its logits and those of the original in PyTorch, on the test images
    threads: int | None = None  # of the latencies
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)  # batch -> median, q1, q3, num_calls
    latency_session: str = ""  # latencies of one session were measured by turns, and compare


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
    seed: int
    config: dict[str, Any]  # every setting of its step or form
    architecture: dict[str, Any]  # of the model
    parents: dict[str, dict[str, str]]  # by role, source or teacher: model, file name and sha256
    original: str  # the first model of the chain of sources; itself, where there is no source
    checkpoint: dict[str, str]  # file name and sha256
    artifact: dict[str, str]  # file name and sha256
    params_total: int
    params_active: int
    validation_acc: float
    validation_loss: float
    curves: list[dict[str, Any]]  # one entry per epoch; empty for a converted model
    machine: dict[str, Any]
    versions: dict[str, str]
    measurements: dict[str, Measurement]  # by runtime
    train_seconds: float | None = None
    train_threads: int | None = None
    expert_by_class: list[list[float]] | None = None  # [class][expert], share of the class's test pairs
    layout: dict[str, Any] | None = None  # of an MoE's artifact, and the times by which it was chosen
    proof: dict[str, Any] | None = None  # what the technique did, or what the engine executes
    scaled: dict[str, Any] | None = None  # temperature fitted on validation, then test_loss, …, bins
    acc_without_expert: list[list[float]] | None = None  # [expert][class], test accuracy with that expert closed
    routes_changed: float | None = None  # share of test images whose experts are not the original's
    time_by_job_us: dict[str, float] | None = None  # of an MoE's pass at batch 64, by ONNX Runtime's own profile
    figures: dict[str, float | None] = field(default_factory=dict)  # of columns that bring their own measurement
    schema: int = SCHEMA

    @property
    def model(self) -> str:
        return self.row + self.departures

    @property
    def run_name(self) -> str:
        return f"{self.model}-seed{self.seed}"


def record_path(folder: Path, run_name: str) -> Path:
    """Where a run's record lies below a results folder."""
    return folder / "runs" / f"{run_name}.json"


def save_record(folder: Path, record: Record) -> None:
    """Write a record below a results folder, atomically."""
    text = json.dumps(asdict(record), indent=1, allow_nan=False)
    write_atomically(record_path(folder, record.run_name), lambda path: path.write_text(text + "\n"))


def load_record(path: Path) -> Record:
    """Read one record. A figure that it lacks is None, whatever it was: measuring the run again fills it in.

    Raises:
        UserError: the file is missing, truncated, of another schema, or does not say whose record it is.
    """
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']}, this version reads {SCHEMA}")
        measurements = {name: _fill(Measurement, values) for name, values in found["measurements"].items()}
        return _fill(Record, found | {"measurements": measurements})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a record of this suite ({error}). Delete it and run the model again."
        ) from error


def _fill(kind: type[R], values: dict[str, Any]) -> R:
    """A dataclass of the values that it knows; what is missing gets its default, or None where it has none."""
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if missing := IDENTITY & {*names} - values.keys():
        raise KeyError(f"no {', '.join(sorted(missing))}")
    blanks = dict.fromkeys(_required(kind))
    return kind(**blanks | {name: values[name] for name in names if name in values})


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
) -> None:
    """Keep the test predictions for plots and paired tests."""
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float16)
    predictions = Predictions(probabilities, logits.argmax(axis=1).astype(np.uint8), labels.astype(np.uint8))

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez_compressed(file, **predictions._asdict())

    write_atomically(folder / "runs" / f"{run_name}.npz", write)


def load_predictions(folder: Path, run_name: str) -> Predictions:
    """What `save_predictions` kept.

    Raises:
        UserError: the file is missing or broken.
    """
    path = folder / "runs" / f"{run_name}.npz"
    try:
        with np.load(path) as arrays:
            return Predictions(*(arrays[name] for name in Predictions._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} does not hold a run's predictions ({error}). Delete its record and run the model again."
        ) from error


def usable_records(
    records: Sequence[Record], checkpoints: Path, cpu: str, *, current: Sequence[Record] = ()
) -> tuple[list[Record], list[str]]:
    """The records that a table of this machine may take, and one line for each that it may not.

    Those lack a figure, or were made on another CPU, or their checkpoint is gone or has changed since, or one that
    they were made from has, or their settings or library versions are not those of the model's other seeds.

    Args:
        current: the records just made, whose settings a model's other seeds must share; a model that is not
            among them goes by its lowest seed.
    """
    references = {record.model: record for record in [*reversed(first_seeds(records)), *reversed(current)]}
    by_name = {record.run_name: record for record in records}

    @functools.cache
    def why_not(run_name: str) -> str | None:
        record = by_name[run_name]
        path, reference = checkpoints / record.checkpoint["file"], references[record.model]
        if is_lacking(record) or any(map(is_lacking, record.measurements.values())):
            return "lacks a figure that this version measures; make it again"
        if record.machine["cpu"] != cpu:
            return f"made on another CPU ({record.machine['cpu']})"
        if _is_other(path, record.checkpoint["sha256"]):
            return f"its checkpoint {path} is gone or has changed"
        if _settings(record) != _settings(reference):
            return f"made with other settings or library versions than {reference.run_name}"
        for parent in record.parents.values():
            parent_name = f"{parent['model']}-seed{record.seed}"
            own = by_name.get(parent_name)  # or it is of another data set's folder
            is_left_out = own is not None and own.checkpoint["file"] == parent["file"] and why_not(parent_name)
            if is_left_out or _is_other(checkpoints / parent["file"], parent["sha256"]):
                return f"{parent_name}, from which it was made, is left out, gone or changed since"
        return None

    reasons = {run_name: reason for run_name in by_name if (reason := why_not(run_name))}
    usable = [record for record in records if record.run_name not in reasons]
    return usable, [f"{run_name}: {reason}" for run_name, reason in reasons.items()]


def _is_other(path: Path, expected_sha256: str) -> bool:
    return not path.is_file() or sha256(path) != expected_sha256


def _settings(record: Record) -> dict[str, Any]:
    return {**record.config, "versions": record.versions}


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
