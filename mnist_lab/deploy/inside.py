"""Inside an MoE's artifact: which experts it chooses, what they see, and where ONNX Runtime spends the time."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from onnx.utils import Extractor

from mnist_lab.deploy.artifacts import read_onnx
from mnist_lab.measure import EVALUATION_BATCH, Array
from mnist_lab.runtimes import COMBINE, COMBINE_BIASES, FUSED, ROUTER
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

NUM_CALLS = 200
ROUTING = {"router", "top_logits", "router_probs", "expert_weights"}
SORTING = {"expert_of_pair", "num_pairs", "ones", "load", "sorted_experts", "image"}
SORTING |= {"end", "pairs", "place", "place_by_image"}
MOVING = {"sorted_rows", "expert0.rows", "sorted_outputs", "by_image"}
GATING = {"no_gates", "gates", "gates_as_column", "gates_as_row", "by_expert", "lows_by_expert", "gated", "gated_rows"}
COMBINING = {"weights_as_row", COMBINE, COMBINE_BIASES, "inners", "lows", "mixed_inners", "outputs", "mixed"}
JOBS = ["stem and head", "experts", "router", "sort", "move rows", "combine", "gate", "quantize"]


def choose_experts(artifact: Path, images: Array) -> npt.NDArray[np.int64]:
    """The set of experts (N, K) that an artifact chooses for each image, in the order of their numbers."""
    model = read_onnx(artifact)
    _choose_outside(model.graph)
    return np.sort(np.concatenate(read_out(model, "top_experts", images)), axis=1)


def _choose_outside(graph: onnx.GraphProto) -> None:
    """Let a graph whose experts are one operator tell which of them that chooses inside itself; in place."""
    fused = next((node for node in graph.node if node.op_type == FUSED), None)
    if fused is None:
        return
    top_k = np.array([helper.get_node_attr_value(fused, "k")])
    graph.initializer.append(numpy_helper.from_array(top_k, "top_k"))
    graph.node.append(helper.make_node("TopK", [ROUTER, "top_k"], ["top_logits", "top_experts"], axis=-1))


def count_rows(artifact: Path, images: Array) -> list[int]:
    """How many of the images each expert of the sparse layout gets; an artifact without such experts has none."""
    model = read_onnx(artifact)
    if not any(node.name == "load" for node in model.graph.node):
        return []
    rows: list[int] = np.sum(read_out(model, "load", images), axis=0).tolist()
    return rows


def read_out(model: onnx.ModelProto, name: str, images: Array) -> list[npt.NDArray[Any]]:
    """A tensor inside a model, per batch."""
    model.graph.output.add(name=name)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1), providers=PROVIDERS)
    return [
        session.run([name], {"pixels": images[start : start + EVALUATION_BATCH]})[0]
        for start in range(0, len(images), EVALUATION_BATCH)
    ]


def isolate_experts(artifact: Path, experts: Iterable[int]) -> onnx.ModelProto:
    """The part of an artifact in the sparse layout from the pixels to these experts, each on every image."""
    model = read_onnx(artifact)
    nodes = model.graph.node
    place = next(place for place, node in enumerate(nodes) if node.op_type == "Split")
    for expert in experts:
        rows = nodes[place].output[expert]
        nodes[place].output[expert] = f"{rows}.own"
        nodes.insert(place + 1, helper.make_node("Identity", ["hidden"], [rows], name=rows))
    extractor = Extractor(onnx.shape_inference.infer_shapes(model))
    return extractor.extract_model(["pixels"], [f"expert{expert}.out" for expert in experts])


def time_by_job(artifact: Path, pixels: Array) -> dict[str, float]:
    """Median microseconds per job of one pass on one thread, as the engine itself takes the time of every node."""
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(1)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(read_onnx(artifact).SerializeToString(), options, providers=PROVIDERS)
        for _ in range(NUM_CALLS):
            session.run(None, {"pixels": pixels})
        events = json.loads(Path(session.end_profiling()).read_bytes())
    durations: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]].append(event["dur"])
    jobs = dict.fromkeys(JOBS, 0.0)
    for (node, operator), samples in durations.items():
        jobs[job_of(node, operator)] += float(np.median(samples))
    return jobs


def job_of(node: str, operator: str) -> str:
    """What a node of the optimized graph is for, by the name that `deploy/onnx.py` gave it."""
    if operator in {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}:
        return "quantize"
    name = node.removeprefix("fused ").replace("_MatMul", "").replace("_quant", "")
    for job, names in (("router", ROUTING), ("sort", SORTING), ("move rows", MOVING), ("gate", GATING)):
        if name in names:
            return job
    if name.startswith(("expert", "shared")):
        return "experts"
    return "combine" if name in COMBINING else "stem and head"
