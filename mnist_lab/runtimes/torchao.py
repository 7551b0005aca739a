"""INT8 for those who stay in PyTorch: integers and scales that torchao found, compiled by Inductor.

A file holds tensors and no program. Of each linear layer NAME of a `linear_network`: NAME.weight, int8 (outputs,
inputs); NAME.weight_scale and NAME.bias, float32 (outputs,); and where ranges of inputs are fixed NAME.input_scale,
float32, and NAME.input_zero_point, uint8. Beside them its `float_parts`.
"""

import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
import torch._inductor.config
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401  teaches Inductor the INT8 kernels
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from mnist_lab.errors import WrongPrecision
from mnist_lab.files import reading
from mnist_lab.machine import package_version
from mnist_lab.measure import Array
from mnist_lab.models import Model, ModelConfig, build_skeleton, config_from_dict
from mnist_lab.models.checkpoints import read_tensors
from mnist_lab.models.moe import EveryExpert, SparseMoE, SparseMoEConfig
from mnist_lab.runtimes.pytorch import compile_module

KIND = "int8"  # in the metadata, so that such a file is not taken for a checkpoint
ADVICE = "Move it away and make it again."
LOWERED = "qlinear_weight_prepack_matcher_count"  # Inductor's count of layers that it lowered to INT8 kernels
FLOAT_PARTS = ("normalize.mean", "normalize.std", "router.gate")
SMALLEST_SCALE = 2**-12  # that torchao's observers of x86 give to inputs
OPERATORS = torch.ops.quantized_decomposed

Layer = TypeVar("Layer", bound=nn.Module)


class QuantizedLinear(nn.Module):
    """A linear layer of integer weights, on inputs rounded to integers: the pattern that Inductor makes an INT8 kernel.

    Args:
        weight: int8 (outputs, inputs).
        weight_scale: (outputs,).
        bias: (outputs,), in float.
        input_scale: of the inputs' fixed range; without one, every batch has its own.
        input_zero_point: likewise.
        input_max: the largest integer that inputs become; the smallest is 0.
    """

    weight = None  # for `apply_linear`, which gives inputs the precision of a weight that is a tensor
    integers: Tensor
    scales: Tensor
    zero_points: Tensor
    bias: Tensor

    def __init__(
        self,
        *,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor,
        input_scale: Tensor | None = None,
        input_zero_point: Tensor | None = None,
        input_max: int,
    ) -> None:
        super().__init__()
        self.register_buffer("integers", weight)
        self.register_buffer("scales", weight_scale)
        self.register_buffer("zero_points", torch.zeros_like(weight_scale, dtype=torch.int64))
        self.register_buffer("bias", bias)
        self.input_max = input_max
        self.input_range: tuple[float, int] | None = None
        if input_scale is not None and input_zero_point is not None:
            self.input_range = float(input_scale), int(input_zero_point)

    def forward(self, rows: Tensor) -> Tensor:
        scale, zero_point = self.input_range or OPERATORS.choose_qparams(
            rows, 0, self.input_max, SMALLEST_SCALE, torch.uint8
        )
        affine = (scale, zero_point, 0, self.input_max, torch.uint8)
        rows = OPERATORS.dequantize_per_tensor(OPERATORS.quantize_per_tensor(rows, *affine), *affine)
        weight = OPERATORS.dequantize_per_channel(
            self.integers, self.scales, self.zero_points, 0, -128, 127, torch.int8
        )
        return F.linear(rows, weight, self.bias)


class TorchAOSession:
    """A quantized network from raw pixels to logits.

    Raises:
        UserError: as `load_quantized`.
    """

    runtime = "torchao"
    version = package_version("torchao")

    def __init__(self, file: Path) -> None:
        network = load_quantized(file)
        self._num_layers = len(layers_of(network, QuantizedLinear))
        self._module = compile_module(network)

    def prepare(self, pixels: Array) -> Tensor:
        """Compile for this batch size.

        Raises:
            WrongPrecision: a layer was not lowered to an INT8 kernel.
        """
        batch = torch.from_numpy(pixels)
        before, compiled_before = counters["inductor"][LOWERED], counters["stats"]["unique_graphs"]
        # Freezing makes constants of the weights, prepacked for the kernels. The warnings are of torch about itself.
        with torch._inductor.config.patch(freezing=True), warnings.catch_warnings(action="ignore"):
            self.run(batch)
        lowered = counters["inductor"][LOWERED] - before
        if counters["stats"]["unique_graphs"] > compiled_before and lowered != self._num_layers:
            raise WrongPrecision(f"torch.compile lowered {lowered} of {self._num_layers} layers to INT8 kernels")
        return batch

    def run(self, batch: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self._module(batch)
        return logits

    def predict(self, pixels: Array) -> Array:
        logits: Array = self.run(self.prepare(pixels)).numpy()
        return logits


def linear_network(model: Model) -> nn.Module:
    """The same logits in evaluation by a flow that does not depend on the data, its products in linear layers."""
    return (EveryExpert(model) if isinstance(model, SparseMoE) else model).eval()


def layers_of(network: nn.Module, kind: type[Layer]) -> dict[str, Layer]:
    """The layers of a kind, by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, kind)}


def float_parts(network: nn.Module) -> dict[str, Tensor]:
    """What a `linear_network` needs besides its linear layers: the pixels' statistics and the router's gate."""
    return {name: tensor for name, tensor in network.state_dict().items() if name.endswith(FLOAT_PARTS)}


def load_quantized(path: Path) -> nn.Module:
    """The `linear_network` in a file, with every linear layer a `QuantizedLinear`.

    Raises:
        UserError: the file is missing, damaged, or does not hold the INT8 model that it describes.
    """
    tensors, metadata = read_tensors(path, advice=ADVICE)
    with reading(path, ADVICE):
        if metadata.get("kind") != KIND:
            raise ValueError("it is no INT8 model for PyTorch")
        input_max = metadata.get("input_max")
        if input_max not in (127, 255):
            raise ValueError(f"its input_max is {input_max}, not 127 or 255")
        network = _build_skeleton(config_from_dict(metadata["architecture"]), max_experts=len(tensors))
        _check_types(tensors, network)
        _check_values(tensors, input_max)
    # Cloned, since the file's own alignment may be too fine for fast products.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    network.load_state_dict({name: tensors[name] for name in float_parts(network)}, strict=False, assign=True)
    parts: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        parts[module][part] = tensor
    for name in layers_of(network, nn.Linear):
        network.set_submodule(name, QuantizedLinear(**parts[name], input_max=int(input_max)))
    return network


def _build_skeleton(config: ModelConfig, *, max_experts: int) -> nn.Module:
    """A network without weights."""
    if isinstance(config, SparseMoEConfig) and config.routing.num_experts > max_experts:
        raise ValueError("it does not hold the model that it describes")
    return linear_network(build_skeleton(config))


def _check_types(tensors: Mapping[str, Tensor], network: nn.Module) -> None:
    """Raise ValueError where tensors are not those of a network, by name, shape and type."""
    is_static = any(name.endswith(".input_scale") for name in tensors)
    expected = {name: (tensor.shape, torch.float32) for name, tensor in float_parts(network).items()}
    for name, layer in layers_of(network, nn.Linear).items():
        expected |= {
            f"{name}.weight": (layer.weight.shape, torch.int8),
            f"{name}.weight_scale": (layer.bias.shape, torch.float32),
            f"{name}.bias": (layer.bias.shape, torch.float32),
        }
        if is_static:
            scalar = torch.Size()
            expected |= {
                f"{name}.input_scale": (scalar, torch.float32),
                f"{name}.input_zero_point": (scalar, torch.uint8),
            }
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if different:
        raise ValueError(f"it does not hold the model that it describes, but other {', '.join(different)}")


def _check_values(tensors: Mapping[str, Tensor], input_max: int) -> None:
    """Raise ValueError where a number is not finite, a scale not above 0, or a zero point no integer of inputs."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds what is no finite number")
        if name.endswith("_scale") and not (tensor > 0).all():
            raise ValueError(f"{name} holds a scale that is not above 0")
        if name.endswith("_zero_point") and tensor > input_max:
            raise ValueError(f"{name} is {tensor}, above {input_max}")


def quantized_bytes(path: Path) -> int:
    """Bytes of all tensors that a file stores: what inference needs.

    Raises:
        UserError: the file is missing or damaged.
    """
    return sum(tensor.nbytes for tensor in read_tensors(path, advice=ADVICE).tensors.values())
