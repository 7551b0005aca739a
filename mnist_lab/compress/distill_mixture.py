"""A mixture of experts learns from a larger one: its logits, where it routes images, and what its experts give.

The loss is α·T²·KL(p ‖ q) + (1 − α)·CE of the logits (distill.py), the student's own load balancing, and

    β·KL(P ‖ Q) + γ·Σ_j ‖map(y_j) − t_j‖² / Σ_j ‖t_j‖²

P, Q   what the routers of teacher and student give groups of experts for an image: softmax over all, without noise
y_j    what the student's expert j gives, of every image and not only of those that choose it (arXiv:2502.12947)
t_j    what the teacher's experts of its group give of the same image, on average
map    linear, one for all experts, learned with the student and then dropped; none where their outputs are as wide

Experts are assigned by their places: with M the smaller of both numbers, expert i of teacher or student stands in group
i mod M, so that groups are as even as the teacher's load. To put those of the teacher's together whose outputs resemble
each other did no better, and makes uneven groups.

Shapes: B images, E experts, M groups of them, D model width, O expert output width.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mnist_lab.compress.distill import DistillationConfig, distil_from
from mnist_lab.compress.layer_by_layer import relative_error
from mnist_lab.compress.train import ALIGNMENT, MAX_WIDTH, train
from mnist_lab.data import DataSpec
from mnist_lab.errors import UserError
from mnist_lab.experiments.technique import Made, Work
from mnist_lab.models import count_parameters
from mnist_lab.models.moe import MAX_EXPERTS, RoutingConfig, SparseMoE, SparseMoEConfig
from mnist_lab.training import Batch, LossTerms, Objective, StepLoss, Term


@dataclass(frozen=True)
class SmallMixture:
    """How large the student is; each image visits as many experts as in its teacher, as far as there are so many."""

    student_experts: int = field(default=4, metadata={"tag": "E"})
    """Experts of --student moe."""
    student_width: int = field(default=64, metadata={"tag": "w"})
    """Width of the --student moe: of what its experts see, have inside, and give."""

    def __post_init__(self) -> None:
        if not 1 <= self.student_experts <= MAX_EXPERTS:
            raise UserError(f"--student-experts {self.student_experts} must lie between 1 and {MAX_EXPERTS:,}")
        if not (ALIGNMENT <= self.student_width <= MAX_WIDTH and self.student_width % ALIGNMENT == 0):
            raise UserError(
                f"--student-width {self.student_width} must be a multiple of {ALIGNMENT}, at most {MAX_WIDTH:,}"
            )

    def config(self, teacher: nn.Module, data: DataSpec) -> SparseMoEConfig:
        """Routed and balanced as the teacher, or if that is no mixture, as mixtures are by default."""
        routing = teacher.config.routing if isinstance(teacher, SparseMoE) else RoutingConfig()
        num, width = self.student_experts, self.student_width
        routing = replace(routing, num_experts=num, top_k=min(num, routing.top_k))
        return SparseMoEConfig(width, width, width, (), routing, data)


@dataclass(frozen=True)
class Matching:
    """What of a mixture a smaller one learns besides its logits."""

    router_weight: float = field(default=0.3, metadata={"tag": "r"})
    """Weight of the divergence of --student moe's router from its teacher's; 0 for none."""
    experts_weight: float = field(default=0.3, metadata={"tag": "x"})
    """Weight of the relative error of all experts' outputs against those of --student moe's teacher; 0 for none."""

    def __post_init__(self) -> None:
        for name, weight in (("router", self.router_weight), ("experts", self.experts_weight)):
            if not 0 <= weight < float("inf"):
                raise UserError(f"--{name}-weight {weight} must be a finite number, 0 or more")

    @property
    def needs_mixture(self) -> bool:
        """Whether the teacher must be one."""
        return self.router_weight > 0 or self.experts_weight > 0


class MappedStudent(nn.Module):
    """A student in training, and beside it what maps its experts' outputs (…, O) to the width of its teacher's."""

    def __init__(self, student: SparseMoE, mapping: nn.Module) -> None:
        super().__init__()
        self.student, self.mapping = student, mapping

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.student(pixels)
        return logits


def match_experts(num_theirs: int, num_ours: int) -> list[tuple[list[int], list[int]]]:
    """The teacher's and the student's experts of each group."""
    num_groups = min(num_theirs, num_ours)
    return [
        (list(range(group, num_theirs, num_groups)), list(range(group, num_ours, num_groups)))
        for group in range(num_groups)
    ]


def group_of(num_experts: int, num_groups: int, device: torch.device) -> Tensor:
    """(E,): the group of each expert."""
    return torch.arange(num_experts, device=device) % num_groups


def sum_groups(values: Tensor, num_groups: int) -> Tensor:
    """(M, …): of values (E, …)."""
    groups_E = group_of(len(values), num_groups, values.device)
    return values.new_zeros(num_groups, *values.shape[1:]).index_add(0, groups_E, values)


def router_divergence(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """KL(P ‖ Q) of the groups, mean over images, from the routers' logits without noise."""
    num_groups = min(student_BE.shape[1], teacher_BE.shape[1])
    ours_MB, theirs_MB = (sum_groups(logits.softmax(dim=1).T, num_groups) for logits in (student_BE, teacher_BE))
    smallest = torch.finfo(ours_MB.dtype).tiny  # whose logarithm is finite
    ours_MB, theirs_MB = ours_MB.clamp(min=smallest), theirs_MB.clamp(min=smallest)
    return (theirs_MB * (theirs_MB.log() - ours_MB.log())).sum(dim=0).mean()


def experts_error(student_EBO: Tensor, teacher_EBO: Tensor) -> Tensor:
    """How far all of the student's experts are from their groups' mean, relative to that."""
    num_groups = min(len(student_EBO), len(teacher_EBO))
    sizes_M = group_of(len(teacher_EBO), num_groups, teacher_EBO.device).bincount()
    means_MBO = sum_groups(teacher_EBO, num_groups) / sizes_M.view(-1, 1, 1)
    return relative_error(student_EBO, means_MBO[group_of(len(student_EBO), num_groups, means_MBO.device)])


def mixture_objective(distil_logits: Objective, teacher: SparseMoE, matching: Matching) -> Objective:
    """What `distil_logits` says of the student, and the terms of router and experts that weigh anything.

    Args:
        teacher: frozen, in evaluation mode, and where the training is.
    """

    def objective(model: nn.Module, batch: Batch) -> StepLoss:
        assert isinstance(model, MappedStudent)
        student, terms = model.student, LossTerms()
        ours_BD = student.embed(batch.pixels)
        with torch.no_grad():
            theirs_BD = teacher.embed(batch.pixels)
        if matching.router_weight > 0:
            with torch.no_grad():
                target_BE = theirs_BD @ teacher.router.gate
            divergence = router_divergence(ours_BD @ student.router.gate, target_BE)
            terms["router"] = Term(divergence, matching.router_weight)
        if matching.experts_weight > 0:
            with torch.no_grad():
                target_EBO = teacher.experts.on_all(theirs_BD)
            error = experts_error(model.mapping(student.experts.on_all(ours_BD)), target_EBO)
            terms["experts"] = Term(error, matching.experts_weight)
        loss = distil_logits(student, batch)
        return replace(loss, terms=loss.terms | terms)

    return objective


@dataclass(frozen=True)
class DistilMixture:
    """A small mixture that learns from a larger one; or, where nothing else is matched, from any model's logits."""

    label: ClassVar[str] = "kd"
    cost: ClassVar[float] = 2.0
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    student: SmallMixture = SmallMixture()
    matching: Matching = Matching()

    def make(self, work: Work) -> Made:
        teacher = work.teacher
        assert teacher is not None
        config = self.student.config(teacher, work.dataset.spec)
        distil_logits = distil_from(teacher, self.distillation, work)
        if not self.matching.needs_mixture:
            return train(work, config, distil_logits)
        assert isinstance(teacher, SparseMoE)
        student = work.build(config)
        assert isinstance(student, SparseMoE)
        model = MappedStudent(student, self._make_map(work, config, teacher.config))
        curves = work.fit(model, mixture_objective(distil_logits, teacher, self.matching))
        groups = match_experts(teacher.config.routing.num_experts, config.routing.num_experts)
        said = ", ".join(" → ".join(" and ".join(map(str, side)) for side in group) for group in groups)
        trained = f"{count_parameters(student)[0]:,} parameters trained over {len(curves)} epochs"
        text = f"{trained}; experts of teacher and student matched: {said}"
        return Made(student, curves, {"text": text, "epochs": len(curves), "groups": groups})

    def _make_map(self, work: Work, ours: SparseMoEConfig, theirs: SparseMoEConfig) -> nn.Module:
        if self.matching.experts_weight == 0 or ours.output_width == theirs.output_width:
            return nn.Identity()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(work.seed)
            return nn.Linear(ours.output_width, theirs.output_width, bias=False)
