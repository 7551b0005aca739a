"""What a script does around its row: open the lab, say what happens, print the figures."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import pandas as pd
import torch

from mnist_lab import evaluate, experiments
from mnist_lab.compress.bfloat16 import has_bfloat16
from mnist_lab.data import load_dataset
from mnist_lab.errors import UserError
from mnist_lab.files import ensure_writable
from mnist_lab.lab import Lab, find_reason_to_make
from mnist_lab.machine import cpu_model
from mnist_lab.options import Options
from mnist_lab.records import (
    SUMMARY_LEGEND,
    Record,
    build_table,
    first_in,
    format_fastest,
    format_summary,
    judge_distillation,
    load_records,
    usable_records,
    write_table,
)
from mnist_lab.rows import Row, table_rows
from mnist_lab.runtimes import RUNTIMES, RuntimeName, why_missing

Mode = Literal["train", "load"]


@contextmanager
def open_lab(options: Options) -> Iterator[Lab]:
    """The data and folders that the options name; says at start and end where the data is not MNIST.

    Raises:
        UserError: the data cannot be had, or a folder cannot be written.
    """
    dataset = load_dataset(options.dataset, options.data_dir)
    folder = f"{dataset.name}-{options.preset}-{options.recipe}"
    lab = Lab(
        dataset=dataset,
        preset=options.preset,
        recipe_name=options.recipe,
        recipe=options.make_recipe(),
        device=options.device,
        threads=options.threads,
        runtimes=_find_runtimes(options),
        checkpoints=options.checkpoints / folder,
        results=options.results / folder,
    )
    ensure_writable(lab.checkpoints)
    ensure_writable(lab.results)
    _print_notice(dataset.notice)
    print(f"{folder}: {len(dataset.train):,} training images, {torch.get_num_threads()} training threads", flush=True)
    yield lab
    _print_notice(dataset.notice)


def make_and_print(lab: Lab, row: Row, seed: int, *, beside: Row | None = None) -> Record:
    """Make one row, time it (by turns with a finished row to compare with), and print the figures."""
    _check_runtimes(lab, row)
    records = [experiments.make_row(lab, row, seed)]
    if beside is not None:
        records.append(experiments.load_or_measure_row(lab, beside, seed))
        if reason := find_reason_to_make(lab, beside, seed):
            print(f"note: {beside.model} is {reason}")
    evaluate.measure_latencies(lab, first_in(records, lab.runtimes))
    print_table(build_table(_as_asked(lab, records)))
    print(f"\nmodel: {lab.output(row, seed)}\nto deploy: {lab.artifact(row.model, seed)}")
    print(f"record: {lab.record(row.model, seed)}")
    return records[0]


def _find_runtimes(options: Options) -> tuple[RuntimeName, ...]:
    """Those asked for that can run here; says of the others why not.

    Raises:
        UserError: none of them can.
    """
    asked = [runtime for runtime in RUNTIMES if {runtime, "best"} & set(options.runtime)]
    missing = {runtime: reason for runtime in asked if (reason := why_missing(runtime))}
    for runtime, reason in missing.items():
        print(f"--runtime {runtime} is skipped: {reason}")
    if len(missing) == len(asked):
        raise UserError(f"--runtime {' '.join(options.runtime)}: nothing is left to measure in")
    return tuple(runtime for runtime in asked if runtime not in missing)


def _check_runtimes(lab: Lab, row: Row) -> None:
    """Raise UserError where a row runs in none of the runtimes asked for."""
    if not set(row.runtimes) & set(lab.runtimes):
        raise UserError(f"{row.model} is {row.precision} and runs in --runtime {' or '.join(row.runtimes)} only")


def _as_asked(lab: Lab, records: Iterable[Record]) -> list[Record]:
    """The records with the measurements of the runtimes asked for; without those that have none."""
    asked = [
        replace(record, measurements={name: m for name, m in record.measurements.items() if name in lab.runtimes})
        for record in records
    ]
    return [record for record in asked if record.measurements]


def print_table(table: pd.DataFrame) -> None:
    """The table, its comparisons and the fastest runtimes, as plain aligned text that a pipe keeps whole."""
    print(f"\n{format_summary(table, style='simple')}\n\n{SUMMARY_LEGEND}", flush=True)
    if table["model"].duplicated().any():
        print(f"\nfastest runtime:\n{format_fastest(table, style='simple')}", flush=True)


def print_expert_load(record: Record) -> None:
    """How evenly the router spread the images, per epoch."""
    print("\nepoch  share of (image, expert) pairs per expert            dropped")
    for epoch in record.curves:
        shares = " ".join(f"{share:6.1%}" for share in epoch["expert_load"])
        print(f"{epoch['epoch']:5d}  {shares}  {epoch['dropped_share']:.2%}")


def print_proof(record: Record) -> None:
    """What the engine's optimized graph executes."""
    assert record.proof is not None
    products = ", ".join(f"{count} {name}" for name, count in record.proof["integer_products"].items())
    floats = ", ".join(record.proof["float_products"]) or "none"
    weights = "7-bit weights, as this CPU has no VNNI" if record.proof["reduced_range"] else "8-bit weights"
    print(f"integer products: {products}; in float: {floats}; {weights}")
    for runtime, measurement in record.measurements.items():
        print(f"same class as FP32 on {measurement.same_class:.2%} of the test images in {runtime}")


def run_table(options: Options, *, mode: Mode | None, seeds: range) -> None:
    """All rows for all seeds, then the table and the plots of everything in the results folder."""
    with open_lab(options) as lab:
        rows = table_rows(suffix=options.suffix, bfloat16=has_bfloat16())
        jobs = [(row, seed) for seed in seeds for row in rows]
        print_checkpoints(lab, jobs)
        load_records(lab.results)  # a broken one stops the run now, not after hours of work
        records = make_all(lab, jobs, mode=mode or ask_mode())
        usable, left_out = usable_records(load_records(lab.results), lab.checkpoints, cpu_model(), current=records)
        for line in left_out:
            print(f"not in the table: {line}")
        evaluate.measure_latencies(lab, first_in(usable, lab.runtimes))
        write_results(lab, usable)


def make_all(lab: Lab, jobs: Sequence[tuple[Row, int]], *, mode: Mode) -> list[Record]:
    """Every row for its seed, made anew or taken from disk where it is up to date; a line for each."""
    make = experiments.make_row if mode == "train" else experiments.load_or_make_row
    start = time.perf_counter()
    records = []
    for number, (row, seed) in enumerate(jobs, start=1):
        record = make(lab, row, seed)
        records.append(record)
        elapsed = time.perf_counter() - start
        left = elapsed / number * (len(jobs) - number)
        progress = f"[{number}/{len(jobs)}, {elapsed:.0f} s, about {left:.0f} s left]"
        print(f"{progress} {record.run_name}: validation accuracy {record.validation_acc:.2%}", flush=True)
    return records


def print_checkpoints(lab: Lab, jobs: Sequence[tuple[Row, int]]) -> None:
    """Which models are on disk and up to date."""
    print("checkpoints:")
    for row, seed in jobs:
        reason = find_reason_to_make(lab, row, seed)
        print(f"  {row.model}-seed{seed}: {reason or 'found'}", flush=True)


def ask_mode() -> Mode:
    """Ask on the terminal, or read a pipe's answer.

    Raises:
        UserError: the input ends without an answer.
    """
    while True:
        try:
            answer = input("train all anew, or load what is up to date? [train/load] ").strip().lower()
        except (EOFError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: standard input is closed
            print()  # ends the prompt's line
            raise UserError("the input holds no answer; pass --mode train or --mode load") from error
        modes: tuple[Mode, ...] = ("train", "load")
        for mode in modes:
            if answer and mode.startswith(answer):
                return mode
        print(f"'{answer}' is neither train nor load")


def write_results(lab: Lab, records: list[Record]) -> None:
    """Table and plots."""
    from mnist_lab.plots import draw_all

    table, distillation = build_table(_as_asked(lab, records)), judge_distillation(records)
    title = f"{lab.dataset.name}, {lab.preset} models, {lab.recipe_name} recipe"
    write_table(lab.results, table, title=title, distillation=distillation)
    print_table(table)
    if distillation:
        print(f"\ndistillation:\n{distillation}")
    print(f"\ntable: {lab.results / 'table.csv'} and table.md")
    for path in draw_all(lab.results, records):
        print(f"plot: {path}")


def _print_notice(notice: str) -> None:
    if notice:
        print(f"\nNOTE: {notice}\n", flush=True)
