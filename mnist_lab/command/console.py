"""What a script does around its row: open the lab, say what happens, print the figures."""

import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
import torch

from mnist_lab.command.options import Options, RowOptions
from mnist_lab.data import load_dataset
from mnist_lab.errors import UserError
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.latencies import measure_latencies
from mnist_lab.experiments.make import load_or_make, load_or_measure, make, make_all, produce
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import ORDER, families
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.watch import log_records
from mnist_lab.folders import only_run_in
from mnist_lab.machine import cpu_model, usable_cpus
from mnist_lab.report.columns import COMPRESSION, LATENCIES
from mnist_lab.report.records import Record, first_in, load_records, timed_on, usable_records
from mnist_lab.report.table import build_table, judge_distillation
from mnist_lab.report.text import (
    SUMMARY_LEGEND,
    format_compression,
    format_fastest,
    format_summary,
    title_of,
    write_table,
)
from mnist_lab.report.winner import find_winners, format_winners, write_up_winners
from mnist_lab.runtimes import RUNTIMES, RuntimeName, why_missing

Mode = Literal["train", "load"]
ON_SCREEN = 7  # columns of compression that fit a screen
MAX_LINE = 1000  # characters of an answer from a pipe
MAX_ANSWERS = 3  # that are wrong, where nobody sits at a terminal
SCRIPTS = {"FFN_baseline": "baseline_mnist.py", "Sparse_MoE": "moe_mnist.py", "KD_FFN_Student": "kd_mnist.py"}


@contextmanager
def open_lab(options: Options) -> Iterator[Lab]:
    """The data and folders that the options name, for this run alone; says at start and end where it is not MNIST.

    Raises:
        UserError: the data cannot be had, or a folder cannot be written or is in use.
    """
    lab = find_lab(options)
    notice, training = lab.dataset.notice, f"{torch.get_num_threads()} training threads"
    with only_run_in(lab.checkpoints, wait=options.wait), only_run_in(lab.results, wait=options.wait):
        print_notice(notice)
        print(f"{lab.results.name}: {len(lab.dataset.train):,} training images, {training}", flush=True)
        yield lab
        print_notice(notice)


def find_lab(options: Options, like: Lab | None = None) -> Lab:
    """The same for a process of a run that has the folders already. Torch gets no more threads than CPUs may be used.

    Args:
        like: another of the same data and runtimes, where there is one.

    Raises:
        UserError: the data cannot be had.
    """
    use_allowed_cpus()
    dataset = like.dataset if like else load_dataset(options.dataset, options.data_dir, options.height_and_width)
    folder = f"{dataset.name}-{options.preset}-{options.recipe}"
    lab = Lab(
        dataset=dataset,
        preset_name=options.preset,
        recipe_name=options.recipe,
        recipe=options.make_recipe(),
        checkpoints=options.checkpoints / folder,
        results=options.results / folder,
        device=options.device,
        threads=options.threads,
        runtimes=like.runtimes if like else _find_runtimes(options),
        data_dir=options.data_dir,
    )
    if isinstance(options, RowOptions):
        lab = replace(lab, latency=options.latency, log=options.log is not None)
    return lab


@dataclass(frozen=True)
class FindLab:
    """Finds the lab of these options, in another process too."""

    options: Options
    train_threads: int | None = None

    def __call__(self, like: Lab | None = None) -> Lab:
        return replace(find_lab(self.options, like), train_threads=self.train_threads)


def use_allowed_cpus() -> None:
    """Let torch compute on no more threads than this process may use CPUs."""
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))


def make_and_print(
    lab: Lab,
    row: Row,
    seeds: range,
    *,
    beside: Row | None = None,
    with_source: bool = False,
    with_parents: bool = False,
) -> list[Record]:
    """Make one row for each seed, time it (by turns with a finished one to compare with), and print the figures.

    Args:
        with_source: make what the row is another form of anew first, and say what it did.
        with_parents: make what it needs first, too, where that is missing or stale.

    Returns:
        The row's own records.

    Raises:
        UserError: it runs in none of the runtimes asked for; a run that it needs first is missing or stale.
    """
    runs = [Run(lab, row, seed) for seed in seeds]
    _check_runtimes(runs[0])
    if not with_parents:
        for run in runs:
            for parent in (run.parents["source"] if with_source else run).parents.values():
                _check_parent(parent)

    def make_one(run: Run) -> Record:
        if with_source:
            print(produce(run.parents["source"]).proof["text"], flush=True)
        return make(run)

    made = make_all(runs, make_one)
    others = [] if beside is None else [load_or_measure(Run(lab, beside, seed)) for seed in seeds]
    records = _time(lab, _take_usable(lab, [*made, *others], made))
    print_table(build_table(_as_asked(lab, records), order=ORDER, columns=lab.columns))
    for run in runs:
        print(f"\nmodel: {run.output}\nto deploy: {run.artifact}\nrecord: {run.record}")
    return made


def _check_parent(parent: Run) -> None:
    """Raise UserError where a run that another needs first is not there or out of date."""
    reason = parent.why_stale()
    if reason is None:
        return
    needed, script = f"{parent.name} is needed first, and {parent.output} is {reason}.", SCRIPTS.get(parent.row.name)
    if script is None:
        raise UserError(f"{needed} Make it with the script and the options that are for it.")
    data = parent.row.dataset
    script, options = (f"{script} --dataset {data}", "") if data is not None else (script, " --dataset,")
    raise UserError(
        f"{needed} Make it with: python {script}, and the "
        f"same options --preset, --recipe,{options} --seed, --epochs, --batch-size, --learning-rate and --checkpoints."
    )


def _take_usable(lab: Lab, records: Sequence[Record], current: Sequence[Record]) -> list[Record]:
    """Those that a table may take; says of the others why not."""
    usable, left_out = usable_records(records, lab.checkpoints, cpu_model(), current=current)
    for line in left_out:
        print(f"not in the table: {line}")
    return usable


def _time(lab: Lab, records: Sequence[Record]) -> list[Record]:
    """The records with their latencies of now on this CPU, or without any where none are to be measured.

    Writes the final figures for TensorBoard where that is asked for.
    """
    if lab.latency:
        measure_latencies(lab, first_in(records, lab.runtimes))
        timed, left_out = timed_on(cpu_model(), records)
        for line in left_out:
            print(f"not in the table: {line}")
    else:
        timed = [_untimed(record) for record in records]
    if lab.log:
        log_records(lab, timed)
    return timed


def _untimed(record: Record) -> Record:
    measurements = {
        name: replace(measurement, latency_ms={}, threads=None) for name, measurement in record.measurements.items()
    }
    return replace(record, measurements=measurements)


def _find_runtimes(options: Options) -> tuple[RuntimeName, ...]:
    """Those asked for that can run here, PyTorch's sparse layout with PyTorch; says of the others why not.

    Raises:
        UserError: none of them can.
    """
    asked = [runtime for runtime in RUNTIMES if {runtime, "best"} & set(options.runtime)]
    missing = {runtime: reason for runtime in asked if (reason := why_missing(runtime))}
    for runtime, reason in missing.items():
        print(f"--runtime {runtime} is skipped: {reason}")
    if len(missing) == len(asked):
        raise UserError(f"--runtime {' '.join(options.runtime)}: nothing is left to measure in")
    found = [runtime for runtime in asked if runtime not in missing]
    if "pytorch" in found and "torch-sparse" not in asked and why_missing("torch-sparse") is None:
        found.append("torch-sparse")
    return tuple(found)


def _check_runtimes(run: Run) -> None:
    """Raise UserError where a row runs in none of the runtimes asked for."""
    form = run.row.form
    if not set(form.runtimes) & set(run.lab.runtimes):
        raise UserError(f"{run.model} is {form.precision} and runs in --runtime {' or '.join(form.runtimes)} only")


def _as_asked(lab: Lab, records: Iterable[Record]) -> list[Record]:
    """The records with the measurements of the runtimes asked for; without those that have none."""
    asked = [
        replace(record, measurements={name: m for name, m in record.measurements.items() if name in lab.runtimes})
        for record in records
    ]
    return [record for record in asked if record.measurements]


def print_table(table: pd.DataFrame) -> None:
    """The table, its comparisons and the fastest runtimes, as plain aligned text.

    A narrow terminal gets fewer columns; a pipe gets all.
    """
    width = os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else None
    print(f"\n{format_summary(table, style='simple', width=width)}\n\n{SUMMARY_LEGEND}", flush=True)
    if compression := format_compression(table, style="simple", columns=COMPRESSION[:ON_SCREEN]):
        print(f"\ncompression, against each row's original:\n{compression}", flush=True)
    is_timed = bool(table[[column.name for column in LATENCIES]].notna().any(axis=None))
    if is_timed and table["model"].duplicated().any():
        print(f"\nfastest runtime:\n{format_fastest(table, style='simple')}", flush=True)


def print_expert_load(record: Record) -> None:
    """How evenly the router spread the images, per epoch."""
    print(f"\n{record.run_name}\nepoch  share of (image, expert) pairs per expert            dropped")
    for epoch in record.curves:
        shares = " ".join(f"{share:6.1%}" for share in epoch["expert_load"])
        print(f"{epoch['epoch']:5d}  {shares}  {epoch['dropped_share']:.2%}")


def print_proof(record: Record) -> None:
    """What the technique did, and how far the model stays from its original."""
    assert record.proof is not None
    print(f"{record.run_name}: {record.proof['text']}")
    for runtime, measurement in record.measurements.items():
        print(f"same class as {record.original} on {measurement.same_class:.2%} of the test images in {runtime}")
        if measurement.other_class_b1 is not None:
            others = f"{measurement.other_class_b1:.2%} have another class"
            print(f"one image at a time, test accuracy is {measurement.test_acc_b1:.2%}, and {others} than in a batch")


def run_table(options: Options, rows: Sequence[Row], *, mode: Mode | None, seeds: range) -> None:
    """All rows for all seeds, then the table and the plots of everything in the results folder."""
    with open_lab(options) as lab:
        run_rows(lab, rows, mode=mode, seeds=seeds)


def run_rows(lab: Lab, rows: Sequence[Row], *, mode: Mode | None, seeds: range) -> None:
    """The same in an open lab."""
    runs = [Run(lab, row, seed) for seed in seeds for row in rows]
    print_checkpoints(runs)
    load_records(lab.results)  # a broken one stops the run now, not after hours of work
    records = make_all(runs, make if (mode or ask_mode()) == "train" else load_or_make)
    finish_table(lab, records, rows)


def finish_table(lab: Lab, made: Sequence[Record], rows: Sequence[Row]) -> list[Record]:
    """Time what the results folder holds, and write its table and plots; the records that are in the table.

    Args:
        made: the records just made, of
        rows: whose families come first.
    """
    records = _time(lab, _take_usable(lab, load_records(lab.results), made))
    write_results(lab, records, order=tuple(dict.fromkeys([*families(rows), *ORDER])))
    return records


def print_checkpoints(runs: Sequence[Run]) -> None:
    """Which models are on disk and up to date."""
    print("checkpoints:")
    for run in runs:
        print(f"  {run.name}: {run.why_stale() or 'found'}", flush=True)


def ask_mode() -> Mode:
    """Ask on the terminal, or read a pipe's answer.

    Raises:
        UserError: the input ends without an answer, or is no terminal and has three wrong ones.
    """
    for attempt in itertools.count(1):
        try:
            print("train all anew, or load what is up to date? [train/load] ", end="", flush=True)
            answer = _read_line().strip().lower()
        except (EOFError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: standard input is closed
            print()  # ends the prompt's line
            raise UserError("the input holds no answer; pass --mode train or --mode load") from error
        modes: tuple[Mode, ...] = ("train", "load")
        for mode in modes:
            if answer and mode.startswith(answer):
                return mode
        print(f"'{answer[:80]}' is neither train nor load")
        if attempt == MAX_ANSWERS and not sys.stdin.isatty():
            break
    raise UserError(f"{MAX_ANSWERS} answers were neither train nor load; pass --mode train or --mode load")


def _read_line() -> str:
    """A line of the terminal's, or of a pipe's, which may have no end.

    Raises:
        EOFError: there is none.
    """
    if sys.stdin is not None and sys.stdin.isatty():
        return input()
    line = sys.stdin.readline(MAX_LINE) if sys.stdin is not None else ""
    if not line:
        raise EOFError
    return line


def write_results(lab: Lab, records: Sequence[Record], *, order: Sequence[str]) -> None:
    """Table, plots and report.

    Args:
        order: the families, first one first.
    """
    table = build_table(_as_asked(lab, records), order=order, columns=lab.columns)
    distillation = judge_distillation(records)
    title = title_of(lab.dataset.name, lab.preset_name, lab.recipe_name)
    winners = find_winners(records)
    sections = {"What to deploy": write_up_winners(winners, lab.checkpoints)}
    write_table(lab.results, table, title=title, distillation=distillation, columns=lab.columns, sections=sections)
    print_table(table)
    if distillation:
        print(f"\ndistillation:\n{distillation}")
    print(f"\ntable: {lab.results / 'table.csv'} and table.md", flush=True)
    # Imported when the table is safe: matplotlib takes a second, and may be broken.
    from mnist_lab.command.report import write_report
    from mnist_lab.report.curve import write_curve
    from mnist_lab.report.figures import draw_all
    from mnist_lab.report.results import Results

    results = Results(records, order, lab.columns)
    if curve := write_curve(lab.results, results):
        print(f"curve: {curve}", flush=True)
    for path in draw_all(lab.results, results):
        print(f"plot: {path}", flush=True)
    if records:
        print(f"report: {write_report(lab.results, results, lab.checkpoints, lambda: lab.test)}", flush=True)
    if winners is not None:
        print(f"\n{format_winners(winners, lab.checkpoints)}", flush=True)


def print_notice(notice: str) -> None:
    """A line that must not be missed; nothing where there is none."""
    if notice:
        print(f"\nNOTE: {notice}\n", flush=True)
