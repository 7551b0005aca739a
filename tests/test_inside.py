from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from mnist_lab import routes
from mnist_lab.deploy.onnx import Dispatch, export_onnx
from mnist_lab.models import PRESETS
from mnist_lab.models.moe import RoutingConfig, SparseMoE

PIXELS = np.random.default_rng(0).random((70, 1, 28, 28), np.float32)


@pytest.fixture(scope="module")
def moe() -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(PRESETS["compact"].moe(0.13, 0.31, RoutingConfig())).eval()


@pytest.mark.parametrize("dispatch", ["sparse", "dense"])
def test_profile_knows_what_every_node_is_for(moe: SparseMoE, dispatch: Dispatch, tmp_path: Path) -> None:
    export_onnx(moe, tmp_path / "moe.onnx", {}, dispatch=dispatch)
    jobs: dict[str, set[str]] = {}
    for node in onnx.load(tmp_path / "moe.onnx").graph.node:
        jobs.setdefault(routes.job_of(node.name, node.op_type), set()).add(node.name)
    assert jobs["stem and head"] == {"flat_pixels", "stem", "hidden", "mixed.relu", "logits"}
    assert jobs["router"] == {"router", "top_logits", "expert_weights"}
    assert all(name.startswith("expert") for name in jobs["experts"])
    assert set(jobs) == {"stem and head", "router", "experts", "combine"} | (
        {"sort", "move rows"} if dispatch == "sparse" else {"gate"}
    )
    times = routes.time_by_job(tmp_path / "moe.onnx", PIXELS)
    assert times["experts"] > 0
    assert times["quantize"] == 0


def test_routes_are_the_models(moe: SparseMoE, tmp_path: Path) -> None:
    export_onnx(moe, tmp_path / "moe.onnx", {})
    with torch.inference_mode():
        expected = moe.routed(torch.from_numpy(PIXELS)).experts.sort(dim=1).values
    assert np.array_equal(routes.choose_experts(tmp_path / "moe.onnx", PIXELS), expected.numpy())
