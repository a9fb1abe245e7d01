"""Distillation experts: which vectors are rebuilt, by a loop over experts, and what stays behind."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from apps.recsys.knowledge.experts import (
    DistillationExperts,
    DistillationExpertsOptions,
    ItemDistillationExperts,
)
from apps.recsys.models.linear import Ease, EaseOptions
from kdcore.config import UserError
from tests.recsys.knowledge.asked import summed
from tests.recsys.made import factors, generator, histories, lessons, sasrec

N_USERS, N_ITEMS = 9, 12
TRAIN = histories(N_USERS, N_ITEMS, shortest=1)
QUERIES = torch.tensor([8, 0, 3])


def rebuilt_by_loop(experts, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """One vector: every expert by itself, mixed by the gate (no noise: evaluation mode)."""
    gate = torch.softmax(torch.log_softmax(experts.gate(teacher), 0) / temperature, 0)
    wide = experts.hidden_dim
    total = torch.zeros_like(teacher)
    for m in range(experts.n_experts):
        weight, bias = experts.first.weight[m * wide : (m + 1) * wide], experts.first.bias[m * wide : (m + 1) * wide]
        hidden = functional.relu(weight @ student + bias)
        total = total + gate[m] * (hidden @ experts.second[m] + experts.second_bias[m])
    return total


@pytest.mark.parametrize("kind", [DistillationExperts, ItemDistillationExperts])
@pytest.mark.parametrize("sequential", [False, True])
def test_the_loss_is_the_error_of_what_the_experts_rebuild(tmp_path, kind, sequential):
    """From a factor teacher and from one whose user vectors are states of histories."""
    teacher = sasrec(N_USERS, N_ITEMS) if sequential else factors(N_USERS, N_ITEMS, 5, seed=1)
    student = factors(N_USERS, N_ITEMS, 3)
    knowledge = kind(DistillationExpertsOptions(experts=4), lessons(teacher, TRAIN, tmp_path)).eval()
    knowledge.begin_epoch(3, 10, student, generator())
    got = summed(knowledge, student, QUERIES, knowledge.prepare(QUERIES, generator()))
    if kind is DistillationExperts:
        source, target = student.user, teacher.user_vectors(torch.arange(N_USERS), TRAIN)
    else:
        source, target = student.item, teacher.item_vectors()
    temperature = 1.0 * (1e-10 / 1.0) ** (3 / 10)
    wanted = sum(
        (target[q] - rebuilt_by_loop(knowledge.experts, source[q], target[q].detach(), temperature)).square().sum()
        for q in QUERIES.tolist()
    )
    torch.testing.assert_close(got, wanted)
    got.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in teacher.parameters())
    touched = source.grad.abs().sum(dim=1) > 0
    assert set(touched.nonzero()[:, 0].tolist()) <= set(QUERIES.tolist())


def test_many_users_of_a_sequential_teacher_are_encoded_in_blocks(tmp_path, monkeypatch):
    train = histories(1100, N_ITEMS, longest=3)
    teacher = sasrec(1100, N_ITEMS)
    sizes = []
    plain = teacher.user_vectors
    monkeypatch.setattr(teacher, "user_vectors", lambda users, own: sizes.append(len(users)) or plain(users, own))
    knowledge = DistillationExperts(DistillationExpertsOptions(experts=2), lessons(teacher, train, tmp_path))
    assert max(sizes) <= 512
    with torch.no_grad():
        torch.testing.assert_close(knowledge.target[[3, 1099]], plain(torch.tensor([3, 1099]), train))


def test_the_gate_cools_from_start_to_end_and_is_state(tmp_path):
    asked = lessons(factors(N_USERS, N_ITEMS), TRAIN, tmp_path)
    knowledge = DistillationExperts(DistillationExpertsOptions(experts=2, start=2.0, end=1e-4), asked)
    seen = []
    for epoch in range(5):
        knowledge.begin_epoch(epoch, 5, factors(N_USERS, N_ITEMS), generator())
        seen.append(float(knowledge.temperature))
    assert seen == pytest.approx([2.0 * (5e-5) ** (epoch / 5) for epoch in range(5)])
    # the teacher's vectors are not saved with every checkpoint; the temperature and the experts are
    state = knowledge.state_dict()
    assert "temperature" in state
    assert "target" not in state
    assert any(name.startswith("experts.") for name in state)


def test_what_has_no_vectors_is_refused(tmp_path):
    ease = Ease.fit(TRAIN, EaseOptions(1.0))
    with pytest.raises(UserError, match="ease, which has no user and item vectors"):
        DistillationExperts(DistillationExpertsOptions(), lessons(ease, TRAIN, tmp_path))
    sequential = lessons(sasrec(N_USERS, N_ITEMS), TRAIN, tmp_path, by_position=True)
    for kind in (DistillationExperts, ItemDistillationExperts):
        with pytest.raises(UserError, match="a vector a user"):
            kind(DistillationExpertsOptions(), sequential)
    with pytest.raises(ValueError, match="experts"):
        DistillationExpertsOptions(experts=0)
