"""The latency of finished runs, all by turns, and where an MoE's pass spends its time; added to their records."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TypeVar, cast

import torch

from mnist_lab import measure
from mnist_lab.deploy.inside import time_by_job
from mnist_lab.experiments.lab import Lab
from mnist_lab.files import sha256
from mnist_lab.machine import cpu_model
from mnist_lab.progress import progress_bar
from mnist_lab.report.records import Record, Timing, save_record
from mnist_lab.runtimes import EXTENSIONS, RuntimeName, Session, bind, open_session

K = TypeVar("K")
NUM_ROUNDS = 5


def measure_latencies(lab: Lab, timed: Sequence[tuple[Record, RuntimeName]]) -> None:
    """Time these models by turns, each in its runtime and at every batch size, and add that to their records.

    A file that is no longer the one whose quality was measured is left out.
    """
    pixels = lab.test.numpy()[0]
    sessions: dict[tuple[str, RuntimeName], Session] = {}
    for record, runtime in timed:
        file = lab.file(record.run_name, EXTENSIONS[runtime])
        if file.is_file() and sha256(file) == record.measurements[runtime].file["sha256"]:
            session = open_session(runtime, file, precision=record.precision, threads=lab.threads)
            sessions[record.run_name, runtime] = session
    measured, session_id = time_by_turns(sessions, pixels, threads=lab.threads), uuid.uuid4().hex
    for record, runtime in timed:
        if (record.run_name, runtime) in sessions:
            measurement = record.measurements[runtime]
            measurement.latency_ms = measured[record.run_name, runtime]
            measurement.threads, measurement.latency_session = lab.threads, session_id
            measurement.latency_cpu = cpu_model()
            save_record(lab.results, record)


def time_by_turns(sessions: Mapping[K, Session], pixels: measure.Array, *, threads: int) -> dict[K, dict[str, Timing]]:
    """The latency of each at every batch size of the table.

    Args:
        threads: of PyTorch; the sessions of other runtimes have their own.
    """
    measured: dict[K, dict[str, Timing]] = {key: {} for key in sessions}
    # The bar is redrawn between blocks only, not from a thread that would run beside what is timed.
    with torch_threads(threads), progress_bar(auto_refresh=False) as progress:
        task = progress.add_task("latency", total=len(sessions) * len(measure.TABLE_BATCHES) * NUM_ROUNDS)

        def on_block() -> None:
            progress.advance(task)
            progress.refresh()

        for batch in measure.TABLE_BATCHES:
            images = measure.take_images(pixels, batch)
            calls = {key: bind(session, images) for key, session in sessions.items()}
            latencies = measure.measure_latency(calls, num_rounds=NUM_ROUNDS, on_block=on_block)
            for key, latency in latencies.items():
                measured[key][str(batch)] = cast("Timing", asdict(latency))
    return measured


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute on that many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def profile_routing(lab: Lab, records: Sequence[Record]) -> None:
    """Add to the records of MoEs where a pass at batch 64 spends its time."""
    images = measure.take_images(lab.test.numpy()[0], 64)
    for record in records:
        record.time_by_job_us = time_by_job(lab.file(record.run_name, "onnx"), images)
        save_record(lab.results, record)
