"""The prepared form of a data set and of its split on disk: Parquet, NumPy arrays and JSON, never pickle."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apps.recsys.data.dataset import Dataset
from apps.recsys.data.formats.canonical import read_json_file
from apps.recsys.data.histories import Histories
from apps.recsys.data.splits import PARTS, Split, make_split
from kdcore.config import UserError
from kdcore.folders import data_folder
from kdcore.run import atomic_path, write_json

_ALIASES = {"beauty": "amazon-beauty", "toys": "amazon-toys"}
_VERSION = 1


def write_canonical(dataset: Dataset, folder: str | Path) -> Path:
    """Write ``interactions.parquet``, ``users.parquet``, ``items.parquet`` and, last, ``dataset.json``.

    Each file is written atomically; ``dataset.json`` holds the fingerprint of all, so that a mixture of two
    writes is found when it is read. Returns the folder.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "dataset.json").unlink(missing_ok=True)
    columns = {
        "user_id": pa.DictionaryArray.from_arrays(pa.array(dataset.user), dataset.user_ids),
        "item_id": pa.DictionaryArray.from_arrays(pa.array(dataset.item), dataset.item_ids),
        "timestamp": pa.array(dataset.timestamp, pa.float64()),
    }
    if dataset.rating is not None:
        columns["rating"] = pa.array(dataset.rating, pa.float32())
    # a dictionary is how Parquet stores repeated ids anyway; as plain columns any reader gets text or integers
    plain = pa.schema(
        [(name, column.type.value_type if name.endswith("_id") else column.type) for name, column in columns.items()]
    )
    _write_batches(pa.table(columns), plain, target / "interactions.parquet")
    for side, ids, features in (
        ("user", dataset.user_ids, dataset.user_features),
        ("item", dataset.item_ids, dataset.item_features),
    ):
        table = pa.table({f"{side}_id": ids})
        for name in features.column_names if features is not None else ():
            table = table.append_column(name, features[name])  # type: ignore[index]
        with atomic_path(target / f"{side}s.parquet") as temporary:
            pq.write_table(table, temporary, compression="zstd")
    write_json(
        target / "dataset.json",
        {
            "version": _VERSION,
            "name": dataset.name,
            "users": dataset.n_users,
            "items": dataset.n_items,
            "interactions": len(dataset),
            "has_timestamp": dataset.has_timestamp,
            "dropped": dict(dataset.dropped),
            "fingerprint": dataset.fingerprint,
        },
    )
    return target


def _write_batches(table: pa.Table, schema: pa.Schema, path: Path, rows: int = 1 << 20) -> None:
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for start in range(0, table.num_rows, rows):
            writer.write_table(table.slice(start, rows).cast(schema))


def write_split(split: Split, folder: str | Path) -> Path:
    """Write the parts of a split as ``.npy`` arrays and, last, ``split.json``; return the folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "split.json").unlink(missing_ok=True)
    for part in PARTS:
        histories: Histories = getattr(split, part)
        for name, array in (("indptr", histories.indptr), ("items", histories.items)):
            with atomic_path(target / f"{part}.{name}.npy") as temporary, open(temporary, "wb") as handle:
                np.save(handle, array, allow_pickle=False)
    write_json(
        target / "split.json",
        {
            "version": _VERSION,
            "kind": split.kind,
            "users": split.n_users,
            "items": split.n_items,
            "interactions": {part: len(getattr(split, part)) for part in PARTS},
            "dropped": dict(split.dropped),
            "fingerprint": split.fingerprint,
        },
    )
    return target


def read_split(folder: str | Path) -> Split:
    """Read what ``write_split`` wrote; raise ``UserError`` if anything is missing, damaged or out of range."""
    source = Path(folder)
    about = read_json_file(source / "split.json")
    try:
        n_items, n_users, kind = int(about["items"]), int(about["users"]), str(about["kind"])
        dropped = {str(reason): int(count) for reason, count in about["dropped"].items()}
        stored = about["fingerprint"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{source / 'split.json'}: is not complete; prepare the split again") from None
    parts = {}
    for part in PARTS:
        indptr, items = (_load_array(source / f"{part}.{name}.npy") for name in ("indptr", "items"))
        sound = len(indptr) == n_users + 1 and indptr[0] == 0 and indptr[-1] == len(items)
        sound = sound and bool((np.diff(indptr) >= 0).all()) and bool(((items >= 0) & (items < n_items)).all())
        if not sound:
            raise UserError(f"{source}: the arrays of part {part} do not fit split.json; prepare the split again")
        parts[part] = Histories(indptr.astype(np.int64), items.astype(np.int32), n_items)
    split = make_split(kind, parts["train"], parts["valid"], parts["test"], dropped)
    if split.fingerprint != stored:
        raise UserError(f"{source}: the arrays are not the ones split.json describes; prepare the split again")
    return split


def _load_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not readable as a NumPy array: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"{path}: expected a one-dimensional array of integers")
    return array


def find_data(name_or_path: str) -> Path:
    """Return the path of a data set: an existing path, else a folder of $KD_DATA/recsys, else of ``data/``.

    $KD_DATA is ``../shared/data`` if it is not set. Raises ``UserError`` with what is there and what comes near.
    """
    path = Path(name_or_path).expanduser()
    if path.exists():
        return path
    name = _ALIASES.get(name_or_path, name_or_path)
    places = [data_folder() / "recsys", Path("data")]
    for place in places:
        if Path(name).name == name and (place / name).exists():
            return place / name
    known = sorted({each.name for place in places if place.is_dir() for each in place.iterdir() if each.is_dir()})
    near = difflib.get_close_matches(name_or_path, [*known, *_ALIASES], n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    there = f"known data sets: {', '.join(known)}" if known else f"none in {' or '.join(map(str, places))}"
    raise UserError(f"no data set or path {name_or_path!r}{hint} ({there})")
