"""Making an index with faiss, and tuning and timing it on real user vectors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import faiss
import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from apps.recsys.index.searching import Index, on_one_thread, padded
from kdcore.progress import stderr_console

Announce = Callable[[str], None]

AT = 10  # the recall that is tuned and reported is at this length
DEEP = 100  # and at this one it is written down: what a user had often fills the first places
SAMPLE = 300
_TIMED = 100
_BATCH = 64
_CHUNK = 10_000
# at recall@10 0.97 a search takes a quarter less time than with 32 links and efConstruction 64, in half the memory
_LINKS = 16
_CONSTRUCTION = 200
_TRAINED = 16_384  # vectors that codes are trained on
_GROUPING_ROUNDS = 6
_ROUNDS = 10  # of k-means; the last of faiss's 25 change nothing that the exact products do not make up for
_EFFORTS = {
    "int8": (50, 100, 200, 400, 800, 1600),
    "hnsw": (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
    "ivfpq": (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024),
}
_LEAST = {"int8": 0.995}  # wanted of a kind whatever less is asked for: it costs little


def build(kind: str, vectors: np.ndarray, announce: Announce) -> tuple[Any, dict[str, Any]]:
    """Return a faiss index of a kind over vectors float32 [n, d], and its parameters.

    Raises ValueError if a vector has a NaN or an infinity.
    """
    low, high = _range(vectors)
    width = vectors.shape[1]
    inner: Any
    if kind == "hnsw":
        width = padded(width)
        inner, parameters = _hnsw(_wide(np.stack([low, high]), width))
    elif kind == "int8":
        inner, parameters = _fast_scan(vectors)
    else:
        width = padded(width)
        inner, parameters = _ivfpq(vectors, width, announce)
    if kind == "hnsw":
        order = _near_together(_wide(_weighted(vectors, min(_TRAINED, 2 * len(vectors))), width), vectors)
        inner = faiss.IndexIDMap(inner)
        for start in _chunks(len(vectors), f"{kind} index", announce):
            chosen = order[start : start + _CHUNK]
            inner.add_with_ids(_wide(vectors[chosen], width), chosen)
        return inner, parameters
    for start in _chunks(len(vectors), f"{kind} index", announce):
        inner.add(_wide(vectors[start : start + _CHUNK], width))
    return inner, parameters


def _near_together(sample: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Return all items, int64 [n], such that near ones follow each other: what a walk visits then shares memory pages.

    A walk through a graph of 100,000 items takes two thirds of the time that it takes in the order of the data.
    """
    lists = max(1, min(len(vectors) // 256, 1024))
    grouping = faiss.Kmeans(sample.shape[1], lists, niter=_GROUPING_ROUNDS, spherical=True, seed=1)
    grouping.train(sample)
    group = np.empty(len(vectors), dtype=np.int64)
    for start in range(0, len(vectors), _CHUNK):
        block = vectors[start : start + _CHUNK]
        group[start : start + len(block)] = grouping.index.search(_wide(block, sample.shape[1]), 1)[1][:, 0]
    return group.argsort(kind="stable")


def _hnsw(corners: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """Return an empty graph over codes of 8 bits between two corners, float32 [2, d].

    The graph is one of inner products. On the reduction to distances by one more coordinate (Bachrach et al., 2014)
    recall@10 at efSearch 64 was 0.53 where this one had 0.98 (50,000 clustered vectors), and worse with norms that
    vary more. ``keep_max_size_level0`` fills up what pruning takes away: its rule (a neighbour closer to another one
    than to the item) means little for inner products, and items of small norm become unreachable: recall@100 0.72
    without and 0.99 with it, which an exclusion of what a user had would bring to light.
    """
    width = corners.shape[1]
    codes: Any = faiss.ScalarQuantizer.QT_8bit
    inner: Any = faiss.IndexHNSWSQ(width, codes, _LINKS, faiss.METRIC_INNER_PRODUCT)
    inner.hnsw.efConstruction = _CONSTRUCTION
    inner.keep_max_size_level0 = True
    inner.train(corners)
    return inner, {"links": _LINKS, "ef_construction": _CONSTRUCTION, "codes": "8 bit"}


def _fast_scan(vectors: np.ndarray) -> tuple[Any, dict[str, Any]]:
    """Return an empty list of codes of 4 bits a coordinate, which are looked up and summed up in bytes, 32 at once.

    That is a quarter of the time of IndexScalarQuantizer with 8 bits. A longer list for the exact products makes up
    for the coarser codes.
    """
    width = vectors.shape[1]
    inner = faiss.IndexPQFastScan(width, width, 4, faiss.METRIC_INNER_PRODUCT)
    inner.pq.cp.niter = _ROUNDS
    on_one_thread(inner.train, _weighted(vectors, min(_TRAINED, 2 * len(vectors))))
    return inner, {"codes": "4 bit"}


def _ivfpq(vectors: np.ndarray, width: int, announce: Announce) -> tuple[Any, dict[str, Any]]:
    """Return a trained, empty inverted file with product codes of a byte per two dimensions."""
    lists = max(1, min(int(4 * len(vectors) ** 0.5), len(vectors) // 39))
    rows = max(64 * lists, min(_TRAINED, 2 * len(vectors)), 256 * 39)
    announce(f"ivfpq index: training {lists} lists on {rows} vectors")
    coarse = faiss.IndexFlatIP(width)
    inner = faiss.IndexIVFPQ(coarse, width, lists, width // 2, 8, faiss.METRIC_INNER_PRODUCT)
    inner.cp.niter = inner.pq.cp.niter = _ROUNDS
    inner.train(_wide(_weighted(vectors, rows), width))
    return inner, {"lists": lists, "codes": f"{width // 2} x 8 bit"}


def _weighted(vectors: np.ndarray, rows: int) -> np.ndarray:
    """Return vectors to train codes on, float32 [rows, d], drawn by their squared norm.

    The best items of a query have large norms: drawn evenly, 4-bit codes put the 10 best among their first 100
    candidates 0.87 of the time where norms vary strongly, so drawn 1.00.
    """
    weights = np.concatenate(
        [np.square(vectors[start : start + _CHUNK]).sum(axis=1) for start in range(0, len(vectors), _CHUNK)]
    ).astype(np.float64)
    total = weights.sum()
    chosen = np.random.default_rng(0).choice(len(vectors), rows, p=weights / total if total > 0 else None)
    return np.ascontiguousarray(vectors[np.sort(chosen)])


def _range(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least and the greatest value of every coordinate, float32 [d] each."""
    low = np.full(vectors.shape[1], np.inf, dtype=np.float32)
    high = -low
    for start in range(0, len(vectors), _CHUNK):
        block = vectors[start : start + _CHUNK]
        np.minimum(low, block.min(axis=0), out=low)
        np.maximum(high, block.max(axis=0), out=high)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError("vectors: got a NaN or an infinity, wanted finite numbers")
    return low, high


def _wide(vectors: np.ndarray, width: int) -> np.ndarray:
    """Return a float32 copy [m, width], filled up with zeros."""
    wide = np.zeros((len(vectors), width), dtype=np.float32)
    wide[:, : vectors.shape[1]] = vectors
    return wide


def _chunks(n: int, what: str, announce: Announce) -> Iterator[int]:
    """Yield the starts of chunks of rows, with a bar on a terminal and counters for ``announce`` elsewhere."""
    console = stderr_console()
    starts = range(0, n, _CHUNK)
    if not console.is_terminal:
        for start in starts:
            yield start
            if n > 2 * _CHUNK:
                announce(f"{what}: {min(start + _CHUNK, n)}/{n}")
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=n)
        for start in starts:
            yield start
            progress.update(task, completed=min(start + _CHUNK, n))


def nearest(vectors: np.ndarray, sample: np.ndarray, k: int = DEEP) -> np.ndarray:
    """Return the exact best items of every query, int64 [B, min(k, n)]."""
    k = min(k, len(vectors))
    return np.asarray(faiss.knn(sample, vectors, k, metric=faiss.METRIC_INNER_PRODUCT)[1])


def tune(index: Index, sample: np.ndarray, truth: np.ndarray, wanted: float) -> dict[str, Any]:
    """Set the least effort that reaches the wanted recall; return it, the recall and times, for ``about``."""
    found: dict[str, Any] = {}
    short = truth[:, :AT]
    name = {"hnsw": "ef_search", "ivfpq": "nprobe", "int8": "candidates"}.get(index.kind)
    if name is None:
        recall = recall_of(index, sample, short)
    else:
        tried = {}
        for effort in _EFFORTS[index.kind]:
            index.set_effort(effort)
            recall = tried[str(effort)] = recall_of(index, sample, short)
            if recall >= max(wanted, _LEAST.get(index.kind, 0.0)):
                break
        found |= {name: effort, "tried": tried}
    found |= {"recall_wanted": wanted, "recall": recall, "recall_at_100": recall_of(index, sample, truth)}
    return found | {"sample": len(sample), **_times(index, sample)}


def recall_of(index: Index, sample: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean share of the exact best items [B, k] that the index finds among as many."""
    _, items = index.search(sample, truth.shape[1])
    shares = [len(np.intersect1d(got, wanted)) for got, wanted in zip(items, truth, strict=True)]
    return round(float(np.mean(shares)) / truth.shape[1], 4)


def _times(index: Index, sample: np.ndarray) -> dict[str, Any]:
    """Return milliseconds of a query alone (median) and of one in a batch, of one thread.

    They are processor time, so that they hold where the machine had something else to do.
    """
    index.search(sample[:1], AT)
    alone = []
    began = time.perf_counter()
    for query in sample[:_TIMED]:
        start = time.thread_time()
        index.search(query[None], AT)
        alone.append(time.thread_time() - start)
        if time.perf_counter() - began > 5:
            break
    batch = np.resize(sample, (_BATCH, sample.shape[1]))
    together = []
    for _ in range(2):
        start = time.thread_time()
        on_one_thread(index.search, batch, AT)
        together.append((time.thread_time() - start) / len(batch))
    query, batched = float(np.median(alone)), min(together)
    return {
        "query_ms": round(query * 1e3, 4),
        "batched_query_ms": round(batched * 1e3, 4),
        "batches_well": batched < 0.6 * query,
    }
