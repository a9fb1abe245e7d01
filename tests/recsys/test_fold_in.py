"""Vectors for users the model has never met."""

from __future__ import annotations

import numpy as np
import pytest

from apps.recsys.fold_in import fit_fold_in, fold_in, summary


def world(n_users=400, n_items=60, dimension=4, seed=0):
    """Return users whose vectors really are a linear function of what they had."""
    generator = np.random.default_rng(seed)
    items = generator.standard_normal((n_items, dimension)).astype(np.float32)
    bias = generator.standard_normal(n_items).astype(np.float32)
    lengths = generator.integers(3, 20, n_users)
    histories = [generator.choice(n_items, length, replace=False).astype(np.int32) for length in lengths]
    turn = generator.standard_normal((dimension, dimension)).astype(np.float32)
    users = np.stack([items[history].mean(axis=0) @ turn for history in histories])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return users, items, bias, indptr, np.concatenate(histories), histories


def test_a_linear_world_is_found_for_users_held_out():
    users, items, bias, indptr, seen, histories = world()
    weight, about = fit_fold_in(users, items, bias, indptr, seen)
    assert about["users_held_out"] == 80
    assert about["overlap@10"] > 0.9 > about["popularity_overlap@10"]
    guess = np.stack([fold_in(weight, items, bias, history) for history in histories])
    assert np.corrcoef(guess.ravel(), users.ravel())[0, 1] > 0.95


def test_the_figures_are_of_users_the_fit_has_not_seen():
    """With as many unknowns as users a fit can repeat the users it saw, and knows nothing of others."""
    generator = np.random.default_rng(1)
    users, items, _, indptr, seen, _ = world(n_users=40)
    _, about = fit_fold_in(generator.standard_normal(users.shape).astype(np.float32), items, None, indptr, seen)
    assert about["overlap@10"] < 0.6


def test_the_same_input_gives_the_same_bits():
    users, items, bias, indptr, seen, _ = world(seed=3)
    first, second = (fit_fold_in(users, items, bias, indptr, seen)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_summary_by_hand():
    items = np.array([[1, 0], [0, 2], [4, 4]], np.float32)
    bias = np.array([1, 3, 5], np.float32)
    root = 2**-0.5
    wanted = [0.5, 1, root, 2 * root, 2, root, 1]
    np.testing.assert_allclose(summary(items, bias, [np.array([0, 1, 1])])[0], wanted, rtol=1e-6)
    assert not summary(items, bias, [np.array([], np.int32)]).any()


@pytest.mark.parametrize("lengths", [[1], [0, 0, 1], [70, 1, 2]])
def test_few_users_and_short_histories_give_finite_vectors(lengths):
    generator = np.random.default_rng(0)
    items = generator.standard_normal((80, 3)).astype(np.float32)
    seen = np.concatenate([generator.permutation(80)[:length] for length in lengths]).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    weight, _ = fit_fold_in(np.ones((len(lengths), 3), np.float32), items, None, indptr, seen)
    for length in (0, 1, 3, 64, 80):
        vector = fold_in(weight, items, None, np.arange(length, dtype=np.int32))
        assert vector.shape == (3,)
        assert np.isfinite(vector).all()


def test_no_history_at_all_gives_zeros():
    items = np.ones((3, 2), np.float32)
    weight, about = fit_fold_in(np.ones((2, 2), np.float32), items, None, np.zeros(3, np.int64), np.empty(0, np.int32))
    assert about == {"users_held_out": 0, "overlap@10": 0.0, "popularity_overlap@10": 0.0}
    assert not fold_in(weight, items, None, np.array([0])).any()
