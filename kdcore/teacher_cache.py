"""A teacher's outputs, computed once, kept on disk and memory-mapped: top-K lists or full scores.

An entry is keyed by what determines it (data, teacher, kind, K): another teacher or other data is another entry,
never a stale one. Two writers of one entry wait for each other; a killed writer leaves its finished blocks behind
and the next one goes on from there.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcore.run import fingerprint, read_json, write_json

# computes the outputs of rows [start, stop): one array per field, first axis stop - start
Compute = Callable[[int, int], dict[str, np.ndarray]]


@dataclass(frozen=True)
class CacheEntry:
    """Arrays of one teacher over all rows, memory-mapped read-only; ``arrays["items"]``, ``arrays["scores"]``."""

    folder: Path
    arrays: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    @property
    def nbytes(self) -> int:
        """Return the size of all arrays on disk in bytes."""
        return sum(array.nbytes for array in self.arrays.values())


class TeacherCache:
    """A folder of cache entries."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def get_or_compute(
        self,
        *,
        data: str,
        teacher: str,
        kind: str,
        n_rows: int,
        fields: dict[str, tuple[str, tuple[int, ...]]],
        compute: Compute,
        block_rows: int = 1024,
        progress: Callable[[int, int], None] | None = None,
    ) -> CacheEntry:
        """Return the entry, computing it block by block if it is not there yet.

        Args:
            data, teacher: fingerprints of what the teacher was asked and of the teacher itself.
            kind: what is stored, with its parameters, such as ``topk-500``.
            n_rows: number of rows (users, queries, utterances).
            fields: name -> (numpy dtype, shape of one row); object dtypes are refused.
            compute: returns the fields of rows [start, stop).
            block_rows: rows computed, written and made durable at a time.
            progress: called with (rows done, n_rows) after every block.

        Raises:
            ValueError: ``compute`` returned a field of the wrong name, shape or a non-finite value.
        """
        for name, (dtype, _) in fields.items():
            if np.dtype(dtype).hasobject:
                raise ValueError(f"fields[{name!r}]: got dtype {dtype}, wanted a plain number type")
        description = {
            "data": data,
            "teacher": teacher,
            "kind": kind,
            "n_rows": n_rows,
            "fields": {name: [np.dtype(dtype).str, list(shape)] for name, (dtype, shape) in fields.items()},
        }
        key = fingerprint(description)
        final = self.folder / key
        if not (final / "entry.json").exists():
            with _lock(self.folder / f".{key}.lock"):
                if not (final / "entry.json").exists():
                    partial = self.folder / f".{key}.partial"
                    _fill(partial, description, fields, n_rows, compute, block_rows, progress)
                    os.replace(partial, final)
        return _open(final)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the system frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _fill(
    folder: Path,
    description: dict[str, Any],
    fields: dict[str, tuple[str, tuple[int, ...]]],
    n_rows: int,
    compute: Compute,
    block_rows: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fill the arrays in ``folder``, going on after the blocks an earlier writer made durable."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, (dtype, shape) in fields.items():
        file = folder / f"{name}.npy"
        wanted = (n_rows, *shape)
        if file.exists() and _header_matches(file, np.dtype(dtype), wanted):
            arrays[name] = np.lib.format.open_memmap(file, mode="r+")
        else:
            (folder / "done.json").unlink(missing_ok=True)
            arrays[name] = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=wanted)
    done = int(read_json(folder / "done.json")) if (folder / "done.json").exists() else 0
    for start in range(done, n_rows, block_rows):
        stop = min(start + block_rows, n_rows)
        block = compute(start, stop)
        if set(block) != set(fields):
            raise ValueError(f"compute: got fields {sorted(block)}, wanted {sorted(fields)}")
        for name, values in block.items():
            wanted = (stop - start, *fields[name][1])
            if values.shape != wanted:
                raise ValueError(f"compute: {name!r} has shape {values.shape}, wanted {wanted}")
            if np.issubdtype(values.dtype, np.floating) and np.isnan(values).any():
                raise ValueError(f"compute: {name!r} has NaN between rows {start} and {stop}")
            arrays[name][start:stop] = values
        for array in arrays.values():
            array.flush()
        write_json(folder / "done.json", stop)
        if progress is not None:
            progress(stop, n_rows)
    write_json(folder / "entry.json", description)


def _header_matches(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> bool:
    """Return whether a partial array is whole and of the wanted kind (a kill may have torn its creation)."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return False
    return array.dtype == dtype and array.shape == shape


def _open(folder: Path) -> CacheEntry:
    description = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in description["fields"]
    }
    return CacheEntry(folder, arrays)
