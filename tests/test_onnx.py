from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny import spec

from mnist_lab.deploy.artifacts import artifact_bytes, read_onnx_metadata
from mnist_lab.deploy.onnx import Layout, choose_layout, write_onnx
from mnist_lab.errors import UserError
from mnist_lab.models import PRESETS, ModelConfig, PresetName, build_model, parameter_bytes
from mnist_lab.models.moe import Gate, RoutingConfig
from mnist_lab.runtimes.onnxruntime import OnnxRuntimeSession
from mnist_lab.training import torch_predictor


def configs(preset: PresetName) -> list[ModelConfig]:
    sizes = PRESETS[preset]
    return [
        sizes.ffn(spec()),
        sizes.student(spec()),
        *(sizes.moe(spec(), RoutingConfig(num_experts=e, top_k=k)) for e, k in [(4, 2), (1, 1), (8, 1), (3, 3)]),
        *(sizes.moe(spec(), RoutingConfig(top_k=k, gate=g)) for k, g in OTHER_GATES),
    ]


OTHER_GATES: list[tuple[int, Gate]] = [(1, "chosen"), (2, "all"), (4, "all")]


@pytest.mark.parametrize("layout", ["sparse", "dense"])
@pytest.mark.parametrize("config", configs("compact") + configs("wide"), ids=lambda config: str(config)[:40])
def test_artifact_gives_the_models_logits(config: ModelConfig, layout: Layout, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_()
    write_onnx(model, tmp_path / "model.onnx", {"model": "x"}, layout=layout)
    session = OnnxRuntimeSession(tmp_path / "model.onnx", threads=1)
    for batch in (1, 2, 65):  # at batch 1 some experts get no rows
        pixels = np.random.default_rng(batch).random((batch, 1, 28, 28), np.float32)
        np.testing.assert_allclose(session.predict(pixels), torch_predictor(model)(pixels), atol=1e-4)


@pytest.mark.parametrize("config", configs("compact")[2:], ids=lambda config: str(config)[:40])
def test_layouts_agree(config: ModelConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, pixels = build_model(config).eval(), np.random.default_rng(0).random((300, 1, 28, 28), np.float32)
    layouts: tuple[Layout, ...] = ("sparse", "dense")
    for layout in layouts:
        write_onnx(model, tmp_path / f"{layout}.onnx", {}, layout=layout)
    sparse, dense = (OnnxRuntimeSession(tmp_path / f"{layout}.onnx", threads=1).predict(pixels) for layout in layouts)
    np.testing.assert_allclose(sparse, dense, atol=1e-4)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "expected"), [(4, 2, "sparse"), (64, 1, "sparse"), (4, 4, "dense"), (1, 1, "dense")]
)
def test_layout_follows_from_the_model_and_stands_in_the_file(
    num_experts: int, top_k: int, expected: Layout, tmp_path: Path
) -> None:
    config = PRESETS["compact"].moe(spec(), RoutingConfig(num_experts=num_experts, top_k=top_k))
    assert choose_layout(config) == expected
    write_onnx(build_model(config), tmp_path / "model.onnx", {"model": "x"})
    assert read_onnx_metadata(tmp_path / "model.onnx")["layout"] == {"name": expected}
    is_sorted = any(node.op_type == "Split" for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert is_sorted == (expected == "sparse")


def test_layout_of_a_dense_model_is_not_said(tmp_path: Path) -> None:
    write_onnx(build_model(PRESETS["compact"].ffn(spec())), tmp_path / "model.onnx", {"model": "x"})
    assert read_onnx_metadata(tmp_path / "model.onnx").keys() == {"model", "interface"}


@pytest.mark.parametrize("layout", ["sparse", "dense"])
@pytest.mark.parametrize("config", configs("compact")[::2], ids=lambda config: str(config)[:40])
def test_artifact_is_one_file_of_standard_operators(config: ModelConfig, layout: Layout, tmp_path: Path) -> None:
    model = build_model(config)
    path = tmp_path / "model.onnx"
    write_onnx(model, path, {"model": "x", "seed": 3}, layout=layout)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} == {""}
    assert read_onnx_metadata(path)["seed"] == 3
    assert artifact_bytes(path) == pytest.approx(parameter_bytes(model), rel=1e-3)


@pytest.mark.parametrize("content", [b"", b"hello", None], ids=["empty", "text", "truncated"])
def test_broken_artifact_is_the_users_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(build_model(configs("compact")[1]), path, {"model": "x"})
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(UserError, match="model.onnx"):
        read_onnx_metadata(path)
    with pytest.raises(UserError, match="model.onnx"):
        OnnxRuntimeSession(path, threads=1)
