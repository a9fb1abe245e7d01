"""The independent reference for ranking metrics: ranx, run as plain Python."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np

from apps.recsys.data.histories import Histories

RANX_NAMES = {
    "ndcg": "ndcg",
    "recall": "recall",
    "hr": "hit_rate",
    "mrr": "mrr",
    "map": "map",
    "precision": "precision",
}


@contextmanager
def _interpreted() -> Iterator[None]:
    """Run numba's functions as plain Python: compiling ranx takes over a minute, interpreting it here a second."""
    before, numba.config.DISABLE_JIT = numba.config.DISABLE_JIT, True
    try:
        yield
    finally:
        numba.config.DISABLE_JIT = before


def by_ranx(ranked: np.ndarray, relevant: Histories, users: np.ndarray, name: str, k: int) -> np.ndarray:
    """Metric ``name`` at k of each row of ``ranked`` (item ids, -1 where the list has ended) for ``users``."""
    keys = [f"u{row:06d}" for row in range(len(ranked))]
    wanted = {key: {f"i{item}": 1 for item in relevant.of(user)} for key, user in zip(keys, users, strict=True)}
    lists = {
        key: {f"i{item}": float(len(row) - place) for place, item in enumerate(row) if item >= 0}
        for key, row in zip(keys, ranked, strict=True)
    }
    metric = f"{RANX_NAMES[name]}@{k}"
    with _interpreted():
        ranx = importlib.import_module("ranx")
        values = ranx.evaluate(ranx.Qrels(wanted), ranx.Run(lists), metric, return_mean=False)
    return np.asarray(values, dtype=np.float64)
