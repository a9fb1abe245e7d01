"""The prepared form of a data set: interactions, users and items as Parquet and a ``dataset.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from apps.recsys.data.formats.log import FeatureTable, RawLog
from apps.recsys.data.formats.tables import read_feature_parquet
from kdcore.config import UserError
from kdcore.run import read_json


def is_canonical(path: Path) -> bool:
    """Return whether the path is a folder that ``write_canonical`` wrote."""
    return (path / "dataset.json").is_file() and (path / "interactions.parquet").is_file()


def read_canonical(folder: Path) -> tuple[RawLog, str, str]:
    """Return the log, name and fingerprint of a prepared folder, indices as they were written.

    Raises ``UserError`` if a file is missing or damaged. The caller checks the fingerprint.
    """
    about = read_json_file(folder / "dataset.json")
    sides = {}
    for side in ("user", "item"):
        file = folder / f"{side}s.parquet"
        if not file.is_file():
            raise UserError(f"{file}: is missing; prepare the data again")
        sides[side] = FeatureTable(read_feature_parquet(file), file)
    try:
        name, stored = str(about["name"]), str(about["fingerprint"])
        dropped = {str(reason): int(count) for reason, count in about["dropped"].items()}
        has_timestamp = bool(about["has_timestamp"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{folder / 'dataset.json'}: is not complete; prepare the data again") from None
    users, items = sides["user"], sides["item"]
    columns = _read_codes(folder / "interactions.parquet", _ids(users), _ids(items))
    log = RawLog(
        user=columns["user_id"],
        item=columns["item_id"],
        timestamp=columns["timestamp"] if has_timestamp else None,
        rating=columns.get("rating"),
        user_ids=_ids(users),
        item_ids=_ids(items),
        dropped=dropped,
        users=users,
        items=items,
    )
    return log, name, stored


def _ids(features: FeatureTable) -> pa.Array:
    column = features.table.column(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def read_json_file(path: Path) -> Any:
    """Return the content of a JSON file; UserError with its name if it cannot be read."""
    try:
        return read_json(path)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None


def _read_codes(path: Path, user_ids: pa.Array, item_ids: pa.Array) -> dict[str, np.ndarray]:
    """Return the columns of the stored log, ids as int32 positions in the id arrays."""
    parts: dict[str, list[np.ndarray]] = {"user_id": [], "item_id": [], "timestamp": [], "rating": []}
    try:
        file = pq.ParquetFile(path)
        names = [name for name in parts if name in file.schema_arrow.names]
        if names[:3] != ["user_id", "item_id", "timestamp"]:
            raise UserError(f"{path}: columns user_id, item_id and timestamp are expected")
        for batch in file.iter_batches(batch_size=1 << 20, columns=names):
            for name in names:
                column = batch.column(batch.schema.get_field_index(name))
                ids = {"user_id": user_ids, "item_id": item_ids}.get(name)
                if ids is None:
                    kind = np.float64 if name == "timestamp" else np.float32
                    parts[name].append(column.to_numpy(zero_copy_only=False).astype(kind))
                else:
                    parts[name].append(_positions(path, name, column, ids))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as Parquet: {error}") from None
    if not parts["user_id"]:
        raise UserError(f"{path}: holds no interactions")
    return {name: np.concatenate(blocks) for name, blocks in parts.items() if blocks}


def _positions(path: Path, name: str, column: pa.Array, ids: pa.Array) -> np.ndarray:
    coded = column.dictionary_encode()
    position = pc.index_in(coded.dictionary.cast(ids.type), value_set=ids)
    if position.null_count or coded.null_count:
        raise UserError(f"{path}: column {name}: holds an id that {name.split('_')[0]}s.parquet does not")
    return position.take(coded.indices).to_numpy(zero_copy_only=False).astype(np.int32)
