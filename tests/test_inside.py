from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny import spec

from mnist_lab.deploy import inside
from mnist_lab.deploy.onnx import Layout, write_onnx
from mnist_lab.models import PRESETS
from mnist_lab.models.moe import RoutingConfig, SparseMoE

PIXELS = np.random.default_rng(0).random((70, 1, 28, 28), np.float32)


@pytest.fixture(scope="module")
def moe() -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(PRESETS["compact"].moe(spec(), RoutingConfig())).eval()


@pytest.mark.parametrize("layout", ["sparse", "dense"])
def test_profile_knows_what_every_node_is_for(moe: SparseMoE, layout: Layout, tmp_path: Path) -> None:
    write_onnx(moe, tmp_path / "moe.onnx", {}, layout=layout)
    jobs: dict[str, set[str]] = {}
    for node in onnx.load(tmp_path / "moe.onnx").graph.node:
        jobs.setdefault(inside.job_of(node.name, node.op_type), set()).add(node.name)
    assert jobs["stem and head"] == {"flat_pixels", "stem", "hidden", "mixed.relu", "logits"}
    assert jobs["router"] == {"router", "top_logits", "expert_weights"}
    assert all(name.startswith("expert") for name in jobs["experts"])
    assert set(jobs) == {"stem and head", "router", "experts", "combine"} | (
        {"sort", "move rows"} if layout == "sparse" else {"gate"}
    )
    times = inside.time_by_job(tmp_path / "moe.onnx", PIXELS)
    assert times["experts"] > 0
    assert times["quantize"] == 0


def test_routes_are_the_models(moe: SparseMoE, tmp_path: Path) -> None:
    write_onnx(moe, tmp_path / "moe.onnx", {})
    with torch.inference_mode():
        expected = moe.routed(torch.from_numpy(PIXELS)).experts.sort(dim=1).values
    assert np.array_equal(inside.choose_experts(tmp_path / "moe.onnx", PIXELS), expected.numpy())
