"""Large files that are read in place: tensors and ids as memory maps, which all workers of a machine share."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdcore.config import UserError
from kdcore.run import write_json

_DTYPES = {"F32": np.float32, "I32": np.int32, "I64": np.int64, "U64": np.uint64, "U8": np.uint8}
# no file of ours has a larger header; one that claims to is not ours
_MAX_HEADER = 1 << 20


def map_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file as read-only memory maps.

    Raises:
        UserError: the file is missing, truncated, or not of this form; the message names it.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError("the header is cut off or not there")
            header = json.loads(handle.read(length))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from None
    nothing = size == 8 + length  # which cannot be mapped
    data = np.empty(0, np.uint8) if nothing else np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    data = data.view(np.ndarray)  # slicing a memmap goes through Python, which costs microseconds a request
    try:
        return {name: _tensor(data, about) for name, about in header.items() if name != "__metadata__"}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a safetensors file: {error}") from None


def _tensor(data: np.ndarray, about: dict[str, Any]) -> np.ndarray:
    begin, end = about["data_offsets"]
    dtype, shape = np.dtype(_DTYPES[about["dtype"]]), tuple(about["shape"])
    if not 0 <= begin <= end <= len(data) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor lies outside the file: it is truncated")
    return data[begin:end].view(dtype).reshape(shape)


def _view(array: Any) -> memoryview:
    return memoryview(array)


def digest(text: str) -> int:
    """Return 64 bits of a hash of an id."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class Texts:
    """Many byte strings in one array: text i is ``data[offsets[i]:offsets[i + 1]]``; offsets uint64 [n + 1]."""

    def __init__(self, offsets: np.ndarray, data: np.ndarray) -> None:
        self._offsets, self._data = _view(offsets), _view(data)  # plain integers and bytes, no NumPy scalars

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return bytes(self._data[self._offsets[index] : self._offsets[index + 1]])

    def interleaved(self, rows: Sequence[int], values: Sequence[bytes], end: bytes) -> bytes:
        """Return text, value and ``end`` of every row, joined."""
        offsets, data = self._offsets, self._data
        parts: list[bytes | memoryview] = []
        for row, value in zip(rows, values, strict=True):
            parts += data[offsets[row] : offsets[row + 1]], value, end
        return b"".join(parts)

    @staticmethod
    def pack(texts: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Return offsets and data of some texts."""
        parts = list(texts)
        offsets = np.zeros(len(parts) + 1, np.uint64)
        np.cumsum([len(part) for part in parts], out=offsets[1:])
        return offsets, np.frombuffer(b"".join(parts), np.uint8)


class IdMap:
    """From an id to its index, without a dictionary: hashes in ascending order, memory-mapped.

    Ids are compared as text, so the user 196 of a log with integer ids is also "196".
    """

    def __init__(self, hashes: np.ndarray, rows: np.ndarray, ids: Texts) -> None:
        """Take ascending hashes uint64 [n], the index of each int32 [n], and all ids as text in index order."""
        self._hashes, self._rows, self.ids = _view(hashes), _view(rows), ids
        self._near = 4 * math.isqrt(len(self._hashes)) + 8

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, identifier: str | int) -> int | None:
        """Return the index of an id, None if it is unknown."""
        text = str(identifier)
        wanted, hashes = digest(text), self._hashes
        # hashes are spread evenly, so the place is known to within a few pages: a search from the ends touches more
        guess = wanted * len(hashes) >> 64
        low, high = max(guess - self._near, 0), min(guess + self._near, len(hashes))
        if low and hashes[low - 1] >= wanted:
            low = 0
        if high < len(hashes) and hashes[high] < wanted:
            high = len(hashes)
        place = bisect.bisect_left(hashes, wanted, low, high)
        encoded = text.encode()
        while place < len(hashes) and hashes[place] == wanted:
            row: int = self._rows[place]
            if self.ids[row] == encoded:
                return row
            place += 1
        return None

    @staticmethod
    def pack(ids: Sequence[str | int]) -> dict[str, np.ndarray]:
        """Return the arrays of a map: hashes, rows, offsets and data."""
        texts = [str(each) for each in ids]
        hashes = np.fromiter((digest(text) for text in texts), np.uint64, len(texts))
        order = np.argsort(hashes, kind="stable")
        offsets, data = Texts.pack(text.encode() for text in texts)
        return {"hashes": hashes[order], "rows": order.astype(np.int32), "offsets": offsets, "data": data}

    @classmethod
    def of(cls, arrays: dict[str, np.ndarray], prefix: str) -> IdMap:
        """Return the map whose arrays are named ``prefix.hashes`` and so on."""
        texts = Texts(arrays[f"{prefix}.offsets"], arrays[f"{prefix}.data"])
        return cls(arrays[f"{prefix}.hashes"], arrays[f"{prefix}.rows"], texts)


def verify_files(
    folder: Path, files: dict[str, dict[str, object]], stamp: Path, announce: Callable[[str], None]
) -> None:
    """Check every file of an export against the size and SHA-256 that ``model.json`` records.

    A content that was checked before (same size and modification time, noted in ``stamp``) is not hashed again.

    Raises:
        UserError: a file is missing, truncated, or not the one that was exported; the message names it.
    """
    now: dict[str, list[int]] = {}
    for name, about in files.items():
        if Path(name).name != name:
            raise UserError(f"{folder / 'model.json'}: names a file outside its folder ({name!r})")
        path = folder / name
        try:
            status = path.stat()
        except OSError:
            raise UserError(f"{path}: is missing; export the model again") from None
        if status.st_size != about.get("bytes"):
            raise UserError(f"{path}: has {status.st_size} bytes, wanted {about.get('bytes')}: truncated or foreign")
        now[name] = [status.st_size, status.st_mtime_ns, status.st_ino]
    try:
        known = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    sums = {name: str(about.get("sha256")) for name, about in files.items()}
    if known == {"files": now, "sha256": sums}:
        return
    announce("checking the files of the export")
    for name, wanted in sums.items():
        with open(folder / name, "rb") as handle:
            if hashlib.file_digest(handle, "sha256").hexdigest() != wanted:
                raise UserError(f"{folder / name}: is not the file that was exported (its SHA-256 differs)")
    write_json(stamp, {"files": now, "sha256": sums})
