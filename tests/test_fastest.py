import functools
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny import spec

from mnist_lab.deploy import fastest
from mnist_lab.deploy.artifacts import read_onnx_metadata
from mnist_lab.deploy.fastest import LAYOUTS, is_dense_faster, write_fastest
from mnist_lab.deploy.onnx import Layout, write_onnx
from mnist_lab.models import PRESETS, build_model
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession

IMAGES = np.random.default_rng(0).random((70, 1, 28, 28), np.float32)
MODEL = build_model(PRESETS["compact"].moe(spec(), RoutingConfig())).eval()


open_file = functools.partial(OnnxRuntimeSession, threads=1)


def write(path: Path, layout: Layout) -> None:
    write_onnx(MODEL, path, {"model": "7"}, layout=layout)


def test_dense_must_be_clearly_faster_over_all_batch_sizes_alike() -> None:
    sparse = {"1": 1.0, "1024": 10.0}
    assert is_dense_faster({"sparse": sparse, "dense": {"1": 0.5, "1024": 11.0}})
    assert not is_dense_faster({"sparse": sparse, "dense": {"1": 1.2, "1024": 7.0 / 0.8}})
    assert not is_dense_faster({"sparse": sparse, "dense": {"1": 0.97, "1024": 9.7}})


@pytest.mark.parametrize("best", LAYOUTS)
def test_keeps_the_layout_that_measured_fastest(best: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Faster by ratio, though slower in the sum: batch 1 counts as much as batch 1024.
    times = {layout: {"1": 1.0, "1024": 10.0} if layout == best else {"1": 3.0, "1024": 9.0} for layout in LAYOUTS}
    monkeypatch.setattr(fastest, "time_layouts", lambda *_: times)
    write_fastest(MODEL, tmp_path / "model.onnx", write, open_file, IMAGES)
    metadata = read_onnx_metadata(tmp_path / "model.onnx")
    assert metadata["layout"] == {"name": best, "runtime": "onnxruntime", "median_ms": times}
    assert metadata["model"] == "7"
    write(tmp_path / "expected.onnx", best)
    names = [[node.name for node in onnx.load(tmp_path / file).graph.node] for file in ("model.onnx", "expected.onnx")]
    assert names[0] == names[1]


def test_times_every_layout_at_every_batch_size_that_there_are_images_for(tmp_path: Path) -> None:
    write_fastest(MODEL, tmp_path / "model.onnx", write, open_file, IMAGES)
    median_ms = read_onnx_metadata(tmp_path / "model.onnx")["layout"]["median_ms"]
    assert {layout: list(times) for layout, times in median_ms.items()} == {
        layout: ["1", "64", "70"] for layout in LAYOUTS
    }
    assert min(min(times.values()) for times in median_ms.values()) > 0
