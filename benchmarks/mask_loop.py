"""The mixture of experts as most first scripts write it: a loop over experts with boolean masks.

Shapes: B images, n of them that chose one expert at one rank, D model width, H expert width, O expert output width,
E experts, K experts per image, C classes.
"""

from torch import Tensor

from mnist_lab.models.ffn import relu_chain
from mnist_lab.models.moe import SparseMoE


def mask_loop_forward(model: SparseMoE, pixels: Tensor) -> Tensor:
    """Logits (B, C) of `model` in evaluation mode: the reference for its sorted dispatch."""
    hidden = model.stem(model.normalize(pixels)).relu()  # (B, D)
    decision = model.router(hidden)
    weights, chosen = decision.weights_BK, decision.experts_BK  # (B, K) each
    mixed = hidden.new_zeros(len(hidden), model.config.output_width)  # (B, O)
    experts = model.experts
    for index in range(model.config.routing.num_experts):
        for rank in range(model.config.routing.top_k):
            mask = chosen[:, rank] == index  # (B,)
            if mask.any():
                inner = (hidden[mask] @ experts.weight_in[index] + experts.bias_in[index]).relu()  # (n, H)
                output = inner @ experts.weight_out[index] + experts.bias_out[index]  # (n, O)
                mixed[mask] += weights[mask, rank].unsqueeze(1) * output  # (n, O)
    return relu_chain(model.head, mixed.relu())  # (B, C)
