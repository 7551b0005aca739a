"""Small records for the tests of the table and of the figures."""

import json
from pathlib import Path
from typing import Any

from mnist_lab.files import BLANK, seal
from mnist_lab.machine import Machine
from mnist_lab.report.records import BASELINE, Measurement, Parent, Record

HERE = Machine(cpu="here", cores=2, system="Linux", python="3.11")


def make_measurement(test_acc: float = 0.98, size_mib: float = 1.0, b64: float | None = 2.0) -> Measurement:
    """A measurement timed at batch 64 only, or not at all."""
    return Measurement(
        version="1",
        file={"file": "x.onnx", "sha256": ""},
        test_acc=test_acc,
        test_loss=0.1,
        test_ece=0.01,
        test_brier=0.03,
        train_acc=0.99,
        train_loss=0.05,
        size_mib=size_mib,
        file_mb=size_mib,
        bins={},
        confusion=[],
        same_class=1.0,
        largest_gap=0.0,
        threads=1,
        latency_ms={} if b64 is None else {"64": {"median_ms": b64, "q1_ms": b64, "q3_ms": b64, "num_calls": 9}},
    )


def make_record(model: str = BASELINE, seed: int = 0, **measurements: Measurement) -> Record:
    """A record without curves, of the family that the name says before its "-". What is converted is the baseline."""
    is_int8, is_bf16 = model.endswith(("INT8", "PTQ")), model.endswith("BF16")
    is_converted = is_int8 or is_bf16
    source: Parent = {"model": BASELINE, "file": f"{BASELINE}-seed{seed}.safetensors", "sha256": ""}
    return Record(
        family=model.partition("-")[0],
        row=model,
        departures="",
        technique="dense",
        precision="INT8" if is_int8 else "BF16" if is_bf16 else "FP32",
        dataset="mnist",
        preset="compact",
        recipe="quick",
        seed=seed,
        config={},
        architecture={},
        parents={"source": source} if is_converted else {},
        original=BASELINE if is_converted else model,
        checkpoint={"file": f"{model}-seed{seed}.safetensors", "sha256": ""},
        artifact={"file": f"{model}-seed{seed}.onnx", "sha256": ""},
        predictions={"file": f"{model}-seed{seed}.npz", "sha256": ""},
        params_total=10,
        params_active=10,
        validation_acc=0.98,
        validation_loss=0.1,
        curves=[],
        machine=HERE,
        versions={},
        measurements={**measurements} or {"onnxruntime": make_measurement()},
        train_seconds=1.0,
        train_threads=2,
    )


def edit_json(path: Path, fields: dict[str, Any]) -> None:
    """Write a sealed JSON file anew with other fields, as one who knows how."""
    path.write_bytes(seal(json.dumps(fields | {"digest": BLANK}).encode()))
