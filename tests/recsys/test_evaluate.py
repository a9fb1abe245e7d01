"""The whole evaluation against ranx on brute-force lists, and the laws of the prepared evaluator."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from apps.recsys import bench_evaluate
from apps.recsys import evaluate as evaluate_module
from apps.recsys.data.histories import Histories
from apps.recsys.data.splits import Split, make_split
from apps.recsys.evaluate import DEFAULT_METRICS, Evaluation, Evaluator, evaluate, slices
from apps.recsys.models.base import DotRecommender, Recommender
from kdcore.config import UserError
from tests.recsys.reference import RANX_NAMES, by_ranx

N_USERS, N_ITEMS = 80, 40


class Table(Recommender):
    """Scores read from a matrix; remembers which histories it was given."""

    kind = "table"

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(scores)
        self.n_users, self.n_items = scores.shape
        self.read: list[Histories] = []

    def scores(self, users, histories):
        self.read.append(histories)
        return self.table[users]


class SequenceTable(Table):
    sequential = True


class Dot(DotRecommender):
    kind = "dot"

    def __init__(self, user: torch.Tensor, item: torch.Tensor) -> None:
        super().__init__()
        self.user, self.item = user, item
        self.n_users, self.n_items = len(user), len(item)

    def user_vectors(self, users, histories):
        return self.user[users]

    def item_vectors(self):
        return self.item


@pytest.fixture(scope="module")
def split() -> Split:
    """Disjoint parts; user 0 has seen all but 4 items, user 1 has no test item, some users have many."""
    generator = np.random.default_rng(5)
    pairs: list[list[tuple[int, int]]] = [[], [], []]
    for user in range(N_USERS):
        items = generator.permutation(N_ITEMS)
        ends = np.cumsum([N_ITEMS - 6 if user == 0 else generator.integers(1, 20), 2, generator.integers(1, 15)])
        for part, chunk in zip(pairs, np.split(items, ends)[:3], strict=True):
            if not (user == 1 and part is pairs[2]):
                part.extend((user, item) for item in chunk)
    return make_split("made up", *(Histories.from_pairs(*np.array(part).T, N_USERS, N_ITEMS) for part in pairs))


@pytest.fixture(scope="module")
def model() -> Table:
    """Few distinct scores, so that ties matter, and a column that is never recommended."""
    scores = np.random.default_rng(6).integers(0, 12, (N_USERS, N_ITEMS)).astype(np.float32)
    scores[:, 3] = -np.inf
    return Table(torch.from_numpy(scores))


def brute_lists(model: Table, split: Split, part: str, k: int) -> np.ndarray:
    scores = model.table.detach().numpy().astype(np.float64)
    seen = split.history(part)
    scores[seen.users(), seen.items] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.where(np.take_along_axis(scores, order, axis=1) > -np.inf, order, -1)


@pytest.mark.parametrize("part", ["valid", "test"])
def test_equal_to_ranx_on_brute_force_lists(split, model, part):
    names = [f"{name}@{k}" for name in RANX_NAMES for k in (1, 5, 10)]
    got = evaluate(model, split, part, names)
    relevant = getattr(split, part)
    users = np.flatnonzero(relevant.counts() > 0)
    assert (1 in got.users) == (part == "valid")
    np.testing.assert_array_equal(got.users, users)
    lists = brute_lists(model, split, part, 10)[users]
    assert (lists == -1).any()  # user 0 has fewer candidates than k
    for text in names:
        name, k = text.split("@")
        wanted = by_ranx(lists, relevant, users, name, int(k))
        np.testing.assert_allclose(got.per_user[text], wanted, rtol=0, atol=1e-9)
        assert got.means[text] == pytest.approx(wanted.mean(), abs=1e-9)


def test_list_level_values(split, model):
    got = evaluate(model, split, metrics=["coverage@3", "gini@3", "novelty@5", "ndcg@10"])
    lists = brute_lists(model, split, "test", 10)[got.users]
    shown = lists[:, :3][lists[:, :3] >= 0]
    counts = np.bincount(shown, minlength=N_ITEMS)
    differences = np.abs(counts[:, None] - counts[None, :]).mean()
    owners = np.array([sum(item in split.train.of(user) for user in range(N_USERS)) for item in range(N_ITEMS)])
    deep = lists[:, :5][lists[:, :5] >= 0]
    assert got.lists["coverage@3"] == len(set(shown)) / N_ITEMS
    assert got.lists["gini@3"] == pytest.approx(differences / (2 * counts.mean()))
    assert got.lists["novelty@5"] == pytest.approx(-np.log2(np.maximum(owners, 1) / N_USERS)[deep].mean())
    assert set(got.values) == {"coverage@3", "gini@3", "novelty@5", "ndcg@10"}


def same(one: Evaluation, other: Evaluation) -> None:
    assert one.part == other.part and one.values == other.values
    for name in ("users", "n_relevant", "hit_row", "hit_position", "hit_item"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert list(one.per_user) == list(other.per_user)
    for name, values in one.per_user.items():
        np.testing.assert_array_equal(values, other.per_user[name], err_msg=name)


def test_block_size_and_kind_of_relevance_lookup_do_not_matter(split, model, monkeypatch):
    whole = evaluate(model, split)
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(evaluate_module, "_TABLE_CELLS", 0)
    pieces = evaluate(model, split, block_bytes=5 * 4 * 64, progress=lambda done, total: calls.append((done, total)))
    same(whole, pieces)
    assert calls[0] == (5, 79) and calls[-1] == (79, 79) and len(calls) == 16


def test_an_evaluator_gives_the_same_again_and_sees_a_changed_model(split, model):
    evaluator = Evaluator(split, "valid", ["ndcg@10"])
    other = Table(-model.table.detach().clamp(min=0))
    first, changed, again = evaluator(model), evaluator(other), evaluator(model)
    same(first, again)
    assert changed.means != first.means
    same(first, evaluate(model, split, "valid", ["ndcg@10"]))


def test_the_end_of_a_short_list_is_not_a_hit():
    user = np.arange(2)
    parts = (Histories.from_pairs(user, np.full(2, item), 2, 4) for item in (0, 1, 3))  # to find: the last item
    scores = torch.tensor([[0.0, 0.0, 1.0, -torch.inf], [0.0, 0.0, 1.0, 0.5]])
    result = evaluate(Table(scores), make_split("short", *parts), metrics=["recall@4", "mrr@4"])
    assert result.per_user["recall@4"].tolist() == [0.0, 1.0]
    assert result.per_user["mrr@4"].tolist() == [0.0, 0.5]


def test_a_subset_of_users_gets_the_same_values(split, model):
    whole = evaluate(model, split)
    some = evaluate(model, split, users=np.array([7, 1, 3]))
    assert some.users.tolist() == [3, 7]  # user 1 has nothing to find
    for name, values in some.per_user.items():
        np.testing.assert_array_equal(values, whole.per_user[name][np.isin(whole.users, [3, 7])])


def test_vectors_and_scores_give_the_same_evaluation(split):
    generator = torch.Generator().manual_seed(0)
    user, item = (torch.randint(-3, 4, (n, 4), generator=generator).float() for n in (N_USERS, N_ITEMS))
    same(evaluate(Dot(user, item), split), evaluate(Table(user @ item.T), split))


def test_sequential_models_read_up_to_the_part_and_the_others_what_they_were_fitted_on(split, model):
    for part in ("valid", "test"):
        sequential, other = SequenceTable(model.table.detach()), Table(model.table.detach())
        for reader, wanted in ((sequential, split.history(part)), (other, split.train)):
            evaluate(reader, split, part)
            assert all(np.array_equal(h.items, wanted.items) for h in reader.read)
    assert len(split.history("test")) > len(split.train)


def test_saved_and_loaded(split, model, tmp_path):
    result = evaluate(model, split, metrics=[*DEFAULT_METRICS, "recall@3"])
    result.save(tmp_path / "test.npz")
    same(result, Evaluation.load(tmp_path / "test.npz"))
    assert [path.name for path in tmp_path.iterdir()] == ["test.npz"]


def test_what_cannot_be_loaded_is_the_users_error(tmp_path):
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and nothing more")
    np.savez(tmp_path / "other.npz", users=np.arange(3))
    np.savez(tmp_path / "pickle.npz", header=np.array([{"a": 1}], dtype=object))
    for name in ("torn.npz", "other.npz", "pickle.npz", "missing.npz"):
        with pytest.raises(UserError, match=name):
            Evaluation.load(tmp_path / name)


def test_bootstrap_interval_is_that_of_the_mean(split):
    generator = np.random.default_rng(1)
    values = generator.random(400)
    empty = np.zeros(0, dtype=np.int32)
    result = Evaluation("test", np.arange(400), np.ones(400), {"ndcg@10": values}, {}, {}, empty, empty, empty)
    low, high = result.interval("ndcg@10", samples=2000)
    spread = 1.96 * values.std() / np.sqrt(400)
    assert low == pytest.approx(values.mean() - spread, abs=0.15 * spread)
    assert high == pytest.approx(values.mean() + spread, abs=0.15 * spread)
    assert (low, high) == result.interval("ndcg@10", samples=2000)


def test_slices_by_activity_are_the_users_own_values(split, model):
    result = evaluate(model, split)
    rows = [row for row in slices(result, split, "ndcg@5") if row["axis"] == "activity"]
    history = split.train.counts()[result.users]
    at_five = evaluate(model, split, metrics=["ndcg@5"]).per_user["ndcg@5"]
    assert len(rows) == 4 and sum(row["n"] for row in rows) == len(result.users)
    for row in rows:
        low, high = map(int, row["slice"].split("-"))
        inside = (history >= low) & (history <= high)
        assert row["n"] == inside.sum() and row["n"] > 10
        assert row["value"] == pytest.approx(at_five[inside].mean())


def test_slices_by_popularity_count_only_the_items_inside(split, model):
    result = evaluate(model, split)
    rows = [row for row in slices(result, split, "recall@10") if row["axis"] == "popularity"]
    popularity = split.train.item_counts()
    lists = brute_lists(model, split, "test", 10)
    assert len(rows) == 4
    for row in rows:
        low, high = map(int, row["slice"].split("-"))
        values = []
        for user in result.users:
            inside = [item for item in split.test.of(user) if low <= popularity[item] <= high]
            if inside:
                values.append(np.isin(inside, lists[user]).mean())
        assert row["n"] == len(values)
        assert row["value"] == pytest.approx(np.mean(values))


def test_slices_after_loading_and_with_equal_users(split, model, tmp_path):
    result = evaluate(model, split)
    result.save(tmp_path / "e.npz")
    assert slices(Evaluation.load(tmp_path / "e.npz"), split) == slices(result, split)
    user = np.arange(3)
    alike = make_split("alike", *(Histories.from_pairs(user, (user + part) % 3, 3, 3) for part in range(3)))
    rows = slices(evaluate(Table(torch.eye(3)), alike), alike)
    assert [(row["axis"], row["slice"], row["n"]) for row in rows] == [("activity", "1-1", 3), ("popularity", "1-1", 3)]
    json.dumps(rows)


def test_mistakes_are_the_users_errors(split, model):
    with pytest.raises(UserError, match="did you mean recall"):
        Evaluator(split, metrics=["recal@10"])
    with pytest.raises(UserError, match="metrics: got none"):
        Evaluator(split, metrics=[])
    with pytest.raises(UserError, match="part: got 'train'"):
        Evaluator(split, "train")
    with pytest.raises(UserError, match="no user has an item to find"):
        Evaluator(split, users=np.array([1]))
    with pytest.raises(UserError, match="the model knows 80 users and 39 items"):
        evaluate(Table(model.table.detach()[:, 1:]), split)
    for metric in ("coverage@5", "ndcg@11"):
        with pytest.raises(UserError, match="cutoff up to 10"):
            slices(evaluate(model, split), split, metric)


def test_benchmark_runs_in_its_own_process():
    result = bench_evaluate.run(n_users=300, n_items=2000, dimension=8, threads=1)
    assert result["gflop_per_s"] == pytest.approx(2 * 300 * 2000 * 8 / result["seconds"] / 1e9, rel=0.2)
    assert 5e7 < result["peak_rss_bytes"] < 2e9
    assert result["provenance"]["machine"]["cores"] and 0 <= result["metrics"]["ndcg@10"] <= 1
    json.dumps(result)
