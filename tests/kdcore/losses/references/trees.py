"""Losses of tree students, slow and obvious: one row, plain floats, written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

from tests.kdcore.losses.references.common import sigmoid


def bernoulli(target: float, p: float) -> float:
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def ref_blended(s: float, t: float, y: float, alpha: float = 0.5, temperature: float = 1.0) -> float:
    hard = bernoulli(y, sigmoid(s))
    soft = bernoulli(sigmoid(t / temperature), sigmoid(s / temperature))
    return (1 - alpha) * hard + alpha * temperature**2 * soft


REFERENCES: dict[str, Callable[..., float]] = {"blended_cross_entropy": ref_blended}
