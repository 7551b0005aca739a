"""Refining: a compressed model goes on learning, from the labels and from what a teacher says of the same images.

What was left out stays out: weights that are zero stay zero. Weights that were trained on a few levels leave them.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from mnist_lab.compress.distill import DistillationConfig, distil_from
from mnist_lab.compress.finetune import Duration, recover
from mnist_lab.errors import UserError
from mnist_lab.experiments.technique import Made, Work


@dataclass(frozen=True)
class Refine:
    """A model, of any architecture, that learns on from a finished teacher: most often from what it was made from."""

    label: ClassVar[str] = "kd"
    cost: ClassVar[float] = 0.5
    duration: Duration = field(default_factory=Duration)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)

    def __post_init__(self) -> None:
        if self.duration.finetune_epochs == 0:
            raise UserError("--finetune-epochs 0 would teach it nothing")

    def make(self, work: Work) -> Made:
        model = work.source
        assert model is not None
        assert work.teacher is not None
        epochs = self.duration.num_epochs(work)
        curves = recover(work, model, distil_from(work.teacher, self.distillation, work), epochs=epochs)
        return Made(model, curves, {"text": f"learned from its teacher over {epochs} epochs", "epochs": epochs})
