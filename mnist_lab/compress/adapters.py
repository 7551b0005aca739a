"""A trained model for another data set: its weights frozen in 4 bits, and adapters of low rank that learn beside them.

QLoRA (arXiv:2305.14314): NF4(W) + left · right in the place of each weight matrix W, where only left and right are
trained. NF4 stores of a weight the nearest of 16 levels, as normal values need them, times the largest magnitude of its
block of 64. Adapters start at nothing, or where they undo most of the rounding (LoftQ, arXiv:2310.08659).

What is small, or must be others for other classes, is trained as it is: biases, the router, and the last layer, which
starts at zero.

Shapes: E experts (1 of a linear layer), I inputs, O outputs, R rank, G blocks of 64 weights, N rows sorted by expert.
"""

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mnist_lab.compress.finetune import Duration
from mnist_lab.errors import UserError
from mnist_lab.experiments.technique import Made, Proof, Work
from mnist_lab.measure import MIB
from mnist_lab.memory import measure_peak
from mnist_lab.models import Model, build_skeleton
from mnist_lab.models.ffn import draw_normal
from mnist_lab.models.moe import SparseMoE
from mnist_lab.training import AdamW, Batch, EpochMetrics, sum_terms, supervised_loss

# arXiv:2305.14314, appendix E: quantiles of the normal distribution, eight below zero and eight from it on.
NF4_LEVELS = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ]
)
MIDPOINTS = (NF4_LEVELS[1:] + NF4_LEVELS[:-1]) / 2
BLOCK = 64  # weights that share a scale
PAIRS = NF4_LEVELS[torch.stack([torch.arange(256) % 16, torch.arange(256) // 16], dim=1)]  # (256, 2), what a byte holds
ALTERNATIONS = 5  # between rounding and what undoes it
ADAPTER_RATE = 2  # times the recipe's learning rate
FIRST_LAYER = 2  # times the rank of all others: it sees the pixels, and other data needs other features most
MAX_RANK = 10**6


class NF4(NamedTuple):
    """Weights of 4 bits, and a scale for each block."""

    codes: Tensor  # (E, G, 32) uint8, of two weights each, the first in the lower bits
    scales: Tensor  # (E, G)


def quantize(weight_EIO: Tensor) -> NF4:
    """The nearest level of each weight; the last block of each matrix is filled up with zeros."""
    flat = weight_EIO.flatten(1)
    blocks = nn.functional.pad(flat, (0, -flat.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales_EG = blocks.abs().amax(dim=2)
    codes = torch.bucketize(blocks / torch.where(scales_EG > 0, scales_EG, 1.0).unsqueeze(2), MIDPOINTS).byte()
    return NF4(codes[..., ::2] + 16 * codes[..., 1::2], scales_EG)


def dequantize(base: NF4, fan_in: int, fan_out: int) -> Tensor:
    """The weights (E, I, O) that NF4 stands for."""
    pairs = PAIRS.to(base.codes.device).index_select(0, base.codes.flatten().int())
    blocks = pairs.view(*base.scales.shape, BLOCK).mul_(base.scales.unsqueeze(2))
    return blocks.flatten(1)[:, : fan_in * fan_out].unflatten(1, (fan_in, fan_out))


def undo_rounding(weight_EIO: Tensor, rank: int) -> tuple[NF4, Tensor, Tensor]:
    """Base, left and right near to the weights: by turns NF4 of what left · right leaves, and the leading singular
    vectors of what NF4 leaves (arXiv:2310.08659, algorithm 1).
    """
    fan_in, fan_out = weight_EIO.shape[1:]
    left, right = weight_EIO[:, :, :0], weight_EIO[:, :0]  # of rank 0
    for _ in range(ALTERNATIONS):
        base = quantize(weight_EIO - left @ right)
        u, s, v = torch.linalg.svd(weight_EIO - dequantize(base, fan_in, fan_out), full_matrices=False)
        root_ER = s[:, :rank].sqrt()
        left, right = u[:, :, :rank] * root_ER.unsqueeze(1), root_ER.unsqueeze(2) * v[:, :rank]
    return base, left.contiguous(), right.contiguous()


class FrozenProduct(torch.autograd.Function):
    """Rows times weights that are not trained: backward keeps their 4 bits, and makes FP32 of them once more."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, codes: Tensor, scales: Tensor, fan_out: int) -> Tensor:
        ctx.save_for_backward(codes, scales)
        ctx.shape = rows.shape[1], fan_out
        return rows @ dequantize(NF4(codes[None], scales[None]), *ctx.shape)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        codes, scales = ctx.saved_tensors
        return gradient @ dequantize(NF4(codes[None], scales[None]), *ctx.shape)[0].T, None, None, None


@dataclass(frozen=True)
class Adapters:
    """How large adapters are, and where they start."""

    rank: int = field(default=4, metadata={"tag": "R"})
    """Of what is added to each weight matrix; to the first layer's it is twice that."""
    init: Literal["loftq", "zero"] = field(default="zero", metadata={"tag": ""})
    """Start of the adapters: zero adds nothing at first, loftq undoes what it can of the rounding."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK:
            raise UserError(f"--rank {self.rank} must lie between 1 and {MAX_RANK:,}")


class AdaptedWeight(nn.Module):
    """Weights (E, I, O) as a frozen base of 4 bits, and what is trained beside it: base + left · right."""

    codes: Tensor
    scales: Tensor

    def __init__(self, weight_EIO: Tensor, adapters: Adapters) -> None:
        super().__init__()
        weight_EIO, rank = weight_EIO.detach(), adapters.rank
        num_experts, self.fan_in, self.fan_out = weight_EIO.shape
        if rank > min(self.fan_in, self.fan_out):
            raise UserError(
                f"--rank {rank} must be at most {min(self.fan_in, self.fan_out)}, the narrowest layer's width"
            )
        if adapters.init == "loftq":
            base, left, right = undo_rounding(weight_EIO, rank)
        else:
            base, right = quantize(weight_EIO), torch.zeros(num_experts, rank, self.fan_out)
            left = draw_normal(num_experts, self.fan_in, rank, over=math.sqrt(self.fan_in))
        self.register_buffer("codes", base.codes)
        self.register_buffer("scales", base.scales)
        self.left, self.right = nn.Parameter(left), nn.Parameter(right)

    @property
    def base(self) -> Tensor:
        """What is frozen (E, I, O), in FP32."""
        return dequantize(NF4(self.codes, self.scales), self.fan_in, self.fan_out)

    def full(self) -> Tensor:
        """Base and adapters as one (E, I, O), in FP32."""
        return torch.baddbmm(self.base, self.left, self.right)

    def forward(self, rows_NI: Tensor, load: list[int], bias_EO: Tensor) -> Tensor:
        """Products of rows sorted by expert; one expert's weights at a time are in FP32."""
        parts = zip(rows_NI.split(load), self.codes, self.scales, self.left, self.right, bias_EO, strict=True)
        outputs = [
            FrozenProduct.apply(rows, codes, scales, self.fan_out) + torch.addmm(bias, rows @ left, right)
            for rows, codes, scales, left, right, bias in parts
        ]
        return torch.cat(outputs)  # (N, O)


class AdaptedLinear(nn.Module):
    """A linear layer with an adapter, and its own bias."""

    weight: None = None  # none in FP32, for models that look at its type

    def __init__(self, layer: nn.Linear, adapters: Adapters) -> None:
        super().__init__()
        self.adapted, self.bias = AdaptedWeight(layer.weight.T.unsqueeze(0), adapters), layer.bias

    def forward(self, rows: Tensor) -> Tensor:
        outputs: Tensor = self.adapted(rows, [len(rows)], self.bias.unsqueeze(0))
        return outputs

    def folded(self) -> dict[str, Tensor]:
        """Parameters of the linear layer that it is."""
        return {"weight": self.adapted.full()[0].T, "bias": self.bias}


class AdaptedExperts(nn.Module):
    """A mixture's experts, each with an adapter for each of its two layers, and their own biases."""

    def __init__(self, experts: nn.Module, adapters: Adapters) -> None:
        super().__init__()
        self.adapted_in = AdaptedWeight(experts.get_parameter("weight_in"), adapters)
        self.adapted_out = AdaptedWeight(experts.get_parameter("weight_out"), adapters)
        self.bias_in, self.bias_out = experts.get_parameter("bias_in"), experts.get_parameter("bias_out")

    def forward(self, rows_ND: Tensor, load_E: Tensor) -> Tensor:
        load = load_E.tolist()
        outputs: Tensor = self.adapted_out(self.adapted_in(rows_ND, load, self.bias_in).relu_(), load, self.bias_out)
        return outputs  # (N, O)

    def folded(self) -> dict[str, Tensor]:
        """Parameters of the experts that they are."""
        weights = {"weight_in": self.adapted_in.full(), "weight_out": self.adapted_out.full()}
        return weights | {"bias_in": self.bias_in, "bias_out": self.bias_out}


def linear_names(model: nn.Module) -> list[str]:
    """Of all linear layers, the one to the logits last."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def take_over(work: Work) -> Model:
    """The source's weights for other data: normalised as that is, with a last layer of zeros. One drawn anew would be
    what the source, of the same seed, began with, and its features lean on that.

    Raises:
        UserError: the data has another number of classes, or images of another size.
    """
    source, spec = work.source, work.dataset.spec
    assert source is not None
    was = source.config.data
    if (was.num_classes, was.image_size) != (spec.num_classes, spec.image_size):
        raise UserError(
            f"{work.name} starts from a model of {was.num_classes} classes and images of {was.image_size}; "
            f"{work.dataset.name} has {spec.num_classes} and {spec.image_size}. Take data alike."
        )
    model = work.build(replace(source.config, data=spec))
    own = {name: tensor for name, tensor in source.state_dict().items() if not name.startswith("normalize.")}
    model.load_state_dict(own, strict=False)
    for parameter in model.get_submodule(linear_names(model)[-1]).parameters():
        nn.init.zeros_(parameter)
    return model


def add_adapters(model: Model, adapters: Adapters, *, seed: int) -> Model:
    """A network of the same forward pass, whose weight matrices but router and last layer are 4 bits and adapters.

    Raises:
        UserError: the rank is larger than a layer is wide.
    """
    network = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for place, name in enumerate(linear_names(network)[:-1]):
            layer = network.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            rank = adapters.rank
            if place == 0:
                rank = max(rank, min(FIRST_LAYER * rank, *layer.weight.shape))
            network.set_submodule(name, AdaptedLinear(layer, replace(adapters, rank=rank)))
        if isinstance(network, SparseMoE):
            network.set_submodule("experts", AdaptedExperts(network.experts, adapters))
    return network


@torch.no_grad()
def fold(network: Model) -> Model:
    """The plain model of the same outputs, with base and adapters as one matrix in FP32; in evaluation mode."""
    weights = network.state_dict()
    for name, module in network.named_modules():
        if isinstance(module, AdaptedLinear | AdaptedExperts):
            weights = {key: tensor for key, tensor in weights.items() if not key.startswith(f"{name}.")}
            weights |= {
                f"{name}.{key}": tensor.clone(memory_format=torch.contiguous_format)
                for key, tensor in module.folded().items()
            }
    model = build_skeleton(network.config)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def step_bytes(model: Model, work: Work) -> int:
    """Bytes at the peak of a training step: parameters and buffers as stored, and all tensors of forward pass, backward
    pass and AdamW, its state included.
    """
    model = copy.deepcopy(model).train()
    rows = torch.arange(min(work.recipe.batch_size, len(work.dataset.train)))
    batch = Batch(work.dataset.train.pixels[rows], work.dataset.train.labels[rows], rows)

    def step() -> None:
        optimizer = AdamW(model, work.recipe.weight_decay)
        sum_terms(supervised_loss(model, batch).terms).backward()
        optimizer.step(work.recipe.learning_rate)

    with torch.random.fork_rng(devices=[]):
        peak = measure_peak(step)[1]
    return peak + sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def base_bits(network: nn.Module) -> float:
    """Bits of a frozen weight, with its share of a scale."""
    frozen = [module for module in network.modules() if isinstance(module, AdaptedWeight)]
    num_bytes = sum(module.codes.nbytes + module.scales.nbytes for module in frozen)
    return 8 * num_bytes / sum(len(module.codes) * module.fan_in * module.fan_out for module in frozen)


def relative_error(model: Model, other: Model) -> float:
    """How far a model's parameters are from another's, as a share of that other's norm."""
    ours, theirs = (nn.utils.parameters_to_vector(each.parameters()).detach() for each in (model, other))
    return float((ours - theirs).norm() / theirs.norm())


def count_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class AdaptLowRank:
    """A trained model for another data set, by adapters beside its weights in 4 bits."""

    label: ClassVar[str] = "adapters"
    cost: ClassVar[float] = 0.5
    adapters: Adapters = Adapters()
    duration: Duration = field(default_factory=Duration)

    def make(self, work: Work) -> Made:
        model = take_over(work)
        network = add_adapters(model, self.adapters, seed=work.seed)
        rounded = add_adapters(model, replace(self.adapters, init="zero"), seed=work.seed)
        proof: Proof = {
            "trained": count_trained(network),
            "trained_share": count_trained(network) / count_trained(model),
            "step_bytes": step_bytes(network, work),
            "step_bytes_of_all": step_bytes(model, work),
            "base_bits": base_bits(network),
            "rounding_error": relative_error(fold(rounded), model),
            "start_error": relative_error(fold(network), model),
        }
        proof["text"] = (
            f"{proof['trained']:,} parameters trained, {proof['trained_share']:.1%} of all, beside a base of "
            f"{proof['base_bits']:.1f} bits a weight; rounding changed weights by {proof['rounding_error']:.1%}, with "
            f"adapters as they start {proof['start_error']:.1%}; a step takes {proof['step_bytes'] / MIB:.1f} MiB, one "
            f"of all parameters {proof['step_bytes_of_all'] / MIB:.1f}"
        )
        curves = train_on(work, network, self.duration, learning_rate=ADAPTER_RATE * work.recipe.learning_rate)
        return Made(fold(network), curves, proof)


@dataclass(frozen=True)
class FinetuneAll:
    """A trained model for another data set, by training all of it: what adapters are to be compared with."""

    label: ClassVar[str] = "fine-tuning"
    cost: ClassVar[float] = 0.4
    duration: Duration = field(default_factory=Duration)

    def make(self, work: Work) -> Made:
        model = take_over(work)
        proof: Proof = {"trained": count_trained(model), "trained_share": 1.0, "step_bytes": step_bytes(model, work)}
        proof["text"] = f"all {proof['trained']:,} parameters trained; a step takes {proof['step_bytes'] / MIB:.1f} MiB"
        return Made(model, train_on(work, model, self.duration), proof)


def train_on(work: Work, model: Model, duration: Duration, *, learning_rate: float | None = None) -> list[EpochMetrics]:
    """Train for that long; without any epoch the model stays as it is."""
    epochs = duration.num_epochs(work)
    return work.fit(model, epochs=epochs, learning_rate=learning_rate) if epochs else []
