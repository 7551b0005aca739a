"""What a page's live demo runs: artifacts as they lie on disk, and for mixtures which experts they choose."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from mnist_lab.deploy.artifacts import read_artifact
from mnist_lab.deploy.inside import choose_experts
from mnist_lab.errors import UserError
from mnist_lab.measure import Array
from mnist_lab.report.page_demo import MAX_BYTES, MAX_MODELS, Demo, DemoModel, order_for_demo, pack
from mnist_lab.report.records import Record
from mnist_lab.report.results import Model, listed
from mnist_lab.runtimes import FUSED
from mnist_lab.runtimes.onnxruntime_web import WebRuntime

ROUTES = ("top_experts", "expert_weights")  # tensors inside a mixture's artifact, by `deploy/onnx.py`


def make_demo(checkpoints: Path, models: Sequence[Model], engine: WebRuntime) -> Demo:
    """The first seeds' artifacts of as many models as there is room for, in the order of the table.

    Raises:
        UserError: an artifact is missing, damaged, or not its record's.
    """
    module, wasm = pack(engine.module), pack(engine.wasm)
    room = MAX_BYTES - len(module) - len(wasm)
    chosen: dict[str, DemoModel] = {}
    for model in order_for_demo(models):
        own = read_model(checkpoints, model.runs[0]) if len(chosen) < MAX_MODELS else None
        if own is not None and len(own.packed) <= room:
            chosen[model.name] = own
            room -= len(own.packed)
    in_order = [chosen[model.name] for model in models if model.name in chosen]
    left_out = [model.short_name for model in models if model.name not in chosen]
    return Demo(f"ONNX Runtime Web {engine.version}", module, wasm, in_order, listed(left_out) if left_out else "")


def read_model(checkpoints: Path, record: Record) -> DemoModel | None:
    """A record's artifact for the browser; None where the engine there has not its operators.

    Its bytes are untouched. For a mixture a few more follow, which name two tensors inside as further outputs: what
    follows a message of Protocol Buffers is merged into it.

    Raises:
        UserError: it is missing, damaged, or not the record's.
    """
    path = checkpoints / record.artifact["file"]
    content = read_artifact(path)
    if hashlib.sha256(content).hexdigest() != record.artifact["sha256"]:
        raise UserError(f"{path} is not the file of its record")
    graph = onnx.load_from_string(content).graph
    if any(node.op_type == FUSED for node in graph.node):
        return None
    further = onnx.ModelProto()
    if {name for node in graph.node for name in node.output}.issuperset(ROUTES):
        for name in ROUTES:
            further.graph.output.add(name=name)
    return DemoModel(record.model, pack(content + further.SerializeToString()), bool(further.graph.output))


def find_routes(checkpoints: Path, models: Sequence[Model], pixels: Array) -> dict[str, npt.NDArray[np.int64]]:
    """The experts (N, K) that the first mixture's artifact chooses for N images, by its name; none without its file."""
    mixture = next((model for model in models if model.runs[0].expert_by_class), None)
    if mixture is None:
        return {}
    try:
        return {mixture.name: choose_experts(checkpoints / mixture.runs[0].artifact["file"], pixels)}
    except UserError:
        return {}
