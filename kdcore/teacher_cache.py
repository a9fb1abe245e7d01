"""A teacher's outputs, computed once, kept on disk and memory-mapped: top-K lists or full scores.

An entry is keyed by what determines it (data, teacher, kind, K): another teacher or other data is another entry,
never a stale one. Two writers of one entry wait for each other; a killed writer leaves its finished blocks behind
and the next one goes on from there. Space on the disk is claimed before anything is computed, but for ragged fields,
which grow by what their rows hold. An entry that is damaged, or is not what its name says, is refused, and made again
only where that is asked for.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcore.config import UserError
from kdcore.locks import beside, locked
from kdcore.run import fingerprint, read_json, write_json

# computes the outputs of rows [start, stop): one array per field, first axis stop - start; [n] of a ragged one
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
    """A folder of cache entries; ``rebuild`` makes broken ones again instead of refusing them."""

    def __init__(self, folder: str | os.PathLike[str], *, rebuild: bool = False) -> None:
        self.folder = Path(folder)
        self.rebuild = rebuild

    def get_or_compute(
        self,
        *,
        data: str,
        teacher: str,
        kind: str,
        n_rows: int,
        fields: dict[str, tuple[str, tuple[int, ...]]],
        compute: Compute,
        ragged: Mapping[str, str] | None = None,
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
            ragged: name -> numpy dtype of fields of which each row has as many values as it needs: one array [n] of all
                rows, one after the other. A field beside it says how many are whose; nothing is filled up.
            block_rows: rows computed, written and made durable at a time.
            progress: called with (rows done, n_rows) after every block.

        Raises:
            ValueError: ``compute`` returned a field of the wrong name, shape or kind of number, NaN, or a whole number
                that the field's dtype does not hold. Infinities are kept: they mark what is no answer.
            UserError: the entry there is damaged or foreign; the text says where and why.
            OSError: the disk has no room for the entry.
        """
        if n_rows < 0 or block_rows < 1:
            raise ValueError(f"got n_rows={n_rows} and block_rows={block_rows}, wanted at least 0 and 1")
        description = {"data": data, "teacher": teacher, "kind": kind, "n_rows": n_rows}
        description |= _described(fields, ragged or {})
        key = fingerprint(description)
        final = self.folder / key
        entry = self._open(final, description)
        if entry is not None:
            return entry
        with locked(beside(final)):
            entry = self._open(final, description)
            if entry is None:
                partial = self.folder / f".{key}.partial"
                arrays = _allocate(partial, fields, ragged or {}, n_rows)
                _fill(partial, arrays, ragged or {}, n_rows, compute, block_rows, progress)
                write_json(partial / "entry.json", description)
                shutil.rmtree(final, ignore_errors=True)  # broken, or it would have been opened
                os.replace(partial, final)
                entry = CacheEntry(final, _arrays(final, description))
        return entry

    def _open(self, folder: Path, description: dict[str, Any]) -> CacheEntry | None:
        """Return the entry in ``folder``; None if there is none, or a broken one that is to be made again."""
        if not folder.exists():
            return None
        try:
            return CacheEntry(folder, _arrays(folder, description))
        except (ValueError, OSError, EOFError) as error:
            if self.rebuild:
                return None
            reason = " ".join(str(error).split())
            raise UserError(
                f"{folder}: not a teacher's outputs as asked for ({reason}); delete it to have them made again"
            ) from None


def _described(fields: dict[str, tuple[str, tuple[int, ...]]], ragged: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields as an entry's description has them; ValueError for a dtype or a name that cannot be."""
    for name, dtype in [*((name, dtype) for name, (dtype, _) in fields.items()), *ragged.items()]:
        if np.dtype(dtype).hasobject:
            raise ValueError(f"fields[{name!r}]: got dtype {dtype}, wanted a plain number type")
    if both := sorted(set(fields) & set(ragged)):
        raise ValueError(f"ragged: got {both} among the fields too, wanted other names")
    about: dict[str, Any] = {
        "fields": {name: [np.dtype(dtype).str, list(shape)] for name, (dtype, shape) in fields.items()}
    }
    # without one the description, and with it the key, is that of an entry before there were ragged fields
    return about | ({"ragged": {name: np.dtype(dtype).str for name, dtype in ragged.items()}} if ragged else {})


def _done(folder: Path, ragged: Mapping[str, str]) -> tuple[int, dict[str, int]]:
    """Return the rows that are durable, and how many values of each ragged field are theirs."""
    file = folder / "done.json"
    if not file.exists():
        return 0, dict.fromkeys(ragged, 0)
    about = read_json(file)
    if not ragged:
        return int(about), {}
    try:
        return int(about["rows"]), {name: int(about["values"][name]) for name in ragged}
    except (KeyError, TypeError):
        raise ValueError("done.json does not say how many values there are") from None


def _allocate(
    folder: Path, fields: dict[str, tuple[str, tuple[int, ...]]], ragged: Mapping[str, str], n_rows: int
) -> dict[str, np.memmap]:
    """Return writable arrays on disk, those of an earlier writer if they are whole.

    Writing into a hole of a mapped file on a full disk kills the process without a word, so there must be no holes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    try:
        for name, (dtype, shape) in fields.items():
            file = folder / f"{name}.npy"
            if not _matches(file, np.dtype(dtype), (n_rows, *shape)):
                (folder / "done.json").unlink(missing_ok=True)
                np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=(n_rows, *shape))
            with open(file, "rb+") as handle:
                os.posix_fallocate(handle.fileno(), 0, os.fstat(handle.fileno()).st_size)
            arrays[name] = np.lib.format.open_memmap(file, mode="r+")
        for name, dtype in ragged.items():
            file = folder / f"{name}.values"
            file.touch()
            if file.stat().st_size < _done(folder, ragged)[1][name] * np.dtype(dtype).itemsize:
                (folder / "done.json").unlink()
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)  # half an allocation helps nobody on a full disk
        raise OSError(error.errno, f"no room for the teacher's outputs ({error.strerror})", str(folder)) from None
    return arrays


def _fill(
    folder: Path,
    arrays: dict[str, np.memmap],
    ragged: Mapping[str, str],
    n_rows: int,
    compute: Compute,
    block_rows: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Fill the arrays in ``folder``, going on after the blocks an earlier writer made durable."""
    done, counts = _done(folder, ragged)
    for start in range(done, n_rows, block_rows):
        stop = min(start + block_rows, n_rows)
        block = compute(start, stop)
        if set(block) != {*arrays, *ragged}:
            raise ValueError(f"compute: got fields {sorted(block)}, wanted {sorted({*arrays, *ragged})}")
        for name, values in block.items():
            target = np.empty(np.size(values), ragged[name]) if name in ragged else arrays[name][start:stop]
            _check(name, values, target)
            target[...] = values
            if name in ragged:
                _append(folder / f"{name}.values", counts[name], target)
                counts[name] += len(target)
        for array in arrays.values():
            array.flush()
        write_json(folder / "done.json", {"rows": stop, "values": counts} if ragged else stop)
        if progress is not None:
            progress(stop, n_rows)


def _append(file: Path, count: int, values: np.ndarray) -> None:
    """Write values behind the first ``count`` of a file, over what a killed writer left there, and make them durable.

    They are written and not mapped: a full disk is an error then, and the blocks before stay.
    """
    try:
        with open(file, "r+b") as handle:
            handle.truncate(count * values.itemsize)
            handle.seek(0, os.SEEK_END)
            handle.write(values.tobytes())
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise OSError(error.errno, f"no room for the teacher's outputs ({error.strerror})", str(file)) from None


def _check(name: str, values: np.ndarray, target: np.ndarray) -> None:
    """Refuse values that the target would not hold as they are."""
    if values.shape != target.shape:
        raise ValueError(f"compute: {name!r} has shape {values.shape}, wanted {target.shape}")
    if not np.can_cast(values.dtype, target.dtype, "same_kind"):
        raise ValueError(f"compute: {name!r} has dtype {values.dtype}, wanted {target.dtype}")
    if np.issubdtype(values.dtype, np.floating) and (missing := int(np.isnan(values).sum())):
        raise ValueError(f"compute: {missing} of {values.size} values of {name!r} are NaN")
    if np.issubdtype(target.dtype, np.integer) and values.size:
        limits = np.iinfo(target.dtype)
        if values.min() < limits.min or values.max() > limits.max:
            raise ValueError(f"compute: {name!r} has values beyond {target.dtype}")


def _matches(file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> bool:
    """Return whether an array is whole and of the wanted kind (a kill may have torn its creation)."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError):
        return False
    return array.dtype == dtype and array.shape == shape


def _arrays(folder: Path, description: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the arrays of an entry; raise ValueError, OSError or EOFError if it is not whole or another's."""
    if read_json(folder / "entry.json") != description:
        raise ValueError("entry.json describes another entry")
    arrays = {}
    for name, (dtype, shape) in description["fields"].items():
        try:
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{name}.npy: {error}") from None
        got = arrays[name]
        if got.dtype.str != dtype or got.shape != (description["n_rows"], *shape):
            wanted = (description["n_rows"], *shape)
            raise ValueError(f"{name}.npy: wanted {dtype} {wanted}, got {got.dtype.str} {got.shape}")
    ragged = description.get("ragged", {})
    counts = _done(folder, ragged)[1] if ragged else {}
    for name, dtype in ragged.items():
        file, size = folder / f"{name}.values", counts[name] * np.dtype(dtype).itemsize
        if file.stat().st_size != size:
            raise ValueError(f"{file.name}: wanted {size} bytes, got {file.stat().st_size}")
        # nothing cannot be mapped
        arrays[name] = np.memmap(file, dtype, "r") if size else np.empty(0, dtype)
    return arrays
