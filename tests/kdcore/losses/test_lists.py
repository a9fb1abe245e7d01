"""Losses on lists: the models of chance they are likelihoods of, and what they do to scores that learn from them."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses import (
    list_net,
    pairwise_ranking,
    plackett_luce,
    pointwise_bce,
    privileged_features,
    relaxed_ranking,
    soft_targets,
)

seeds = st.integers(0, 2**31)
law = settings(max_examples=25, deadline=None)


def scored(rows: int = 4, items: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.randn(2, rows, items, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return draw[0].clone().requires_grad_(), draw[1].clone()


# Privileged features.


def test_privileged_features_between_labels_and_teacher() -> None:
    student, teacher = scored()
    labels = (teacher > 0).double()
    torch.testing.assert_close(
        privileged_features(student, teacher, labels, weight=0.0), pointwise_bce(student, labels)
    )
    torch.testing.assert_close(
        privileged_features(student, teacher, labels, weight=1.0), pointwise_bce(student, teacher.sigmoid())
    )
    flat = privileged_features(student.flatten(), teacher.flatten(), labels.flatten(), reduction="sum")
    torch.testing.assert_close(flat, privileged_features(student, teacher, labels, reduction="sum"))


def test_the_teacher_learns_from_the_labels_alone() -> None:
    student, teacher = scored()
    teacher.requires_grad_()
    labels = (student.detach() > 0).double()
    both = privileged_features(student, teacher, labels, weight=0.7, train_teacher=True)
    torch.testing.assert_close(
        both, privileged_features(student, teacher, labels, weight=0.7) + pointwise_bce(teacher, labels)
    )
    (got,) = torch.autograd.grad(both, teacher)
    torch.testing.assert_close(got, torch.autograd.grad(pointwise_bce(teacher, labels), teacher)[0])


def test_a_masked_teacher_in_training_is_never_looked_at() -> None:
    student, teacher = scored()
    mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) > 0.3
    labels = torch.ones_like(teacher)
    hidden = teacher.masked_fill(~mask, torch.nan).requires_grad_()
    value = privileged_features(student, hidden, labels, train_teacher=True, mask=mask)
    value.backward()
    want = privileged_features(student[:, :0], teacher[:, :0], labels[:, :0], reduction="sum").detach()
    for b in range(4):
        want = want + privileged_features(
            *(x[b, mask[b]] for x in (student, teacher, labels)), train_teacher=True, reduction="sum"
        )
    torch.testing.assert_close(value, want / 4)
    assert hidden.grad.isfinite().all() and torch.equal(hidden.grad[~mask], torch.zeros(int((~mask).sum())).double())


# Pairs.


@given(seed=seeds)
@law
def test_soft_pairs_tend_to_hard_ones(seed: int) -> None:
    student, teacher = scored(seed=seed)
    hard = pairwise_ranking(student, teacher, targets="hard", reduction="none")
    torch.testing.assert_close(pairwise_ranking(student, teacher, temperature=1e-9, reduction="none"), hard)
    torch.testing.assert_close(
        pairwise_ranking(student, teacher * 1e4, targets="hard", reduction="none"), hard, msg="the order alone counts"
    )


def test_two_items_are_ranknet() -> None:
    student, teacher = scored(items=2)
    chance = torch.sigmoid(teacher[:, 0] - teacher[:, 1])
    want = F.binary_cross_entropy_with_logits(student[:, 0] - student[:, 1], chance)
    torch.testing.assert_close(pairwise_ranking(student, teacher), want)


def test_the_teacher_itself_costs_least() -> None:
    _, teacher = scored()
    same = teacher.clone().requires_grad_()
    pairwise_ranking(same, teacher).backward()
    torch.testing.assert_close(same.grad, torch.zeros_like(same))


def test_ties_of_the_teacher() -> None:
    student = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[2.0, 2.0, 0.0]])
    got = pairwise_ranking(student, teacher, targets="hard")
    torch.testing.assert_close(got, -(F.logsigmoid(torch.tensor(2.0)) + F.logsigmoid(torch.tensor(1.0))) / 2)
    pairwise_ranking(student, torch.zeros(1, 3)).backward()  # soft: equal chances draw the scores together
    assert student.grad[0, 0] > 0 > student.grad[0, 2]
    assert pairwise_ranking(student, torch.zeros(1, 3), targets="hard").item() == 0
    assert pairwise_ranking(student[:, :1], teacher[:, :1]).item() == 0, "one item makes no pair"


# Top-one chances.


@given(seed=seeds, temperature=st.floats(0.3, 5))
@law
def test_list_net_is_soft_targets_and_an_entropy(seed: int, temperature: float) -> None:
    student, teacher = scored(seed=seed)
    entropy = torch.distributions.Categorical(logits=teacher / temperature).entropy()
    got = list_net(student, teacher, temperature=temperature, reduction="none")
    want = soft_targets(student, teacher, temperature=temperature, reduction="none") + temperature**2 * entropy
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(
        list_net(student, teacher), F.cross_entropy(student, teacher.softmax(1)), msg="torch's, at T = 1"
    )


def test_list_net_is_the_chance_of_being_first_under_plackett_luce() -> None:
    scores = torch.tensor([[0.3, -1.0, 0.8]], dtype=torch.float64)
    for first in range(3):
        chance = 0.0
        for order in permutations(range(3)):
            if order[0] == first:
                ranks = torch.tensor([[-order.index(k) for k in range(3)]], dtype=torch.float64)
                chance += math.exp(-plackett_luce(scores, ranks).item())
        sure = torch.full((1, 3), -1e9, dtype=torch.float64).index_fill(1, torch.tensor([first]), 0.0)
        assert math.exp(-list_net(scores, sure).item()) == pytest.approx(chance)


# Plackett-Luce.


@given(seed=seeds, items=st.integers(1, 5))
@law
def test_the_chances_of_all_orders_sum_to_one(seed: int, items: int) -> None:
    student, _ = scored(rows=1, items=items, seed=seed)
    orders = torch.tensor(list(permutations(range(items))), dtype=torch.float64)
    losses = plackett_luce(student.expand(len(orders), items), orders, reduction="none")
    assert (-losses).exp().sum().item() == pytest.approx(1)


@given(seed=seeds, split=st.integers(1, 5))
@law
def test_relaxed_ranking_is_plackett_luce_of_the_top(seed: int, split: int) -> None:
    student, teacher = scored(seed=seed)
    listed = student.gather(1, teacher.argsort(dim=1, descending=True))
    top = relaxed_ranking(listed[:, :split], listed[:, split:], reduction="none")
    rest = plackett_luce(listed[:, split:], -torch.arange(6.0 - split).double().expand(4, -1), reduction="none")
    torch.testing.assert_close(plackett_luce(student, teacher, reduction="none"), top + rest)


def test_the_scores_take_the_order_of_the_teacher() -> None:
    _, teacher = scored(rows=2, items=8)
    student = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([student], lr=0.5)
    for _ in range(300):
        optimizer.zero_grad()
        plackett_luce(student, teacher).backward()
        optimizer.step()
    assert torch.equal(student.argsort(dim=1), teacher.argsort(dim=1))


def test_plackett_luce_does_not_overflow_and_has_no_nan_on_the_way() -> None:
    student = torch.tensor([[900.0, -900.0, 5.0], [1.0, 2.0, 3.0]], requires_grad=True)
    mask = torch.tensor([[True, True, False], [False, False, False]])
    with torch.autograd.set_detect_anomaly(True):
        value = plackett_luce(student, torch.tensor([[0.0, 1.0, torch.nan]] * 2), mask=mask)
        value.backward()
    assert value.item() == pytest.approx(1800)
    torch.testing.assert_close(student.grad, torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]]), rtol=0, atol=1e-4)


def test_out_of_range_options_are_named() -> None:
    student, teacher = scored()
    wrong: list[tuple[str, object]] = [
        (r"weight: wanted a number in 0..1, got 2", lambda: privileged_features(student, teacher, teacher, weight=2)),
        (r"labels: wanted shape \(4, 6\)", lambda: privileged_features(student, teacher, teacher[:, 1:])),
        (r"targets: .*got 'firm'", lambda: pairwise_ranking(student, teacher, targets="firm")),
        (r"temperature: .*got 0", lambda: pairwise_ranking(student, teacher, temperature=0)),
        (r"temperature: .*got -1", lambda: list_net(student, teacher, temperature=-1)),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
