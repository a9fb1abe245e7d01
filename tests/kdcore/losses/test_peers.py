"""Soft targets and relational losses beside torchdistill; the other losses are compared in their own files."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses import angle_relations, distance_relations, soft_targets

peer = pytest.importorskip("torchdistill.losses.mid_level", reason="torchdistill is not installed")


def outputs(student: Tensor, teacher: Tensor) -> tuple[dict, dict]:
    return {"x": {"output": student}}, {"x": {"output": teacher}}


def pair(rows: int, width: int, teacher_width: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, width, generator=generator, dtype=torch.float64).requires_grad_()
    return student, torch.randn(rows, teacher_width or width, generator=generator, dtype=torch.float64)


def test_soft_targets_agree_and_the_peer_loses_its_temperature() -> None:
    student, teacher = pair(6, 9)
    labels = torch.arange(6)
    given = outputs(student, teacher)

    def theirs(alpha: float) -> Tensor:
        return peer.KDLoss("x", "output", "x", "output", temperature=4.0, alpha=alpha)(*given, labels)

    ours = soft_targets(student, teacher, temperature=4.0)
    mixed = 0.5 * F.cross_entropy(student, labels) + 0.5 * ours
    torch.testing.assert_close(theirs(0.5), mixed, rtol=1e-5, atol=1e-7)
    # at alpha 0 torchdistill 1.1.5 returns the divergence without T^2, 16 times less; at 1e-9 with it
    torch.testing.assert_close(theirs(1e-9), ours, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(theirs(0.0), ours / 16, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("factors", "loss"), [((1.0, 0.0), distance_relations), ((0.0, 1.0), angle_relations)])
def test_relations_agree_in_value_and_gradient(factors: tuple, loss) -> None:
    student, teacher = pair(12, 5, 7)
    theirs = peer.RKDLoss("x", "x", dist_factor=factors[0], angle_factor=factors[1], reduction="mean")
    want, got = theirs(*outputs(student, teacher)), loss(student, teacher)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)
    (want_gradient,), (got_gradient,) = torch.autograd.grad(want, student), torch.autograd.grad(got, student)
    torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-5, atol=1e-9)


def naive_angles(student: Tensor, teacher: Tensor) -> Tensor:
    def cosines(rows: Tensor) -> Tensor:
        directions = F.normalize(rows[None] - rows[:, None], dim=2)
        return torch.bmm(directions, directions.transpose(1, 2))

    return F.smooth_l1_loss(cosines(student), cosines(teacher))


def test_angles_have_the_naive_gradient_to_twelve_digits_and_survive_what_breaks_the_peer() -> None:
    student, teacher = pair(64, 32)
    (want,) = torch.autograd.grad(naive_angles(student, teacher), student)
    (got,) = torch.autograd.grad(angle_relations(student, teacher), student)
    assert (got - want).norm() <= 1e-12 * want.norm()
    one = torch.randn(1, 4, requires_grad=True)
    # the peer's mean over no pair of distances is NaN for a batch of one
    lonely = peer.RKDLoss("x", "x", dist_factor=1.0, angle_factor=1.0, reduction="mean")(*outputs(one, one.detach()))
    assert lonely.isnan()
    value = distance_relations(one, one.detach()) + angle_relations(one, one.detach())
    value.backward()
    assert value.item() == 0 and one.grad.abs().sum() == 0


def test_weighted_rows_of_angles_have_the_gradient_of_their_sum() -> None:
    student, teacher = pair(9, 4)
    weights = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows = angle_relations(student, teacher, reduction="none")
    (got,) = torch.autograd.grad((rows * weights).sum(), student)
    parts = [torch.autograd.grad(angle_relations(student, teacher, reduction="none")[j], student)[0] for j in range(9)]
    torch.testing.assert_close(got, sum(w * part for w, part in zip(weights, parts, strict=True)))
