"""Self-attentive sequential recommendation: the next item from the items before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from apps.recsys.data.histories import Histories
from apps.recsys.models.base import DotRecommender
from apps.recsys.models.kernels import Dropout, dropout
from apps.recsys.models.options import above_zero, at_least


@dataclass(frozen=True)
class SasrecOptions:
    """Size of a SASRec."""

    dimension: int = 64
    layers: int = 2
    heads: int = 1
    # how many of the last items are read
    length: int = 50
    dropout: float = 0.3
    scale: float = 0.02

    def __post_init__(self) -> None:
        at_least(self, dimension=1, layers=1, heads=1, length=1, dropout=0)
        above_zero(self, "scale")
        if self.dropout >= 1:
            raise ValueError(f"dropout: got {self.dropout}, wanted less than 1")
        if self.dimension % self.heads:
            raise ValueError(f"heads: got {self.heads}, wanted a divisor of dimension {self.dimension}")


class _Block(nn.Module):
    """Pre-norm causal self-attention and a pointwise feed-forward net."""

    def __init__(self, options: SasrecOptions) -> None:
        super().__init__()
        d = options.dimension
        self.heads, self.dropout = options.heads, options.dropout
        self.attention_norm, self.feed_norm = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.feed = nn.Sequential(nn.Linear(d, d), nn.ReLU(), Dropout(options.dropout), nn.Linear(d, d))

    def forward(self, x: Tensor) -> Tensor:
        """Map float32 [B, T, D] to [B, T, D]; position t sees positions 0..t."""
        b, t, d = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mixed = self._attend(qkv[0], qkv[1], qkv[2]).transpose(1, 2).reshape(b, t, d)
        x = x + dropout(self.out(mixed), self.dropout, self.training)
        return x + dropout(self.feed(self.feed_norm(x)), self.dropout, self.training)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the mixed values, all [B, heads, T, D / heads].

        Sequences are padded on the right, so a valid position never looks at padding: no mask but the causal one.
        """
        rate = self.dropout if self.training else 0.0
        if rate == 0.0 or query.device.type != "cpu":
            return functional.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        # with dropout torch's CPU form materialises the weights as well, and draws its mask slowly
        t, width = query.shape[-2:]
        future = torch.full((t, t), -torch.inf, dtype=query.dtype).triu(1)
        weights = torch.softmax(query * width**-0.5 @ key.transpose(-2, -1) + future, dim=-1)
        return dropout(weights, rate, True) @ value


class Sasrec(DotRecommender):
    """Transformer over the last items of a user, tied input and output embeddings (Kang and McAuley, ICDM 2018).

    Trained here with cross-entropy over all items at every position, which ranks better than the paper's one sampled
    negative (Klenitskiy and Vasilev, RecSys 2023). Index ``n_items`` of the embedding is padding.
    """

    kind: ClassVar[str] = "sasrec"
    sequential: ClassVar[bool] = True

    def __init__(self, n_users: int, n_items: int, options: SasrecOptions) -> None:
        super().__init__()
        self.n_users, self.n_items, self.options = n_users, n_items, options
        self.item = nn.Parameter(torch.randn(n_items + 1, options.dimension) * options.scale)
        self.position = nn.Parameter(torch.randn(options.length, options.dimension) * options.scale)
        self.blocks = nn.ModuleList(_Block(options) for _ in range(options.layers))
        self.norm = nn.LayerNorm(options.dimension)

    def hidden(self, sequences: Tensor) -> Tensor:
        """Return the state after every item, float32 [B, T, D], of ``sequences`` int64 [B, T], T <= length."""
        t = sequences.shape[1]
        # counted from the end of the window, positions would shift while a user is served; from its start they stay
        x = functional.embedding(sequences, self.item) * self.options.dimension**0.5 + self.position[:t]
        x = dropout(x, self.options.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def user_vectors(self, users: Tensor, histories: Histories) -> Tensor:
        """Return the state after the last item of each history, float32 [B, D]; zeros for an empty history."""
        sequences, lengths = last_items(histories, users.cpu().numpy(), self.options.length)
        device = self.item.device
        hidden = self.hidden(torch.from_numpy(sequences).to(device))
        last = torch.from_numpy(lengths).to(device)
        rows = torch.arange(len(users), device=device)
        return hidden[rows, (last - 1).clamp(min=0)] * (last > 0)[:, None]

    def item_vectors(self) -> Tensor:
        """Return the item embedding without padding, float32 [n_items, D]."""
        return self.item[: self.n_items]


def last_items(histories: Histories, users: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the last ``length`` items of each user, oldest first, padded right with ``n_items``.

    Returns:
        sequences int64 [B, T] with T the longest of them (at least 1), lengths int64 [B].
    """
    stop = histories.indptr[users + 1]
    lengths = np.minimum(stop - histories.indptr[users], length)
    return gather_windows(histories, stop - lengths, lengths)


def gather_windows(histories: Histories, start: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return windows of ``histories.items`` as int64 [B, T], padded right with ``n_items``, and their lengths."""
    width = max(int(lengths.max(initial=0)), 1)
    offset = np.arange(width)
    valid = offset < lengths[:, None]
    sequences = np.full((len(start), width), histories.n_items, dtype=np.int64)
    sequences[valid] = histories.items[(start[:, None] + offset)[valid]]
    return sequences, lengths.astype(np.int64)
