"""An index on disk: a faiss file, and a JSON beside it that says whose it is and lets it be checked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import faiss

from kdcore.config import UserError
from kdcore.run import atomic_path, read_json, write_json

# changes when an old reader would misread the files, or a new build would give other ones
FORMAT = "kdsuite-index/2"
_NEEDED = {
    "bytes": int, "build_seconds": float, "recall": float, "recall_wanted": float, "sample": int, "query_ms": float,
    "batched_query_ms": float, "batches_well": bool, "parameters": dict,
}  # fmt: skip


def identity(kind: str, shape: tuple[int, ...], fingerprint: str) -> dict[str, Any]:
    """Return what an index must agree on with the vectors it is opened for."""
    return {"format": FORMAT, "kind": kind, "items": shape[0], "dimension": shape[1], "fingerprint": fingerprint}


def read_about(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return the JSON of an index if there is one that belongs to ``wanted``, else None.

    Raises UserError if it is not the JSON of an index.
    """
    path = folder / f"{wanted['kind']}.json"
    try:
        about = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; delete it to have the index built again") from None
    if not isinstance(about, dict) or not isinstance(about.get("format"), str):
        raise UserError(f"{path}: not the description of an index; delete it to have the index built again")
    if any(about.get(name) != value for name, value in wanted.items()):
        return None
    for name, kind in _NEEDED.items():
        value = about.get(name)
        if not isinstance(value, kind) and not (kind is float and type(value) is int):
            raise UserError(f"{path}: {name}: got {value!r}; delete the file to have the index built again")
    return about


def read_index(folder: Path, about: dict[str, Any]) -> Any:
    """Return the faiss index, memory-mapped; it is checked first, for faiss trusts every number in its files.

    Raises UserError if the file is missing, cut short or has changed.
    """
    path = folder / f"{about['kind']}.faiss"
    try:
        size = path.stat().st_size
        if size != about["bytes"]:
            raise UserError(
                f"{path}: got {size} bytes, wanted {about['bytes']}: it was cut short or is another index; delete it "
                f"and {about['kind']}.json to have it built again"
            )
        if sha256(path) != about.get("sha256"):
            raise UserError(
                f"{path}: has changed since it was built (SHA-256 differs); delete it and {about['kind']}.json to "
                "have it built again"
            )
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; delete {about['kind']}.json to have the index built again"
        ) from None
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def write_index(folder: Path, kind: str, inner: Any) -> dict[str, Any]:
    """Write a faiss index and return its size and SHA-256, for the JSON, which must be written after it."""
    (folder / f"{kind}.json").unlink(missing_ok=True)  # never a JSON beside a file that is not its own
    path = folder / f"{kind}.faiss"
    with atomic_path(path) as temporary:
        faiss.write_index(inner, str(temporary))
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write the JSON."""
    write_json(folder / f"{about['kind']}.json", about)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
