"""Top-k lists from a finished run, as Parquet (user_id, item_id, rank, score)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apps.recsys.data.dataset import Dataset, load_dataset
from apps.recsys.data.histories import Histories
from apps.recsys.models.base import Recommender
from apps.recsys.models.store import load_model
from apps.recsys.topk import top_k
from kdcore.config import UserError
from kdcore.run import atomic_path

_BLOCK_USERS = 8192


def all_histories(dataset: Dataset) -> Histories:
    """Return everything each user interacted with, oldest first."""
    return Histories.from_pairs(dataset.user, dataset.item, dataset.n_users, dataset.n_items, dataset.timestamp)


def open_run(run: Path, role: str) -> tuple[Dataset, Recommender]:
    """Return data and model of a finished run; UserError if it is not finished."""
    if not (run / "data" / "dataset.json").exists():
        raise UserError(f"{run}: no run here (data/dataset.json is missing)")
    if not (run / role / "model.json").exists():
        raise UserError(f"{run}: has no {role} yet; finish it with kd recsys run --out {run}")
    return load_dataset(run / "data"), load_model(run / role)


def recommend(run: Path, role: str, users: str, k: int, exclude_seen: bool, out: Path) -> dict[str, Any]:
    """Write the ``k`` best items of some or all users; return how many rows and users were written.

    Every model is given all interactions of the data, those of validation and test as well: this is deployment, not
    measurement. A user with fewer than k candidates gets as many as there are.
    """
    dataset, model = open_run(run, role)
    if not 1 <= k <= dataset.n_items:
        raise UserError(f"--k: got {k}, wanted 1 to {dataset.n_items}, the number of items")
    chosen = np.arange(dataset.n_users) if users == "all" else read_users(Path(users), dataset)
    rows = 0
    with atomic_path(out) as temporary, pq.ParquetWriter(temporary, _schema(dataset), compression="zstd") as writer:
        for table in _tables(dataset, model, chosen, k, exclude_seen):
            writer.write_table(table)
            rows += table.num_rows
    return {"rows": rows, "users": len(chosen), "model": model.label(), "out": str(out)}


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
    histories = all_histories(dataset)
    for start in range(0, len(users), _BLOCK_USERS):
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


def read_users(path: Path, dataset: Dataset) -> np.ndarray:
    """Return the indices of the users in a file: one id a line, or Parquet with a user_id column."""
    if not path.is_file():
        raise UserError(f"--users: no file {path}, wanted `all` or a file with one user id a line")
    if path.suffix == ".parquet":
        try:
            ids = pq.read_table(path, columns=["user_id"])["user_id"].to_pylist()
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
            raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    else:
        try:
            ids = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text, wanted one user id a line") from None
    index = {str(user): row for row, user in enumerate(dataset.user_ids.to_pylist())}
    found = np.empty(len(ids), dtype=np.int64)
    for row, user in enumerate(ids):
        if str(user) not in index:
            raise UserError(f"{path}, row {row + 1}, column user_id: unknown user {user!r}")
        found[row] = index[str(user)]
    return found
