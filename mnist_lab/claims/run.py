"""Train what claims compare, settle them, and write verdicts and figures."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from mnist_lab.claims.evidence import Evidence
from mnist_lab.claims.findings import Finding, format_claims, write_claims
from mnist_lab.claims.settle import (
    STUDENT,
    Settings,
    find_winner,
    settle_claims,
    settle_dark_knowledge,
    settle_scaling,
)
from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.console import make_all, open_lab
from mnist_lab.evaluate import measure_latencies, profile_routing
from mnist_lab.lab import Lab, find_reason_to_make
from mnist_lab.options import Options
from mnist_lab.plots import draw_all
from mnist_lab.records import Record
from mnist_lab.rows import CALIBRATIONS, GRID, Row, claim_rows, grid_rows, quantized, student

MOES = ("Sparse_MoE", "Sparse_MoE_INT8", "Sparse_MoE_PTQ")
TIMED = (*MOES, "FFN_baseline", "FFN_PTQ_INT8", "FFN_equal_active", "FFN_equal_total")
NUM_GRID_SEEDS = 3


def run_claims(options: Options, *, grid_options: Options, seeds: range) -> None:
    """Make every row for every seed, the grid of temperature and alpha on its own options, and settle the claims."""
    suffix = options.suffix
    with open_lab(options) as table_lab:
        lab = table_lab.for_claims()
        records = _make(lab, options, claim_rows(suffix=suffix), seeds)
        grid_lab = table_lab.with_recipe(grid_options.recipe, grid_options.make_recipe()).for_claims()
        grid_seeds = seeds[:NUM_GRID_SEEDS]
        grid_records = _make(grid_lab, grid_options, grid_rows(suffix=grid_options.suffix), grid_seeds)
        grid = Evidence(grid_lab.results, grid_records, grid_seeds, suffix=grid_options.suffix)
        winner = _find_winner(grid)
        winners: list[Row] = [student(teacher, winner, suffix=suffix) for teacher in ("moe", "ffn")]
        records += _make(lab, options, [row for row in winners if winner != DistillationConfig()], seeds)
        measure_latencies(lab, [(r, "onnxruntime") for r in records if r.model.removesuffix(suffix) in TIMED])
        profile_routing(lab, [record for record in records if record.model.removesuffix(suffix) in MOES])
        settings = Settings(
            calibrations=[quantized("moe", "static", calibration).model for calibration in CALIBRATIONS],
            winner=student("moe", winner).model.removeprefix(STUDENT),
            grid=grid,
        )
        findings = settle_claims(Evidence(lab.results, records, seeds, suffix=suffix), settings)
        more, notes = _settle_other_files(options.results, table_lab.dataset.name)
        machine = records[0].machine
        notes.insert(0, f"Measured on {machine['cpu']}, {machine['cores']} cores; {lab.threads} thread(s) for latency.")
        title = f"Claims, tested: {lab.dataset.name}, {lab.preset} models, {lab.recipe_name} recipe, {len(seeds)} seeds"
        findings = sorted([*findings, *more], key=lambda finding: finding.claim)
        write_claims(table_lab.results, findings, title=title, notes=notes)
        print("\n\n".join(["", format_claims(findings), *notes]))
        print(f"\nwritten: {table_lab.results / 'claims.md'} and claims.json")
        _draw(lab, records, grid_lab, grid_records)


def _make(lab: Lab, options: Options, rows: Sequence[Row], seeds: range) -> list[Record]:
    """Every row for every seed; where seeds are to be made, as many at once as there are threads."""
    jobs = [(row, seed) for seed in seeds for row in rows]
    due = [seed for row, seed in jobs if find_reason_to_make(lab, row, seed)]
    print(f"{lab.checkpoints.name}: {len(jobs)} models, {len(due)} of them to make", flush=True)
    if lab.device == "cpu":
        _make_side_by_side(options, rows, sorted(set(due)))
    return make_all(lab, jobs, mode="load")


def _make_side_by_side(options: Options, rows: Sequence[Row], seeds: Sequence[int]) -> None:
    """Make each seed's rows in a process of its own: two models on a thread each train faster than in turn on two.

    Raises:
        UserError, RunFailed: as the first seed that fails; those at work finish.
    """
    num_workers = min(torch.get_num_threads(), len(seeds))
    if num_workers < 2:
        return
    threads = torch.get_num_threads() // num_workers
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=_start_worker, initargs=(threads,))
    try:
        for finished in as_completed([pool.submit(_make_seed, options, rows, seed) for seed in seeds]):
            finished.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["TERM"] = "dumb"  # no moving bars, of which several would overwrite each other


def _make_seed(options: Options, rows: Sequence[Row], seed: int) -> None:
    with open_lab(options) as lab:
        make_all(lab.for_claims(), [(row, seed) for row in rows], mode="load")


def _find_winner(grid: Evidence) -> DistillationConfig:
    by_name = {student("moe", distillation).model: distillation for distillation in GRID}
    return by_name[find_winner(grid, list(by_name))]


def _settle_other_files(results: Path, dataset: str) -> tuple[list[Finding], list[str]]:
    """What is found in the files of other runs, and a note for each of those runs that is still to do."""
    findings: list[Finding] = []
    notes = []
    dark_knowledge = results / f"{dataset}-dark-knowledge" / "dark_knowledge.json"
    if dark_knowledge.is_file():
        findings += settle_dark_knowledge(json.loads(dark_knowledge.read_text()))
    else:
        notes.append("Claim 12 is not tested here: run `python dark_knowledge_mnist.py` first.")
    scaling = results / "benchmarks" / "scaling.csv"
    if scaling.is_file():
        findings += settle_scaling(pd.read_csv(scaling))
    else:
        notes.append("Claim 14 is not tested at larger scale: run `python -m benchmarks.scaling` first.")
    return findings, notes


def _draw(lab: Lab, records: Sequence[Record], grid_lab: Lab, grid_records: Sequence[Record]) -> None:
    """The figures of both folders, which on the grid's recipe are one."""
    by_folder = {grid_lab.results: {record.run_name: record for record in grid_records}}
    by_folder.setdefault(lab.results, {}).update({record.run_name: record for record in records})
    for folder, found in by_folder.items():
        for path in draw_all(folder, list(found.values())):
            print(f"plot: {path}")
