"""Histories against the obvious lists of Python."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from apps.recsys.data.histories import Histories

N_USERS, N_ITEMS = 5, 7
PAIRS = st.lists(st.tuples(st.integers(0, N_USERS - 1), st.integers(0, N_ITEMS - 1), st.integers(0, 3)), max_size=30)


def as_lists(pairs: list[tuple[int, int, int]], by_time: bool = True) -> list[list[int]]:
    ordered = sorted(pairs, key=lambda row: row[2]) if by_time else pairs  # sorted is stable
    return [[item for user, item, _ in ordered if user == wanted] for wanted in range(N_USERS)]


def build(pairs: list[tuple[int, int, int]], by_time: bool = True) -> Histories:
    user, item, time = np.array(pairs, dtype=np.int32).reshape(-1, 3).T
    return Histories.from_pairs(user, item, N_USERS, N_ITEMS, time if by_time else None)


@given(PAIRS)
def test_from_pairs_groups_by_user_and_orders_by_time_then_row(pairs: list[tuple[int, int, int]]) -> None:
    for by_time in (True, False):
        histories, lists = build(pairs, by_time), as_lists(pairs, by_time)
        assert [histories.of(user).tolist() for user in range(N_USERS)] == lists
        assert histories.counts().tolist() == [len(items) for items in lists]
        assert len(histories) == len(pairs)
        assert histories.n_users == N_USERS
        assert histories.users().tolist() == [user for user in range(N_USERS) for _ in lists[user]]


@given(PAIRS)
def test_matrix_is_binary_and_item_counts_are_not(pairs: list[tuple[int, int, int]]) -> None:
    histories = build(pairs)
    dense = np.zeros((N_USERS, N_ITEMS))
    for user, item, _ in pairs:
        dense[user, item] = 1
    matrix = histories.matrix()
    assert matrix.dtype == np.float32
    np.testing.assert_array_equal(matrix.toarray(), dense)
    assert histories.item_counts().tolist() == [sum(item == i for _, item, _ in pairs) for i in range(N_ITEMS)]


@given(PAIRS, PAIRS)
def test_merge_appends_the_later_items(first: list[tuple[int, int, int]], second: list[tuple[int, int, int]]) -> None:
    merged = build(first).merge(build(second))
    expected = [mine + theirs for mine, theirs in zip(as_lists(first), as_lists(second), strict=True)]
    assert [merged.of(user).tolist() for user in range(N_USERS)] == expected


@given(PAIRS, st.lists(st.integers(0, N_USERS - 1), max_size=8))
def test_rows_gives_the_pairs_of_the_users_asked_for(pairs: list[tuple[int, int, int]], users: list[int]) -> None:
    histories, lists = build(pairs), as_lists(pairs)
    row, item = histories.rows(np.array(users, dtype=np.int64))
    expected = [(at, each) for at, user in enumerate(users) for each in lists[user]]
    assert list(zip(row.tolist(), item.tolist(), strict=True)) == expected


def test_making_a_matrix_leaves_the_histories_as_they_are() -> None:
    histories = build([(0, 3, 0), (0, 1, 1), (0, 3, 2)])
    histories.matrix()
    assert histories.of(0).tolist() == [3, 1, 3]
