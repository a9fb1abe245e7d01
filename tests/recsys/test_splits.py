"""Splits: the exact protocols, against pandas and plain Python, and their laws."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.recsys.data.dataset import Dataset, load_dataset
from apps.recsys.data.splits import PARTS, Split, from_files, global_time, leave_last_out, ratio
from kdcore.config import UserError

REAL = Path(os.environ.get("KD_DATA", "../shared/data")) / "recsys"
needs_data = pytest.mark.skipif(not (REAL / "ml-100k").is_dir(), reason="KD_DATA has no recsys/ml-100k")


def make(rows: list[tuple[int, int, float]], n_users: int = 0, n_items: int = 0) -> Dataset:
    user, item, time = (np.array(column) for column in zip(*rows, strict=True))
    return Dataset(
        name="toy",
        user=user.astype(np.int32),
        item=item.astype(np.int32),
        timestamp=time.astype(np.float64),
        rating=None,
        user_ids=pa.array(range(max(n_users, user.max() + 1))),
        item_ids=pa.array(range(max(n_items, item.max() + 1))),
        user_features=None,
        item_features=None,
        has_timestamp=True,
        dropped={},
    )


def triples(split: Split) -> dict[str, list[tuple[int, int]]]:
    result = {}
    for part in PARTS:
        histories = getattr(split, part)
        result[part] = list(zip(histories.users().tolist(), histories.items.tolist(), strict=True))
    return result


@st.composite
def logs(draw: st.DrawFn, distinct_times: bool = False) -> list[tuple[int, int, float]]:
    n = draw(st.integers(3, 40))
    user = draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    item = draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    if distinct_times:
        time = draw(st.permutations(range(n)))
    else:
        time = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    # one user that has enough for every part
    return [*zip(user, item, map(float, time), strict=True), *((4, i, float(100 + i)) for i in range(10))]


@needs_data
def test_leave_last_out_on_ml_100k_follows_the_published_tie_rule() -> None:
    dataset = load_dataset(REAL / "ml-100k")
    split = leave_last_out(dataset)
    assert (len(split.train), len(split.valid), len(split.test)) == (98_114, 943, 943)
    frame = pd.read_csv(REAL / "ml-100k" / "ml-100k.inter", sep="\t")
    frame.columns = ["user", "item", "rating", "time"]
    frame = frame.sort_values(["user", "time"], kind="stable")
    for part, back in (("test", 1), ("valid", 2)):
        expected = frame.groupby("user").nth(-back).set_index("user")["item"]
        histories = getattr(split, part)
        users = np.array(dataset.user_ids.to_pylist())[histories.users()]
        items = np.array(dataset.item_ids.to_pylist())[histories.items]
        assert dict(zip(users.tolist(), items.tolist(), strict=True)) == expected.to_dict()


@needs_data
def test_leave_last_out_of_liked_items_has_the_published_counts() -> None:
    dataset = load_dataset(REAL / "ml-100k", min_rating=4)
    split = leave_last_out(dataset)
    assert (dataset.n_users, dataset.n_items) == (942, 1_447)
    assert (len(split.train), len(split.valid), len(split.test)) == (53_491, 942, 942)


@needs_data
@pytest.mark.parametrize("seed", [0, 3])
def test_ratio_is_the_pandas_protocol(seed: int) -> None:
    dataset = load_dataset(REAL / "ml-100k")
    split = ratio(dataset, seed=seed)
    frame = pd.DataFrame({"user": dataset.user, "item": dataset.item}).sample(frac=1, random_state=seed)
    for user, group in frame.groupby("user"):
        n = len(group)
        n_test, n_valid = round(0.2 * n), round(0.08 * n)
        items = group["item"].tolist()
        assert sorted(split.test.of(user)) == sorted(items[:n_test])
        assert sorted(split.valid.of(user)) == sorted(items[n_test : n_test + n_valid])
    assert (split.train.n_users, split.train.n_items) == (943, 1_682)


@given(logs(distinct_times=True), st.randoms(use_true_random=False))
def test_leave_last_out_does_not_depend_on_row_order(rows: list[tuple[int, int, float]], random: object) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    first, second = leave_last_out(make(rows, 5, 10)), leave_last_out(make(shuffled, 5, 10))
    assert triples(first) == triples(second)
    assert first.fingerprint == second.fingerprint


@given(logs())
def test_leave_last_out_against_plain_python(rows: list[tuple[int, int, float]]) -> None:
    split = leave_last_out(make(rows, 5, 10))
    short = 0
    for user in range(5):
        items = [item for who, item, _ in sorted(rows, key=lambda row: row[2]) if who == user]
        expected: tuple[list[int], ...]
        if len(items) < 3:
            short += 1
            expected = (items, [], [])
        else:
            expected = (items[:-2], [items[-2]], [items[-1]])
        assert tuple(getattr(split, part).of(user).tolist() for part in PARTS) == expected
    assert split.dropped == {"short_users": short}


@settings(max_examples=60)
@given(logs(), st.integers(0, 2**32 - 1), st.floats(0.1, 0.9), st.floats(0.01, 0.5))
def test_ratio_partitions_every_user_exactly(
    rows: list[tuple[int, int, float]], seed: int, test: float, valid: float
) -> None:
    dataset = make(rows, 5, 10)
    if test + valid >= 1:
        with pytest.raises(UserError, match="together below 1"):
            ratio(dataset, test, valid, seed)
        return
    try:
        split = ratio(dataset, test, valid, seed)
    except UserError as error:
        assert "leaves no interactions for" in str(error)
        return
    for user in range(5):
        everything = [item for who, item, _ in rows if who == user]
        parts = [getattr(split, part).of(user).tolist() for part in PARTS]
        assert sorted(parts[0] + parts[1] + parts[2]) == sorted(everything)
        assert bool(parts[0]) == bool(everything)
        assert len(parts[2]) == min(round(test * len(everything)), max(len(everything) - 1, 0))


def test_ratio_keeps_train_in_time_order_and_depends_on_the_seed() -> None:
    rows = [(0, item, float(99 - item)) for item in range(50)]
    first, same, other = (ratio(make(rows), seed=seed) for seed in (1, 1, 2))
    assert first.train.items.tolist() == sorted(first.train.items.tolist(), reverse=True)
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_ratio_without_validation_leaves_that_part_empty() -> None:
    split = ratio(make([(0, item, 0.0) for item in range(10)]), test=0.2, valid=0)
    assert (len(split.train), len(split.valid), len(split.test)) == (8, 0, 2)


@given(logs())
def test_global_time_cuts_between_times_and_counts_the_cold(rows: list[tuple[int, int, float]]) -> None:
    dataset = make(rows, 5, 10)
    try:
        split = global_time(dataset, 0.2, 0.2)
    except UserError as error:
        assert "leaves no interactions for" in str(error)
        return
    times: dict[tuple[int, int], list[float]] = {}
    for user, item, time in rows:
        times.setdefault((user, item), []).append(time)
    pairs = triples(split)
    assert sum(map(len, pairs.values())) + split.dropped["cold"] == len(rows)
    users, items = ({pair[side] for pair in pairs["train"]} for side in (0, 1))
    assert all(user in users and item in items for part in ("valid", "test") for user, item in pairs[part])
    latest = max(min(times[pair]) for pair in pairs["train"])
    assert all(max(times[pair]) >= latest for part in ("valid", "test") for pair in pairs[part])


def test_global_time_keeps_equal_times_on_one_side() -> None:
    rows = [(user, item, float(item // 5)) for item in range(20) for user in range(2)]
    rows += [(user, item, 0.0) for item in range(20) for user in range(2)]
    split = global_time(make(rows), test=0.1, valid=0.1)
    assert sorted(set(split.test.items.tolist())) == [15, 16, 17, 18, 19]
    assert sorted(set(split.valid.items.tolist())) == [10, 11, 12, 13, 14]


def test_history_is_what_is_known_before_each_part() -> None:
    split = leave_last_out(make([(0, item, float(item)) for item in range(5)]))
    assert split.history("valid").of(0).tolist() == [0, 1, 2]
    assert split.history("test").of(0).tolist() == [0, 1, 2, 3]
    assert split.history("test") is split.history("test")
    with pytest.raises(UserError, match="valid or test"):
        split.history("train")


def test_an_empty_part_is_an_error() -> None:
    with pytest.raises(UserError, match="leave_last_out split leaves no interactions for valid"):
        leave_last_out(make([(0, 0, 0.0), (1, 1, 1.0)]))
    with pytest.raises(UserError, match="ratio split leaves no interactions for valid"):
        ratio(make([(0, item, 0.0) for item in range(3)]))
    with pytest.raises(UserError, match="global_time split leaves no interactions for train"):
        global_time(make([(0, item, 7.0) for item in range(10)]))


def test_global_time_needs_times(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("1 2 3 4\n")
    with pytest.raises(UserError, match="needs timestamps"):
        global_time(load_dataset(tmp_path / "s.txt"))


@pytest.mark.parametrize(("test", "valid"), [(0, 0.1), (0.5, 0.5), (0.2, -0.1), (float("nan"), 0.1)])
def test_shares_out_of_range_are_refused(test: float, valid: float) -> None:
    with pytest.raises(UserError, match="wanted test > 0"):
        ratio(make([(0, item, 0.0) for item in range(10)]), test, valid)


def test_from_files_maps_ids_over_all_parts(tmp_path: Path) -> None:
    texts = {"train": "1,a,5\n2,b,6\n1,b,7\n", "valid": "1,c,8\n", "test": "x,a,9\n2,a,9\n"}
    for part, text in texts.items():
        (tmp_path / f"{part}.csv").write_text("user_id,item_id,timestamp\n" + text)
    dataset, split = from_files(*(tmp_path / f"{part}.csv" for part in PARTS))
    assert dataset.user_ids.to_pylist() == ["1", "2", "x"]  # one id is text, so all are
    assert dataset.item_ids.to_pylist() == ["a", "b", "c"]
    assert triples(split) == {"train": [(0, 0), (0, 1), (1, 1)], "valid": [(0, 2)], "test": [(1, 0), (2, 0)]}
    assert split.dropped == {"cold": 2}
    (tmp_path / "test.csv").write_text("user_id,item_id,timestamp\n")
    with pytest.raises(UserError, match=r"test\.csv: holds no interactions"):
        from_files(*(tmp_path / f"{part}.csv" for part in PARTS))
