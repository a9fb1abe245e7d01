"""Ranking distillation and collaborative distillation, item by item from the formulas of the papers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from apps.recsys.knowledge.ranks import (
    CollaborativeDistillation,
    CollaborativeDistillationOptions,
    RankingDistillation,
    RankingDistillationOptions,
)
from kdcore.config import UserError
from tests.recsys.knowledge.asked import summed, table
from tests.recsys.made import factors, generator, histories, history_of, lessons, sasrec

N_USERS, N_ITEMS = 12, 20
QUERIES = torch.tensor([1, 4, 7, 11])


@pytest.fixture
def train():
    """User 1 has all items but 3, user 4 has every item."""
    own = [histories(N_USERS, N_ITEMS).of(user).tolist() for user in range(N_USERS)]
    own[1], own[4] = list(range(N_ITEMS - 3)), list(range(N_ITEMS))
    return history_of(own, N_ITEMS)


def ranking_by_hand(scores, listed, sample, scale, mu, dynamic) -> float:
    """One query: listed are the items of the teacher's list as far as it goes, best first."""
    importance = [math.exp(-rank / scale) for rank in range(1, 6)]
    total = 0.0
    for place, item in enumerate(listed):
        weight = importance[place] / sum(importance)
        if dynamic:
            above = sum(1 for other in sample if scores[other] > scores[item])
            rank = math.floor((N_ITEMS - 1) * above / len(sample))
            weight *= max(0.0, math.tanh(mu * (rank - place)))
        total += weight * math.log1p(math.exp(-scores[item]))
    return total


@pytest.mark.parametrize("epoch", [1, 2])
def test_ranking_distillation_is_the_formula(tmp_path, train, epoch):
    """A warm-up of 2 epochs; a list that ends early (users 1 and 4) must not teach its filling, which is item 0."""
    teacher, student = factors(N_USERS, N_ITEMS, seed=1), factors(N_USERS, N_ITEMS)
    asked = lessons(teacher, train, tmp_path)
    options = RankingDistillationOptions(length=5, position_scale=2.0, mu=0.3, sample=7, warm_up=2)
    knowledge = RankingDistillation(options, asked)
    knowledge.begin_epoch(epoch, 10, student, generator())
    prepared = knowledge.prepare(QUERIES, generator(3))
    got = summed(knowledge, student, QUERIES, prepared)
    wanted, scores, taught = 0.0, table(student).detach(), table(teacher).detach()
    for row, user in enumerate(QUERIES.tolist()):
        unseen = sorted(set(range(N_ITEMS)) - set(train.of(user).tolist()), key=lambda item: -taught[user, item])
        sample = prepared["sample"][row].tolist()
        assert not unseen or set(sample) <= set(unseen)
        wanted += ranking_by_hand(scores[user].tolist(), unseen[:5], sample, 2.0, 0.3, dynamic=epoch == 2)
    assert got.item() == pytest.approx(wanted, rel=1e-5)
    got.backward()
    assert not student.user.grad[4].any()  # this user has everything: there is nothing to teach
    assert student.user.grad[7].any()


def test_ranking_distillation_resumes_after_the_warm_up(tmp_path, train):
    asked = lessons(factors(N_USERS, N_ITEMS), train, tmp_path)
    first, second = (RankingDistillation(RankingDistillationOptions(warm_up=2), asked) for _ in range(2))
    first.begin_epoch(5, 10, factors(N_USERS, N_ITEMS), generator())
    second.load_state_dict(first.state_dict())
    assert bool(second.dynamic)


def by_hand(scores, targets) -> float:
    total = 0.0
    for score, target in zip(scores, targets, strict=True):
        q = 1 / (1 + math.exp(-target))
        total += q * math.log1p(math.exp(-score)) + (1 - q) * math.log1p(math.exp(score))
    return total


@pytest.mark.parametrize("sampling", ["teacher", "student", "mixed"])
def test_collaborative_distillation_is_the_formula(tmp_path, train, sampling):
    teacher, student = factors(N_USERS, N_ITEMS, seed=1), factors(N_USERS, N_ITEMS)
    asked = lessons(teacher, train, tmp_path)
    options = CollaborativeDistillationOptions(length=8, sample=5, temperature=2.0, rank_scale=4.0, sampling=sampling)
    knowledge = CollaborativeDistillation(options, asked)
    knowledge.begin_epoch(0, 10, student, generator())
    prepared = knowledge.prepare(QUERIES, generator(3))
    got = summed(knowledge, student, QUERIES, prepared)
    wanted, scores, taught = 0.0, table(student).detach().numpy(), table(teacher).detach().numpy()
    for row, user in enumerate(QUERIES.tolist()):
        seen = set(train.of(user).tolist())
        listed = sorted(set(range(N_ITEMS)) - seen, key=lambda item: -taught[user, item])[:8]
        items = prepared["items"][row][prepared["mask"][row]].tolist()
        assert len(set(items)) == len(items)
        assert set(items) <= set(listed)
        if listed:
            own = taught[user, listed]
            targets = (taught[user, items] - own.mean()) / own.std() / 2.0
            wanted += by_hand(scores[user, items], targets)
        if sampling == "teacher" and len(listed) == 8:
            assert len(items) == 5
    assert got.item() == pytest.approx(wanted, rel=1e-4)


def test_student_ranks_are_estimated_from_a_sample_of_unseen_items(tmp_path, train):
    """The estimate within sampling error of the rank among the unseen; who has everything is out of the question."""
    teacher, student = factors(N_USERS, N_ITEMS, seed=1), factors(N_USERS, N_ITEMS)
    asked = lessons(teacher, train, tmp_path)
    knowledge = CollaborativeDistillation(CollaborativeDistillationOptions(length=6, sampling="student"), asked)
    knowledge.begin_epoch(0, 10, student, generator())
    scores = table(student).detach().numpy()
    for user in (0, 7, 11):
        unseen = np.setdiff1d(np.arange(N_ITEMS), train.of(user))
        for place, item in enumerate(asked.lists(6).items[user]):
            share = (scores[user, unseen] > scores[user, item]).mean()
            assert abs(knowledge.student_rank[user, place] - share * (N_ITEMS - 1)) <= 0.2 * N_ITEMS


def test_student_guided_draws_only_what_the_student_ranks_too_low(tmp_path):
    teacher = factors(4, 30, seed=1)
    asked = lessons(teacher, history_of([[]] * 4, 30), tmp_path)
    knowledge = CollaborativeDistillation(
        CollaborativeDistillationOptions(length=30, sample=30, sampling="student"), asked
    )
    knowledge.student_rank.copy_(torch.arange(30).expand(4, -1))  # the student ranks as the teacher does
    assert not knowledge.prepare(torch.arange(4), generator())["mask"].any()
    knowledge.student_rank[2, 10] = 25  # but for the teacher's 11th of user 2
    prepared = knowledge.prepare(torch.arange(4), generator())
    assert prepared["mask"].sum(dim=1).tolist() == [0, 0, 1, 0]
    assert prepared["items"][2][prepared["mask"][2]].item() == asked.lists(30).items[2, 10]


def test_student_ranks_are_state(tmp_path, train):
    asked = lessons(factors(N_USERS, N_ITEMS), train, tmp_path)
    options = CollaborativeDistillationOptions(length=6, sampling="mixed")
    first, second = (CollaborativeDistillation(options, asked) for _ in range(2))
    first.begin_epoch(0, 10, factors(N_USERS, N_ITEMS, seed=2), generator())
    second.load_state_dict(first.state_dict())
    one, two = (each.prepare(QUERIES, generator(1)) for each in (first, second))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_flat_list_gives_even_odds(tmp_path):
    """A teacher that scores all alike has nothing to say: targets of one half, not rounding blown up."""
    teacher = factors(3, 6)
    with torch.no_grad():
        teacher.item.zero_()
        teacher.bias.fill_(0.3)
    knowledge = CollaborativeDistillation(
        CollaborativeDistillationOptions(length=6, sample=6), lessons(teacher, history_of([[]] * 3, 6), tmp_path)
    )
    targets = knowledge.prepare(torch.arange(3), generator())["targets"]
    assert targets.abs().max() < 0.1


def test_positions_have_no_student_ranks(tmp_path):
    train = histories(5, 9, shortest=2)
    asked = lessons(sasrec(5, 9), train, tmp_path, by_position=True)
    CollaborativeDistillation(CollaborativeDistillationOptions(), asked)
    with pytest.raises(UserError, match="wanted 'teacher' for a sequential student"):
        CollaborativeDistillation(CollaborativeDistillationOptions(sampling="mixed"), asked)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        (RankingDistillationOptions, {"length": 0}),
        (RankingDistillationOptions, {"mu": 0.0}),
        (CollaborativeDistillationOptions, {"sampling": "teachers"}),
        (CollaborativeDistillationOptions, {"temperature": -1.0}),
    ],
)
def test_options_out_of_range_are_refused(options, values):
    with pytest.raises(ValueError, match=next(iter(values))):
        options(**values)
