"""PyTorch on weights in compressed sparse rows (CSR): products that skip the zeros.

Shapes: P pixels, B images, C classes, D stem width, O expert output width, K experts per image, N = B·K pairs.
The sparse matrix stands on the left of a product, so that images are columns.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mnist_lab.models import Model
from mnist_lab.models.ffn import WindowLayer, linear_layers
from mnist_lab.models.moe import SparseMoE
from mnist_lab.runtimes.pytorch import PyTorchSession


class TorchSparseSession(PyTorchSession):
    """The checkpoint's model, its weights in CSR."""

    runtime = "torch-sparse"

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.model = self.network = SparseNetwork(self.loaded)


class Layer(NamedTuple):
    """A linear layer on columns, or on windows of them."""

    weight_OI: Tensor  # in CSR
    bias_O1: Tensor
    windows: WindowLayer | None = None

    def __call__(self, columns_IB: Tensor) -> Tensor:
        if self.windows is None:
            return torch.addmm(self.bias_O1, self.weight_OI, columns_IB)
        windows = self.windows.split(columns_IB.T).T.contiguous()
        return self.windows.join(torch.addmm(self.bias_O1, self.weight_OI, windows).T).T.contiguous()


def layer_of(weight_OI: Tensor, bias_O: Tensor) -> Layer:
    with warnings.catch_warnings(action="ignore"):  # says that such tensors are in beta state
        return Layer(weight_OI.detach().contiguous().to_sparse_csr(), bias_O.detach().unsqueeze(1))


def layers_of(modules: Iterable[nn.Module]) -> list[Layer]:
    modules = list(modules)
    windows = (module if isinstance(module, WindowLayer) else None for module in modules)
    linear = (layer_of(layer.weight, layer.bias) for layer in linear_layers(modules))
    return [layer._replace(windows=own) for layer, own in zip(linear, windows, strict=True)]


class SparseNetwork:
    """The same logits in evaluation."""

    def __init__(self, model: Model) -> None:
        self.normalize = model.normalize
        self.mixture = model if isinstance(model, SparseMoE) else None
        if isinstance(model, SparseMoE):
            self.stem, self.head = layers_of([model.stem]), layers_of(model.head)
            self.experts = [
                (layer_of(own.weight_in.T, own.bias_in), layer_of(own.weight_out.T, own.bias_out))
                for own in model.experts.each()
            ]
        else:
            self.stem, self.head = [], layers_of(model.layers)

    def __call__(self, pixels: Tensor) -> Tensor:
        columns = self.normalize(pixels).T.contiguous()  # (P, B)
        for layer in self.stem:
            columns = layer(columns).relu_()  # (D, B)
        if self.mixture is not None:
            columns = self._mix(self.mixture, columns).relu_()  # (O, B)
        *inner, last = self.head
        for layer in inner:
            columns = layer(columns).relu_()
        return last(columns).T  # (B, C)

    def _mix(self, model: SparseMoE, hidden_DB: Tensor) -> Tensor:
        """Dispatch, compute and combine, as `models/moe.py` does."""
        decision = model.router(hidden_DB.T)
        expert_N = decision.experts_BK.flatten()
        order_N = expert_N.argsort(stable=True)
        image_N = order_N // decision.experts_BK.shape[1]
        load = torch.bincount(expert_N, minlength=len(self.experts)).tolist()
        columns_DN = hidden_DB.index_select(1, image_N)
        outputs = [
            layer_out(layer_in(own.contiguous()).relu_())
            for own, (layer_in, layer_out) in zip(columns_DN.split(load, dim=1), self.experts, strict=True)
        ]
        output_ON = torch.cat(outputs, dim=1) * decision.weights_BK.flatten()[order_N]
        return output_ON.new_zeros(len(output_ON), hidden_DB.shape[1]).index_add_(1, image_N, output_ON)
