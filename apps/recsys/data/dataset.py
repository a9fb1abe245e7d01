"""The typed data set: an interaction log with ids mapped to 0..n-1, features in the same order, and its loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from apps.recsys.data.filters import Duplicates, apply_filters
from apps.recsys.data.formats import RawLog, align, find_log, read_log
from apps.recsys.data.formats.canonical import is_canonical, read_canonical
from kdcore.config import UserError
from kdcore.run import fingerprint


@dataclass(frozen=True, eq=False)
class Dataset:
    """An interaction log; row order is file order, ids are mapped in order of first appearance.

    ``user``, ``item`` int32 [n]; ``timestamp`` float64 [n], seconds, or the row number where the source has none
    (``has_timestamp`` False); ``rating`` float32 [n] or None; ``user_ids``, ``item_ids`` the original ids, string
    or int64; row i of ``item_features`` describes item i (no id column, list<string> columns allowed), the same
    for users; ``dropped`` the number of rows left out, by reason.
    """

    name: str
    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    rating: np.ndarray | None
    user_ids: pa.Array
    item_ids: pa.Array
    user_features: pa.Table | None
    item_features: pa.Table | None
    has_timestamp: bool
    dropped: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.user)

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self.user_ids)

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.item_ids)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over rows, ids and features; the name does not count."""
        parts: list[str | bytes | np.ndarray] = ["interactions", str(self.has_timestamp), self.user, self.item]
        parts += [self.timestamp, *([] if self.rating is None else [self.rating])]
        parts += [*_array_parts(self.user_ids), *_array_parts(self.item_ids)]
        for side, table in (("users", self.user_features), ("items", self.item_features)):
            if table is not None:
                for name, column in zip(table.column_names, table.columns, strict=True):
                    parts += [f"{side}:{name}", *_array_parts(_one_array(column))]
        return fingerprint(*parts)

    def statistics(self) -> dict[str, Any]:
        """Return counts, density, interactions per user and item, repeats, time span, ratings and dropped rows."""
        per_user = np.bincount(self.user, minlength=self.n_users)
        per_item = np.bincount(self.item, minlength=self.n_items)
        n_pairs = pc.count_distinct(pa.array(self.user.astype(np.int64) * self.n_items + self.item)).as_py()
        popular = np.sort(per_item)[::-1][: max(1, round(0.2 * self.n_items))]
        statistics: dict[str, Any] = {
            "name": self.name,
            "users": self.n_users,
            "items": self.n_items,
            "interactions": len(self),
            "density": n_pairs / (self.n_users * self.n_items),
            "repeated_pairs": len(self) - n_pairs,
            "per_user": _spread(per_user),
            "per_item": _spread(per_item),
            "share_of_top_20_percent_items": float(popular.sum() / len(self)),
            "from": _iso(self.timestamp.min()) if self.has_timestamp else None,
            "to": _iso(self.timestamp.max()) if self.has_timestamp else None,
            "rating": None if self.rating is None else _spread(self.rating),
            "user_features": [] if self.user_features is None else self.user_features.column_names,
            "item_features": [] if self.item_features is None else self.item_features.column_names,
            "dropped": dict(self.dropped),
            "fingerprint": self.fingerprint,
        }
        return statistics


def _spread(values: np.ndarray) -> dict[str, float]:
    return {
        "min": float(values.min()),
        "mean": float(values.mean(dtype=np.float64)),
        "median": float(np.median(values)),
        "max": float(values.max()),
    }


def _iso(moment: float) -> str:
    try:
        return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return f"{moment:g} s"  # a number that is no date of this calendar


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _array_parts(column: pa.Array) -> list[str | bytes | np.ndarray]:
    """Return what identifies the values of a column, however Arrow lays them out in memory."""
    kind = column.type
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind)  # their type also names the inner field
    parts: list[str | bytes | np.ndarray] = [
        "list" if nested else str(kind),
        column.is_null().to_numpy(zero_copy_only=False),
    ]
    column = column.drop_null()
    if pa.types.is_dictionary(kind):
        return [*parts, *_array_parts(column.dictionary_decode())]
    if nested:
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        return [*parts, lengths, *_array_parts(column.flatten())]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        text = column.cast(pa.large_string())
        _, offsets, data = text.buffers()
        bounds = np.frombuffer(offsets, np.int64)[text.offset : text.offset + len(text) + 1]
        joined = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
        return [*parts, np.diff(bounds), joined[bounds[0] : bounds[-1]]] if len(text) else parts
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return [*parts, column.to_numpy(zero_copy_only=False)]
    return [*parts, repr(column.to_pylist())]


def dataset_of(log: RawLog, name: str) -> Dataset:
    """Return the data set of a log: features brought into index order, row numbers where there is no time."""
    n = len(log.user)
    return Dataset(
        name=name,
        user=log.user,
        item=log.item,
        timestamp=np.arange(n, dtype=np.float64) if log.timestamp is None else log.timestamp,
        rating=log.rating,
        user_ids=log.user_ids,
        item_ids=log.item_ids,
        user_features=align(log.users, log.user_ids),
        item_features=align(log.items, log.item_ids),
        has_timestamp=log.timestamp is not None,
        dropped=log.dropped,
    )


def load_dataset(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    min_rating: float | None = None,
    k_core: int = 0,
    user_core: int | None = None,
    item_core: int | None = None,
    duplicates: Duplicates = "keep",
    skip_bad: bool = False,
    name: str | None = None,
) -> Dataset:
    """Load an interaction log from a file or folder, in any format that ``formats.ACCEPTED`` names.

    Options: ``columns`` canonical name (user_id, item_id, timestamp, rating) -> column of the file, for formats
    with a header; ``duplicates`` keep all rows of a pair or its first or last by time; ``min_rating`` the least
    rating kept; ``k_core`` the least interactions of every user and item kept (``user_core``, ``item_core``
    override it for one side); ``skip_bad`` drops and counts bad rows. Filters run in this order.
    Raises ``UserError`` with file, row and column for anything wrong with the data.
    """
    source = Path(path)
    if is_canonical(source):
        log, stored_name, stored = read_canonical(source)
        if dataset_of(log, stored_name).fingerprint != stored:
            raise UserError(f"{source}: the files are not the ones dataset.json describes; prepare the data again")
    else:
        file = find_log(source)
        log, stored_name = read_log(file, columns or {}, skip_bad), _name_of(source, file)
    log = apply_filters(
        log,
        duplicates=duplicates,
        min_rating=min_rating,
        user_core=k_core if user_core is None else user_core,
        item_core=k_core if item_core is None else item_core,
        source=str(source),
    )
    return dataset_of(log, name or stored_name)


def _name_of(path: Path, file: Path) -> str:
    if path.is_dir():
        return path.resolve().name
    return file.name.split(".")[0] or file.name


def statistics_table(dataset: Dataset) -> Table:
    """Return the statistics of a data set as a table for the terminal."""
    statistics = dataset.statistics()
    table = Table(title=dataset.name, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name in ("users", "items", "interactions", "repeated_pairs"):
        table.add_row(name.replace("_", " "), f"{statistics[name]:,}")
    table.add_row("density", f"{100 * statistics['density']:.3f} %")
    for name in ("per_user", "per_item", "rating"):
        if statistics[name] is not None:
            spread = " / ".join(f"{value:,.4g}" for value in statistics[name].values())
            table.add_row(f"{name.replace('_', ' ')} (min / mean / median / max)", spread)
    table.add_row("share of the top 20 % of items", f"{100 * statistics['share_of_top_20_percent_items']:.1f} %")
    table.add_row(
        "time", f"{statistics['from']} to {statistics['to']}" if dataset.has_timestamp else "none (row order)"
    )
    for side in ("user_features", "item_features"):
        table.add_row(side.replace("_", " "), ", ".join(statistics[side]) or "none")
    for reason, count in dataset.dropped.items():
        table.add_row(f"dropped: {reason.replace('_', ' ')}", f"{count:,}")
    table.add_row("fingerprint", dataset.fingerprint)
    return table
