"""Recommenders as modules of plain tensors, the form ONNX takes: no users, no data set, no randomness."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apps.recsys.models.base import DotRecommender
from apps.recsys.models.linear import Ease
from apps.recsys.models.sasrec import Sasrec


class VectorScorer(nn.Module):
    """User vectors float32 [B, D] to scores [B, n_items]."""

    def __init__(self, model: DotRecommender) -> None:
        super().__init__()
        bias = model.item_bias()
        self.items: Tensor
        self.bias: Tensor
        self.register_buffer("items", model.item_vectors().detach())
        self.register_buffer("bias", torch.zeros(model.n_items) if bias is None else bias.detach())

    def forward(self, user_vector: Tensor) -> Tensor:
        """Return inner products plus item bias."""
        return user_vector @ self.items.T + self.bias


class SasrecEncoder(nn.Module):
    """Histories int64 [B, T] and their lengths int64 [B] to user vectors [B, D]: what an index is asked with."""

    def __init__(self, model: Sasrec) -> None:
        super().__init__()
        self.model = model

    def forward(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Return the state after the last item of each history; an empty one has the zero vector."""
        hidden = self.model.hidden(history)
        rows = torch.arange(history.shape[0])
        return hidden[rows, (lengths - 1).clamp(min=0)] * (lengths > 0)[:, None]


class SasrecScorer(nn.Module):
    """Histories int64 [B, T] and their lengths int64 [B] to user vectors [B, D] and scores [B, n_items]."""

    def __init__(self, model: Sasrec) -> None:
        super().__init__()
        self.model, self.encoder = model, SasrecEncoder(model)

    def forward(self, history: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Score after the last item of each history."""
        vectors = self.encoder(history, lengths)
        return vectors, vectors @ self.model.item_vectors().T


class EaseScorer(nn.Module):
    """Histories int64 [B, T] to scores [B, n_items]: the sum of the weight rows of the items, each once."""

    def __init__(self, model: Ease) -> None:
        super().__init__()
        self.weight: Tensor
        self.n_items = model.n_items
        self.register_buffer("weight", model.weight)

    def forward(self, history: Tensor) -> Tensor:
        """Score from the set of items in a history; padding falls into a column that is cut off."""
        seen = torch.zeros(history.shape[0], self.n_items + 1)
        seen = seen.scatter(1, history, 1.0)
        return seen[:, : self.n_items] @ self.weight
