"""Knowledge distillation: a small student learns from a teacher's softened probabilities."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mnist_lab.compress.train import DenseShape, dense_config, train
from mnist_lab.data import DataSpec
from mnist_lab.errors import UserError
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.measure import EVALUATION_BATCH
from mnist_lab.models import Preset
from mnist_lab.models.ffn import FFNConfig
from mnist_lab.training import Batch, LossTerms, Objective, StepLoss, Term, run_forward

MAX_TEMPERATURE = 1e6  # far beyond use, and its square is still exact enough


@dataclass(frozen=True)
class DistillationConfig:
    """How soft the teacher's targets are, and how much they count against the labels."""

    temperature: float = field(default=3.0, metadata={"tag": "T"})
    """Divides the logits of teacher and student before the softmax; no unit."""
    alpha: float = field(default=0.7, metadata={"tag": "a"})
    """Weight of the distillation term, from 0 to 1; the labels' cross-entropy gets 1 - alpha."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature <= MAX_TEMPERATURE:
            raise UserError(f"--temperature {self.temperature} must be above 0 and at most {MAX_TEMPERATURE:g}")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"--alpha {self.alpha} must lie between 0 and 1")


def distillation_terms(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, config: DistillationConfig
) -> LossTerms:
    """α·T²·KL(p_teacher(T) ‖ p_student(T)) + (1 − α)·CE (Hinton et al. 2015, arXiv:1503.02531).

    The divergence is averaged per image. T² keeps its gradient at the scale of the labels' at any T.
    """
    divergence = F.kl_div(
        F.log_softmax(student_logits / config.temperature, dim=1),
        F.log_softmax(teacher_logits / config.temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return {
        "distillation": Term(divergence, config.alpha * config.temperature**2),
        "cross_entropy": Term(F.cross_entropy(student_logits, labels), 1 - config.alpha),
    }


def distillation_objective(
    teacher: nn.Module, config: DistillationConfig, *, device: str, fixed_pixels: Tensor | None = None
) -> Objective:
    """Train on what `teacher`, frozen and in evaluation mode, says of the same images.

    Args:
        fixed_pixels: the training pixels, where no augmentation changes them: the teacher then sees
            each image once, not once per epoch.
    """
    teacher = teacher.to(device).eval()
    all_logits = None
    if fixed_pixels is not None:
        with torch.no_grad():
            all_logits = torch.cat([teacher(pixels.to(device)) for pixels in fixed_pixels.split(EVALUATION_BATCH)])

    def objective(student: nn.Module, batch: Batch) -> StepLoss:
        with torch.no_grad():
            teacher_logits = teacher(batch.pixels) if all_logits is None else all_logits[batch.rows]
        forward = run_forward(student, batch.pixels)
        return forward.loss(distillation_terms(forward.logits, teacher_logits, batch.labels, config))

    return objective


def distil_from(teacher: nn.Module, config: DistillationConfig, work: Work) -> Objective:
    """The same on the images and the device of a work."""
    fixed_pixels = work.dataset.train.pixels if work.recipe.augmentation is None else None
    return distillation_objective(teacher, config, device=work.device, fixed_pixels=fixed_pixels)


@dataclass(frozen=True)
class Distil:
    """A small FFN that learns from its teacher's probabilities."""

    label: ClassVar[str] = "kd"
    cost: ClassVar[float] = 1.2
    distillation: DistillationConfig = DistillationConfig()
    shape: DenseShape = field(default="student", metadata={"tag": None})

    def config(self, preset: Preset, data: DataSpec) -> FFNConfig:
        return dense_config(self.shape, preset, data)

    def make(self, work: Work) -> Made:
        assert work.teacher is not None
        objective = distil_from(work.teacher, self.distillation, work)
        return train(work, self.config(work.preset, work.dataset.spec), objective)
