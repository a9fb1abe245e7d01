"""A vector for a user the model has never met, from the items of a history: no training, no torch.

The map is a ridge regression, fitted when a model is exported, from summaries of the known users' histories to the
vectors that training gave them; one for short histories, one for each length that is about twice as long. It imitates
the trained vectors far better than solving the least-squares problem of a matrix factorisation for one user (Hu, Koren
and Volinsky, 2008), since a distilled student's vectors minimise another loss; ``model.json`` says how many of the ten
best items agree for users that were held out of the fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

# users held out of the fit to measure it, and users it is fitted on at the most
_HELD_OUT, _FITTED = 256, 200_000
# histories of 1, 2-3, 4-7, ... and at least 64 items have a map each
_MAPS = 7
_RIDGE = 1e-3
_BLOCK = 4096


def summary(items: np.ndarray, bias: np.ndarray | None, histories: Sequence[np.ndarray]) -> np.ndarray:
    """Return what the map reads, float32 [B, 2 D + 3], for item vectors [n, D], their bias [n] and some histories.

    The sum of a history's item vectors over its length and over the root of it (with more items one knows a user
    better), its mean bias, the inverse root of its length, and 1. An item counts once, an empty history is all zeros.
    """
    dimension = items.shape[1]
    rows = np.zeros((len(histories), 2 * dimension + 3), np.float32)
    for row, history in zip(rows, histories, strict=True):
        distinct = np.unique(history)
        if len(distinct) == 0:
            continue
        total, root = items[distinct].sum(axis=0), len(distinct) ** -0.5
        row[:dimension] = total / len(distinct)
        row[dimension:-3] = total * root
        row[-3:] = 0.0 if bias is None else bias[distinct].mean(), root, 1.0
    return rows


def fold_in(weight: np.ndarray, items: np.ndarray, bias: np.ndarray | None, history: np.ndarray) -> np.ndarray:
    """Return a user's vector, float32 [D], from a history of item indices; zeros for an empty one."""
    return np.asarray(summary(items, bias, [history])[0] @ weight[_map_of(len(history))], dtype=np.float32)


def _map_of(length: int) -> int:
    return min(max(length, 1).bit_length() - 1, _MAPS - 1)


def fit_fold_in(
    users: np.ndarray, items: np.ndarray, bias: np.ndarray | None, indptr: np.ndarray, seen: np.ndarray
) -> tuple[np.ndarray, dict[str, Any]]:
    """Fit the map and measure it on users held out of the fit.

    Args:
        users: vectors of the known users [n_users, D]; ``indptr`` and ``seen``: their histories, oldest first.

    Returns:
        weight float32 [7, 2 D + 3, D], and the figures of ``model.json``: users held out, the share of their ten best
        unseen items that the map finds (``overlap@10``), and that popularity finds.
    """
    known = np.flatnonzero(np.diff(indptr) > 0)
    generator = np.random.default_rng(0)  # fixed: the same run gives the same bytes
    shuffled = generator.permutation(known)
    held = np.sort(shuffled[: min(_HELD_OUT, len(shuffled) // 5)])
    fitted = np.sort(shuffled[len(held) : len(held) + _FITTED])
    size = 2 * items.shape[1] + 3
    weight = np.zeros((_MAPS, size, items.shape[1]), np.float32)
    for number in range(_MAPS):
        gram, moment = np.zeros((size, size)), np.zeros((size, items.shape[1]))
        for block, histories in _examples(number, fitted, indptr, seen, 4 * size):
            rows = summary(items, bias, histories).astype(np.float64)
            gram += rows.T @ rows
            moment += rows.T @ users[block].astype(np.float64)
        ridge = _RIDGE * np.trace(gram) / size
        if ridge > 0:
            weight[number] = np.linalg.solve(gram + ridge * np.eye(size), moment)
        elif number:
            weight[number] = weight[number - 1]  # nobody has so long a history
    return weight, _measure(weight, held, users, items, bias, indptr, seen)


def _examples(
    number: int, chosen: np.ndarray, indptr: np.ndarray, seen: np.ndarray, wanted: int
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Yield blocks of users and a history of each, for one map.

    Whole histories of the lengths that the map is for; where they are fewer than ``wanted``, the first items of longer
    ones as well: what training would give to a user with so few items is then only guessed.
    """
    shortest, longest = 1 << number, (2 << number) - 1 if number + 1 < _MAPS else len(seen)
    counts = np.diff(indptr)[chosen]
    whole = chosen[(counts >= shortest) & (counts <= longest)]
    parts = [(whole, longest)]
    if len(whole) < wanted:
        lengths = sorted({shortest, shortest + shortest // 2})
        parts += [(chosen[counts > max(length, longest)], length) for length in lengths]
    for users, length in parts:
        for start in range(0, len(users), _BLOCK):
            block = users[start : start + _BLOCK]
            yield block, [seen[indptr[user] : indptr[user + 1]][:length] for user in block]


def _measure(
    weight: np.ndarray,
    held: np.ndarray,
    users: np.ndarray,
    items: np.ndarray,
    bias: np.ndarray | None,
    indptr: np.ndarray,
    seen: np.ndarray,
) -> dict[str, Any]:
    popularity = np.bincount(seen, minlength=len(items)).astype(np.float32)
    overlap = {"overlap@10": 0.0, "popularity_overlap@10": 0.0}
    for user in held:
        history = seen[indptr[user] : indptr[user + 1]]
        guess = fold_in(weight, items, bias, history)
        wanted = _best(users[user], items, bias, history)
        ranked = popularity.copy()
        ranked[history] = -np.inf
        popular = np.argsort(-ranked, kind="stable")[: len(wanted)]
        for name, found in (("overlap@10", _best(guess, items, bias, history)), ("popularity_overlap@10", popular)):
            overlap[name] += len(np.intersect1d(wanted, found)) / max(len(wanted), 1) / len(held)
    return {"users_held_out": len(held), **{name: round(value, 4) for name, value in overlap.items()}}


def _best(user: np.ndarray, items: np.ndarray, bias: np.ndarray | None, history: np.ndarray, k: int = 10) -> np.ndarray:
    scores = items @ user + (0.0 if bias is None else bias)
    scores[history] = -np.inf
    return np.argsort(-scores, kind="stable")[: min(k, len(items) - len(np.unique(history)))]
