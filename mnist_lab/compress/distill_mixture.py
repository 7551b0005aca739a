"""A mixture of experts learns from a larger one: its logits, where it routes images, and what its experts give.

The loss is α·T²·KL(p ‖ q) + (1 − α)·CE of the logits (distill.py), the student's own load balancing, and

    β·KL(P ‖ Q) + γ·Σ_j ‖map(y_j) − t_j‖² / Σ_j ‖t_j‖²

P, Q   what the routers of teacher and student give groups of experts for an image: softmax over all, without noise
y_j    what the student's expert j gives, of every image and not only of those that choose it (arXiv:2502.12947)
t_j    what the teacher's experts of its group give of the same image, on average
map    linear, one for all experts, learned with the student and then dropped; none where their outputs are as wide

Experts are assigned by their places: with M the smaller of their numbers, expert i of either stands in group i mod M.
Which of its experts becomes whose is up to the student, as all of them are drawn anew.

Shapes: B images, E experts, M groups of them, O expert output width.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mnist_lab.compress.distill import DistillationConfig, distillation_objective
from mnist_lab.compress.layer_by_layer import relative_error
from mnist_lab.data import DataSpec
from mnist_lab.errors import UserError
from mnist_lab.experiments.technique import Made, Proof, Work
from mnist_lab.models import Model, count_parameters
from mnist_lab.models.moe import MAX_EXPERTS, RoutingConfig, SparseMoE, SparseMoEConfig
from mnist_lab.training import Batch, LossTerms, Objective, StepLoss, Term

ALIGNMENT = 4  # floats: products grouped by expert take rows of whole 16 bytes
MAX_WIDTH = 4096


@dataclass(frozen=True)
class SmallMixture:
    """How large the student is; each image visits as many experts as in its teacher, as far as there are so many."""

    student_experts: int = field(default=2, metadata={"tag": "E"})
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

    def config(self, teacher: Model, data: DataSpec) -> SparseMoEConfig:
        """Routed and balanced as the teacher, or if that is no mixture, as mixtures are by default."""
        routing = teacher.config.routing if isinstance(teacher, SparseMoE) else RoutingConfig()
        num, width = self.student_experts, self.student_width
        routing = replace(routing, num_experts=num, top_k=min(num, routing.top_k))
        return SparseMoEConfig(width, width, width, (), routing, data)


@dataclass(frozen=True)
class Matching:
    """What of a mixture a smaller one learns besides its logits."""

    router_weight: float = field(default=0.1, metadata={"tag": "r"})
    """Weight of the divergence of --student moe's router from its teacher's; 0 for none."""
    experts_weight: float = field(default=0.1, metadata={"tag": "x"})
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


def group_of(num_experts: int, num_groups: int) -> Tensor:
    """(E,): the group of each expert."""
    return torch.arange(num_experts) % num_groups


def match_experts(num_theirs: int, num_ours: int) -> list[tuple[list[int], list[int]]]:
    """The teacher's and the student's experts of each group."""
    num_groups = min(num_theirs, num_ours)
    return [
        (list(range(group, num_theirs, num_groups)), list(range(group, num_ours, num_groups)))
        for group in range(num_groups)
    ]


def sum_groups(values: Tensor, num_groups: int) -> Tensor:
    """(M, …): of values (E, …)."""
    groups_E = group_of(len(values), num_groups).to(values.device)
    return values.new_zeros(num_groups, *values.shape[1:]).index_add(0, groups_E, values)


def router_divergence(student_BE: Tensor, teacher_BE: Tensor) -> Tensor:
    """KL(P ‖ Q) of the groups, mean over images, from the routers' logits without noise."""
    num_groups = min(student_BE.shape[1], teacher_BE.shape[1])
    ours_MB, theirs_MB = (sum_groups(logits.softmax(dim=1).T, num_groups) for logits in (student_BE, teacher_BE))
    smallest = torch.finfo(ours_MB.dtype).tiny  # whose logarithm is finite
    ours_MB, theirs_MB = ours_MB.clamp(min=smallest), theirs_MB.clamp(min=smallest)
    return (theirs_MB * (theirs_MB.log() - ours_MB.log())).sum(dim=0).mean()


def experts_error(student_EBO: Tensor, teacher_EBO: Tensor) -> Tensor:
    """How far all of the student's experts are from their groups', relative to these."""
    num_groups = min(len(student_EBO), len(teacher_EBO))
    sizes_M = group_of(len(teacher_EBO), num_groups).bincount().to(teacher_EBO.device)
    means_MBO = sum_groups(teacher_EBO, num_groups) / sizes_M.view(-1, 1, 1)
    return relative_error(student_EBO, means_MBO[group_of(len(student_EBO), num_groups)])


def mixture_objective(teacher: Model, distil_logits: Objective, matching: Matching) -> Objective:
    """What `distil_logits` says of the student, and the terms of router and experts that weigh anything.

    Args:
        teacher: where they do, a mixture; frozen, in evaluation mode, and where the training is.
    """

    def objective(model: nn.Module, batch: Batch) -> StepLoss:
        assert isinstance(model, MappedStudent)
        loss = distil_logits(model.student, batch)
        return replace(loss, terms=loss.terms | matching_terms(model, teacher, batch.pixels, matching))

    return objective


def matching_terms(model: MappedStudent, teacher: Model, pixels: Tensor, matching: Matching) -> LossTerms:
    """Those of router and experts, on the same images."""
    if not matching.needs_mixture:
        return {}
    assert isinstance(teacher, SparseMoE)
    student, terms = model.student, LossTerms()
    ours_BD = student.embed(pixels)
    with torch.no_grad():
        theirs_BD = teacher.embed(pixels)
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
    return terms


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
        model = self._build(work, teacher)
        fixed_pixels = work.dataset.train.pixels if work.recipe.augmentation is None else None
        distil_logits = distillation_objective(
            teacher, self.distillation, device=work.device, fixed_pixels=fixed_pixels
        )
        curves = work.fit(model, mixture_objective(teacher, distil_logits, self.matching))
        trained = f"{count_parameters(model.student)[0]:,} parameters trained over {len(curves)} epochs"
        proof: Proof = {"text": trained, "epochs": len(curves)}
        if self.matching.needs_mixture:
            assert isinstance(teacher, SparseMoE)
            groups = match_experts(teacher.config.routing.num_experts, self.student.student_experts)
            said = ", ".join(" → ".join(" and ".join(map(str, side)) for side in group) for group in groups)
            proof |= {"text": f"{trained}; experts of teacher and student matched: {said}", "groups": groups}
        return Made(model.student, curves, proof)

    def _build(self, work: Work, teacher: Model) -> MappedStudent:
        """The student, and where its experts are matched and of another width than the teacher's, a map to that."""
        student = work.build(self.student.config(teacher, work.dataset.spec))
        assert isinstance(student, SparseMoE)
        mapping: nn.Module = nn.Identity()
        if self.matching.experts_weight > 0:
            assert isinstance(teacher, SparseMoE)
            own, target = student.config.output_width, teacher.config.output_width
            if own != target:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(work.seed)
                    mapping = nn.Linear(own, target, bias=False)
        return MappedStudent(student, mapping)
