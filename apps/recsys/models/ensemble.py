"""Several teachers as one: the weighted mean of their standardised scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from apps.recsys.data.histories import Histories
from apps.recsys.models.base import Recommender
from kdcore.config import UserError
from kdcore.teaching import average_scores


@dataclass(frozen=True)
class EnsembleOptions:
    """Weight of each member; none means equal."""

    weights: list[float] = field(default_factory=list)


class Ensemble(Recommender):
    """Mean of the members' scores, each standardised per user: members need not share a scale.

    If one member reads histories, all are given them (the others then fold in what came after their fit).
    """

    kind: ClassVar[str] = "ensemble"

    def __init__(self, members: Sequence[Recommender], weights: Sequence[float] = ()) -> None:
        super().__init__()
        if not members:
            raise UserError("teacher.members: wanted at least one member, got none")
        if weights and len(weights) != len(members):
            raise UserError(f"teacher.weights: got {len(weights)} weights, wanted {len(members)}, one a member")
        self.members = nn.ModuleList(members)
        self.options = EnsembleOptions(list(weights))
        self.n_users, self.n_items = members[0].n_users, members[0].n_items
        self.sequential = any(member.sequential for member in members)  # type: ignore[misc]

    def label(self) -> str:
        """Return the members' names joined."""
        return "+".join(member.label() for member in self.members)  # type: ignore[operator]

    @torch.no_grad()
    def scores(self, users: Tensor, histories: Histories) -> Tensor:
        """Return the weighted mean of standardised scores, float32 [B, n_items]."""
        parts = [member.scores(users, histories) for member in self.members]  # type: ignore[operator]
        return average_scores(parts, weights=self.options.weights or None, normalise="zscore")
