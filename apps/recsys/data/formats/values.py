"""What a field of a text file may hold: each kind reads a whole block at once, and one field at a time.

The block reader is the fast path. It raises ``pa.ArrowException`` or ``OddBlock`` whenever a block holds anything
unusual, and then every field of that block goes through the one-field reader, which knows what is wrong and where.
Both give the same value wherever both accept a field.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class OddBlock(Exception):
    """The fast path will not vouch for a block; the slow path decides row by row."""


@dataclass(frozen=True)
class Kind:
    """A kind of field: its Arrow type, its reader of a string array and its reader of one string.

    ``one`` raises ``ValueError`` with what is wrong, to be put after the file, row and column.
    """

    type: pa.DataType
    block: Callable[[pa.Array], pa.Array]
    one: Callable[[str], Any]


def show(text: str, limit: int = 40) -> str:
    """Return the text quoted, on one line, cut to ``limit`` characters, for a message."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


def finite(column: pa.Array) -> pa.Array:
    """Return the column if it has neither NaN nor infinity nor null; raise ``OddBlock`` otherwise."""
    if column.null_count or not np.isfinite(column.to_numpy(zero_copy_only=False)).all():
        raise OddBlock
    return column


def finite_single(column: pa.Array) -> pa.Array:
    """Return the column if every value is finite as float32, which ratings are kept as; else raise ``OddBlock``."""
    finite(column.cast(pa.float32(), safe=False))
    return column


def full(column: pa.Array) -> pa.Array:
    """Return the column if no string in it is empty and none is null; raise ``OddBlock`` otherwise."""
    if column.null_count or (len(column) and pc.min(pc.binary_length(column)).as_py() == 0):
        raise OddBlock
    return column


def _id(text: str) -> str:
    if not text:
        raise ValueError("is empty")
    return text


def parse_number(text: str) -> float:
    """Return a finite number written in decimal; raise ``ValueError`` with what is wrong."""
    try:
        if "_" in text:  # Python's own digit grouping is not data
            raise ValueError
        value = float(text)
    except ValueError:
        raise ValueError(f"{show(text)} is not a number" if text else "is empty") from None
    if not math.isfinite(value):
        raise ValueError(f"{show(text)} is not a finite number")
    return value


def fits_single(value: float) -> bool:
    """Return whether a number is finite as float32."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.float32(value)))


def parse_rating(text: str) -> float:
    """Return a number that is finite as float32; raise ``ValueError`` with what is wrong."""
    value = parse_number(text)
    if not fits_single(value):
        raise ValueError(f"{show(text)} is beyond the range of a rating (float32)")
    return value


def _times(column: pa.Array) -> pa.Array:
    try:
        return finite(column.cast(pa.float64()))
    except pa.ArrowInvalid:
        pass  # not numbers: ISO 8601, which Arrow reads with or without a zone, never both in one cast
    try:
        moments = column.cast(pa.timestamp("us"))
    except pa.ArrowInvalid:
        moments = column.cast(pa.timestamp("us", "UTC"))
    return seconds(moments)


def seconds(moments: pa.Array) -> pa.Array:
    """Return Arrow timestamps of any unit, or dates, as float64 seconds since 1970 (UTC where no zone is given)."""
    if moments.null_count:
        raise OddBlock
    if pa.types.is_date(moments.type):
        moments = moments.cast(pa.timestamp("ms"))
    per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[moments.type.unit]
    return pa.array(moments.cast(pa.int64()).to_numpy() / per_second, type=pa.float64())


def parse_time(text: str) -> float:
    """Return seconds since 1970 from a number of seconds or an ISO 8601 date (UTC where no zone is given)."""
    try:
        return parse_number(text)
    except ValueError as error:
        if "finite" in str(error) or not text:
            raise
    try:
        moment = datetime.fromisoformat(text.strip())
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return ((moment - _EPOCH) // timedelta(microseconds=1)) / 10**6
    except (ValueError, OverflowError):
        raise ValueError(f"{show(text)} is neither seconds nor an ISO 8601 time") from None


def _known(column: pa.Array) -> pa.Array:
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def _maybe_numbers(column: pa.Array) -> pa.Array:
    numbers = _known(column).cast(pa.float64())
    finite(numbers.drop_null())
    return numbers


def _list_of(values: pa.Array, lists: pa.ListArray) -> pa.ListArray:
    return pa.ListArray.from_arrays(lists.offsets, values)


def _words(column: pa.Array) -> pa.ListArray:
    lists = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(column))
    empty = pc.equal(pc.list_value_length(lists), 1)
    if pc.any(pc.and_(empty, pc.equal(pc.ascii_trim_whitespace(column), ""))).as_py():
        raise OddBlock  # an empty field splits into one empty word
    return lists


_ASCII_SPACE = " \t\n\r\v\f"


def _split_words(text: str) -> list[str]:
    words = text.translate(str.maketrans(_ASCII_SPACE, " " * len(_ASCII_SPACE))).split(" ")
    return [word for word in words if word]


def _genres(column: pa.Array) -> pa.ListArray:
    if pc.any(pc.starts_with(column, "(")).as_py():
        raise OddBlock  # "(no genres listed)"
    genres = pc.split_pattern(column, "|")
    full(genres.values)
    return genres


def _split_genres(text: str) -> list[str]:
    if text == "(no genres listed)":
        return []
    return [genre for genre in text.split("|") if genre]


ID = Kind(pa.string(), full, _id)
RATING = Kind(pa.float64(), lambda column: finite_single(column.cast(pa.float64())), parse_rating)
TIME = Kind(pa.float64(), _times, parse_time)
TEXT = Kind(pa.string(), _known, lambda text: text or None)
MAYBE_NUMBER = Kind(pa.float64(), _maybe_numbers, lambda text: parse_number(text) if text else None)
WORDS = Kind(pa.list_(pa.string()), _words, _split_words)
NUMBERS = Kind(
    pa.list_(pa.float64()),
    lambda column: _list_of(finite(_words(column).values.cast(pa.float64())), _words(column)),
    lambda text: [parse_number(word) for word in _split_words(text)],
)
GENRES = Kind(pa.list_(pa.string()), _genres, _split_genres)
