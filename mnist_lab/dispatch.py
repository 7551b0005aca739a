"""Which form of an MoE's artifact is the fastest on this CPU: measured, not guessed, and written into the file."""

import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import onnx

from mnist_lab.artifacts import add_onnx_metadata
from mnist_lab.export import Dispatch
from mnist_lab.files import write_atomically
from mnist_lab.measure import Array, measure_latency
from mnist_lab.records import TABLE_BATCHES
from mnist_lab.runtimes import Session

NUM_ROUNDS = 3
MARGIN = 0.95  # the dense form must need less than this share of the sparse one's time: nearer, chance would choose
FORMS: tuple[Dispatch, ...] = get_args(Dispatch)


def write_fastest(
    path: Path, write: Callable[[Path, Dispatch], object], open_file: Callable[[Path], Session], images: Array
) -> None:
    """Write an artifact in every form, time them by turns, and keep the one with the lower geometric mean.

    The file's metadata gets `dispatch`: the form, the runtime that was timed, and the median milliseconds of each
    form by batch size.

    Args:
        write: makes one form at the path that it is given.
        open_file: loads one into the runtime to be timed.
        images: real ones (N, 1, 28, 28), since the router spreads no others as it should.

    Raises:
        UserError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {str(form): Path(folder) / f"{form}.onnx" for form in FORMS}
        for form in FORMS:
            write(files[form], form)
        sessions = {form: open_file(file) for form, file in files.items()}
        median_ms = time_forms(sessions, images)
        best: Dispatch = "dense" if is_dense_faster(median_ms) else "sparse"
        model = onnx.load(files[best])
    add_onnx_metadata(model, {"dispatch": {"form": best, "runtime": sessions[best].runtime, "median_ms": median_ms}})
    write_atomically(path, lambda temporary: onnx.save(model, temporary))


def is_dense_faster(median_ms: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether all experts on every image take clearly less time than sorting, over all batch sizes alike."""
    ratios = [median_ms["dense"][batch] / median_ms["sparse"][batch] for batch in median_ms["sparse"]]
    return math.prod(ratios) ** (1 / len(ratios)) < MARGIN


def time_forms(sessions: Mapping[str, Session], images: Array) -> dict[str, dict[str, float]]:
    """Median milliseconds of each form for each batch size of the table that there are images for."""
    median_ms: dict[str, dict[str, float]] = {form: {} for form in sessions}
    for batch in TABLE_BATCHES:
        pixels = images[:batch]
        calls = {form: functools.partial(session.run, session.prepare(pixels)) for form, session in sessions.items()}
        for form, latency in measure_latency(calls, num_rounds=NUM_ROUNDS).items():
            median_ms[form][str(len(pixels))] = latency.median_ms
    return median_ms
