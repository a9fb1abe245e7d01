"""An interaction log as a format reader hands it on: coded ids, columns, and the features found beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kdcore.config import UserError


@dataclass(frozen=True)
class FeatureTable:
    """Features of users or items as read: the first column is the id; ``source`` for messages."""

    table: pa.Table
    source: Path


@dataclass(frozen=True)
class RawLog:
    """Rows in file order; ``user`` and ``item`` int32 [n] index the id arrays; float64 times, float32 ratings."""

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray | None
    rating: np.ndarray | None
    user_ids: pa.Array
    item_ids: pa.Array
    dropped: Mapping[str, int] = field(default_factory=dict)
    users: FeatureTable | None = None
    items: FeatureTable | None = None


class LogBuilder:
    """Collects blocks of columns; ids become codes block by block, so that no string is held twice."""

    def __init__(self) -> None:
        self._users: list[pa.DictionaryArray] = []
        self._items: list[pa.DictionaryArray] = []
        self._times: list[np.ndarray] = []
        self._ratings: list[np.ndarray] = []

    def add(self, columns: Mapping[str, pa.Array]) -> None:
        """Add a block with ``user_id`` and ``item_id`` and, in every block or none, ``timestamp`` and ``rating``."""
        if not len(columns["user_id"]):
            return
        self._users.append(columns["user_id"].dictionary_encode())
        self._items.append(columns["item_id"].dictionary_encode())
        if "timestamp" in columns:
            self._times.append(columns["timestamp"].to_numpy(zero_copy_only=False).astype(np.float64))
        if "rating" in columns:
            self._ratings.append(columns["rating"].to_numpy(zero_copy_only=False).astype(np.float32))

    def finish(
        self,
        path: Path,
        dropped: Mapping[str, int],
        *,
        typed_ids: bool = False,
        users: FeatureTable | None = None,
        items: FeatureTable | None = None,
    ) -> RawLog:
        """Return the log; ids from text become int64 if all are plain integers, unless ``typed_ids``."""
        if not self._users:
            raise UserError(f"{path}: holds no interactions")
        user, user_ids = _unify(self._users)
        self._users.clear()
        item, item_ids = _unify(self._items)
        self._items.clear()
        if not typed_ids:
            user_ids, item_ids = integers_if_all(user_ids), integers_if_all(item_ids)
        return RawLog(
            user=user,
            item=item,
            timestamp=np.concatenate(self._times) if self._times else None,
            rating=np.concatenate(self._ratings) if self._ratings else None,
            user_ids=user_ids,
            item_ids=item_ids,
            dropped=dropped,
            users=users,
            items=items,
        )


def _unify(blocks: list[pa.DictionaryArray]) -> tuple[np.ndarray, pa.Array]:
    """Return codes int32 [n] and the ids in order of first appearance."""
    unified = pa.chunked_array(blocks).unify_dictionaries()
    ids = unified.chunk(0).dictionary
    codes = np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in unified.chunks])
    return codes.astype(np.int32, copy=False), ids


def integers_if_all(ids: pa.Array) -> pa.Array:
    """Return text ids as int64 if every one is an integer written the plain way (no "007", no "+1")."""
    try:
        numbers = ids.cast(pa.int64())
    except pa.ArrowInvalid:
        return ids
    same = pc.all(pc.equal(numbers.cast(pa.string()), ids)).as_py()
    return numbers if same else ids


def align(features: FeatureTable | None, ids: pa.Array) -> pa.Table | None:
    """Return the features of ``ids``, row by row, without the id column; an id without features has nulls."""
    if features is None or features.table.num_columns < 2:
        return None
    table = features.table.combine_chunks()
    keys = pa.concat_arrays(table.column(0).chunks) if table.num_rows else pa.array([], table.schema.field(0).type)
    if keys.type != ids.type:
        keys, ids = keys.cast(pa.string()), ids.cast(pa.string())
    if pc.count_distinct(keys).as_py() != len(keys):
        twice = next(each for each in pc.value_counts(keys).to_pylist() if each["counts"] > 1)
        raise UserError(f"{features.source}: column {table.column_names[0]}: {twice['values']!r} stands there twice")
    return table.select(table.column_names[1:]).take(pc.index_in(ids, value_set=keys)).combine_chunks()
