"""One run's record, and the table that gathers them: their schema, files and statistics. No torch here.

`results/<dataset>-<preset>-<recipe>/runs/<model>-seed<k>.json` holds a record; beside it a small
.npz holds the test predictions. Accuracy is a fraction, losses are nats, latencies milliseconds.
"""

import json
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from tabulate import tabulate

from mnist_lab.errors import UserError
from mnist_lab.files import sha256, write_atomically
from mnist_lab.runtimes import Precision, RuntimeName

SCHEMA = 2
BASELINE = "FFN_baseline"
CONTROL = "FFN_Student_no_KD"
SAME_ENGINE = {"torchao": "torch-compile"}  # where a runtime has no FP32 of its own
RECORD_PATTERN = "[!.]*.json"  # not what an interrupted write left
TABLE_BATCHES = (1, 64, 1024)
CLAIMS_FOLDER = "claims"  # below a results folder: the runs that only claims compare
COLUMNS = [
    "model",
    "technique",
    "precision",
    "runtime",
    "seeds",
    "test_acc",
    "test_acc_ci95",
    "train_acc",
    "train_loss",
    "test_loss",
    "ece",
    "params_total",
    "params_active",
    "size_mib",
    "file_mb",
    *(f"latency_ms_b{batch}" for batch in TABLE_BATCHES),
    "threads",
]


@dataclass
class Measurement:
    """What one runtime made of one trained model."""

    version: str  # of the runtime
    file: dict[str, str]  # that the runtime loaded: its name and sha256
    test_acc: float
    test_loss: float
    test_ece: float
    train_acc: float  # evaluation mode, no augmentation
    train_loss: float
    size_mib: float  # parameters as stored
    file_mb: float  # the deployed file, 10^6 bytes
    bins: dict[str, list[float]]  # test images by confidence: count, confidence_sum, correct
    confusion: list[list[int]]  # test images, [true][predicted]
    same_class: float  # share of test images with the class that the FP32 model gives in PyTorch
    largest_gap: float  # between its logits and those of the FP32 model in PyTorch, on the test images
    threads: int | None = None  # of the latencies
    latency_ms: dict[str, dict[str, float]] = field(default_factory=dict)  # batch -> median, q1, q3, num_calls
    latency_session: str = ""  # latencies of one session were measured by turns, and compare
    test_brier: float | None = None


@dataclass
class Record:
    """One model, one seed: how it came to be, and every figure measured on it."""

    model: str
    technique: str
    precision: Precision
    dataset: str
    preset: str
    recipe: str
    seed: int
    order: int  # of its row in the table
    config: dict[str, Any]
    parent: dict[str, str] | None  # model and sha256 of its checkpoint
    checkpoint: dict[str, str]  # file name and sha256
    artifact: dict[str, str]  # file name and sha256
    params_total: int
    params_active: int
    validation_acc: float
    validation_loss: float
    train_seconds: float | None
    train_threads: int | None
    curves: list[dict[str, Any]]  # one entry per epoch; empty for a converted model
    machine: dict[str, Any]
    versions: dict[str, str]
    measurements: dict[str, Measurement]  # by runtime
    expert_by_class: list[list[float]] | None = None  # [class][expert], share of the class's test pairs
    dispatch: dict[str, Any] | None = None  # form of an MoE's artifact, and the times by which it was chosen
    proof: dict[str, Any] | None = None  # that an INT8 model runs in integers
    scaled: dict[str, Any] | None = None  # temperature fitted on validation, then test_loss, …, bins
    acc_without_expert: list[list[float]] | None = None  # [expert][class], test accuracy with that expert closed
    routes_changed: float | None = None  # share of test images whose experts are not those of the FP32 MoE
    time_by_job_us: dict[str, float] | None = None  # of an MoE's pass at batch 64, by ONNX Runtime's own profile
    schema: int = SCHEMA

    @property
    def run_name(self) -> str:
        return f"{self.model}-seed{self.seed}"


def save_record(folder: Path, record: Record) -> None:
    """Write `runs/<model>-seed<k>.json` below a results folder, atomically."""
    text = json.dumps(asdict(record), indent=1, allow_nan=False)
    write_atomically(folder / "runs" / f"{record.run_name}.json", lambda path: path.write_text(text + "\n"))


def load_record(path: Path) -> Record:
    """Read one record.

    Raises:
        UserError: the file is missing, truncated, or of another schema.
    """
    try:
        fields = json.loads(path.read_text())
        fields["measurements"] = {name: Measurement(**values) for name, values in fields["measurements"].items()}
        record = Record(**fields)
        if record.schema != SCHEMA:
            raise ValueError(f"schema {record.schema}, this version reads {SCHEMA}")
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a record of this suite ({error}). Delete it and run the model again."
        ) from error


def load_records(folder: Path) -> list[Record]:
    """All records below a results folder, in the order of the table, then by seed."""
    records = [load_record(path) for path in sorted((folder / "runs").glob(RECORD_PATTERN))]
    return sorted(records, key=lambda record: (record.order, record.model, record.seed))


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


def build_table(records: Iterable[Record]) -> pd.DataFrame:
    """One row per model and runtime, baseline first; means over seeds, latency of the first seed.

    What was not measured is blank (NaN).
    """
    by_row: dict[tuple[int, str, str], list[Record]] = {}
    for record in records:
        for runtime in record.measurements:
            by_row.setdefault((record.order, record.model, runtime), []).append(record)
    rows = [_table_row(group, runtime) for (_, _, runtime), group in sorted(by_row.items(), key=_row_order)]
    return pd.DataFrame(rows, columns=[*COLUMNS, "seed_numbers", "fp32_model"])


def _row_order(item: tuple[tuple[int, str, str], object]) -> tuple[int, str, bool, str]:
    (order, model, runtime), _ = item
    return order, model, runtime != "pytorch", runtime


def _table_row(records: list[Record], runtime: str) -> dict[str, Any]:
    (first,) = first_seeds(records)
    measured = [record.measurements[runtime] for record in records]
    timed = first.measurements[runtime]
    accuracies = [measurement.test_acc for measurement in measured]
    return {
        "model": first.model,
        "technique": first.technique,
        "precision": first.precision,
        "runtime": runtime,
        "seeds": len(records),
        "test_acc": np.mean(accuracies),
        "test_acc_ci95": confidence_interval(accuracies),
        "train_acc": np.mean([measurement.train_acc for measurement in measured]),
        "train_loss": np.mean([measurement.train_loss for measurement in measured]),
        "test_loss": np.mean([measurement.test_loss for measurement in measured]),
        "ece": np.mean([measurement.test_ece for measurement in measured]),
        "params_total": first.params_total,
        "params_active": first.params_active,
        "size_mib": timed.size_mib,
        "file_mb": timed.file_mb,
        **{
            f"latency_ms_b{batch}": timed.latency_ms.get(str(batch), {}).get("median_ms", np.nan)
            for batch in TABLE_BATCHES
        },
        "threads": timed.threads,
        "seed_numbers": " ".join(str(record.seed) for record in sorted(records, key=lambda record: record.seed)),
        "fp32_model": first.parent["model"] if first.precision != "FP32" and first.parent else None,
    }


def confidence_interval(values: list[float]) -> float:
    """Half-width of the Student-t 95 % interval of the mean; NaN for a single value."""
    from scipy import stats

    if len(values) < 2:
        return float("nan")
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """Every row against its own FP32 model (INT8 and BF16 rows), and against the baseline (the first row's model).

    Both in the row's own runtime (torchao's rows in torch-compile, whose engine they share). Accuracy
    difference in percentage points, parameter storage as a share, speed-up as a factor per batch size;
    NaN where there is nothing to compare with, for the accuracy also where the two rows are not of the
    same seeds.
    """
    by_key = table.set_index(["model", "runtime"])
    columns: dict[str, pd.Series] = {
        "model": table["model"],
        "precision": table["precision"],
        "runtime": table["runtime"],
    }
    for label, reference in (
        ("fp32", table["fp32_model"]),
        ("baseline", pd.Series(_baseline(table), index=table.index)),
    ):
        keys = pd.MultiIndex.from_arrays([reference, table["runtime"].replace(SAME_ENGINE)])
        other = by_key.reindex(keys).set_index(table.index)
        is_paired = table["seed_numbers"] == other["seed_numbers"]
        columns[f"acc_points_vs_{label}"] = ((table["test_acc"] - other["test_acc"]) * 100).where(is_paired)
        columns[f"size_vs_{label}"] = table["size_mib"] / other["size_mib"]
        for batch in TABLE_BATCHES:
            column = f"latency_ms_b{batch}"
            columns[f"speedup_b{batch}_vs_{label}"] = other[column] / table[column]
    return pd.DataFrame(columns)


def judge_distillation(records: Iterable[Record]) -> str:
    """A line for each taught student: does it beat the same student on labels alone, of the same seeds and budget?"""
    records = list(records)
    controls = {
        (control.seed, json.dumps(control.config.get("recipe"))): control
        for control in records
        if control.model.partition("-")[0] == CONTROL
    }
    gains: dict[str, list[float]] = {}
    for taught in records:
        control = controls.get((taught.seed, json.dumps(taught.config.get("recipe"))))
        if taught.technique == "kd" and control is not None:
            runtime = next((name for name in taught.measurements if name in control.measurements), None)
            if runtime is not None:
                gain = taught.measurements[runtime].test_acc - control.measurements[runtime].test_acc
                gains.setdefault(taught.model, []).append(100 * gain)
    return "\n".join(f"- {model} {_judge_gain(points)}" for model, points in gains.items())


def _judge_gain(points: list[float]) -> str:
    mean, half = float(np.mean(points)), confidence_interval(points)
    if len(points) == 1:
        return f"against labels alone: {mean:+.2f} points; one seed decides nothing."
    verdict = "beats" if mean > half else "falls behind" if mean < -half else "does not beat"
    return f"{verdict} labels alone: {mean:+.2f} ± {half:.2f} points over {len(points)} seeds."


def find_fastest(table: pd.DataFrame) -> pd.DataFrame:
    """Per model and batch size the runtime with the lowest median latency, and that latency in ms; blank if untimed."""
    rows = []
    for model, group in table.groupby("model", sort=False):
        row = {"model": model, "precision": group["precision"].iloc[0]}
        for batch in TABLE_BATCHES:
            timed = group.set_index("runtime")[f"latency_ms_b{batch}"].dropna()
            row[f"runtime_b{batch}"] = None if timed.empty else timed.idxmin()
            row[f"latency_ms_b{batch}"] = timed.min()
        rows.append(row)
    return pd.DataFrame(rows)


def _baseline(table: pd.DataFrame) -> str | None:
    """The model to compare with: FFN_baseline, or where every run departs from the recipe, its variant."""
    baselines = [model for model in table["model"] if model.partition("-")[0] == BASELINE]
    return min(baselines, key=len, default=None)


def usable_records(
    records: Sequence[Record], checkpoints: Path, cpu: str, *, current: Sequence[Record] = ()
) -> tuple[list[Record], list[str]]:
    """The records that a table of this machine may take, and one line for each that it may not.

    Those were made on another CPU, or their checkpoint is gone or has changed since, or their parent's has,
    or their settings or library versions are not those of the model's other seeds.

    Args:
        current: the records just made, whose settings a model's other seeds must share; a model that is not
            among them goes by its lowest seed.
    """
    references = {record.model: record for record in [*reversed(first_seeds(records)), *reversed(current)]}
    usable: list[Record] = []
    reasons: dict[str, str] = {}  # by run, why it is left out; parents come first
    for record in records:
        path, reference = checkpoints / record.checkpoint["file"], references[record.model]
        parent_run = None if record.parent is None else f"{record.parent['model']}-seed{record.seed}"
        if record.machine["cpu"] != cpu:
            reasons[record.run_name] = f"made on another CPU ({record.machine['cpu']})"
        elif not path.is_file() or sha256(path) != record.checkpoint["sha256"]:
            reasons[record.run_name] = f"its checkpoint {path} is gone or has changed"
        elif _settings(record) != _settings(reference):
            reasons[record.run_name] = f"made with other settings or library versions than {reference.run_name}"
        elif parent_run in reasons or _parent_has_changed(record, checkpoints):
            reasons[record.run_name] = f"{parent_run}, from which it was made, is left out or has changed since"
        else:
            usable.append(record)
    return usable, [f"{run_name}: {reason}" for run_name, reason in reasons.items()]


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


def _settings(record: Record) -> dict[str, Any]:
    return {**record.config, "seed": None, "versions": record.versions}


def _parent_has_changed(record: Record, checkpoints: Path) -> bool:
    if record.parent is None:
        return False
    path = checkpoints / f"{record.parent['model']}-seed{record.seed}.safetensors"
    return path.is_file() and sha256(path) != record.parent["sha256"]


def write_table(folder: Path, table: pd.DataFrame, *, title: str, distillation: str) -> None:
    """Write `table.csv` and `table.md`; the latter adds a summary and the comparisons, that of students among them."""
    write_atomically(folder / "table.csv", lambda path: table.to_csv(path, index=False))
    parts = [
        f"# {title}",
        format_summary(table, style="github"),
        SUMMARY_LEGEND,
        "## Every column",
        format_table(table),
        "## Against FP32 and against the baseline",
        format_comparison(table),
        COMPARISON_LEGEND,
        *(["## Does distillation help?", distillation] if distillation else []),
        "## Fastest runtime",
        format_fastest(table, style="github"),
    ]
    write_atomically(folder / "table.md", lambda path: path.write_text("\n\n".join(parts) + "\n"))


COMPARISON_LEGEND = (
    "Differences: `acc` in percentage points, `size` as a share of parameter storage, `x b1` … the speed-up at that "
    "batch size; against the row's own FP32 model and against the baseline, both in the same runtime "
    "(torchao's rows: in torch-compile, whose engine they share)."
)
MEASURED_FORMATS = {"size_mib": ".3f", "file_mb": ".3f"} | {f"latency_ms_b{batch}": ".3f" for batch in TABLE_BATCHES}
TEXT_COLUMNS = {"model", "technique", "precision", "runtime", *(f"fastest b{batch}" for batch in TABLE_BATCHES)}
FRACTIONS = ("test_acc", "test_acc_ci95", "train_acc", "train_loss", "test_loss", "ece")


def format_table(table: pd.DataFrame) -> str:
    """The table in Markdown; blank cells stay blank."""
    formats = MEASURED_FORMATS | dict.fromkeys(FRACTIONS, ".4f") | {"params_total": ",d", "params_active": ",d"}
    return _format(
        table[COLUMNS].rename(columns=_short_header), {_short_header(c): f for c, f in formats.items()}, "github"
    )


def format_comparison(table: pd.DataFrame) -> str:
    """`compare` in Markdown."""
    comparison = compare(table)
    names = [str(column) for column in comparison]
    formats = {name: "+.2f" if name.startswith("acc") else ".2f" for name in names if "_vs_" in name}
    headers = {name: name.replace("_points", "").replace("speedup_", "x ").replace("_vs_", " vs ") for name in names}
    return _format(comparison.rename(columns=headers), {headers[c]: f for c, f in formats.items()}, "github")


def format_fastest(table: pd.DataFrame, *, style: Literal["simple", "github"]) -> str:
    """`find_fastest` as aligned text."""
    formats = {f"ms b{batch}": ".3f" for batch in TABLE_BATCHES}
    headers = {f"runtime_b{batch}": f"fastest b{batch}" for batch in TABLE_BATCHES}
    return _format(find_fastest(table).rename(columns=headers).rename(columns=_short_header), formats, style)


SUMMARY_LEGEND = (
    "acc: test accuracy in %, ± 95 % interval over seeds; ms b64: median milliseconds for a batch of 64; "
    "x fp32: speed-up at batch 64 over the row's own FP32 model in the same runtime."
)


def format_summary(table: pd.DataFrame, *, style: Literal["simple", "github"]) -> str:
    """The columns that fit a screen, aligned: plainly, or in Markdown."""
    speedup = compare(table)["speedup_b64_vs_fp32"]
    interval = table["test_acc_ci95"].map(lambda value: "" if pd.isna(value) else f" ± {100 * value:.2f}")
    columns = {
        "model": table["model"],
        "precision": table["precision"],
        "runtime": table["runtime"],
        "seeds": table["seeds"],
        "acc": table["test_acc"].map(lambda value: f"{100 * value:.2f}") + interval,
        "MiB": table["size_mib"],
        **{f"ms b{batch}": table[f"latency_ms_b{batch}"] for batch in TABLE_BATCHES},
        "x fp32": speedup,
    }
    formats = {"MiB": ".3f", "x fp32": ".2f"} | {f"ms b{batch}": ".3f" for batch in TABLE_BATCHES}
    return _format(pd.DataFrame(columns), formats, style)


def _short_header(column: str) -> str:
    return column.replace("latency_ms_", "ms ")


def _format(table: pd.DataFrame, formats: dict[str, str], style: str) -> str:
    """Aligned text in one of tabulate's styles: a format per column, blank where there is no value."""
    names = [str(column) for column in table]

    def cell(name: str, value: Any) -> str:
        if pd.isna(value):
            return ""
        return format(int(value) if formats.get(name) == ",d" else value, formats.get(name, ""))

    return tabulate(
        [[cell(name, value) for name, value in zip(names, row, strict=True)] for row in table.itertuples(index=False)],
        headers=names,
        tablefmt=style,
        disable_numparse=True,
        colalign=["left" if name in TEXT_COLUMNS else "right" for name in names],
    )
