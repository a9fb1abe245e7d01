"""The prepared form: an exact round trip, and no damaged or mixed folder passes."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from apps.recsys.data.dataset import Dataset, load_dataset, statistics_table
from apps.recsys.data.splits import PARTS, leave_last_out, ratio
from apps.recsys.data.store import find_data, read_split, write_canonical, write_split
from kdcore.config import UserError

REAL = Path(os.environ.get("KD_DATA", "../shared/data")) / "recsys"
needs_data = pytest.mark.skipif(not (REAL / "ml-100k").is_dir(), reason="KD_DATA has no recsys/ml-100k")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    source = tmp_path / "source"
    source.mkdir()
    lines = [f"u{n % 7}\t{n % 5}\t{n % 3}\t{1000 - n}" for n in range(60)]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (source / "x.inter").write_text(header + "\n".join(lines) + "\nu1\t2\tbad\t3\n")
    (source / "x.item").write_text("item_id:token\ttitle:token\ttags:token_seq\n3\tDrei\ta b\n0\t\t\n4\tÉ\tc\n")
    return load_dataset(source / "x.inter", skip_bad=True)


def assert_same(first: Dataset, second: Dataset) -> None:
    for name in ("user", "item", "timestamp", "rating"):
        mine, theirs = getattr(first, name), getattr(second, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs)
    assert first.user_ids.equals(second.user_ids) and first.item_ids.equals(second.item_ids)
    for mine, theirs in ((first.user_features, second.user_features), (first.item_features, second.item_features)):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.equals(theirs) and mine.schema.equals(theirs.schema)
    assert (first.name, first.has_timestamp, first.dropped) == (second.name, second.has_timestamp, second.dropped)
    assert first.fingerprint == second.fingerprint


def test_round_trip(dataset: Dataset, tmp_path: Path) -> None:
    folder = write_canonical(dataset, tmp_path / "prepared")
    assert_same(dataset, load_dataset(folder))
    assert sorted(each.name for each in folder.iterdir()) == [
        "dataset.json",
        "interactions.parquet",
        "items.parquet",
        "users.parquet",
    ]
    about = json.loads((folder / "dataset.json").read_text())
    assert (about["users"], about["items"], about["interactions"]) == (7, 5, 60)
    table = pq.read_table(folder / "interactions.parquet")
    assert table.column_names == ["user_id", "item_id", "timestamp", "rating"]
    assert table["user_id"].to_pylist()[:3] == ["u0", "u1", "u2"] and table["item_id"].to_pylist()[:3] == [0, 1, 2]
    assert pq.read_table(folder / "items.parquet")["item_id"].to_pylist() == dataset.item_ids.to_pylist()


@needs_data
@pytest.mark.parametrize("name", ["ml-100k", "amazon-beauty"])
def test_round_trip_of_real_data(name: str, tmp_path: Path) -> None:
    dataset = load_dataset(REAL / name)
    assert_same(dataset, load_dataset(write_canonical(dataset, tmp_path / name)))


def test_filters_apply_to_prepared_data_and_counts_add_up(dataset: Dataset, tmp_path: Path) -> None:
    folder = write_canonical(dataset, tmp_path / "prepared")
    filtered = load_dataset(folder, min_rating=1)
    assert filtered.dropped == {"bad": 1, "duplicate": 0, "rating": 20, "k_core": 0}
    assert len(filtered) == 40


def test_writing_again_replaces_everything(dataset: Dataset, tmp_path: Path) -> None:
    folder = write_canonical(dataset, tmp_path / "prepared")
    smaller = load_dataset(folder, min_rating=1)
    assert_same(smaller, load_dataset(write_canonical(smaller, folder)))


def test_a_mixture_of_two_writes_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    folder = write_canonical(dataset, tmp_path / "one")
    other = write_canonical(load_dataset(folder, min_rating=1), tmp_path / "two")
    (folder / "interactions.parquet").write_bytes((other / "interactions.parquet").read_bytes())
    with pytest.raises(UserError, match=r"the files are not the ones dataset\.json describes"):
        load_dataset(folder)


def test_damaged_folders_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    folder = write_canonical(dataset, tmp_path / "prepared")
    for name, problem in (
        ("users.parquet", "not readable as Parquet"),
        ("interactions.parquet", "not readable as Parquet"),
        ("dataset.json", "not readable as JSON"),
    ):
        file = folder / name
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=problem):
            load_dataset(folder)
        file.write_bytes(whole)
    (folder / "dataset.json").write_text('{"name": "x"}')
    with pytest.raises(UserError, match=r"dataset\.json: is not complete"):
        load_dataset(folder)
    (folder / "users.parquet").unlink()
    with pytest.raises(UserError, match=r"users\.parquet: is missing"):
        load_dataset(folder)


def test_split_round_trip_and_damage(dataset: Dataset, tmp_path: Path) -> None:
    for split in (leave_last_out(dataset), ratio(dataset, valid=0)):
        read = read_split(write_split(split, tmp_path / "split"))
        for part in PARTS:
            mine, theirs = getattr(split, part), getattr(read, part)
            np.testing.assert_array_equal(mine.indptr, theirs.indptr)
            np.testing.assert_array_equal(mine.items, theirs.items)
            assert (mine.items.dtype, mine.n_items) == (theirs.items.dtype, theirs.n_items)
        assert (read.kind, read.fingerprint, read.dropped) == (split.kind, split.fingerprint, split.dropped)
    file = tmp_path / "split" / "test.items.npy"
    items = np.load(file)
    np.save(file, np.roll(items, 1))
    with pytest.raises(UserError, match=r"not the ones split\.json describes"):
        read_split(tmp_path / "split")
    for wrong, problem in (
        (np.full_like(items, 99), "do not fit"),
        (items[:-1], "do not fit"),
        (items.astype(float), "one-dimensional array of integers"),
    ):
        np.save(file, wrong)
        with pytest.raises(UserError, match=problem):
            read_split(tmp_path / "split")
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not readable as a NumPy array"):
        read_split(tmp_path / "split")


def test_fingerprint_changes_with_every_part_but_the_name(dataset: Dataset) -> None:
    assert dataset.rating is not None and dataset.item_features is not None
    changed = [
        replace(dataset, rating=dataset.rating + 1),
        replace(dataset, rating=None),
        replace(dataset, timestamp=dataset.timestamp + 1),
        replace(dataset, user=dataset.user[::-1].copy()),
        replace(dataset, item_ids=dataset.item_ids.cast(pa.string())),
        replace(dataset, item_features=None),
        replace(dataset, item_features=dataset.item_features.slice(0, 4)),
        replace(dataset, has_timestamp=False),
    ]
    assert len({dataset.fingerprint, *(each.fingerprint for each in changed)}) == 1 + len(changed)
    assert replace(dataset, name="other").fingerprint == dataset.fingerprint
    sliced = pa.concat_arrays([pa.array(["zz"]), dataset.user_ids]).slice(1)
    assert replace(dataset, user_ids=sliced).fingerprint == dataset.fingerprint


def test_statistics(dataset: Dataset) -> None:
    statistics = dataset.statistics()
    assert (statistics["users"], statistics["items"], statistics["interactions"]) == (7, 5, 60)
    assert statistics["repeated_pairs"] == 60 - 35 and statistics["density"] == 1.0
    assert statistics["per_item"] == {"min": 12.0, "mean": 12.0, "median": 12.0, "max": 12.0}
    assert statistics["rating"]["mean"] == pytest.approx(1.0)
    assert statistics["share_of_top_20_percent_items"] == pytest.approx(0.2)
    assert (statistics["from"], statistics["to"]) == ("1970-01-01T00:15:41Z", "1970-01-01T00:16:40Z")
    json.dumps(statistics, allow_nan=False)

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(statistics_table(dataset))
    text = console.export_text()
    assert "interactions" in text and "60" in text and "title, tags" in text and dataset.fingerprint in text


def test_find_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("kd/recsys/ml-100k", "kd/recsys/amazon-beauty", "work/data/mine"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("KD_DATA", str(tmp_path / "kd"))
    assert find_data("ml-100k") == tmp_path / "kd/recsys/ml-100k"
    assert find_data("beauty") == tmp_path / "kd/recsys/amazon-beauty"
    assert find_data("mine") == Path("data/mine")
    assert find_data("data/mine") == Path("data/mine")
    with pytest.raises(UserError, match=r"'ml100k'; did you mean ml-100k\? \(known data sets: amazon-beauty, mine"):
        find_data("ml100k")
    with pytest.raises(UserError, match=r"no data set or path '\.\./kd/recsys/none'"):
        find_data("../kd/recsys/none")
