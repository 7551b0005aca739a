import functools
from pathlib import Path

import numpy as np
import onnx
import pytest

from mnist_lab import dispatch
from mnist_lab.deploy.artifacts import read_onnx_metadata
from mnist_lab.deploy.fastest import FORMS, is_dense_faster, write_fastest
from mnist_lab.deploy.onnx import Dispatch, export_onnx
from mnist_lab.models import PRESETS, build_model
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession

IMAGES = np.random.default_rng(0).random((70, 1, 28, 28), np.float32)
MODEL = build_model(PRESETS["compact"].moe(0.13, 0.31, RoutingConfig())).eval()


open_file = functools.partial(OnnxRuntimeSession, threads=1)


def write(path: Path, form: Dispatch) -> None:
    export_onnx(MODEL, path, {"parent_sha256": "7"}, dispatch=form)


def test_dense_must_be_clearly_faster_over_all_batch_sizes_alike() -> None:
    sparse = {"1": 1.0, "1024": 10.0}
    assert is_dense_faster({"sparse": sparse, "dense": {"1": 0.5, "1024": 11.0}})
    assert not is_dense_faster({"sparse": sparse, "dense": {"1": 1.2, "1024": 7.0 / 0.8}})
    assert not is_dense_faster({"sparse": sparse, "dense": {"1": 0.97, "1024": 9.7}})


@pytest.mark.parametrize("fastest", FORMS)
def test_keeps_the_form_that_measured_fastest(
    fastest: Dispatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Faster by ratio, though slower in the sum: batch 1 counts as much as batch 1024.
    times = {form: {"1": 1.0, "1024": 10.0} if form == fastest else {"1": 3.0, "1024": 9.0} for form in FORMS}
    monkeypatch.setattr(dispatch, "time_forms", lambda *_: times)
    write_fastest(tmp_path / "model.onnx", write, open_file, IMAGES)
    metadata = read_onnx_metadata(tmp_path / "model.onnx")
    assert metadata["dispatch"] == {"form": fastest, "runtime": "onnxruntime", "median_ms": times}
    assert metadata["parent_sha256"] == "7"
    write(tmp_path / "expected.onnx", fastest)
    names = [[node.name for node in onnx.load(tmp_path / file).graph.node] for file in ("model.onnx", "expected.onnx")]
    assert names[0] == names[1]


def test_times_every_form_at_every_batch_size_that_there_are_images_for(tmp_path: Path) -> None:
    write_fastest(tmp_path / "model.onnx", write, open_file, IMAGES)
    median_ms = read_onnx_metadata(tmp_path / "model.onnx")["dispatch"]["median_ms"]
    assert {form: list(times) for form, times in median_ms.items()} == {form: ["1", "64", "70"] for form in FORMS}
    assert min(min(times.values()) for times in median_ms.values()) > 0
