"""Tables of the user's own: CSV, Parquet or JSON lines, with a mapping from canonical names to its columns."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json
import pyarrow.parquet as pq

from apps.recsys.data.formats.log import FeatureTable, LogBuilder, RawLog
from apps.recsys.data.formats.text import (
    Block,
    Field,
    Layout,
    Tally,
    listed,
    located,
    read_blocks,
    read_columns,
    read_header,
)
from apps.recsys.data.formats.values import (
    ID,
    RATING,
    TIME,
    OddBlock,
    finite,
    finite_single,
    fits_single,
    full,
    parse_time,
    seconds,
    show,
)
from kdcore.config import UserError

CANONICAL = ("user_id", "item_id", "timestamp", "rating")
_ALIASES = {
    "user_id": ("user_id", "userid", "user", "uid", "reviewerid", "customerid", "visitorid"),
    "item_id": ("item_id", "itemid", "item", "iid", "movieid", "productid", "asin", "articleid"),
    "timestamp": ("timestamp", "time", "ts", "unixreviewtime", "datetime", "date"),
    "rating": ("rating", "ratings", "score", "stars", "overall"),
}
_KINDS = {"user_id": ID, "item_id": ID, "timestamp": TIME, "rating": RATING}
_PARQUET_ROWS = 1 << 20
_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)  # the last from a damaged column name


def match_columns(path: Path, names: Iterable[str], columns: Mapping[str, str], row: int = 1) -> dict[str, str]:
    """Return canonical name -> column of the file: as mapped, else by a well-known name (case and _ aside)."""
    names = list(names)
    plain: dict[str, str] = {}
    for name in names:
        plain.setdefault(name.strip().lower().replace("_", ""), name)
    found = {}
    for canonical in CANONICAL:
        if canonical in columns:
            if columns[canonical] not in names:
                raise located(path, row, columns[canonical], f"is missing; the file has {listed(names)}")
            found[canonical] = columns[canonical]
            continue
        alias = next((each for each in _ALIASES[canonical] if each.replace("_", "") in plain), None)
        if alias is not None:
            found[canonical] = plain[alias.replace("_", "")]
        elif canonical in ("user_id", "item_id"):
            raise located(path, row, canonical, f"is missing; the file has {listed(names)} (a column mapping may help)")
    for name in found.values():
        if names.count(name) > 1:
            raise located(path, row, name, "stands in the header twice")
    return found


def read_csv(path: Path, columns: Mapping[str, str], skip_bad: bool) -> RawLog:
    """Read a CSV with a header; the separator is a comma, else a tab, semicolon or bar if the header has one."""
    first = read_header(path, Layout("\n"))[0]
    separator = next((each for each in ",\t;|" if each in first), ",")
    layout = Layout(separator, quoting=True)
    names = read_header(path, layout)
    found = match_columns(path, names, columns)
    fields = [Field(canonical, names.index(name), _KINDS[canonical], name) for canonical, name in found.items()]
    builder, tally = LogBuilder(), Tally()
    for block in read_columns(path, layout, fields, width=len(names), header=True, skip_bad=skip_bad, tally=tally):
        builder.add(block)
    return _finish(builder, path, tally, typed_ids=False)


def _finish(builder: LogBuilder, path: Path, tally: Tally, typed_ids: bool) -> RawLog:
    users, items = _features_beside(path, "users.parquet"), _features_beside(path, "items.parquet")
    return builder.finish(path, {"bad": tally.bad}, typed_ids=typed_ids, users=users, items=items)


def _features_beside(path: Path, name: str) -> FeatureTable | None:
    file = path.with_name(name)
    if not file.is_file() or file == path:
        return None
    return FeatureTable(read_feature_parquet(file), file)


def read_feature_parquet(path: Path) -> pa.Table:
    """Return a feature table whose first column is the id: text or whole numbers, none missing."""
    try:
        table = pq.ParquetFile(path).read()
        for column in table.columns:
            column.validate(full=True)
    except _UNREADABLE as error:
        raise UserError(f"{path}: not readable as Parquet: {_first_line(error)}") from None
    if table.num_columns == 0:
        raise UserError(f"{path}: has no columns; the first one must be the id")
    name = table.column_names[0]
    kind = table.schema.field(0).type
    ids = _plain_ids(path, name, _one(table.column(0), kind))
    if ids.null_count:
        raise UserError(f"{path}: column {name}: holds empty ids")
    return table.set_column(0, name, ids)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _one(column: pa.ChunkedArray, kind: pa.DataType) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)


def _plain_ids(path: Path, name: str, column: pa.Array) -> pa.Array:
    """Return ids as string or int64; raise if they are anything else."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_integer(kind):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:
            raise UserError(f"{path}: column {name}: holds an integer beyond 64 signed bits") from None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    raise UserError(f"{path}: column {name}: has type {kind}; ids must be text or integers")


def read_parquet(path: Path, columns: Mapping[str, str], skip_bad: bool) -> RawLog:
    """Read a Parquet file by row batches; rows are counted from 1."""
    builder, tally, row = LogBuilder(), Tally(), 1
    try:
        file = pq.ParquetFile(path)
        found = match_columns(path, file.schema_arrow.names, columns)
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=list(dict.fromkeys(found.values()))):
            batch.validate(full=True)  # Parquet does not check that text is UTF-8
            builder.add(_parquet_block(path, batch, found, row, skip_bad, tally))
            row += batch.num_rows
    except _UNREADABLE as error:
        raise UserError(f"{path}: not readable as Parquet: {_first_line(error)}") from None
    return _finish(builder, path, tally, typed_ids=True)


def _parquet_block(
    path: Path, batch: pa.RecordBatch, found: Mapping[str, str], row: int, skip_bad: bool, tally: Tally
) -> dict[str, pa.Array]:
    arrays: dict[str, pa.Array] = {}
    bad: pa.Array | None = None
    for canonical, name in found.items():
        column = batch.column(batch.schema.get_field_index(name))
        if canonical in ("user_id", "item_id"):
            column = _plain_ids(path, name, column)
            wrong = pc.is_null(column)
            if pa.types.is_string(column.type):
                wrong = pc.or_(wrong, pc.fill_null(pc.equal(column, ""), True))
            problem = "is empty"
        else:
            column, problem = _parquet_numbers(path, name, column, canonical == "timestamp")
            precision = column if canonical == "timestamp" else column.cast(pa.float32())  # too large becomes inf
            wrong = pc.invert(pc.fill_null(pc.is_finite(precision), False))
        if pc.any(wrong).as_py():
            if not skip_bad:
                at = pc.index(wrong, True).as_py()
                raise located(path, row + at, name, problem.format(show(str(column[at].as_py()))))
            bad = wrong if bad is None else pc.or_(bad, wrong)
        arrays[canonical] = column
    if bad is None:
        return arrays
    tally.bad += pc.sum(bad).as_py()
    return {canonical: column.filter(pc.invert(bad)) for canonical, column in arrays.items()}


def _parquet_numbers(path: Path, name: str, column: pa.Array, is_time: bool) -> tuple[pa.Array, str]:
    """Return a column as float64, null or NaN where it is bad, and what to say of a bad value."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64(), safe=False), "{} is not a finite number"
    if is_time and (pa.types.is_timestamp(kind) or pa.types.is_date(kind)):
        known = pc.fill_null(column, pa.scalar(0, pa.int64()).cast(kind) if pa.types.is_timestamp(kind) else _DAY_ZERO)
        return pc.if_else(pc.is_valid(column), seconds(known), pa.scalar(None, pa.float64())), "is empty"
    if is_time and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        text = pc.fill_null(column.cast(pa.string()), "")
        try:
            return TIME.block(text), ""
        except (pa.ArrowException, OddBlock):
            return pa.array([_time_or_none(each) for each in text.to_pylist()], pa.float64()), (
                "is neither seconds nor an ISO 8601 time"
            )
    wanted = "seconds, times or ISO 8601 text" if is_time else "numbers"
    raise UserError(f"{path}: column {name}: has type {kind}, expected {wanted}")


_DAY_ZERO = pa.scalar(0, pa.int32()).cast(pa.date32())


def _time_or_none(text: str) -> float | None:
    try:
        return parse_time(text)
    except ValueError:
        return None


def read_json_lines(path: Path, columns: Mapping[str, str], skip_bad: bool) -> RawLog:
    """Read one JSON object a line; ids are text or integers, the same in every row."""
    builder, tally = LogBuilder(), Tally()
    found: dict[str, str] = {}
    types: dict[str, pa.DataType] = {}
    for block in read_blocks(path):
        if not block.data.strip():
            continue
        if not found:
            found, types = _first_object(path, block, columns, skip_bad)
        try:
            builder.add(_read_json_fast(block.data, found, types))
        except (pa.ArrowException, OddBlock):
            builder.add(_read_json_slowly(path, block, found, types, skip_bad, tally))
    return _finish(builder, path, tally, typed_ids=True)


def _first_object(
    path: Path, block: Block, columns: Mapping[str, str], skip_bad: bool
) -> tuple[dict[str, str], dict[str, pa.DataType]]:
    """Return the columns and the type of each, taken from the first row (with ``skip_bad``: the first sound one)."""
    failure: UserError | None = None
    for offset, line in enumerate(block.data.split(b"\n")):
        if not line.strip():
            continue
        try:
            return _columns_of(path, block.first_line + offset, line, columns)
        except UserError as error:
            if not skip_bad:
                raise
            failure = failure or error
    raise failure or UserError(f"{path}: holds no interactions")


def _columns_of(
    path: Path, row: int, line: bytes, columns: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, pa.DataType]]:
    record = _parse_object(path, row, line)
    found = match_columns(path, list(record), columns, row)
    types = {canonical: pa.float64() for canonical in found}
    for canonical in ("user_id", "item_id"):
        value = record[found[canonical]]
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise located(path, row, found[canonical], "ids must be text or integers")
        types[canonical] = pa.int64() if isinstance(value, int) else pa.string()
    if "timestamp" in found and isinstance(record[found["timestamp"]], str):
        types["timestamp"] = pa.string()
    return found, types


def _parse_object(path: Path, row: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise located(path, row, None, "is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise located(path, row, None, f"is not JSON: {_first_line(error)}") from None
    if not isinstance(record, dict):
        raise located(path, row, None, "is not a JSON object; the file must hold one object a line")
    return record


def _read_json_fast(data: bytes, found: Mapping[str, str], types: Mapping[str, pa.DataType]) -> dict[str, pa.Array]:
    if len(set(found.values())) < len(found) or not data.startswith(b"{"):
        raise OddBlock  # Arrow's parser dies on a block that starts with null (apache/arrow issue 47409)
    schema = pa.schema([(name, types[canonical]) for canonical, name in found.items()])
    table = pa_json.read_json(
        pa.BufferReader(data),
        pa_json.ReadOptions(block_size=max(len(data), 1)),
        pa_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    table.validate(full=True)
    if table.num_rows != data.count(b"\n") + (not data.endswith(b"\n")):
        raise OddBlock  # blank lines, or two objects on one line
    arrays = {}
    for canonical, name in found.items():
        column = _one(table[name], types[canonical])
        if canonical in ("user_id", "item_id"):
            if column.null_count:
                raise OddBlock
            arrays[canonical] = full(column) if types[canonical] == pa.string() else column
        elif types[canonical] == pa.string():
            arrays[canonical] = TIME.block(full(column))
        else:
            arrays[canonical] = finite(column) if canonical == "timestamp" else finite_single(column)
    return arrays


def _read_json_slowly(
    path: Path,
    block: Block,
    found: Mapping[str, str],
    types: Mapping[str, pa.DataType],
    skip_bad: bool,
    tally: Tally,
) -> dict[str, pa.Array]:
    values: dict[str, list[Any]] = {canonical: [] for canonical in found}
    for offset, line in enumerate(block.data.split(b"\n")):
        if not line.strip():
            continue
        row = block.first_line + offset
        try:
            record = _parse_object(path, row, line)
            parsed = {
                canonical: _json_value(path, row, name, record.get(name), canonical, types[canonical])
                for canonical, name in found.items()
            }
        except UserError:
            if not skip_bad:
                raise
            tally.bad += 1
            continue
        for canonical, value in parsed.items():
            values[canonical].append(value)
    arrays = {}
    for canonical, column in values.items():
        kind = types[canonical] if canonical in ("user_id", "item_id") else pa.float64()
        arrays[canonical] = pa.array(column, kind)
    return arrays


def _json_value(path: Path, row: int, name: str, value: Any, canonical: str, kind: pa.DataType) -> Any:
    try:
        return _checked_json(value, canonical, kind)
    except (ValueError, OverflowError) as error:
        raise located(path, row, name, str(error)) from None


def _checked_json(value: Any, canonical: str, kind: pa.DataType) -> str | int | float:
    if value is None or value == "":
        raise ValueError("is missing or empty")
    if canonical in ("user_id", "item_id"):
        if kind == pa.int64() and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{show(str(value))} is not an integer, as in the first row")
        if kind == pa.string() and not isinstance(value, str):
            raise ValueError(f"{show(str(value))} is not text, as in the first row")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("is an integer beyond 64 signed bits")
        if isinstance(value, str):
            _check_unicode(value)
        return value
    if canonical == "timestamp" and isinstance(value, str):
        return parse_time(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{show(str(value))} is not a number")
    number = float(value)  # OverflowError beyond the range of a double
    if not (fits_single(number) if canonical == "rating" else math.isfinite(number)):
        raise ValueError(f"{number} is not a finite number")
    return number


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode") from None
