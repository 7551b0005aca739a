"""Training from scratch on the labels: what the other techniques start from, learn from or are compared with."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

from mnist_lab.data import DataSpec
from mnist_lab.deploy.onnx import stored_bytes
from mnist_lab.errors import UserError
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.models import Model, ModelConfig, Preset, Shape, build_skeleton, count_parameters, parameter_bytes
from mnist_lab.models.ffn import FFNConfig
from mnist_lab.models.moe import RoutingConfig, SparseMoEConfig
from mnist_lab.models.small import SmallShape
from mnist_lab.training import Objective, supervised_loss

MULTIPLE = 8  # of units: products of other widths are slower, or cannot be grouped by expert
NUM_STEPS = 256  # between a rival's widths and none
ALIGNMENT = 4  # floats: products grouped by expert take rows of whole 16 bytes
MAX_WIDTH = 4096


def train(work: Work, config: ModelConfig, objective: Objective = supervised_loss, *, budget: float = 1.0) -> Made:
    """Initialise and train a model of this configuration on the whole recipe, or that share of its epochs."""
    model = work.build(config)
    curves = work.fit(model, objective, budget=budget)
    trained = f"{count_parameters(model)[0]:,} parameters trained over {len(curves)} epochs"
    return Made(model, curves, {"text": trained, "epochs": len(curves)})


DenseShape = Shape | SmallShape | tuple[int, ...]


def dense_config(shape: DenseShape, preset: Preset, data: DataSpec) -> FFNConfig:
    """A dense FFN, by the name of its shape in the preset, its hidden widths, or a shape of the small family."""
    if isinstance(shape, SmallShape):
        return shape.config(data)
    return FFNConfig(shape, data) if isinstance(shape, tuple) else preset.dense(shape, data)


@dataclass(frozen=True)
class TrainFFN:
    """A dense FFN."""

    label: ClassVar[str] = ""
    cost: ClassVar[float] = 1.0
    shape: DenseShape = field(default="ffn", metadata={"tag": None})

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
class MixtureWidths:
    """Widths of a mixture, where they are not the preset's."""

    model_width: int | None = field(default=None, metadata={"tag": "m"})
    """Units of the layer before the experts, in place of the preset's."""
    expert_width: int | None = field(default=None, metadata={"tag": "h"})
    """Hidden units of each expert, in place of the preset's."""
    output_width: int | None = field(default=None, metadata={"tag": "o"})
    """Units that each expert gives, in place of the preset's."""

    def __post_init__(self) -> None:
        for name, width in vars(self).items():
            if width is not None and not (0 < width <= MAX_WIDTH and width % ALIGNMENT == 0):
                option = f"--{name.replace('_', '-')} {width}"
                raise UserError(f"{option} must be a multiple of {ALIGNMENT}, at most {MAX_WIDTH:,}")

    def departing(self, preset: Preset) -> "MixtureWidths":
        """The same without those that are the preset's own."""
        usual = zip(vars(self).items(), preset.moe_widths, strict=True)
        return MixtureWidths(**{name: None if width == own else width for (name, width), own in usual})

    def config(self, preset: Preset, data: DataSpec, routing: RoutingConfig) -> SparseMoEConfig:
        given = {name: width for name, width in vars(self).items() if width is not None}
        return replace(preset.moe(data, routing), **given)


@dataclass(frozen=True)
class TrainWidthsOfMoE(TrainMoE):
    """The same with other widths than the preset's."""

    widths: MixtureWidths = field(default_factory=MixtureWidths)

    def config(self, preset: Preset, data: DataSpec) -> ModelConfig:
        return self.widths.config(preset, data, self.routing)


@dataclass(frozen=True)
class TrainEarlyMoE:
    """A mixture that stops early, as the teachers of Cho and Hariharan (2019, arXiv:1910.01348) do."""

    label: ClassVar[str] = "early moe"
    cost: ClassVar[float] = 0.5
    budget: float = 0.25  # of the recipe's epochs

    def make(self, work: Work) -> Made:
        return train(work, work.preset.moe(work.dataset.spec), budget=self.budget)


@dataclass(frozen=True)
class TrainLike:
    """The rival of a compressed model, from scratch, with as many epochs as both its trainings had.

    It has the same architecture; where the other's zeros make its file smaller, one so much narrower that its own file
    is no larger.
    """

    label: ClassVar[str] = "from scratch"
    cost: ClassVar[float] = 1.5
    budget: float = 1.2  # of the recipe's epochs: the original's, and a fifth of fine-tuning

    def make(self, work: Work) -> Made:
        assert isinstance(work.teacher, Model)  # which gives its size only
        model = work.build(no_larger(work.teacher.config, stored_bytes(work.teacher)))
        curves = work.fit(model, budget=self.budget)
        text = f"{count_parameters(model)[0]:,} parameters trained from scratch over {len(curves)} epochs"
        return Made(model, curves, {"text": text})


def no_larger(config: ModelConfig, num_bytes: int) -> ModelConfig:
    """This architecture, or where its weights in FP32 take more bytes, a narrower one; not below 8 units a layer."""
    candidates = [config, *(narrower(config, step / NUM_STEPS) for step in range(NUM_STEPS, 0, -1))]
    fitting = (one for one in candidates if parameter_bytes(build_skeleton(one)) <= num_bytes)
    return next(fitting, candidates[-1])


def narrower(config: ModelConfig, share: float) -> ModelConfig:
    """All hidden widths, and channels of windows, times that, in multiples of 8."""

    def scale(width: int) -> int:
        return max(MULTIPLE, MULTIPLE * round(share * width / MULTIPLE))

    def scale_all(widths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(map(scale, widths))

    if isinstance(config, FFNConfig):
        windows = tuple(replace(own, channels=scale(own.channels)) for own in config.windows)
        return replace(config, widths=scale_all(config.widths), windows=windows)
    return replace(
        config,
        model_width=scale(config.model_width),
        expert_width=scale(config.expert_width),
        output_width=scale(config.output_width),
        head_widths=scale_all(config.head_widths),
        expert_widths=None if config.expert_widths is None else scale_all(config.expert_widths),
    )
