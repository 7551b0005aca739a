import math

import pytest
import torch
from torch.nn import functional as F

from mnist_lab.compress.distill import DistillationConfig, distillation_objective, distillation_terms
from mnist_lab.errors import UserError
from mnist_lab.training import Batch, sum_terms

TEACHER = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.0]])
STUDENT = torch.tensor([[0.0, 1.0, 0.0], [1.0, -1.0, 0.3]])
LABELS = torch.tensor([0, 2])


def test_terms_are_hintons_by_hand() -> None:
    temperature, alpha = 2.0, 0.6
    divergence = 0.0
    for teacher, student in zip(TEACHER.tolist(), STUDENT.tolist(), strict=True):
        p = [math.exp(z / temperature) for z in teacher]
        q = [math.exp(z / temperature) for z in student]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        divergence += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    terms = distillation_terms(STUDENT, TEACHER, LABELS, DistillationConfig(temperature, alpha))
    assert terms["distillation"].value.item() == pytest.approx(divergence / 2, rel=1e-5)
    assert terms["distillation"].weight == pytest.approx(alpha * temperature**2)
    assert terms["cross_entropy"].value.item() == pytest.approx(F.cross_entropy(STUDENT, LABELS).item(), rel=1e-5)
    assert terms["cross_entropy"].weight == pytest.approx(0.4)


def test_gradient_keeps_its_scale_at_high_temperature() -> None:
    """As T grows, T²·KL tends to half the squared distance of centred logits, divided by the classes (§2.1)."""
    student = STUDENT.clone().requires_grad_()
    sum_terms(distillation_terms(student, TEACHER, LABELS, DistillationConfig(1000.0, 1.0))).backward()
    centred = (STUDENT - STUDENT.mean(dim=1, keepdim=True)) - (TEACHER - TEACHER.mean(dim=1, keepdim=True))
    assert student.grad is not None
    torch.testing.assert_close(student.grad, centred / 3 / 2, atol=2e-3, rtol=2e-2)


def test_perfect_student_pays_nothing_at_alpha_one() -> None:
    terms = distillation_terms(TEACHER, TEACHER, LABELS, DistillationConfig(3.0, 1.0))
    assert sum_terms(terms).item() == pytest.approx(0, abs=1e-6)


def test_teacher_is_frozen_and_in_evaluation_mode() -> None:
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(4, 3)).train()
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    objective = distillation_objective(teacher, DistillationConfig(), device="cpu")
    batch = Batch(torch.rand(2, 1, 2, 2), LABELS, torch.arange(2))
    first, second = (sum_terms(objective(student, batch).terms) for _ in range(2))
    first.backward()
    assert torch.equal(first, second)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    "values", [(0.0, 0.5), (-1.0, 0.5), (float("nan"), 0.5), (1e200, 0.5), (3.0, 1.1), (3.0, -0.1)]
)
def test_impossible_settings_are_the_users_error(values: tuple[float, float]) -> None:
    with pytest.raises(UserError):
        DistillationConfig(*values)


def test_teacher_sees_fixed_images_once_and_says_the_same() -> None:
    calls = 0

    class Teacher(torch.nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return 5 * pixels.flatten(1)[:, :3]

    pixels = torch.rand(6, 1, 2, 2)
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    once = distillation_objective(Teacher(), DistillationConfig(), device="cpu", fixed_pixels=pixels)
    anew = distillation_objective(Teacher(), DistillationConfig(), device="cpu")
    calls = 0
    rows = torch.tensor([4, 1])
    batch = Batch(pixels[rows], LABELS, rows)
    assert torch.equal(
        once(student, batch).terms["distillation"].value, anew(student, batch).terms["distillation"].value
    )
    assert calls == 1  # the second objective's
