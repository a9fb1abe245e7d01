"""A served answer is the library's answer, whatever index finds it; filters leave exactly k; nothing is made up."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from apps.recsys.runtime import ExportedRecommender
from apps.recsys.serve.model import ServedModel
from apps.recsys.serve.schema import RecommendRequest, ServiceError
from kdcore.config import UserError
from kdcore.run import read_json, write_json
from tests.recsys.serve.served import UNTITLED, exported, item_ids, user_ids

ITEMS, USERS = 60, 40


@pytest.fixture(scope="module")
def folders(shared_export):
    return {"mf": shared_export(), **{kind: shared_export(kind=kind) for kind in ("ease", "sasrec")}}


@pytest.fixture(scope="module")
def models(folders):
    return {kind: ServedModel(folder) for kind, folder in folders.items()}


def answer(model, stored=(), **asked):
    """Return what a request gets, decoded."""
    plan = model.plan(RecommendRequest(**asked), stored)
    return json.loads(model.encode(plan, *model.answer(plan)))


def pairs(items):
    return [(item["item_id"], item["score"]) for item in items]


def assert_same(got, wanted):
    """Compare lists of (id, score): equal scores, and equal ids where no scores are close."""
    assert len(got) == len(wanted)
    np.testing.assert_allclose([score for _, score in got], [score for _, score in wanted], rtol=1e-4, atol=1e-5)
    scores = dict(wanted)
    for (item, score), (other, _) in zip(got, wanted, strict=True):
        assert item == other or abs(scores.get(item, score) - score) < 1e-4


@pytest.mark.parametrize("kind", ["mf", "ease", "sasrec"])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_a_known_user_gets_what_the_library_says(folders, models, kind, exclude_seen):
    library = ExportedRecommender(folders[kind])
    for user in user_ids(USERS):
        wanted = [(each.item_id, each.score) for each in library.recommend(user, k=7, exclude_seen=exclude_seen)]
        assert_same(pairs(answer(models[kind], user_id=user, k=7, exclude_seen=exclude_seen)), wanted)


@pytest.mark.parametrize("kind", ["mf", "ease", "sasrec"])
def test_a_history_gets_what_the_library_says(folders, models, kind):
    library, ids = ExportedRecommender(folders[kind]), item_ids(ITEMS)
    generator = np.random.default_rng(0)
    for length in (1, 2, 5, 20):
        history = [ids[item] for item in generator.choice(ITEMS, length, replace=False)]
        wanted = [(each.item_id, each.score) for each in library.recommend(history=history, k=9)]
        assert_same(pairs(answer(models[kind], history=history, k=9)), wanted)


def test_titles_and_ids_are_those_of_the_data(folders, models):
    library = ExportedRecommender(folders["mf"])
    titles = dict(zip(library.item_ids, library.titles, strict=True))
    everything = answer(models["mf"], user_id="100", k=ITEMS, exclude_seen=False)
    assert {item["item_id"]: item.get("title") for item in everything} == titles
    assert "title" not in next(item for item in everything if item["item_id"] == f"i{UNTITLED}")


ITEM = st.integers(0, ITEMS - 1)


@given(
    user=st.sampled_from([None, *range(USERS)]),
    k=st.integers(1, 80),
    exclude_seen=st.booleans(),
    exclude=st.lists(ITEM, max_size=70),
    candidates=st.none() | st.lists(ITEM, max_size=40),
    categories=st.none() | st.lists(st.sampled_from(["Comedy", "Drama", "Wäst/ern"]), min_size=1, max_size=2),
)
@settings(deadline=None, max_examples=150)
@pytest.mark.parametrize("kind", ["mf", "ease"])
def test_exactly_k_of_what_passes(models, kind, user, k, exclude_seen, exclude, candidates, categories):
    model, ids = models[kind], item_ids(ITEMS)
    names = None if candidates is None else [ids[item] for item in candidates]
    asked = {"k": k, "exclude": [ids[item] for item in exclude], "candidates": names, "categories": categories}
    if user is not None:
        asked |= {"user_id": user_ids(USERS)[user], "exclude_seen": exclude_seen}
    got = [item["item_id"] for item in answer(model, **asked)]
    passing = set(range(ITEMS)) - set(exclude)
    if candidates is not None:
        passing &= set(candidates)
    if categories is not None:
        genre = model.prepared.categories
        passing &= {int(item) for name in categories for item in genre.any_of((name,))}
    if user is not None and exclude_seen:
        passing -= set(model.prepared.seen(user).tolist())
    assert len(got) == len(set(got)) == min(k, len(passing))
    assert set(got) <= {ids[item] for item in passing}
    if user is not None and kind == "mf":
        arrays = load_file(model.prepared.folder / "vectors.safetensors")
        scores = arrays["item_vectors"] @ arrays["user_vectors"][user] + arrays["item_bias"]
        best = sorted(passing, key=lambda item: -scores[item])[:k]
        np.testing.assert_allclose(sorted(scores[[ids.index(each) for each in got]]), sorted(scores[best]), rtol=1e-5)


def test_a_batch_is_answered_as_its_requests_are(models):
    model = models["mf"]
    requests = [
        RecommendRequest(user_id=user, k=k) for user, k in zip(user_ids(USERS), range(1, USERS + 1), strict=True)
    ]
    requests += [RecommendRequest(k=3), RecommendRequest(history=["i1", "i2"], k=4, candidates=["i9", "i8"])]
    together = model.answer_many([model.plan(each) for each in requests])
    for request, (scores, items) in zip(requests, together, strict=True):
        alone = model.answer(model.plan(request))
        np.testing.assert_array_equal(items, alone[1])
        np.testing.assert_allclose(scores, alone[0], rtol=1e-5)


def test_nothing_known_is_answered_with_what_is_popular(models):
    model = models["mf"]
    counts = np.bincount(model.prepared.seen_items, minlength=ITEMS)
    got = answer(model, k=5)
    assert [item["score"] for item in got] == sorted(counts.tolist(), reverse=True)[:5]
    assert pairs(answer(model, history=[], k=5)) == pairs(got)
    assert pairs(answer(model, user_id="nobody", unknown_user="popular", k=5)) == pairs(got)
    assert model.plan(RecommendRequest(k=5)).source == "popular"


def test_a_segment_has_its_own_popular_items(models):
    model = models["mf"]
    for value, parity in (("F", 0), ("M", 1)):
        rows = [model.prepared.seen(user) for user in range(USERS) if user % 2 == parity]
        counts = np.bincount(np.concatenate(rows), minlength=ITEMS)
        got = answer(model, segment={"gender": value}, k=ITEMS)
        assert len(got) == ITEMS  # those nobody of the segment had come last, none is missing
        wanted = np.sort(counts / counts.sum())[::-1]
        np.testing.assert_allclose([item["score"] for item in got], wanted, rtol=1e-5)
    with pytest.raises(ServiceError, match="unknown feature 'age'; this model has 'gender'"):
        answer(model, segment={"age": "7"})
    with pytest.raises(ServiceError, match="unknown gender 'X'; wanted 'F', 'M'"):
        answer(model, segment={"gender": "X"})


def test_why_names_the_nearest_of_the_history(models):
    model = models["mf"]
    vectors = load_file(model.prepared.folder / "vectors.safetensors")["item_vectors"]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ids, history = item_ids(ITEMS), [3, 14, 15, 9, 26]
    for item in answer(model, history=[ids[each] for each in history], k=6, why=True):
        near = unit[history] @ unit[ids.index(item["item_id"])]
        wanted = [ids[history[place]] for place in np.argsort(-near)[:3]]
        assert [each["item_id"] for each in item["why"]] == wanted
        np.testing.assert_allclose([each["similarity"] for each in item["why"]], np.sort(near)[::-1][:3], atol=1e-3)
    assert answer(model, k=1, why=True)[0]["why"] == []


@pytest.mark.parametrize("kind", ["mf", "ease", "sasrec"])
def test_stored_events_are_seen_and_read(models, kind):
    model = models[kind]
    first = answer(model, user_id="100", k=3)
    later = answer(model, ["i999", first[0]["item_id"]], user_id="100", k=3)
    assert first[0]["item_id"] not in [item["item_id"] for item in later]
    if kind == "mf":  # a trained vector stays what it is
        assert pairs(later)[:2] == pairs(first)[1:]
    stranger = answer(model, ["i3", "i4"], user_id="who", k=3)
    assert pairs(stranger) == pairs(answer(model, history=["i3", "i4"], k=3))
    if kind == "sasrec":  # the model reads what came later
        had = [item_ids(ITEMS)[item] for item in model.prepared.seen(0)]
        assert_same(pairs(later), pairs(answer(model, history=[*had, first[0]["item_id"]], k=3)))


@pytest.mark.parametrize(
    ("asked", "status", "code", "field"),
    [
        ({"user_id": "nobody"}, 404, "unknown_user", "user_id"),
        ({"user_id": "100", "history": ["i1"]}, 422, "invalid", "history"),
        ({"history": ["i1", "x"]}, 404, "unknown_item", "history[1]"),
        ({"user_id": "100", "candidates": ["x"]}, 404, "unknown_item", "candidates[0]"),
        ({"user_id": "100", "categories": ["Polka"]}, 422, "invalid", "categories"),
    ],
)
def test_what_is_unknown_is_said(models, asked, status, code, field):
    with pytest.raises(ServiceError) as caught:
        answer(models["mf"], **asked)
    assert (caught.value.status, caught.value.code, caught.value.field) == (status, code, field)


def test_unknown_items_are_passed_over_where_that_is_asked_for(models):
    model = models["mf"]
    wanted = answer(model, history=["i1"], candidates=["i2", "i3"])
    assert answer(model, history=["x", "i1"], candidates=["i2", "y", "i3"], skip_unknown=True) == wanted
    assert answer(model, history=["i1"], candidates=["i2", "i3"], exclude=["z"]) == wanted


def test_integer_ids_stay_integers_and_are_also_text(tmp_path):
    model = ServedModel(exported(tmp_path, integer_ids=True, bias=False, titles=False, features=False))
    got = answer(model, user_id=107, k=3)
    assert all(isinstance(item["item_id"], int) for item in got)
    assert answer(model, user_id="107", k=3) == got
    assert answer(model, history=["1", 2], k=3) == answer(model, history=[1, "2"], k=3)
    assert not model.prepared.has_bias


@pytest.mark.parametrize("name", ["users.json", "items.json", "seen.safetensors", "vectors.safetensors", "titles.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_a_damaged_export_is_refused_by_the_file_s_name(folders, tmp_path, name, damage):
    folder = tmp_path / "export"
    shutil.copytree(folders["mf"], folder)
    shutil.rmtree(folder / ".serving", ignore_errors=True)
    file = folder / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        ServedModel(folder)


@pytest.mark.parametrize("name", ["prepared.safetensors", "prepared.json", "verified.json"])
def test_a_damaged_cache_is_made_again(folders, tmp_path, name):
    folder = tmp_path / "export"
    shutil.copytree(folders["mf"], folder)
    wanted = answer(ServedModel(folder), user_id="100")
    file = folder / ".serving" / name
    file.write_bytes(file.read_bytes()[:-20])
    assert answer(ServedModel(folder), user_id="100") == wanted


def test_an_export_that_contradicts_itself_is_refused(folders, tmp_path):
    """Its sums are right, its content is not: as somebody would make it who wants to harm the reader."""
    import hashlib

    from safetensors.numpy import save_file

    def made(name, change):
        folder = tmp_path / name
        shutil.copytree(folders["mf"], folder)
        shutil.rmtree(folder / ".serving", ignore_errors=True)
        change(folder)
        about = read_json(folder / "model.json")
        for file, sums in about["files"].items():
            data = (folder / file).read_bytes()
            sums |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        write_json(folder / "model.json", about)
        return folder

    def outside(folder):
        seen = load_file(folder / "seen.safetensors")
        save_file({**seen, "items": seen["items"] + 1000}, folder / "seen.safetensors")

    def unending(folder):
        vectors = load_file(folder / "vectors.safetensors")
        vectors["item_vectors"][3, 1] = np.nan
        save_file(vectors, folder / "vectors.safetensors")

    def narrow(folder):
        vectors = load_file(folder / "vectors.safetensors")
        save_file({**vectors, "user_vectors": vectors["user_vectors"][:, :-1]}, folder / "vectors.safetensors")

    def deep(folder):
        (folder / "items.json").write_text("[" * 100_000, encoding="utf-8")

    for name, change, wanted in (
        ("outside", outside, r"seen\.safetensors: holds items outside"),
        ("unending", unending, r"vectors\.safetensors: item_vectors holds NaN"),
        ("narrow", narrow, r"vectors\.safetensors: user_vectors: wanted shape"),
        ("deep", deep, r"items\.json: not the JSON"),
    ):
        with pytest.raises(UserError, match=wanted):
            ServedModel(made(name, change))


def test_a_folder_that_cannot_be_written_is_served_from_another(folders, tmp_path, monkeypatch):
    """Root may write anywhere, so what a read-only folder does is imitated: a file stands where the cache would be."""
    folder = tmp_path / "export"
    shutil.copytree(folders["mf"], folder)
    shutil.rmtree(folder / ".serving", ignore_errors=True)
    (folder / ".serving").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="--cache DIR"):
        ServedModel(folder)
    model = ServedModel(folder, cache=tmp_path / "cache")
    assert answer(model, user_id="100")
    assert (tmp_path / "cache" / model.version / "prepared.json").exists()
