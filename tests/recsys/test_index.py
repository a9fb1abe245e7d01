"""Every kind of index against products of all items in float64, and its files against what may befall them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.recsys.bench_index import made_vectors
from apps.recsys.index import KINDS, Filter, Index, fetch_size, first_filtered, open_index, search_filtered
from apps.recsys.index import opening as opening_module
from kdcore.config import UserError

APPROXIMATE = ("int8", "hnsw", "ivfpq")
ITEMS, DIMENSION = 5000, 24
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Training is so short here that threads would only wait for each other."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


@pytest.fixture(scope="module")
def made() -> tuple[np.ndarray, np.ndarray]:
    return made_vectors(ITEMS, DIMENSION, users=200, seed=1)


@pytest.fixture(scope="module")
def built(made, tmp_path_factory) -> dict[str, Index]:
    folder = tmp_path_factory.mktemp("indexes")
    return {kind: open_index(kind, *_args(made, folder), fingerprint="one") for kind in ("exact", *APPROXIMATE)}


def _args(made: tuple[np.ndarray, np.ndarray], folder: Path) -> tuple[np.ndarray, Path, np.ndarray]:
    return made[0], folder, made[1]


def _best(vectors: np.ndarray, query: np.ndarray, k: int, passing: np.ndarray | None = None) -> np.ndarray:
    """Return the best items by float64 products, slowly and obviously; -inf is what does not pass."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    if passing is not None:
        scores[~passing] = -np.inf
    order = np.argsort(-scores, kind="stable")[:k]
    return order[scores[order] > -np.inf]


def _check_row(vectors: np.ndarray, query: np.ndarray, scores: np.ndarray, items: np.ndarray) -> None:
    """The scores are the products, in descending order, equal ones by index, and no item comes twice."""
    assert scores.dtype == np.float32 and items.dtype == np.int64
    assert len(set(items.tolist())) == len(items)
    np.testing.assert_allclose(scores, vectors[items].astype(np.float64) @ query.astype(np.float64), atol=1e-5)
    assert list(zip(-scores, items, strict=True)) == sorted(zip(-scores, items, strict=True))


def _check_equal(vectors: np.ndarray, query: np.ndarray, items: np.ndarray, best: np.ndarray) -> None:
    """The items are the best ones, but for scores that float32 does not tell apart."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    np.testing.assert_allclose(scores[items], scores[best], rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 10, 100])
def test_exact_is_the_reference(made, built, k):
    vectors, users = made
    scores, items = built["exact"].search(users[:40], k)
    assert scores.shape == items.shape == (40, k)
    for query, row, found in zip(users[:40], scores, items, strict=True):
        _check_row(vectors, query, row, found)
        _check_equal(vectors, query, found, _best(vectors, query, k))


@pytest.mark.parametrize("kind", APPROXIMATE)
def test_approximate_kinds_reach_the_recall_and_give_exact_scores(made, built, kind):
    vectors, users = made
    index = built[kind]
    assert index.kind == kind and index.about["recall"] >= 0.97
    scores, items = index.search(users, 10)
    for query, row, found in zip(users, scores, items, strict=True):
        _check_row(vectors, query, row, found)
    shares = [len(set(found) & set(_best(vectors, user, 10))) / 10 for user, found in zip(users, items, strict=True)]
    assert np.mean(shares) >= 0.96
    deep = index.search(users[:50], 100)[1]
    shares = [len(set(found) & set(_best(vectors, user, 100))) / 100 for user, found in zip(users, deep, strict=False)]
    assert np.mean(shares) >= 0.85


@pytest.mark.parametrize("kind", ["exact", *APPROXIMATE])
def test_a_batch_answers_like_its_queries_alone(made, built, kind):
    _, users = made
    together = built[kind].search(users[:40], 10)
    for row, query in enumerate(users[:40]):
        scores, items = built[kind].search(query[None], 10)
        np.testing.assert_array_equal(scores[0], together[0][row])
        np.testing.assert_array_equal(items[0], together[1][row])


@pytest.mark.parametrize("kind", ["exact", *APPROXIMATE])
def test_threads_do_not_disturb_each_other(made, built, kind):
    _, users = made
    expected = [built[kind].search(query[None], 10)[1] for query in users[:32]]
    wrong: list[int] = []

    def ask(first: int) -> None:
        for each in range(first, 32, 4):
            _, items = built[kind].search(users[each : each + 1], 10)
            if (items != expected[each]).any():
                wrong.append(each)

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["exact", *APPROXIMATE])
def test_norms_count(kind, tmp_path):
    """A long vector at an angle beats a short one that points the same way; a cosine would have it the other way."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((2000, 16), dtype=np.float32) * 0.1
    query = generator.standard_normal(16).astype(np.float32)
    vectors[7] = 0.1 * query
    vectors[11] = query + generator.standard_normal(16).astype(np.float32)
    index = open_index(kind, vectors, tmp_path, vectors[:50], fingerprint="one")
    assert index.search(query[None], 2)[1][0, 0] == 11 == _best(vectors, query, 1)[0]


@pytest.mark.parametrize("kind", ["exact", *APPROXIMATE])
def test_a_bias_coordinate_counts(kind, made, tmp_path):
    vectors, users = made
    bias = np.random.default_rng(2).gumbel(size=(ITEMS, 1)).astype(np.float32)
    vectors = np.hstack([vectors, bias])
    users = np.hstack([users, np.ones((len(users), 1), dtype=np.float32)])
    index = open_index(kind, vectors, tmp_path, users, fingerprint="one")
    items = index.search(users[:60], 10)[1]
    shares = [len(set(found) & set(_best(vectors, user, 10))) / 10 for user, found in zip(users, items, strict=False)]
    assert np.mean(shares) >= (1.0 if kind == "exact" else 0.95)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (5, 3), (7, 65)])
def test_few_items_are_answered_right_by_every_kind(kind, n, d, tmp_path):
    generator = np.random.default_rng(n)
    vectors = generator.standard_normal((n, d)).astype(np.float32)
    query = generator.standard_normal(d).astype(np.float32)
    index = open_index(kind, vectors, tmp_path, query[None], fingerprint="one")
    scores, items = index.search(query[None], 10)
    assert scores.shape == items.shape == (1, 10)
    assert items[0, :n].tolist() == _best(vectors, query, n).tolist()
    assert (items[0, n:] == -1).all() and (scores[0, n:] == -np.inf).all()
    assert len(search_filtered(index, query, 10, None)[1]) == n


@pytest.mark.parametrize("kind", APPROXIMATE)
@pytest.mark.parametrize("d", [1, 65])
def test_odd_dimensions(kind, d, tmp_path):
    vectors, users = made_vectors(1500, d, users=60, seed=3)
    index = open_index(kind, vectors, tmp_path, users, fingerprint="one")
    assert index.kind == kind and index.about["recall"] >= 0.97


@pytest.mark.parametrize("kind", ["exact", *APPROXIMATE])
def test_duplicates_and_zero_vectors(kind, tmp_path):
    vectors, users = made_vectors(2000, 16, users=30, seed=4)
    vectors = np.concatenate([vectors, np.tile(vectors[:1] * 9, (30, 1)), np.zeros((30, 16), dtype=np.float32)])
    index = open_index(kind, vectors, tmp_path, users, fingerprint="one")
    scores, items = index.search(vectors[:1], 20)
    assert (items[0] >= 2000).all() and len(set(scores[0].tolist())) == 1
    assert (np.diff(items[0]) > 0).all()
    zero, found = search_filtered(index, np.zeros(16, dtype=np.float32), 5, Filter(np.arange(40)))
    assert len(found) == 5 and (zero == 0).all() and (found >= 40).all()


def test_bad_queries_are_refused(built):
    for bad in (np.nan, np.inf, -np.inf):
        query = np.zeros((1, DIMENSION), dtype=np.float32)
        query[0, 3] = bad
        with pytest.raises(ValueError, match="NaN"):
            built["hnsw"].search(query, 5)
        with pytest.raises(ValueError, match="NaN"):
            search_filtered(built["exact"], query[0], 5, None)
    with pytest.raises(ValueError, match="k: got 0"):
        built["exact"].search(np.zeros((1, DIMENSION), dtype=np.float32), 0)
    with pytest.raises(ValueError, match="shape"):
        built["exact"].search(np.zeros((1, DIMENSION + 1), dtype=np.float32), 1)
    # finite numbers whose square is not
    assert built["exact"].search(np.full((1, DIMENSION), 1e30, dtype=np.float32), 1)[1][0, 0] >= 0


def test_bad_vectors_are_refused(made, tmp_path):
    vectors, users = made
    broken = vectors.copy()
    broken[4321, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        open_index("hnsw", broken, tmp_path, users, fingerprint="one")
    with pytest.raises(ValueError, match="float32"):
        open_index("exact", vectors.astype(np.float64), tmp_path, users, fingerprint="one")
    with pytest.raises(UserError, match="did you mean hnsw"):
        open_index("hsnw", vectors, tmp_path, users, fingerprint="one")


_ITEM = st.integers(0, ITEMS - 1)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_filtered_search(made, built, data):
    """Exactly min(k, passing) distinct results that pass; the reference's for an exact index."""
    vectors, users = made
    query = users[data.draw(st.integers(0, len(users) - 1))]
    k = data.draw(st.sampled_from([1, 2, 10, 37, 300, ITEMS + 10]))
    top = data.draw(st.sampled_from([0, 5, 100, 700, ITEMS]))
    others = data.draw(st.lists(_ITEM, max_size=20))
    exclude = np.concatenate([_best(vectors, query, top)[::-1], np.array(others + others, dtype=np.int64)])
    share = data.draw(st.sampled_from([None, 0.0, 0.002, 0.1, 0.9, 1.0]))
    allowed = None if share is None else np.flatnonzero(np.random.default_rng(k).random(ITEMS) < share)
    passing = np.ones(ITEMS, dtype=bool) if allowed is None else np.isin(np.arange(ITEMS), allowed)
    passing[exclude] = False
    for kind in ("exact", "hnsw"):
        scores, items = search_filtered(built[kind], query, k, Filter(exclude.astype(np.int32), allowed))
        assert len(items) == min(k, passing.sum())
        assert passing[items].all()
        _check_row(vectors, query, scores, items)
        if kind == "exact":
            _check_equal(vectors, query, items, _best(vectors, query, k, passing))


def test_a_batch_then_filters_is_a_filtered_search(made, built):
    """The way of a server: one search for all, a filter for each, and a search alone where the row ran short."""
    _, users = made
    generator = np.random.default_rng(0)
    filters = [Filter(generator.integers(0, ITEMS, each)) for each in range(40)]
    fetch = max(fetch_size(10, each, ITEMS) for each in filters)
    for kind in ("exact", "int8"):
        scores, items = built[kind].search(users[:40], fetch)
        for row, each in enumerate(filters):
            found = first_filtered(scores[row], items[row], 10, each)
            alone = search_filtered(built[kind], users[row], 10, each)
            assert len(found[1]) == 10
            np.testing.assert_array_equal(found[1], alone[1])
            np.testing.assert_array_equal(found[0], alone[0])


def test_a_row_that_ran_short_says_so():
    scores, items = np.array([3.0, 2.0, -np.inf], dtype=np.float32), np.array([5, 9, -1])
    assert first_filtered(scores, items, 2, None)[1].tolist() == [5, 9]
    assert first_filtered(scores, items, 3, None)[1].tolist() == [5, 9]
    assert first_filtered(scores, items, 3, Filter(np.array([9, 9, 4])))[1].tolist() == [5]
    assert first_filtered(scores, items, 3, Filter(np.array([], dtype=int), np.array([9, 10])))[1].tolist() == [9]
    assert first_filtered(scores, items, 3, Filter(np.array([5]), np.array([], dtype=int)))[1].tolist() == []
    # an exclusion must not outlive its call, in a table that other calls use
    assert first_filtered(scores, items, 3, Filter(np.array([100_000_000])))[1].tolist() == [5, 9]
    assert first_filtered(scores, items, 3, Filter(np.array([4])))[1].tolist() == [5, 9]


def _open_counting(kind, vectors, folder, users, fingerprint="one", **options):
    said: list[str] = []
    index = open_index(kind, vectors, folder, users, fingerprint=fingerprint, announce=said.append, **options)
    return index, any("tuning" in each for each in said)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Vectors, users and a folder with an hnsw index of theirs."""
    vectors, users = made_vectors(1200, 16, users=40, seed=5)
    folder = tmp_path_factory.mktemp("one")
    index, built = _open_counting("hnsw", vectors, folder, users)
    assert built and index.kind == "hnsw"
    return vectors, users, folder


@pytest.fixture
def small(one, tmp_path):
    """The same in a folder to be spoilt."""
    shutil.copytree(one[2], tmp_path, dirs_exist_ok=True)
    return one[0], one[1], tmp_path


def test_files_are_used_again(small):
    vectors, users, folder = small
    before = (folder / "hnsw.faiss").stat().st_mtime_ns
    index, tuned = _open_counting("hnsw", vectors, folder, users)
    assert not tuned and (folder / "hnsw.faiss").stat().st_mtime_ns == before
    about = json.loads((folder / "hnsw.json").read_text())
    assert about["kind"] == "hnsw" and about["items"] == 1200 and about["dimension"] == 16
    assert about["bytes"] == (folder / "hnsw.faiss").stat().st_size
    assert index.query_seconds > 0 and isinstance(index.batches_well, bool)
    # another recall is a matter of tuning alone
    _, tuned = _open_counting("hnsw", vectors, folder, users, recall=0.999)
    assert tuned and (folder / "hnsw.faiss").stat().st_mtime_ns == before


def test_stale_files_are_replaced(small):
    vectors, users, folder = small
    index, built = _open_counting("hnsw", vectors, folder, users, fingerprint="two")
    assert built and index.about["fingerprint"] == "two"
    index, built = _open_counting("hnsw", vectors[:1100], folder, users, fingerprint="two")
    assert built and index.n_items == 1100
    assert index.search(users, 50)[1].max() < 1100


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_index_is_refused_by_name(small, damage):
    vectors, users, folder = small
    path = folder / "hnsw.faiss"
    content = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"hnsw\.faiss"):
        open_index("hnsw", vectors, folder, users, fingerprint="one")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "kdsuite-index/1"}'])
def test_a_damaged_description_is_refused_or_replaced(small, text):
    vectors, users, folder = small
    (folder / "hnsw.json").write_text(text)
    if "format" in text:  # of nothing in particular: stale
        assert _open_counting("hnsw", vectors, folder, users)[1]
    else:
        with pytest.raises(UserError, match=r"hnsw\.json"):
            open_index("hnsw", vectors, folder, users, fingerprint="one")


def test_a_field_of_another_type_is_refused(small):
    vectors, users, folder = small
    about = json.loads((folder / "hnsw.json").read_text())
    (folder / "hnsw.json").write_text(json.dumps(about | {"query_ms": "fast"}))
    with pytest.raises(UserError, match=r"hnsw\.json: query_ms"):
        open_index("hnsw", vectors, folder, users, fingerprint="one")


def test_a_folder_without_write_permission_serves(small, monkeypatch):
    vectors, users, folder = small

    def refuse(*_):
        raise AssertionError("nothing is to be written")

    monkeypatch.setattr(opening_module, "locked", refuse)
    assert open_index("hnsw", vectors, folder, users, fingerprint="one").kind == "hnsw"


_CHILD = """
import json, sys
from pathlib import Path
import numpy as np
from apps.recsys.index import open_index
folder = Path(sys.argv[1])
vectors = np.load(folder / "items.npy", mmap_mode="r")
said = []
index = open_index("hnsw", vectors, folder, np.load(folder / "users.npy"), fingerprint="one", announce=said.append)
index.search(vectors[:500], 50)
mapped = {}
for block in Path("/proc/self/smaps").read_text().split("VmFlags:"):
    if "hnsw.faiss" in block:
        for line in block.splitlines():
            if line.endswith(" kB"):
                name, number, _ = line.split()
                mapped[name[:-1]] = mapped.get(name[:-1], 0) + int(number)
print(json.dumps({"built": any("tuning" in each for each in said), "torch": "torch" in sys.modules, "mapped": mapped}))
"""


def test_two_processes_build_one_index_and_share_its_memory(tmp_path):
    vectors, users = made_vectors(3000, 64, users=40, seed=6)
    np.save(tmp_path / "items.npy", vectors)
    np.save(tmp_path / "users.npy", users)
    command = [sys.executable, "-c", _CHILD, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [json.loads(child.communicate(timeout=120)[0]) for child in children]
    assert sorted(each["built"] for each in outputs) == [False, True]
    kilobytes = (tmp_path / "hnsw.faiss").stat().st_size / 1024
    for each in outputs:
        assert not each["torch"]
        # pages of the file itself, none of which became this process's own
        assert each["mapped"]["Rss"] > 0.5 * kilobytes and each["mapped"]["Anonymous"] < 0.05 * kilobytes
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


def test_auto_says_what_it_chose_and_why(made, tmp_path, monkeypatch):
    vectors, users = made
    said: list[str] = []

    def auto(folder: str, **options) -> Index:
        said.clear()
        return open_index("auto", vectors, tmp_path / folder, users, fingerprint="one", announce=said.append, **options)

    assert opening_module.choose(20_000, 64)[0] == "exact"
    assert opening_module.choose(1_000_000, 64)[0] == "hnsw"
    assert opening_module.choose(50_000_000, 64)[0] == "ivfpq"
    assert auto("a").kind == "exact"
    assert said[-1].startswith("index: exact over 5,000 items of dimension 24 (a scan of so few is cheap); nothing on")
    monkeypatch.setattr(opening_module, "EXACT_NUMBERS", 1000)
    index = auto("a")
    assert index.kind == "hnsw" and index.about["summary"] == said[-1]
    for part in ("on disk", "memory", "recall@10 0.9", "ms a query", "measured on 200 users"):
        assert part in said[-1]
    # the graph misses what is wanted of it: a scan of codes
    for name, value in (("_EFFORTS", {"hnsw": (4,), "int8": (400,)}), ("_LINKS", 2), ("_CONSTRUCTION", 2)):
        monkeypatch.setattr(f"apps.recsys.index.building.{name}", value)
    index = auto("b", recall=0.995)
    assert index.kind == "int8"
    assert "hnsw reached only 0." in said[-1] and "of the wanted recall@10 of 0.995" in said[-1]
    assert auto("b", recall=0.995).kind == "int8" and not any("tuning" in each for each in said)


def test_without_users_an_index_is_tuned_on_items(made, tmp_path):
    vectors, _ = made
    index = open_index("exact", vectors, tmp_path, np.empty((0, DIMENSION), dtype=np.float32), fingerprint="one")
    assert index.about["recall"] == 1.0
