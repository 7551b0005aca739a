"""The architectures: two presets of the dense FFN, the sparse MoE and the distilled student."""

from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from mnist_lab.data import DataSpec
from mnist_lab.models.ffn import FFN, FFNConfig
from mnist_lab.models.moe import BASES, ExpertWeights, RoutingConfig, SparseMoE, SparseMoEConfig

PresetName = Literal["compact", "wide"]
Shape = Literal["ffn", "student", "equal-active", "equal-total"]
Model = FFN | SparseMoE
ModelConfig = FFNConfig | SparseMoEConfig


@dataclass(frozen=True)
class Preset:
    """Widths of one set of models."""

    ffn_widths: tuple[int, ...]
    student_widths: tuple[int, ...]
    moe_widths: tuple[int, int, int]  # model, expert, expert output
    moe_head_widths: tuple[int, ...]

    def ffn(self, data: DataSpec) -> FFNConfig:
        return FFNConfig(self.ffn_widths, data)

    def student(self, data: DataSpec) -> FFNConfig:
        return FFNConfig(self.student_widths, data)

    def moe(self, data: DataSpec, routing: RoutingConfig = RoutingConfig()) -> SparseMoEConfig:
        return SparseMoEConfig(*self.moe_widths, self.moe_head_widths, routing, data)

    def dense(self, shape: Shape, data: DataSpec) -> FFNConfig:
        """One of the preset's dense shapes, among them the MoE's rivals of equal size per image or in all."""
        if shape in {"ffn", "student"}:
            return self.ffn(data) if shape == "ffn" else self.student(data)
        moe = self.moe(data)
        return dense_rival(moe, moe.routing.top_k if shape == "equal-active" else moe.routing.num_experts)


PRESETS: dict[PresetName, Preset] = {
    "compact": Preset((256, 128), (128,), (256, 256, 256), ()),
    "wide": Preset((512, 256, 128), (256, 128), (512, 256, 256), (128,)),
}


def dense_rival(moe: SparseMoEConfig, num_experts: int) -> FFNConfig:
    """The dense FFN with one expert as wide as that many: K for as many parameters per image, E for as many in all."""
    widths = (moe.model_width, num_experts * moe.expert_width, moe.output_width, *moe.head_widths)
    return FFNConfig(widths, moe.data, pool=moe.pool)


def build_model(config: ModelConfig) -> Model:
    """A freshly initialised model; the weights come from torch's default generator."""
    return SparseMoE(config) if isinstance(config, SparseMoEConfig) else FFN(config)


def build_skeleton(config: ModelConfig) -> Model:
    """A model without weights, which takes no memory however large its configuration says it is."""
    with torch.device("meta"):
        return build_model(config)


def config_from_dict(fields: dict[str, Any]) -> ModelConfig:
    """Undo `dataclasses.asdict` on a model's configuration, as JSON holds it.

    Raises:
        ValueError: the fields are not those of a known architecture.
    """
    if fields.get("kind") == "moe":
        return msgspec.convert(fields, SparseMoEConfig)
    return msgspec.convert(fields, FFNConfig)


def inference_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that inference needs: all but the router's noise and units of zeros of narrower experts."""
    needed = {name: parameter.detach() for name, parameter in model.named_parameters() if name != "router.noise"}
    if isinstance(model, SparseMoE) and model.config.expert_widths is not None:
        for part in ExpertWeights._fields:
            del needed[f"experts.{part}"]
        for expert, own in enumerate(model.experts.each()):
            needed |= {f"experts.{expert}.{part}": weight.detach() for part, weight in own._asdict().items()}
    return needed


def count_parameters(model: Model) -> tuple[int, int]:
    """Parameters that inference needs, and those that one image uses (on average K of E experts)."""
    sizes = {name: parameter.numel() for name, parameter in inference_parameters(model).items()}
    total = sum(sizes.values())
    if not isinstance(model, SparseMoE):
        return total, total
    routing = model.config.routing
    in_experts = sum(size for name, size in sizes.items() if name.startswith("experts.") and name not in BASES)
    return total, total - in_experts + in_experts * routing.top_k // routing.num_experts


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of the parameters that inference needs."""
    return sum(parameter.nbytes for parameter in inference_parameters(model).values())
