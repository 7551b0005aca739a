"""Quantization-aware training (QAT): a model learns with its weights rounded, and keeps them so (fake_quant.py)."""

import copy
import math
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from mnist_lab.compress.fake_quant import RoundedActivations, fold, round_in_training, roundings
from mnist_lab.compress.finetune import BUDGET, Finetuning, finetune, num_steps, objective_of, zeros_kept
from mnist_lab.compress.gptq import CALIBRATION_SIZE
from mnist_lab.compress.layer_by_layer import layer_objective
from mnist_lab.compress.levels import ActivationBits, Bits, Rounding, RouterBits, name_of, on_levels
from mnist_lab.data import Split
from mnist_lab.errors import RunFailed, UserError
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.models import Model
from mnist_lab.models.ffn import FFN
from mnist_lab.training import Batch, EpochMetrics, Objective, StepLoss

Learn = Literal["task", "layers"]
RATE = 0.4  # of the recipe's learning rate
BUDGET_OF_FEW = 0.5  # levels or weights, of the recipe's epochs


@dataclass(frozen=True)
class Quantization:
    """What is rounded in training, and what the rounded model learns."""

    rounding: Rounding = field(default_factory=Rounding)
    router_bits: RouterBits = field(default=None, metadata={"tag": "router"})
    """Of the weights of an MoE's router; when not given, it stays in float."""
    activation_bits: ActivationBits = field(default=None, metadata={"tag": "a"})
    """Of what goes from layer to layer, in training and in the artifact; when not given, it is not rounded."""
    start: Literal["trained", "scratch"] = field(default="trained", metadata={"tag": ""})
    """Start from the trained model; or from fresh weights, and train for the whole recipe."""
    learn: Learn = field(default="task", metadata={"tag": None})
    """The task, with the whole network; or layer by layer, without labels, what the trained model's layers give."""

    @property
    def is_int8(self) -> bool:
        """Whether all is rounded as INT8 rounds it, and nothing else: it is exported so."""
        return (self.rounding, self.router_bits, self.activation_bits) == (Rounding(8), None, 8)

    def __post_init__(self) -> None:
        if self.learn == "layers" and (self.start == "scratch" or self.activation_bits is not None):
            raise UserError("--learn layers starts from the trained model and rounds weights alone")


@dataclass(frozen=True)
class Learning(Finetuning):
    """For how long a model learns with rounded weights, and from whom."""

    finetune_epochs: int | None = field(default=None, metadata={"tag": "ft"})
    """Passes over the training images, 0 for none; when not given, a fifth of the recipe's, of ternary weights, those
    of 1 bit, and small students half."""


@dataclass(frozen=True)
class TrainQuantized:
    """A model with weights of few bits that learned with them."""

    cost: ClassVar[float] = 1.0
    quantization: Quantization = field(default_factory=Quantization)
    training: Learning = field(default_factory=Learning)

    @property
    def label(self) -> str:
        return "qat" if self.quantization.learn == "task" else "layer-wise ptq"

    def __post_init__(self) -> None:
        if self.quantization.start == "scratch" and self.training.finetune_epochs is not None:
            raise UserError("--start scratch trains for the whole recipe: drop --finetune-epochs, or give --epochs")
        if self.quantization.learn == "layers" and self.training.teacher != "none":
            raise UserError("--learn layers has the trained model's layers as teachers: drop --teacher")

    def make(self, work: Work) -> Made:
        before, config = work.source, self.quantization
        assert before is not None
        model = copy.deepcopy(before) if config.start == "trained" else work.build(before.config)
        with zeros_kept(model):
            for weight, rounding in roundings(model, config.rounding, config.router_bits):
                round_in_training(weight, rounding, as_int8=config.is_int8)
            curves = self._train(work, model, before)
            fold(model)
        on_levels_of = count_on_levels(model, config)
        how = "the task" if config.learn == "task" else "their layers' outputs before"
        counted = ", ".join(f"{num:,} of {name_of(bits)}" for bits, num in on_levels_of.items())
        proof = {"weights": {str(bits): num for bits, num in on_levels_of.items()}, "epochs": len(curves)}
        return Made(model, curves, {"text": f"weights: {counted}; learned {how} over {len(curves)} epochs", **proof})

    def _train(self, work: Work, model: Model, before: Model) -> list[EpochMetrics]:
        config = self.quantization
        is_small = isinstance(model, FFN) and model.config.is_small
        budget = BUDGET_OF_FEW if config.rounding.bits in {"ternary", 1} or is_small else BUDGET
        training = replace(self.training, finetune_epochs=self.training.num_epochs(work, budget))
        wrap = partial(with_rounded_weights, activation_bits=config.activation_bits)
        if config.learn == "layers":
            few = with_images(work, CALIBRATION_SIZE)
            epochs = math.ceil(num_steps(work, training.num_epochs(work)) / num_steps(few, 1))
            rate = RATE * work.recipe.learning_rate
            objective = wrap(layer_objective(copy.deepcopy(before).to(work.device)))
            return few.fit(model, objective, epochs=epochs, learning_rate=rate) if epochs else []
        if config.start == "scratch":
            return work.fit(model, wrap(objective_of(work, before, training)))
        return finetune(work, model, before, training, wrap=wrap, rate=RATE)


def with_rounded_weights(objective: Objective, activation_bits: ActivationBits) -> Objective:
    """The same objective, with weights rounded once a step, wherever they are used, and activations of so many bits."""

    def rounded(model: nn.Module, batch: Batch) -> StepLoss:
        activations = nullcontext() if activation_bits is None else RoundedActivations(activation_bits)
        with parametrize.cached(), activations:
            return objective(model, batch)

    return rounded


def with_images(work: Work, num_images: int) -> Work:
    """The same with no more training images than that, those that others calibrate on, and no labels."""
    pixels = work.calibration(num_images)
    no_labels = torch.zeros(len(pixels), dtype=torch.int64)
    return replace(work, dataset=replace(work.dataset, train=Split(pixels, no_labels)))


def count_on_levels(model: Model, config: Quantization) -> Counter[Bits]:
    """How many weights of a model that was trained so have how many bits; all of them lie on their levels.

    Raises:
        RunFailed: some do not.
    """
    count: Counter[Bits] = Counter()
    for weight, rounding in roundings(model, config.rounding, config.router_bits):
        for matrix in weight.matrices():
            count[rounding.bits] += matrix.numel()
            if on_levels(matrix.numpy(), rounding) is None:
                raise RunFailed(f"the trained weights do not lie on levels of {name_of(rounding.bits)}")
    return count
