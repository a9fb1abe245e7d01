"""Several teachers as one: standardised, weighted, and asked about the same users."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.recsys.models.ensemble import Ensemble
from kdcore.config import UserError
from tests.recsys.made import Table, factors, histories, sasrec

TRAIN = histories(6, 10, shortest=1)
USERS = torch.tensor([4, 0, 2])


def standardised(scores: torch.Tensor) -> np.ndarray:
    values = scores.detach().double().numpy()
    return (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)


@pytest.mark.parametrize("weights", [[], [3.0, 1.0]])
def test_scores_are_the_weighted_mean_of_standardised_scores(weights):
    members = [factors(6, 10), factors(6, 10, seed=1)]
    model = Ensemble(members, weights)
    shares = np.array(weights or [1.0, 1.0]) / sum(weights or [1.0, 1.0])
    parts = [standardised(member.scores(USERS, TRAIN)) for member in members]
    np.testing.assert_allclose(model.scores(USERS, TRAIN), shares[0] * parts[0] + shares[1] * parts[1], atol=1e-5)


def test_the_scale_of_a_member_does_not_matter():
    table = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    wide = Table(table * 1000 + 5)
    other = factors(6, 10)
    torch.testing.assert_close(
        Ensemble([wide, other]).scores(USERS, TRAIN),
        Ensemble([Table(table), other]).scores(USERS, TRAIN),
        atol=1e-4,
        rtol=1e-4,
    )


def test_one_member_ranks_as_it_does_alone():
    alone = sasrec(6, 10)
    both = Ensemble([alone])
    assert torch.equal(both.scores(USERS, TRAIN).argsort(dim=1), alone.scores(USERS, TRAIN).argsort(dim=1))
    assert both.sequential


def test_it_is_sequential_if_one_member_is():
    assert not Ensemble([factors(6, 10)]).sequential
    assert Ensemble([factors(6, 10), sasrec(6, 10)]).sequential


def test_no_member_or_a_weight_too_many_is_refused():
    with pytest.raises(UserError, match="at least one member"):
        Ensemble([])
    with pytest.raises(UserError, match="got 2 weights, wanted 1"):
        Ensemble([factors(6, 10)], [1.0, 2.0])
