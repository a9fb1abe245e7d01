"""What all decoders share: the posteriors' checks, a hypothesis, and the exact CTC probability of a symbol sequence.

``log_probs`` is everywhere float [T, C]: the log-softmax of T frames of 40 ms over C - 1 symbols and the blank, which
is last. No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

FRAME_SECONDS = 0.04
BOUNDARY = "▁"  # U+2581: between words, or in front of a word's first piece


class Spelling(Protocol):
    """What the decoders need of the units: their symbols, and how a text is spelled with them."""

    @property
    def symbols(self) -> tuple[str, ...]:
        """The symbols; the blank's index is their number."""

    def encode(self, text: str) -> list[int]:
        """Return the indices that spell a text; UserError for what cannot be spelled."""


@dataclass(frozen=True)
class Hypothesis:
    """A symbol sequence.

    Attributes:
        ids: the symbols, blanks and repeats collapsed.
        score: its natural log-probability, scores of language models and boosts included.
        frames: the frame at which each symbol is emitted, counted from the start of the audio; strictly increasing.
        probabilities: the posterior of each symbol at that frame, 0..1.
    """

    ids: tuple[int, ...]
    score: float
    frames: tuple[int, ...]
    probabilities: tuple[float, ...]


def check_log_probs(log_probs: np.ndarray, classes: int | None = None) -> np.ndarray:
    """Return ``log_probs`` as float64 [T, C]; T may be 0, C is ``classes`` if that is given.

    Raises:
        ValueError: not two axes, fewer than two classes or not ``classes``, NaN, or values above 0 (no log-softmax).
    """
    wanted = f"[T, {classes}]" if classes else "[T, C] with C >= 2"
    values = np.asarray(log_probs)
    if values.ndim != 2 or values.shape[1] < 2 or (classes and values.shape[1] != classes):
        raise ValueError(f"log_probs: got shape {values.shape}, wanted {wanted}")
    if values.dtype.kind != "f":
        raise ValueError(f"log_probs: got {values.dtype}, wanted floats")
    values = values.astype(np.float64, copy=False)
    # the softmax of half precision misses 1 by about a thousandth; streams are checked often: one look at all values
    if values.size and not values.max() <= 1e-2:
        if np.isnan(values).any():
            raise ValueError(f"log_probs: got NaN, first at frame {int(np.isnan(values).any(1).argmax())}")
        raise ValueError(f"log_probs: got a value of {values.max():.4g}, wanted a log-softmax (none above 0)")
    return values


def ctc_log_probability(log_probs: np.ndarray, ids: Sequence[int]) -> float:
    """Return log P(ids | x): the log of the sum over all paths that collapse to ``ids``; -inf if they do not fit."""
    return float(ctc_log_probabilities(log_probs, [ids])[0])


def ctc_log_probabilities(log_probs: np.ndarray, sequences: Iterable[Sequence[int]]) -> np.ndarray:
    """Return log P(ids | x) of N sequences, float64 [N], by one pass of the CTC forward algorithm (Graves, 2006).

    Raises:
        ValueError: ``log_probs`` as in ``check_log_probs``, or an id that is the blank or outside the classes.
    """
    values = check_log_probs(log_probs)
    blank = values.shape[1] - 1
    rows = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    for row in rows:
        if len(row) and (row.min() < 0 or row.max() >= blank):
            raise ValueError(f"ids: got {row.tolist()}, wanted symbols 0..{blank - 1}")
    if not rows:
        return np.zeros(0)
    if not len(values):
        return np.array([-np.inf if len(row) else 0.0 for row in rows])
    # states blank, y1, blank, y2, ..., blank
    width = 2 * max(len(row) for row in rows) + 1
    states = np.full((len(rows), width), blank)
    for place, row in enumerate(rows):
        states[place, 1 : 2 * len(row) : 2] = row
    # a symbol may follow another one without a blank between them, unless it repeats it; the first may start
    skip = np.full((len(rows), width), -np.inf)
    skip[:, 1:2] = 0.0
    skip[:, 2:][(states[:, 2:] != blank) & (states[:, 2:] != states[:, :-2])] = 0.0
    # two columns in front: the start, which is one step from the first blank and two from the first symbol
    alpha = np.full((len(rows), width + 2), -np.inf)
    alpha[:, 1] = 0.0
    for frame in values:
        step = np.logaddexp(np.logaddexp(alpha[:, 2:], alpha[:, 1:-1]), alpha[:, :-2] + skip)
        alpha[:, 2:] = step + frame[states]
        alpha[:, 1] = -np.inf
    last = np.array([2 * len(row) for row in rows]) + 2
    index = np.arange(len(rows))
    return np.logaddexp(alpha[index, last], np.where(last > 2, alpha[index, last - 1], -np.inf))
