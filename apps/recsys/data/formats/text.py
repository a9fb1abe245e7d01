"""Delimited text read block by block: vectorised where a block is clean, row by row where it is not.

A block is some megabytes of whole records. Arrow parses it with every field as text and the fields are read per
column (``values``). Only when that fails, or the block looks unusual, is that one block read again in Python, which
finds the bad row and its line number. Memory is bounded by the block, whatever the size of the file.
"""

from __future__ import annotations

import csv
import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from apps.recsys.data.formats.values import Kind, OddBlock, show
from kdcore.config import UserError

BLOCK_BYTES = 1 << 24
MAX_RECORD_BYTES = 1 << 24
_MOST_LINES = 10_000  # of one record
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 200  # interaction logs compress five- to twentyfold


@dataclass(frozen=True)
class Layout:
    """How a line is cut into fields: the separator, whether double quotes may enclose one, the encoding."""

    separator: str
    quoting: bool = False
    encoding: str = "utf-8"


@dataclass(frozen=True)
class Field:
    """A field to read: the name it gets, its position in the row, what it holds, its name in the file."""

    name: str
    position: int
    kind: Kind
    column: str


@dataclass
class Tally:
    """What a reader met on its way: rows it dropped because they are bad."""

    bad: int = 0


@dataclass(frozen=True)
class Block:
    """Whole records of a file and the 1-based number of their first line."""

    first_line: int
    data: bytes = field(repr=False)


def located(path: Path, row: int, column: str | None, problem: str) -> UserError:
    """Return the error that says where: file, 1-based row, column."""
    where = f"{path}: row {row}" + (f", column {listed([column])}" if column else "")
    return UserError(f"{where}: {problem}")


def listed(names: Sequence[str]) -> str:
    """Return the column names of a file for a message, on one line."""
    shown = ", ".join(name if name.isprintable() and len(name) < 40 else show(name) for name in names[:20])
    return shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def open_binary(path: Path) -> IO[bytes]:
    """Open a plain or gzip file (by its .gz suffix) for reading bytes."""
    try:
        return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _read(handle: IO[bytes], path: Path, size: int) -> bytes:
    try:
        return handle.read(size)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: not a whole gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_blocks(path: Path, quoting: bool = False, size: int | None = None) -> Iterator[Block]:
    """Yield the file as blocks of whole records, without a byte-order mark.

    With ``quoting`` a newline between double quotes does not end a record. A record longer than
    ``MAX_RECORD_BYTES`` raises, except that a lone quote which would swallow the rest is passed on by itself.
    """
    size = size or BLOCK_BYTES
    packed = os.path.getsize(path) if path.suffix == ".gz" else 0
    line, rest, total = 1, b"", 0
    with open_binary(path) as handle:
        while chunk := _read(handle, path, size):
            if not total:
                _refuse_utf16(path, chunk)
                chunk = chunk.removeprefix(b"\xef\xbb\xbf")
            total += len(chunk)
            if packed and total > max(_BOMB_BYTES, _BOMB_RATIO * packed):
                raise UserError(f"{path}: expands more than {_BOMB_RATIO} times; unpack it yourself if that is right")
            rest += chunk
            while cut := _end_of_block(path, line, rest, quoting):
                yield Block(line, rest[:cut])
                line += rest.count(b"\n", 0, cut)
                rest = rest[cut:]
    if rest:
        yield Block(line, rest)


def _refuse_utf16(path: Path, start: bytes) -> None:
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16 text; save it as UTF-8")


def _end_of_block(path: Path, line: int, data: bytes, quoting: bool) -> int:
    """Return where the block that starts at ``line`` ends, 0 if more must be read to know."""
    cut = _last_record_end(data, quoting)
    if cut or len(data) <= MAX_RECORD_BYTES:
        return cut
    cut = data.find(b"\n") + 1 if quoting else 0
    if cut == 0:
        raise located(path, line, None, f"is longer than {MAX_RECORD_BYTES >> 20} MiB; is this a text file?")
    return cut


def _last_record_end(data: bytes, quoting: bool) -> int:
    """Return the position after the last newline that ends a record, 0 if there is none."""
    if not quoting or b'"' not in data:
        return data.rfind(b"\n") + 1
    array = np.frombuffer(data, dtype=np.uint8)
    newlines = np.flatnonzero(array == ord("\n"))
    quotes = np.flatnonzero(array == ord('"'))
    outside = newlines[np.searchsorted(quotes, newlines) % 2 == 0]
    return int(outside[-1]) + 1 if len(outside) else 0


def read_header(path: Path, layout: Layout) -> list[str]:
    """Return the fields of the first line; raise if there is none or it is not text."""
    with open_binary(path) as handle:
        start = _read(handle, path, 1 << 20)
    _refuse_utf16(path, start)
    lines = start.removeprefix(b"\xef\xbb\xbf").split(b"\n", 1)
    line = lines[0].rstrip(b"\r")
    if not line.strip():
        raise UserError(f"{path}: row 1: is empty; a header with the column names was expected")
    try:
        text = line.decode(layout.encoding)
    except UnicodeDecodeError:
        raise UserError(f"{path}: row 1: is not {layout.encoding.upper()} text") from None
    if "\0" in text or (len(lines) == 1 and len(start) == 1 << 20):
        raise UserError(f"{path}: row 1: is not a line of text")
    return _cut(path, text, layout)


def _cut(path: Path, text: str, layout: Layout) -> list[str]:
    if not layout.quoting or '"' not in text:
        return text.split(layout.separator)
    try:
        return next(csv.reader([text], delimiter=layout.separator), [""])
    except csv.Error:
        raise UserError(f"{path}: row 1: is not a CSV header: {show(text)}") from None


def read_columns(
    path: Path, layout: Layout, fields: Sequence[Field], *, width: int, header: bool, skip_bad: bool, tally: Tally
) -> Iterator[dict[str, pa.Array]]:
    """Yield the fields of a file block by block; ``width`` is the number of fields that every row must have.

    A bad row raises ``UserError`` with file, row and column, or is left out and counted in ``tally`` if
    ``skip_bad``. Blank lines are no rows.
    """
    for block in read_blocks(path, layout.quoting):
        if header and block.first_line == 1:
            block = _without_header(block)
        if not block.data.strip():
            continue
        try:
            yield _read_fast(block.data, layout, fields, width)
        except (pa.ArrowException, OddBlock):
            columns, bad = _read_slowly(path, block, layout, fields, width, skip_bad)
            tally.bad += bad
            yield columns


def _without_header(block: Block) -> Block:
    end = block.data.find(b"\n") + 1
    return Block(2, block.data[end:] if end else b"")


def _read_fast(data: bytes, layout: Layout, fields: Sequence[Field], width: int) -> dict[str, pa.Array]:
    if b"\0" in data or data.count(b"\r") != data.count(b"\r\n"):
        raise OddBlock  # Arrow ends a line at a lone carriage return, a text editor does not
    quoted = layout.quoting and b'"' in data
    if quoted and data.count(b'"') % 2:
        raise OddBlock
    if layout.encoding != "utf-8" and not data.isascii():
        data = data.decode(layout.encoding).encode()
    separator = layout.separator
    if len(separator) > 1:
        if b"\x1f" in data:
            raise OddBlock
        data, separator = data.replace(separator.encode(), b"\x1f"), "\x1f"
    names = [str(position) for position in range(width)]
    wanted = sorted({names[each.position] for each in fields})
    table = pa_csv.read_csv(
        pa.BufferReader(data),
        pa_csv.ReadOptions(column_names=names, block_size=1 << 20),
        pa_csv.ParseOptions(
            delimiter=separator,
            quote_char='"' if layout.quoting else False,
            newlines_in_values=quoted,
            ignore_empty_lines=width > 1,
        ),
        pa_csv.ConvertOptions(
            column_types=dict.fromkeys(wanted, pa.string()), include_columns=wanted, strings_can_be_null=False
        ),
    )
    if quoted and table.num_rows != data.count(b"\n") + (not data.endswith(b"\n")):
        raise OddBlock  # a record over several lines: see _quoted_record
    columns = {name: _one_array(table[name]) for name in wanted}
    return {each.name: each.kind.block(columns[names[each.position]]) for each in fields}


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined


def _records(block: Block, layout: Layout) -> Iterator[tuple[int, list[str] | None]]:
    """Yield the line number and the fields of every record; None for a record whose quotes never close."""
    encoding = "utf-8" if layout.encoding == "utf-8" else layout.encoding
    lines = block.data.decode(encoding, "surrogateescape").split("\n")
    at = 0
    while at < len(lines):
        line = lines[at].removesuffix("\r")
        number = block.first_line + at
        at += 1
        if not line:
            continue
        if not layout.quoting or '"' not in line:
            yield number, line.split(layout.separator)
            continue
        fields, used = _quoted_record(lines, at - 1, layout.separator)
        yield number, fields
        at += used - 1


def _quoted_record(lines: list[str], start: int, separator: str) -> tuple[list[str] | None, int]:
    """Return the fields of a record that has quotes and how many lines it takes; (None, 1) if it never ends.

    A record over several lines must be quoted by the book: otherwise two stray quotes, each in a row of its own,
    would pass for one field and swallow all the rows between them.
    """
    ran_out = False

    def following() -> Iterator[str]:
        nonlocal ran_out
        for at in range(start, min(start + _MOST_LINES, len(lines))):
            yield lines[at] + "\n"
        ran_out = True

    try:
        reader = csv.reader(following(), delimiter=separator)
        fields = next(reader)
        if reader.line_num > 1 and not ran_out:
            fields = next(csv.reader(following(), delimiter=separator, strict=True))
    except (csv.Error, StopIteration):
        return None, 1
    return (None, 1) if ran_out else (fields, reader.line_num)


def _read_slowly(
    path: Path, block: Block, layout: Layout, fields: Sequence[Field], width: int, skip_bad: bool
) -> tuple[dict[str, pa.Array], int]:
    values: list[list[object]] = [[] for _ in fields]
    bad = 0
    for number, record in _records(block, layout):
        try:
            row = _read_record(path, number, record, fields, width)
        except UserError:
            if not skip_bad:
                raise
            bad += 1
            continue
        for column, value in zip(values, row, strict=True):
            column.append(value)
    return {each.name: pa.array(column, each.kind.type) for each, column in zip(fields, values, strict=True)}, bad


def _read_record(
    path: Path, number: int, record: list[str] | None, fields: Sequence[Field], width: int
) -> list[object]:
    if record is None:
        raise located(path, number, None, "has a quoted field that does not end")
    if len(record) != width:
        raise located(path, number, None, f"has {len(record)} fields, expected {width}: {show(record[0])}…")
    row = []
    for each in fields:
        text = record[each.position]
        try:
            if not text.isascii():
                text.encode()
            if "\0" in text:
                raise ValueError("holds a NUL byte; is this a text file?")
            row.append(each.kind.one(text))
        except UnicodeEncodeError:
            raise located(path, number, each.column, "is not UTF-8 text") from None
        except ValueError as error:
            raise located(path, number, each.column, str(error)) from None
    return row


def read_features(
    path: Path, layout: Layout, fields: Sequence[Field], *, width: int, header: bool, skip_bad: bool, tally: Tally
) -> pa.Table:
    """Return a small table of features whole; its first field is the id. Arguments as in ``read_columns``."""
    schema = pa.schema([(each.name, each.kind.type) for each in fields])
    blocks = [
        pa.Table.from_pydict(columns, schema=schema)
        for columns in read_columns(path, layout, fields, width=width, header=header, skip_bad=skip_bad, tally=tally)
    ]
    return pa.concat_tables(blocks).combine_chunks() if blocks else schema.empty_table()
