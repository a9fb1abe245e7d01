"""What every recommender answers: the scores of all items for some users."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from apps.recsys.data.histories import Histories


class Recommender(nn.Module):
    """A model that scores all items for a user.

    ``sequential`` models read the history they are given, so that they see everything up to the item to predict;
    the others are bound to the interactions they were fitted on. ``options`` is the frozen dataclass of the model's
    hyperparameters; a subclass is built by ``cls(n_users, n_items, options)``.
    """

    kind: ClassVar[str]
    sequential: ClassVar[bool] = False
    n_users: int
    n_items: int
    options: Any
    # what it was fitted as, where that differs from how it is stored (ials factors are stored as mf)
    name: str = ""

    def scores(self, users: Tensor, histories: Histories) -> Tensor:
        """Return the scores of all items, float32 [B, n_items], for ``users`` int64 [B]; higher is better."""
        raise TypeError(f"{type(self).__name__} does not define scores()")

    def parameter_count(self) -> int:
        """Return the number of values the model stores to answer (parameters and fitted buffers)."""
        return sum(value.numel() for value in self.state_dict().values())

    def label(self) -> str:
        """Return a short name for tables, such as ``mf-8``."""
        if self.name:
            return self.name
        dimension = getattr(self.options, "dimension", None)
        return f"{self.kind}-{dimension}" if dimension else self.kind


class Encoded:
    """The vectors of users and items as one forward pass sees them.

    A model that computes all vectors at once (a graph convolution) does it once here; losses then gather. The item
    bias rides as one more coordinate against a constant 1, so that one gather (and one gradient) serves both.
    """

    def __init__(self, user: Tensor, item: Tensor, bias: Tensor | None) -> None:
        """Take user [n_users, D], item [n_items, D] and bias [n_items] or None."""
        self.user, self.item, self.bias = user, item, bias
        self._table = item if bias is None else torch.cat([item, bias[:, None]], dim=1)

    def _users(self, users: Tensor) -> Tensor:
        rows = gather_rows(self.user, users)
        return rows if self.bias is None else functional.pad(rows, (0, 1), value=1.0)

    def pair(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores [B] of pairs, users and items int64 [B]."""
        return (self._users(users) * gather_rows(self._table, items)).sum(dim=-1)

    def lists(self, users: Tensor, items: Tensor) -> Tensor:
        """Return the scores [B, K] of item lists int64 [B, K] for users int64 [B]."""
        return (gather_rows(self._table, items) * self._users(users)[:, None]).sum(dim=-1)

    def columns(self, items: Tensor, users: Tensor) -> Tensor:
        """Return the scores [B, K] of user lists int64 [B, K] for items int64 [B]."""
        return (self._users(users) * gather_rows(self._table, items)[:, None]).sum(dim=-1)

    def everything(self, users: Tensor) -> Tensor:
        """Return the scores of all items [B, n_items] for users int64 [B]."""
        return self._users(users) @ self._table.T


def gather_rows(table: Tensor, ids: Tensor) -> Tensor:
    """Return ``table[ids]``; embedding's gradient is several times as fast on a CPU as indexing's."""
    return functional.embedding(ids, table)


class DotRecommender(Recommender):
    """A recommender whose score is an inner product plus an item bias, so that an index can search it."""

    def encode(self) -> Encoded:
        """Return the vectors of all users and items, with gradient, for one training step."""
        raise TypeError(f"{type(self).__name__} does not define encode()")

    def user_vectors(self, users: Tensor, histories: Histories) -> Tensor:
        """Return the vectors of ``users`` int64 [B], float32 [B, D]."""
        raise TypeError(f"{type(self).__name__} does not define user_vectors()")

    def item_vectors(self) -> Tensor:
        """Return the vectors of all items, float32 [n_items, D]."""
        raise TypeError(f"{type(self).__name__} does not define item_vectors()")

    def item_bias(self) -> Tensor | None:
        """Return the bias of all items, float32 [n_items], or None."""
        return None

    def scores(self, users: Tensor, histories: Histories) -> Tensor:
        """Return user vectors times item vectors plus bias, float32 [B, n_items]."""
        vectors = self.user_vectors(users, histories)
        bias = self.item_bias()
        if bias is None:
            return vectors @ self.item_vectors().T
        return torch.addmm(bias, vectors, self.item_vectors().T)
