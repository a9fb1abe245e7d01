"""Losses on features: what the papers say of them, by hand and against torchdistill."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses import (
    activation_boundary,
    attention_transfer,
    channel_weights,
    hint,
    neuron_selectivity,
    probabilistic_transfer,
    weighted_channels,
)
from kdcore.losses.feature import pool_to_smaller, row_norm
from kdcore.losses.vectors import unit


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mid_level() -> Any:
    return pytest.importorskip("torchdistill.losses.mid_level")


def io(features: Any) -> dict[str, dict[str, Any]]:
    return {"layer": {"output": features}}


WHERE = {"path": "layer", "io": "output"}
PAIRS = {"pair": {"student": WHERE, "teacher": WHERE, "weight": 1}}


# Against torchdistill.


@pytest.mark.parametrize(("mode", "distance"), [("paper", "norm"), ("code", "mean_squared")])
def test_attention_transfer_agrees_with_torchdistill(mode: str, distance: Any) -> None:
    student, teacher = normal(5, 3, 4, 4), normal(5, 6, 4, 4, seed=1)
    want = mid_level().ATLoss(PAIRS, mode=mode)(io(student), io(teacher))
    assert attention_transfer(student, teacher, distance=distance).item() == pytest.approx(want.item(), rel=1e-5)


def test_probabilistic_transfer_agrees_with_torchdistill_on_the_diagonal() -> None:
    # torchdistill follows the authors' code: a row is its own neighbour, which the paper leaves out (k != j), the mean
    # is over B^2 pairs, and 1e-7 is added everywhere.
    student, teacher = normal(6, 4), normal(6, 9, seed=1)
    want = mid_level().PKTLoss("layer", "output", "layer", "output")(io(student), io(teacher)).item()
    assert probabilistic_transfer(student, teacher, diagonal=True).item() / 6 == pytest.approx(want, rel=1e-5)
    assert probabilistic_transfer(student, teacher).item() / 6 != pytest.approx(want, rel=1e-2)


def test_activation_boundary_agrees_with_torchdistill() -> None:
    student, teacher = normal(5, 3, 2, 4), normal(5, 3, 2, 4, seed=1)
    want = mid_level().AltActTransferLoss(PAIRS, 0.8, "mean")(io(student), io(teacher)).item()
    got = activation_boundary(student, teacher, margin=0.8, elements="sum").item()
    assert got == pytest.approx(want, rel=1e-5)


def test_hint_is_half_of_torch_mse() -> None:
    # torchdistill has no hint loss of its own; its recipes use nn.MSELoss, without the paper's 1/2.
    for shape in ((4, 7), (4, 3, 2, 5)):
        student, teacher = normal(*shape), normal(*shape, seed=1)
        assert hint(student, teacher).item() == pytest.approx(F.mse_loss(student, teacher).item() / 2)
        total = hint(student, teacher, elements="sum", reduction="sum").item()
        assert total == pytest.approx(F.mse_loss(student, teacher, reduction="sum").item() / 2)


# What they share.


def test_unit_and_norm_at_zero_and_far_from_one() -> None:
    values = torch.tensor([[0.0, 0.0], [3e15, 4e15], [3e-15, 4e-15]], requires_grad=True)
    got = unit(values, 1)
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0], [0.6, 0.8], [0.6, 0.8]]))
    got.sum().backward()
    assert values.grad.isfinite().all()
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    row_norm(rows).sum().backward()
    torch.testing.assert_close(rows.grad, torch.tensor([[0.0, 0.0], [0.6, 0.8]]))


def test_unit_has_the_gradient_of_normalize() -> None:
    values = normal(4, 3).requires_grad_()
    torch.testing.assert_close(unit(values, 1), F.normalize(values, dim=1))
    weight = normal(4, 3, seed=1)
    (want,) = torch.autograd.grad((F.normalize(values, dim=1) * weight).sum(), values)
    (got,) = torch.autograd.grad((unit(values, 1) * weight).sum(), values)
    torch.testing.assert_close(got, want)


def test_pooling_takes_the_smaller_of_each_side() -> None:
    student, teacher = pool_to_smaller(normal(2, 3, 8, 2), normal(2, 5, 4, 6))
    assert student.shape == (2, 3, 4, 2) and teacher.shape == (2, 5, 4, 2)
    torch.testing.assert_close(student, F.avg_pool2d(normal(2, 3, 8, 2), (2, 1)))
    empty, _ = pool_to_smaller(normal(0, 3, 8, 2), normal(0, 5, 4, 6))
    assert empty.shape == (0, 3, 4, 2)


# Attention transfer.


def test_attention_maps_by_hand() -> None:
    # All attention in one of two places each: unit vectors at a right angle.
    student = torch.tensor([[[[2.0, 0.0]], [[-5.0, 0.0]]]])
    teacher = torch.tensor([[[[0.0, 7.0]]]])
    assert attention_transfer(student, teacher).item() == pytest.approx(math.sqrt(2))
    assert attention_transfer(student, teacher, distance="mean_squared").item() == pytest.approx(1)
    assert attention_transfer(torch.zeros_like(student), teacher).item() == pytest.approx(1)
    assert attention_transfer(-student, student).item() == 0


def test_attention_maps_of_other_sizes_are_pooled_as_maps() -> None:
    student, teacher = normal(2, 3, 4, 4), normal(2, 5, 2, 2, seed=1)
    pooled = F.avg_pool2d(student.square().sum(1, keepdim=True), 2).sqrt()
    torch.testing.assert_close(attention_transfer(student, teacher), attention_transfer(pooled, teacher))
    torch.testing.assert_close(attention_transfer(teacher, student), attention_transfer(teacher, pooled))


def test_a_high_power_stays_in_range() -> None:
    student, teacher = normal(2, 3, 2, 2).float(), normal(2, 3, 2, 2, seed=1).float()
    want = attention_transfer(student, teacher, power=8)
    torch.testing.assert_close(attention_transfer(student * 1e8, teacher * 1e-8, power=8), want)


# Probabilistic transfer.


def test_the_widths_of_a_batch_may_differ() -> None:
    teacher = normal(5, 4)
    wider = torch.cat([teacher, torch.zeros(5, 3, dtype=torch.float64)], 1) * 3
    assert probabilistic_transfer(wider, teacher).item() == pytest.approx(0, abs=1e-12)


def test_opposed_rows_are_finite() -> None:
    student = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for diagonal in (False, True):
        value = probabilistic_transfer(student, teacher, diagonal=diagonal)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.isfinite() and gradient.isfinite().all()
    assert probabilistic_transfer(student, teacher).item() == 0  # one neighbour has all the probability


# Neuron selectivity.


def test_both_gram_matrices_give_the_same_discrepancy() -> None:
    student, teacher = normal(3, 8, 2, 2), normal(3, 7, 2, 2, seed=1)  # more channels than positions: N x N
    s, t = F.normalize(student.flatten(2), dim=2), F.normalize(teacher.flatten(2), dim=2)
    within_student, within_teacher, between = ((a @ b.mT).square().mean((1, 2)) for a, b in ((s, s), (t, t), (s, t)))
    want = within_student + within_teacher - 2 * between
    torch.testing.assert_close(neuron_selectivity(student, teacher, reduction="none"), want)


@pytest.mark.parametrize("kernel", ["polynomial", "linear"])
def test_patterns_are_a_set(kernel: Any) -> None:
    for teacher in (normal(2, 3, 4, 4), normal(2, 9, 2, 2)):
        factors = torch.linspace(0.5, 3, teacher.shape[1], dtype=torch.float64)[:, None, None]
        student = (teacher * factors).flip(1).repeat(1, 2, 1, 1)  # reordered, scaled, each twice
        assert neuron_selectivity(student, teacher, kernel=kernel).item() == pytest.approx(0, abs=1e-12)


def test_patterns_of_other_sizes_are_pooled() -> None:
    student, teacher = normal(2, 3, 4, 4), normal(2, 5, 2, 2, seed=1)
    want = neuron_selectivity(F.avg_pool2d(student, 2), teacher)
    torch.testing.assert_close(neuron_selectivity(student, teacher), want)


# Weighted channels.


def test_channel_weights_by_hand() -> None:
    weights = channel_weights(torch.tensor([1.0, 1.0 + math.log(3)]), 0.9)
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(channel_weights(torch.tensor([1.0, 1.0 + math.log(3)]), torch.tensor(7.0)), weights)
    with pytest.raises(ValueError, match=r"losses_without: wanted 1 dimension"):
        channel_weights(torch.zeros(2, 2), 0.0)
    with pytest.raises(ValueError, match=r"loss_with: wanted 0 dimension"):
        channel_weights(torch.zeros(2), torch.zeros(2))


def test_even_weights_give_the_hint() -> None:
    student, teacher = normal(4, 3, 2, 5), normal(4, 3, 2, 5, seed=1)
    weights = torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True)
    got = weighted_channels(student.requires_grad_(), teacher, weights=weights)
    torch.testing.assert_close(got, hint(student, teacher))
    got.backward()
    assert weights.grad is None
    with pytest.raises(ValueError, match=r"weights: wanted shape \(3,\), got \(2,\)"):
        weighted_channels(student, teacher, weights=weights[:2])


# Activation boundaries.


def test_boundary_by_hand() -> None:
    student = torch.tensor([[0.25, 2.0, -3.0, 0.25, -2.0, 3.0]])
    teacher = torch.tensor([[9.0, 0.1, 0.1, 0.0, -0.1, -9.0]])
    want = 0.75**2 + 0 + 16 + 1.25**2 + 0 + 16
    assert activation_boundary(student, teacher, elements="sum").item() == pytest.approx(want)
    assert activation_boundary(student, teacher).item() == pytest.approx(want / 6)
    assert activation_boundary(student, teacher * 1e-3) == activation_boundary(student, teacher)


# What a user gets wrong.


def test_wrong_options_are_named() -> None:
    maps, vectors = normal(2, 3, 4, 4), normal(2, 3)
    with pytest.raises(ValueError, match=r"elements: wanted one of mean, sum, got 'max'"):
        hint(vectors, vectors, elements="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"power: wanted a finite number >= 1, got 0.5"):
        attention_transfer(maps, maps, power=0.5)
    with pytest.raises(ValueError, match=r"distance: wanted one of norm, mean_squared, got 'l1'"):
        attention_transfer(maps, maps, distance="l1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kernel: wanted one of polynomial, linear, got 'gaussian'"):
        neuron_selectivity(maps, maps, kernel="gaussian")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"margin: wanted a finite number > 0, got 0"):
        activation_boundary(vectors, vectors, margin=0)
    with pytest.raises(ValueError, match=r"student: wanted 4 dimension"):
        attention_transfer(vectors, vectors)
