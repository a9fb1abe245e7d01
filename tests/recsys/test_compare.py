"""Comparisons against a direct computation on small evaluations."""

from __future__ import annotations

import numpy as np
import pytest

from apps.recsys.compare import compare, per_user
from apps.recsys.evaluate import Evaluation


def _evaluation(users: list[int], values: list[float]) -> Evaluation:
    empty = np.empty(0, dtype=np.int32)
    return Evaluation(
        part="test",
        users=np.array(users, dtype=np.int32),
        n_relevant=np.ones(len(users), dtype=np.int64),
        per_user={"ndcg@10": np.array(values)},
        means={"ndcg@10": float(np.mean(values))},
        lists={},
        hit_row=empty,
        hit_position=empty,
        hit_item=empty,
    )


@pytest.fixture
def evaluations() -> dict[tuple[str, str], list[Evaluation]]:
    """Two seeds; user 7 is tested with the second seed only."""
    return {
        ("teacher", "ease"): [_evaluation([1, 2, 5], [0.9, 0.8, 0.7]), _evaluation([1, 2, 5, 7], [0.9, 0.7, 0.8, 0.1])],
        ("baseline", "ials"): [
            _evaluation([1, 2, 5], [0.3, 0.2, 0.1]),
            _evaluation([1, 2, 5, 7], [0.1, 0.2, 0.3, 0.0]),
        ],
        ("student", "mf"): [_evaluation([1, 2, 5], [0.6, 0.5, 0.4]), _evaluation([1, 2, 5, 7], [0.5, 0.6, 0.4, 1.0])],
    }


def test_only_users_of_every_seed_are_compared(evaluations):
    scores = per_user(evaluations, "ndcg@10")
    assert scores["student", "mf"].tolist() == [[0.6, 0.5, 0.4], [0.5, 0.6, 0.4]]


def test_differences_and_gap(evaluations):
    rows = {row["b"]["role"]: row for row in compare(evaluations, "ndcg@10", n_resamples=200)}
    assert rows["teacher"]["difference"] == pytest.approx(0.5 - 0.8)
    assert "gap_closed" not in rows["teacher"]
    assert rows["baseline"]["difference"] == pytest.approx(0.5 - 0.2)
    assert rows["baseline"]["gap_closed"]["value"] == pytest.approx((0.5 - 0.2) / (0.8 - 0.2))
    assert rows["baseline"]["low"] <= 0.3 <= rows["baseline"]["high"]
    assert (rows["baseline"]["n_seeds"], rows["baseline"]["n_units"]) == (2, 3)


def test_the_same_evaluations_give_the_same_intervals(evaluations):
    assert compare(evaluations, "ndcg@10", n_resamples=50) == compare(evaluations, "ndcg@10", n_resamples=50)
