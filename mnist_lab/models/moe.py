"""Noisy top-K sparse Mixture of Experts (Shazeer et al. 2017, arXiv:1701.06538).

The router decides, dispatch moves rows, the experts compute, combine moves the rows back.

Shapes: B batch, D model width, H expert width, O expert output width, E experts, K experts per
input, N = B·K (input, expert) pairs, sorted by expert, R rank of what experts add to shared weights.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lab.data import DataSpec
from mnist_lab.errors import UserError
from mnist_lab.models.ffn import (
    Normalize,
    Positive,
    apply_linear,
    cast_like,
    draw_normal,
    find_planes,
    linear_chain,
    relu_chain,
)

MAX_EXPERTS = 1000
BASES = ("experts.layer_in.base", "experts.layer_out.base")  # shared by all experts, where they have one
Balance = Literal["entropy", "switch", "cv", "none", "wrong-sign"]
Gate = Literal["chosen", "all"]


@dataclass(frozen=True)
class RoutingConfig:
    """How many experts there are, how many each image visits, and how their load is evened out."""

    num_experts: int = field(default=4, metadata={"tag": "E"})
    """Experts in the mixture."""
    top_k: int = field(default=2, metadata={"tag": "K"})
    """Experts that each image visits; equal to --num-experts it is the dense MoE."""
    balance: Balance = field(default="entropy", metadata={"tag": ""})
    """Load-balancing loss added to the cross-entropy; wrong-sign, the entropy as often printed, collapses."""
    balance_weight: float = field(default=0.02, metadata={"tag": "w"})
    """Weight of the load-balancing loss."""
    capacity_factor: float | None = field(default=None, metadata={"tag": "c"})
    """Rows an expert takes per training batch, as a multiple of an even share; when not given, nothing is dropped."""
    noise: bool = True
    """Learned noise on the router's logits in training."""
    gate: Gate | None = field(default=None, metadata={"tag": ""})
    """Softmax that weighs the chosen experts: over these alone, or over all; when not given, all with --top-k 1,
    where one alone would always weigh 1 and the task would not teach the router, else chosen."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise UserError(f"--num-experts {self.num_experts} must lie between 1 and {MAX_EXPERTS:,}")
        if not 1 <= self.top_k <= self.num_experts:
            raise UserError(f"--top-k {self.top_k} must lie between 1 and --num-experts {self.num_experts}")
        if not (math.isfinite(self.balance_weight) and self.balance_weight >= 0):
            raise UserError(f"--balance-weight {self.balance_weight} must be a finite number, 0 or more")
        if self.capacity_factor is not None and not (math.isfinite(self.capacity_factor) and self.capacity_factor > 0):
            raise UserError(f"--capacity-factor {self.capacity_factor} must be a finite number above 0")

    @property
    def weighed_over(self) -> Gate:
        """The gate given, or the one that fits `top_k`."""
        return self.gate or ("all" if self.top_k == 1 else "chosen")

    @property
    def warning(self) -> str:
        """A sentence for the user where the task teaches the router nothing; empty where it does."""
        if self.num_experts == 1:
            return "with one expert there is nothing to route, and the router learns nothing"
        if self.top_k > 1 or self.weighed_over == "all":
            return ""
        learns = "it learns from the balance loss alone" if self._balance_teaches else "it does not learn at all"
        return f"with --top-k 1 and --gate chosen every weight is 1, and the task cannot teach the router: {learns}"

    @property
    def _balance_teaches(self) -> bool:
        """Whether the balance loss has a gradient for a router whose weights are constant."""
        # Without noise the load is a plain count.
        return self.balance_weight > 0 and self.balance != "none" and (self.balance != "cv" or self.noise)


@dataclass(frozen=True)
class SparseMoEConfig:
    """Widths: pixels -> `model_width` -> experts (`expert_width` -> `output_width`) -> `head_widths` -> logits."""

    model_width: int
    expert_width: int  # of the widest
    output_width: int
    head_widths: Annotated[tuple[int, ...], Meta(max_length=16)]
    routing: RoutingConfig
    data: DataSpec
    kind: Literal["moe"] = "moe"
    expert_widths: tuple[int, ...] | None = None  # of each, where they differ
    shared_rank: Annotated[int, Meta(ge=1)] | None = None  # of what each adds to weights that all share
    pool: Positive = 1  # pixels of a side that become one

    def __post_init__(self) -> None:
        find_planes(self.data, self.pool)
        widths, num_experts = self.expert_widths, self.routing.num_experts
        if widths is None:
            return
        if len(widths) != num_experts or min(widths) < 1 or max(widths) != self.expert_width:
            raise ValueError(f"{widths} are no widths of {num_experts} experts of up to {self.expert_width}")
        if self.shared_rank is not None:
            raise ValueError("experts that share a base have one width")


class Decision(NamedTuple):
    """What the router decided for a batch."""

    weights_BK: Tensor  # of the chosen experts; summing to 1 where the gate is over these alone
    experts_BK: Tensor  # the chosen experts, best first
    logits_BE: Tensor  # with noise in training
    clean_logits_BE: Tensor
    noise_std_BE: Tensor | None  # None in evaluation


class Pairs(NamedTuple):
    """(Image, expert) pairs, sorted by expert."""

    order_N: Tensor  # which they are of all B·K
    row_N: Tensor  # the image of each
    load_E: Tensor  # pairs that chose each expert
    kept_load_E: Tensor  # of these, as many as there is room for
    dropped_share: float  # of all pairs, for lack of capacity


class Routed(NamedTuple):
    """What a forward pass of the MoE decided on its way to the logits."""

    logits: Tensor  # (B, C)
    router_probs: Tensor  # (B, E), softmax over all experts
    experts: Tensor  # (B, K), the chosen ones
    weights: Tensor  # (B, K), of the chosen ones
    auxiliary: dict[str, Tensor]  # the raw parts of the load-balancing loss
    weighted: dict[str, Tensor]  # the same times the balance weight
    expert_load: Tensor  # (E,), pairs that chose each expert, before any was dropped
    dropped_share: float  # of all pairs, for lack of capacity

    @property
    def auxiliary_loss(self) -> Tensor:
        """What load balancing adds to the objective."""
        return sum(self.weighted.values(), start=self.logits.new_zeros(()))


class Router(nn.Module):
    """Keep the K largest logits, and weigh them; in training the logits carry learned noise.

    The weights are the softmax over those K ("chosen", arXiv:1701.06538, eq. 3), or what the softmax over all experts
    gives those K ("all", arXiv:2101.03961, eq. 2).
    """

    def __init__(self, width: int, num_experts: int, top_k: int, *, weighed_over: Gate, noisy: bool = True) -> None:
        super().__init__()
        self.top_k, self.weighed_over, self.noisy = top_k, weighed_over, noisy
        self.gate = nn.Parameter(draw_normal(width, num_experts, over=math.sqrt(width)))  # (D, E)
        self.noise = nn.Parameter(torch.zeros(width, num_experts))  # (D, E)

    def forward(self, hidden_BD: Tensor) -> Decision:
        hidden_BD = cast_like(hidden_BD, self.gate)
        clean_BE = hidden_BD @ self.gate
        logits_BE, std_BE = clean_BE, None
        if self.training and self.noisy:
            std_BE = F.softplus(hidden_BD @ self.noise)
            logits_BE = clean_BE + torch.randn_like(clean_BE) * std_BE
        top_BK, experts_BK = logits_BE.topk(self.top_k, dim=-1)
        if self.weighed_over == "all":
            weights_BK = logits_BE.softmax(dim=-1).gather(-1, experts_BK)
        else:
            weights_BK = top_BK.softmax(dim=-1)
        return Decision(weights_BK, experts_BK, logits_BE, clean_BE, std_BE)


class ExpertWeights(NamedTuple):
    """One expert's two layers, as wide as it is."""

    weight_in: Tensor  # (D, H)
    bias_in: Tensor  # (H,)
    weight_out: Tensor  # (H, O)
    bias_out: Tensor  # (O,)

    def narrow(self, width: int) -> "ExpertWeights":
        """Its first units only."""
        return ExpertWeights(self.weight_in[:, :width], self.bias_in[:width], self.weight_out[:width], self.bias_out)


class Experts(nn.Module):
    """E two-layer networks D -> H -> O with stacked weights, applied to rows that are sorted by expert.

    Those that are narrower than the widest have units of zeros, which training leaves at zero: neither they nor what
    comes out of them has a gradient.
    """

    weight_in: Tensor  # (E, D, H)
    bias_in: Tensor  # (E, H)
    weight_out: Tensor  # (E, H, O)
    bias_out: Tensor  # (E, O)

    def __init__(self, config: SparseMoEConfig) -> None:
        super().__init__()
        self.widths = config.expert_widths or (config.expert_width,) * config.routing.num_experts
        self._add_layer("in", config.routing.num_experts, config.model_width, config.expert_width, config)
        self._add_layer("out", config.routing.num_experts, config.expert_width, config.output_width, config)
        if config.expert_widths is not None and not self.weight_in.is_meta:
            self._clear_units()

    def _add_layer(self, name: str, num_experts: int, fan_in: int, fan_out: int, _: SparseMoEConfig) -> None:
        weight = draw_normal(num_experts, fan_in, fan_out, times=math.sqrt(2 / fan_in))
        self.register_parameter(f"weight_{name}", nn.Parameter(weight))
        self.register_parameter(f"bias_{name}", nn.Parameter(torch.zeros(num_experts, fan_out)))

    @torch.no_grad()
    def _clear_units(self) -> None:
        """Of those beyond an expert's own width."""
        for expert, width in enumerate(self.widths):
            self.weight_in[expert, :, width:] = 0
            self.weight_out[expert, width:] = 0

    def each(self) -> Iterator[ExpertWeights]:
        """Every expert without units of zeros."""
        stacked = (self.weight_in, self.bias_in, self.weight_out, self.bias_out)
        for width, *weights in zip(self.widths, *(weight.unbind() for weight in stacked), strict=True):
            own = ExpertWeights(*weights)
            yield own if width == len(own.bias_in) else own.narrow(width)

    def on_all(self, rows_BD: Tensor) -> Tensor:
        """What every expert gives of every row: (E, B, O)."""
        rows_EBD = rows_BD.expand(len(self.bias_in), -1, -1)
        hidden_EBH = torch.baddbmm(self.bias_in.unsqueeze(1), rows_EBD, self.weight_in).relu_()
        return torch.baddbmm(self.bias_out.unsqueeze(1), hidden_EBH, self.weight_out)

    def forward(self, rows_ND: Tensor, load_E: Tensor) -> Tensor:
        rows_ND = cast_like(rows_ND, self.bias_in)
        # In evaluation slices are as fast for a few experts, but a compiler cannot see how many rows each has.
        if self.training or torch.compiler.is_compiling():
            ends_E = load_E.cumsum(0, dtype=torch.int32)
            expert_N = torch.repeat_interleave(load_E, output_size=len(rows_ND))
            hidden_NH = F.grouped_mm(rows_ND, self.weight_in, offs=ends_E) + self.bias_in.index_select(0, expert_N)
            # grouped_mm's backward needs a contiguous gradient, which adding the bias hands on.
            return F.grouped_mm(hidden_NH.relu(), self.weight_out, offs=ends_E) + self.bias_out.index_select(
                0, expert_N
            )  # (N, O)
        return self._compute_by_slices(rows_ND, load_E.tolist())

    def _compute_by_slices(self, rows_ND: Tensor, load: list[int]) -> Tensor:
        outputs = [
            torch.addmm(own.bias_out, torch.addmm(own.bias_in, rows, own.weight_in).relu_(), own.weight_out)
            for rows, own in zip(rows_ND.split(load), self.each(), strict=True)
        ]
        return torch.cat(outputs)  # (N, O)


class SharedBase(nn.Module):
    """Weights (E, I, O) as a base that all share, and each expert's own addition of low rank: base + left · right."""

    def __init__(self, num_experts: int, fan_in: int, fan_out: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Parameter(draw_normal(fan_in, fan_out, times=math.sqrt(2 / fan_in)))  # (I, O)
        self.left = nn.Parameter(draw_normal(num_experts, fan_in, rank, over=math.sqrt(fan_in)))  # (E, I, R)
        self.right = nn.Parameter(draw_normal(num_experts, rank, fan_out, over=math.sqrt(rank)))  # (E, R, O)

    def full(self) -> Tensor:
        """(E, I, O)."""
        return torch.baddbmm(self.base.expand(len(self.left), -1, -1), self.left, self.right)

    def forward(self, rows_NI: Tensor, load: list[int], bias_EO: Tensor) -> Tensor:
        """Products of rows sorted by expert, the base's for all at once."""
        parts = zip(rows_NI.split(load), self.left, self.right, bias_EO, strict=True)
        own = [torch.addmm(bias, rows @ left, right) for rows, left, right, bias in parts]
        return torch.addmm(torch.cat(own), rows_NI, self.base)


class SharedBaseExperts(Experts):
    """Experts whose weights are a shared base and additions of low rank (D²-MoE, arXiv:2502.17298)."""

    layer_in: SharedBase
    layer_out: SharedBase

    def _add_layer(self, name: str, num_experts: int, fan_in: int, fan_out: int, config: SparseMoEConfig) -> None:
        assert config.shared_rank is not None
        self.add_module(f"layer_{name}", SharedBase(num_experts, fan_in, fan_out, config.shared_rank))
        self.register_parameter(f"bias_{name}", nn.Parameter(torch.zeros(num_experts, fan_out)))

    @property
    def weight_in(self) -> Tensor:  # type: ignore[override]
        return self.layer_in.full()

    @property
    def weight_out(self) -> Tensor:  # type: ignore[override]
        return self.layer_out.full()

    def _compute_by_slices(self, rows_ND: Tensor, load: list[int]) -> Tensor:
        outputs_NO: Tensor = self.layer_out(self.layer_in(rows_ND, load, self.bias_in).relu_(), load, self.bias_out)
        return outputs_NO


class SparseMoE(nn.Module):
    """Linear + ReLU, a sparse mixture of experts + ReLU, a linear head: `model(pixels) -> logits`, as `FFN`."""

    def __init__(self, config: SparseMoEConfig) -> None:
        super().__init__()
        self.config = config
        routing = config.routing
        self.normalize = Normalize(config.data, config.pool)
        (sees,) = find_planes(config.data, config.pool)
        self.stem = linear_chain(sees.num_values, config.model_width)[0]
        self.router = Router(
            config.model_width,
            routing.num_experts,
            routing.top_k,
            weighed_over=routing.weighed_over,
            noisy=routing.noise,
        )
        self.experts = Experts(config) if config.shared_rank is None else SharedBaseExperts(config)
        self.head = nn.ModuleList(linear_chain(config.output_width, *config.head_widths, config.data.num_classes))

    def forward(self, pixels: Tensor) -> Tensor:
        hidden_BD = self.embed(pixels)
        return self._mix(hidden_BD, self.router(hidden_BD))[0]

    def routed(self, pixels: Tensor) -> Routed:
        """The same forward pass, with the router's decisions and the load-balancing loss."""
        hidden_BD = self.embed(pixels)
        decision = self.router(hidden_BD)
        logits_BC, load_E, dropped_share = self._mix(hidden_BD, decision)
        parts = balance_parts(decision, load_E, self.config.routing.balance)
        return Routed(
            logits=logits_BC,
            router_probs=decision.logits_BE.softmax(dim=-1),
            experts=decision.experts_BK,
            weights=decision.weights_BK,
            auxiliary=parts,
            weighted={name: self.config.routing.balance_weight * part for name, part in parts.items()},
            expert_load=load_E,
            dropped_share=dropped_share,
        )

    def embed(self, pixels: Tensor) -> Tensor:
        """What router and experts see of the pixels (B, 1, height, width): (B, D)."""
        return apply_linear(self.stem, self.normalize(pixels)).relu_()

    def _mix(self, hidden_BD: Tensor, decision: Decision) -> tuple[Tensor, Tensor, float]:
        """Dispatch, compute, combine, classify. Returns the logits, the load per expert, the dropped share."""
        pairs = self.dispatch(decision)
        output_NO = self.experts(hidden_BD.index_select(0, pairs.row_N), pairs.kept_load_E)
        mixed_BO = self.combine(output_NO, pairs, decision)
        return relu_chain(self.head, mixed_BO.relu_()), pairs.load_E, pairs.dropped_share

    def dispatch(self, decision: Decision) -> Pairs:
        """The pairs sorted by expert; in training as many of each as there is room for."""
        num_experts, top_k = self.config.routing.num_experts, self.config.routing.top_k
        expert_N = decision.experts_BK.flatten()
        load_E = torch.bincount(expert_N, minlength=num_experts)
        order_N = expert_N.argsort(stable=True)
        kept_load_E, dropped_share = load_E, 0.0
        if self.training and self.config.routing.capacity_factor is not None:
            order_N, kept_load_E = limit_capacity(order_N, load_E, self.config.routing.capacity_factor)
            dropped_share = 1 - order_N.numel() / expert_N.numel()
        return Pairs(order_N, order_N // top_k, load_E, kept_load_E, dropped_share)

    def combine(self, output_NO: Tensor, pairs: Pairs, decision: Decision) -> Tensor:
        """The weighted sum (B, O) of what each image's experts say."""
        weighted_NO = output_NO * decision.weights_BK.flatten()[pairs.order_N].unsqueeze(1)
        mixed_BO = output_NO.new_zeros(len(decision.experts_BK), output_NO.shape[1])
        return mixed_BO.index_add_(0, pairs.row_N, weighted_NO)


class EveryExpert(nn.Module):
    """The same logits in evaluation, by running every expert on every image: linear layers and a gate, no sorting.

    For tools that trace a model, which cannot follow rows whose number depends on the data.
    """

    def __init__(self, model: SparseMoE) -> None:
        super().__init__()
        self.model = model
        experts = list(model.experts.each())
        self.layers_in = nn.ModuleList(linear_of(own.weight_in, own.bias_in) for own in experts)
        self.layers_out = nn.ModuleList(linear_of(own.weight_out, own.bias_out) for own in experts)
        self.train(model.training)

    def forward(self, pixels: Tensor) -> Tensor:
        model = self.model
        hidden_BD = model.embed(pixels)
        decision = model.router(hidden_BD)
        gate_BE = torch.zeros_like(decision.logits_BE).scatter(1, decision.experts_BK, decision.weights_BK)
        outputs = [
            apply_linear(layer_out, apply_linear(layer_in, hidden_BD).relu()) * gate_B.unsqueeze(1)  # (B, O)
            for layer_in, layer_out, gate_B in zip(self.layers_in, self.layers_out, gate_BE.unbind(1), strict=True)
        ]
        return relu_chain(model.head, torch.stack(outputs).sum(dim=0).relu_())  # (B, C)


def linear_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer of a weight (inputs, outputs) and a bias."""
    layer = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.detach().T.contiguous()), nn.Parameter(bias.detach().clone())
    return layer


def limit_capacity(order_N: Tensor, load_E: Tensor, capacity_factor: float) -> tuple[Tensor, Tensor]:
    """Keep at most ⌈c·N/E⌉ pairs per expert, in batch order.

    Args:
        order_N: pairs sorted by expert, in batch order within each expert.
        load_E: how many of them each expert has.

    Returns:
        The kept pairs in the same order, and how many of them each expert has.
    """
    capacity = math.ceil(min(capacity_factor * order_N.numel() / load_E.numel(), order_N.numel()))
    starts_E = load_E.cumsum(0) - load_E
    position_N = torch.arange(order_N.numel(), device=order_N.device) - starts_E.repeat_interleave(load_E)
    return order_N[position_N < capacity], load_E.clamp(max=capacity)


def balance_parts(decision: Decision, load_E: Tensor, balance: Balance) -> dict[str, Tensor]:
    """The raw parts of a load-balancing loss, by name; each but the wrong sign's is smallest when the load is even."""
    if balance == "entropy":
        return {"entropy": entropy_loss(decision.logits_BE)}
    if balance == "wrong-sign":
        return {"entropy_wrong_sign": math.log(load_E.numel()) - entropy_loss(decision.logits_BE)}
    if balance == "switch":
        return {"switch": switch_loss(decision.logits_BE, load_E)}
    if balance == "cv":
        importance_E = decision.weights_BK.new_zeros(load_E.numel()).index_add(
            0, decision.experts_BK.flatten(), decision.weights_BK.flatten()
        )
        return {"importance_cv2": squared_cv(importance_E), "load_cv2": squared_cv(smooth_load(decision))}
    return {}


def entropy_loss(logits_BE: Tensor) -> Tensor:
    """Log E − H(P), P the router's mean probability over the batch: 0 exactly when P is even."""
    mean_log_E = logits_BE.log_softmax(dim=-1).logsumexp(dim=0) - math.log(len(logits_BE))
    return math.log(logits_BE.shape[1]) + (mean_log_E.exp() * mean_log_E).sum()


def switch_loss(logits_BE: Tensor, load_E: Tensor) -> Tensor:
    """E·Σ f_i·P_i (arXiv:2101.03961, eq. 4): f the share of pairs, P the mean probability; 1 when even."""
    share_E = load_E / load_E.sum()
    return logits_BE.shape[1] * (share_E * logits_BE.softmax(dim=-1).mean(dim=0)).sum()


def squared_cv(amount_E: Tensor) -> Tensor:
    """Squared coefficient of variation, variance / mean² (arXiv:1701.06538, eq. 7); 0 when even."""
    return amount_E.var(unbiased=False) / (amount_E.mean().square() + 1e-10)


def smooth_load(decision: Decision) -> Tensor:
    """Expected number of images per expert under a fresh draw of its noise (arXiv:1701.06538, eqs. 8–10).

    Differentiable where the plain count is not. Without noise (evaluation), or with every expert
    chosen, it is the plain count.
    """
    logits_BE, top_k = decision.logits_BE, decision.experts_BK.shape[1]
    if decision.noise_std_BE is None or top_k == logits_BE.shape[1]:
        return torch.bincount(decision.experts_BK.flatten(), minlength=logits_BE.shape[1]).to(logits_BE.dtype)
    top = logits_BE.topk(top_k + 1, dim=-1).values
    is_chosen_BE = logits_BE >= top[:, top_k - 1 : top_k]
    # The bar that an expert must pass: the K-th largest logit among the others.
    bar_BE = torch.where(is_chosen_BE, top[:, top_k : top_k + 1], top[:, top_k - 1 : top_k])
    standard_normal = torch.distributions.Normal(0.0, 1.0)
    return standard_normal.cdf((decision.clean_logits_BE - bar_BE) / (decision.noise_std_BE + 1e-6)).sum(dim=0)
