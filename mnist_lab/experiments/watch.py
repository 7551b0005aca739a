"""What TensorBoard shows of a run: curves while it trains, its settings and final figures when it is measured.

They lie in `tensorboard/<model>-seed<k>/` below the results. Nothing else reads them, and no training depends on
whether they are written: the same bits come out.
"""

import contextlib
import itertools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.run import Run
from mnist_lab.report.records import Epoch, Record
from mnist_lab.training import EpochMetrics, Keeper, Kept

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FINAL = ".final"  # ends the name of the file with settings and final figures


def log_folder(lab: Lab, run_name: str) -> Path:
    """Where TensorBoard finds a run."""
    return lab.results / "tensorboard" / run_name


@contextlib.contextmanager
def watched(run: Run, keepers: Iterator[Keeper]) -> Iterator[Iterator[Keeper]]:
    """The keepers of a run's trainings; where its lab logs, they write each epoch for TensorBoard too.

    What an earlier training of the same run wrote goes, in any case.
    """
    folder = log_folder(run.lab, run.name)
    shutil.rmtree(folder, ignore_errors=True)
    if not run.lab.log:
        yield keepers
        return
    with _open(folder) as writer:
        steps = itertools.count(1)  # a second training's follow on the first's
        yield (WatchedKeeper(keeper, writer, steps) for keeper in keepers)


@dataclass
class WatchedKeeper:
    """A keeper that writes what is new of a training's curves, too."""

    keeper: Keeper
    writer: "SummaryWriter"
    steps: Iterator[int]
    num_written: int = 0

    def restore(self, like: Mapping[str, Tensor]) -> Kept | None:
        kept = self.keeper.restore(like)
        self._write(kept.curves if kept is not None else [])
        return kept

    def keep(self, kept: Kept) -> None:
        self.keeper.keep(kept)
        self._write(kept.curves)

    def _write(self, curves: Sequence[EpochMetrics]) -> None:
        for epoch in curves[self.num_written :]:
            write_epoch(self.writer, cast("Epoch", asdict(epoch)), next(self.steps))
        self.writer.flush()
        self.num_written = len(curves)


def write_epoch(writer: "SummaryWriter", epoch: Epoch, step: int) -> None:
    """One point of each curve."""
    curves = {f"loss/{name}": value for name, value in epoch["train_terms"].items()}
    curves |= {"validation/loss": epoch["validation_loss"], "validation/accuracy": epoch["validation_acc"]}
    curves |= {f"expert load/{expert}": share for expert, share in enumerate(epoch["expert_load"])}
    if epoch["dropped_share"] is not None:
        curves["dropped share"] = epoch["dropped_share"]
    curves["learning rate"] = epoch["learning_rate"]
    for name, value in curves.items():
        writer.add_scalar(name, value, step)


def log_records(lab: Lab, records: Sequence[Record]) -> None:
    """The settings and final figures of measured runs; and of those that were loaded, their curves."""
    from torch.utils.tensorboard.summary import hparams

    for record in records:
        folder = log_folder(lab, record.run_name)
        for path in folder.glob(f"*{FINAL}"):
            path.unlink()
        is_watched = any(folder.glob("events*"))
        figures = _figures(record)
        with _open(folder, FINAL) as writer:
            for epoch in [] if is_watched else record.curves:
                write_epoch(writer, epoch, epoch["epoch"])
            for summary in hparams(dict(_flatten(record.config)), figures):
                writer.file_writer.add_summary(summary)
            for name, value in figures.items():
                writer.add_scalar(name, value, len(record.curves))


def _figures(record: Record) -> dict[str, float]:
    found = {"final/validation accuracy": record.validation_acc, "final/parameters": float(record.params_total)}
    for runtime, measurement in record.measurements.items():
        own = {
            "test accuracy": measurement.test_acc,
            "test loss": measurement.test_loss,
            "calibration error": measurement.test_ece,
            "size in MiB": measurement.size_mib,
            "file in MB": measurement.file_mb,
        }
        own |= {f"ms for {batch}": timing["median_ms"] for batch, timing in measurement.latency_ms.items()}
        found |= {f"final/{name}, {runtime}": value for name, value in own.items()}
    return found


def _flatten(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str | float | bool]]:
    """Settings by their path, as TensorBoard takes them."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value if isinstance(value, str | float | int) else str(value)


def _open(folder: Path, suffix: str = "") -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and an extra

    return SummaryWriter(str(folder), filename_suffix=suffix)
