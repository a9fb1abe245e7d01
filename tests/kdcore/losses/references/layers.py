"""Losses between transformer layers, slow and obvious: one row, loops over heads and positions below its length."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from kdcore.losses import entry
from tests.kdcore.losses.references.common import kl, softmax
from tests.kdcore.losses.references.feature import dot, scaled

Matrix = list[list[float]]


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def mix(weights: list[float], vectors: Matrix) -> list[float]:
    return [math.fsum(w * v[d] for w, v in zip(weights, vectors, strict=True)) for d in range(len(vectors[0]))]


def squared(a: list[float], b: list[float]) -> float:
    return math.fsum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def ref_attention(student: list[Matrix], teacher: list[Matrix], length: int, divergence: str = "kl") -> float:
    """Where the numbers of heads differ, compare the means over the heads."""
    values = []
    for query in range(length):
        s, t = ([head[query][:length] for head in heads] for heads in (student, teacher))
        if divergence == "kl":
            s, t = ([softmax(scores) for scores in heads] for heads in (s, t))
        if len(s) != len(t):
            s, t = ([mix([1 / len(heads)] * len(heads), heads)] for heads in (s, t))
        for a, b in zip(s, t, strict=True):
            values.append(kl(b, a) if divergence == "kl" else squared(a, b) / length)
    return mean(values)


def ref_relations(student: Matrix, teacher: Matrix, length: int, heads: int = 1) -> float:
    scores: list[list[Matrix]] = [[], []]
    for side, values in zip(scores, (student, teacher), strict=True):
        width = len(values[0]) // heads
        for head in range(heads):
            own = [v[head * width : (head + 1) * width] for v in values[:length]]
            side.append([[dot(a, b) / math.sqrt(width) for b in own] for a in own])
    return ref_attention(*scores, length)


def ref_hidden(
    student: list[Matrix],
    teacher: list[Matrix],
    length: int,
    layers: Sequence[int] | None = None,
    normalised: bool = False,
) -> float:
    values = []
    for i, layer in enumerate(student):
        # two of four layers: TinyBERT's mapping takes every second
        source = teacher[2 * i + 1 if layers is None else layers[i]]
        for s, t in zip(layer[:length], source[:length], strict=True):
            values.append(squared(scaled(s), scaled(t)) if normalised else squared(s, t) / len(s))
    return mean(values)


def ref_attended(student: Matrix, teacher: Matrix) -> float:
    mixtures = [mix(softmax([dot(s, t) for t in teacher]), teacher) for s in student]
    return mean([squared(s, m) / len(s) for s, m in zip(student, mixtures, strict=True)])


def ref_mapping(student: list[Matrix], teacher: list[Matrix], length: int) -> float:
    module = entry("layer_mapping").build().double()
    weights = [softmax(row) for row in module.logits.tolist()]
    values = []
    for i, layer in enumerate(student):
        for position in range(length):
            projected = [dot(row, layer[position]) for row in module.projection.weight.tolist()]
            mixture = mix(weights[i], [t[position] for t in teacher])
            values.append(squared(projected, mixture) / len(mixture))
    return mean(values)


REFERENCES: dict[str, Callable[..., Any]] = {
    "attention_matrices": ref_attention,
    "value_relations": ref_relations,
    "hidden_states": ref_hidden,
    "attended_layers": ref_attended,
    "layer_mapping": ref_mapping,
}
