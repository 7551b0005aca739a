"""Weights of few bits, and everything between products in float.

q = round(w/s) + z, w ≈ s·(q − z), one s (and z) per output of a layer and group of its inputs. The file is standard
ONNX, and what the engine makes of it is read back (few_bit_products.py).
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from mnist_lab.compress.few_bit_products import Plan, products_of, put_in, weight_of
from mnist_lab.compress.few_bits import IN_FLOAT, is_small_student, stored_bits
from mnist_lab.compress.gptq import CALIBRATION_SIZE, Gram, input_grams, round_with_feedback
from mnist_lab.compress.int8 import FLOAT_OPERATORS, INTEGER_OPERATORS, absmax_quantize, optimized_graph
from mnist_lab.compress.levels import (
    LEVELS,
    ActivationBits,
    Bits,
    Levels,
    Rounded,
    Rounding,
    RouterBits,
    check_groups,
    name_of,
    on_levels,
)
from mnist_lab.compress.round_activations import CALIBRATION_SIZE as ACTIVATION_SAMPLE
from mnist_lab.compress.round_activations import bytes_to_and_from_experts, count_rounded, round_activations
from mnist_lab.deploy.artifacts import read_artifact, read_onnx, save_onnx
from mnist_lab.deploy.onnx import Layout, build_onnx, graph_metadata
from mnist_lab.errors import WrongPrecision
from mnist_lab.experiments.technique import Proof, Work
from mnist_lab.measure import Array, decibels
from mnist_lab.models import Model
from mnist_lab.models.moe import SparseMoE
from mnist_lab.runtimes import FLOAT_PRODUCTS, ROUTER, Precision, RuntimeName
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

PRECISIONS: dict[Bits, Precision] = {8: "INT8", 4: "INT4", 3: "INT3", 2: "INT2", "ternary": "ternary", 1: "INT1"}
KERNELS = {
    "INT8": "as INT8",
    "8": "as 8 bits by rows rounded within",
    "4": "as 4 bits by rows rounded within",
}
CHECKED_IMAGES = 200
LEAST_DECIBELS = 20.0  # of the engine's logits against what the file says: rows that it rounds besides give some 40
LEAST_OF_4_BITS = 10.0  # where activations are as coarse, and little moves one from a level to the next


@dataclass(frozen=True)
class Method:
    """How weights come to the levels of few bits after training."""

    method: Literal["gptq", "nearest"] = field(default="gptq", metadata={"tag": ""})
    """Rounding to the nearest, or gptq: what is still to be rounded makes up for what was, on calibration images."""
    scheme: Literal["symmetric", "affine"] = field(default="symmetric", metadata={"tag": ""})
    """Levels around zero; or, with zero points, between the smallest and the largest weight (affine)."""
    router_bits: RouterBits = field(default=None, metadata={"tag": "router"})
    """Of the weights of an MoE's router; when not given, it stays in float."""
    activation_bits: ActivationBits = field(default=None, metadata={"tag": "a"})
    """Of what goes from layer to layer, rounded and back in the graph; when not given, it stays in float."""


@dataclass(frozen=True)
class WeightOnly:
    """Weights of few bits, and nothing else of the model."""

    label: ClassVar[str] = "weight-only ptq"
    runtimes: ClassVar[tuple[RuntimeName, ...]] = ("onnxruntime",)
    rounding: Rounding = field(default_factory=Rounding)
    method: Method = field(default_factory=Method)

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.rounding.bits]

    def write(self, model: Model, file: Path, work: Work, metadata: Mapping[str, Any]) -> None:
        graph = build_rounding(model, self.method.activation_bits, work)
        plan = uniform_plan(graph, self.rounding, self.method.router_bits)
        rounded = round_products(graph, plan.items(), self.method, work)
        put_in(graph, plan, {name: rounded[name, rounding] for name, rounding in plan.items()})
        _save(graph, file, {**metadata, **graph_metadata(model)})

    def prove(self, model: Model, file: Path) -> Proof:
        return prove_rounded(model, file)


@dataclass(frozen=True)
class AsTrained:
    """The weights of few bits that a model was trained with, as they are."""

    label: ClassVar[str] = ""
    runtimes: ClassVar[tuple[RuntimeName, ...]] = ("onnxruntime",)
    rounding: Rounding = field(metadata={"tag": None})
    router_bits: RouterBits = field(default=None, metadata={"tag": None})
    activation_bits: ActivationBits = field(default=None, metadata={"tag": None})

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.rounding.bits]

    def write(self, model: Model, file: Path, work: Work, metadata: Mapping[str, Any]) -> None:
        layout: Layout | None = (
            "sparse" if isinstance(model, SparseMoE) else None
        )  # where experts have their own scales
        graph = build_rounding(model, self.activation_bits, work, layout=layout)
        plan = uniform_plan(graph, self.rounding, self.router_bits)
        products = products_of(graph)
        found = {name: on_levels(weight_of(graph, products[name]), rounding) for name, rounding in plan.items()}
        rounded = {name: weight for name, weight in found.items() if weight is not None}
        if left := sorted(plan.keys() - rounded.keys()):
            raise WrongPrecision(f"the weights of {', '.join(left)} do not lie on their levels")
        put_in(graph, plan, rounded)
        _save(graph, file, {**metadata, **graph_metadata(model, layout)})

    def prove(self, model: Model, file: Path) -> Proof:
        return prove_rounded(model, file)


def _save(graph: onnx.ModelProto, file: Path, metadata: Mapping[str, Any]) -> None:
    """Write a graph; that of a small student with as few bytes beside the weights as will do."""
    is_small = is_small_student(graph.graph)
    if is_small:
        graph.graph.name = "g"
        graph.ClearField("producer_name")
    save_onnx(graph, file, metadata, packed=is_small)


def build_rounding(model: Model, bits: ActivationBits, work: Work, *, layout: Layout | None = None) -> onnx.ModelProto:
    """The graph of a model with activations of so many bits."""
    graph = build_onnx(model, layout=layout)
    if bits is not None:
        round_activations(graph, bits, work.calibration(ACTIVATION_SAMPLE).numpy())
    return graph


def uniform_plan(model: onnx.ModelProto, rounding: Rounding, router_bits: RouterBits) -> Plan:
    """One rounding for all products with weights, but for the first, the last and those of the routing."""
    check_groups(rounding, is_small=is_small_student(model.graph))
    names = [name for name in products_of(model) if name not in FLOAT_PRODUCTS]
    plan = dict(zip(names, rounding.of_layers(len(names)), strict=True))
    return plan if router_bits is None else plan | {ROUTER: Rounding(router_bits)}


def round_products(
    model: onnx.ModelProto, choices: Collection[tuple[str, Rounding]], method: Method, work: Work
) -> dict[tuple[str, Rounding], Rounded]:
    """The weights of products of an FP32 graph, each in all the roundings asked for."""
    products = products_of(model)
    weights = {name: weight_of(model, products[name]) for name, _ in choices}
    rounded = {(name, rounding): on_levels(weights[name], rounding) for name, rounding in choices}
    left = [choice for choice, found in rounded.items() if found is None]
    grams: dict[str, Gram] = {}
    if left and method.method == "gptq":
        inputs = list(dict.fromkeys(products[name].input[0] for name, _ in left))
        grams = input_grams(model, inputs, work.calibration(CALIBRATION_SIZE).numpy())
    for name, rounding in left:
        gram = grams.get(products[name].input[0])
        rounded[name, rounding] = round_weight(weights[name], rounding, gram, affine=method.scheme == "affine")
    return {choice: found for choice, found in rounded.items() if found is not None}


def round_weight(weight_IO: Array, rounding: Rounding, gram_II: Gram | None, *, affine: bool = False) -> Rounded:
    """With feedback from what the inputs are like (XᵀX), or where that is not given, to the nearest level."""
    levels, size = LEVELS[rounding.bits], rounding.size_of_groups(len(weight_IO))
    if gram_II is not None:
        return round_with_feedback(weight_IO, gram_II, levels, size, affine=affine)
    groups = [weight_IO[start : start + size] for start in range(0, len(weight_IO), size)]
    if affine:
        return _join([_round_affine(group, levels) for group in groups], size)
    return _join([_round_absmax(group, levels) for group in groups], size)


def _round_absmax(group_IO: Array, levels: Levels) -> Rounded:
    """S = max|w| / highest of each output, zero at 0 where that is a level; of a tensor of zeros 1."""
    if levels.step == 1:
        return Rounded(*absmax_quantize(group_IO, q_max=levels.highest, axis=1), None, len(group_IO))
    scale_O = np.abs(group_IO).mean(axis=0, keepdims=True).astype(np.float32)  # of one bit: that of least error
    return Rounded(np.where(group_IO < 0, levels.lowest, levels.highest).astype(np.int8), scale_O, None, len(group_IO))


def _round_affine(group_IO: Array, levels: Levels) -> Rounded:
    """S = (max − min)/(levels − 1), Z = lowest − round(min/S), of each output's own range, which holds 0."""
    low_O, high_O = group_IO.min(axis=0).clip(max=0), group_IO.max(axis=0).clip(min=0)
    scale_O = np.where(high_O > low_O, (high_O - low_O) / (levels.num - 1), 1).astype(np.float32)
    zero_O = levels.lowest - np.rint(low_O / scale_O)
    integers = np.clip(np.rint(group_IO / scale_O) + zero_O, levels.lowest, levels.highest)
    return Rounded(integers.astype(np.int8), scale_O[None], zero_O[None].astype(np.int8), len(group_IO))


def _join(parts: list[Rounded], group_size: int) -> Rounded:
    """The groups of a layer."""
    zeros = [part.zeros for part in parts if part.zeros is not None]
    return Rounded(
        np.concatenate([part.integers for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(zeros) if zeros else None,
        group_size,
    )


def prove_rounded(model: Model, file: Path) -> Proof:
    """What of an artifact is rounded, and of an MoE the bytes of an image's rows to and from its experts.

    Raises:
        WrongPrecision: as `prove_weights`; or ONNX Runtime leaves out some rounding of activations.
    """
    rounded, expected = (count_rounded(graph) for graph in (optimized_graph(file), read_onnx(file).graph))
    proof = prove_weights(file, least_decibels=LEAST_OF_4_BITS if 4 in expected else LEAST_DECIBELS)
    if rounded != expected:
        raise WrongPrecision(f"of {expected.total()} activations ONNX Runtime rounds {rounded.total()}")
    if rounded:
        counted = ", ".join(f"{num} in {bits} bits" for bits, num in rounded.items())
        proof |= {"activations": {str(bits): num for bits, num in rounded.items()}}
        proof["text"] += f"; activations: {counted}"
    if isinstance(model, SparseMoE):
        by_bits = {str(bits): bytes_to_and_from_experts(model.config, bits) for bits in (32, 8, 4)}
        proof["bytes_to_and_from_experts"] = by_bits
        if rounded:
            proof["text"] += (
                f"; to and from experts {by_bits[str(min(rounded))]:,} bytes an image, {by_bits['32']:,} in FP32"
            )
    return proof


def prove_weights(file: Path, *, least_decibels: float = LEAST_DECIBELS) -> Proof:
    """That ONNX Runtime multiplies with few bits in every product but those of the routing that are to be in float, or
    in a small student with floats that it made when loading; and computes what the file says.

    Raises:
        WrongPrecision: it does not.
    """
    model = read_onnx(file)
    stored = stored_bits(model.graph)
    integer = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
    in_float = stored.keys() & {node.input[1] for node in model.graph.node if node.op_type in IN_FLOAT}
    dequantized = stored.keys() - {node.input[1] for node in integer} - in_float
    expected = Counter("8" if stored[name] == 8 else "4" for name in dequantized)
    expected["INT8"] = len(integer)
    expected["float"] = len(in_float)
    graph = optimized_graph(file)
    nodes = graph.node
    run = Counter(str(helper.get_node_attr_value(node, "bits")) for node in nodes if node.op_type == "MatMulNBits")
    run["INT8"] = sum(node.op_type in INTEGER_OPERATORS for node in nodes)
    with_floats = [node for node in nodes if node.op_type in FLOAT_OPERATORS]
    if in_float:
        constants = {constant.name for constant in graph.initializer}
        run["float"] = sum(node.input[1] in constants for node in with_floats)
        with_floats = [node for node in with_floats if node.input[1] not in constants]
    floats = sorted(node.name for node in with_floats)
    if run != expected or not set(floats) <= set(FLOAT_PRODUCTS):
        raise WrongPrecision(
            f"of {len(stored)} layers in few bits ONNX Runtime runs {run.total()} so; in float are {floats}"
        )
    signal = agreement(file)
    if signal < least_decibels:
        raise WrongPrecision(f"ONNX Runtime computes something else than the file says: {signal:.0f} dB")
    by_bits = Counter(stored.values())
    counted = ", ".join(f"{num} of {name_of(bits)}" for bits, num in by_bits.items())
    if in_float:
        how = "all convolved and multiplied in float, which is made of them when the file is loaded"
    else:
        kernels = ", ".join(f"{num} {KERNELS[kernel]}" for kernel, num in run.items() if num)
        how = f"multiplied: {kernels}; in float: {', '.join(floats) or 'none'}"
    text = f"weights of products: {counted}; {how}"
    return {
        "text": text,
        "stored": {str(bits): num for bits, num in by_bits.items()},
        "products": {kernel: num for kernel, num in run.items() if num},
        "decibels": signal,
    }


def agreement(file: Path) -> float:
    """Signal to noise in decibels between an artifact and the same as it stands, in FP32, on random pixels."""
    content, as_it_stands = read_artifact(file), session_options(1)
    as_it_stands.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    shape = [dim.dim_value for dim in read_onnx(file).graph.input[0].type.tensor_type.shape.dim[1:]]
    pixels = np.random.default_rng(0).random((CHECKED_IMAGES, *shape), np.float32)
    found, expected = (
        onnxruntime.InferenceSession(content, options, providers=PROVIDERS).run(None, {"pixels": pixels})[0]
        for options in (session_options(1), as_it_stands)
    )
    return decibels(found, expected)
