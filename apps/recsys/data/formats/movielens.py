"""The MovieLens layouts: 100K (u.data), 1M and 10M (ratings.dat), 20M, 25M and 32M (ratings.csv).

Reference: Harper and Konstan, The MovieLens Datasets: History and Context (2015).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from apps.recsys.data.formats.log import FeatureTable, LogBuilder, RawLog
from apps.recsys.data.formats.text import (
    Field,
    Layout,
    Tally,
    listed,
    located,
    read_columns,
    read_features,
    read_header,
)
from apps.recsys.data.formats.values import GENRES, ID, RATING, TEXT, TIME

_TABS = Layout("\t", encoding="latin-1")
_BARS = Layout("|", encoding="latin-1")
_COLONS = Layout("::", encoding="latin-1")
_COMMAS = Layout(",", quoting=True)

_GENRES_100K = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)

FeatureReader = Callable[[Path, bool, Tally], pa.Table]


def _fields(*names_and_kinds: tuple[str, int, object]) -> list[Field]:
    return [Field(name, position, kind, name) for name, position, kind in names_and_kinds]  # type: ignore[arg-type]


def _ratings(positions: Sequence[int] = (0, 1, 2, 3), names: Sequence[str] | None = None) -> list[Field]:
    canonical = ("user_id", "item_id", "rating", "timestamp")
    return [
        Field(name, position, kind, column)
        for name, position, kind, column in zip(
            canonical, positions, (ID, ID, RATING, TIME), names or canonical, strict=True
        )
    ]


def read_100k(path: Path, skip_bad: bool) -> RawLog:
    """Read ``u.data`` (user, item, rating, seconds) with ``u.item`` and ``u.user`` beside it."""
    beside = {"u.user": _users_100k, "u.item": _items_100k}
    return _read(path, _TABS, _ratings(), 4, False, beside, skip_bad)


def read_1m(path: Path, skip_bad: bool) -> RawLog:
    """Read ``ratings.dat`` (``user::item::rating::seconds``) with ``movies.dat`` and ``users.dat`` beside it."""
    return _read(path, _COLONS, _ratings(), 4, False, {"users.dat": _users_1m, "movies.dat": _items_1m}, skip_bad)


def read_20m(path: Path, skip_bad: bool) -> RawLog:
    """Read ``ratings.csv`` (userId, movieId, rating, timestamp) with ``movies.csv`` beside it."""
    names = read_header(path, _COMMAS)
    names = [name.strip() for name in names]
    wanted = ("userId", "movieId", "rating", "timestamp")
    for name in wanted:
        if name not in names:
            raise located(path, 1, name, f"is missing; the file has {listed(names)}")
    fields = _ratings([names.index(name) for name in wanted], wanted)
    return _read(path, _COMMAS, fields, len(names), True, {"movies.csv": _items_20m}, skip_bad)


def _read(
    path: Path,
    layout: Layout,
    fields: Sequence[Field],
    width: int,
    header: bool,
    beside: Mapping[str, FeatureReader],
    skip_bad: bool,
) -> RawLog:
    builder, tally, feature_tally = LogBuilder(), Tally(), Tally()
    for block in read_columns(path, layout, fields, width=width, header=header, skip_bad=skip_bad, tally=tally):
        builder.add(block)
    tables: dict[str, FeatureTable] = {}
    for name, reader in beside.items():
        for file in (path.with_name(name), path.with_name(f"{name}.gz")):
            if file.is_file():
                side = "items" if "item" in name or "movies" in name else "users"
                tables[side] = FeatureTable(reader(file, skip_bad, feature_tally), file)
                break
    dropped = {"bad": tally.bad} | ({"bad_features": feature_tally.bad} if feature_tally.bad else {})
    return builder.finish(path, dropped, users=tables.get("users"), items=tables.get("items"))


def _users_100k(path: Path, skip_bad: bool, tally: Tally) -> pa.Table:
    fields = _fields(
        ("user_id", 0, ID), ("age", 1, TEXT), ("gender", 2, TEXT), ("occupation", 3, TEXT), ("zip_code", 4, TEXT)
    )
    return read_features(path, _BARS, fields, width=5, header=False, skip_bad=skip_bad, tally=tally)


def _items_100k(path: Path, skip_bad: bool, tally: Tally) -> pa.Table:
    flags = [(name, 5 + position, TEXT) for position, name in enumerate(_GENRES_100K)]
    fields = _fields(("item_id", 0, ID), ("title", 1, TEXT), ("release_date", 2, TEXT), *flags)
    table = read_features(path, _BARS, fields, width=24, header=False, skip_bad=skip_bad, tally=tally)
    marked = np.stack([np.asarray(table[name].to_pylist(), dtype=object) == "1" for name in _GENRES_100K], axis=1)
    offsets = np.concatenate([[0], np.cumsum(marked.sum(axis=1))])
    names = np.asarray(_GENRES_100K, dtype=object)[np.nonzero(marked)[1]]
    genres = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(names, pa.string()))
    return table.select(["item_id", "title", "release_date"]).append_column("genres", genres)


def _users_1m(path: Path, skip_bad: bool, tally: Tally) -> pa.Table:
    fields = _fields(
        ("user_id", 0, ID), ("gender", 1, TEXT), ("age", 2, TEXT), ("occupation", 3, TEXT), ("zip_code", 4, TEXT)
    )
    return read_features(path, _COLONS, fields, width=5, header=False, skip_bad=skip_bad, tally=tally)


def _items_1m(path: Path, skip_bad: bool, tally: Tally) -> pa.Table:
    fields = _fields(("item_id", 0, ID), ("title", 1, TEXT), ("genres", 2, GENRES))
    return read_features(path, _COLONS, fields, width=3, header=False, skip_bad=skip_bad, tally=tally)


def _items_20m(path: Path, skip_bad: bool, tally: Tally) -> pa.Table:
    names = [name.strip() for name in read_header(path, _COMMAS)]
    for name in ("movieId", "title", "genres"):
        if name not in names:
            raise located(path, 1, name, f"is missing; the file has {listed(names)}")
    fields = [
        Field("item_id", names.index("movieId"), ID, "movieId"),
        Field("title", names.index("title"), TEXT, "title"),
        Field("genres", names.index("genres"), GENRES, "genres"),
    ]
    return read_features(path, _COMMAS, fields, width=len(names), header=True, skip_bad=skip_bad, tally=tally)
