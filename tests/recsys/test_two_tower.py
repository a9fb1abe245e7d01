"""Two towers over features: what they learn, what they compute when, and that nothing hangs on an order of keys."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from apps.recsys import fitting
from apps.recsys.config import ModelConfig
from apps.recsys.data.dataset import Dataset
from apps.recsys.data.histories import Histories
from apps.recsys.data.splits import Split, ratio
from apps.recsys.distill import InteractionStep, Optimization
from apps.recsys.evaluate import Evaluator
from apps.recsys.export import export
from apps.recsys.knowledge.experts import DistillationExperts, DistillationExpertsOptions, ItemDistillationExperts
from apps.recsys.models.base import Encoded
from apps.recsys.models.store import load_model, save_model
from apps.recsys.models.two_tower import LazyEncoded, TwoTower, TwoTowerOptions
from apps.recsys.recommend import recommend
from apps.recsys.runtime import ExportedRecommender
from apps.recsys.topk import inference
from kdcore.config import UserError
from kdcore.trainer_config import TrainerConfig
from tests.recsys import made
from tests.recsys.tiny_run import make_run

GENRES = ["Action", "Comedy", "Drama", "Horror", "Romance"]
N_USERS, N_ITEMS, PER_USER = 150, 100, 12


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Return users who watch their favourite genre, nine times out of ten; the last 5 items nobody ever had."""
    rng = np.random.default_rng(0)
    taste, genre = rng.integers(len(GENRES), size=N_USERS), np.arange(N_ITEMS) % len(GENRES)
    user, item = [], []
    for u in range(N_USERS):
        likes = np.where(genre == taste[u], 9.0, 1.0 / 4)[: N_ITEMS - 5]
        user += [u] * PER_USER
        item += rng.choice(N_ITEMS - 5, PER_USER, replace=False, p=likes / likes.sum()).tolist()
    second = rng.integers(len(GENRES), size=N_ITEMS)
    return Dataset(
        name="made up",
        user=np.array(user, np.int32),
        item=np.array(item, np.int32),
        timestamp=np.arange(len(user), dtype=np.float64),
        rating=None,
        user_ids=pa.array([f"u{u}" for u in range(N_USERS)]),
        item_ids=pa.array([f"i{i}" for i in range(N_ITEMS)]),
        user_features=pa.table({"taste": [f"t{each}" for each in taste], "age": rng.normal(40, 9, N_USERS)}),
        item_features=pa.table(
            {
                "title": [f"film {i}" for i in range(N_ITEMS)],
                "genres": [
                    [GENRES[a], GENRES[b]] if i % 2 else [GENRES[a]]
                    for i, (a, b) in enumerate(zip(genre, second, strict=True))
                ],
                "year": rng.integers(1950, 2000, N_ITEMS),
            }
        ),
        has_timestamp=True,
        dropped={},
    )


@pytest.fixture(scope="module")
def split(dataset: Dataset) -> Split:
    return ratio(dataset, test=0.25, valid=0.15, seed=0)


def build(dataset: Dataset, train: Histories, seed: int = 0, **options) -> TwoTower:
    torch.manual_seed(seed)
    wanted = TwoTowerOptions(**{"dimension": 4, "feature_dimension": 3, "min_count": 1, "scale": 0.5, **options})
    return TwoTower.fit(train, wanted, dataset.user_features, dataset.item_features)


@pytest.fixture
def model(dataset: Dataset, split: Split) -> TwoTower:
    return build(dataset, split.train, hidden=[6])


class Popularity(made.Table):
    def __init__(self, train: Histories) -> None:
        super().__init__(torch.from_numpy(train.item_counts()).float().expand(train.n_users, -1).clone())


@pytest.mark.parametrize("options", [{"use_ids": False}, {"use_ids": True, "hidden": 8}])
def test_features_teach_it_more_than_popularity(dataset, split, options):
    config = ModelConfig(
        "two_tower",
        {"dimension": 4, **options},
        Optimization("bpr", 512, 0.03),
        TrainerConfig(max_epochs=15, patience=0, threads=1, tensorboard=False),
    )
    fitted = fitting.fit_model(config, split, Evaluator(split, "valid", ("ndcg@10",)), seed=0, dataset=dataset)
    test = Evaluator(split, "test", ("ndcg@10",))
    popular = test(Popularity(split.train)).values["ndcg@10"]
    assert test(fitted.model).values["ndcg@10"] > 1.5 * popular
    # what it was selected by is what the finished model scores: no vector is older than the weights
    valid = Evaluator(split, "valid", ("ndcg@10",))(fitted.model).values
    assert valid["ndcg@10"] == pytest.approx(fitted.validation["ndcg@10"], abs=1e-6)


def test_a_cold_item_is_what_its_features_say(dataset, split):
    model = build(dataset, split.train, use_ids=True)
    assert (split.train.item_counts()[-5:] == 0).all()
    items = model.item_vectors()
    assert items[-5:].isfinite().all() and len(items[-5:].unique(dim=0)) == 5
    # the same features that an unknown item brings along give the very same vector: no id takes part
    vectors, bias = model.new_items(dataset.item_features.slice(N_ITEMS - 5))
    torch.testing.assert_close(vectors, items[-5:])
    torch.testing.assert_close(bias, model.item_bias()[-5:])
    warm, _ = model.new_items(dataset.item_features.slice(0, 5))
    assert not torch.allclose(warm, items[:5])
    changed = dataset.item_features.set_column(1, "genres", pa.array([["Horror"]] * N_ITEMS))
    assert not torch.allclose(model.new_items(changed)[0][-5:], items[-5:])
    with pytest.raises(UserError, match="'genres' is missing"):
        model.new_items(dataset.item_features.select(["year"]))


def test_a_bag_is_the_mean_of_its_tokens(dataset, split):
    model = build(dataset, split.train, use_ids=False, bias=False)
    rows = {name: table.weight for name, table in model.item.tables.embedding_bags.items()}
    features = {feature.name: feature for feature in model.item_side.features}
    linear = model.item.dense[0]
    for item in (1, 4, 99):
        genres = dataset.item_features["genres"][item].as_py()
        index = [1 + features["genres"].tokens.index(each) for each in set(genres)]
        year = np.searchsorted(features["year"].bounds, dataset.item_features["year"][item].as_py(), side="right") + 1
        joined = torch.cat([rows["is:genres"][index].mean(0), rows["is:year"][year]])
        torch.testing.assert_close(model.item_vectors()[item], linear.weight @ joined)


def test_the_order_of_keys_and_columns_changes_nothing(dataset, split, model):
    jagged = model.item.jagged(torch.tensor([5, 0, 99, 5]))
    assert jagged.keys() == ["id", "is:genres", "is:year"]
    order = [2, 0, 1]
    torch.testing.assert_close(model.item.read(jagged.permute(order)), model.item.read(jagged), rtol=0, atol=0)
    tables = [table.select(table.column_names[::-1]) for table in (dataset.user_features, dataset.item_features)]
    other = build(replace(dataset, user_features=tables[0], item_features=tables[1]), split.train, hidden=[6])
    users = torch.arange(N_USERS)
    torch.testing.assert_close(other.scores(users, split.train), model.scores(users, split.train), rtol=0, atol=0)


class Reversed(torch.nn.Module):
    """Answers as a sharded collection may: all keys, in an order of its own."""

    def __init__(self, tables: torch.nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, jagged):
        from torchrec import KeyedTensor

        rows = self.tables(jagged).to_dict()
        keys = list(rows)[::-1]
        return KeyedTensor(keys, [rows[key].shape[1] for key in keys], torch.cat([rows[key] for key in keys], dim=1))


def test_outputs_are_read_by_key(model):
    ids = torch.tensor([3, 1])
    expected = model.item(ids)
    model.item.tables = Reversed(model.item.tables)
    torch.testing.assert_close(model.item(ids), expected, rtol=0, atol=0)


def encodings(model: TwoTower) -> tuple[Encoded, Encoded]:
    """Return the encoding of everything and the one computed when asked."""
    whole = model.encode()
    model.whole = 0
    lazy = model.encode()
    assert type(whole) is Encoded and isinstance(lazy, LazyEncoded)
    return whole, lazy


USERS, ITEMS = torch.tensor([7, 0, 7, 149]), torch.tensor([[1, 2, 1], [99, 0, 3], [2, 2, 2], [50, 51, 1]])


@pytest.mark.parametrize("bias", [True, False])
def test_lazy_vectors_and_gradients_equal_those_of_everything(dataset, split, bias):
    model = build(dataset, split.train, hidden=[6], bias=bias)
    gradients = []
    answers = []
    for encoded in encodings(model):
        model.zero_grad()
        found = [
            encoded.lists(USERS, ITEMS),
            encoded.pair(USERS, ITEMS[:, 1]),
            encoded.columns(ITEMS[:, 0], USERS[None].expand(4, -1)),
            encoded.everything(USERS),
            encoded.user[USERS],
            encoded.item[ITEMS],
        ]
        weights = [torch.linspace(-1, 2, each.numel()).reshape(each.shape) for each in found]
        sum((each * weight).sum() for each, weight in zip(found, weights, strict=True)).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        answers.append(found)
    torch.testing.assert_close(answers[0], answers[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    scores = model.scores(USERS, split.train)
    torch.testing.assert_close(answers[0][0], scores.gather(1, ITEMS))
    torch.testing.assert_close(answers[0][3], scores)


def test_a_step_sends_every_id_through_its_tower_once(model):
    asked: dict[str, list[int]] = {"user": [], "item": []}
    for side, ids in asked.items():
        getattr(model, side).register_forward_hook(lambda module, args, out, ids=ids: ids.extend(args[0].tolist()))
    model.whole = 0
    encoded = model.encode()
    encoded.lists(USERS, ITEMS)
    encoded.lists(USERS[:2], ITEMS[2:] + 1)
    encoded.pair(USERS, ITEMS[:, 0])
    assert sorted(asked["user"]) == [0, 7, 149]
    assert sorted(asked["item"]) == sorted({*ITEMS.flatten().tolist(), *(ITEMS[2:] + 1).flatten().tolist()})
    assert encoded.lists(USERS[:0], ITEMS[:0]).shape == (0, 3)
    model.encode().lists(USERS[:0], ITEMS[:0])


def test_a_training_step_is_the_same_either_way(dataset, split, tmp_path):
    teacher = made.factors(N_USERS, N_ITEMS)
    losses = []
    for whole in (1 << 14, 0):
        model = build(dataset, split.train, dimension=3)
        model.whole = whole
        torch.manual_seed(1)
        lessons = made.lessons(teacher, split.train, tmp_path)
        knowledge = {
            cls.name: (1.0, cls(DistillationExpertsOptions(experts=2), lessons))
            for cls in (DistillationExperts, ItemDistillationExperts)
        }
        step = InteractionStep(
            model, split.train, Evaluator(split, "valid", ("ndcg@10",)), Optimization("bpr", 256), knowledge
        )
        step.begin_epoch(0, made.generator())
        terms = step(next(iter(step.batches(0, made.generator()))))
        sum(terms.values()).backward()
        losses.append((terms, [parameter.grad for parameter in model.parameters()]))
    assert set(losses[0][0]) == {"bpr", "distillation_experts", "item_distillation_experts"}
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("fused", [True, False])
def test_kept_item_vectors_follow_the_weights(model, fused):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=fused)

    def kept() -> torch.Tensor:
        with inference(model):
            first = model.item_vectors()
            assert model._items() is model._items()
            return first.clone()

    before = kept()
    encoded = model.encode()
    encoded.lists(USERS, ITEMS).sum().backward()
    torch.testing.assert_close(kept(), before, rtol=0, atol=0)  # looked at between gradient and update
    optimizer.step()
    after = kept()
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, model.item_vectors().detach())
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()} | dict(model.named_buffers()))
    assert not torch.allclose(kept(), after)
    assert model.training


def test_blocks_make_no_difference(model, monkeypatch):
    whole = model.item_vectors().detach()
    monkeypatch.setattr("apps.recsys.models.two_tower._BLOCK", 7)
    with inference(model):
        torch.testing.assert_close(model.item_vectors(), whole)
        torch.testing.assert_close(model.encode().user, model.user_vectors(torch.arange(N_USERS), None))


def test_a_stored_model_needs_no_data(dataset, split, model, tmp_path):
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, TwoTower) and loaded.options == model.options and loaded.label() == "two_tower-4"
    users = torch.arange(N_USERS)
    with inference(model):
        expected, unknown = model.scores(users, split.train), model.new_items(dataset.item_features.slice(3, 2))
    with inference(loaded):
        torch.testing.assert_close(loaded.scores(users, split.train), expected, rtol=0, atol=0)
        torch.testing.assert_close(loaded.new_items(dataset.item_features.slice(3, 2)), unknown, rtol=0, atol=0)
    about = json.loads((tmp_path / "model.json").read_text())
    # 3 columns a row: users 150 ids, 17 buckets of age, 6 of taste; items their ids, genres and years; then the layers
    items = int((split.train.item_counts() > 0).sum())
    rows = (150 + 17 + 6) + (items + 6 + 17)
    assert model.parameter_count() == about["parameters"] == 3 * rows + 2 * (9 * 6 + 6) + (6 * 4 + 4) + 6 * 5
    assert about["reads"]["item"]["features"][0] == {"name": "genres", "tokens": GENRES}
    for broken in ({"user": about["reads"]["user"]}, {**about["reads"], "item": {"features": 3}}):
        (tmp_path / "model.json").write_text(json.dumps({**about, "reads": broken}))
        with pytest.raises(UserError, match="not a model of this version"):
            load_model(tmp_path)


def test_names_that_no_module_may_have_are_features_all_the_same(dataset, split, tmp_path):
    table = pa.table({"a.b": ["x", "y"] * 50, "a%2Eb": ["x"] * 100, "id": ["p", "q"] * 50, "": ["s"] * 100})
    model = build(replace(dataset, item_features=table), split.train)
    assert len(set(model.item.keys)) == 5
    save_model(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path).item_vectors(), model.item_vectors(), rtol=0, atol=0)


def test_without_features_it_falls_back_to_ids(dataset, split):
    bare = replace(dataset, user_features=None)
    model = build(bare, split.train, use_ids=False)
    assert model.user.keys == ["id"] and model.item.keys == ["is:genres", "is:year"]
    both = build(replace(bare, item_features=None), split.train)
    assert both.user.keys == both.item.keys == ["id"]
    with pytest.raises(UserError, match="no user or item features"):
        build(replace(bare, item_features=dataset.item_features.select(["title"])), split.train, use_ids=False)
    with pytest.raises(UserError, match="knows nothing of a new item"):
        both.new_items(dataset.item_features)
    with pytest.raises(UserError, match=r"ignore: no feature 'genre', got taste, age, title"):
        build(dataset, split.train, ignore=["genre"])
    with pytest.raises(UserError, match="only a split"):
        fitting.new_model(ModelConfig("two_tower"), split, 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden": [8, 0]}, r"hidden: got \[8, 0\]"),
        ({"hidden": "wide"}, "hidden: got 'wide'"),
        ({"ignore": "title"}, "ignore: got 'title'"),
        ({"dimension": 0}, "dimension: got 0"),
        ({"scale": float("nan")}, "scale"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TwoTowerOptions(**options)


def test_torchrec_is_imported_by_those_who_use_it():
    code = "import sys, apps.recsys.pipeline, apps.recsys.export; sys.exit('torchrec' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_a_run_with_it_as_the_student_is_evaluated_and_exported(tmp_path):
    settings = [
        ("student.kind", "two_tower"),
        ("student.initialize", "random"),
        ("student.options.dimension", "4"),
        ("student.trainer.max_epochs", "2"),
    ]
    run = make_run(tmp_path, "relaxed_ranking", overrides=settings)
    assert load_model(run / "student").kind == "two_tower"
    exported = ExportedRecommender(export(run, "student", tmp_path / "exported"))
    recommend(run, "student", "all", 5, True, tmp_path / "recs.parquet")
    rows = pq.read_table(tmp_path / "recs.parquet").to_pylist()
    for user in ("ü3", "ü17"):
        ours = [row["item_id"] for row in rows if row["user_id"] == user]
        assert len(ours) == 5 and [each.item_id for each in exported.recommend(user, k=5)] == ours


def test_data_it_cannot_read_are_refused_before_anything_is_fitted_or_written(tmp_path):
    settings = [
        ("student.kind", "two_tower"),
        ("student.initialize", "random"),
        ("student.options.use_ids", "false"),  # the tiny log has titles and nothing else
    ]
    with pytest.raises(UserError, match="no user or item features"):
        make_run(tmp_path, "relaxed_ranking", overrides=settings)
    assert not (tmp_path / "run").exists()
