"""Rounding with feedback (GPTQ, arXiv:2210.17323): what one input's rounding costs, the inputs still to come make up.

Weights of a layer are rounded input by input; after each the others move so that the products with calibration rows X
change least: with H = XᵀX and U the Cholesky factor of H⁻¹, by −(w − ŵ)/Uᵢᵢ · Uᵢⱼ. Scales are those of least error in
the products, their sign free, so that all 2^bits integers serve.

Shapes: I inputs, O outputs, G groups of inputs.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from mnist_lab.measure import EVALUATION_BATCH, Array
from mnist_lab.runtimes.onnxruntime import PROVIDERS, session_options

DAMPING = 0.01  # of the mean diagonal of H
SHARES = np.linspace(0.2, 1, 25)  # of the scale that reaches the largest weight, among which the best is looked for
Gram = npt.NDArray[np.float64]
Int8 = npt.NDArray[np.int8]


def input_grams(model: onnx.ModelProto, names: Sequence[str], pixels: Array) -> dict[str, Gram]:
    """XᵀX (I, I) of tensors inside an FP32 model, over these images; of an expert's over those that come to it."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    inside = [name for name in names if name != opened.graph.input[0].name]
    opened.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inside)
    session = onnxruntime.InferenceSession(opened.SerializeToString(), session_options(1), providers=PROVIDERS)
    grams: dict[str, Gram] = {}
    for start in range(0, len(pixels), EVALUATION_BATCH):
        found = session.run(inside, {"pixels": pixels[start : start + EVALUATION_BATCH]})
        for name, tensor in zip(inside, found, strict=True):
            rows = tensor.reshape(-1, tensor.shape[-1]).astype(np.float64)
            grams[name] = grams.get(name, 0) + rows.T @ rows
    return grams


def round_with_feedback(weight_IO: Array, gram_II: Gram, bits: int, group_size: int) -> tuple[Int8, Array]:
    """Integers (I, O) of all 2^bits levels, and scales (G, O), with w ≈ scale·q where it matters to the products."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = torch.from_numpy(weight_IO.astype(np.float64))
    hessian = torch.from_numpy(gram_II.copy())
    energy_I = hessian.diagonal().clone()
    never = energy_I == 0  # such an input says nothing: its weights become zero
    weight[never] = 0
    hessian.diagonal().add_(DAMPING * energy_I.mean().clamp(min=1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    integers, scales = torch.zeros_like(weight), []
    for i in range(len(weight)):
        if i % group_size == 0:
            group = slice(i, i + group_size)
            scales.append(search_scale(weight[group], energy_I[group], lowest, highest))
        integers[i] = (weight[i] / scales[-1]).round().clamp(lowest, highest)
        error_O = (weight[i] - scales[-1] * integers[i]) / factor[i, i]
        weight[i + 1 :] -= torch.outer(factor[i, i + 1 :], error_O)
    return integers.numpy().astype(np.int8), torch.stack(scales).numpy().astype(np.float32)


def search_scale(weight_IO: torch.Tensor, energy_I: torch.Tensor, lowest: int, highest: int) -> torch.Tensor:
    """The scale (O,) of each output for which Σ x²·(w − ŵ)² is least; negative where its sign serves better."""
    largest_O = weight_IO.abs().max(dim=0).values
    largest_O = torch.where(largest_O > 0, largest_O, 1.0)
    best_O = largest_O / -lowest
    least_O = torch.full_like(best_O, torch.inf)
    for share in SHARES:
        for sign in (1, -1):
            scale_O = sign * share * largest_O / -lowest
            rounded = scale_O * (weight_IO / scale_O).round().clamp(lowest, highest)
            error_O = energy_I @ (weight_IO - rounded).square()
            best_O = torch.where(error_O < least_O, scale_O, best_O)
            least_O = torch.minimum(error_O, least_O)
    return best_O
