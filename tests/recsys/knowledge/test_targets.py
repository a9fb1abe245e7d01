"""Soft targets over all items and over the kept ones, against sums written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.recsys.knowledge.targets import (
    SoftTargets,
    SoftTargetsOptions,
    SparseSoftTargets,
    SparseSoftTargetsOptions,
)
from tests.recsys.knowledge.asked import summed, table
from tests.recsys.made import Table, factors, generator, histories, history_of, lessons

N_USERS, N_ITEMS = 9, 12
USERS = torch.tensor([8, 0, 3])
TRAIN = histories(N_USERS, N_ITEMS)


def probabilities(scores: np.ndarray) -> np.ndarray:
    return np.exp(scores) / np.exp(scores).sum()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_soft_targets_are_the_divergence_from_the_standardised_teacher(tmp_path, temperature):
    teacher, student = factors(N_USERS, N_ITEMS, seed=1), factors(N_USERS, N_ITEMS)
    asked = lessons(teacher, TRAIN, tmp_path)
    knowledge = SoftTargets(SoftTargetsOptions(temperature=temperature, sharpness=1.7), asked)
    got = summed(knowledge, student, USERS, knowledge.prepare(USERS, generator()))
    wanted = 0.0
    for user in USERS.tolist():
        taught = table(teacher)[user].detach().numpy()
        p = probabilities(1.7 * (taught - taught.mean()) / taught.std() / temperature)
        q = probabilities(table(student)[user].detach().numpy() / temperature)
        wanted += temperature**2 * (p * np.log(p / q)).sum()
    assert got.item() == pytest.approx(wanted, rel=1e-4)


def test_soft_targets_do_not_depend_on_the_teachers_scale(tmp_path):
    scores = torch.randn(N_USERS, N_ITEMS, generator=generator())
    prepared = [
        SoftTargets(SoftTargetsOptions(), lessons(Table(each), TRAIN, tmp_path)).prepare(USERS, generator())["targets"]
        for each in (scores, scores * 1e-3 + 4)
    ]
    torch.testing.assert_close(*prepared, atol=2e-3, rtol=0)


def test_a_teacher_that_says_nothing_teaches_all_alike(tmp_path):
    flat = Table(torch.full((N_USERS, N_ITEMS), 0.1))
    knowledge = SoftTargets(SoftTargetsOptions(), lessons(flat, TRAIN, tmp_path))
    p = torch.softmax(knowledge.prepare(USERS, generator())["targets"], dim=1)
    torch.testing.assert_close(p, torch.full_like(p, 1 / N_ITEMS), rtol=0.1, atol=0)


@pytest.mark.parametrize(("length", "temperature"), [(4, 1.0), (4, 2.0), (12, 1.5), (500, 1.0)])
def test_sparse_soft_targets_lump_what_is_not_kept(tmp_path, length, temperature):
    teacher, student = factors(N_USERS, N_ITEMS, seed=1), factors(N_USERS, N_ITEMS)
    knowledge = SparseSoftTargets(
        SparseSoftTargetsOptions(length=length, temperature=temperature), lessons(teacher, TRAIN, tmp_path)
    )
    got = summed(knowledge, student, USERS, knowledge.prepare(USERS, generator()))
    wanted = 0.0
    for user in USERS.tolist():
        p = probabilities(table(teacher)[user].detach().numpy() / temperature)
        q = probabilities(table(student)[user].detach().numpy() / temperature)
        kept = np.argsort(-p)[:length]
        wanted += temperature**2 * (p[kept] * np.log(p[kept] / q[kept])).sum()
        if length < N_ITEMS:
            rest_p, rest_q = 1 - p[kept].sum(), 1 - q[kept].sum()
            wanted += temperature**2 * rest_p * np.log(rest_p / rest_q)
    assert got.item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", [SoftTargets, SparseSoftTargets])
def test_nothing_is_left_to_learn_from_oneself(tmp_path, kind):
    """A student equal to its teacher (of unit spread, for the standardised form) gets loss 0 and no gradient."""
    student = factors(N_USERS, N_ITEMS)
    if kind is SoftTargets:
        with torch.no_grad():
            scores = table(student).float()
            scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)
        student = factors(N_USERS, N_ITEMS, N_ITEMS, bias=False)
        with torch.no_grad():
            student.user.copy_(scores)
            student.item.copy_(torch.eye(N_ITEMS))
    options = kind.options_type(**({"sharpness": 1.0} if kind is SoftTargets else {"length": 5}))
    knowledge = kind(options, lessons(student, TRAIN, tmp_path))
    loss = summed(knowledge, student, USERS, knowledge.prepare(USERS, generator()))
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert student.user.grad.abs().max() < 1e-5


def test_one_item(tmp_path):
    student, asked = factors(2, 1), lessons(factors(2, 1, seed=1), history_of([[0], []], 1), tmp_path)
    for kind in (SoftTargets, SparseSoftTargets):
        knowledge = kind(kind.options_type(), asked)
        loss = summed(knowledge, student, torch.arange(2), knowledge.prepare(torch.arange(2), generator()))
        loss.backward()
        assert loss.item() == pytest.approx(0.0, abs=1e-6)
        assert torch.isfinite(student.item.grad).all()


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"sharpness": -1.0}, {"length": 0}])
def test_options_out_of_range_are_refused(values):
    options = SparseSoftTargetsOptions if "length" in values else SoftTargetsOptions
    with pytest.raises(ValueError, match=next(iter(values))):
        options(**values)
