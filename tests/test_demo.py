"""What the page's demo embeds, and where the engine for browsers comes from."""

import base64
import gzip
import hashlib
import io
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from builders import make_measurement, make_record
from tiny import spec

from mnist_lab.command.report import find_commands
from mnist_lab.deploy import inside
from mnist_lab.deploy.onnx import write_onnx
from mnist_lab.errors import UserError
from mnist_lab.experiments.demo import find_routes, make_demo, read_model
from mnist_lab.experiments.rows import MODELS, STUDENTS
from mnist_lab.files import sha256
from mnist_lab.models import PRESETS
from mnist_lab.models.moe import RoutingConfig, SparseMoE
from mnist_lab.report import page_demo
from mnist_lab.report.records import Record
from mnist_lab.report.results import Results
from mnist_lab.runtimes import onnxruntime_web
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options
from mnist_lab.runtimes.onnxruntime_web import PACKAGE, WebRuntime, fetch_runtime, find_runtime

PIXELS = np.random.default_rng(0).random((70, 1, 28, 28), np.float32)
ENGINE = WebRuntime("0", b"module", b"wasm")


@pytest.fixture
def mixture(tmp_path: Path) -> Record:
    """A record of an untrained mixture, whose artifact lies in the folder."""
    torch.manual_seed(0)
    path = tmp_path / "Sparse_MoE-seed0.onnx"
    write_onnx(SparseMoE(PRESETS["compact"].moe(spec(), RoutingConfig())).eval(), path, {})
    artifact = {"file": path.name, "sha256": sha256(path)}
    return replace(make_record("Sparse_MoE"), artifact=artifact, expert_by_class=[[1.0]])  # type: ignore[arg-type]


def test_embedded_mixture_is_its_artifact_and_tells_its_routes(tmp_path: Path, mixture: Record) -> None:
    model = read_model(tmp_path, mixture)
    assert model is not None
    assert model.tells_experts
    content, artifact = gzip.decompress(base64.b64decode(model.packed)), tmp_path / mixture.artifact["file"]
    assert content.startswith(artifact.read_bytes())
    assert len(content) < artifact.stat().st_size + 50
    logits, experts, weights = onnxruntime.InferenceSession(content, session_options(1), providers=PROVIDERS).run(
        None, {"pixels": PIXELS}
    )
    assert np.array_equal(np.sort(experts, axis=1), inside.choose_experts(artifact, PIXELS))
    assert weights.sum(axis=1) == pytest.approx(np.ones(len(PIXELS)), abs=1e-5)
    alone = onnxruntime.InferenceSession(artifact, session_options(1), providers=PROVIDERS)
    assert np.array_equal(logits, alone.run(None, {"pixels": PIXELS})[0])


def test_demo_embeds_only_what_its_record_is_of(tmp_path: Path, mixture: Record) -> None:
    other = replace(mixture, artifact={**mixture.artifact, "sha256": "0" * 64})
    with pytest.raises(UserError, match="not the file of its record"):
        make_demo(tmp_path, Results([other]).models, ENGINE)


def test_demo_keeps_to_its_room_and_names_who_is_left_out(
    tmp_path: Path, mixture: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = Results([mixture]).models
    assert [model.name for model in make_demo(tmp_path, models, ENGINE).models] == ["Sparse_MoE"]
    monkeypatch.setattr("mnist_lab.experiments.demo.MAX_BYTES", 1000)
    demo = make_demo(tmp_path, models, ENGINE)
    assert (list(demo.models), demo.left_out) == ([], "Sparse_MoE")


def test_routes_are_those_of_the_first_mixture_where_its_file_is(tmp_path: Path, mixture: Record) -> None:
    models = Results([make_record(), mixture]).models
    routes = find_routes(tmp_path, models, PIXELS)
    assert list(routes) == ["Sparse_MoE"]
    assert routes["Sparse_MoE"].shape == (len(PIXELS), 2)
    assert find_routes(tmp_path / "none", models, PIXELS) == {}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(onnxruntime_web, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def make_package() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as package:
        for name in ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"):
            entry = tarfile.TarInfo(f"package/dist/{name}")
            entry.size = len(name)
            package.addfile(entry, io.BytesIO(name.encode()))
    return buffer.getvalue()


def fake_npm(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_engine_is_fetched_once_and_checked(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_package()  # once: it holds the time
    (tmp_path / "package").write_bytes(package)
    copies = f'for last; do :; done; cp {tmp_path / "package"} "$last/{PACKAGE}"'
    fake_npm(tmp_path / "bin", monkeypatch, copies)
    assert "is not onnxruntime-web" in (fetch_runtime() or "")
    assert find_runtime() is None
    digest = base64.b64encode(hashlib.sha512(package).digest()).decode()
    monkeypatch.setattr(onnxruntime_web, "INTEGRITY", digest)
    assert fetch_runtime() is None
    (tmp_path / "bin" / "npm").unlink()
    assert fetch_runtime() is None  # it is there
    engine = find_runtime()
    assert engine is not None
    assert engine.wasm == b"ort-wasm-simd-threaded.wasm"
    (cache / PACKAGE).write_bytes(b"another")
    for look in (fetch_runtime, find_runtime):
        with pytest.raises(UserError, match="by its SHA-512"):
            look()


def test_engine_that_cannot_be_had_is_told_in_a_line(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(tmp_path / "bin", monkeypatch, "echo 'npm error no network' >&2; exit 1")
    assert fetch_runtime() == "npm cannot fetch it: npm error no network"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fetch_runtime() == f"npm is not here to fetch it; put {onnxruntime_web.ADDRESS} into {cache}/"
    assert page_demo.MAX_BYTES <= 8_000_000


def test_commands_make_the_models_again() -> None:
    recipe = {"recipe": {"epochs": 7, "batch_size": 256}}
    usual = [replace(make_record(row.name, seed=seed), config=recipe) for row in MODELS for seed in (3, 4)]
    (command,) = find_commands(usual)
    assert command == (
        "python run_all_experiments.py --mode load --suite models --dataset mnist --preset compact --recipe quick "
        "--epochs 7 --seed 3 --seeds 2 --threads 1 --runtime onnxruntime"
    )
    students = [make_record(row.name, onnxruntime=make_measurement(b64=None)) for row in STUDENTS]
    assert [command.split()[4:6] for command in find_commands(students)] == [["--suite", "students"]]
    assert len(find_commands([*usual, *students])) == 2
    swept = [make_record(name) for name in ("Sparse_MoE", "Sparse_MoE-E8", "Sparse_MoE-E2")]
    assert find_commands(swept) == [
        "# by other options of the scripts, or a sweep: Sparse_MoE, Sparse_MoE-E2 and Sparse_MoE-E8"
    ]


def test_commands_say_what_they_cannot_know_of_own_data() -> None:
    recipe = {"epochs": 5, "batch_size": 256, "learning_rate": 5e-3, "augmentation": None}
    own = replace(make_record(), dataset="shapes-1a2b3c4d-28x40", recipe="standard", config={"recipe": recipe})
    (command,) = find_commands([own])
    assert "--dataset KIND:PATH --image-size 28 40 " in command
    assert " --no-augmentation " in command
    assert command.endswith("where the data of shapes-1a2b3c4d-28x40 lie")
