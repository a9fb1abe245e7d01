"""Filters of an interaction log, in RecBole's order: duplicates, then ratings, then the k-core."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import pyarrow as pa

from apps.recsys.data.formats.log import RawLog
from kdcore.config import UserError

Duplicates = Literal["keep", "first", "last"]


def unique_pairs(
    user: np.ndarray, item: np.ndarray, timestamp: np.ndarray | None, which: Literal["first", "last"]
) -> np.ndarray:
    """Return a mask of the earliest or latest row of every (user, item) pair; equal times by row order."""
    pair = user.astype(np.int64) * (int(item.max(initial=0)) + 1) + item
    order = np.argsort(pair, kind="stable") if timestamp is None else np.lexsort((timestamp, pair))
    ordered = pair[order]
    edge = np.ones(len(pair), dtype=bool)
    if which == "first":
        edge[1:] = ordered[1:] != ordered[:-1]
    else:
        edge[:-1] = ordered[1:] != ordered[:-1]
    mask = np.zeros(len(pair), dtype=bool)
    mask[order[edge]] = True
    return mask


def core_mask(user: np.ndarray, item: np.ndarray, user_core: int, item_core: int) -> np.ndarray:
    """Return a mask of the largest part of the log where every user and item keeps that many interactions."""
    rows = np.arange(len(user))
    while len(rows):
        enough_users = np.bincount(user[rows])[user[rows]] >= user_core
        enough_items = np.bincount(item[rows])[item[rows]] >= item_core
        keep = enough_users & enough_items
        if keep.all():
            break
        rows = rows[keep]
    mask = np.zeros(len(user), dtype=bool)
    mask[rows] = True
    return mask


def apply_filters(
    log: RawLog, *, duplicates: Duplicates, min_rating: float | None, user_core: int, item_core: int, source: str
) -> RawLog:
    """Return the log without the rows that the filters drop, ids renumbered by first appearance, drops counted.

    Raises ``UserError`` if an option is out of range, if ratings are filtered where there are none, or if no row
    is left.
    """
    if duplicates not in ("keep", "first", "last"):
        raise UserError(f"duplicates: got {duplicates!r}, wanted keep, first or last")
    if min(user_core, item_core) < 0:
        raise UserError(f"k_core: got {min(user_core, item_core)}, wanted 0 or more")
    dropped = {"bad": 0, "duplicate": 0, "rating": 0, "k_core": 0, **log.dropped}
    rows = np.arange(len(log.user))

    def keep(mask: np.ndarray, reason: str) -> None:
        nonlocal rows
        dropped[reason] += int(len(mask) - mask.sum())
        rows = rows[mask]

    if duplicates != "keep":
        keep(unique_pairs(log.user, log.item, log.timestamp, duplicates), "duplicate")
    if min_rating is not None:
        if log.rating is None:
            raise UserError(f"{source}: min_rating is set, but the data have no ratings")
        keep(log.rating[rows] >= min_rating, "rating")
    if max(user_core, item_core) > 1:
        keep(core_mask(log.user[rows], log.item[rows], user_core, item_core), "k_core")
    if not len(rows):
        raise UserError(f"{source}: no interaction is left after the filters (dropped: {_told(dropped)})")
    if len(rows) == len(log.user):
        return replace(log, dropped=dropped)
    return replace(_take(log, rows), dropped=dropped)


def _told(dropped: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in dropped.items() if count) or "none"


def _take(log: RawLog, rows: np.ndarray) -> RawLog:
    user, user_ids = renumber(log.user[rows], log.user_ids)
    item, item_ids = renumber(log.item[rows], log.item_ids)
    return replace(
        log,
        user=user,
        item=item,
        timestamp=None if log.timestamp is None else log.timestamp[rows],
        rating=None if log.rating is None else log.rating[rows],
        user_ids=user_ids,
        item_ids=item_ids,
    )


def renumber(codes: np.ndarray, ids: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Return codes 0..n-1 in order of first appearance, int32, and the ids they index."""
    first = np.full(len(ids), len(codes), dtype=np.int64)
    backwards = codes[::-1]
    first[backwards] = np.arange(len(codes) - 1, -1, -1)  # the last write wins: the first row of each code
    order = np.argsort(first, kind="stable")[: int((first < len(codes)).sum())]
    new = np.full(len(ids), -1, dtype=np.int32)
    new[order] = np.arange(len(order), dtype=np.int32)
    return new[codes], ids.take(pa.array(order))
