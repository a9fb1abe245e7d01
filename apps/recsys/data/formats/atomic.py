"""RecBole atomic files: tab-separated, a header of ``name:type`` with token, token_seq, float or float_seq.

Reference: Zhao et al., RecBole: Towards a Unified, Comprehensive and Efficient Framework for Recommendation
Algorithms (2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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
from apps.recsys.data.formats.values import ID, MAYBE_NUMBER, NUMBERS, RATING, TEXT, TIME, WORDS, Kind, show
from kdcore.config import UserError

_LAYOUT = Layout("\t")
_KINDS: dict[str, Kind] = {"token": TEXT, "token_seq": WORDS, "float": MAYBE_NUMBER, "float_seq": NUMBERS}
_TITLES = ("title", "movie_title", "item_title", "name", "item_name", "product_title")
_INTERACTION_KINDS = {"user_id": ID, "item_id": ID, "timestamp": TIME, "rating": RATING}


def read_atomic_header(path: Path) -> list[tuple[str, str]]:
    """Return (name, type) of every column of an atomic file."""
    columns: list[tuple[str, str]] = []
    for text in read_header(path, _LAYOUT):
        name, colon, kind = text.rpartition(":")
        if not colon or not name or kind not in _KINDS:
            raise located(path, 1, show(text), f"expected name:type, type one of {', '.join(_KINDS)}")
        if any(name == other for other, _ in columns):
            raise located(path, 1, name, "stands in the header twice")
        columns.append((name, kind))
    return columns


def read_interactions(path: Path, columns: Mapping[str, str], skip_bad: bool) -> RawLog:
    """Read ``.inter`` and, where they stand beside it, ``.user`` and ``.item``."""
    names = [name for name, _ in read_atomic_header(path)]
    fields = []
    for canonical, kind in _INTERACTION_KINDS.items():
        name = columns.get(canonical, canonical)
        if name in names:
            fields.append(Field(canonical, names.index(name), kind, name))
        elif canonical in columns or canonical in ("user_id", "item_id"):
            raise located(path, 1, name, f"is missing; the file has {listed(names)}")
    builder, tally, feature_tally = LogBuilder(), Tally(), Tally()
    for block in read_columns(path, _LAYOUT, fields, width=len(names), header=True, skip_bad=skip_bad, tally=tally):
        builder.add(block)
    ids = {canonical: columns.get(canonical, canonical) for canonical in ("user_id", "item_id")}
    users = _features_beside(path, ".user", ids["user_id"], skip_bad, feature_tally)
    items = _features_beside(path, ".item", ids["item_id"], skip_bad, feature_tally)
    dropped = {"bad": tally.bad} | ({"bad_features": feature_tally.bad} if feature_tally.bad else {})
    return builder.finish(path, dropped, users=users, items=items)


def _features_beside(inter: Path, suffix: str, id_name: str, skip_bad: bool, tally: Tally) -> FeatureTable | None:
    packed = ".gz" if inter.suffix == ".gz" else ""
    stem = inter.name.removesuffix(".gz").removesuffix(".inter")
    for path in (inter.with_name(f"{stem}{suffix}{packed}"), inter.with_name(f"{stem}{suffix}")):
        if path.is_file():
            return FeatureTable(_read_atomic_features(path, id_name, skip_bad, tally), path)
    return None


def _read_atomic_features(path: Path, id_name: str, skip_bad: bool, tally: Tally) -> pa.Table:
    columns = read_atomic_header(path)
    names = [name for name, _ in columns]
    if id_name not in names:
        raise located(path, 1, id_name, f"is missing; the file has {listed(names)}")
    title = next((name for name in _TITLES if name in names), None)
    fields = [Field(id_name, names.index(id_name), ID, id_name)]
    for position, (name, kind) in enumerate(columns):
        if name == title:
            fields.append(Field("title", position, TEXT, name))  # a title is read by people: never cut into words
        elif name != id_name:
            fields.append(Field(name, position, _KINDS[kind], name))
    return read_features(path, _LAYOUT, fields, width=len(names), header=True, skip_bad=skip_bad, tally=tally)


def read_knowledge_graph(folder: str | Path) -> tuple[pa.Table, pa.Table]:
    """Return the triples (head_id, relation_id, tail_id) of ``.kg`` and the links (item_id, entity_id) of ``.link``.

    All columns are strings. Raises ``UserError`` if either file is missing or has a bad row.
    """
    triples = _read_tokens(_only(Path(folder), ".kg"), ("head_id", "relation_id", "tail_id"))
    links = _read_tokens(_only(Path(folder), ".link"), ("item_id", "entity_id"))
    return triples, links


def _only(folder: Path, suffix: str) -> Path:
    found = sorted(folder.glob(f"*{suffix}")) if folder.is_dir() else []
    if len(found) != 1:
        raise UserError(f"{folder}: expected one *{suffix} file, found {len(found)}")
    return found[0]


def _read_tokens(path: Path, wanted: tuple[str, ...]) -> pa.Table:
    names = [name for name, _ in read_atomic_header(path)]
    for name in wanted:
        if name not in names:
            raise located(path, 1, name, f"is missing; the file has {listed(names)}")
    fields = [Field(name, names.index(name), ID, name) for name in wanted]
    return read_features(path, _LAYOUT, fields, width=len(names), header=True, skip_bad=False, tally=Tally())
