"""Batches of utterances of about one length, bounded by the frames they take with their padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

# feature frames of 10 ms that a model hears at once, padding included, where nothing else bounds them: four minutes
HEARD_AT_ONCE = 24_000


def bucketed(lengths: np.ndarray, frames: int, generator: torch.Generator, *, jitter: float = 0.05) -> list[np.ndarray]:
    """Return batches of rows, in random order; each takes at most ``frames`` frames, padding included.

    Utterances are sorted by length times a random factor within 1 +- ``jitter``, so that batches differ from epoch to
    epoch; an utterance longer than ``frames`` is a batch by itself. Shapes: lengths int64 [N], of at least 1.

    Raises:
        ValueError: frames or jitter out of range.
    """
    if frames < 1 or not 0 <= jitter < 1:
        raise ValueError(f"frames, jitter: wanted >= 1 and in [0, 1), got {frames} and {jitter}")
    noise = 1 + jitter * (2 * torch.rand(len(lengths), generator=generator).numpy() - 1)
    order = np.argsort(lengths * noise, kind="stable")
    batches, start, longest = [], 0, 0
    for place, row in enumerate(order):
        longest = max(longest, int(lengths[row]))
        if place > start and longest * (place - start + 1) > frames:
            batches.append(order[start:place])
            start, longest = place, int(lengths[row])
    if len(order) > start:
        batches.append(order[start:])
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """Return the share of the batches' frames that is padding, 0..1."""
    taken = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - float(sum(int(lengths[batch].sum()) for batch in batches)) / max(taken, 1)


def padded(rows: list[np.ndarray], value: float = 0.0) -> np.ndarray:
    """Return arrays [T_i, ...] of one dtype as one [B, max T_i, ...], filled up with ``value``."""
    longest = max((len(row) for row in rows), default=0)
    out = np.full((len(rows), longest, *rows[0].shape[1:]), value, rows[0].dtype)
    for place, row in enumerate(rows):
        out[place, : len(row)] = row
    return out


def neighbours(
    lengths: np.ndarray, first: int, last: int, *, frames: int = HEARD_AT_ONCE, count: int = 16
) -> Iterator[range]:
    """Yield the rows ``first`` to below ``last`` in order, at most ``count`` together of at most ``frames``, padded.

    One that is longer comes alone.
    """
    while first < last:
        stop, longest = first + 1, int(lengths[first])
        while stop < min(first + count, last):
            longest = max(longest, int(lengths[stop]))
            if longest * (stop + 1 - first) > frames:
                break
            stop += 1
        yield range(first, stop)
        first = stop
