"""The simulation: what it writes, that it is repeatable, and that the biases and the structure it claims are there."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from apps.recsys.data.dataset import load_dataset
from data_scripts import simulate_interactions
from data_scripts.latent_world import (
    EPOCH,
    GROUP,
    SPAN,
    Simulation,
    build_world,
    calibrate,
    draw_clicks,
    draw_group,
    draw_uniform,
    random_stream,
)
from data_scripts.simulate_interactions import simulate
from data_scripts.titles import title_words
from kdcore.config import UserError
from kdcore.run import read_json

SMALL = {"n_users": 600, "n_items": 200, "interactions_per_user": 12.0, "ratings": True}
FILES = ("interactions", "items", "users", "uniform")


def tables(folder: Path) -> dict[str, dict[str, list]]:
    return {name: pq.read_table(folder / f"{name}.parquet").to_pydict() for name in FILES}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("simulated") / "small", **SMALL)


def test_what_is_written(small: Path) -> None:
    log = pq.read_table(small / "interactions.parquet").to_pandas()
    items = pq.read_table(small / "items.parquet").to_pandas()
    users = pq.read_table(small / "users.parquet").to_pandas()
    uniform = pq.read_table(small / "uniform.parquet").to_pandas()
    assert list(log) == ["user_id", "item_id", "timestamp", "rating"]
    assert list(uniform) == ["user_id", "item_id", "timestamp", "clicked"]
    assert users["user_id"].tolist() == list(range(1, 601))
    assert items["item_id"].tolist() == list(range(1, 201))
    assert items["title"].is_unique and items["title"].str.fullmatch(r".+ \(\d{4}\)").all()
    assert (items["title"].str[-5:-1].astype(int) == items["year"]).all()
    assert all(1 <= len(genres) == len(set(genres)) <= 3 for genres in items["genres"])
    assert not log.duplicated(["user_id", "item_id"]).any()
    assert log["rating"].isin([1, 2, 3, 4, 5]).all() and log["rating"].nunique() == 5
    assert log["timestamp"].between(EPOCH, EPOCH + SPAN + 300).all()
    assert (log.sort_values(["user_id", "timestamp"], kind="stable").index == log.index).all()
    assert len(uniform) == round(0.05 * 600 * 12)
    assert 10 < log.groupby("user_id").size().mean() < 13


def test_it_says_that_it_is_simulated_and_loads(small: Path) -> None:
    about = read_json(small / "dataset.json")
    assert about["simulated"] is True
    assert about["parameters"] == vars(Simulation(**SMALL))
    dataset = load_dataset(small)  # compares the fingerprint
    assert (dataset.n_users, dataset.n_items, len(dataset)) == (600, 200, about["interactions"])
    assert dataset.has_timestamp and dataset.rating is not None
    assert dataset.item_features.column_names == ["title", "genres", "year"]
    assert dataset.user_features.column_names == ["age_group", "device"]


def test_the_data_depend_on_the_seed_and_not_on_the_block(small: Path, tmp_path: Path) -> None:
    again = simulate(tmp_path / "again", **SMALL, block_users=1)
    assert tables(again) == tables(small)
    assert pq.ParquetFile(again / "interactions.parquet").num_row_groups == 3  # a block is never less than a group
    assert read_json(again / "dataset.json") == read_json(small / "dataset.json")
    other = simulate(tmp_path / "other", **SMALL, seed=1)
    for name in FILES[:3]:
        assert tables(other)[name] != tables(small)[name]


def test_more_users_leave_the_first_ones_as_they_are(small: Path, tmp_path: Path) -> None:
    few = tables(simulate(tmp_path / "few", **{**SMALL, "n_users": 300}))
    many = tables(small)
    assert few["items"] == many["items"]
    for name in ("interactions", "users"):
        rows = len(few[name]["user_id"])
        assert few[name] == {column: values[:rows] for column, values in many[name].items()}
        assert many[name]["user_id"][rows] == 301


def test_complete_output_is_kept_and_other_output_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = simulate(tmp_path / "out", **SMALL)
    first = (out / "interactions.parquet").stat()
    assert (simulate(out, **SMALL) / "interactions.parquet").stat() == first
    simulate(out, **{**SMALL, "seed": 3})
    assert read_json(out / "dataset.json")["parameters"]["seed"] == 3
    kept = tables(out)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(simulate_interactions, "_describe", fail)
    with pytest.raises(KeyboardInterrupt):
        simulate(out, **SMALL)
    assert tables(out) == kept
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"n_user": 5}, "did you mean n_users"),
        ({"n_users": 0}, "n_users: got 0, wanted a value from 1"),
        ({"n_users": 10.5}, "n_users: got 10.5, wanted a whole number"),
        ({"drift": float("nan")}, "drift: got nan"),
        ({"exposure_bias": "much"}, "exposure_bias: got 'much', wanted a number"),
        ({"uniform_log_size": -1}, "uniform_log_size: got -1"),
        ({"interactions_per_user": 5000, "click_rate": 0.01}, "exposures of a user are needed"),
        ({"block_users": 0}, "block_users"),
    ],
)
def test_wrong_parameters(tmp_path: Path, parameters: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        simulate(tmp_path / "out", **parameters)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("parameters", [{"n_items": 2, "n_users": 3}, {"n_users": 1}, {"dimension": 1, "n_users": 300}])
def test_small_worlds(tmp_path: Path, parameters: dict) -> None:
    dataset = load_dataset(simulate(tmp_path / "out", **parameters, uniform_log_size=7))
    assert dataset.n_users == parameters["n_users"]
    assert pq.read_metadata(tmp_path / "out" / "uniform.parquet").num_rows == 7


def drawn(settings: Simulation, groups: int = 8) -> tuple:
    """Return world, intercept, and (group, clicks as numpy columns) for some groups of users."""
    world = build_world(settings)
    intercept = calibrate(settings, world)
    result = []
    for index in range(groups):
        rng = random_stream(settings, 2, index)
        group = draw_group(settings, world, rng)
        clicks = draw_clicks(settings, world, group, rng, intercept)
        result.append((group, {name: clicks[name].to_numpy() for name in clicks.column_names}))
    return world, intercept, result


def share_of_top_items(settings: Simulation) -> float:
    counts = sum(
        np.bincount(clicks["item_id"], minlength=settings.n_items + 1) for _, clicks in drawn(settings, groups=4)[2]
    )
    return float(np.sort(counts)[::-1][: settings.n_items // 10].sum() / counts.sum())


def test_popularity_bias_concentrates_the_clicks() -> None:
    base = Simulation(n_items=500, interactions_per_user=20)
    shares = [share_of_top_items(replace(base, popularity_bias=bias)) for bias in (0.0, 0.7, 1.4)]
    assert shares[0] + 0.1 < shares[1] < shares[2] - 0.1


def test_exposure_bias_shows_users_what_they_were_believed_to_like() -> None:
    means = []
    for bias in (0.0, 1.0):
        world, _, groups = drawn(Simulation(exposure_bias=bias, popularity_bias=0.0), groups=2)
        liked = [
            np.einsum("nd,nd->n", group.believed[clicks["user_id"]], world.vectors[clicks["item_id"] - 1])
            for group, clicks in groups
        ]
        means.append(np.concatenate(liked).mean())
    assert means[0] + 0.05 < means[1]


def test_taste_drifts() -> None:
    """Late clicks lie nearer to where taste goes than early ones if there is drift, and not if there is none."""
    change = []
    for drift in (0.0, 1.0):
        world, _, groups = drawn(Simulation(drift=drift, exposure_bias=0.0))
        towards, when = [], []
        for group, clicks in groups:
            vectors = world.vectors[clicks["item_id"] - 1]
            towards.append(np.einsum("nd,nd->n", (group.end - group.start)[clicks["user_id"]], vectors))
            when.append((clicks["timestamp"] - EPOCH) / SPAN)
        change.append(np.polyfit(np.concatenate(when), np.concatenate(towards), 1)[0])
    # without drift there is a little: the items that a user likes best at first are used up first
    assert abs(change[0]) < 0.1 and change[1] > change[0] + 0.3, change


def test_the_uniform_log_is_uniform_and_clicked_less() -> None:
    settings = Simulation(n_items=100)
    world, intercept, _ = drawn(settings, groups=0)
    group = draw_group(settings, world, np.random.default_rng(0))
    log = draw_uniform(settings, world, group, np.random.default_rng(1), np.full(GROUP, 100), intercept)
    counts = np.bincount(log["item_id"].to_numpy() - 1, minlength=100)
    chi_square = ((counts - 256) ** 2 / 256).sum()
    assert 60 < chi_square < 150  # 99 degrees of freedom: the 0.1 % and 99.9 % points are 60 and 149
    assert 0.01 < log["clicked"].to_numpy().mean() < settings.click_rate


def ndcg_at_10(scores: np.ndarray, train: sp.csr_matrix, test: sp.csr_matrix) -> float:
    scores = np.array(scores, dtype=np.float64)
    scores[train.nonzero()] = -np.inf
    top = np.argsort(-scores, axis=1)[:, :10]
    gain = np.take_along_axis(test.toarray(), top, axis=1) / np.log2(np.arange(2, 12))
    wanted = np.asarray(test.sum(axis=1)).ravel().astype(int)
    ideal = np.concatenate([[np.inf], np.cumsum(1 / np.log2(np.arange(2, 12)))])[np.minimum(wanted, 10)]
    return float((gain.sum(axis=1) / ideal)[wanted > 0].mean())


def factorise(train: sp.csr_matrix, dimension: int, weight: float = 4.0, ridge: float = 20.0) -> list[np.ndarray]:
    """Implicit-feedback matrix factorisation by alternating least squares: Hu, Koren and Volinsky (2008)."""
    sides = [train, train.T.tocsr()]
    factors = [np.random.default_rng(0).normal(0, 0.1, (side.shape[0], dimension)) for side in sides]
    for step in range(14):
        side, fixed = sides[step % 2], factors[1 - step % 2]
        base = fixed.T @ fixed + ridge * np.eye(dimension)
        chosen = [fixed[side.indices[start:stop]] for start, stop in itertools.pairwise(side.indptr)]
        left = np.stack([base + weight * rows.T @ rows for rows in chosen])
        right = np.stack([(1.0 + weight) * rows.sum(axis=0) for rows in chosen])
        factors[step % 2] = np.linalg.solve(left, right[..., None])[..., 0]
    return factors


def test_it_can_be_learnt_and_small_models_lose(tmp_path: Path) -> None:
    """With the defaults: popularity < 8 dimensions < 64 dimensions and a linear autoencoder, by clear margins."""
    log = load_dataset(simulate(tmp_path / "out"))
    test_rows = np.random.default_rng(1).random(len(log)) < 0.2
    train, test = (
        sp.csr_matrix((np.ones(rows.sum()), (log.user[rows], log.item[rows])), shape=(log.n_users, log.n_items))
        for rows in (~test_rows, test_rows)
    )
    popularity = ndcg_at_10(np.tile(np.asarray(train.sum(axis=0)), (log.n_users, 1)), train, test)
    gram = (train.T @ train).toarray()
    inverse = np.linalg.inv(gram + 200.0 * np.eye(log.n_items))  # EASE: Steck (2019)
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    ease = ndcg_at_10(train @ weights, train, test)
    factors = {}
    for dimension in (8, 64):
        users, items = factorise(train, dimension)
        factors[dimension] = ndcg_at_10(users @ items.T, train, test)
    assert popularity + 0.08 < factors[8] < factors[64] - 0.03
    assert factors[8] + 0.05 < ease


def test_titles_are_all_different() -> None:
    short = title_words(40_000, np.random.default_rng(0))
    assert len(set(short)) == len(short) and len(set(title_words(30, np.random.default_rng(1))) & set(short[:30])) < 30
    parts = title_words(1_100_000, np.random.default_rng(0))
    assert len(set(parts)) == len(parts) and parts[-1].endswith(", Part 2") and parts[:40_000] == short
