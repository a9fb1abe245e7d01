"""What serving derives from an export once and then maps: vectors, id look-ups, encoded items, popularity, categories.

Nothing of the export itself is mapped: a file that somebody copies over it would be cut short under a running service,
and to read what was cut off a map ends the process.

It lives in ``.serving`` inside the export (or another folder where that cannot be written), belongs to one model
version, and is made under a lock, so that workers that start together make it once.
"""

from __future__ import annotations

import bisect
import json
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from apps.recsys.runtime import read_about
from apps.recsys.serve.mapped import IdMap, Texts, map_safetensors, verify_files
from kdcore.config import UserError
from kdcore.locks import locked
from kdcore.run import atomic_path, fingerprint, read_json, write_json

# changes when an old file would be misread
_LAYOUT = 2
_MAX_CATEGORIES = 4096
Announce = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """An export and what was derived from it, the large parts memory-mapped.

    ``vectors`` float32 [n_items, d]: item vectors, with the item bias as one more coordinate (``has_bias``), or None
    for a model without vectors; ``fold_in`` is what makes a vector of a history. ``seen_indptr`` int64 [n_users + 1]
    and ``seen_items`` int32: what each user had. ``popularity`` int32 [n_items]: items, the most popular first;
    ``counts`` int32 [n_items] their interactions. ``heads`` is the JSON of each item up to its score; ``search`` what
    is looked through for a title or an id.
    """

    folder: Path
    cache: Path
    about: dict[str, Any]
    users: IdMap
    items: IdMap
    heads: Texts
    search: ItemSearch
    seen_indptr: np.ndarray
    seen_items: np.ndarray
    popularity: np.ndarray
    counts: np.ndarray
    vectors: np.ndarray | None
    user_vectors: np.ndarray | None
    fold_in: np.ndarray | None
    has_bias: bool
    categories: Categories
    segments: Segments

    @property
    def version(self) -> str:
        """Identifies weights and data."""
        return str(self.about["model_version"])

    def seen(self, user: int) -> np.ndarray:
        """Return what a user had in the data the model was exported with, oldest first."""
        return self.seen_items[self.seen_indptr[user] : self.seen_indptr[user + 1]]


class Categories:
    """Items by category: ``names`` as the data have them, items of each as an ascending array."""

    def __init__(self, names: Sequence[str], indptr: np.ndarray, items: np.ndarray) -> None:
        self.names = list(names)
        self._rows = {name: row for row, name in enumerate(self.names)}
        self._indptr, self._items = indptr, items
        self.any_of = lru_cache(maxsize=16)(self._any_of)

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def _any_of(self, names: tuple[str, ...]) -> np.ndarray:
        """Return the items that are in any of some categories, ascending int32, each once."""
        parts = [self._items[self._indptr[row] : self._indptr[row + 1]] for row in map(self._rows.__getitem__, names)]
        return parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts))


class Segments:
    """The most popular items among users of a kind: ``table[feature][value]`` is a row of items and of shares."""

    def __init__(self, names: Sequence[Sequence[str]], items: np.ndarray, shares: np.ndarray) -> None:
        """Take (feature, value) of every row, items int32 [rows, n] and the share of each in its segment [rows, n]."""
        self._items, self._shares = items, shares
        self.table: dict[str, dict[str, int]] = {}
        for row, (feature, value) in enumerate(names):
            self.table.setdefault(feature, {})[value] = row

    def rank(
        self, segment: dict[str, str], popularity: np.ndarray, counts: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return all items and a score of each: those popular in the segment first, the rest by popularity.

        The score is the item's share of the interactions in the segment, summed over its features; without a segment
        it is the item's number of interactions.
        """
        rows = [self.table[feature][value] for feature, value in segment.items()]
        if not rows:
            return popularity, counts[popularity].astype(np.float32)
        items, place = np.unique(self._items[rows].ravel(), return_inverse=True)
        shares = np.bincount(place, weights=self._shares[rows].ravel().astype(np.float64))
        known = shares > 0
        items, shares = items[known], shares[known]
        best = np.argsort(-shares, kind="stable")
        rest = np.ones(len(popularity), bool)
        rest[items] = False
        scores = np.zeros(len(popularity), np.float32)
        scores[: len(best)] = shares[best]
        return np.concatenate([items[best], popularity[rest[popularity]]]), scores


class ItemSearch:
    """Finds items by a part of their title or id, the most popular first."""

    def __init__(self, path: Path, offsets: np.ndarray) -> None:
        """Map what ``lines`` made; line r begins at byte ``offsets[r]``."""
        self._offsets = memoryview(offsets)  # type: ignore[arg-type]
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size != self._offsets[-1]:
                raise UserError(f"{path}: is damaged; remove its folder")
            self._text: mmap.mmap | bytes = mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ) if size else b""

    @staticmethod
    def lines(ids: Sequence[str | int], titles: Sequence[str | None] | None, order: np.ndarray) -> list[bytes]:
        """Return a line of title and id of each item, in the given order, as they are compared."""
        named = ((titles[item] if titles is not None else None, ids[item]) for item in order.tolist())
        return [_searched(f"{title or ''}\x1f{identifier}") + b"\n" for title, identifier in named]

    def ranks(self, query: str, limit: int) -> list[int]:
        """Return the ranks in popularity of the first items that hold a text, at most ``limit``."""
        wanted, place = _searched(query), 0
        found: list[int] = []
        while len(found) < limit and (place := self._text.find(wanted, place)) >= 0:
            rank = bisect.bisect_right(self._offsets, place) - 1
            found.append(rank)
            place = self._offsets[rank + 1]
        return found


def _searched(text: str) -> bytes:
    return text.casefold().replace("\n", " ").encode()


def open_prepared(folder: Path, cache: Path | None = None, announce: Announce = lambda text: None) -> Prepared:
    """Return an export ready for serving, deriving what is missing.

    Raises:
        UserError: no export, a file that is missing, truncated or foreign (by name), or a cache that cannot be written.
    """
    about = read_about(folder)
    version = str(about["model_version"])
    cache = cache / version if cache is not None else folder / ".serving"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / ".lock"):
            verify_files(folder, about["files"], cache / "verified.json", announce)
            if not _is_prepared(cache, _key(about)):
                announce(f"preparing {about['label']} for serving: {about['items']:,} items, {about['users']:,} users")
                _prepare(folder, about, cache)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{error.filename or cache}: cannot be written; name another folder with --cache DIR") from None
    return _opened(folder, about, cache)


def _key(about: dict[str, Any]) -> str:
    return fingerprint(str(_LAYOUT), str(about["model_version"]), about["files"])


def _is_prepared(cache: Path, key: str) -> bool:
    """Return whether what was derived is there, whole, and of this model; anything else is made again."""
    try:
        about, size = read_json(cache / "prepared.json"), (cache / "prepared.safetensors").stat().st_size
        return bool(about["key"] == key and about["bytes"] == size and (cache / "search.txt").exists())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _opened(folder: Path, about: dict[str, Any], cache: Path) -> Prepared:
    derived, names = map_safetensors(cache / "prepared.safetensors"), read_json(cache / "prepared.json")
    try:
        return Prepared(
            folder=folder,
            cache=cache,
            about=about,
            users=IdMap.of(derived, "users"),
            items=IdMap.of(derived, "items"),
            heads=Texts(derived["heads.offsets"], derived["heads.data"]),
            search=ItemSearch(cache / "search.txt", derived["search.offsets"]),
            seen_indptr=derived["seen.indptr"],
            seen_items=derived["seen.items"],
            popularity=derived["popularity"],
            counts=derived["counts"],
            vectors=derived.get("vectors"),
            user_vectors=derived.get("user_vectors"),
            fold_in=derived.get("fold_in"),
            has_bias=names["has_bias"],
            categories=Categories(names["categories"], derived["categories.indptr"], derived["categories.items"]),
            segments=_segments(folder, about),
        )
    except KeyError as error:
        raise UserError(f"{folder}: an array {error} is missing; export the model again") from None


def _segments(folder: Path, about: dict[str, Any]) -> Segments:
    if "segments.safetensors" not in about["files"]:
        return Segments([], np.empty((0, 0), np.int32), np.empty((0, 0), np.float32))
    arrays = map_safetensors(folder / "segments.safetensors")
    return Segments(about["segments"], np.array(arrays["items"]), np.array(arrays["shares"]))


def _prepare(folder: Path, about: dict[str, Any], cache: Path) -> None:
    """Write ``prepared.safetensors`` and then ``prepared.json``, whose key says that both are whole."""
    started = time.perf_counter()
    user_ids, item_ids = _ids(folder / "users.json", about["users"]), _ids(folder / "items.json", about["items"])
    titles = _ids(folder / "titles.json", about["items"]) if "titles.json" in about["files"] else None
    seen = map_safetensors(folder / "seen.safetensors")
    _check_seen(folder / "seen.safetensors", seen, len(user_ids), len(item_ids))
    arrays = {f"users.{name}": array for name, array in IdMap.pack(user_ids).items()}
    arrays |= {f"items.{name}": array for name, array in IdMap.pack(item_ids).items()}
    arrays["heads.offsets"], arrays["heads.data"] = Texts.pack(_heads(item_ids, titles))
    arrays |= {f"seen.{name}": seen[name] for name in ("indptr", "items")}
    arrays["counts"] = np.bincount(seen["items"], minlength=len(item_ids)).astype(np.int32)
    arrays["popularity"] = np.argsort(-arrays["counts"], kind="stable").astype(np.int32)
    lines = ItemSearch.lines(item_ids, titles, arrays["popularity"])
    with atomic_path(cache / "search.txt") as temporary:
        temporary.write_bytes(b"".join(lines))
    arrays["search.offsets"] = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype(np.uint64)
    names, arrays["categories.indptr"], arrays["categories.items"] = _categories(folder, about)
    has_bias = False
    if "vectors.safetensors" in about["files"]:
        stored = map_safetensors(folder / "vectors.safetensors")
        _check_vectors(folder / "vectors.safetensors", stored, about)
        arrays["vectors"], arrays["user_vectors"] = stored["item_vectors"], stored["user_vectors"]
        if "fold_in" in stored:
            arrays["fold_in"] = stored["fold_in"]
        if has_bias := "item_bias" in stored:
            arrays["vectors"] = np.column_stack([stored["item_vectors"], stored["item_bias"]]).astype(np.float32)
    with atomic_path(cache / "prepared.safetensors") as temporary:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
    size, seconds = (cache / "prepared.safetensors").stat().st_size, round(time.perf_counter() - started, 3)
    about_files = {"key": _key(about), "bytes": size, "seconds": seconds}
    write_json(cache / "prepared.json", {**about_files, "has_bias": has_bias, "categories": names})


def _check_seen(path: Path, seen: dict[str, np.ndarray], n_users: int, n_items: int) -> None:
    """Refuse histories that point anywhere but into the catalogue."""
    indptr, items = seen.get("indptr"), seen.get("items")
    if indptr is None or items is None or len(indptr) != n_users + 1:
        raise UserError(f"{path}: wanted the histories of {n_users} users; export the model again")
    if indptr[0] != 0 or indptr[-1] != len(items) or np.any(np.diff(indptr) < 0):
        raise UserError(f"{path}: the histories overlap or end outside the file")
    if len(items) and not 0 <= items.min() <= items.max() < n_items:
        raise UserError(f"{path}: holds items outside 0..{n_items - 1}")


def _check_vectors(path: Path, stored: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    width = about["dimension"]
    wanted: dict[str, tuple[int, ...]] = {
        "user_vectors": (about["users"], width),
        "item_vectors": (about["items"], width),
    }
    if "item_bias" in stored:
        wanted["item_bias"] = (about["items"],)
    for name, shape in wanted.items():
        if name not in stored or stored[name].shape != shape:
            raise UserError(f"{path}: {name}: wanted shape {shape}; export the model again")
        if not np.isfinite(stored[name]).all():
            raise UserError(f"{path}: {name} holds NaN or infinity")


def _ids(path: Path, wanted: int) -> list[Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not the JSON that an export has: {error}") from None
    if not isinstance(values, list) or len(values) != wanted:
        raise UserError(f"{path}: wanted a list of {wanted}; export the model again")
    return values


def _heads(ids: Sequence[str | int], titles: Sequence[str | None] | None) -> Iterator[bytes]:
    """Yield the JSON of each item as far as it does not depend on who asks: up to the score's value."""
    for index, identifier in enumerate(ids):
        head = {"item_id": identifier}
        if titles is not None and titles[index]:
            head["title"] = titles[index]  # type: ignore[assignment]
        yield json.dumps(head, ensure_ascii=False, separators=(",", ":"))[:-1].encode() + b',"score":'


def _categories(folder: Path, about: dict[str, Any]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the names, and the items of each compressed: every token of the text and list columns of the items."""
    if "items.parquet" not in about["files"]:
        return [], np.zeros(1, np.int64), np.empty(0, np.int32)
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    names: list[str] = []
    items: list[np.ndarray] = []
    parquet = pq.ParquetFile(folder / "items.parquet")
    for field in parquet.schema_arrow:
        if field.name in ("item_id", "title") or not _is_text(field.type):
            continue
        column = parquet.read(columns=[field.name])[field.name].combine_chunks()
        nested = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        row = pc.list_parent_indices(column) if nested else pa.array(np.arange(len(column)))
        values = (pc.list_flatten(column) if nested else column).dictionary_encode()
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        tokens = values.dictionary.to_pylist()
        if len(tokens) > _MAX_CATEGORIES or all(not token or token.isdecimal() for token in tokens):
            continue  # a name or a year, not a category
        code, kept = values.indices.fill_null(-1).to_numpy(), row.to_numpy()
        for index, name in enumerate(tokens):
            if name:
                names.append(name)
                items.append(np.unique(kept[code == index]).astype(np.int32))
    return _merged(names, items)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _merged(names: list[str], items: list[np.ndarray]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return every name once, sorted; two columns may share one."""
    joined: dict[str, np.ndarray] = {}
    for name, array in zip(names, items, strict=True):
        joined[name] = np.union1d(joined[name], array) if name in joined else array
    ordered = sorted(joined)
    indptr = np.concatenate([[0], np.cumsum([len(joined[name]) for name in ordered])]).astype(np.int64)
    flat = np.concatenate([joined[name] for name in ordered]) if ordered else np.empty(0)
    return ordered, indptr, flat.astype(np.int32)
