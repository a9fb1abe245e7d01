"""``recommend`` writes each user's best items, and refuses what it cannot answer with file and row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from apps.recsys import recommend as room
from apps.recsys.data.dataset import load_dataset
from apps.recsys.data.store import write_canonical
from apps.recsys.models.store import load_model
from apps.recsys.recommend import all_histories, open_run, read_users, recommend
from kdcore.config import UserError
from tests.recsys.tiny_run import N_ITEMS, N_USERS, PER_USER, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("recommend"))


def written(run: Path, out: Path, *, users: str = "all", k: int = 10, exclude_seen: bool = True) -> pa.Table:
    recommend(run, "student", users, k, exclude_seen, out)
    return pq.read_table(out)


def by_hand(run: Path, k: int, exclude_seen: bool, role: str = "student") -> dict[str, list[tuple[str, float]]]:
    """Sort all scores in Python: best first, equal ones by item index."""
    dataset, model = load_dataset(run / "data"), load_model(run / role)
    histories = all_histories(dataset)
    with torch.no_grad():
        scores = model.scores(torch.arange(dataset.n_users), histories).numpy()
    items = dataset.item_ids.to_pylist()
    lists = {}
    for user, name in enumerate(dataset.user_ids.to_pylist()):
        seen = set(histories.of(user).tolist()) if exclude_seen else set()
        open_items = [item for item in range(dataset.n_items) if item not in seen]
        best = sorted(open_items, key=lambda item: (-float(scores[user, item]), item))[:k]
        lists[name] = [(items[item], float(scores[user, item])) for item in best]
    return lists


def lists_of(table: pa.Table) -> dict[str, list[tuple[str, float]]]:
    lists: dict[str, list[tuple[str, float]]] = {}
    for row in table.to_pylist():
        lists.setdefault(row["user_id"], []).append((row["item_id"], row["score"]))
        assert row["rank"] == len(lists[row["user_id"]])
    return lists


@pytest.mark.parametrize("exclude_seen", [True, False])
@pytest.mark.parametrize("role", ["student", "student_alone", "teacher"])
def test_lists_are_the_sorted_scores(run: Path, tmp_path: Path, role: str, exclude_seen: bool) -> None:
    recommend(run, role, "all", 7, exclude_seen, tmp_path / "recs.parquet")
    got = lists_of(pq.read_table(tmp_path / "recs.parquet"))
    wanted = by_hand(run, 7, exclude_seen, role)
    assert list(got) == list(wanted)
    for user, expected in wanted.items():
        assert [item for item, _ in got[user]] == [item for item, _ in expected]
        np.testing.assert_allclose([score for _, score in got[user]], [score for _, score in expected], rtol=1e-5)


def test_schema_is_the_contract(run: Path, tmp_path: Path) -> None:
    table = written(run, tmp_path / "recs.parquet", k=3)
    assert table.schema.names == ["user_id", "item_id", "rank", "score"]
    assert table.schema.types == [pa.string(), pa.string(), pa.int32(), pa.float32()]
    assert table.num_rows == 3 * N_USERS and not any(column.null_count for column in table.columns)


def test_few_candidates_give_short_lists(run: Path, tmp_path: Path) -> None:
    table = written(run, tmp_path / "recs.parquet", k=N_ITEMS)
    lengths = {len(items) for items in lists_of(table).values()}
    assert lengths == {N_ITEMS - PER_USER}


def test_blocks_do_not_matter(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = written(run, tmp_path / "whole.parquet")
    monkeypatch.setattr(room, "_BLOCK_USERS", 7)
    assert written(run, tmp_path / "blocks.parquet").equals(whole)


def users_file(folder: Path, kind: str, users: list[str]) -> Path:
    path = folder / f"users.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"other": range(len(users)), "user_id": users}), path)
    elif kind == "dictionary.parquet":
        pq.write_table(pa.table({"user_id": pa.array(users).dictionary_encode()}), path)
    elif kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        rows = [f'"x"{mark}"{user}"' for user in users]
        path.write_text("\ufeff" + "\n".join([f"a{mark}user_id", *rows]) + "\n", encoding="utf-8")
    else:
        path.write_bytes(("\r\n".join(users) + "\r\n\r\n").encode())
    return path


@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "parquet", "dictionary.parquet"])
def test_users_files_keep_order_and_drop_repeats(run: Path, tmp_path: Path, kind: str) -> None:
    path = users_file(tmp_path, kind, ["ü9", "ü2", "ü9", "ü0", "ü2", "ü9"])
    out = tmp_path / "recs.parquet"
    summary = recommend(run, "student", str(path), 2, True, out)
    assert list(lists_of(pq.read_table(out))) == ["ü9", "ü2", "ü0"]
    assert (summary["users"], summary["rows"], summary["repeated_users"]) == (3, 6, 3)
    everyone = lists_of(written(run, tmp_path / "all.parquet", k=2))
    assert lists_of(pq.read_table(out)) == {user: everyone[user] for user in ("ü9", "ü2", "ü0")}


def test_integer_ids_match_text(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "numbers.csv"
    log.write_text("user_id,item_id\n5,1\n7,1\n5,2\n")
    dataset = load_dataset(log)
    assert dataset.user_ids.type == pa.int64()
    (tmp_path / "users.txt").write_text("7\n5\n")
    pq.write_table(pa.table({"user_id": pa.array([7, 5], pa.int32())}), tmp_path / "users.parquet")
    for name in ("users.txt", "users.parquet"):
        assert read_users(tmp_path / name, dataset).rows.tolist() == [1, 0]
    (tmp_path / "users.txt").write_text("007\n")  # is another id
    with pytest.raises(UserError, match="row 1, column user_id: unknown user '007'"):
        read_users(tmp_path / "users.txt", dataset)


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "unknown": ("users.txt", "ü1\n\nnobody\nnoone\n".encode(), r"users.txt: row 3, column user_id: .*'nobody' \(and 1"),
    "unknown in csv": ("users.csv", b"user_id\nnobody\n", r"users.csv: row 2, column user_id: unknown user 'nobody'"),
    "empty": ("users.txt", b"\n\n", "users.txt: holds no users"),
    "empty csv": ("users.csv", b"", "users.csv: no column user_id .*nothing"),
    "no column": ("users.csv", b"uid,x\n1,2\n", r"users.csv: no column user_id .*found uid, x"),
    "empty id": ("users.csv", "user_id,x\nü1,1\n,2\n".encode(), "users.csv: row 3, column user_id: is empty"),
    "short row": ("users.csv", "x,user_id\n1,ü1\n2\n".encode(), "users.csv: row 3, column user_id: is empty"),
    "open quote": ("users.csv", b'user_id\n"abc\n', "users.csv: row"),
    "binary": ("users.txt", bytes(range(256)), "users.txt: not UTF-8 text"),
    "no parquet": ("users.parquet", b"PAR1 nonsense", "users.parquet: not readable as Parquet"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_users_files_say_where(run: Path, tmp_path: Path, name: str) -> None:
    file, content, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    out = tmp_path / "recs.parquet"
    with pytest.raises(UserError, match=message):
        recommend(run, "student", str(tmp_path / file), 5, True, out)
    assert sorted(each.name for each in tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["ü1", None]), "row 2, column user_id: is empty"),
        (pa.array([1.5]), "column user_id: has type double; ids must be text or integers"),
        (pa.array([], pa.string()), "holds no users"),
    ],
)
def test_bad_parquet_columns(run: Path, tmp_path: Path, column: pa.Array, message: str) -> None:
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": column}), path)
    with pytest.raises(UserError, match=message):
        recommend(run, "student", str(path), 5, True, tmp_path / "recs.parquet")


def test_parquet_without_the_column(run: Path, tmp_path: Path) -> None:
    pq.write_table(pa.table({"uid": ["ü1"]}), tmp_path / "users.parquet")
    with pytest.raises(UserError, match=r"no column user_id \(found uid\)"):
        read_users(tmp_path / "users.parquet", load_dataset(run / "data"))


@pytest.mark.parametrize("k", [0, -1, N_ITEMS + 1])
def test_k_out_of_range(run: Path, tmp_path: Path, k: int) -> None:
    with pytest.raises(UserError, match=f"--k: got {k}, wanted 1 to {N_ITEMS}"):
        recommend(run, "student", "all", k, True, tmp_path / "recs.parquet")
    assert not list(tmp_path.iterdir())


def test_missing_users_file_and_folder_as_out(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*nowhere.txt"):
        recommend(run, "student", str(tmp_path / "nowhere.txt"), 5, True, tmp_path / "recs.parquet")
    with pytest.raises(UserError, match="is a folder"):
        recommend(run, "student", "all", 5, True, tmp_path)


def test_a_failure_leaves_the_old_file(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "recs.parquet"
    before = written(run, out, k=2)
    monkeypatch.setattr(room, "_BLOCK_USERS", 7)
    real, calls = room.top_k, []

    def failing(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError("lights out")
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(room, "top_k", failing)
    with pytest.raises(RuntimeError, match="lights out"):
        recommend(run, "student", "all", 5, True, out)
    assert pq.read_table(out).equals(before)
    assert [each.name for each in tmp_path.iterdir()] == ["recs.parquet"]


def damaged(run: Path, folder: Path) -> Path:
    copy = folder / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("seeds", "*.html"))
    return copy


def test_unfinished_and_damaged_runs(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run here \(data/dataset.json is missing\)"):
        open_run(tmp_path, "student")
    copy = damaged(run, tmp_path)
    shutil.rmtree(copy / "student")
    with pytest.raises(UserError, match="has no student yet; there is teacher, student_alone"):
        open_run(copy, "student")
    (copy / "teacher" / "model.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(UserError, match=r"teacher: (the model cannot be read|not a model)"):
        open_run(copy, "teacher")
    (copy / "teacher" / "model.json").write_text("{")
    with pytest.raises(UserError, match=r"teacher: (the model cannot be read|not a model)"):
        open_run(copy, "teacher")


def test_model_of_other_data_is_refused(run: Path, tmp_path: Path) -> None:
    copy = damaged(run, tmp_path)
    shutil.rmtree(copy / "data")
    other = tmp_path / "other.csv"
    other.write_text("user_id,item_id\n1,1\n2,1\n")
    write_canonical(load_dataset(other), copy / "data")
    with pytest.raises(UserError, match="is a model of 30 users and 40 items, the run's data have 2 and 1"):
        open_run(copy, "student")
    assert json.loads((copy / "student" / "model.json").read_text())["n_users"] == N_USERS
