"""INT8 post-training quantization within PyTorch: export, prepare, calibrate, convert (torchao's pt2e).

What it found, integers and scales, is stored; `runtimes/torchao.py` says how, and makes a network of it again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from mnist_lab.errors import WrongPrecision
from mnist_lab.experiments.technique import Proof
from mnist_lab.models import Model
from mnist_lab.models.checkpoints import save_tensors
from mnist_lab.runtimes.torchao import (
    KIND,
    OPERATORS,
    QuantizedLinear,
    float_parts,
    layers_of,
    linear_network,
    load_quantized,
)

ANY_BATCH = ({0: Dim("batch")},)
FIXED_ROWS = OPERATORS.dequantize_per_tensor.default
QUANTIZED_ROWS = (FIXED_ROWS, OPERATORS.dequantize_per_tensor.tensor)
QUANTIZED_WEIGHT = OPERATORS.dequantize_per_channel.default
WEIGHT_FORM = (0, -128, 127, torch.int8)  # axis of the scales, and all 8-bit integers, around zero


def write_quantized(
    model: Model,
    path: Path,
    *,
    is_dynamic: bool,
    calibration: Sequence[Tensor],
    reduced_range: bool,
    metadata: Mapping[str, Any],
) -> None:
    """Quantize every linear layer of an FP32 model, its weights per channel, and write integers and scales.

    Args:
        is_dynamic: activation ranges come from each batch as it runs; what is calibrated on then sets nothing.
        calibration: batches of training pixels (B, 1, height, width).
        reduced_range: activations of 7 bits, for a CPU whose 8-bit products saturate.

    Raises:
        WrongPrecision: torchao left a layer in float.
        RunFailed: the folder cannot be written.
    """
    network = linear_network(model)
    converted = convert(network, is_dynamic=is_dynamic, calibration=calibration, reduced_range=reduced_range)
    tensors = float_parts(network)
    for node in converted.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            tensors |= _integers_and_scales(node, converted)
    for name, layer in layers_of(network, nn.Linear).items():
        if f"{name}.weight" not in tensors:
            raise WrongPrecision(f"torchao left {name} in float")
        tensors[f"{name}.bias"] = layer.bias.detach()
    form = {"kind": KIND, "input_max": 127 if reduced_range else 255, "architecture": asdict(model.config)}
    save_tensors(path, tensors, {**metadata, **form})


def convert(
    network: nn.Module, *, is_dynamic: bool, calibration: Sequence[Tensor], reduced_range: bool
) -> fx.GraphModule:
    """The same network as torchao quantizes it."""
    settings = x86.get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic, reduce_range=reduced_range)
    # One image would be taken for a constant batch size.
    example = (torch.zeros(2, *calibration[0].shape[1:]),)
    prepared = prepare_pt2e(
        torch.export.export(network, example, dynamic_shapes=ANY_BATCH).module(),
        x86.X86InductorQuantizer().set_global(settings),
    )
    with torch.no_grad():
        for pixels in calibration:
            prepared(pixels)
    return convert_pt2e(prepared)


def _integers_and_scales(linear: fx.Node, converted: fx.GraphModule) -> dict[str, Tensor]:
    """One layer's tensors, named as in its file; none where it was left in float."""
    operands: Any = linear.args
    rows, weight, _ = operands
    if rows.target not in QUANTIZED_ROWS or weight.target is not QUANTIZED_WEIGHT:
        return {}
    name, _ = [*linear.meta["nn_module_stack"].values()][-1]
    integers, scales, zero_points = (converted.get_buffer(stored.target) for stored in weight.args[:3])
    assert weight.args[3:] == WEIGHT_FORM
    assert not zero_points.any()
    tensors = {"weight": integers, "weight_scale": scales}
    if rows.target is FIXED_ROWS:
        _, scale, zero_point, *_ = rows.args
        tensors |= {"input_scale": torch.tensor(scale), "input_zero_point": torch.tensor(zero_point, dtype=torch.uint8)}
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}


def prove_quantized(model: Model, path: Path) -> Proof:
    """That the file holds integer weights for every linear layer of `model`, and for no other.

    Raises:
        UserError: as `load_quantized`.
        WrongPrecision: it does not.
    """
    expected = {name: layer.weight.shape for name, layer in layers_of(linear_network(model), nn.Linear).items()}
    found = {name: layer.integers.shape for name, layer in layers_of(load_quantized(path), QuantizedLinear).items()}
    if found != expected:
        raise WrongPrecision(f"{path.name} has integer weights in {sorted(found)}, not in {sorted(expected)}")
    return {"text": f"integer weights in {len(found)} layers", "layers": len(found)}
