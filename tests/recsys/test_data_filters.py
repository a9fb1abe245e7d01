"""Filters against slow, obvious references."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.recsys.data.dataset import load_dataset
from apps.recsys.data.filters import core_mask, unique_pairs
from kdcore.config import UserError

ROWS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40)


def columns(rows: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    user, item, time = np.array(rows).T
    return user.astype(np.int32), item.astype(np.int32), time.astype(np.float64)


@given(ROWS, st.integers(0, 4), st.integers(0, 4))
def test_core_mask_is_the_fixed_point_of_dropping_one_row_at_a_time(
    rows: list[tuple[int, int, int]], user_core: int, item_core: int
) -> None:
    left = dict(enumerate(rows))
    while True:
        users, items = (Counter(row[side] for row in left.values()) for side in (0, 1))
        weak = [at for at, row in left.items() if users[row[0]] < user_core or items[row[1]] < item_core]
        if not weak:
            break
        del left[weak[-1]]
    user, item, _ = columns(rows)
    assert np.flatnonzero(core_mask(user, item, user_core, item_core)).tolist() == sorted(left)


@given(ROWS)
def test_unique_pairs_keeps_the_first_or_last_by_time_then_row(rows: list[tuple[int, int, int]]) -> None:
    user, item, time = columns(rows)
    ordered = sorted(range(len(rows)), key=lambda at: (rows[at][2], at))
    last = {rows[at][:2]: at for at in ordered}
    first = {rows[at][:2]: at for at in reversed(ordered)}
    assert np.flatnonzero(unique_pairs(user, item, time, "last")).tolist() == sorted(last.values())
    assert np.flatnonzero(unique_pairs(user, item, time, "first")).tolist() == sorted(first.values())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    lines = ["a,x,5,1", "b,y,1,2", "a,x,2,3", "c,z,4,4", "a,y,4,5", "b,x,4,6", "oops,x,nan,7"]
    path.write_text("user,item,rating,time\n" + "\n".join(lines))
    return path


def test_filters_run_in_order_and_count_what_they_drop(log: Path) -> None:
    dataset = load_dataset(log, skip_bad=True, duplicates="last", min_rating=4, k_core=0)
    # the last (a, x) is rated 2, so the pair is gone although its first rating was 5
    users, items = dataset.user_ids.to_pylist(), dataset.item_ids.to_pylist()
    pairs = [(users[u], items[i]) for u, i in zip(dataset.user, dataset.item, strict=True)]
    assert pairs == [("c", "z"), ("a", "y"), ("b", "x")]
    assert users == ["c", "a", "b"]  # numbered by first appearance in what is left
    assert dataset.dropped == {"bad": 1, "duplicate": 1, "rating": 2, "k_core": 0}
    assert dataset.rating is not None and dataset.rating.tolist() == [4, 4, 4]


def test_core_of_one_side(log: Path) -> None:
    dataset = load_dataset(log, skip_bad=True, item_core=2)
    assert dataset.item_ids.to_pylist() == ["x", "y"]
    assert dataset.dropped["k_core"] == 1
    assert load_dataset(log, skip_bad=True, k_core=3, item_core=1).user_ids.to_pylist() == ["a"]


def test_nothing_left_says_why(log: Path) -> None:
    with pytest.raises(UserError, match=r"no interaction is left after the filters \(dropped: bad 1, k_core 6\)"):
        load_dataset(log, skip_bad=True, k_core=5)


def test_options_out_of_range(log: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="duplicates: got 'all', wanted keep, first or last"):
        load_dataset(log, skip_bad=True, duplicates="all")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="k_core: got -1"):
        load_dataset(log, skip_bad=True, k_core=-1)
    (tmp_path / "s.txt").write_text("1 2 3\n")
    with pytest.raises(UserError, match="min_rating is set, but the data have no ratings"):
        load_dataset(tmp_path / "s.txt", min_rating=3)
