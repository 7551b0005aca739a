"""Train what claims compare, settle them, and write verdicts and figures."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from mnist_lab.compress.distill import DistillationConfig
from mnist_lab.data import find_known
from mnist_lab.errors import RunFailed
from mnist_lab.experiments.cluster import find_workers
from mnist_lab.experiments.lab import Lab
from mnist_lab.experiments.latencies import measure_latencies, profile_routing
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.rows import MOE, student
from mnist_lab.experiments.run import Run, check_alike
from mnist_lab.experiments.workers import Finder, Job, make_side_by_side
from mnist_lab.machine import cpu_model
from mnist_lab.report.records import Record
from mnist_lab.studies.claims.compression import compression_rows, settle_compression
from mnist_lab.studies.claims.distillation import TIMED_STUDENTS, distillation_rows, settle_distillation
from mnist_lab.studies.claims.draw import SuiteName, draw_claims
from mnist_lab.studies.claims.evidence import Evidence
from mnist_lab.studies.claims.few_bits import few_bits_rows, settle_few_bits
from mnist_lab.studies.claims.findings import Finding, format_claims, write_claims
from mnist_lab.studies.claims.rows import CALIBRATIONS, GRID, calibrated, claim_rows, grid_rows, winners
from mnist_lab.studies.claims.settle import (
    STUDENT,
    Settings,
    find_winner,
    load_scaling,
    settle_claims,
    settle_dark_knowledge,
    settle_scaling,
)
from mnist_lab.studies.claims.transfer import SOURCE, settle_transfer, transfer_rows
from mnist_lab.studies.dark_knowledge import load_dark_knowledge

MOES = ("Sparse_MoE", "Sparse_MoE_INT8", "Sparse_MoE_PTQ")
TIMED = (*MOES, "FFN_baseline", "FFN_PTQ_INT8", "FFN_equal_active", "FFN_equal_total")
NUM_GRID_SEEDS = 3


class Doors(NamedTuple):
    """Ways into a lab."""

    open: Callable[[], AbstractContextManager[Lab]]  # for this run alone
    find: Finder  # for a process of a run that has opened it
    cluster: str | None = None  # address of the Dask scheduler whose workers make what is missing


def run_claims(table: Doors, grid: Doors, *, seeds: range) -> None:
    """Make every row for every seed, the grid of temperature and alpha in its own lab, and settle the claims."""
    with table.open() as table_lab, grid.open() as grid_table_lab:
        lab, grid_lab = _plan(table_lab, seeds), _plan(grid_table_lab, seeds)  # with recipe quick the same
        records = _make(lab, table, claim_rows(), seeds)
        grid_seeds = seeds[:NUM_GRID_SEEDS]
        grid_records = _make(grid_lab, grid, grid_rows(), grid_seeds)
        grid_evidence = Evidence(grid_lab.results, grid_records, grid_seeds)
        winner = _find_winner(grid_evidence)
        records += _make(lab, table, winners(winner), seeds)
        measure_latencies(lab, [(record, "onnxruntime") for record in records if record.row in TIMED])
        profile_routing(lab, [record for record in records if record.row in MOES])
        settings = Settings(
            calibrations=[calibrated(calibration).name for calibration in CALIBRATIONS],
            winner=student(MOE, winner).name.removeprefix(STUDENT),
            grid=grid_evidence,
        )
        findings = settle_claims(Evidence(lab.results, records, seeds), settings)
        more, notes = _settle_other_files(table_lab.results.parent, table_lab.dataset.name)
        notes.insert(0, f"{_measured_on(records)}; {lab.threads} thread(s) for latency.")
        findings = sorted([*findings, *more], key=lambda finding: finding.claim)
        _report(table_lab, findings, seeds, title="Claims, tested", notes=notes, name="claims")
        _draw("models", (grid_lab.results, grid_records), (lab.results, records))


class Suite(NamedTuple):
    """Claims that need nothing but rows."""

    title: str
    rows: Callable[[], Sequence[Row]]
    settle: Callable[[Evidence], list[Finding]]
    timed: tuple[Row, ...] = ()


SUITES: dict[SuiteName, Suite] = {
    "compression": Suite("Claims about pruning, tested", compression_rows, settle_compression),
    "few-bits": Suite("Claims about fewer bits, tested", few_bits_rows, settle_few_bits),
    "distillation": Suite(
        "Claims about distilling a mixture and techniques together, tested",
        distillation_rows,
        settle_distillation,
        timed=TIMED_STUDENTS,
    ),
}


def run_suite(name: SuiteName, table: Doors, *, seeds: range) -> None:
    """Make every row that a suite's claims compare for every seed, and settle those claims."""
    suite = SUITES[name]
    with table.open() as table_lab:
        lab = _plan(table_lab, seeds)
        records = _make(lab, table, suite.rows(), seeds)
        timed = {row.name for row in suite.timed}
        measure_latencies(lab, [(record, "onnxruntime") for record in records if record.row in timed])
        findings = suite.settle(Evidence(lab.results, records, seeds))
        file = f"claims_{name.replace('-', '_')}"
        _report(table_lab, findings, seeds, title=suite.title, notes=[f"{_measured_on(records)}."], name=file)
        _draw(name, (lab.results, records))


def run_transfer(table: Doors, source: Doors, *, seeds: range) -> None:
    """Make models of the source's data set, then what becomes of them on the table's, and settle the claim about that.

    No run holds both data sets' folders at once, so that two that go opposite ways do not wait for each other.
    """
    check_alike(source.find().dataset, table.find().dataset)  # or the run ends now, as where data is missing
    with source.open() as source_lab:
        _make(_plan(source_lab, seeds), source, [SOURCE], seeds)
    dataset = find_known(source_lab.dataset.name)
    with table.open() as table_lab:
        lab = _plan(table_lab, seeds)
        records = _make(lab, table, transfer_rows(dataset), seeds)
        findings = settle_transfer(Evidence(lab.results, records, seeds), dataset)
        title = f"The claim about a model from {dataset}, tested"
        _report(table_lab, findings, seeds, title=title, notes=[f"{_measured_on(records)}."], name="claims_transfer")


def _plan(lab: Lab, seeds: range) -> Lab:
    """The claims' lab, and the training threads of every seed, by how many there are and not by how many are due: two
    models on a thread each train faster than in turn on two, and other threads give other bits.
    """
    return replace(lab.for_claims(), train_threads=torch.get_num_threads() // _num_workers(lab, seeds))


def _num_workers(lab: Lab, seeds: range) -> int:
    return min(torch.get_num_threads(), len(seeds)) if lab.device == "cpu" else 1


def _make(lab: Lab, doors: Doors, rows: Sequence[Row], seeds: range) -> list[Record]:
    """Every row for every seed; what is to be made, several seeds at once."""
    runs = [Run(lab, row, seed) for seed in seeds for row in rows]
    due = sorted({run.seed for run in runs if run.why_stale()})
    print(f"{lab.results.parent.name}: {len(runs)} models, {len(due)} of {len(seeds)} seeds to make", flush=True)
    find = FindClaimsLab(doors.find, lab.train_threads)
    records: dict[Path, Record] = {}
    with find_workers(_num_workers(lab, seeds), doors.cluster) as workers:
        for run, record, error in make_side_by_side([Job(run, find) for run in runs], workers):
            if record is None:
                raise RunFailed(f"{run.name}: {error}")
            records[run.output] = record
    return [records[run.output] for run in runs]


@dataclass(frozen=True)
class FindClaimsLab:
    """Finds the lab of claims, by that of the table, in another process."""

    find: Finder
    train_threads: int | None

    def __call__(self) -> Lab:
        return replace(self.find().for_claims(), train_threads=self.train_threads)


def _find_winner(grid: Evidence) -> DistillationConfig:
    by_name = {student(MOE, distillation).name: distillation for distillation in GRID}
    return by_name[find_winner(grid, list(by_name))]


def _settle_other_files(results: Path, dataset: str) -> tuple[list[Finding], list[str]]:
    """What is found in the files of other runs, and a note for each of those runs that is still to do."""
    findings: list[Finding] = []
    notes = []
    dark_knowledge = results / f"{dataset}-dark-knowledge" / "dark_knowledge.json"
    if dark_knowledge.is_file():
        findings += settle_dark_knowledge([asdict(run) for run in load_dark_knowledge(dark_knowledge, dataset)])
    else:
        notes.append("Claim 12 is not tested here: run `python dark_knowledge_mnist.py` first.")
    scaling = results / "benchmarks" / "scaling.json"
    found = load_scaling(scaling) if scaling.is_file() else None
    if found is not None and found.machine["cpu"] == cpu_model():
        findings += settle_scaling(found.rows)
    else:
        missing = "was measured on another CPU" if found else "is not tested"
        notes.append(f"Claim 14 at larger scale {missing}: run `python -m benchmarks.scaling` first.")
    return findings, notes


def _measured_on(records: Sequence[Record]) -> str:
    """The machines of accuracies; latencies are this one's."""
    machines = dict.fromkeys(f"{record.machine['cpu']}, {record.machine['cores']} cores" for record in records)
    return f"Measured on {' and '.join(machines)}" + (f"; latency on {cpu_model()}" if len(machines) > 1 else "")


def _report(
    lab: Lab, findings: Sequence[Finding], seeds: range, *, title: str, notes: Sequence[str], name: str
) -> None:
    """Write the verdicts beside the table's results, and print them."""
    settings = f"{lab.dataset.name}, {lab.preset_name} models, {lab.recipe_name} recipe, {len(seeds)} seeds"
    write_claims(lab.results, findings, title=f"{title}: {settings}", notes=notes, name=name)
    print("\n\n".join(["", format_claims(findings), *notes]))
    print(f"\nwritten: {lab.results / f'{name}.md'} and {name}.json")


def _draw(suite: SuiteName, *found: tuple[Path, Sequence[Record]]) -> None:
    """The suite's figures in each of these folders; the grid's is the table's where they share a recipe."""
    by_folder: dict[Path, dict[str, Record]] = {}
    for folder, records in found:
        by_folder.setdefault(folder, {}).update({record.run_name: record for record in records})
    for folder, by_name in by_folder.items():
        for path in draw_claims(folder, list(by_name.values()), suite):
            print(f"plot: {path}")
