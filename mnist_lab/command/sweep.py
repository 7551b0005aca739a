"""A sweep: every row of a grid for every seed, several at once, then the tables."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from tyro.conf import Fixed, Suppress

from mnist_lab.command.console import FindLab, finish_table, print_notice
from mnist_lab.command.grid import OF_ALL, Grid, Rows
from mnist_lab.command.options import Options, check_count
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.cluster import find_workers
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.workers import Job, make_side_by_side
from mnist_lab.folders import only_run_in
from mnist_lab.machine import usable_cpus
from mnist_lab.models import PresetName
from mnist_lab.report.records import Record, load_records
from mnist_lab.report.sweep import SweepPart, write_sweep
from mnist_lab.training import RecipeName


@dataclass(frozen=True)
class SweepOptions(Options):
    grid: Grid = field(default_factory=Grid)
    workers: int | None = None
    """Rows that are made at once, each in a process; when not given, as many as the CPUs have --train-threads."""
    cluster: str | None = None
    """Address of a Dask scheduler (tcp://host:8786), whose workers make the rows in place of processes here."""
    train_threads: int = 1
    """CPU threads that each row trains on: weights are the same to the bit only on as many."""
    threads: int = 1
    """CPU threads for measuring latency, which happens here, when all rows are made and nothing else runs."""
    # One of these that a row has is a list in the grid.
    seed: Fixed[Suppress[int]] = 0
    preset: Fixed[Suppress[PresetName]] = "compact"
    recipe: Fixed[Suppress[RecipeName]] = "standard"
    epochs: Fixed[Suppress[int | None]] = None
    batch_size: Fixed[Suppress[int | None]] = None
    learning_rate: Fixed[Suppress[float | None]] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("--workers", self.workers)
        check_count("--train-threads", self.train_threads)
        if self.cluster is not None:
            if self.workers is not None:
                raise UserError("--workers is for this machine: with --cluster there are as many as have come to it")
        elif self.num_workers * self.train_threads > usable_cpus():
            raise UserError(
                f"--workers {self.num_workers} with --train-threads {self.train_threads} are more than the "
                f"{usable_cpus()} CPUs that this process may use"
            )
        self.labs  # noqa: B018  refuses what no lab can be

    @property
    def num_workers(self) -> int:
        most = max(1, usable_cpus() // self.train_threads) if self.device == "cpu" else 1
        return self.workers or most

    @property
    def labs(self) -> list[Options]:
        """What each lab of the sweep is opened with; those of one folder one after the other."""
        shared = {setting.name: getattr(self, setting.name) for setting in fields(Options)}
        return [Options(**shared | varied) for varied in self.grid.combinations(OF_ALL)]


class Cell(NamedTuple):
    """A run of the sweep, and which values of the grid it is of."""

    job: Job
    settings: dict[str, Any]


def run_sweep(options: SweepOptions) -> None:
    """Make what the grid names and is not up to date; then the table of each folder, and that of the sweep.

    Raises:
        RunFailed: some rows could not be made. The others are, and stand in the tables.
    """
    rows = options.grid.find_rows()
    for line in rows.left_out:
        print(f"left out: {line}", flush=True)
    with ExitStack() as stack:
        labs = _open_labs(options, stack)
        notice = next(iter(labs)).dataset.notice
        print_notice(notice)
        cells = _find_cells(options, labs, rows)
        for folder in {lab.results for lab in labs}:
            load_records(folder)  # a broken one stops the sweep now, not after hours of work
        print(f"runs: {len(cells)}, of {options.train_threads} training thread(s) each", flush=True)
        records, failures = _make(cells, options)
        _write(cells, records, list(rows.settings), options.results)
        print_notice(notice)
    if failures:
        raise RunFailed("; ".join(failures))


def _open_labs(options: SweepOptions, stack: ExitStack) -> dict[Lab, FindLab]:
    """All at once, and in one order, so that no two sweeps wait for each other."""
    labs: dict[Lab, FindLab] = {}
    for one in options.labs:
        find = FindLab(one, options.train_threads)
        labs[find(next(iter(labs), None))] = find
    for folder in sorted({folder for lab in labs for folder in (lab.checkpoints, lab.results)}):
        stack.enter_context(only_run_in(folder, wait=options.wait))
    return labs


def _find_cells(options: SweepOptions, labs: Mapping[Lab, FindLab], rows: Rows) -> list[Cell]:
    """Each once; the first seed of all rows first."""
    combinations = options.grid.combinations(OF_ALL)
    cells: dict[Path, Cell] = {}
    for (lab, find), varied in zip(labs.items(), combinations, strict=True):
        for seed in options.grid.seeds:
            for row, settings in rows.settings.items():
                run = Run(lab, row, seed)
                cells.setdefault(run.output, Cell(Job(run, find), varied | settings))
    return list(cells.values())


def _make(cells: Sequence[Cell], options: SweepOptions) -> tuple[dict[Path, Record], list[str]]:
    """The records by the runs' files, and a line for each run that failed."""
    records: dict[Path, Record] = {}
    failures = []
    with find_workers(options.num_workers, options.cluster) as workers:
        for run, record, error in make_side_by_side([cell.job for cell in cells], workers):
            if record is None:
                failures.append(f"{run.name}: {error}")
            else:
                records[run.output] = record
    return records, failures


def _write(cells: Sequence[Cell], records: Mapping[Path, Record], rows: Sequence[Row], results: Path) -> None:
    """The table and the plots of each folder, which latencies are measured for; and one of all that the sweep made."""
    by_folder: dict[Path, list[Cell]] = {}
    for cell in cells:
        if cell.job.run.output in records:
            by_folder.setdefault(cell.job.run.lab.results, []).append(cell)
    parts = []
    for own in by_folder.values():
        made = {cell.job.run.name: records[cell.job.run.output] for cell in own}
        in_table = finish_table(own[0].job.run.lab, list(made.values()), rows)
        settings = {cell.job.run.model: cell.settings for cell in own}
        parts.append(SweepPart([record for record in in_table if record.run_name in made], settings))
    for path in write_sweep(results, parts):
        print(f"sweep: {path}", flush=True)
