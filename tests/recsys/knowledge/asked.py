"""A student's scores for the tests of knowledge: a factor model, gathered or by the slow definition."""

from __future__ import annotations

import torch
from torch import Tensor

from apps.recsys.knowledge import Knowledge
from apps.recsys.models.factors import MatrixFactorization


def summed(knowledge: Knowledge, student: MatrixFactorization, queries: Tensor, prepared: dict[str, Tensor]) -> Tensor:
    """Return the knowledge's loss as a training step asks for it."""
    encoded = student.encode()

    def score(asked: Tensor, items: Tensor | None = None) -> Tensor:
        return encoded.everything(asked) if items is None else encoded.lists(asked, items)

    return knowledge.loss(prepared, queries, score, encoded)


def table(student: MatrixFactorization) -> Tensor:
    """Return all scores [n_users, n_items] in float64, with gradient."""
    scores = student.user.double() @ student.item.double().T
    return scores if student.bias is None else scores + student.bias.double()


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))
