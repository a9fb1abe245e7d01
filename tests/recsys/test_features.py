"""Features as indices: what is known, rare, unknown or missing, checked against a slow reading of the same rules."""

from __future__ import annotations

import datetime
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.recsys.data.features import Bags, Feature, encode_table, fit_features
from kdcore.config import UserError

ALL = np.ones(4, dtype=bool)


def lists(bags: Bags) -> list[list[int]]:
    return [bags.of(row).tolist() for row in range(len(bags))]


def fitted(column: pa.Array, seen: np.ndarray | None = None, **options) -> Feature:
    (feature,) = fit_features(pa.table({"x": column}), np.ones(len(column), bool) if seen is None else seen, **options)
    return feature


def test_a_token_is_counted_over_training_rows_and_the_rest_is_index_0():
    column = pa.array(["b", "a", "b", "a", "c", None, "d", "d", "d"])
    seen = np.array([1, 1, 1, 1, 1, 1, 1, 0, 0], dtype=bool)
    feature = fitted(column, seen, min_count=2)
    assert feature.tokens == ("a", "b") and feature.size == 3
    assert lists(feature.encode(column)) == [[2], [1], [2], [1], [0], [0], [0], [0], [0]]
    assert lists(feature.encode(pa.array(["a", "never", "b"]))) == [[1], [0], [2]]


def test_a_list_is_a_bag_of_its_known_tokens():
    column = pa.array([["x", "y", "x"], [], None, ["y", "rare", None], ["rare2"], ["x"]])
    feature = fitted(column, min_count=2)
    assert feature.tokens == ("x", "y")
    assert lists(feature.encode(column)) == [[1, 2], [0], [0], [2], [0], [1]]


tokens = st.one_of(st.none(), st.sampled_from("abcdefg"))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.one_of(st.none(), st.lists(tokens, max_size=5)), st.booleans()), min_size=1, max_size=20
    ),
    min_count=st.integers(1, 3),
)
def test_bags_agree_with_a_slow_reading(rows, min_count):
    bags = [bag for bag, _ in rows]
    column = pa.array(bags, pa.list_(pa.string()))
    counts = Counter(token for bag, seen in rows if seen for token in {*(bag or [])} - {None})
    known = sorted(token for token, count in counts.items() if count >= min_count)
    features = fit_features(pa.table({"x": column}), np.array([seen for _, seen in rows]), min_count=min_count)
    assert [list(feature.tokens) for feature in features] == ([known] if known else [])
    for feature in features:
        expected = [sorted({known.index(token) + 1 for token in bag or [] if token in known}) or [0] for bag in bags]
        assert lists(feature.encode(column)) == expected


def test_numbers_are_cut_into_buckets_of_equal_share_from_training_rows():
    values = np.random.default_rng(0).permutation(np.arange(100.0)) ** 3
    column = pa.array([*values, 1e12, -5.0, None, float("nan")])
    feature = fitted(column, np.arange(104) < 100, buckets=4)
    index = feature.encode(column).values
    assert np.bincount(index[:100]).tolist() == [0, 25, 25, 25, 25]
    order = np.argsort(values)
    assert (np.diff(index[order]) >= 0).all()
    assert index[100:].tolist() == [4, 1, 0, 0]


def test_few_distinct_numbers_have_a_bucket_each_whatever_their_type():
    feature = fitted(pa.array([3, 1, 7, 3]), buckets=3)
    assert feature.encode(pa.array([1, 3, 7, None])).values.tolist() == [1, 2, 3, 0]
    assert feature.encode(pa.array([1.0, 2.9, 100.0])).values.tolist() == [1, 2, 3]


def test_dates_are_numbers_and_truth_values_and_dictionaries_are_tokens():
    days = pa.array([datetime.date(2020, 1, day) for day in (1, 9, 20)])
    assert fitted(days, buckets=3).encode(days).values.tolist() == [1, 2, 3]
    times = pa.array([datetime.datetime(2020, 1, day) for day in (20, 1, 9)])
    assert fitted(times, buckets=3).encode(times).values.tolist() == [3, 1, 2]
    flags = pa.array([True, False, None, True])
    assert fitted(flags).encode(flags).values.tolist() == [2, 1, 0, 2]
    coded = pa.array(["u", "v", "u"]).dictionary_encode()
    assert fitted(coded).encode(pa.array(["v", "u"])).values.tolist() == [2, 1]


def test_lists_of_whole_numbers_are_tokens():
    column = pa.array([[11, 5], [5], []])
    assert lists(fitted(column).encode(column)) == [[1, 2], [2], [0]]


def test_the_order_of_columns_is_of_no_account_and_empty_ones_are_left_out():
    table = pa.table(
        {
            "z": ["a", "b", "a", "b"],
            "year": [1, 2, 3, 4],
            "title": ["t1", "t2", "t3", "t4"],
            "rare": ["q", "r", "s", None],
            "nothing": pa.nulls(4),
            "no_number": pa.array([None] * 4, pa.float64()),
        }
    )
    features = fit_features(table, ALL, min_count=2, ignore=["title"])
    assert [feature.name for feature in features] == ["year", "z"]
    assert features == fit_features(table.select(table.column_names[::-1]), ALL, min_count=2, ignore=["title"])
    bags = encode_table(features, table.select(["z", "year"]))
    assert {name: each.values.tolist() for name, each in bags.items()} == {"year": [1, 2, 3, 4], "z": [1, 2, 1, 2]}
    assert fit_features(None, ALL) == ()


def test_a_feature_comes_back_from_json():
    for feature in (Feature("é", tokens=("a", "物")), Feature("n", bounds=(0.1, 2.0)), Feature("one", bounds=())):
        assert Feature.from_json(json.loads(json.dumps(feature.to_json()))) == feature
    for broken in ({"name": "x"}, {"tokens": []}, {"name": "x", "bounds": ["a"]}):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Feature.from_json(broken)


def test_chunked_and_sliced_columns_are_read_as_they_are():
    column = pa.chunked_array([["a"], ["b", "a"], []], pa.string())
    feature = fit_features(pa.table({"x": column}), np.ones(3, bool))[0]
    assert feature.encode(column).values.tolist() == [1, 2, 1]
    whole = pa.array([["b"], ["a", "b"], ["b"], None], pa.list_(pa.string()))
    assert lists(feature.encode(whole.slice(1, 2))) == [[1, 2], [2]]
    assert len(feature.encode(pa.chunked_array([], pa.string()))) == 0


@pytest.mark.parametrize(
    "column",
    [pa.array([[0.5], [1.0]]), pa.array([{"a": 1}, {"a": 2}]), pa.array([b"x", b"y"])],
)
def test_a_column_without_indices_is_refused_by_name(column):
    with pytest.raises(UserError, match=r"'odd'.*ignore it"):
        fit_features(pa.table({"odd": column}), np.ones(2, bool))
    assert fit_features(pa.table({"odd": column}), np.ones(2, bool), ignore=["odd"]) == ()


def test_another_table_must_have_the_same_columns_of_the_same_kind():
    text, number = Feature("x", tokens=("a",)), Feature("x", bounds=(1.0,))
    with pytest.raises(UserError, match="column 'x' is missing, got y"):
        encode_table([text], pa.table({"y": ["a"]}))
    with pytest.raises(UserError, match="column 'x' is missing, got none"):
        encode_table([text], None)
    with pytest.raises(UserError, match="wanted text"):
        text.encode(pa.array([1, 2]))
    with pytest.raises(UserError, match="wanted numbers"):
        number.encode(pa.array(["1"]))
    assert number.encode(pa.nulls(2)).values.tolist() == [0, 0]
    assert text.encode(pa.nulls(2)).values.tolist() == [0, 0]
