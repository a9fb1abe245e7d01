"""Distances and angles in a batch, slow and obvious: from differences of rows, pair by pair and triple by triple."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

Rows = list[list[float]]


def huber(error: float) -> float:
    return error * error / 2 if abs(error) <= 1 else abs(error) - 0.5


def difference(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def relative_distances(rows: Rows) -> Rows:
    distances = [[math.hypot(*difference(a, b)) for b in rows] for a in rows]
    apart = [d for row in distances for d in row if d > 0]
    mean = math.fsum(apart) / len(apart)
    return [[d / mean for d in row] for row in distances]


def distance_relations(student: Rows, teacher: Rows) -> list[float]:
    ours, theirs = relative_distances(student), relative_distances(teacher)
    return [
        math.fsum(huber(s - t) for s, t in zip(a, b, strict=True)) / len(a) for a, b in zip(ours, theirs, strict=True)
    ]


def cosine(corner: list[float], one: list[float], other: list[float]) -> float:
    a, b = difference(one, corner), difference(other, corner)
    size = math.hypot(*a) * math.hypot(*b)
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / size if size else 0.0


def angle_relations(student: Rows, teacher: Rows) -> list[float]:
    n = range(len(student))
    return [
        math.fsum(
            huber(cosine(student[j], student[i], student[k]) - cosine(teacher[j], teacher[i], teacher[k]))
            for i in n
            for k in n
        )
        / len(student) ** 2
        for j in n
    ]


REFERENCES: dict[str, Callable[..., Any]] = {
    "distance_relations": distance_relations,
    "angle_relations": angle_relations,
}
