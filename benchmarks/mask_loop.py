"""The mixture of experts as most first scripts write it: a loop over experts with boolean masks."""

import torch
from torch import Tensor

from mnist_lab.models.ffn import relu_chain
from mnist_lab.models.moe import SparseMoE


def mask_loop_forward(model: SparseMoE, pixels: Tensor) -> Tensor:
    """Logits (B, C) of `model` in evaluation mode: the reference for its sorted dispatch."""
    hidden = model.stem(model.normalize(pixels)).relu()
    top_logits, chosen = (hidden @ model.router.gate).topk(model.config.routing.top_k, dim=-1)
    weights = torch.softmax(top_logits, dim=-1)
    mixed = hidden.new_zeros(len(hidden), model.config.output_width)
    experts = model.experts
    for index in range(model.config.routing.num_experts):
        for rank in range(model.config.routing.top_k):
            mask = chosen[:, rank] == index
            if mask.any():
                inner = (hidden[mask] @ experts.weight_in[index] + experts.bias_in[index]).relu()
                output = inner @ experts.weight_out[index] + experts.bias_out[index]
                mixed[mask] += weights[mask, rank].unsqueeze(1) * output
    return relu_chain(model.head, mixed.relu())
