"""Response losses, slow and obvious: one row, plain floats, written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

from tests.kdcore.losses.references.common import kl, sigmoid, softmax


def ref_soft_targets(
    student: list[float], teacher: list[float], temperature: float = 1.0, direction: str = "forward"
) -> float:
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    value = {
        "forward": kl(p, q),
        "reverse": kl(q, p),
        "symmetric": (kl(p, q) + kl(q, p)) / 2,
        "jensen_shannon": (kl(p, middle) + kl(q, middle)) / 2,
    }[direction]
    return temperature**2 * value


def ref_sparse(
    student: list[float], items: list[int], log_probs: list[float], temperature: float = 1.0, rest: str = "lump"
) -> float:
    q, p = softmax(student, temperature), [math.exp(x) for x in log_probs]
    kept = [q[i] for i in items]
    if rest == "renormalise":
        return temperature**2 * kl([x / math.fsum(p) for x in p], [x / math.fsum(kept) for x in kept])
    lump = math.fsum(x for i, x in enumerate(q) if i not in items)
    return temperature**2 * kl([*p, 1 - math.fsum(p)], [*kept, lump])


def ref_regression(student: list[float], teacher: list[float], delta: float | None = None) -> float:
    errors = [abs(s - t) for s, t in zip(student, teacher, strict=True)]
    if delta is None:
        return math.fsum(e * e for e in errors) / len(errors)
    return math.fsum(e * e / 2 if e <= delta else delta * (e - delta / 2) for e in errors) / len(errors)


def ref_binary(student: list[float], teacher: list[float], temperature: float = 1.0) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = sigmoid(t / temperature), sigmoid(s / temperature)
        total += kl([p, 1 - p], [q, 1 - q])
    return temperature**2 * total


def ref_decoupled(
    student: list[float], teacher: list[float], label: int, alpha: float = 1, beta: float = 8, temperature: float = 4
) -> float:
    q, p = softmax(student, temperature), softmax(teacher, temperature)
    target = kl([p[label], 1 - p[label]], [q[label], 1 - q[label]])
    others = [i for i in range(len(p)) if i != label]
    rest = kl([p[i] / (1 - p[label]) for i in others], [q[i] / (1 - q[label]) for i in others])
    return temperature**2 * (alpha * target + beta * rest)


def ref_normalised(
    student: list[float], teacher: list[float], label: int, gamma: float = 1.5, temperature: float = 1.0
) -> float:
    target = softmax(teacher)[label] * math.log(softmax(student)[label])
    others = [i for i in range(len(student)) if i != label]
    p, q = (softmax([logits[i] for i in others], temperature) for logits in (teacher, student))
    return -target - gamma * temperature**2 * math.fsum(a * math.log(b) for a, b in zip(p, q, strict=True))


def ref_label_smoothing(student: list[float], label: int, smoothing: float = 0.1) -> float:
    q = softmax(student)
    target = [smoothing / len(q) + (1 - smoothing) * (i == label) for i in range(len(q))]
    return -math.fsum(t * math.log(x) for t, x in zip(target, q, strict=True))


REFERENCES: dict[str, Callable[..., float]] = {
    "soft_targets": ref_soft_targets,
    "sparse_soft_targets": ref_sparse,
    "logit_mse": ref_regression,
    "regression": ref_regression,
    "binary_soft_targets": ref_binary,
    "decoupled": ref_decoupled,
    "normalised": ref_normalised,
    "label_smoothing": ref_label_smoothing,
    "confidence_penalty": lambda s: math.log(len(s)) + math.fsum(p * math.log(p) for p in softmax(s)),
}
