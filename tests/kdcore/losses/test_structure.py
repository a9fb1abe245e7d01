"""Graphs of instances and pixels, and the adversary: invariances, the two players, the penalty."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdcore.losses import AdversarialAlignment, instance_graph, pixel_pairs


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Instances.


def test_edges_see_distances_only_and_take_other_widths() -> None:
    first, second = normal(5, 4), normal(5, 3, seed=1)
    turned = [x @ torch.linalg.qr(normal(x.shape[1], x.shape[1], seed=2)).Q + 3 for x in (first, second)]
    wide = [torch.cat([x, torch.zeros(5, 2, dtype=torch.float64)], 1) for x in turned]
    got = instance_graph(*wide, first, second, vertices=0, transformation=0)
    assert got.item() == pytest.approx(0, abs=1e-20)


def test_parts_add_up_by_their_weights() -> None:
    layers = [normal(5, 4, seed=seed) for seed in range(4)]
    names = ("vertices", "edges", "transformation")
    parts = [instance_graph(*layers, **{n: float(n == name) for n in names}) for name in names]
    got = instance_graph(*layers, vertices=2.0, edges=0.5, transformation=3.0)
    torch.testing.assert_close(got, 2 * parts[0] + 0.5 * parts[1] + 3 * parts[2])
    distances = [torch.cdist(x, x).square() for x in layers]
    want = sum((s - t).square().sum() / 25 for s, t in (distances[::2], distances[1::2]))
    torch.testing.assert_close(parts[1], want)
    assert instance_graph(*layers, **dict.fromkeys(names, 0.0)).item() == 0


def test_widths_that_do_not_fit_are_named() -> None:
    a, b = normal(5, 4), normal(5, 3)
    with pytest.raises(ValueError, match=r"teacher_second \(vertices > 0\): wanted shape \(5, 4\), got \(5, 3\)"):
        instance_graph(a, a, b, b)
    with pytest.raises(ValueError, match=r"student_second \(transformation > 0\): wanted shape \(5, 4\), got \(5, 3\)"):
        instance_graph(a, b, a, b)
    with pytest.raises(ValueError, match="edges: wanted a finite number >= 0, got -1"):
        instance_graph(a, a, a, a, edges=-1.0)


# Pixels.


def test_pixel_pairs_see_neither_rotation_nor_resolution() -> None:
    teacher = normal(3, 4, 4, 4)
    turn = torch.linalg.qr(normal(4, 4, seed=1)).Q
    student = 5 * torch.einsum("dc,bchw->bdhw", turn, teacher).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert pixel_pairs(student, teacher).item() == pytest.approx(0, abs=1e-24)


def test_pixel_pairs_on_every_pixel_are_cosines() -> None:
    student, teacher = normal(3, 4, 2, 3), normal(3, 5, 2, 3, seed=1)
    nodes = [x.flatten(2).mT for x in (student, teacher)]
    cosines = [torch.cosine_similarity(x[:, :, None], x[:, None], 3) for x in nodes]
    torch.testing.assert_close(
        pixel_pairs(student, teacher, reduction="none"), (cosines[0] - cosines[1]).square().mean((1, 2))
    )
    assert pixel_pairs(student, teacher, grid=1).item() == pytest.approx(0, abs=1e-24)  # one node: a cosine of 1
    with pytest.raises(ValueError, match="grid: wanted at least 1, got 0"):
        pixel_pairs(student, teacher, grid=0)
    with pytest.raises(ValueError, match=r"student: wanted maps with pixels, got \(3, 4, 0, 3\)"):
        pixel_pairs(student[:, :, :0], teacher)


# The adversary.


@pytest.mark.parametrize("form", ["nonsaturating", "wasserstein"])
def test_each_player_moves_only_its_own_part(form: str) -> None:
    torch.manual_seed(0)
    loss = AdversarialAlignment(4, hidden_dim=8, form=form).double()
    student, teacher = normal(6, 4).requires_grad_(), normal(6, 4, seed=1).requires_grad_()
    score = loss.score(student)
    want = -score if form == "wasserstein" else -torch.log(torch.sigmoid(score))
    value = loss(student, reduction="none")
    torch.testing.assert_close(value, want)
    value.sum().backward()
    assert student.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.parameters())
    student.grad = None
    loss.discriminator_loss(student, teacher, generator=torch.Generator().manual_seed(0)).backward()
    assert student.grad is None and teacher.grad is None
    assert all(p.grad is not None for p in loss.first.parameters())


def test_discriminator_losses_by_hand_and_masked() -> None:
    torch.manual_seed(0)
    student, teacher = normal(6, 4), normal(6, 4, seed=1)
    mask = torch.tensor([True, False, True, True, False, True])
    for form in ("nonsaturating", "wasserstein"):
        loss = AdversarialAlignment(4, hidden_dim=8, form=form).double()
        s, t = loss.score(student), loss.score(teacher)
        want = s - t if form == "wasserstein" else -torch.log(1 - torch.sigmoid(s)) - torch.log(torch.sigmoid(t))
        got = loss.discriminator_loss(student, teacher, gradient_penalty=0.0, reduction="none")
        torch.testing.assert_close(got, want)
        poisoned = student.masked_fill(~mask[:, None], torch.nan)
        got = loss.discriminator_loss(poisoned, teacher, gradient_penalty=0.0, mask=mask)
        torch.testing.assert_close(got, want[mask].mean())


def test_gradient_penalty_of_a_linear_critic() -> None:
    loss = AdversarialAlignment(2, hidden_dim=2, form="wasserstein").double()
    with torch.no_grad():
        weights = [[3.0, 0], [0, 4]], [[1.0, 0], [0, 1]], [[1.0, 1]]
        for layer, weight in zip((loss.first, loss.second, loss.last), weights, strict=True):
            layer.weight.copy_(torch.tensor(weight))
            layer.bias.fill_(0.0)
    student, teacher = torch.rand(5, 2).double() + 1, torch.rand(5, 2).double() + 1  # where every unit is linear
    plain = loss.discriminator_loss(student, teacher, gradient_penalty=0.0)
    got = loss.discriminator_loss(student, teacher, gradient_penalty=2.0)
    assert (got - plain).item() == pytest.approx(2.0 * (5 - 1) ** 2)


def test_a_student_trained_against_it_moves_to_the_teacher() -> None:
    torch.manual_seed(0)
    loss = AdversarialAlignment(1, hidden_dim=16).double()
    teacher, shift = normal(256, 1, seed=1) + 2, torch.zeros(1, dtype=torch.float64, requires_grad=True)
    own, other = torch.optim.Adam([shift], 0.05), torch.optim.Adam(loss.parameters(), 0.01)
    for step in range(200):
        student = normal(256, 1, seed=step + 2) + shift
        other.zero_grad()
        loss.discriminator_loss(student, teacher).backward()
        other.step()
        own.zero_grad()
        loss(student).backward()
        own.step()
    assert abs(shift.item() - 2) < 0.5
    assert loss.discriminator_loss(student, teacher).item() == pytest.approx(2 * math.log(2), abs=0.2)


def test_options_of_the_adversary_are_named() -> None:
    with pytest.raises(ValueError, match="form: wanted one of nonsaturating, wasserstein, got 'hinge'"):
        AdversarialAlignment(4, form="hinge")
    loss = AdversarialAlignment(4)
    with pytest.raises(ValueError, match="gradient_penalty: wanted a finite number >= 0, got -1"):
        loss.discriminator_loss(torch.zeros(2, 4), torch.zeros(2, 4), gradient_penalty=-1.0)
    with pytest.raises(ValueError, match=r"student: wanted shape \(2, 4\), got \(2, 3\)"):
        loss(torch.zeros(2, 3))
