"""Mixed bits: every product of a model in as many bits as pay, within a budget for the whole file.

rise(p, b) = mean over calibration images of KL(softmax z ‖ softmax z_pb): z the logits in FP32, z_pb those with the
weights of product p alone in b bits. Rounding an expert moves only the logits of the images that visit it, so that the
mean over all images is the share of those times what it does to them: how much an expert is used counts by itself.

Minimise Σ rise(p, b_p) such that the file fits: a binary program, solved exactly, with one variable for each product
and number of bits (MxMoE, arXiv:2505.05799; MoQa, arXiv:2503.21135), and one for each number of bits, as weights of as
many share the nodes that take their words apart.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

from mnist_lab.compress.few_bit_products import Plan, put_in
from mnist_lab.compress.few_bits import PRODUCTS, is_small_student, make_node, stored_bits
from mnist_lab.compress.gptq import CALIBRATION_SIZE
from mnist_lab.compress.levels import Bits, Rounded, Rounding
from mnist_lab.compress.weight_only import Method, build_rounding, prove_rounded, round_products, uniform_plan
from mnist_lab.deploy.artifacts import content_of, read_onnx, read_onnx_metadata, save_onnx
from mnist_lab.deploy.onnx import graph_metadata
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.experiments.technique import Proof, Work
from mnist_lab.measure import Array, log_softmax, predict
from mnist_lab.models import Model
from mnist_lab.models.moe import SparseMoE
from mnist_lab.runtimes import ROUTER, Precision, RuntimeName
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

WIDTHS = (Rounding(2), Rounding(3), Rounding(4), Rounding(8))
IN_4 = WIDTHS.index(Rounding(4))  # by which a file's other bytes are measured: of 8 bits zeros might be sparse
MEAN_BITS = (2, 3, 4, 8)  # of the widths
LONGEST = 1.23e-5  # of a rise, as text
KIB = 1024
SPARE_BYTES = 96  # for each product: rows that another product takes too may be rounded for this one apart
SCALE = 1e6  # of the largest rise to the solver, which sees no differences below 1e-6
Allocation = Literal["sensitivity", "even"]
Choice = tuple[str, Rounding]  # of a product


@dataclass(frozen=True)
class MixedBits:
    """Weights of 2, 3, 4 or 8 bits, whatever pays for each product, and nothing else of the model."""

    label: ClassVar[str] = "mixed-bit ptq"
    runtimes: ClassVar[tuple[RuntimeName, ...]] = ("onnxruntime",)
    precision: ClassVar[Precision] = "mixed"
    size_budget: float | None = field(default=None, metadata={"tag": "KiB"})
    """KiB that the whole file may take."""
    mean_bits: float = field(default=2.5, metadata={"tag": "mean"})
    """Without a budget in KiB: as much as a file takes whose weights have so many bits, or one between two such."""
    allocation: Allocation = field(default="sensitivity", metadata={"tag": ""})
    """Which products get more bits: those where they keep the logits best for their bytes; or, as a yardstick, all get
    the same (the last layer at least 4), and as many as fit, drawn by seed, one step more."""
    method: Method = field(default_factory=Method)

    def __post_init__(self) -> None:
        check_budget(self.size_budget, self.mean_bits)
        if self.size_budget is not None and self.mean_bits != MixedBits.mean_bits:
            raise UserError("--size-budget and --mean-bits are two ways to say the same: drop one of them")

    def write(self, model: Model, file: Path, work: Work, metadata: Mapping[str, Any]) -> None:
        """As every form.

        Raises:
            UserError: the budget is less than the smallest file takes, or more than the largest; or the model is a
                small student.
        """
        graph = build_rounding(model, self.method.activation_bits, work)
        if is_small_student(graph.graph):
            raise UserError(f"{work.name} is too small to gain from mixed bits: take weights of one number of bits")
        plans = [uniform_plan(graph, rounding, self.method.router_bits) for rounding in WIDTHS]
        choices = [
            (name, rounding) for name, own in plans[0].items() for rounding in ((own,) if name == ROUTER else WIDTHS)
        ]
        rounded = round_products(graph, choices, self.method, work)
        pixels = work.calibration(CALIBRATION_SIZE)
        load = load_by_expert(model, pixels)

        def put_together(plan: Plan, rises: Mapping[Choice, float], num_bytes: int) -> tuple[onnx.ModelProto, Any]:
            made = onnx.ModelProto()
            made.CopyFrom(graph)
            put_in(made, plan, {choice[0]: rounded[choice] for choice in plan.items()})
            told = tell(plan, rises, load) | {"budget": num_bytes}
            return made, {**metadata, **graph_metadata(model), "mixed_bits": told}

        in_4 = put_together(plans[IN_4], dict.fromkeys(choices, LONGEST), 10**9)
        sizes = measure_sizes(rounded, plans[IN_4], len(content_of(*in_4)))
        num_bytes = sizes.budget(self, plans, work.name)
        if self.allocation == "even":
            plan = allocate_evenly(plans, sizes, num_bytes, seed=work.seed)
            rises = measure_rises(graph, {choice: rounded[choice] for choice in plan.items()}, pixels.numpy())
        else:
            rises = measure_rises(graph, rounded, pixels.numpy())
            plan = allocate(rises, sizes, num_bytes)
        made, says = put_together(plan, rises, num_bytes)
        save_onnx(made, file, says)

    def prove(self, model: Model, file: Path) -> Proof:
        proof, told = prove_rounded(model, file), read_onnx_metadata(file)["mixed_bits"]
        bits = bits_by_product(read_onnx(file).graph)
        num_bytes = file.stat().st_size
        budget = told["budget"] if self.size_budget is None else self.size_budget * KIB
        if num_bytes > budget:
            raise WrongPrecision(f"{num_bytes / KIB:.1f} KiB are more than the budget of {budget / KIB:.1f} KiB")
        text = (
            f"bits: {describe_bits(bits, told['load'])}; {num_bytes / KIB:.1f} of {budget / KIB:.1f} KiB; "
            f"rise of KL on calibration images, summed over layers: {told['rise']:.2g} nats; {proof['text']}"
        )
        return {**proof, "text": text, "bits": bits, "bytes": num_bytes, **told}


def tell(plan: Plan, rises: Mapping[Choice, float], load: Sequence[float]) -> dict[str, Any]:
    """What an artifact says of a choice: the rise that it comes to, each expert's share of all visits, and, where all
    choices were measured, how much two bits in its layers raise the KL per visit.
    """
    told = {"rise": _short(sum(rises[choice] for choice in plan.items())), "load": [*map(_short, load)]}
    in_2 = {name: rise for (name, rounding), rise in rises.items() if rounding == WIDTHS[0]}
    if load and plan.keys() <= in_2.keys() | {ROUTER}:
        own = (sum(in_2[name] for name in in_2 if name.startswith(f"expert{expert}.")) for expert in range(len(load)))
        told["rise_per_visit"] = [_short(rise / max(share, 1e-9)) for rise, share in zip(own, load, strict=True)]
    return told


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def check_budget(size_budget: float | None, mean_bits: float) -> None:
    """Raise UserError for what is no number of KiB, or of bits; whether there is such a file only the model tells."""
    if size_budget is not None and not 0 < size_budget < math.inf:
        raise UserError(f"--size-budget {size_budget:g} must be a number of KiB above 0")
    if not MEAN_BITS[0] <= mean_bits <= MEAN_BITS[-1]:
        raise UserError(f"--mean-bits {mean_bits:g} must lie between {MEAN_BITS[0]} and {MEAN_BITS[-1]}")


@torch.no_grad()
def load_by_expert(model: Model, pixels: torch.Tensor) -> list[float]:
    """The share of all visits that each expert gets; a dense model has none."""
    if not isinstance(model, SparseMoE):
        return []
    load_E = model.routed(pixels).expert_load
    shares: list[float] = (load_E / load_E.sum()).tolist()
    return shares


class Sizes(NamedTuple):
    """Bytes of a file by its parts; they are never fewer than those of the file."""

    others: int  # all that is no weight of few bits
    own: dict[Choice, int]  # a product's integers, scales, zero points, nodes
    shared: dict[Bits, int]  # what takes the words of all weights of as many bits apart

    def of(self, plan: Plan) -> int:
        """The whole file's."""
        shared = sum(self.shared[bits] for bits in {rounding.bits for rounding in plan.values()})
        return self.others + shared + sum(self.own[choice] for choice in plan.items())

    def budget(self, form: MixedBits, plans: Iterable[Plan], name: str) -> int:
        """In bytes, between the smallest and the largest of these, the fewest bits first.

        Raises:
            UserError: it lies elsewhere.
        """
        found, size_budget = [self.of(plan) / KIB for plan in plans], form.size_budget
        if size_budget is None:
            return int(np.interp(form.mean_bits, MEAN_BITS, found) * KIB)
        if not min(found) <= size_budget <= max(found):
            least, most = math.ceil(min(found) * 10) / 10, math.floor(max(found) * 10) / 10
            raise UserError(
                f"--size-budget {size_budget:g} is no size of {name}, which takes "
                f"{least:g} KiB in the fewest bits to {most:g} KiB in the most"
            )
        return int(size_budget * KIB)


def measure_sizes(rounded: Mapping[Choice, Rounded], plan: Plan, file_bytes: int) -> Sizes:
    """What a weight takes alone, less what two of as many bits save side by side; and the rest of a whole file.

    Args:
        file_bytes: of the file with these choices.
    """
    alone = {choice: _bytes_of({choice: weight}) for choice, weight in rounded.items()}
    shared: dict[Bits, int] = {}
    for bits in dict.fromkeys(rounding.bits for _, rounding in rounded):
        kind = [choice for choice in rounded if choice[1].bits == bits]
        saved = [
            alone[one] + alone[two] - _bytes_of({c: rounded[c] for c in (one, two)}) for one, two in pairwise(kind)
        ]
        shared[bits] = min(saved, default=0)  # two of one shape save its constant, too
    own = {choice: num_bytes - shared[choice[1].bits] for choice, num_bytes in alone.items()}
    others = file_bytes - Sizes(0, own, shared).of(plan)
    return Sizes(others + SPARE_BYTES * len(plan), own, shared)


def _bytes_of(weights: Mapping[Choice, Rounded]) -> int:
    """Of a graph of nothing but these products."""
    products = [make_node("Gemm", [f"{name}.rows", f"{name}.weight", f"{name}.bias"], name) for name, _ in weights]
    model = helper.make_model(helper.make_graph(products, "products", [], []))
    put_in(model, dict(weights.keys()), {name: weight for (name, _), weight in weights.items()})
    return model.graph.ByteSize()


def measure_rises(model: onnx.ModelProto, rounded: Mapping[Choice, Rounded], pixels: Array) -> dict[Choice, float]:
    """Mean KL in nats of an FP32 model's logits on these images from those with one product rounded, for each."""
    weights = {node.name: node.input[1] for node in model.graph.node if len(node.input) > 1}
    exact = log_softmax(_predict_with(model, {}, pixels))
    rises = {}
    for (name, rounding), weight in rounded.items():
        found = log_softmax(_predict_with(model, {weights[name]: weight.dequantize()}, pixels))
        rises[name, rounding] = float((np.exp(exact) * (exact - found)).sum(axis=1).mean())
    return rises


def _predict_with(model: onnx.ModelProto, constants: Mapping[str, Array], pixels: Array) -> Array:
    """Logits of a model with other constants."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for constant in changed.graph.initializer:
        if constant.name in constants:
            constant.CopyFrom(numpy_helper.from_array(constants[constant.name], constant.name))
    session = onnxruntime.InferenceSession(changed.SerializeToString(), session_options(1), providers=PROVIDERS)
    return predict(lambda batch: session.run(None, {"pixels": batch})[0], pixels)


def allocate(rises: Mapping[Choice, float], sizes: Sizes, num_bytes: int) -> dict[str, Rounding]:
    """The choice for each product with the least sum of rises that fits; of equals the smallest file."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    choices, kinds = [*rises], [*sizes.shared]
    names = [*dict(choices)]
    rise = np.array([rises[choice] for choice in choices] + [0.0] * len(kinds))
    size = np.array([sizes.own[choice] for choice in choices] + [sizes.shared[kind] for kind in kinds], np.float64)
    of_name = np.array([[float(choice[0] == name) for choice in choices] + [0.0] * len(kinds) for name in names])
    # A kind must be there for each of its choices.
    of_kind = np.array([[float(choice[1].bits == kind) for choice in choices] for kind in kinds])
    needs_kind = np.hstack([of_kind, -len(names) * np.eye(len(kinds))])
    solved = milp(
        SCALE * rise / (rise.max() or 1) + size / size.sum(),
        integrality=np.ones(len(size)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(of_name, 1, 1),
            LinearConstraint(needs_kind, -np.inf, 0),
            LinearConstraint(size[None], -np.inf, num_bytes - sizes.others),
        ],
        options={"mip_rel_gap": 0},
    )
    assert solved.x is not None, solved.message
    return dict(choice for choice, share in zip(choices, solved.x, strict=False) if share > 0.5)


def allocate_evenly(plans: Sequence[Plan], sizes: Sizes, num_bytes: int, *, seed: int) -> dict[str, Rounding]:
    """The last of these plans that fits, and of the next one as many choices as fit, drawn by seed."""
    step = max(step for step, plan in enumerate(plans) if sizes.of(plan) <= num_bytes)
    plan, wider = dict(plans[step]), plans[min(step + 1, len(plans) - 1)]
    names = [*plan]
    for name in (names[place] for place in np.random.default_rng(seed).permutation(len(names))):
        if sizes.of(plan | {name: wider[name]}) <= num_bytes:
            plan[name] = wider[name]
    return plan


def bits_by_product(graph: onnx.GraphProto) -> dict[str, Bits]:
    """In how many bits a graph stores the weights of its products, in their order."""
    stored = stored_bits(graph)
    products = [node for node in graph.node if node.op_type in PRODUCTS and node.input[1] in stored]
    return {node.output[0].removesuffix(".int32").removesuffix(".product"): stored[node.input[1]] for node in products}


def describe_bits(bits: Mapping[str, Bits], load: Collection[float]) -> str:
    """By layer, an expert's two together with its share of all visits."""
    shares = {f"expert{expert}": f" (load {share:.0%})" for expert, share in enumerate(load)}
    layers = groupby(bits, lambda name: name.partition(".")[0])
    return ", ".join(
        f"{layer} {'+'.join(str(bits[name]) for name in own)}{shares.get(layer, '')}" for layer, own in layers
    )
