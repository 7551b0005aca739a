"""The whole story of a row: its parents, its weights, its files, its figures."""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from mnist_lab.errors import RunFailed
from mnist_lab.experiments.cards import ensure_card
from mnist_lab.experiments.measure_run import find_known, measure_run
from mnist_lab.experiments.resume import forget, keepers
from mnist_lab.experiments.run import Run
from mnist_lab.experiments.technique import Proof, Work
from mnist_lab.experiments.watch import watched
from mnist_lab.files import write_atomically
from mnist_lab.folders import only_run_in
from mnist_lab.machine import package_versions
from mnist_lab.models import Model
from mnist_lab.models.checkpoints import save_checkpoint
from mnist_lab.report.records import Record
from mnist_lab.runtimes import EXTENSIONS


class Produced(NamedTuple):
    """What a run's files were written of, and what proves it."""

    model: Model
    proof: Proof
    seconds: float


def make(run: Run) -> Record:
    """Make a run anew, and the parents that it lacks; measure it, and keep its record.

    Raises:
        UserError: a file in its place is not its own, or broken; a folder cannot be written.
        RunFailed: training diverged, or the technique took no effect; files of before stay. Or a runtime or file is
            not of the precision that it should be.
    """
    made = produce(run)
    ensure_files(run, made.model)
    seconds = made.seconds if run.row.step is not None else None
    return measure_run(run, model=made.model, proof=made.proof, train_seconds=seconds)


def load_or_make(run: Run) -> Record:
    """Take what is on disk where it is up to date; make or measure the rest."""
    return make(run) if run.why_stale() else load_or_measure(run)


def load_or_measure(run: Run) -> Record:
    """The record of a finished run, measured anew where it is missing, lacks a figure, or is not of these files."""
    ensure_files(run)
    record = find_known(run)
    if record is not None and record.measurements.keys() >= set(run.runtimes):
        ensure_card(run, record)
        return record
    return measure_run(run, known=record)


def find_finished(run: Run) -> Record | None:
    """The record of a run of which nothing is to be made or measured."""
    if run.why_stale() or any(map(run.is_due, files_of(run)[1:])):
        return None
    record = find_known(run)
    return record if record is not None and record.measurements.keys() >= set(run.runtimes) else None


def ensure_weights(run: Run) -> None:
    """See that a run's own file is there and up to date, without measuring it."""
    if run.why_stale():
        produce(run)


def ensure_parents(run: Run) -> None:
    """See that all that a run is made from is there and up to date."""
    for parent in filter(Run.why_stale, run.parents.values()):
        own = parent.lab == run.lab
        with nullcontext() if own else only_run_in(parent.lab.folder, wait=True):  # another data set's
            ensure_weights(parent)


def produce(run: Run) -> Produced:
    """Write a run's own file from parents that are up to date."""
    run.why_stale()  # refuses to overwrite what is not this run's
    ensure_parents(run)
    work, start = run.work(run.load_parents()), time.perf_counter()
    if run.row.step is None:
        assert work.source is not None
        return Produced(work.source, write_form(run, run.output, work.source, work), time.perf_counter() - start)
    # All that can be known before the work: after it nothing may fail that has nothing to do with the weights.
    known = run.metadata(run.output) | {
        "train_threads": torch.get_num_threads(),
        "device": run.lab.device,
        "versions": package_versions(),
    }
    before = copy.deepcopy(work.source)
    try:
        with watched(run, keepers(run)) as own_keepers:
            made = run.row.step.make(replace(work, keepers=own_keepers))
        if before is not None and _same_weights(made.model, before):
            raise RunFailed(f"{run.name}: the technique changed none of {run.parents['source'].model}'s weights")
    except RunFailed:  # going on would end the same way
        forget(run)
        raise
    outcome = {"curves": [asdict(epoch) for epoch in made.curves], "proof": made.proof}
    save_checkpoint(run.output, made.model, known | outcome)
    forget(run)
    return Produced(made.model, made.proof, time.perf_counter() - start)


def ensure_files(run: Run, model: Model | None = None) -> None:
    """See that what derives from a run's weights is there and up to date: the artifact, and what its runtimes load.

    The same for its original, which it is compared with.

    Args:
        model: that the run's files are written from, where it is loaded already.
    """
    for file in filter(run.is_due, files_of(run)[1:]):
        model = model or run.weights.load()
        write_form(run, file, model, run.work())
    if run.original != run:
        ensure_files(run.original)


def files_of(run: Run) -> list[Path]:
    """A run's own file, then those that derive from its weights: the artifact, and what its runtimes load."""
    extensions = dict.fromkeys(["onnx", *(EXTENSIONS[runtime] for runtime in run.runtimes)])
    return list(dict.fromkeys([run.output, *map(run.file, extensions)]))


def write_form(run: Run, file: Path, model: Model, work: Work) -> Proof:
    """Write one of a run's files, and prove what it is before it takes its place."""
    proofs: list[Proof] = []

    def write(temporary: Path) -> None:
        run.row.form.write(model, temporary, work, run.metadata(file))
        proofs.append(run.row.form.prove(model, temporary))

    write_atomically(file, write)
    return proofs[0]


def _same_weights(model: Model, source: Model) -> bool:
    ours, theirs = model.state_dict(), source.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def make_all(runs: Sequence[Run], make_one: Callable[[Run], Record]) -> list[Record]:
    """Every run by `make` or `load_or_make`, with a line for each."""
    assert len({run.output for run in runs}) == len(runs), "two rows of one name would overwrite each other"
    records: list[Record] = []
    start, costs = time.perf_counter(), [cost_of(run) for run in runs]
    for number, run in enumerate(runs, start=1):
        record = make_one(run)
        records.append(record)
        elapsed = time.perf_counter() - start
        left = elapsed * sum(costs[number:]) / sum(costs[:number])
        progress = f"[{number}/{len(runs)}, {elapsed:.0f} s, about {left:.0f} s left]"
        print(f"{progress} {record.run_name}: validation accuracy {record.validation_acc:.2%}", flush=True)
    return records


def cost_of(run: Run) -> float:
    """What a run takes, in epochs of the dense FFN: to measure it as much as one, to train it that of its step."""
    return 1 + (run.row.step.cost * run.lab.recipe.epochs if run.row.step is not None else 0)
