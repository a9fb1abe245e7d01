"""Ranking losses, slow and obvious: one row, plain floats, written from the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdcore.losses import entry
from tests.kdcore.losses.references.common import sigmoid, softmax


def ref_bce(scores: list[float], targets: list[float]) -> float:
    return -math.fsum(
        y * math.log(sigmoid(s)) + (1 - y) * math.log(1 - sigmoid(s)) for s, y in zip(scores, targets, strict=True)
    )


def ref_ranking(student_list: list[float], weights: Tensor | None = None) -> float:
    importance = [1.0] * len(student_list) if weights is None else weights.tolist()
    return math.fsum(-w * math.log(sigmoid(s)) for w, s in zip(importance, student_list, strict=True))


def ref_relaxed(interesting: list[float], uninteresting: list[float]) -> float:
    total = 0.0
    for k, s in enumerate(interesting):
        total -= s - math.log(math.fsum(math.exp(x) for x in [*interesting[k:], *uninteresting]))
    return total


def ref_experts(student: list[float], teacher: list[float], temperature: float) -> float:
    module = entry("distillation_experts").build().double()
    gate = [sum(w * e for w, e in zip(row, teacher, strict=True)) for row in module.gate.weight.tolist()]
    gate = [g + b for g, b in zip(gate, module.gate.bias.tolist(), strict=True)]
    z = softmax([math.log(a) for a in softmax(gate)], temperature)
    rebuilt = torch.zeros(len(teacher), dtype=torch.float64)
    width = module.hidden_dim
    for m, share in enumerate(z):
        first = module.first.weight[m * width : (m + 1) * width] @ torch.tensor(student, dtype=torch.float64)
        hidden = (first + module.first.bias[m * width : (m + 1) * width]).clamp(min=0)
        rebuilt += share * (hidden @ module.second[m] + module.second_bias[m]).detach()
    return float(((torch.tensor(teacher, dtype=torch.float64) - rebuilt) ** 2).sum())


REFERENCES: dict[str, Callable[..., float]] = {
    "bpr": lambda p, n: math.fsum(-math.log(sigmoid(p - x)) for x in n) / len(n),
    "pointwise_bce": ref_bce,
    "ranking_distillation": ref_ranking,
    "collaborative_distillation": lambda s, t: ref_bce(s, [sigmoid(x) for x in t]),
    "relaxed_ranking": ref_relaxed,
    "distillation_experts": ref_experts,
}
