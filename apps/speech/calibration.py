"""Whether confidences mean what they say: of the words given 0.8, eight in ten are right. No torch.

``decode.confidence.Calibration`` is fitted on validation to make them so; here is what it is fitted on and judged by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from apps.speech.alignment import align

# way of decoding -> the file beside a model that has the calibration of its words: as sure as a best path is of a word,
# it is right less often than where a language model chose it
CALIBRATIONS = {"wer": "calibration.json", "wer_lm": "calibration_lm.json"}


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, *, bins: int = 10) -> float:
    """Return the mean over words [M] of |share of right words - mean confidence| in ``bins`` equal parts of [0, 1].

    Raises: ValueError on shapes that differ, no words, confidences outside [0, 1], or fewer than one bin.
    Reference: Naeini et al. (2015).
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
