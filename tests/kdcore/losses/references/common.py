"""What the slow references share: one row, plain floats."""

from __future__ import annotations

import math


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    powers = [math.exp((x - top) / temperature) for x in logits]
    return [p / math.fsum(powers) for p in powers]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def kl(p: list[float], q: list[float]) -> float:
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
