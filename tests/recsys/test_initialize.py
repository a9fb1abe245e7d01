"""A student's first weights: the best of its size for what the teacher knows, and refused where there are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.recsys.initialize import initialize_from
from apps.recsys.models.factors import LightGCN, LightGCNOptions
from kdcore.config import UserError
from tests.recsys.made import factors, histories, sasrec

TRAIN = histories(8, 12, shortest=1)


def best_of_rank(matrix: np.ndarray, rank: int) -> np.ndarray:
    left, values, right = np.linalg.svd(matrix)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def test_a_factor_student_starts_from_the_best_factors_of_the_teachers_scores():
    teacher, student = factors(8, 12, 6), factors(8, 12, 3, seed=1)
    bias = student.bias.detach().clone()
    initialize_from(student, teacher, TRAIN, 0)
    scores = teacher.scores(torch.arange(8), TRAIN).detach().double().numpy()
    np.testing.assert_allclose((student.user @ student.item.T).detach(), best_of_rank(scores, 3), atol=1e-4)
    assert torch.equal(student.bias, bias)


def test_a_sequential_student_keeps_the_teachers_inner_products_as_well_as_its_size_can():
    teacher, student = sasrec(8, 12, dimension=8), sasrec(8, 12, dimension=4, seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    initialize_from(student, teacher, TRAIN, 0)
    items = teacher.item_vectors().detach().double().numpy()
    own = student.item_vectors().detach()
    np.testing.assert_allclose(own @ own.T, best_of_rank(items @ items.T, 4), atol=1e-3)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"item"}
    assert torch.equal(student.item[12], before["item"][12])  # padding


def test_what_cannot_start_so_is_refused():
    with pytest.raises(UserError, match="at least 8 dimensions"):
        initialize_from(sasrec(8, 12, dimension=8), sasrec(8, 12, dimension=4), TRAIN, 0)
    with pytest.raises(UserError, match="got lightgcn"):
        initialize_from(LightGCN(TRAIN, LightGCNOptions(dimension=3)), factors(8, 12), TRAIN, 0)
