from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import ONE_EPOCH, make_dataset, spec

from mnist_lab.compress.levels import Rounding
from mnist_lab.compress.weight_only import Method, WeightOnly
from mnist_lab.deploy import inside
from mnist_lab.deploy.onnx import Layout, write_onnx
from mnist_lab.experiments.technique import Work
from mnist_lab.models import PRESETS
from mnist_lab.models.moe import RoutingConfig, SparseMoE
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

PIXELS = np.random.default_rng(0).random((70, 1, 28, 28), np.float32)


@pytest.fixture(scope="module")
def moe() -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(PRESETS["compact"].moe(spec(), RoutingConfig())).eval()


@pytest.mark.parametrize("layout", ["sparse", "dense"])
@pytest.mark.parametrize("top_k", [2, 1])
def test_profile_knows_what_every_node_is_for(layout: Layout, top_k: int, tmp_path: Path) -> None:
    moe = SparseMoE(PRESETS["compact"].moe(spec(), RoutingConfig(top_k=top_k))).eval()
    write_onnx(moe, tmp_path / "moe.onnx", {}, layout=layout)
    jobs: dict[str, set[str]] = {}
    for node in onnx.load(tmp_path / "moe.onnx").graph.node:
        jobs.setdefault(inside.job_of(node.name, node.op_type), set()).add(node.name)
    assert jobs["stem and head"] == {"flat_pixels", "stem", "hidden", "mixed.relu", "logits"}
    assert jobs["router"] == {"router", "top_logits", "expert_weights"} | ({"router_probs"} if top_k == 1 else set())
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


def test_rows_of_each_expert_are_counted(moe: SparseMoE, tmp_path: Path) -> None:
    artifact, many = tmp_path / "moe.onnx", np.random.default_rng(0).random((1100, 1, 28, 28), np.float32)
    write_onnx(moe, artifact, {})
    with torch.inference_mode():
        expected = moe.routed(torch.from_numpy(many)).expert_load
    assert inside.count_rows(artifact, many) == expected.tolist()
    write_onnx(moe, artifact, {}, layout="dense")
    assert inside.count_rows(artifact, many) == []


def test_file_of_few_bits_is_looked_into_as_any(moe: SparseMoE, tmp_path: Path) -> None:
    file, work = tmp_path / "moe.onnx", Work(make_dataset(), PRESETS["compact"], ONE_EPOCH, 0, "cpu", "x")
    WeightOnly(Rounding(1), Method("nearest")).write(moe, file, work, {})
    chosen = inside.choose_experts(file, PIXELS)
    assert chosen.shape == (70, 2)
    assert inside.count_rows(file, PIXELS) == np.bincount(chosen.ravel(), minlength=4).tolist()
    times = inside.time_by_job(file, PIXELS)
    assert {job for job, time in times.items() if time} == set(inside.JOBS) - {"gate"}


def test_isolated_experts_see_every_image(moe: SparseMoE, tmp_path: Path) -> None:
    write_onnx(moe, tmp_path / "moe.onnx", {})
    probe = inside.isolate_experts(tmp_path / "moe.onnx", [1, 3])
    onnx.checker.check_model(probe, full_check=True)
    session = onnxruntime.InferenceSession(probe.SerializeToString(), session_options(1), providers=PROVIDERS)
    experts = moe.experts
    with torch.inference_mode():
        hidden = moe.embed(torch.from_numpy(PIXELS))
        for expert, found in zip([1, 3], session.run(None, {"pixels": PIXELS}), strict=True):
            inner = (hidden @ experts.weight_in[expert] + experts.bias_in[expert]).relu()
            output = inner @ experts.weight_out[expert] + experts.bias_out[expert]
            np.testing.assert_allclose(found, output.numpy(), atol=1e-4)
