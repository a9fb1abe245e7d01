"""Losses on lists, slow and obvious: one list, plain floats, written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

from tests.kdcore.losses.references.common import sigmoid, softmax


def bernoulli(target: float, p: float) -> float:
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def ref_privileged(student: list[float], teacher: list[float], labels: list[float], weight: float = 0.5) -> float:
    return math.fsum(
        (1 - weight) * bernoulli(y, sigmoid(s)) + weight * bernoulli(sigmoid(t), sigmoid(s))
        for s, t, y in zip(student, teacher, labels, strict=True)
    )


def ref_pairs(student: list[float], teacher: list[float], temperature: float = 1.0, targets: str = "soft") -> float:
    losses = []
    for i, j in combinations(range(len(student)), 2):
        p = sigmoid(student[i] - student[j])
        if targets == "soft":
            losses.append(bernoulli(sigmoid((teacher[i] - teacher[j]) / temperature), p))
        elif teacher[i] != teacher[j]:
            losses.append(-math.log(p if teacher[i] > teacher[j] else 1 - p))
    return math.fsum(losses) / len(losses)


def ref_top_one(student: list[float], teacher: list[float], temperature: float = 1.0) -> float:
    p, q = softmax(teacher, temperature), softmax(student, temperature)
    return -(temperature**2) * math.fsum(a * math.log(b) for a, b in zip(p, q, strict=True))


def ref_order(student: list[float], teacher: list[float]) -> float:
    left = sorted(zip(teacher, student, strict=True), reverse=True)
    chance = 1.0
    while left:
        chance *= math.exp(left[0][1]) / math.fsum(math.exp(s) for _, s in left)
        left = left[1:]
    return -math.log(chance)


REFERENCES: dict[str, Callable[..., float]] = {
    "privileged_features": ref_privileged,
    "pairwise_ranking": ref_pairs,
    "list_net": ref_top_one,
    "plackett_luce": ref_order,
}
