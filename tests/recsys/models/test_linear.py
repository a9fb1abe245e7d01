"""EASE against one ridge regression an item, SVD against numpy, ALS against its own objective and the library."""

from __future__ import annotations

import implicit
import numpy as np
import pytest
import torch

from apps.recsys.models import linear
from apps.recsys.models.linear import Ease, EaseOptions, IalsOptions, fit_ials, fit_svd
from kdcore.config import UserError
from tests.recsys.made import Table, factors, histories, history_of


@pytest.mark.parametrize("l2", [0.5, 50.0])
def test_ease_is_one_ridge_regression_an_item(l2):
    """Column j predicts item j from all the others, penalised; the derivation by precision matrix is not used here."""
    train = histories(30, 9, longest=7)
    train = history_of([*(train.of(user).tolist() for user in range(30)), [3, 3, 5]], 9)  # a repeated item counts once
    x = train.matrix().toarray().astype(np.float64)
    assert x.max() == 1.0
    wanted = np.zeros((9, 9))
    for item in range(9):
        others = np.delete(np.arange(9), item)
        gram = x[:, others].T @ x[:, others] + l2 * np.eye(8)
        wanted[others, item] = np.linalg.solve(gram, x[:, others].T @ x[:, item])
    model = Ease.fit(train, EaseOptions(l2))
    np.testing.assert_allclose(model.weight, wanted, rtol=1e-5, atol=1e-7)
    users = np.array([4, 30, 0])
    np.testing.assert_allclose(model.scores(torch.from_numpy(users), train), x[users] @ wanted, rtol=1e-4, atol=1e-6)


def test_ease_keeps_its_digits_where_items_nearly_always_come_together():
    """Float32 would lose the weights between items that only a few of many users tell apart."""
    lists = [[0, 1, 2]] * 4000 + [[0, 1], [1, 2], [0]]
    train = history_of(lists, 3)
    x = train.matrix().toarray().astype(np.float64)
    model = Ease.fit(train, EaseOptions(1e-3))
    for item in range(3):
        others = np.delete(np.arange(3), item)
        gram = x[:, others].T @ x[:, others] + 1e-3 * np.eye(2)
        np.testing.assert_allclose(
            model.weight[others, item], np.linalg.solve(gram, x[:, others].T @ x[:, item]), rtol=1e-3
        )


def test_ease_of_a_user_without_items_and_an_item_without_users():
    train = history_of([[], [0, 1], [1]], 3)
    model = Ease.fit(train, EaseOptions(1.0))
    scores = model.scores(torch.arange(3), train)
    assert not scores[0].any()
    assert not scores[:, 2].any()
    assert torch.isfinite(scores).all()


def test_ease_refuses_what_it_cannot_hold(monkeypatch):
    monkeypatch.setattr(linear, "_EASE_MAX_ITEMS", 19)
    with pytest.raises(UserError, match="at most 19 items"):
        Ease.fit(histories(), EaseOptions())
    with pytest.raises(ValueError, match="l2"):
        EaseOptions(l2=0.0)


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)])
@pytest.mark.parametrize("dimension", [1, 4, 8])
@pytest.mark.parametrize("held", [True, False])
def test_svd_is_the_best_factorisation_of_that_rank(shape, dimension, held, monkeypatch):
    """Both ways of multiplying: scores held, and scored again for every product, in blocks of 4 users."""
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if not held:
        monkeypatch.setattr(linear, "_SVD_HELD_CELLS", 0)
    model = fit_svd(Table(scores), history_of([[]] * shape[0], shape[1]), dimension, seed=0, block_users=4)
    left, values, right = np.linalg.svd(scores.numpy().astype(np.float64), full_matrices=False)
    wanted = (left[:, :dimension] * values[:dimension]) @ right[:dimension]
    got = model.scores(torch.arange(shape[0]), history_of([[]] * shape[0], shape[1])).detach()
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    np.testing.assert_allclose(model.user.detach().norm(dim=0).sort().values ** 2, values[:dimension][::-1], rtol=1e-4)
    assert model.label() == f"svd-{dimension}"


@pytest.mark.parametrize("shape", [(3, 9), (9, 3), (1, 1)])
def test_svd_of_more_dimensions_than_there_are_users_or_items(shape):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    empty = history_of([[]] * shape[0], shape[1])
    model = fit_svd(Table(scores), empty, 8, seed=0)
    assert model.user.shape == (shape[0], 8)
    np.testing.assert_allclose(model.scores(torch.arange(shape[0]), empty).detach(), scores, atol=1e-5)


def test_svd_of_a_seed_is_the_same_again():
    teacher, empty = factors(30, 25, 6), histories(30, 25)
    first, again = (fit_svd(teacher, empty, 3, seed=5) for _ in range(2))
    assert torch.equal(first.user, again.user)


def objective(x: np.ndarray, user: np.ndarray, item: np.ndarray, options: IalsOptions) -> float:
    """Hu, Koren and Volinsky: confidence alpha where observed and 1 elsewhere, preference 1 and 0."""
    confidence = np.where(x > 0, options.alpha, 1.0)
    error = (confidence * (x - user @ item.T) ** 2).sum()
    return float(error + options.regularization * ((user**2).sum() + (item**2).sum()))


def test_ials_lowers_its_objective_and_is_the_library():
    train = histories(25, 14, longest=8, shortest=1)
    x = train.matrix().toarray().astype(np.float64)
    losses = []
    for iterations in (1, 3, 10):
        options = IalsOptions(dimension=4, regularization=0.5, alpha=3.0, iterations=iterations)
        model = fit_ials(train, options, seed=0, threads=1)
        losses.append(objective(x, model.user.detach().double().numpy(), model.item.detach().double().numpy(), options))
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < objective(x, np.zeros((25, 4)), np.zeros((14, 4)), options)
    library = implicit.cpu.als.AlternatingLeastSquares(
        factors=4, regularization=0.5, alpha=3.0, iterations=10, random_state=0, num_threads=1
    )
    library.fit(train.matrix(), show_progress=False)
    assert np.array_equal(model.item.detach(), library.item_factors)
    assert model.label() == "ials-4"
    assert model.item_bias() is None


def test_ials_of_a_user_without_items_scores_nothing():
    train = history_of([[], [0, 1], [1, 2], [0, 2]], 3)
    model = fit_ials(train, IalsOptions(dimension=2), seed=0, threads=1)
    assert not model.scores(torch.tensor([0]), train).any()
