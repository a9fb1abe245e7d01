"""Factor models: what a score is, and LightGCN against dense matrices and autograd's own gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.recsys.models.factors import (
    LightGCN,
    LightGCNOptions,
    MatrixFactorization,
    MatrixFactorizationOptions,
)
from tests.recsys.made import factors, histories, history_of


@pytest.mark.parametrize("bias", [True, False])
def test_every_way_of_scoring_is_the_same_score(bias):
    """All pairs by a loop; then pair by pair, in lists, in columns, whole rows, and through ``scores``."""
    model = factors(6, 5, bias=bias)
    wanted = torch.tensor(
        [
            [(model.user[u] @ model.item[i]).item() + (model.bias[i].item() if bias else 0.0) for i in range(5)]
            for u in range(6)
        ]
    )
    encoded, users, items = model.encode(), torch.tensor([5, 0, 5]), torch.tensor([[1, 4], [0, 0], [2, 1]])
    torch.testing.assert_close(encoded.everything(users), wanted[users])
    torch.testing.assert_close(encoded.pair(users, items[:, 0]), wanted[users, items[:, 0]])
    torch.testing.assert_close(encoded.lists(users, items), wanted[users[:, None], items])
    columns = torch.tensor([[0, 3], [1, 1]])
    torch.testing.assert_close(encoded.columns(torch.tensor([2, 4]), columns), wanted[columns, [[2], [4]]])
    torch.testing.assert_close(model.scores(users, histories(6, 5)), wanted[users])


def test_gradients_of_gathered_scores_are_those_of_the_whole_table():
    model = factors(6, 5)
    users, items = torch.tensor([5, 0, 5]), torch.tensor([[1, 4, 1], [0, 0, 2], [2, 1, 4]])
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    (model.encode().lists(users, items) * weights).sum().backward()
    got = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    table = model.user @ model.item.T + model.bias
    (table[users[:, None], items] * weights).sum().backward()
    for value, parameter in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(value, parameter.grad)


def test_a_model_without_bias_stores_none():
    model = MatrixFactorization(3, 4, MatrixFactorizationOptions(dimension=2, bias=False))
    assert set(model.state_dict()) == {"user", "item"}
    assert model.parameter_count() == 3 * 2 + 4 * 2


def dense_propagation(train, embedding: torch.Tensor, layers: int) -> torch.Tensor:
    """The paper's equation with dense matrices: mean of A^k E, A = D^-1/2 [[0, R], [R', 0]] D^-1/2."""
    pairs = torch.zeros(train.n_users, train.n_items, dtype=embedding.dtype)
    for user in range(train.n_users):
        pairs[user, train.of(user).tolist()] = 1.0
    adjacency = torch.zeros(len(embedding), len(embedding), dtype=embedding.dtype)
    adjacency[: train.n_users, train.n_users :] = pairs
    adjacency[train.n_users :, : train.n_users] = pairs.T
    root = adjacency.sum(1).clamp(min=1).rsqrt()
    adjacency = root[:, None] * adjacency * root
    return torch.stack([torch.linalg.matrix_power(adjacency, hop) @ embedding for hop in range(layers + 1)]).mean(0)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_lightgcn_is_the_dense_propagation_and_so_is_its_gradient(layers):
    """User 0 has no items, item 19 no users, and user 1 had one item twice."""
    train = histories(10, 19, longest=8, seed=3)
    train = history_of([[], [4, 7, 4], *(train.of(user).tolist() for user in range(2, 10))], 20)
    torch.manual_seed(0)
    model = LightGCN(train, LightGCNOptions(dimension=3, layers=layers, scale=1.0))
    weights = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    encoded = model.encode()
    got = torch.cat([encoded.user, encoded.item])
    (got * weights).sum().backward()
    gradient, model.embedding.grad = model.embedding.grad, None
    wanted = dense_propagation(train, model.embedding, layers)
    torch.testing.assert_close(got, wanted)
    (wanted * weights).sum().backward()
    torch.testing.assert_close(gradient, model.embedding.grad)


def test_lightgcn_gradient_when_only_one_side_is_used():
    train = histories(10, 20, longest=8, seed=3)
    model = LightGCN(train, LightGCNOptions(dimension=3, layers=2))
    model.encode().user[2].sum().backward()
    gradient, model.embedding.grad = model.embedding.grad, None
    dense_propagation(train, model.embedding, 2)[2].sum().backward()
    torch.testing.assert_close(gradient, model.embedding.grad)


def test_finalized_lightgcn_scores_as_before_and_needs_no_graph():
    train = histories(10, 20, seed=3)
    model = LightGCN(train, LightGCNOptions(dimension=3, layers=2, scale=1.0))
    final = model.finalize()
    users = torch.tensor([3, 9, 0])
    torch.testing.assert_close(final.scores(users, train), model.scores(users, train))
    assert final.label() == "lightgcn-3"
    assert {name: tuple(value.shape) for name, value in final.state_dict().items()} == {
        "user": (10, 3),
        "item": (20, 3),
    }
    assert np.isclose(final.parameter_count(), model.parameter_count())


@pytest.mark.parametrize(
    "options", [{"dimension": 0}, {"dimension": 4, "scale": 0.0}, {"dimension": 4, "scale": float("nan")}]
)
def test_sizes_that_make_no_model_are_refused(options):
    for kind in (MatrixFactorizationOptions, LightGCNOptions):
        with pytest.raises(ValueError, match=r"dimension|scale"):
            kind(**options)
