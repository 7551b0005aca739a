"""Files with flipped bits, cut short, with bytes put in or zeroed: noticed, in one line, whatever is asked of them."""

import contextlib
import os
import random
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tiny import CHAIN, SMALL, ZeroSmallest, make_lab

from mnist_lab.compress.int8 import Calibration, DynamicInt8, StaticInt8
from mnist_lab.compress.train import TrainMoE
from mnist_lab.deploy.artifacts import artifact_bytes, read_artifact, read_onnx, read_onnx_metadata
from mnist_lab.deploy.card import card_path, describe, read_card
from mnist_lab.errors import UserError
from mnist_lab.experiments.make import load_or_make
from mnist_lab.experiments.resume import FileKeeper
from mnist_lab.experiments.row import Row
from mnist_lab.experiments.run import Run, read_provenance
from mnist_lab.models.checkpoints import load_checkpoint, read_tensors
from mnist_lab.report.records import load_predictions, load_record
from mnist_lab.runtimes import open_session, why_missing
from mnist_lab.studies.dark_knowledge import (
    PAPER,
    DarkKnowledge,
    Errors,
    load_dark_knowledge,
    paper_rows,
    recipes_of,
    save_dark_knowledge,
)
from mnist_lab.training import EpochMetrics, Kept

FILES = int(os.environ.get("FAULT_FILES", "20"))
IS_LONG = FILES >= 200
SEED = int(os.environ.get("FAULT_SEED", "0"))
MEMORY_KIB = 200 * 1024
MOE = Row("MoE", TrainMoE())
SPARSE = Row("Sparse", ZeroSmallest(0.95), source=SMALL)
INT8 = Row("INT8", source=SMALL, form=StaticInt8(Calibration(100)))
MOE_INT8 = Row("MoE_INT8", source=MOE, form=DynamicInt8())


Reader = Callable[[Path], object]


class Kind(NamedTuple):
    path: Path
    readers: list[Reader]


@pytest.fixture(scope="module")
def kinds() -> Iterator[dict[str, Kind]]:
    """A file of each kind, and all that reads such files."""
    with tempfile.TemporaryDirectory() as folder:
        yield make_kinds(Path(folder))


def make_kinds(folder: Path) -> dict[str, Kind]:
    runtimes = ("pytorch", "onnxruntime", *(() if why_missing("torchao") else ("torchao",)))
    lab = make_lab(folder, runtimes=runtimes)
    for row in (*CHAIN, MOE, SPARSE, INT8, MOE_INT8):
        load_or_make(Run(lab, row, 0))
    run, results = Run(lab, MOE, 0), lab.results
    record = load_record(run.record)
    checkpoint: list[Reader] = [read_tensors, read_provenance, load_checkpoint, lambda path: open_in("pytorch", path)]
    artifact: list[Reader] = [
        read_artifact,
        read_onnx,
        read_onnx_metadata,
        read_provenance,
        artifact_bytes,
        lambda path: open_in("onnxruntime", path),
    ]
    FileKeeper(folder / "state.fit1.safetensors", {}).keep(Kept({"model.x": torch.ones(1000)}, [METRICS]))
    errors = dict.fromkeys(PAPER, Errors(3, 1))
    dark = DarkKnowledge(0, "mnist", recipes_of(paper_rows()), errors, bias=0.1, num_images=100, num_threes=10)
    save_dark_knowledge(folder / "dark_knowledge.json", [dark])
    kinds = {
        "checkpoint": Kind(run.output, checkpoint),
        "artifact": Kind(run.artifact, artifact),
        "sparse artifact": Kind(Run(lab, SPARSE, 0).artifact, artifact),
        "INT8 artifact": Kind(Run(lab, INT8, 0).artifact, artifact),
        "MoE INT8 artifact": Kind(Run(lab, MOE_INT8, 0).artifact, artifact),
        "record": Kind(run.record, [load_record]),
        "card": Kind(card_path(run.artifact), [read_card, lambda _: describe(run.artifact)]),
        "predictions": Kind(run.record.with_suffix(".npz"), [lambda _: load_predictions(results, record)]),
        "training state": Kind(folder / "state.fit1.safetensors", [read_tensors]),
        "dark knowledge": Kind(folder / "dark_knowledge.json", [lambda path: load_dark_knowledge(path, "mnist")]),
    }
    if "torchao" in runtimes:
        path = Run(lab, INT8, 0).file("safetensors")
        kinds["INT8 checkpoint"] = Kind(path, [read_tensors, read_provenance, lambda path: open_in("torchao", path)])
    return kinds


METRICS = EpochMetrics(1, 0.1, {"cross_entropy": 0.1}, 0.1, 0.9)


def open_in(runtime: str, path: Path) -> object:
    return open_session(runtime, path, precision="INT8" if runtime == "torchao" else "FP32", threads=1)  # type: ignore[arg-type]


NAMES = [
    "checkpoint", "artifact", "sparse artifact", "INT8 artifact", "MoE INT8 artifact", "record", "card", "predictions",
    "training state", "dark knowledge", "INT8 checkpoint",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_damage_is_noticed_in_one_line_and_little_memory(kinds: dict[str, Kind], name: str) -> None:
    if name not in kinds:
        pytest.skip("torchao cannot run here")
    path, readers = kinds[name]
    whole = path.read_bytes()
    for read in readers:
        read(path)
    generator = random.Random(f"{SEED} {name}")
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        for number in range(FILES):
            damaged, what = damage(whole, generator)
            if damaged == whole:
                continue
            path.write_bytes(damaged)
            read = readers[number % len(readers)]
            with pytest.raises(UserError) as caught:
                read(path)
            assert "\n" not in str(caught.value), what
            assert path.name in str(caught.value), what
    finally:
        path.write_bytes(whole)
    took_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert took_kib < 2 * len(whole) / 1024 + MEMORY_KIB


def damage(content: bytes, generator: random.Random) -> tuple[bytes, str]:
    """One of the ways in which files come to harm."""
    start = generator.randrange(len(content))
    end = min(len(content), start + generator.choice([1, 2, 8, 64, 4096]))
    kind = generator.choice(["flip", "flip", "flip", "cut", "insert", "zero", "drop", "swap", "append", "noise"])
    if kind == "flip":
        changed = content[:start] + bytes([content[start] ^ 1 << generator.randrange(8)]) + content[start + 1 :]
    elif kind == "cut":
        changed = content[:start]
    elif kind == "insert":
        changed = content[:start] + generator.randbytes(end - start) + content[start:]
    elif kind == "zero":
        changed = content[:start] + bytes(end - start) + content[end:]
    elif kind == "drop":
        changed = content[:start] + content[end:]
    elif kind == "swap":
        middle = generator.randrange(len(content))
        changed = content[middle:] + content[:middle]
    elif kind == "append":
        changed = content + generator.randbytes(end - start)
    else:
        changed = content[:start] + generator.randbytes(end - start) + content[end:]
    return changed, f"{kind} at {start}"


def test_pixels_that_are_damaged_never_end_in_a_traceback(tmp_path: Path) -> None:
    """An IDX file has no digest: a damaged header is noticed, a damaged pixel cannot be."""
    from mnist_lab.data import load_dataset

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = random.Random(SEED)
    shuffled = np.random.default_rng(0)
    whole = {}
    for prefix, num in (("train", 300), ("t10k", 100)):
        images = bytes([0, 0, 8, 3]) + b"".join(n.to_bytes(4, "big") for n in (num, 28, 28))
        labels = bytes([0, 0, 8, 1]) + num.to_bytes(4, "big")
        whole[f"{prefix}-images-idx3-ubyte"] = images + shuffled.bytes(num * 784)
        whole[f"{prefix}-labels-idx1-ubyte"] = labels + bytes(i % 10 for i in range(num))
    for name, content in whole.items():
        (raw / name).write_bytes(content)
    load_dataset("mnist", tmp_path).load_test()
    for _ in range(FILES):
        name = generator.choice(list(whole))
        damaged, _ = damage(whole[name], generator)
        if generator.random() < 0.5:  # hit the header, which is a thousandth of the file
            place = generator.randrange(16)
            damaged = whole[name][:place] + generator.randbytes(1) + whole[name][place + 1 :]
        (raw / name).write_bytes(damaged)
        with contextlib.suppress(UserError):
            load_dataset("mnist", tmp_path).load_test()
        (raw / name).write_bytes(whole[name])
