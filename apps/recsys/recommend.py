"""Top-k lists from a finished run, as Parquet (user_id, item_id, rank, score)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.progress import track
from safetensors import SafetensorError

from apps.recsys.data.dataset import Dataset, load_dataset
from apps.recsys.data.formats.text import listed, located
from apps.recsys.data.histories import Histories
from apps.recsys.models.base import Recommender
from apps.recsys.models.store import load_model
from apps.recsys.topk import top_k
from kdcore.config import UserError
from kdcore.progress import stderr_console
from kdcore.run import atomic_path

_BLOCK_USERS = 8192
_ROLES = ("student", "teacher", "student_alone")


def all_histories(dataset: Dataset) -> Histories:
    """Return everything each user interacted with, oldest first."""
    return Histories.from_pairs(dataset.user, dataset.item, dataset.n_users, dataset.n_items, dataset.timestamp)


def open_run(run: Path, role: str) -> tuple[Dataset, Recommender]:
    """Return data and model of a finished run; UserError if it is not finished or damaged."""
    if not (run / "data" / "dataset.json").exists():
        raise UserError(f"{run}: no run here (data/dataset.json is missing)")
    if not (run / role / "model.json").exists():
        finished = [each for each in _ROLES if (run / each / "model.json").exists()]
        there = f"there is {', '.join(finished)}" if finished else f"finish it with kd recsys run --out {run}"
        raise UserError(f"{run}: has no {role} yet; {there}")
    dataset = load_dataset(run / "data")
    try:
        model = load_model(run / role)
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{run / role}: the model cannot be read: {error}") from None
    if (model.n_users, model.n_items) != (dataset.n_users, dataset.n_items):
        raise UserError(
            f"{run / role}: is a model of {model.n_users} users and {model.n_items} items, "
            f"the run's data have {dataset.n_users} and {dataset.n_items}"
        )
    return dataset, model


def recommend(run: Path, role: str, users: str, k: int, exclude_seen: bool, out: Path) -> dict[str, Any]:
    """Write the ``k`` best items of some or all users; return what was written.

    Every model is given all interactions of the data, those of validation and test as well: this is deployment, not
    measurement. A user with fewer than k candidates gets as many as there are. Users come in the order of the file,
    or of the data for ``all``; memory does not grow with their number.

    Raises:
        UserError: an unfinished run, an unknown user (with file and row), k out of range, ``out`` is a folder.
    """
    if out.is_dir():
        raise UserError(f"--out: {out} is a folder, wanted a file such as {out / 'recs.parquet'}")
    dataset, model = open_run(run, role)
    if not 1 <= k <= dataset.n_items:
        raise UserError(f"--k: got {k}, wanted 1 to {dataset.n_items}, the number of items")
    chosen = ChosenUsers(np.arange(dataset.n_users), 0) if users == "all" else read_users(Path(users), dataset)
    rows = 0
    with atomic_path(out) as temporary, pq.ParquetWriter(temporary, _schema(dataset), compression="zstd") as writer:
        for table in _tables(dataset, model, chosen.rows, k, exclude_seen):
            writer.write_table(table)
            rows += table.num_rows
    return {
        "rows": rows,
        "users": len(chosen.rows),
        "repeated_users": chosen.repeated,
        "model": model.label(),
        "out": str(out),
    }


def _schema(dataset: Dataset) -> pa.Schema:
    return pa.schema(
        [
            ("user_id", dataset.user_ids.type),
            ("item_id", dataset.item_ids.type),
            ("rank", pa.int32()),
            ("score", pa.float32()),
        ]
    )


def _tables(dataset: Dataset, model: Recommender, users: np.ndarray, k: int, exclude_seen: bool) -> Iterator[pa.Table]:
    """Yield the rows of a block of users at a time, best item first within a user, with a bar on a terminal."""
    histories = all_histories(dataset)
    console = stderr_console()
    starts = range(0, len(users), _BLOCK_USERS)
    quiet = not console.is_terminal or len(starts) < 2
    for start in track(starts, "recommending", console=console, transient=True, disable=quiet):
        block = users[start : start + _BLOCK_USERS]
        items, scores = top_k(model, block, k, histories, histories if exclude_seen else None)
        valid = items >= 0
        rank = np.broadcast_to(np.arange(1, k + 1, dtype=np.int32), items.shape)
        row = np.broadcast_to(block[:, None], items.shape)
        yield pa.table(
            [
                dataset.user_ids.take(pa.array(row[valid])),
                dataset.item_ids.take(pa.array(items[valid])),
                pa.array(rank[valid]),
                pa.array(scores[valid]),
            ],
            schema=_schema(dataset),
        )


@dataclass(frozen=True)
class ChosenUsers:
    """Indices of users, int64 [n], each once, and how many repetitions were left out."""

    rows: np.ndarray
    repeated: int


def read_users(path: Path, dataset: Dataset) -> ChosenUsers:
    """Return the users in a file, in its order, each once.

    The file is text with one user id a line, CSV or TSV with a column ``user_id``, or Parquet with one. Ids are
    compared as text, so 196 in a text file is the user 196 of a log with integer ids.

    Raises:
        UserError: no such file, no column ``user_id``, no users, or an unknown one; the message has file and row.
    """
    if not path.is_file():
        raise UserError(f"--users: no file {path}; wanted `all` or a file with one user id a line")
    if path.suffix == ".parquet":
        ids, lines = _ids_of_parquet(path), None
    else:
        ids, lines = _ids_of_text(path, {".csv": ",", ".tsv": "\t"}.get(path.suffix))
    if not len(ids):
        raise UserError(f"{path}: holds no users")
    found = pc.index_in(ids, value_set=dataset.user_ids.cast(pa.string()))
    if found.null_count:
        unknown = int(pc.index(found.is_null(), True).as_py())
        row = unknown + 1 if lines is None else lines[unknown]
        more = f" (and {found.null_count - 1} more)" if found.null_count > 1 else ""
        known = ", ".join(repr(user) for user in dataset.user_ids[:3].to_pylist())
        raise located(path, row, "user_id", f"unknown user {ids[unknown].as_py()!r}{more}; the run has {known}, ...")
    indices = found.to_numpy().astype(np.int64)
    first = np.sort(np.unique(indices, return_index=True)[1])
    return ChosenUsers(indices[first], len(indices) - len(first))


def _ids_of_parquet(path: Path) -> pa.Array:
    try:
        file = pq.ParquetFile(path)
        if "user_id" not in file.schema_arrow.names:
            raise UserError(f"{path}: no column user_id (found {listed(file.schema_arrow.names)})")
        column = file.read(columns=["user_id"])["user_id"]
        column.validate(full=True)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        whole = pa.types.is_integer(column.type)
        text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        if not (whole or text):
            raise UserError(f"{path}: column user_id: has type {column.type}; ids must be text or integers")
        ids = column.cast(pa.string())
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not readable as Parquet: {' '.join(str(error).split())[:200]}") from None
    if ids.null_count:
        raise located(path, int(pc.index(ids.is_null(), True).as_py()) + 1, "user_id", "is empty")
    return ids.combine_chunks() if ids.num_chunks else pa.array([], pa.string())


def _ids_of_text(path: Path, separator: str | None) -> tuple[pa.Array, list[int]]:
    """Return the ids and the line of each; with a separator the first line is a header."""
    try:
        with open(path, encoding="utf-8-sig", newline="" if separator else "\n") as handle:
            pairs = list(_lines(handle) if separator is None else _column(path, handle, separator))
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; wanted one user id a line") from None
    return pa.array([user for user, _ in pairs], pa.string()), [line for _, line in pairs]


def _lines(handle: TextIO) -> Iterator[tuple[str, int]]:
    for number, line in enumerate(handle, start=1):
        if line.strip():
            yield line.rstrip("\r\n"), number


def _column(path: Path, handle: TextIO, separator: str) -> Iterator[tuple[str, int]]:
    reader = csv.reader(handle, delimiter=separator, strict=True)
    try:
        header = next(reader, [])
        if "user_id" not in header:
            raise UserError(f"{path}: no column user_id in its first line (found {listed(header) or 'nothing'})")
        position = header.index("user_id")
        for row in reader:
            if row and (position >= len(row) or not row[position]):
                raise located(path, reader.line_num, "user_id", "is empty")
            if row:
                yield row[position], reader.line_num
    except csv.Error as error:
        raise located(path, reader.line_num, None, str(error)) from None
