"""INT8 post-training quantization within PyTorch: export, prepare, calibrate, convert (torchao's pt2e).

The result is a PyTorch program file (.pt2) with integer weights, which Inductor lowers to INT8 kernels.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

from mnist_lab.compress.quantize import CALIBRATION_BATCH, Mode, needs_reduced_range
from mnist_lab.errors import UserError
from mnist_lab.files import write_atomically

METADATA = "mnist_lab.json"
CONVERTED_WEIGHT = torch.ops.quantized_decomposed.dequantize_per_channel.default
# One image would be taken for a constant batch size.
EXAMPLE = torch.zeros(2, 1, 28, 28)
ANY_BATCH = ({0: Dim("batch")},)


def quantize_program(
    model: nn.Module, path: Path, *, mode: Mode, calibration: Tensor, metadata: Mapping[str, Any]
) -> None:
    """Quantize every linear layer of an FP32 model, per channel, and write the program.

    Args:
        model: float32 (B, 1, 28, 28) -> (B, C), of `nn.Linear` layers, whose flow does not depend on the data.
        calibration: training pixels (N, 1, 28, 28); in dynamic mode they set nothing.

    Raises:
        UserError: the folder cannot be written.
    """
    settings = x86.get_default_x86_inductor_quantization_config(
        is_dynamic=mode == "dynamic", reduce_range=needs_reduced_range()
    )
    prepared = prepare_pt2e(
        torch.export.export(model.eval(), (EXAMPLE,), dynamic_shapes=ANY_BATCH).module(),
        x86.X86InductorQuantizer().set_global(settings),
    )
    with torch.no_grad():
        for pixels in calibration.split(CALIBRATION_BATCH):
            prepared(pixels)
    converted = convert_pt2e(prepared)
    _drop_unused_parameters(converted)
    program = torch.export.export(converted, (EXAMPLE,), dynamic_shapes=ANY_BATCH)
    extra = {METADATA: json.dumps(dict(metadata), sort_keys=True)}
    write_atomically(path, lambda temporary: torch.export.save(program, temporary, extra_files=extra))


def _drop_unused_parameters(module: torch.fx.GraphModule) -> None:
    """Conversion leaves the float weights beside the integer ones, which would make the file larger, not smaller."""
    used = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in module.named_parameters() if name not in used]:
        owner, _, attribute = name.rpartition(".")
        delattr(module.get_submodule(owner), attribute)


def load_program(path: Path) -> ExportedProgram:
    """The program in a file that `quantize_program` wrote.

    Raises:
        UserError: the file is missing, truncated, or something else.
    """
    return _load(path)[0]


def read_program_metadata(path: Path) -> dict[str, Any]:
    """What a program says of itself.

    Raises:
        UserError: as `load_program`.
    """
    return _load(path)[1]


def _load(path: Path) -> tuple[ExportedProgram, dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"no program at {path}")
    extra = {METADATA: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        return program, json.loads(extra[METADATA])
    except Exception as error:  # zip, JSON and schema errors share no base class
        raise UserError(f"{path} is truncated or not a program of this suite. Move it away.") from error


def num_quantized_layers(graph: torch.fx.Graph) -> int:
    """Linear layers with integer weights."""
    return sum(node.target is CONVERTED_WEIGHT for node in graph.nodes)


def program_bytes(path: Path) -> int:
    """Bytes of all weights, scales and constants that a program stores."""
    return sum(tensor.nbytes for tensor in load_program(path).state_dict.values())
