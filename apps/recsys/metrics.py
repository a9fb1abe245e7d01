"""Ranking metrics per user and over all lists, with the definitions of ranx (Bassani, 2022).

A ranked list enters as its hits: bool [B, k], true where the item at that position is relevant. ``n_relevant``
int64 [B] counts the distinct relevant items T of each user. Per-user metrics are float64 [B] in 0..1, and 0 for a
user without relevant items.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from apps.recsys.data.histories import Histories
from kdcore.config import UserError


def distinct(keys: np.ndarray) -> np.ndarray:
    """Return the distinct values of int64 ``keys``, ascending; many times faster than np.unique, which hashes."""
    keys = np.sort(keys)
    return keys[np.diff(keys, prepend=keys[:1] - 1) != 0]


def find_hits(ranked: np.ndarray, relevant: Histories, users: np.ndarray) -> np.ndarray:
    """Return bool [B, k]: whether ``ranked`` [B, k] holds a relevant item of ``users`` [B]; id -1 is never one."""
    row, item = relevant.rows(np.asarray(users, dtype=np.int64))
    keys = distinct(row * relevant.n_items + item)
    if len(keys) == 0:
        return np.zeros(ranked.shape, dtype=bool)
    wanted = ranked + np.arange(len(ranked), dtype=np.int64)[:, None] * relevant.n_items
    position = np.searchsorted(keys, wanted.ravel()).clip(max=len(keys) - 1)
    return (keys[position].reshape(ranked.shape) == wanted) & (ranked >= 0)


def count_relevant(relevant: Histories, users: np.ndarray) -> np.ndarray:
    """Return the number of distinct relevant items of ``users`` [B], int64 [B]."""
    row, item = relevant.rows(np.asarray(users, dtype=np.int64))
    keys = distinct(row * relevant.n_items + item)
    return np.bincount(keys // relevant.n_items, minlength=len(users))


def precision(hits: np.ndarray, n_relevant: np.ndarray, k: int) -> np.ndarray:
    """Return hits in the first k over k, also where the list is shorter than k."""
    return np.count_nonzero(hits[:, :k], axis=1) / float(k)


def recall(hits: np.ndarray, n_relevant: np.ndarray, k: int) -> np.ndarray:
    """Return hits in the first k over |T|."""
    return hits[:, :k].sum(axis=1) / np.maximum(n_relevant, 1)


def hit_rate(hits: np.ndarray, n_relevant: np.ndarray, k: int) -> np.ndarray:
    """Return 1 where the first k hold a relevant item."""
    return np.where(hits[:, :k].any(axis=1), 1.0, 0.0)


def reciprocal_rank(hits: np.ndarray, n_relevant: np.ndarray, k: int) -> np.ndarray:
    """Return 1 over the position (from 1) of the first hit, 0 if the first k hold none."""
    head = hits[:, :k]
    return np.where(head.any(axis=1), 1.0 / (head.argmax(axis=1) + 1.0), 0.0)


def average_precision(hits: np.ndarray, n_relevant: np.ndarray, k: int) -> np.ndarray:
    """Return the sum over hits of the precision at their position, over |T| (not over min(|T|, k))."""
    head = hits[:, :k]
    at_hits = np.cumsum(head, axis=1) / np.arange(1.0, head.shape[1] + 1.0)
    return (at_hits * head).sum(axis=1) / np.maximum(n_relevant, 1)


def ndcg(hits: np.ndarray, n_relevant: np.ndarray, k: int) -> np.ndarray:
    """Return the sum over hits of 1 / log2(position + 1), over the same sum for min(|T|, k) hits at the top.

    Reference: Järvelin and Kekäläinen, 2002 (binary relevance).
    """
    discount = 1.0 / np.log2(np.arange(2.0, k + 2.0))
    ideal = np.concatenate([[1.0], np.cumsum(discount)])  # nothing relevant: 0 / 1
    head = hits[:, :k]
    gain = (head * discount[: head.shape[1]]).sum(axis=1)  # not a product with @: its rounding varies with B
    return gain / ideal[np.minimum(n_relevant, k)]


def coverage(exposure: np.ndarray) -> float:
    """Return the share of items that stand in at least one list, from ``exposure`` int64 [n_items]."""
    return float(np.count_nonzero(exposure) / len(exposure))


def self_information(train: Histories) -> np.ndarray:
    """Return -log2 p(i) in bits, float64 [n_items]; p(i) is the share of users who have item i in ``train``.

    An item that nobody has counts as one user's, so that the value stays finite.
    """
    pairs = distinct(train.users().astype(np.int64) * train.n_items + train.items)
    owners = np.bincount(pairs % train.n_items, minlength=train.n_items)
    return np.log2(train.n_users) - np.log2(np.maximum(owners, 1))


def novelty(exposure: np.ndarray, information: np.ndarray) -> float:
    """Return the mean of ``information`` float64 [n_items], in bits, over all recommended items; 0 if there are none.

    Reference: Zhou et al., 2010 (surprisal), with :func:`self_information`.
    """
    total = exposure.sum()
    return float(exposure @ information / total) if total else 0.0


def gini(exposure: np.ndarray) -> float:
    """Return the Gini coefficient of ``exposure`` int64 [n_items]: 0 if all items are shown alike, near 1 if one is.

    Items that are never shown count. It is 0 if nothing is shown.
    """
    n, total = len(exposure), float(exposure.sum())
    if total == 0.0:
        return 0.0
    weights = 2.0 * np.arange(1, n + 1) - n - 1
    return float(weights @ np.sort(exposure).astype(np.float64) / (n * total))


UserMetric = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
USER_METRICS: Mapping[str, UserMetric] = MappingProxyType(
    {
        "ndcg": ndcg,
        "recall": recall,
        "hr": hit_rate,
        "mrr": reciprocal_rank,
        "map": average_precision,
        "precision": precision,
    }
)
LIST_METRICS = ("coverage", "novelty", "gini")


@dataclass(frozen=True)
class Metric:
    """A metric and its cutoff; ``name`` is how it is written everywhere, for example ``ndcg@10``."""

    kind: str
    k: int

    @property
    def name(self) -> str:
        """Return kind@k."""
        return f"{self.kind}@{self.k}"

    @property
    def per_user(self) -> bool:
        """Return whether the metric has a value for each user (else it is one value over all lists)."""
        return self.kind in USER_METRICS


def parse_metric(text: str) -> Metric:
    """Return the metric that ``text`` names, for example ``ndcg@10``.

    Raises UserError for an unknown metric (naming the nearest known ones) or a cutoff that is not a positive integer.
    """
    kind, _, cutoff = text.strip().lower().partition("@")
    known = (*USER_METRICS, *LIST_METRICS)
    if kind not in known:
        near = difflib.get_close_matches(kind, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
        raise UserError(f"metric {text!r}: there is no {kind!r}; {hint}")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", cutoff):
        raise UserError(f"metric {text!r}: wanted a cutoff after '@', for example {kind}@10")
    return Metric(kind, int(cutoff))
