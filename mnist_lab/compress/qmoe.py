"""An MoE's experts as one operator: for one image at a time, where moving rows costs more than computing them.

In the layout of `deploy/onnx.py` sorting, splitting and joining rows takes a dozen operators, and each expert three.
ONNX Runtime's own `com.microsoft.QMoE` does all that lies between router and head in one, with weights of 8 or 4 bits
and rows that it rounds to 8 as they come: w ≈ s·(q − 2^(bits − 1)), q an unsigned integer, one s per output and group
of inputs. From some eight images on it is the slower one. Stem and head are those of dynamic INT8: for one image
neither fixed ranges nor products of few bits are faster.

The operator takes experts of one width, with as many outputs as inputs, and has integer products for whole groups of
inputs only, any others being multiplied in float: layers are filled up with units of zeros.

Shapes: D model width, H expert width, O expert output width, E experts, I inputs of a layer, G groups of them.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.utils import Extractor

from mnist_lab.compress.few_bits import pack_int4
from mnist_lab.compress.int8 import needs_reduced_range, optimized_graph, prove_products, quantize
from mnist_lab.compress.levels import LARGEST_GROUP, SMALLEST_GROUP, Int8, Rounded, Rounding
from mnist_lab.compress.weight_only import PRECISIONS, round_weight
from mnist_lab.deploy.artifacts import read_onnx, save_onnx
from mnist_lab.deploy.inside import read_out
from mnist_lab.deploy.onnx import graph_metadata, write_onnx
from mnist_lab.errors import UserError, WrongPrecision
from mnist_lab.experiments.technique import Proof, Work
from mnist_lab.measure import decibels
from mnist_lab.models import Model
from mnist_lab.models.moe import SparseMoE
from mnist_lab.models.surgery import with_more_units
from mnist_lab.runtimes import FLOAT_PRODUCTS, FUSED, ROUTER, VENDOR, Precision, RuntimeName

OperatorBits = Literal[8, 4]
INT8_ROWS = 4  # the operator's accuracy_level: rows of 8 bits
NUM_INPUTS = 15  # of the operator, the last of them weights of its own
CHECKED_IMAGES = 200
# Of the experts' outputs against those of the same weights in FP32: rows of 8 bits give some 40, rows in float 120.
LEAST_DECIBELS, FLOAT_DECIBELS = 25, 80


@dataclass(frozen=True)
class FusedExperts:
    """Experts in 8 or 4 bits as one operator of ONNX Runtime, the rest in dynamic INT8."""

    label: ClassVar[str] = "fused ptq"
    runtimes: ClassVar[tuple[RuntimeName, ...]] = ("onnxruntime",)
    bits: OperatorBits = field(default=4, metadata={"tag": "b"})
    reduced_range: bool = field(default_factory=needs_reduced_range, metadata={"tag": None})

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.bits]

    def write(self, model: Model, file: Path, work: Work, metadata: Mapping[str, Any]) -> None:
        fused = fuse_experts(model, self.bits, reduced_range=self.reduced_range)
        save_onnx(fused, file, {**metadata, **graph_metadata(model), "layout": {"name": "fused"}})

    def prove(self, model: Model, file: Path) -> Proof:
        return prove_fused(model, file, self.bits, reduced_range=self.reduced_range)


def fuse_experts(model: Model, bits: OperatorBits, *, reduced_range: bool) -> onnx.ModelProto:
    """The graph of a mixture with its experts as one operator.

    Args:
        reduced_range: weights of 7 bits outside the experts, for a CPU whose 8-bit products saturate.

    Raises:
        UserError: it is no mixture.
    """
    if not isinstance(model, SparseMoE):
        raise UserError("experts can be fused in a mixture only, and this model has none")
    wider, group = _fill_up(model)
    with tempfile.TemporaryDirectory() as folder:
        fp32, int8 = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        write_onnx(wider, fp32, {}, layout="sparse")
        quantize(fp32, int8, mode="dynamic", keep_float=FLOAT_PRODUCTS, reduced_range=reduced_range, metadata={})
        artifact = read_onnx(int8)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for part, rounded in _round_experts(wider, bits, group).items():
        arrays[f"experts.weight_{part}"] = np.stack([_pack_unsigned(own.integers.T, bits) for own in rounded])
        arrays[f"experts.scale_{part}"] = np.stack([own.scales.T for own in rounded])  # (E, outputs, G)
        arrays[f"experts.bias_{part}"] = wider.experts.get_parameter(f"bias_{part}").detach().numpy()
    how = {"expert_weight_bits": bits, "block_size": group, "accuracy_level": INT8_ROWS}
    return replace_experts(artifact, wider, FUSED, arrays, **how)


def _fill_up(model: SparseMoE) -> tuple[SparseMoE, int]:
    """The same mixture in widths of whole groups, and how many inputs are a group."""
    config = model.config
    width = max(config.model_width, config.output_width)
    widest = max(width, config.expert_width)
    group = min(max(SMALLEST_GROUP, 1 << (widest - 1).bit_length()), LARGEST_GROUP)
    width, inside = (math.ceil(own / group) * group for own in (width, config.expert_width))
    return with_more_units(model, stem=width, experts=inside, output=width), group


def _round_experts(model: SparseMoE, bits: OperatorBits, group: int) -> dict[str, list[Rounded]]:
    """Each expert's weights of both layers, to the nearest level."""
    return {
        part: [
            round_weight(weight_IO.numpy(), Rounding(bits, group), None)
            for weight_IO in model.experts.get_parameter(f"weight_{part}").detach()
        ]
        for part in ("in", "out")
    }


def _pack_unsigned(integers_OI: Int8, bits: OperatorBits) -> npt.NDArray[np.uint8]:
    """Bytes (O, bytes of I), the first in the lowest bits, where zero stands as half of the range."""
    shifted = (integers_OI.astype(np.int16) + 2 ** (bits - 1)).astype(np.int8)
    packed = shifted.tobytes() if bits == 8 else pack_int4(shifted)
    return np.frombuffer(packed, np.uint8).reshape(len(integers_OI), -1)


def replace_experts(
    artifact: onnx.ModelProto, model: SparseMoE, operator: str, arrays: Mapping[str, npt.NDArray[Any]], **how: Any
) -> onnx.ModelProto:
    """A mixture's artifact with a vendor's operator, of these constants, between router and head."""
    nodes = artifact.graph.node
    rows = next(node.input[0] for node in nodes if node.name == ROUTER)
    for node in nodes:
        node.output[:] = ["unused" if name == "mixed" else name for name in node.output]
    inputs, routing = [rows, ROUTER, *arrays], model.config.routing
    if routing.weighed_over == "all":
        # Told not to normalize, but given no weights, QMoE normalizes all the same.
        inputs += [""] * (NUM_INPUTS - 1 - len(inputs)) + ["router_probs"]
    experts = helper.make_node(
        operator,
        inputs,
        ["mixed"],
        name="experts",
        domain=VENDOR,
        k=routing.top_k,
        activation_type="relu",
        normalize_routing_weights=int(routing.weighed_over == "chosen"),
        **how,
    )
    nodes.insert(next(place for place, node in enumerate(nodes) if "mixed" in node.input), experts)
    artifact.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    artifact.opset_import.append(helper.make_opsetid(VENDOR, 1))
    return Extractor(artifact).extract_model(["pixels"], ["logits"])


def prove_fused(model: Model, file: Path, bits: OperatorBits, *, reduced_range: bool) -> Proof:
    """That ONNX Runtime runs all experts as one operator of so many bits, with rows of 8, and computes what they do;
    and that stem and head are integer products.

    Raises:
        WrongPrecision: it does not.
    """
    assert isinstance(model, SparseMoE)
    fused = [node for node in optimized_graph(file).node if node.op_type == FUSED]
    found = [helper.get_node_attr_value(node, "expert_weight_bits") for node in fused]
    if found != [bits]:
        raise WrongPrecision(f"experts should be one operator of {bits} bits, and ONNX Runtime runs {found}")
    layers = ["stem", *(f"head.{index}" for index in range(len(model.head)))]
    counted = prove_products(file, layers, keep_float=[ROUTER])
    signal = agreement(model, file, bits)
    if not LEAST_DECIBELS < signal < FLOAT_DECIBELS:
        what = "computes something else than the model's experts" if signal < FLOAT_DECIBELS else "runs them in float"
        raise WrongPrecision(f"ONNX Runtime {what}: {signal:.0f} dB")
    products = ", ".join(f"{count} {name}" for name, count in counted.integer_products.items())
    text = f"experts: one operator, weights of {bits} bits, rows of 8; integer products: {products}; in float: {ROUTER}"
    return asdict(counted) | {"bits": bits, "decibels": signal, "reduced_range": reduced_range, "text": text}


@torch.no_grad()
def agreement(model: SparseMoE, file: Path, bits: OperatorBits) -> float:
    """Signal to noise in decibels of what an artifact's operator makes of random pixels, against a model's experts with
    weights of so many bits and rows in float.
    """
    wider, group = _fill_up(model)
    for part, rounded in _round_experts(wider, bits, group).items():
        weights = np.stack([own.dequantize() for own in rounded])
        wider.experts.get_parameter(f"weight_{part}").copy_(torch.from_numpy(weights))
    pixels = np.random.default_rng(0).random((CHECKED_IMAGES, 1, *model.config.data.image_size), np.float32)
    (rows,), (found,) = (read_out(read_onnx(file), name, pixels) for name in ("hidden", "mixed"))
    hidden = torch.from_numpy(rows)
    decision = wider.router(hidden)
    pairs = wider.dispatch(decision)
    outputs = wider.experts(hidden[pairs.row_N], pairs.kept_load_E)
    expected = wider.combine(outputs, pairs, decision).numpy()
    return decibels(found, expected)
