"""top_k against a stable sort of the full matrix, and the laws of a block-wise search."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.recsys.data.histories import Histories
from apps.recsys.models.base import DotRecommender, Recommender
from apps.recsys.topk import CHUNK, select, top_k

ROOT = Path(__file__).resolve().parents[2]


class Table(Recommender):
    """Scores read from a matrix; remembers the shapes it was asked for."""

    kind = "table"

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", scores)
        self.n_users, self.n_items = scores.shape
        self.asked: list[int] = []

    def scores(self, users, histories):
        self.asked.append(len(users))
        return self.table[users]


class Dot(DotRecommender):
    """Given factors; counts how often the item vectors are made."""

    kind = "dot"

    def __init__(self, user: torch.Tensor, item: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        super().__init__()
        self.user, self.item, self.bias = torch.nn.Parameter(user), torch.nn.Parameter(item), bias
        self.n_users, self.n_items = len(user), len(item)
        self.dropout = torch.nn.Dropout(0.5)
        self.made = 0

    def user_vectors(self, users, histories):
        return self.dropout(self.user[users])

    def item_vectors(self):
        self.made += 1
        return self.dropout(self.item)

    def item_bias(self):
        return self.bias


def none_seen(n_users: int, n_items: int) -> Histories:
    return Histories(np.zeros(n_users + 1, dtype=np.int64), np.zeros(0, dtype=np.int32), n_items)


def by_sorting(scores: np.ndarray, k: int, exclude: Histories) -> tuple[np.ndarray, np.ndarray]:
    """The slow and obvious answer: mask, sort each full row stably, cut."""
    ids = np.full((len(scores), k), -1)
    best = np.full((len(scores), k), -np.inf)
    for user, row in enumerate(scores.astype(np.float64)):
        row = row.copy()
        row[exclude.of(user)] = -np.inf
        order = [item for item in np.argsort(-row, kind="stable") if row[item] > -np.inf][:k]
        ids[user, : len(order)], best[user, : len(order)] = order, row[order]
    return ids, best


@st.composite
def problems(draw):
    """A model with few distinct (exactly representable) scores, items to exclude, k and a block size."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_users = draw(st.integers(1, 12))
    n_items = draw(st.sampled_from([1, 2, 9, CHUNK - 1, CHUNK, CHUNK + 1, 300, 8 * CHUNK, 1500, 9001]))
    high = draw(st.sampled_from([1, 2, 5, 2000]))
    pairs = draw(st.sampled_from([0, 1, n_users * n_items // 2, 2 * n_users * n_items]))
    exclude = Histories.from_pairs(
        generator.integers(0, n_users, pairs), generator.integers(0, n_items, pairs), n_users, n_items
    )
    user, item, bias = (
        torch.from_numpy(generator.integers(1 - high, high, shape).astype(np.float32))
        for shape in [(n_users, 3), (n_items, 3), n_items]
    )
    with_bias = draw(st.booleans())
    scores = user @ item.T + (bias if with_bias else 0.0)
    if draw(st.booleans()):
        model: Recommender = Dot(user, item, bias if with_bias else None)
    else:
        hidden = generator.random(scores.shape) < draw(st.sampled_from([0.0, 0.3, 0.99]))
        scores[torch.from_numpy(hidden)] = -torch.inf
        model = Table(scores)
    k = draw(st.sampled_from([1, 2, 3, 10, 40]))
    return model, scores.numpy(), k, exclude, draw(st.sampled_from([1, 1000, 20_000, 300_000, 64 << 20])), generator


@settings(max_examples=150, deadline=None)
@given(problems())
def test_equals_a_stable_sort_for_any_block_size_and_user_order(problem):
    model, scores, k, exclude, block_bytes, generator = problem
    users = generator.permutation(model.n_users)
    ids, values = top_k(model, users, k, exclude, exclude, block_bytes=block_bytes)
    wanted_ids, wanted_values = by_sorting(scores, k, exclude)
    assert ids.dtype == np.int32 and values.dtype == np.float32
    np.testing.assert_array_equal(ids, wanted_ids[users])
    np.testing.assert_array_equal(values, wanted_values[users])


@pytest.mark.parametrize("n_items", [7, 10 * CHUNK, 40 * CHUNK])
def test_all_scores_equal_gives_the_first_items(n_items):
    values, columns = select(torch.full((3, n_items), 0.25), 5)
    np.testing.assert_array_equal(columns, np.tile(np.arange(5), (3, 1)))
    assert (values == 0.25).all()


def test_ties_that_span_chunks_and_the_cut():
    scores = torch.zeros(2, 40 * CHUNK)
    scores[0, [5, 700, 701, 2000]] = 1.0
    scores[0, [1999, 6]] = 2.0
    scores[1, 1000] = torch.inf
    _, columns = select(scores, 5)
    assert columns.tolist() == [[6, 1999, 5, 700, 701], [1000, 0, 1, 2, 3]]


def test_users_in_any_order_alone_or_together_get_the_same_list():
    generator = torch.Generator().manual_seed(3)
    model = Dot(torch.randn(40, 24, generator=generator), torch.randn(9000, 24, generator=generator))
    nothing = none_seen(40, 9000)
    together = top_k(model, np.arange(40), 10, nothing)
    alone = [top_k(model, np.array([user]), 10, nothing) for user in range(40)]
    np.testing.assert_array_equal(together[0], np.concatenate([ids for ids, _ in alone]))
    np.testing.assert_allclose(together[1], np.concatenate([scores for _, scores in alone]), rtol=1e-6)
    twice = top_k(model, np.array([7, 3, 7]), 10, nothing)[0]
    np.testing.assert_array_equal(twice, together[0][[7, 3, 7]])


def test_no_users_gives_empty_arrays():
    ids, scores = top_k(Table(torch.zeros(2, 4)), np.zeros(0, dtype=np.int64), 3, none_seen(2, 4))
    assert ids.shape == scores.shape == (0, 3)


def test_blocks_bound_the_users_asked_for_at_once():
    model = Table(torch.zeros(100, 640))
    top_k(model, np.arange(100), 3, none_seen(100, 640), block_bytes=640 * 4 * 7)
    assert max(model.asked) == 7 and sum(model.asked) == 100


def test_item_vectors_are_made_once():
    model = Dot(torch.ones(50, 2), torch.ones(3000, 2))
    top_k(model, np.arange(50), 3, none_seen(50, 3000), block_bytes=20_000)
    assert model.made == 1


def test_evaluation_mode_without_gradients_and_everything_given_back():
    model = Dot(torch.ones(4, 2), torch.arange(6.0).repeat_interleave(2).reshape(6, 2))
    model.train()
    model.dropout.eval()  # a part frozen by its owner must stay frozen
    precision = torch.get_float32_matmul_precision()
    ids, scores = top_k(model, np.arange(4), 2, none_seen(4, 6))
    assert model.training and not model.dropout.training
    assert torch.get_float32_matmul_precision() == precision and torch.is_grad_enabled()
    assert ids[0].tolist() == [5, 4] and scores[0].tolist() == [10.0, 8.0]
    model.dropout.train()
    np.testing.assert_array_equal(top_k(model, np.arange(4), 2, none_seen(4, 6))[1], scores)  # dropout was off


def test_autocast_does_not_change_the_ranking():
    generator = torch.Generator().manual_seed(0)
    model = Dot(torch.randn(20, 16, generator=generator), torch.randn(3000, 16, generator=generator))
    plain = top_k(model, np.arange(20), 20, none_seen(20, 3000))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = (model.user @ model.item.T).float().topk(20).indices.numpy()
        cast = top_k(model, np.arange(20), 20, none_seen(20, 3000))
    assert (rounded != plain[0]).any()  # otherwise this test could not fail
    np.testing.assert_array_equal(cast[0], plain[0])


def test_masking_leaves_the_models_own_scores_alone():
    model = Table(torch.arange(5.0).expand(3, 5))
    seen = Histories.from_pairs(np.array([0, 1]), np.array([4, 3]), 3, 5)
    ids, _ = top_k(model, np.arange(3), 2, seen, seen)
    assert ids.tolist() == [[3, 2], [4, 2], [4, 3]]
    assert model.table[0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("n_items", [5, 64 * CHUNK])
def test_nan_is_an_error_that_names_the_model(n_items):
    scores = torch.zeros(3, n_items)
    scores[1, n_items // 2] = torch.nan
    with pytest.raises(ValueError, match=r"Table \(table\) gives NaN"):
        top_k(Table(scores), np.arange(3), 2, none_seen(3, n_items))


def test_wrong_arguments_are_named():
    model = Table(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="k: got 0"):
        top_k(model, np.arange(3), 0, none_seen(3, 4))
    with pytest.raises(ValueError, match=r"users: got 0\.\.3, wanted 0\.\.2"):
        top_k(model, np.arange(4), 1, none_seen(3, 4))
    model.n_items = 5
    with pytest.raises(ValueError, match=r"Table.scores: got shape \(3, 4\), wanted \(3, 5\)"):
        top_k(model, np.arange(3), 1, none_seen(3, 5))


MILLION_ITEMS = """
import json, sys
import numpy as np, torch
from apps.recsys.bench_evaluate import peak_rss_bytes
from apps.recsys.topk import top_k
from tests.recsys.test_topk import Dot, none_seen
model = Dot(torch.ones(600, 2), torch.arange(2e6).reshape(-1, 2) % 1013)
nothing = none_seen(600, 1_000_000)
top_k(model, np.arange(20), 10, nothing, block_bytes=8 << 20)
before = peak_rss_bytes()
ids, _ = top_k(model, np.arange(600), 10, nothing, block_bytes=8 << 20)
print(json.dumps([before, peak_rss_bytes(), ids[599].tolist()]))
"""


def test_a_million_items_are_never_scored_at_once():
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", MILLION_ITEMS], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, after, ids = json.loads(done.stdout)
    assert after - before < 100e6  # all scores would be 2.4e9 bytes
    item = (np.arange(2e6).reshape(-1, 2) % 1013).sum(axis=1)
    assert ids == np.argsort(-item, kind="stable")[:10].tolist()
