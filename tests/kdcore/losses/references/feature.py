"""Losses on features, slow and obvious: one row (or one batch), plain floats, written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

Maps = list[list[list[float]]]


def over(values: list[float], elements: str) -> float:
    return math.fsum(values) / (len(values) if elements == "mean" else 1)


def flat(values: Any) -> list[float]:
    return [float(x) for x in np.asarray(values).ravel()]


def length(vector: list[float]) -> float:
    return math.sqrt(math.fsum(x * x for x in vector))


def scaled(vector: list[float]) -> list[float]:
    size = length(vector)
    return [x / size if size else 0.0 for x in vector]


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def ref_hint(student: Any, teacher: Any, elements: str = "mean") -> float:
    return over([(s - t) ** 2 / 2 for s, t in zip(flat(student), flat(teacher), strict=True)], elements)


def ref_attention(student: Maps, teacher: Maps, power: float = 2.0, distance: str = "norm") -> float:
    maps = []
    for features in (student, teacher):
        height, width = len(features[0]), len(features[0][0])
        maps.append(
            scaled([math.fsum(abs(c[h][w]) ** power for c in features) for h in range(height) for w in range(width)])
        )
    difference = [s - t for s, t in zip(*maps, strict=True)]
    return length(difference) if distance == "norm" else dot(difference, difference) / len(difference)


def ref_probabilistic(student: list[list[float]], teacher: list[list[float]], diagonal: bool = False) -> list[float]:
    losses = []
    for i in range(len(student)):
        others = [j for j in range(len(student)) if diagonal or j != i]
        given = []
        for features in (student, teacher):
            kernel = [(1 + dot(scaled(features[i]), scaled(features[j]))) / 2 for j in others]
            given.append([k / math.fsum(kernel) for k in kernel])
        q, p = given
        losses.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return losses


def ref_selectivity(student: Maps, teacher: Maps, kernel: str = "polynomial") -> float:
    degree = 2 if kernel == "polynomial" else 1
    s, t = ([scaled(flat(channel)) for channel in features] for features in (student, teacher))

    def mean_kernel(a: list[list[float]], b: list[list[float]]) -> float:
        return math.fsum(dot(x, y) ** degree for x in a for y in b) / (len(a) * len(b))

    return mean_kernel(s, s) + mean_kernel(t, t) - 2 * mean_kernel(s, t)


def ref_weighted(student: Maps, teacher: Maps, weights: Tensor) -> float:
    total = 0.0
    for weight, s, t in zip(weights.tolist(), student, teacher, strict=True):
        total += weight * over([(a - b) ** 2 for a, b in zip(flat(s), flat(t), strict=True)], "mean") / 2
    return total


def ref_boundary(student: list[float], teacher: list[float], margin: float = 1.0, elements: str = "mean") -> float:
    hinges = []
    for s, t in zip(student, teacher, strict=True):
        hinges.append(max(0.0, margin - s) ** 2 if t > 0 else max(0.0, margin + s) ** 2)
    return over(hinges, elements)


REFERENCES: dict[str, Callable[..., Any]] = {
    "hint": ref_hint,
    "attention_transfer": ref_attention,
    "probabilistic_transfer": ref_probabilistic,
    "neuron_selectivity": ref_selectivity,
    "weighted_channels": ref_weighted,
    "activation_boundary": ref_boundary,
}
