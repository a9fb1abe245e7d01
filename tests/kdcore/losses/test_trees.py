"""Distilling into trees: derivatives against autograd, targets, shrinkage that helps, leaf values by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses import blended_cross_entropy, gradient_and_hessian, james_stein, refit_leaves, tree_targets

seeds = st.integers(0, 2**31)
shares = st.floats(0, 1)
law = settings(max_examples=25, deadline=None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labelled(n: int = 9, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.randn(3, n, generator=seeded(seed), dtype=torch.float64) * 2
    return draw[0].clone().requires_grad_(), draw[1].clone(), (draw[2] > 0).double()


@given(seed=seeds, alpha=shares, temperature=st.floats(0.3, 5))
@law
def test_derivatives_equal_autograd(seed: int, alpha: float, temperature: float) -> None:
    student, teacher, labels = labelled(seed=seed)
    options = {"alpha": alpha, "temperature": temperature}
    loss = blended_cross_entropy(student, teacher, labels, reduction="sum", **options)
    (first,) = torch.autograd.grad(loss, student, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), student)
    gradient, hessian = gradient_and_hessian(student, teacher, labels, **options)
    torch.testing.assert_close(gradient, first.detach())
    torch.testing.assert_close(hessian, second)
    assert (hessian >= 0).all() and not hessian.requires_grad


@given(seed=seeds, alpha=shares)
@law
def test_at_temperature_one_it_is_the_cross_entropy_of_the_targets(seed: int, alpha: float) -> None:
    student, teacher, labels = labelled(seed=seed)
    targets = tree_targets(labels, teacher.sigmoid(), alpha=alpha)
    want = F.binary_cross_entropy_with_logits(student, targets)
    torch.testing.assert_close(blended_cross_entropy(student, teacher, labels, alpha=alpha), want)
    gradient, hessian = gradient_and_hessian(student, teacher, labels, alpha=alpha)
    p = student.detach().sigmoid()
    torch.testing.assert_close(gradient, p - targets)
    torch.testing.assert_close(hessian, p * (1 - p))


def test_the_hessian_keeps_its_digits_where_the_student_is_sure() -> None:
    _, hessian = gradient_and_hessian(torch.tensor([60.0]), torch.zeros(1), torch.ones(1))
    assert hessian.item() == pytest.approx(torch.tensor(-60.0).exp().item(), rel=1e-5)


def test_newton_steps_of_a_booster_reach_the_targets() -> None:
    _, teacher, labels = labelled()
    score = torch.zeros_like(teacher)
    for _ in range(20):
        gradient, hessian = gradient_and_hessian(score, teacher, labels, alpha=0.6)
        score = score - gradient / hessian
    torch.testing.assert_close(score.sigmoid(), tree_targets(labels, teacher.sigmoid(), alpha=0.6))


def test_tree_targets() -> None:
    labels, teacher = torch.tensor([1.0, 0.0, 1.0, torch.nan]), torch.tensor([0.2, 0.4, 0.9, 0.7])
    known = torch.tensor([True, True, True, False])
    got = tree_targets(labels, teacher, alpha=0.25, known=known)
    torch.testing.assert_close(got, torch.tensor([0.8, 0.1, 0.975, 0.7]))
    kept = tree_targets(labels, teacher, alpha=0.25, known=known, keep_positives=True)
    torch.testing.assert_close(kept, torch.tensor([1.0, 0.1, 1.0, 0.7]))


# Shrinkage.


def test_james_stein_by_hand() -> None:
    # Efron & Morris: k = 5 means, each of variance 2 / 4 = 0.5; spread 10, factor 1 - 2 * 0.5 / 10 = 0.9
    got = james_stein(torch.arange(5.0), torch.full((5,), 4.0), 2.0)
    torch.testing.assert_close(got, 2 + 0.9 * (torch.arange(5.0) - 2))
    assert torch.equal(james_stein(torch.arange(3.0), torch.ones(3), 9.0), torch.arange(3.0)), "k - 3 = 0"
    torch.testing.assert_close(james_stein(torch.arange(5.0), torch.ones(5), 1e6), torch.full((5,), 2.0))
    torch.testing.assert_close(james_stein(torch.full((5,), 3.0), torch.ones(5), 1.0), torch.full((5,), 3.0))


def test_unequal_variances_move_the_means_of_few_rows_further() -> None:
    means, counts = torch.arange(5.0), torch.tensor([1.0, 100.0, 100.0, 100.0, 1.0])
    got = james_stein(means, counts, 2.0, unequal=True)
    share = (got - 2) / (means - 2)
    assert share[1] > 0.99 and share[0] == pytest.approx(1 - 2 * 2 / 10, rel=1e-4)
    equal = torch.full((5,), 7.0)
    torch.testing.assert_close(james_stein(means, equal, 2.0, unequal=True), james_stein(means, equal, 2.0))


@pytest.mark.parametrize("unequal", [False, True])
def test_an_empty_leaf_is_not_counted_and_becomes_the_centre(unequal: bool) -> None:
    means, counts = torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0]), torch.tensor([4.0, 4.0, 4.0, 4.0, 0.0])
    got = james_stein(means, counts, 1.0, unequal=unequal)
    torch.testing.assert_close(got[:4], james_stein(means[:4], counts[:4], 1.0, unequal=unequal))
    assert got[4].item() == pytest.approx(1.5)
    assert james_stein(means, torch.zeros(5), 1.0, unequal=unequal).isfinite().all()
    assert james_stein(means[:0], counts[:0], 1.0, unequal=unequal).shape == (0,)


def test_shrunken_means_are_nearer_to_the_truth_on_average() -> None:
    # James & Stein: the total squared error falls, whatever the true means are.
    generator = seeded(1)
    truth = torch.randn(12, generator=generator, dtype=torch.float64)
    counts = torch.full((12,), 3.0, dtype=torch.float64)
    plain = shrunken = 0.0
    for _ in range(400):
        means = truth + torch.randn(12, generator=generator, dtype=torch.float64) / 3**0.5
        plain += (means - truth).square().sum().item()
        shrunken += (james_stein(means, counts, 1.0) - truth).square().sum().item()
    assert shrunken < 0.9 * plain


# Leaf values.


def test_refit_leaves_are_weighted_means() -> None:
    leaves, targets = torch.tensor([0, 2, 0, 2, 2]), torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0])
    got = refit_leaves(leaves, targets, n_leaves=4)
    torch.testing.assert_close(got, torch.tensor([0.5, 0.6, 2 / 3, 0.6]))
    weights = torch.tensor([3.0, 1.0, 1.0, 0.0, 1.0])
    got = refit_leaves(leaves, targets, weights, n_leaves=3)
    torch.testing.assert_close(got, torch.tensor([0.75, 4 / 6, 0.5]))
    assert torch.equal(refit_leaves(leaves[:0], targets[:0], n_leaves=2), torch.zeros(2))


@pytest.mark.parametrize("shrinkage", ["equal", "unequal"])
def test_refit_leaves_shrinks_by_the_pooled_variance(shrinkage: str) -> None:
    generator = seeded(2)
    leaves = torch.cat([torch.arange(6), torch.randint(6, (60,), generator=generator)])
    targets = leaves.double() / 10 + torch.randn(66, generator=generator, dtype=torch.float64)
    got = refit_leaves(leaves, targets, n_leaves=6, shrinkage=shrinkage)
    groups = [targets[leaves == j] for j in range(6)]
    error = sum(((g - g.mean()) ** 2).sum() for g in groups)
    means, counts = torch.stack([g.mean() for g in groups]), torch.tensor([float(len(g)) for g in groups]).double()
    torch.testing.assert_close(got, james_stein(means, counts, error / (66 - 6), unequal=shrinkage == "unequal"))
    twice = refit_leaves(leaves, targets, torch.full((66,), 5.0), n_leaves=6, shrinkage=shrinkage)
    torch.testing.assert_close(twice, got, msg="a common factor on the weights changes nothing")


@pytest.mark.parametrize("shrinkage", ["equal", "unequal"])
def test_leaves_of_one_row_each_are_not_shrunken(shrinkage: str) -> None:
    targets = torch.tensor([0.1, 0.9, 0.4, 0.7, 0.2])
    got = refit_leaves(torch.arange(5), targets, torch.rand(5) + 0.1, n_leaves=5, shrinkage=shrinkage)
    torch.testing.assert_close(got, targets)


def test_out_of_range_options_are_named() -> None:
    student, teacher, labels = labelled()
    leaves = torch.zeros(9, dtype=torch.int64)
    wrong: list[tuple[str, object]] = [
        (r"alpha: wanted a number in 0..1, got 2", lambda: blended_cross_entropy(student, teacher, labels, alpha=2)),
        (r"alpha: .*got -1", lambda: tree_targets(labels, teacher, alpha=-1)),
        (r"temperature: .*got 0", lambda: gradient_and_hessian(student, teacher, labels, temperature=0)),
        (r"counts: wanted shape \(9,\), got \(8,\)", lambda: james_stein(teacher, labels[1:], 1.0)),
        (
            r"leaves: wanted 0..2, got 0..3",
            lambda: refit_leaves(leaves.index_fill(0, leaves[:1], 3), labels, n_leaves=3),
        ),
        (r"leaves: wanted int64", lambda: refit_leaves(leaves.int(), labels, n_leaves=3)),
        (r"weights: wanted numbers >= 0, got -1", lambda: refit_leaves(leaves, labels, labels - 1, n_leaves=1)),
        (r"weights: wanted shape \(9,\)", lambda: refit_leaves(leaves, labels, labels[1:], n_leaves=1)),
        (r"n_leaves: wanted at least 1", lambda: refit_leaves(leaves, labels, n_leaves=0)),
        (r"shrinkage: .*got 'some'", lambda: refit_leaves(leaves, labels, n_leaves=1, shrinkage="some")),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
