"""What a client without the suite sees of its artifacts: ONNX Runtime as it comes has nothing to complain of."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from test_expert_shapes import APART, SHARED
from tiny import make_dataset, spec

from mnist_lab.compress.bfloat16 import BFloat16
from mnist_lab.compress.float32 import Float32
from mnist_lab.compress.int8 import Calibration, DynamicInt8, StaticInt8
from mnist_lab.compress.levels import LEVELS, Rounding
from mnist_lab.compress.prune_weights import Pruner, weight_matrices
from mnist_lab.compress.qmoe import FusedExperts
from mnist_lab.compress.weight_only import Method, WeightOnly
from mnist_lab.experiments.technique import Form, Work
from mnist_lab.models import PRESETS, Model, ModelConfig, build_model
from mnist_lab.models.ffn import FFN, FFNConfig, Windows
from mnist_lab.models.moe import RoutingConfig, SparseMoE
from mnist_lab.models.small import SmallShape
from mnist_lab.training import find_recipe

CONFIGS: dict[str, ModelConfig] = {
    "linear": FFNConfig((), spec(0.18, 0.18)),
    "ffn": FFNConfig((32, 16), spec(0.18, 0.18)),
    "pooled": SmallShape((16,), 2).config(spec(0.18, 0.18)),
    "windows": SmallShape((16,), 2, (Windows(4, 3, 1), Windows(8, 3, 2))).config(spec(0.18, 0.18)),
    "windows on pixels": SmallShape((), 1, (Windows(8, 5, 3),)).config(spec(0.18, 0.18)),
    "pooled mixture": replace(APART, expert_widths=None, pool=2),
    "sparse": replace(APART, expert_widths=None),
    "dense": replace(APART, expert_widths=None, routing=RoutingConfig(3, 3)),
    "one expert an image": replace(APART, expert_widths=None, routing=RoutingConfig(3, 1)),
    "uneven": APART,
    "shared": SHARED,
    "zeros": FFNConfig((32, 16), spec(0.18, 0.18)),
}
FORMS: dict[str, Form] = {"fp32": Float32(), "bf16": BFloat16(), "dynamic": DynamicInt8()}
FORMS |= {method: StaticInt8(Calibration(60, method)) for method in ("minmax", "entropy", "percentile")}
FORMS |= {f"{bits} bits": WeightOnly(Rounding(bits)) for bits in LEVELS}
FORMS["4 bits in groups"] = WeightOnly(Rounding(4, 16))
FORMS["activations of 4 bits"] = WeightOnly(Rounding(2), Method(scheme="affine", activation_bits=4))
FORMS |= {"fused 8": FusedExperts(8), "fused 4": FusedExperts(4)}
CLIENT = """
import sys
import numpy as np
import onnxruntime
for file in sys.argv[1:]:
    print(file, file=sys.stderr, flush=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        session.run(None, {"pixels": np.full((batch, 1, 28, 28), 0.5, np.float32)})
"""


def make_model(name: str) -> Model:
    torch.manual_seed(0)
    model = build_model(CONFIGS[name]).eval()
    if name == "zeros":
        matrices = weight_matrices(model)
        pruner = Pruner(model, dict.fromkeys(matrices, torch.ones(1, 1)), dict.fromkeys(matrices, 0.05))
        pruner.cut()
        pruner.fold()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_engine_says_nothing_of_any_artifact(name: str, tmp_path: Path) -> None:
    work = Work(make_dataset(), PRESETS["compact"], find_recipe("quick", "compact"), seed=0, device="cpu", name="x")
    model = make_model(name)
    forms = {n: form for n, form in FORMS.items() if isinstance(model, SparseMoE) or not isinstance(form, FusedExperts)}
    if isinstance(model, FFN) and model.config.is_small:
        del forms["4 bits in groups"]
    files = [tmp_path / f"{form}.onnx" for form in forms]
    for file, form in zip(files, forms.values(), strict=True):
        form.write(model, file, work, {"model": "x"})
        graph = onnx.load(file).graph
        stored = {constant.name for constant in graph.initializer}
        stored |= {sparse.values.name for sparse in graph.sparse_initializer}
        assert stored <= {name for node in graph.node for name in node.input}, file.stem
        assert bool(graph.sparse_initializer) or name != "zeros" or isinstance(form, WeightOnly)
    done = subprocess.run([sys.executable, "-c", CLIENT, *files], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == "".join(f"{file}\n" for file in files)
