"""Small students as they are deployed: convolutions in the graph, and few bytes beside the weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from test_expert_shapes import APART
from test_small import PIXELS, SHAPE, make_small
from tiny import spec

from mnist_lab.compress.bfloat16 import round_weights
from mnist_lab.deploy import safety
from mnist_lab.deploy.onnx import build_onnx, write_onnx
from mnist_lab.deploy.safety import check_graph
from mnist_lab.models import build_model
from mnist_lab.models.ffn import Windows
from mnist_lab.models.small import SmallShape
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession
from mnist_lab.training import torch_predictor

SHAPES = [
    SHAPE,
    SmallShape((), 1, (Windows(8, 5, 3),)),
    SmallShape((12, 8), 4),
    SmallShape((), 2, (Windows(8, 3, 1), Windows(16, 3, 2), Windows(8, 5, 1))),
]


def run(path: Path, pixels: torch.Tensor = PIXELS) -> np.ndarray:
    return OnnxRuntimeSession(path, threads=1).predict(pixels.numpy())


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_artifact_gives_the_models_logits(shape: SmallShape, tmp_path: Path) -> None:
    model = make_small(shape)
    write_onnx(model, tmp_path / "small.onnx", {"model": "x"})
    for batch in (1, 7):
        pixels = PIXELS[:batch]
        expected = torch_predictor(model)(pixels.numpy())
        np.testing.assert_allclose(run(tmp_path / "small.onnx", pixels), expected, atol=1e-4, rtol=1e-4)
    graph = build_onnx(model)
    onnx.checker.check_model(graph, full_check=True)
    counted = [node.op_type for node in graph.graph.node]
    assert counted.count("Conv") == len(shape.windows)
    assert counted.count("AveragePool") == (shape.pool > 1)


def test_mixture_that_pools_gives_the_models_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(replace(APART, data=spec(), pool=2)).eval()
    write_onnx(model, tmp_path / "moe.onnx", {"model": "x"})
    np.testing.assert_allclose(run(tmp_path / "moe.onnx"), torch_predictor(model)(PIXELS.numpy()), atol=1e-4)


def test_weights_of_bf16_are_stored_so(tmp_path: Path) -> None:
    model = round_weights(make_small())
    write_onnx(model, tmp_path / "small.onnx", {"model": "x"})
    stored = {constant.data_type for constant in build_onnx(model).graph.initializer}
    assert stored == {onnx.TensorProto.BFLOAT16}
    expected = torch_predictor(model.float())(PIXELS.numpy())
    np.testing.assert_allclose(run(tmp_path / "small.onnx"), expected, atol=0.05, rtol=0.05)


def spoil(change: str, model: onnx.ModelProto) -> None:
    by_type = {node.op_type: node for node in reversed(model.graph.node)}
    if change == "padding":
        by_type["Conv"].attribute.append(helper.make_attribute("pads", [10**6] * 4))
    elif change == "dilation":
        by_type["Conv"].attribute.append(helper.make_attribute("dilations", [2, 2]))
    elif change == "mode":
        by_type["AveragePool"].attribute.append(helper.make_attribute("ceil_mode", 1))
    else:
        dims = model.graph.input[0].type.tensor_type.shape.dim
        dims[2].dim_value = dims[3].dim_value = 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("padding", "told what"),
        ("dilation", "told what"),
        ("mode", "told what"),
        ("image", "an image may be of any size"),
    ],
)
def test_graphs_that_could_take_memory_without_measure_are_refused(change: str, message: str) -> None:
    model = build_onnx(make_small())
    check_graph(model)
    spoil(change, model)
    with pytest.raises(ValueError, match=message):
        check_graph(model)


def test_windows_make_no_more_of_an_image_than_models_may(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_onnx(make_small(SmallShape((), 1, (Windows(8, 3, 1), Windows(1, 20, 1)))))
    check_graph(model)  # 8 x 26 x 26 values, and fewer weights
    monkeypatch.setattr(safety, "MAX_VALUES", 1000)
    with pytest.raises(ValueError, match="windows0 may be of any size"):
        check_graph(model)
