"""Confidences that mean what they say: of the words given 0.8, eight in ten are right. No torch.

A calibration is fitted on validation and applied to anything after: ``Temperature`` has one parameter and needs little
data, ``Isotonic`` takes any rising shape and needs hundreds of words.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from apps.speech.alignment import align
from kdcore.config import UserError

_EDGE = 1e-6  # confidences are kept this far from 0 and 1: of a finite number of words nothing is certain
_TEMPERATURES = (0.02, 50.0)


@dataclass(frozen=True)
class Temperature:
    """Divides the log-odds by ``temperature``: above 1 the confidences move towards one half (Guo et al., 2017)."""

    temperature: float

    def __call__(self, confidence: ArrayLike) -> np.ndarray:
        """Return calibrated confidences, float64 of the same shape, in [0, 1]; the order of words stays."""
        values = np.clip(_checked(confidence), _EDGE, 1 - _EDGE)
        return special.expit(special.logit(values) / self.temperature)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values, which ``from_dict`` reads."""
        return {"kind": "temperature", "temperature": self.temperature}


@dataclass(frozen=True)
class Isotonic:
    """A rising line through points: raw ``confidences``, rising, and the ``shares`` of right words there."""

    confidences: tuple[float, ...]
    shares: tuple[float, ...]

    def __call__(self, confidence: ArrayLike) -> np.ndarray:
        """Return calibrated confidences, float64 of the same shape, in [0, 1]; level outside the points."""
        return np.interp(_checked(confidence), self.confidences, self.shares)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values, which ``from_dict`` reads."""
        return {"kind": "isotonic", "confidences": list(self.confidences), "shares": list(self.shares)}


Calibration = Temperature | Isotonic


def fit_temperature(confidence: ArrayLike, correct: ArrayLike) -> Temperature:
    """Return the temperature, 0.02 to 50, with the least cross entropy on words [M] that are ``correct`` or not.

    Raises: ValueError on shapes that differ, no words, or confidences outside [0, 1].
    """
    values, right = _pair(confidence, correct)
    odds = special.logit(np.clip(values, _EDGE, 1 - _EDGE))
    sign = np.where(right, 1.0, -1.0)

    def loss(log_temperature: float) -> float:
        return float(np.mean(np.logaddexp(0, -sign * odds / math.exp(log_temperature))))

    low, high = map(math.log, _TEMPERATURES)
    # the loss is convex in 1 / temperature, so it has one valley here too
    found = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-8})
    return Temperature(math.exp(found.x))


def fit_isotonic(confidence: ArrayLike, correct: ArrayLike) -> Isotonic:
    """Return the rising function with the least squared error on words [M] that are ``correct`` or not.

    By pooling adjacent violators (Ayer et al., 1955); words of one confidence count as one with their mean.

    Raises: ValueError as ``fit_temperature``.
    """
    values, right = _pair(confidence, correct)
    points, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    shares = np.bincount(inverse, weights=right.astype(np.float64)) / counts
    fitted = optimize.isotonic_regression(shares, weights=counts.astype(np.float64)).x
    fitted = np.clip(fitted, 0.0, 1.0)
    # of a level stretch the ends say everything
    inner = np.zeros(len(points), dtype=bool)
    inner[1:-1] = (fitted[1:-1] == fitted[:-2]) & (fitted[1:-1] == fitted[2:])
    return Isotonic(tuple(points[~inner].tolist()), tuple(fitted[~inner].tolist()))


def from_dict(values: Mapping[str, Any], source: str = "calibration") -> Calibration:
    """Return the calibration that ``as_dict`` wrote; raises UserError if it is none."""
    kind = values.get("kind")
    if kind == "temperature":
        temperature = values.get("temperature")
        if not _is_number(temperature) or temperature <= 0:
            raise UserError(f"{source}: temperature: got {temperature!r}, wanted a number above 0")
        return Temperature(float(temperature))
    if kind != "isotonic":
        raise UserError(f"{source}: kind: got {kind!r}, wanted 'temperature' or 'isotonic'")
    lists = []
    for name in ("confidences", "shares"):
        each = values.get(name)
        if not isinstance(each, list) or not each or not all(_is_number(x) and 0 <= x <= 1 for x in each):
            raise UserError(f"{source}: {name}: wanted a list of numbers from 0 to 1")
        if any(second < first for first, second in itertools.pairwise(each)):
            raise UserError(f"{source}: {name}: wanted rising numbers")
        lists.append(tuple(map(float, each)))
    if len(lists[0]) != len(lists[1]):
        raise UserError(f"{source}: got {len(lists[0])} confidences and {len(lists[1])} shares, wanted as many of each")
    return Isotonic(*lists)


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, *, bins: int = 10) -> float:
    """Return the mean over words [M] of |share of right words - mean confidence| in ``bins`` equal parts of [0, 1].

    Raises: ValueError as ``fit_temperature``, or on fewer than one bin. Reference: Naeini et al. (2015).
    """
    values, right = _pair(confidence, correct)
    if bins < 1:
        raise ValueError(f"bins: got {bins}, wanted at least 1")
    slot = np.minimum((values * bins).astype(np.int64), bins - 1)
    gap = np.bincount(slot, weights=right - values, minlength=bins)
    return float(np.abs(gap).sum() / len(values))


def word_outcomes(
    recognised: Iterable[tuple[Sequence[Mapping[str, Any]], str]],
) -> tuple[np.ndarray, np.ndarray]:
    """Return confidences float64 [M] of all words and whether each is right, bool [M].

    ``recognised`` are pairs of an utterance's words ({"word", "confidence", ...}) and its reference, normalised alike;
    a word is right if the alignment says so.
    """
    pairs = list(recognised)
    texts = [" ".join(str(word["word"]) for word in words) for words, _ in pairs]
    confidences: list[float] = []
    correct: list[bool] = []
    for (words, _), alignment in zip(pairs, align([reference for _, reference in pairs], texts), strict=True):
        if len(alignment.hypothesis) != len(words):
            raise ValueError(f"words: got {[word['word'] for word in words]}, wanted words without white space")
        right = {position for _, position in alignment.hits}
        confidences += [float(word["confidence"]) for word in words]
        correct += [at in right for at in range(len(words))]
    return np.array(confidences, dtype=np.float64), np.array(correct, dtype=bool)


def _pair(confidence: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values, right = _checked(confidence), np.asarray(correct)
    if values.ndim != 1 or values.shape != right.shape or not len(values):
        raise ValueError(f"confidence, correct: got shapes {values.shape} and {right.shape}, wanted [M] twice, M > 0")
    return values, right.astype(bool)


def _checked(confidence: ArrayLike) -> np.ndarray:
    values = np.asarray(confidence, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        wrong = values[~((values >= 0) & (values <= 1))]
        raise ValueError(f"confidence: got {wrong.ravel()[0]}, wanted numbers from 0 to 1")
    return values


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
