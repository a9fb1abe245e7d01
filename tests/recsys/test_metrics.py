"""Metrics against ranx on the same lists, and list-level values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.recsys.data.histories import Histories
from apps.recsys.metrics import (
    USER_METRICS,
    count_relevant,
    coverage,
    distinct,
    find_hits,
    gini,
    novelty,
    parse_metric,
    self_information,
)
from kdcore.config import UserError
from tests.recsys.reference import RANX_NAMES, by_ranx


def random_lists(seed: int, n_users: int, n_items: int, length: int) -> tuple[np.ndarray, Histories]:
    """Ranked lists, some shorter than ``length`` (filled with -1), and relevant items, at least one per user."""
    generator = np.random.default_rng(seed)
    ranked = np.stack([generator.permutation(n_items)[:length] for _ in range(n_users)])
    kept = generator.integers(1, length + 1, n_users)
    kept[generator.random(n_users) < 0.5] = length
    ranked[np.arange(length) >= kept[:, None]] = -1
    sizes = generator.integers(1, n_items + 1, n_users)
    sizes[generator.random(n_users) < 0.5] = 1
    item = np.concatenate([generator.permutation(n_items)[:size] for size in sizes])
    return ranked, Histories.from_pairs(np.repeat(np.arange(n_users), sizes), item, n_users, n_items)


@pytest.mark.parametrize("name", sorted(RANX_NAMES))
def test_equal_to_ranx(name):
    for seed, (n_items, length) in enumerate([(30, 20), (12, 10), (200, 20), (8, 5)]):
        ranked, relevant = random_lists(seed, 150, n_items, length)
        users = np.arange(150)
        hits, n_relevant = find_hits(ranked, relevant, users), count_relevant(relevant, users)
        for k in (1, 3, 5, 10, 20):
            got = USER_METRICS[name](hits, n_relevant, k)
            assert got.dtype == np.float64 and got.shape == (150,)
            np.testing.assert_allclose(got, by_ranx(ranked, relevant, users, name, k), rtol=0, atol=1e-9)


def test_a_list_worked_out_by_hand():
    hits = np.array([[False, True, True, False]])
    three = np.array([3])
    first, second = 1 / np.log2(3), 1 / np.log2(4)
    ideal = 1 + first + second
    wanted = {"ndcg": (first + second) / ideal, "recall": 2 / 3, "hr": 1, "mrr": 1 / 2, "precision": 2 / 4}
    for name, value in {**wanted, "map": (1 / 2 + 2 / 3) / 3}.items():
        assert USER_METRICS[name](hits, three, 4)[0] == pytest.approx(value, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
def test_between_zero_and_one_and_one_for_a_perfect_list(seed, k):
    ranked, relevant = random_lists(seed, 10, 15, 12)
    users = np.arange(10)
    hits, n_relevant = find_hits(ranked, relevant, users), count_relevant(relevant, users)
    perfect = np.arange(12) < n_relevant[:, None]
    for name, metric in USER_METRICS.items():
        values = metric(hits, n_relevant, k)
        assert ((values >= 0) & (values <= 1 + 1e-12)).all()
        assert (values <= metric(perfect, n_relevant, k) + 1e-12).all()
        if name in ("ndcg", "hr", "mrr"):
            np.testing.assert_allclose(metric(perfect, n_relevant, k), 1.0)


def test_hits_of_a_subset_of_users_with_repeats_and_without_relevant_items():
    relevant = Histories.from_pairs(np.array([0, 0, 2, 2, 2]), np.array([1, 3, 0, 4, 4]), 3, 5)
    ranked = np.array([[4, 1, -1], [0, 1, 2], [3, 1, 0]])
    hits = find_hits(ranked, relevant, np.array([2, 1, 0]))
    assert hits.tolist() == [[True, False, False], [False, False, False], [True, True, False]]
    assert count_relevant(relevant, np.array([2, 1, 0])).tolist() == [2, 0, 2]
    assert not find_hits(ranked[:1], relevant, np.array([1])).any()
    for metric in USER_METRICS.values():
        assert metric(hits, np.array([2, 0, 2]), 3)[1] == 0.0


@given(st.lists(st.integers(-5, 5)))
def test_distinct_is_unique(keys):
    keys = np.array(keys, dtype=np.int64)
    np.testing.assert_array_equal(distinct(keys), np.unique(keys))


def test_coverage():
    assert coverage(np.array([3, 0, 1, 0])) == 0.5


@settings(max_examples=50)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=30).filter(any))
def test_gini_is_the_mean_absolute_difference(counts):
    counts = np.array(counts)
    differences = np.abs(counts[:, None] - counts[None, :]).mean()
    assert gini(counts) == pytest.approx(differences / (2 * counts.mean()), abs=1e-12)


def test_gini_at_its_ends():
    assert gini(np.array([4, 4, 4])) == pytest.approx(0.0)
    assert gini(np.array([0, 0, 0, 8])) == pytest.approx(0.75)
    assert gini(np.zeros(3)) == 0.0


def test_novelty_counts_users_once_and_stays_finite():
    # four users; item 0 with all of them, item 1 with one (twice), item 2 with nobody
    train = Histories.from_pairs(np.array([0, 1, 2, 3, 0, 0]), np.array([0, 0, 0, 0, 1, 1]), 4, 3)
    information = self_information(train)
    assert information.tolist() == [0.0, 2.0, 2.0]
    assert novelty(np.array([2, 1, 1]), information) == pytest.approx(1.0)
    assert novelty(np.zeros(3), information) == 0.0


def test_parse_metric():
    assert parse_metric("NDCG@10").name == "ndcg@10" and parse_metric("gini@5").per_user is False
    with pytest.raises(UserError, match=r"'ncdg@10': there is no 'ncdg'; did you mean ndcg"):
        parse_metric("ncdg@10")
    with pytest.raises(UserError, match="known are ndcg, recall"):
        parse_metric("zzz@10")
    for text in ("ndcg", "ndcg@", "ndcg@0", "ndcg@-1", "ndcg@1.5", "ndcg@ten"):
        with pytest.raises(UserError, match=r"wanted a cutoff .*ndcg@10"):
            parse_metric(text)
