"""Which layout of an MoE's artifact is the fastest on this CPU: measured, not guessed, and written into the file."""

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import onnx

from mnist_lab.deploy.artifacts import add_onnx_metadata
from mnist_lab.deploy.onnx import Layout
from mnist_lab.files import write_atomically
from mnist_lab.measure import TABLE_BATCHES, Array, measure_latency
from mnist_lab.models import Model
from mnist_lab.models.moe import SparseMoE
from mnist_lab.runtimes import Session, bind

NUM_ROUNDS, BLOCK_S = 3, 0.015
MARGIN = 0.95  # the dense layout must need less than this share of the sparse one's time: nearer, chance would choose
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def write_fastest(
    model: Model,
    path: Path,
    write: Callable[[Path, Layout], object],
    open_file: Callable[[Path], Session],
    images: Array,
) -> None:
    """Write an MoE's artifact in every layout, time them by turns, and keep the one with the lower geometric mean.

    The file's metadata gets `layout`: its name, the runtime that was timed, and the median milliseconds of each
    by batch size. A dense model's artifact has only one layout, and is just written.

    Args:
        write: makes one layout at the path that it is given.
        open_file: loads one into the runtime to be timed.
        images: real ones (N, 1, height, width), since the router spreads no others as it should.

    Raises:
        UserError: the folder cannot be written.
    """
    if not isinstance(model, SparseMoE):
        write(path, "sparse")
        return
    with tempfile.TemporaryDirectory() as folder:
        files = {str(layout): Path(folder) / f"{layout}.onnx" for layout in LAYOUTS}
        for layout in LAYOUTS:
            write(files[layout], layout)
        sessions = {layout: open_file(file) for layout, file in files.items()}
        median_ms = time_layouts(sessions, images)
        best: Layout = "dense" if is_dense_faster(median_ms) else "sparse"
        proto = onnx.load(files[best])
    add_onnx_metadata(proto, {"layout": {"name": best, "runtime": sessions[best].runtime, "median_ms": median_ms}})
    write_atomically(path, lambda temporary: onnx.save(proto, temporary))


def is_dense_faster(median_ms: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether all experts on every image take clearly less time than sorting, over all batch sizes alike."""
    ratios = [median_ms["dense"][batch] / median_ms["sparse"][batch] for batch in median_ms["sparse"]]
    return math.prod(ratios) ** (1 / len(ratios)) < MARGIN


def time_layouts(sessions: Mapping[str, Session], images: Array) -> dict[str, dict[str, float]]:
    """Median milliseconds of each layout for each batch size of the table that there are images for."""
    median_ms: dict[str, dict[str, float]] = {layout: {} for layout in sessions}
    for batch in TABLE_BATCHES:
        pixels = images[:batch]
        calls = {layout: bind(session, pixels) for layout, session in sessions.items()}
        for layout, latency in measure_latency(calls, num_rounds=NUM_ROUNDS, block_s=BLOCK_S).items():
            median_ms[layout][str(len(pixels))] = latency.median_ms
    return median_ms
