"""Relation losses, slow and obvious: loops over the formulas; the singular vectors are NumPy's."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np

Rows = list[list[float]]


def pooled(maps: Any, height: int, width: int) -> Any:
    """Max-pool [C, H, W]: cell i covers floor(i H / h) .. ceil((i + 1) H / h)."""
    maps = np.asarray(maps)
    channels, h, w = maps.shape
    result = np.zeros((channels, height, width))
    for c in range(channels):
        for i in range(height):
            for j in range(width):
                rows = range(i * h // height, -(-(i + 1) * h // height))
                columns = range(j * w // width, -(-(j + 1) * w // width))
                result[c, i, j] = max(maps[c, r, s] for r in rows for s in columns)
    return result


def flow(first: Any, second: Any) -> Any:
    first, second = np.asarray(first), np.asarray(second)
    height, width = min(first.shape[1], second.shape[1]), min(first.shape[2], second.shape[2])
    first, second = pooled(first, height, width), pooled(second, height, width)
    matrix = np.zeros((len(first), len(second)))
    for i in range(len(first)):
        for j in range(len(second)):
            for s in range(height):
                for t in range(width):
                    matrix[i, j] += first[i, s, t] * second[j, s, t] / (height * width)
    return matrix


def ref_flow(s_first: Any, s_second: Any, t_first: Any, t_second: Any, entries: str = "sum") -> float:
    squares = (flow(s_first, s_second) - flow(t_first, t_second)) ** 2
    return float(squares.sum() if entries == "sum" else squares.mean())


def right_vectors(maps: Any, count: int) -> list[Any]:
    maps = np.asarray(maps)
    positions = maps.reshape(len(maps), -1).T
    # by the eigenvectors of the channels' second moments, not by a singular value decomposition
    values, vectors = np.linalg.eigh(positions.T @ positions)
    return [vectors[:, k] for k in np.argsort(-values)[:count]]


def ref_singular(
    s_first: Any, s_second: Any, t_first: Any, t_second: Any, count: int = 1, bandwidth: float = 8.0
) -> float:
    signed = []
    for student, teacher in ((s_first, t_first), (s_second, t_second)):
        pairs = []
        for s, t in zip(right_vectors(student, count), right_vectors(teacher, count), strict=True):
            t = t if t[np.argmax(np.abs(t))] > 0 else -t
            pairs.append((s if s @ t >= 0 else -s, t))
        signed.append(pairs)
    errors = []
    for k in range(count):
        for i in range(len(signed[0][k][0])):
            for j in range(len(signed[1][k][0])):
                of_student, of_teacher = (
                    math.exp(-((signed[0][k][who][i] - signed[1][k][who][j]) ** 2) / bandwidth) for who in (0, 1)
                )
                errors.append((of_student - of_teacher) ** 2)
    return math.fsum(errors) / len(errors)


def normalised(row: Any) -> Any:
    row = np.asarray(row, dtype=float).ravel()
    return row / math.sqrt(math.fsum(x * x for x in row))


def ref_jacobian(student: Any, teacher: Any) -> float:
    return math.fsum((a - b) ** 2 for a, b in zip(normalised(student), normalised(teacher), strict=True))


def dot(a: Any, b: Any) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def ref_congruence(
    student: Rows, teacher: Rows, kernel: str = "gaussian", gamma: float = 0.4, order: int = 2
) -> list[float]:
    def correlation(a: Any, b: Any) -> float:
        product = dot(normalised(a), normalised(b))
        if kernel == "bilinear":
            return product
        series = math.fsum((2 * gamma * product) ** p / math.factorial(p) for p in range(order + 1))
        return math.exp(-2 * gamma) * series

    rows = range(len(student))
    return [
        math.fsum((correlation(student[i], student[j]) - correlation(teacher[i], teacher[j])) ** 2 for j in rows)
        / len(rows)
        for i in rows
    ]


def ref_similarity(student: Any, teacher: Any) -> list[float]:
    def gram_row(rows: Any, i: int) -> Any:
        return normalised([dot(np.ravel(rows[i]), np.ravel(other)) for other in rows])

    return [float(np.mean((gram_row(student, i) - gram_row(teacher, i)) ** 2)) for i in range(len(student))]


def scores(rows: Rows, query: int, alpha: float, beta: float) -> dict[int, float]:
    units = [normalised(row) for row in rows]
    return {j: -alpha * math.dist(units[query], units[j]) ** beta for j in range(len(rows)) if j != query}


def plackett_luce(ordered: list[float]) -> float:
    """The probability of an order: pick the items one by one, each by its share of what is left."""
    probability = 1.0
    for k in range(len(ordered)):
        probability *= math.exp(ordered[k]) / math.fsum(math.exp(s) for s in ordered[k:])
    return probability


def ref_hard(student: Rows, teacher: Rows, alpha: float = 3.0, beta: float = 3.0) -> list[float]:
    losses = []
    for query in range(len(student)):
        by_teacher, by_student = scores(teacher, query, alpha, beta), scores(student, query, alpha, beta)
        order = sorted(by_teacher, key=lambda j: -by_teacher[j])
        losses.append(-math.log(plackett_luce([by_student[j] for j in order])))
    return losses


def ref_soft(student: Rows, teacher: Rows, length: int = 4, alpha: float = 3.0, beta: float = 3.0) -> list[float]:
    losses = []
    for query in range(len(student)):
        by_teacher, by_student = scores(teacher, query, alpha, beta), scores(student, query, alpha, beta)
        items = sorted(by_teacher, key=lambda j: -by_teacher[j])[:length]
        total = 0.0
        for order in permutations(items):
            p = plackett_luce([by_teacher[j] for j in order])
            total += p * math.log(p / plackett_luce([by_student[j] for j in order]))
        losses.append(total)
    return losses


def ref_graph(student: Rows, teacher: Rows, heads: int = 4, temperature: float = 0.1) -> list[float]:
    def attention(rows: Rows, i: int, head: int) -> dict[int, float]:
        width = len(rows[0]) // heads
        units = [normalised(row[head * width : (head + 1) * width]) for row in rows]
        powers = {j: math.exp(dot(units[i], units[j]) / temperature) for j in range(len(rows)) if j != i}
        return {j: power / math.fsum(powers.values()) for j, power in powers.items()}

    losses = []
    for i in range(len(student)):
        total = 0.0
        for head in range(heads):
            p, q = attention(teacher, i, head), attention(student, i, head)
            total += math.fsum(p[j] * math.log(p[j] / q[j]) for j in p)
        losses.append(total / heads)
    return losses


REFERENCES: dict[str, Callable[..., Any]] = {
    "flow_of_solution": ref_flow,
    "singular_vectors": ref_singular,
    "jacobian_matching": ref_jacobian,
    "correlation_congruence": ref_congruence,
    "similarity_preserving": ref_similarity,
    "darkrank_hard": ref_hard,
    "darkrank_soft": ref_soft,
    "graph_relations": ref_graph,
}
