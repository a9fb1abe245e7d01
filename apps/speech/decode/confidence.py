"""How far a word can be trusted: its symbols' posteriors, calibrated on words known to be right or wrong. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# keeps the logit of a confidence of 0 or 1 finite
_EDGE = 1e-6


def word_confidence(probabilities: Sequence[float]) -> float:
    """Return the least posterior of a word's symbols, each at the frame that emits it, 0..1.

    A word is wrong if one of its symbols is.

    Raises:
        ValueError: no symbols, or values outside 0..1.
    """
    if not len(probabilities) or min(probabilities) < 0 or max(probabilities) > 1 + 1e-3:
        raise ValueError(f"probabilities: got {list(probabilities)}, wanted one or more in 0..1")
    return min(1.0, float(min(probabilities)))


@dataclass(frozen=True)
class Calibration:
    """Turns confidences into probabilities of being right: sigmoid(scale * logit(confidence) + offset) (Platt, 1999).

    It keeps the order of words, since ``scale`` is above 0.
    """

    scale: float
    offset: float

    @classmethod
    def fit(cls, confidences: Sequence[float] | np.ndarray, correct: Sequence[bool] | np.ndarray) -> Calibration:
        """Return the calibration that makes ``correct`` most likely, by Newton's method.

        Targets are Platt's: a word more of either kind, so that words that are all right do not give certainty.

        Raises:
            ValueError: no words, other lengths, confidences outside 0..1, or confidence that tells nothing or the
                opposite (the fitted scale is not above 0).
        """
        values, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=bool)
        if values.ndim != 1 or values.shape != right.shape or not values.size:
            raise ValueError(f"confidences, correct: got shapes {values.shape}, {right.shape}, wanted [N] both, N >= 1")
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("confidences: got values outside 0..1")
        count = int(right.sum())
        target = np.where(right, (count + 1) / (count + 2), 1 / (len(right) - count + 2))
        inputs = np.stack([_logit(values), np.ones_like(values)], axis=1)
        weights = np.array([1.0, 0.0])
        loss = _loss(inputs @ weights, target, weights)
        for _ in range(100):
            chance = _sigmoid(inputs @ weights)
            # a weak pull to the identity, so that one distinct confidence has an answer too
            gradient = inputs.T @ (chance - target) + _PULL * (weights - _IDENTITY)
            hessian = (inputs * (chance * (1 - chance))[:, None]).T @ inputs + _PULL * np.eye(2)
            step = np.linalg.solve(hessian, gradient)
            size = 1.0
            while (
                size > 1e-8 and (now := _loss(inputs @ (weights - size * step), target, weights - size * step)) > loss
            ):
                size /= 2
            if size <= 1e-8:
                break
            weights, loss = weights - size * step, now
            if np.abs(size * step).max() < 1e-9:
                break
        if not weights[0] > 0:
            raise ValueError(
                f"confidences: got a fitted scale of {weights[0]:.3g}, wanted right words to have higher ones"
            )
        return cls(float(weights[0]), float(weights[1]))

    def apply(self, confidence: float) -> float:
        """Return the probability, 0..1, that a word with this confidence is right."""
        return float(_sigmoid(self.scale * _logit(np.float64(confidence)) + self.offset))


_PULL = 1e-3
_IDENTITY = np.array([1.0, 0.0])


def _loss(logits: np.ndarray, target: np.ndarray, weights: np.ndarray) -> float:
    entropy = np.logaddexp(0.0, logits) - target * logits
    return float(entropy.sum() + _PULL / 2 * ((weights - _IDENTITY) ** 2).sum())


def _logit(values: np.ndarray | np.float64) -> np.ndarray:
    clipped = np.clip(values, _EDGE, 1 - _EDGE)
    return np.log(clipped) - np.log1p(-clipped)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * values))
