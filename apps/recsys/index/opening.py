"""Opening an index: the files if they are there, else a build; and the choice of a kind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from apps.recsys.index.building import AT, SAMPLE, Announce, build, nearest, tune
from apps.recsys.index.files import identity, read_about, read_index, write_about, write_index
from apps.recsys.index.searching import KINDS, Index
from kdcore.config import UserError
from kdcore.config import nearest as nearest_names
from kdcore.locks import locked

# numbers in all vectors up to which "auto" scans them: 31,250 items of 64, about half a millisecond
EXACT_NUMBERS = 2_000_000
# items from which "auto" does not build a graph: 20 million take hours and 4 GB of links
HNSW_ITEMS = 20_000_000
# items up to which every kind scans: nothing is faster, and no quantiser can be trained on so few
FEW_ITEMS = 1024


def choose(n_items: int, dimension: int) -> tuple[str, str]:
    """Return the kind that "auto" begins with and why."""
    if n_items * dimension <= EXACT_NUMBERS or n_items <= FEW_ITEMS:
        return "exact", "a scan of so few is cheap"
    if n_items <= HNSW_ITEMS:
        return "hnsw", "a scan of all items takes too long for one request"
    return "ivfpq", f"a graph over more than {HNSW_ITEMS:,} items takes hours and gigabytes"


def open_index(
    kind: str,
    vectors: np.ndarray,
    folder: Path,
    sample: np.ndarray,
    *,
    fingerprint: str,
    recall: float = 0.97,
    announce: Announce = lambda text: None,
) -> Index:
    """Open the index of a kind over vectors float32 [n, d], or build it, tune it on real queries and keep it.

    ``folder`` holds ``<kind>.faiss`` and ``<kind>.json``. Files of another fingerprint, shape or format are stale and
    are replaced; files that claim to belong and are damaged are refused. Of two processes, one builds and the other
    waits and opens. ``sample`` [S, d] are user vectors, of which up to 300 are used; with none, item vectors are.
    "auto" begins with :func:`choose` and takes int8 where hnsw misses ``recall``; ``announce`` gets a sentence.

    Raises:
        UserError: an unknown kind or a damaged file.
        ValueError: vectors or sample of another type, shape or with NaN, or a recall outside 0 to 1.
    """
    sample = _check(kind, vectors, sample, recall)
    if kind == "auto":
        kind, why = choose(*vectors.shape)
    elif len(vectors) <= FEW_ITEMS and kind != "exact":
        kind, why = "exact", f"{kind} was asked for, but so few items are scanned at once"
    else:
        return _tell(_open(kind, vectors, folder, sample, fingerprint, recall, announce), "as asked for", announce)
    index = _open(kind, vectors, folder, sample, fingerprint, recall, announce)
    if kind == "hnsw" and index.about["recall"] < recall:
        why = f"hnsw reached only {index.about['recall']:.3f} of the wanted recall@{AT} of {recall:g}"
        index = _open("int8", vectors, folder, sample, fingerprint, recall, announce)
    return _tell(index, why, announce)


def _check(kind: str, vectors: np.ndarray, sample: np.ndarray, recall: float) -> np.ndarray:
    if kind not in KINDS:
        raise UserError(f"--index: unknown kind {kind!r}; {nearest_names(kind, KINDS)}")
    if vectors.dtype != np.float32 or vectors.ndim != 2 or not vectors.flags.c_contiguous or 0 in vectors.shape:
        raise ValueError(f"vectors: got {vectors.dtype} {vectors.shape}, wanted contiguous float32 [n, d], not empty")
    if sample.ndim != 2 or sample.shape[1] != vectors.shape[1]:
        raise ValueError(f"sample: got shape {sample.shape}, wanted (S, {vectors.shape[1]})")
    if not 0 < recall <= 1:
        raise ValueError(f"recall: got {recall}, wanted more than 0 and at most 1")
    if len(sample) == 0:
        sample = vectors
    # evenly over the whole, since the first users are often the oldest
    rows = np.linspace(0, len(sample) - 1, min(SAMPLE, len(sample))).astype(np.int64)
    return np.ascontiguousarray(sample[rows], dtype=np.float32)


def _open(
    kind: str,
    vectors: np.ndarray,
    folder: Path,
    sample: np.ndarray,
    fingerprint: str,
    recall: float,
    announce: Announce,
) -> Index:
    wanted = identity(kind, vectors.shape, fingerprint)
    about = read_about(folder, wanted)
    # a server may have no right to write where the index lies ready
    if about is not None and about["recall_wanted"] == recall:
        return _load(vectors, folder, about)
    with locked(folder / ".lock", lambda: announce(f"{folder}: another process builds the index; waiting for it")):
        about = read_about(folder, wanted)
        if about is None:
            about = wanted | _build(kind, vectors, folder, announce)
        index = _load(vectors, folder, about)
        if about.get("recall_wanted") != recall:
            announce(f"{kind} index: tuning on {len(sample)} users")
            index.about = about | tune(index, sample, nearest(vectors, sample), recall)
            write_about(folder, index.about)
    return index


def _build(kind: str, vectors: np.ndarray, folder: Path, announce: Announce) -> dict[str, Any]:
    if kind == "exact":
        return {"parameters": {}, "bytes": 0, "build_seconds": 0.0}
    start = time.perf_counter()
    inner, parameters = build(kind, vectors, announce)
    files = write_index(folder, kind, inner)
    seconds = round(time.perf_counter() - start, 2)
    about = {"parameters": parameters, **files, "build_seconds": seconds, "threads": faiss.omp_get_max_threads()}
    return about | {"faiss": faiss.__version__}


def _load(vectors: np.ndarray, folder: Path, about: dict[str, Any]) -> Index:
    inner = None if about["kind"] == "exact" else read_index(folder, about)
    return Index(about["kind"], vectors, inner, about)


def _tell(index: Index, why: str, announce: Announce) -> Index:
    """Put a sentence on what was opened and why into ``about["summary"]``, and announce it."""
    about = index.about
    scale = f"{about['items']:,} items of dimension {about['dimension']}"
    disk = "nothing on disk" if index.kind == "exact" else f"{_size(about['bytes'])} on disk"
    shared = 4 * about["items"] * about["dimension"]
    if index.kind == "int8":  # faiss reads these codes into memory of its own, aligned
        memory = f"{_size(about['bytes'])} of memory beside {_size(shared)} shared with the vectors' file"
    else:
        memory = f"up to {_size(shared + about['bytes'])} of memory, shared with the files"
    about["summary"] = (
        f"index: {index.kind} over {scale} ({why}); {disk}, {memory}; "
        f"recall@{AT} {about['recall']:.3f} and {about['query_ms']:.3g} ms a query, measured on {about['sample']} users"
    )
    announce(about["summary"])
    return index


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
