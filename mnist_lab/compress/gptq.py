"""Rounding with feedback (GPTQ, arXiv:2210.17323): what one input's rounding costs, the inputs still to come make up.

Weights of a layer are rounded input by input; after each the others move so that the products with calibration rows X
change least: with H = XᵀX and U the Cholesky factor of H⁻¹, by −(w − ŵ)/Uᵢᵢ · Uᵢⱼ. Scales (and zero points) are those
of least error in the products; a scale's sign is free, so that all levels serve.

Shapes: I inputs, O outputs, G groups of inputs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from mnist_lab.compress.levels import Levels, Rounded
from mnist_lab.measure import EVALUATION_BATCH, Array
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

CALIBRATION_SIZE = 5000  # training images
DAMPING = 0.01  # of the mean diagonal of H
SHARES = np.linspace(0.2, 1, 25)  # of the range that holds every weight, among which the best is looked for
Gram = npt.NDArray[np.float64]


def input_grams(model: onnx.ModelProto, names: Sequence[str], pixels: Array) -> dict[str, Gram]:
    """XᵀX (I, I) of tensors inside an FP32 model, over these images; of an expert's over those that come to it, of
    windows' over what each sees.
    """
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    windows = {node.input[0]: _find_windows(model.graph, node) for node in model.graph.node if node.op_type == "Conv"}
    inside = [name for name in names if name != opened.graph.input[0].name]
    opened.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inside)
    session = onnxruntime.InferenceSession(opened.SerializeToString(), session_options(1), providers=PROVIDERS)
    grams: dict[str, Gram] = {}
    for start in range(0, len(pixels), EVALUATION_BATCH):
        batch = pixels[start : start + EVALUATION_BATCH]
        found = dict(zip(inside, session.run([*inside, "logits"], {"pixels": batch}), strict=False))
        for name in names:
            tensor = found.get(name, batch)
            seen = _split(tensor, *windows[name]) if name in windows else tensor
            rows = seen.reshape(-1, seen.shape[-1]).astype(np.float64)
            grams[name] = grams.get(name, 0) + rows.T @ rows
    return grams


def _find_windows(graph: onnx.GraphProto, conv: onnx.NodeProto) -> tuple[int, int]:
    """Their size and stride."""
    kernel = next(constant for constant in graph.initializer if constant.name == conv.input[1])
    strides = [attribute.ints[0] for attribute in conv.attribute if attribute.name == "strides"]
    return kernel.dims[-1], strides[0] if strides else 1


def _split(planes: Array, size: int, stride: int) -> Array:
    """What each window sees (B, h, w, I·k·k)."""
    windows = np.lib.stride_tricks.sliding_window_view(planes, (size, size), axis=(2, 3))[:, :, ::stride, ::stride]
    by_window: Array = windows.transpose(0, 2, 3, 1, 4, 5)
    return by_window.reshape(*by_window.shape[:3], -1)


def round_with_feedback(
    weight_IO: Array, gram_II: Gram, levels: Levels, group_size: int, *, affine: bool = False
) -> Rounded:
    """The levels, scales and with `affine` zero points that change the products least."""
    weight = torch.from_numpy(weight_IO.astype(np.float64))
    hessian = torch.from_numpy(gram_II.copy())
    energy_I = hessian.diagonal().clone()
    never = energy_I == 0  # such an input says nothing: its weights become zero
    weight[never] = 0
    hessian.diagonal().add_(DAMPING * energy_I.mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    integers, scales, zeros = torch.zeros_like(weight), [], []
    scale_O = zero_O = weight[0]
    for i in range(len(weight)):
        if i % group_size == 0:
            group = slice(i, i + group_size)
            scale_O, zero_O = search_scale(weight[group], energy_I[group], levels, affine=affine)
            scales.append(scale_O)
            zeros.append(zero_O)
        integers[i] = nearest_level(weight[i] / scale_O + zero_O, levels)
        error_O = (weight[i] - scale_O * (integers[i] - zero_O)) / factor[i, i]
        weight[i + 1 :] -= torch.outer(factor[i, i + 1 :], error_O)
    return Rounded(
        integers.numpy().astype(np.int8),
        torch.stack(scales).numpy().astype(np.float32),
        torch.stack(zeros).numpy().astype(np.int8) if affine else None,
        group_size,
    )


def nearest_level(values: Tensor, levels: Levels) -> Tensor:
    if levels.step == 1:
        return values.round().clamp_(levels.lowest, levels.highest)
    digits = ((values - levels.lowest) / levels.step).round_().clamp_(0, levels.num - 1)
    return digits.mul_(levels.step).add_(levels.lowest)


def search_scale(weight_IO: Tensor, energy_I: Tensor, levels: Levels, *, affine: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point (O,) of each output for which Σ x²·(w − ŵ)² is least; without `affine` zero is 0."""
    best_O, best_zero_O = torch.ones_like(weight_IO[0]), torch.zeros_like(weight_IO[0])
    least_O = torch.full_like(best_O, torch.inf)
    for scale_O, zero_O in (_affine_candidates if affine else _symmetric_candidates)(weight_IO, levels):
        rounded = scale_O * (nearest_level(weight_IO / scale_O + zero_O, levels) - zero_O)
        error_O = energy_I @ (weight_IO - rounded).square()
        best_O = torch.where(error_O < least_O, scale_O, best_O)
        best_zero_O = torch.where(error_O < least_O, zero_O, best_zero_O)
        least_O = torch.minimum(error_O, least_O)
    return best_O, best_zero_O


def _symmetric_candidates(weight_IO: Tensor, levels: Levels) -> Iterator[tuple[Tensor, Tensor]]:
    largest_O = weight_IO.abs().max(dim=0).values
    largest_O = torch.where(largest_O > 0, largest_O, 1.0)
    for share in SHARES:
        for sign in (1, -1):
            yield sign * share * largest_O / levels.farthest, torch.zeros_like(largest_O)


def _affine_candidates(weight_IO: Tensor, levels: Levels) -> Iterator[tuple[Tensor, Tensor]]:
    """Of ranges that hold zero, which is a level."""
    low_O, high_O = weight_IO.min(dim=0).values.clamp(max=0), weight_IO.max(dim=0).values.clamp(min=0)
    span_O = torch.where(high_O > low_O, high_O - low_O, 1.0)
    for share in SHARES:
        scale_O = share * span_O / (levels.highest - levels.lowest)
        yield scale_O, nearest_level(levels.lowest - share * low_O / scale_O, levels)
