"""Features of users and items as small integers: vocabularies and quantiles are learned once, then applied."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from kdcore.config import UserError


@dataclass(frozen=True)
class Bags:
    """The indices of every row, compressed: row r has ``values[indptr[r]:indptr[r + 1]]``, ascending, no repeats.

    ``indptr`` int64 [n + 1]; ``values`` int32 [nnz].
    """

    indptr: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def of(self, row: int) -> np.ndarray:
        """Return the indices of one row."""
        return self.values[self.indptr[row] : self.indptr[row + 1]]


@dataclass(frozen=True)
class Feature:
    """How a column becomes indices 0..size-1; index 0 stands for missing, unknown and rare.

    Text, truth values and lists are ``tokens``: token i has index i + 1, and a list is a bag of its known tokens.
    Numbers have ``bounds`` instead: the index is 1 + how many bounds are not above the number.
    """

    name: str
    tokens: tuple[str, ...] = ()
    bounds: tuple[float, ...] | None = None

    @property
    def size(self) -> int:
        """Number of indices, index 0 counted."""
        return 1 + len(self.tokens) if self.bounds is None else 2 + len(self.bounds)

    def encode(self, column: pa.ChunkedArray | pa.Array) -> Bags:
        """Return the indices of every row, at least one each.

        Raises:
            UserError: the column is of a kind that has no indices, or text where numbers were learned.
        """
        values = _plain(self.name, column)
        if self.bounds is not None:
            return self._buckets(values)
        if _is_number(values.type):
            raise UserError(f"feature {self.name!r}: got numbers ({values.type}), wanted text as in training")
        row, tokens = _pairs(values)
        known = pc.index_in(tokens, value_set=pa.array(self.tokens, pa.large_string())).fill_null(-1)
        index = known.to_numpy(zero_copy_only=False).astype(np.int64) + 1
        # a token nobody learned says nothing beside one that was; alone it makes the row an unknown one
        pairs = np.unique((row * self.size + index)[index > 0])
        unknown = np.setdiff1d(np.arange(len(values)), pairs // self.size) * self.size
        pairs = np.sort(np.concatenate([pairs, unknown]))
        return Bags(_indptr(pairs // self.size, len(values)), (pairs % self.size).astype(np.int32))

    def _buckets(self, values: pa.Array) -> Bags:
        if not (_is_number(values.type) or kinds.is_null(values.type)):
            raise UserError(f"feature {self.name!r}: got {values.type}, wanted numbers as in training")
        numbers = _numbers(values)
        index = np.searchsorted(np.asarray(self.bounds, np.float64), numbers, side="right") + 1
        index[np.isnan(numbers)] = 0
        return Bags(np.arange(len(numbers) + 1, dtype=np.int64), index.astype(np.int32))

    def to_json(self) -> dict[str, Any]:
        """Return the feature as JSON holds it."""
        if self.bounds is None:
            return {"name": self.name, "tokens": list(self.tokens)}
        return {"name": self.name, "bounds": list(self.bounds)}

    @classmethod
    def from_json(cls, about: Mapping[str, Any]) -> Feature:
        """Return the feature that ``to_json`` described; KeyError, TypeError or ValueError if it is not one."""
        if "bounds" in about:
            return cls(str(about["name"]), bounds=tuple(map(float, about["bounds"])))
        return cls(str(about["name"]), tokens=tuple(map(str, about["tokens"])))


def fit_features(
    table: pa.Table | None,
    seen: np.ndarray,
    *,
    min_count: int = 1,
    buckets: int = 16,
    ignore: Collection[str] = (),
) -> tuple[Feature, ...]:
    """Return the features that a table has to offer, by name, so that the order of its columns is of no account.

    Args:
        table: row r describes user or item r; None has no features.
        seen: bool [n], the rows that occur in training: only they are looked at.
        min_count: a token that fewer of these rows have is rare; a column of rare tokens alone is left out.
        buckets: at most so many buckets of equal share a numeric column is cut into; fewer distinct numbers have one
            bucket each.
        ignore: columns to leave out.

    Raises:
        UserError: a column is of a kind that has no indices (a list of floats, a struct).
    """
    if table is None:
        return ()
    rows = pa.array(np.flatnonzero(seen))
    features = []
    for name in sorted(set(table.column_names) - set(ignore)):
        values = _plain(name, table[name]).take(rows)
        if kinds.is_null(values.type):
            continue
        feature = _quantiles(name, values, buckets) if _is_number(values.type) else _tokens(name, values, min_count)
        if feature is not None:
            features.append(feature)
    return tuple(features)


def encode_table(features: Sequence[Feature], table: pa.Table | None) -> dict[str, Bags]:
    """Return the indices of every feature by name; a column that is missing is a UserError."""
    columns = [] if table is None else table.column_names
    bags = {}
    for feature in features:
        if table is None or feature.name not in columns:
            raise UserError(f"features: column {feature.name!r} is missing, got {', '.join(columns) or 'none'}")
        bags[feature.name] = feature.encode(table[feature.name])
    return bags


def _tokens(name: str, values: pa.Array, min_count: int) -> Feature | None:
    row, tokens = _pairs(values)
    coded = tokens.dictionary_encode()
    words = coded.dictionary.to_pylist()
    # a list that repeats a token has it once
    pairs = np.unique(row * max(len(words), 1) + coded.indices.to_numpy(zero_copy_only=False))
    counts = np.bincount(pairs % max(len(words), 1), minlength=len(words))
    kept = sorted(word for word, count in zip(words, counts.tolist(), strict=True) if count >= min_count)
    return Feature(name, tokens=tuple(kept)) if kept else None


def _quantiles(name: str, values: pa.Array, buckets: int) -> Feature | None:
    numbers = _numbers(values)
    numbers = numbers[np.isfinite(numbers)]
    distinct = np.unique(numbers)
    if not len(distinct):
        return None
    if len(distinct) <= buckets:
        bounds = (distinct[1:] + distinct[:-1]) / 2
    else:
        bounds = np.unique(np.quantile(numbers, np.linspace(0, 1, buckets + 1)[1:-1]))
    return Feature(name, bounds=tuple(bounds.tolist()))


def _plain(name: str, column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return a column as one array of numbers, large strings, lists of large strings, or nothing but nulls."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # pyarrow keeps the chunks of an empty column
            column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if kinds.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if kinds.is_null(kind) or _is_number(kind):
        return column
    if _is_list(kind):
        inner = kind.value_type
        inner = inner.value_type if kinds.is_dictionary(inner) else inner
        if kinds.is_null(inner) or _is_text(inner) or kinds.is_integer(inner):
            return column.cast(pa.large_list(pa.large_string()))
    elif _is_text(kind):
        return column.cast(pa.large_string())
    raise UserError(f"feature {name!r}: got a column of {kind}, wanted text, numbers or lists of text; ignore it")


def _is_text(kind: pa.DataType) -> bool:
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_boolean(kind)


def _is_list(kind: pa.DataType) -> bool:
    return kinds.is_list(kind) or kinds.is_large_list(kind)


def _is_number(kind: pa.DataType) -> bool:
    return kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_decimal(kind) or kinds.is_temporal(kind)


def _numbers(values: pa.Array) -> np.ndarray:
    """Return the numbers as float64 [n], NaN where there is none."""
    kind = values.type
    if kinds.is_temporal(kind):
        values = values.cast(pa.int32() if kind.bit_width == 32 else pa.int64())
    return values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False).astype(np.float64)


def _pairs(values: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Return the row int64 [m] and the token of every token that is there."""
    if kinds.is_null(values.type):
        return np.empty(0, np.int64), pa.array([], pa.large_string())
    if _is_list(values.type):
        row = pc.list_parent_indices(values).to_numpy(zero_copy_only=False).astype(np.int64)
        tokens = pc.list_flatten(values)
    else:
        row, tokens = np.arange(len(values)), values
    valid = tokens.is_valid().to_numpy(zero_copy_only=False)
    return row[valid], tokens.drop_null()


def _indptr(rows: np.ndarray, n: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))]).astype(np.int64)
