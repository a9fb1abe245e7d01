"""Sequences in the style of S3-Rec: a line is ``user item item ...``, oldest first.

Reference: Zhou et al., S3-Rec: Self-Supervised Learning for Sequential Recommendation with Mutual Information
Maximization (2020).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from apps.recsys.data.formats.log import FeatureTable, LogBuilder, RawLog
from apps.recsys.data.formats.text import Block, located, read_blocks
from apps.recsys.data.formats.values import OddBlock, show
from kdcore.config import UserError


def read_interactions(path: Path, skip_bad: bool) -> RawLog:
    """Read a sequence file and, where it stands beside it, ``NAME_item2attributes.json``."""
    builder, bad = LogBuilder(), 0
    for block in read_blocks(path):
        if not block.data.strip():
            continue
        try:
            builder.add(_read_fast(block.data))
        except (pa.ArrowException, OddBlock):
            columns, dropped = _read_slowly(path, block, skip_bad)
            bad += dropped
            builder.add(columns)
    stem = path.name.removesuffix(".gz").removesuffix(".txt")
    attributes = path.with_name(f"{stem}_item2attributes.json")
    items = FeatureTable(_read_attributes(attributes), attributes) if attributes.is_file() else None
    return builder.finish(path, {"bad": bad}, items=items)


def _read_fast(data: bytes) -> dict[str, pa.Array]:
    if b"\0" in data:
        raise OddBlock
    whole = pa.array([data], pa.binary()).cast(pa.string())  # the cast checks UTF-8
    lines = pc.ascii_trim_whitespace(pc.split_pattern(whole, "\n").values)
    lines = lines.filter(pc.greater(pc.binary_length(lines), 0))
    words = pc.ascii_split_whitespace(lines)
    lengths = pc.list_value_length(words).to_numpy()
    if (lengths < 2).any():
        raise OddBlock
    tokens = words.values
    first = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], out=first[1:])
    is_item = np.ones(len(tokens), dtype=bool)
    is_item[first] = False
    users = tokens.take(pa.array(np.repeat(first, lengths - 1)))
    return {"user_id": users, "item_id": tokens.filter(pa.array(is_item))}


def _read_slowly(path: Path, block: Block, skip_bad: bool) -> tuple[dict[str, pa.Array], int]:
    users: list[str] = []
    items: list[str] = []
    bad = 0
    for offset, line in enumerate(block.data.split(b"\n")):
        words = line.split()
        if not words:
            continue
        try:
            if b"\0" in line:
                raise ValueError("holds a NUL byte; is this a text file?")
            tokens = [word.decode() for word in words]
            if len(tokens) < 2:
                raise ValueError(f"user {show(tokens[0])} has no items")
        except ValueError as error:
            if not skip_bad:
                problem = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
                raise located(path, block.first_line + offset, None, problem) from None
            bad += 1
            continue
        users += [tokens[0]] * (len(tokens) - 1)
        items += tokens[1:]
    return {"user_id": pa.array(users, pa.string()), "item_id": pa.array(items, pa.string())}, bad


def _read_attributes(path: Path) -> pa.Table:
    """Return (item_id, attributes list<string>) of a JSON object from item id to a list of attribute ids."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: expected an object from item id to a list of attributes")
    for item, attributes in table.items():
        known = isinstance(attributes, list) and all(
            isinstance(each, str | int) and not isinstance(each, bool) for each in attributes
        )
        if not known:
            raise UserError(f"{path}: item {show(item)}: expected a list of attribute ids")
    names = [[str(each) for each in attributes] for attributes in table.values()]
    try:
        return pa.table(
            {"item_id": pa.array(list(table), pa.string()), "attributes": pa.array(names, pa.list_(pa.string()))}
        )
    except UnicodeEncodeError:
        raise UserError(f"{path}: holds text that is not valid Unicode") from None
