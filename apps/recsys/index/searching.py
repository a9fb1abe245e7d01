"""Asking an index: candidates by faiss, scores by exact float32 products with the caller's vectors."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

KINDS = ("auto", "exact", "int8", "hnsw", "ivfpq")

# Queries in a batch from which a scan is a matrix product, process wide. faiss 1.15.1 has 128,000, which is never.
BLAS_FROM = 4
faiss.cvar.distance_compute_blas_threshold = BLAS_FROM

# a scalar quantiser without this multiple of dimensions leaves its vector kernels: 2.5 times slower
_LANES = 16
# candidates by kind: factor x k + spare, since codes of 8 bits swap near neighbours, and shorter ones swap more
_FETCH = {"exact": (1, 2), "int8": (8, 50), "hnsw": (2, 4), "ivfpq": (10, 50)}
# candidates that the buffers of a thread have room for
_BUFFER = 512
_local = threading.local()


class Index:
    """Finds the items of the largest inner product with a query; may be asked from several threads.

    ``about`` is what the JSON beside the index file holds; ``query_seconds`` the measured median of one query alone;
    ``batches_well`` whether a batch was measured to cost much less than its queries one by one.
    """

    def __init__(self, kind: str, vectors: np.ndarray, inner: Any, about: dict[str, Any]) -> None:
        """Take the kind, the vectors float32 [n, d], the faiss index (None: scan the vectors), and what is known."""
        self.kind = kind
        self.about = about
        self.n_items, self.dimension = vectors.shape
        self._vectors = vectors
        self._pointer = faiss.swig_ptr(vectors)
        self._inner = inner
        self._padding = inner.d - self.dimension if inner is not None else 0
        self._factor, self._spare = _FETCH[kind]
        self._parameters: dict[int, Any] = {}
        # the graph lies below the map from its own order of the items
        self._graph: Any = faiss.downcast_index(inner.index).hnsw if kind == "hnsw" else None  # type: ignore[attr-defined]
        tuned = about.get("ef_search") or about.get("nprobe") or about.get("candidates")
        if inner is not None and tuned:
            self.set_effort(tuned)

    @property
    def query_seconds(self) -> float:
        """Return the measured median time of one query alone: processor seconds of one thread."""
        return float(self.about["query_ms"]) / 1e3

    @property
    def batches_well(self) -> bool:
        """Return whether many queries at once were measured to cost much less than one by one."""
        return bool(self.about["batches_well"])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the best items of every query [B, d]: scores float32 [B, k] and items int64 [B, k], best first.

        Equal scores are in index order among those returned. A row ends in item -1, score -inf where the index has
        fewer than ``k`` items or found fewer.

        Raises ValueError if k < 1, the shape is another, or a query has a NaN or an infinity.
        """
        queries = checked(queries, self.dimension, k)
        if len(queries) > 1 or faiss.omp_get_max_threads() == 1:
            return self._search(queries, k)
        return on_one_thread(self._search, queries, k)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        fetch = min(self._factor * k + self._spare, self.n_items)
        items = np.empty((len(queries), fetch), dtype=np.int64)
        rough = np.empty((len(queries), fetch), dtype=np.float32)
        self._find(queries, fetch, rough, items)
        return self._rank(queries, k, rough, items)

    def search_one(self, query: np.ndarray, k: int, exclude: np.ndarray | None) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the k best items that are not excluded for one query float32 [d]: scores [k], items [k].

        What ``search`` finds for a query alone, in two thirds of the time: with buffers that a thread keeps, and exact
        products of no more candidates than can matter. None where it does not find k, the list is long, or the query
        is not one that ``search`` takes as it is.
        """
        if query.dtype != np.float32 or query.shape != (self.dimension,) or not query.flags.c_contiguous or k < 1:
            return None
        if not math.isfinite(query.dot(query)):
            return None
        wanted = k if exclude is None else k + min(len(exclude), max(k, 16))
        kept = k + k // 2 + self._spare if self.kind == "hnsw" else self._factor * k + self._spare
        fetch = min(kept - k + wanted if self.kind == "hnsw" else self._factor * wanted + self._spare, self.n_items)
        if fetch > _BUFFER or (exclude is not None and len(exclude) > _BUFFER) or faiss.omp_get_max_threads() != 1:
            return None
        try:
            rough, items, rough_pointer, items_pointer = _local.buffers
        except AttributeError:
            rough, items = np.empty(_BUFFER, np.float32), np.empty(_BUFFER, np.int64)
            rough_pointer, items_pointer = faiss.swig_ptr(rough), faiss.swig_ptr(items)
            _local.buffers = rough, items, rough_pointer, items_pointer
        pointer = faiss.swig_ptr(query)
        self._ask(1, query, pointer, fetch, rough_pointer, items_pointer)
        found = items[:fetch].tolist()
        if exclude is not None and len(exclude):
            out = set(exclude.tolist())
            found = [item for item in found if item not in out]
        del found[kept:]
        while found and found[-1] < 0:  # what was not found stands at the end
            found.pop()
        count = len(found)
        if count < k:
            return None
        found.sort()  # so that equal scores stay in index order
        items[:count] = found
        faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined]
            rough_pointer, pointer, self._pointer, items_pointer, self.dimension, 1, count
        )
        order = (-rough[:count]).argsort(kind="stable")[:k]
        return rough.take(order), items.take(order)

    def set_effort(self, effort: int) -> None:
        """Set efSearch of hnsw, nprobe of ivfpq, spare candidates of int8; not while others search."""
        if self.kind == "hnsw":
            self._graph.efSearch = effort
        elif self.kind == "ivfpq":
            self._inner.nprobe = effort
        elif self.kind == "int8":
            self._spare = effort

    def products(self, query: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Return the scores float32 [m] of items int64 [m] for one query float32 [d]."""
        scores = np.empty(len(items), dtype=np.float32)
        on_one_thread(self._multiply, query, 1, len(items), scores, items)
        return scores

    def _find(self, queries: np.ndarray, fetch: int, rough: np.ndarray, items: np.ndarray) -> None:
        """Fill in candidates and their scores, [B, fetch]; -1 and -inf where there are fewer."""
        self._ask(len(queries), queries, faiss.swig_ptr(queries), fetch, faiss.swig_ptr(rough), faiss.swig_ptr(items))

    def _ask(self, count: int, queries: np.ndarray, pointer: Any, fetch: int, rough: Any, items: Any) -> None:
        """Let faiss fill in candidates; ``rough`` and ``items`` point to room for ``count`` x ``fetch`` of them."""
        if self._inner is None:
            faiss.knn_inner_product(pointer, self._pointer, self.dimension, count, self.n_items, fetch, rough, items)
            return
        if self._padding:
            wide = np.zeros((count, self.dimension + self._padding), dtype=np.float32)
            wide[:, : self.dimension] = queries
            pointer = faiss.swig_ptr(wide)
        # the methods of faiss's own Python wrapper do this and check again what is known here
        self._inner.search_c(count, pointer, fetch, rough, items, self._effort(fetch))

    def _effort(self, fetch: int) -> Any:
        """Return faiss search parameters where the tuned ones would not do for a list this long, else None."""
        if self.kind != "hnsw":
            return None
        wanted = fetch + fetch // 4
        if wanted <= self._graph.efSearch:
            return None
        parameters = self._parameters.get(wanted)
        if parameters is None:
            parameters = self._parameters[wanted] = faiss.SearchParametersHNSW(efSearch=wanted)  # type: ignore[attr-defined]
        return parameters

    def _multiply(self, queries: np.ndarray, rows: int, width: int, scores: np.ndarray, items: np.ndarray) -> None:
        """Fill in the products of every query with the items of its row; -inf for item -1."""
        faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined]
            faiss.swig_ptr(scores), faiss.swig_ptr(queries), self._pointer, faiss.swig_ptr(items), self.dimension,
            rows, width,
        )  # fmt: skip

    def _rank(
        self, queries: np.ndarray, k: int, scores: np.ndarray, items: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k best of the candidates [B, fetch] by exact score; ``scores`` and ``items`` are written over."""
        rows, width = items.shape
        items.sort(axis=1)  # so that a stable sort by score leaves equal ones in index order
        self._multiply(queries, rows, width, scores, items)
        np.negative(scores, out=scores)
        if rows == 1:  # half the time of what does for several rows
            order = scores[0].argsort(kind="stable")[:k]
            scores, items = scores[0][order][None], items[0][order][None]
        else:
            order = scores.argsort(axis=1, kind="stable")[:, :k]
            scores = np.take_along_axis(scores, order, axis=1)
            items = np.take_along_axis(items, order, axis=1)
        np.negative(scores, out=scores)
        if width < k:
            scores = np.pad(scores, ((0, 0), (0, k - width)), constant_values=-np.inf)
            items = np.pad(items, ((0, 0), (0, k - width)), constant_values=-1)
        return scores, items


def on_one_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``work`` returns with OpenMP on one thread, as far as this thread starts it.

    For steps too small to share: faiss wakes all threads also for one query, and waits for them. On a machine with
    something else to do, two threads made one query of 0.1 ms one of 26 ms.
    """
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        return work(*arguments)
    finally:
        faiss.omp_set_num_threads(threads)


def padded(dimension: int) -> int:
    """Return the dimension that quantised vectors get: the next multiple of 16, filled up with zeros."""
    return -(-dimension // _LANES) * _LANES


def checked(queries: np.ndarray, dimension: int, k: int) -> np.ndarray:
    """Return the queries as contiguous float32 [B, d].

    Raises ValueError if k < 1, the shape is another, or a query has a NaN or an infinity.
    """
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if k < 1:
        raise ValueError(f"k: got {k}, wanted at least 1")
    if queries.ndim != 2 or queries.shape[1] != dimension:
        raise ValueError(f"queries: got shape {queries.shape}, wanted (B, {dimension})")
    if not np.isfinite(queries).all():
        raise ValueError("queries: got a NaN or an infinity, wanted finite numbers")
    return queries
