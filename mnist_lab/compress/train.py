"""Training from scratch on the labels: what the other techniques start from, learn from or are compared with."""

from dataclasses import dataclass, field
from typing import ClassVar

from mnist_lab.data import DataSpec
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.models import ModelConfig, Preset, Shape, count_parameters
from mnist_lab.models.ffn import FFNConfig
from mnist_lab.models.moe import RoutingConfig
from mnist_lab.training import Objective, supervised_loss


def train(work: Work, config: ModelConfig, objective: Objective = supervised_loss) -> Made:
    """Initialise and train a model of this configuration on the whole recipe."""
    model = work.build(config)
    curves = work.fit(model, objective)
    trained = f"{count_parameters(model)[0]:,} parameters trained over {len(curves)} epochs"
    return Made(model, curves, {"text": trained, "epochs": len(curves)})


def dense_config(shape: Shape | tuple[int, ...], preset: Preset, data: DataSpec) -> FFNConfig:
    """A dense FFN, by the preset's name of its shape or by the widths of its hidden layers."""
    return FFNConfig(shape, data) if isinstance(shape, tuple) else preset.dense(shape, data)


@dataclass(frozen=True)
class TrainFFN:
    """A dense FFN."""

    label: ClassVar[str] = ""
    cost: ClassVar[float] = 1.0
    shape: Shape | tuple[int, ...] = field(default="ffn", metadata={"tag": None})

    def config(self, preset: Preset, data: DataSpec) -> FFNConfig:
        return dense_config(self.shape, preset, data)

    def make(self, work: Work) -> Made:
        return train(work, self.config(work.preset, work.dataset.spec))


@dataclass(frozen=True)
class TrainMoE:
    """A noisy top-K mixture of experts."""

    label: ClassVar[str] = "moe"
    cost: ClassVar[float] = 2.0
    routing: RoutingConfig = field(default_factory=RoutingConfig)

    def config(self, preset: Preset, data: DataSpec) -> ModelConfig:
        return preset.moe(data, self.routing)

    def make(self, work: Work) -> Made:
        return train(work, self.config(work.preset, work.dataset.spec))


@dataclass(frozen=True)
class TrainLike:
    """The rival of a compressed model: its architecture from scratch, with as many epochs as both its trainings had."""

    label: ClassVar[str] = "from scratch"
    cost: ClassVar[float] = 1.5
    budget: float = 1.2  # of the recipe's epochs: the original's, and a fifth of fine-tuning

    def make(self, work: Work) -> Made:
        assert work.teacher is not None  # which gives its size only
        model = work.build(work.teacher.config)
        curves = work.fit(model, budget=self.budget)
        text = f"{count_parameters(model)[0]:,} parameters trained from scratch over {len(curves)} epochs"
        return Made(model, curves, {"text": text})
