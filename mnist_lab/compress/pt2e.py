"""INT8 post-training quantization within PyTorch: export, prepare, calibrate, convert (torchao's pt2e).

The result is a PyTorch program file (.pt2) with integer weights, which Inductor lowers to INT8 kernels.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from mnist_lab.errors import WrongPrecision
from mnist_lab.experiments.technique import Proof
from mnist_lab.files import write_atomically
from mnist_lab.models import Model
from mnist_lab.models.moe import EveryExpert, SparseMoE
from mnist_lab.runtimes.torchao import METADATA, load_program, num_quantized_layers

ANY_BATCH = ({0: Dim("batch")},)


def quantize_program(
    model: Model,
    path: Path,
    *,
    is_dynamic: bool,
    calibration: Sequence[Tensor],
    reduced_range: bool,
    metadata: Mapping[str, Any],
) -> None:
    """Quantize every linear layer of an FP32 model, per channel, and write the program.

    Args:
        is_dynamic: activation ranges come from each batch as it runs; what is calibrated on then sets nothing.
        calibration: batches of training pixels (B, 1, height, width).
        reduced_range: weights of 7 bits, for a CPU whose 8-bit products saturate.

    Raises:
        UserError: the folder cannot be written.
    """
    settings = x86.get_default_x86_inductor_quantization_config(is_dynamic=is_dynamic, reduce_range=reduced_range)
    # One image would be taken for a constant batch size.
    example = (torch.zeros(2, *calibration[0].shape[1:]),)
    prepared = prepare_pt2e(
        torch.export.export(_traceable(model), example, dynamic_shapes=ANY_BATCH).module(),
        x86.X86InductorQuantizer().set_global(settings),
    )
    with torch.no_grad():
        for pixels in calibration:
            prepared(pixels)
    converted = convert_pt2e(prepared)
    _drop_unused_parameters(converted)
    program = torch.export.export(converted, example, dynamic_shapes=ANY_BATCH)
    extra = {METADATA: json.dumps(dict(metadata), sort_keys=True)}
    write_atomically(path, lambda temporary: torch.export.save(program, temporary, extra_files=extra))


def prove_program(model: Model, path: Path) -> Proof:
    """That every linear layer of `model` has integer weights in its program.

    Raises:
        WrongPrecision: one has not.
    """
    expected = sum(isinstance(module, nn.Linear) for module in _traceable(model).modules())
    found = num_quantized_layers(load_program(path).graph)
    if found != expected:
        raise WrongPrecision(f"{path.name} has integer weights in {found} of {expected} layers")
    return {"text": f"integer weights in {found} layers", "layers": found}


def _traceable(model: Model) -> nn.Module:
    """The same logits by a flow that does not depend on the data, of linear layers."""
    return (EveryExpert(model) if isinstance(model, SparseMoE) else model).eval()


def _drop_unused_parameters(module: torch.fx.GraphModule) -> None:
    """Conversion leaves the float weights beside the integer ones, which would make the file larger, not smaller."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_parameters() if name not in used]:
        owner, _, attribute = name.rpartition(".")
        delattr(module.get_submodule(owner), attribute)
