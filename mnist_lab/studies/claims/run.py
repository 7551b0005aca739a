"""Train what claims compare, settle them, and write verdicts and figures."""

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.latencies import measure_latencies, profile_routing
from mnist_lab.experiments.make import load_or_make, make_all
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import MOE, student
from mnist_lab.experiments.run import Run
from mnist_lab.report.records import Record
from mnist_lab.studies.claims.evidence import Evidence
from mnist_lab.studies.claims.figures import draw_claims
from mnist_lab.studies.claims.findings import Finding, format_claims, write_claims
from mnist_lab.studies.claims.rows import CALIBRATIONS, GRID, calibrated, claim_rows, grid_rows, winners
from mnist_lab.studies.claims.settle import (
    STUDENT,
    Settings,
    find_winner,
    settle_claims,
    settle_dark_knowledge,
    settle_scaling,
)

OpenLab = Callable[[], AbstractContextManager[Lab]]  # can be pickled, for the processes that make seeds side by side
MOES = ("Sparse_MoE", "Sparse_MoE_INT8", "Sparse_MoE_PTQ")
TIMED = (*MOES, "FFN_baseline", "FFN_PTQ_INT8", "FFN_equal_active", "FFN_equal_total")
NUM_GRID_SEEDS = 3


def run_claims(open_lab: OpenLab, open_grid_lab: OpenLab, *, seeds: range) -> None:
    """Make every row for every seed, the grid of temperature and alpha in its own lab, and settle the claims."""
    with open_lab() as table_lab, open_grid_lab() as grid_table_lab:
        lab, grid_lab = table_lab.for_claims(), grid_table_lab.for_claims()
        records = _make(lab, open_lab, claim_rows(), seeds)
        grid_seeds = seeds[:NUM_GRID_SEEDS]
        grid_records = _make(grid_lab, open_grid_lab, grid_rows(), grid_seeds)
        grid = Evidence(grid_lab.results, grid_records, grid_seeds)
        winner = _find_winner(grid)
        records += _make(lab, open_lab, winners(winner), seeds)
        measure_latencies(lab, [(record, "onnxruntime") for record in records if record.row in TIMED])
        profile_routing(lab, [record for record in records if record.row in MOES])
        settings = Settings(
            calibrations=[calibrated(calibration).name for calibration in CALIBRATIONS],
            winner=student(MOE, winner).name.removeprefix(STUDENT),
            grid=grid,
        )
        findings = settle_claims(Evidence(lab.results, records, seeds), settings)
        more, notes = _settle_other_files(table_lab.results.parent, table_lab.dataset.name)
        machine = records[0].machine
        notes.insert(0, f"Measured on {machine['cpu']}, {machine['cores']} cores; {lab.threads} thread(s) for latency.")
        settings_of_all = f"{lab.dataset.name}, {lab.preset_name} models, {lab.recipe_name} recipe, {len(seeds)} seeds"
        findings = sorted([*findings, *more], key=lambda finding: finding.claim)
        write_claims(table_lab.results, findings, title=f"Claims, tested: {settings_of_all}", notes=notes)
        print("\n\n".join(["", format_claims(findings), *notes]))
        print(f"\nwritten: {table_lab.results / 'claims.md'} and claims.json")
        _draw(lab, records, grid_lab, grid_records)


def _make(lab: Lab, open_lab: OpenLab, rows: Sequence[Row], seeds: range) -> list[Record]:
    """Every row for every seed; where seeds are to be made, as many at once as there are threads."""
    runs = [Run(lab, row, seed) for seed in seeds for row in rows]
    due = [run.seed for run in runs if run.why_stale()]
    print(f"{lab.checkpoints.name}: {len(runs)} models, {len(due)} of them to make", flush=True)
    if lab.device == "cpu":
        _make_side_by_side(open_lab, rows, sorted(set(due)))
    return make_all(runs, load_or_make)


def _make_side_by_side(open_lab: OpenLab, rows: Sequence[Row], seeds: Sequence[int]) -> None:
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
        for finished in as_completed([pool.submit(_make_seed, open_lab, rows, seed) for seed in seeds]):
            finished.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ["TERM"] = "dumb"  # no moving bars, of which several would overwrite each other


def _make_seed(open_lab: OpenLab, rows: Sequence[Row], seed: int) -> None:
    with open_lab() as lab:
        claims_lab = lab.for_claims()
        make_all([Run(claims_lab, row, seed) for row in rows], load_or_make)


def _find_winner(grid: Evidence) -> DistillationConfig:
    by_name = {student(MOE, distillation).name: distillation for distillation in GRID}
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
        for path in draw_claims(folder, Evidence.in_folder(folder, list(found.values()))):
            print(f"plot: {path}")
