"""Relaxed ranking: the order of interesting items above unordered uninteresting ones, for users and for items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from apps.recsys.data.histories import Histories
from apps.recsys.knowledge.base import Knowledge, Lessons, Score, TeacherLists
from apps.recsys.models.base import Encoded
from apps.recsys.sampling import Membership, sample_unseen
from kdcore.config import UserError
from kdcore.losses import ranking
from kdcore.trainer import Batch

# queries whose lists are drawn at a time: bounds the memory of the noise, [rows, length] floats
_DRAW_ROWS = 16_384


@dataclass(frozen=True)
class RelaxedRankingOptions:
    """Defaults of the authors' code."""

    length: int = 500
    interesting: int = 40
    uninteresting: int = 40
    # p(rank r) ~ exp(-r / temperature); sampling 'none' always takes the first `interesting`
    temperature: float = 10.0
    sampling: str = "exp"


class RelaxedRanking(Knowledge):
    """The order of interesting items above unordered uninteresting ones (Plackett-Luce, relaxed).

    Reference: Kang et al., CIKM 2020 (RRD); sampling 'none' after their later note.
    """

    name = "relaxed_ranking"
    options_type = RelaxedRankingOptions

    def __init__(self, options: RelaxedRankingOptions, lessons: Lessons) -> None:
        super().__init__(options, lessons)
        self.length = min(options.length, self._candidates())
        self._excluded: Membership | None = None
        self._drawn: dict[str, Tensor] = {}

    def _candidates(self) -> int:
        return self.lessons.n_items

    def _lists(self) -> TeacherLists:
        return self.lessons.lists(self.length)

    def _uninteresting(self, queries: Tensor, generator: torch.Generator) -> Tensor:
        """Draw items neither seen nor in the teacher's list."""
        if self._excluded is None:
            lists = torch.from_numpy(np.asarray(self._lists().items, dtype=np.int64))
            one_list_a_user = len(lists) == self.lessons.n_users
            self._excluded = Membership(self.lessons.train, lists if one_list_a_user else None)
        return sample_unseen(self._excluded, self.lessons.user_of(queries), self.options.uninteresting, generator)

    def draw(self, generator: torch.Generator) -> None:
        """Draw every query's lists for the epoch, as the authors do, where a query comes up in many batches."""
        if self.lessons.by_position:
            return
        queries = torch.arange(len(self._lists().items))
        blocks = [self._lesson(block, generator) for block in queries.split(_DRAW_ROWS)]
        self._drawn = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}

    def prepare(self, queries: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the interesting and the uninteresting items of every query."""
        if self.lessons.by_position:
            drawn = self._lesson(queries, generator)
        else:
            drawn = {name: rows[queries] for name, rows in self._drawn.items()}
        return {name: rows.long() if rows.dtype == torch.int32 else rows for name, rows in drawn.items()}

    def _lesson(self, queries: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the lists of some queries; int32, since they are kept for all queries of an epoch."""
        options = self.options
        k = min(options.interesting, self.length)
        positions = ranking.sample_interesting(
            len(queries), self.length, k, options.temperature, generator, sampling=options.sampling
        )
        items, scores = self._lists().take(queries, positions)
        return {
            "interesting": items.to(torch.int32),
            "mask": torch.isfinite(scores),
            "uninteresting": self._uninteresting(queries, generator).to(torch.int32),
        }

    def loss(self, batch: Batch, queries: Tensor, score: Score, encoded: Encoded | None) -> Tensor:
        """Return the relaxed ranking loss, summed over queries."""
        return ranking.relaxed_ranking(
            score(queries, batch["interesting"]),
            score(queries, batch["uninteresting"]),
            mask=batch["mask"],
            reduction="sum",
        )


@dataclass(frozen=True)
class ItemRelaxedRankingOptions(RelaxedRankingOptions):
    """Defaults of the authors' code for the item side."""

    interesting: int = 20
    uninteresting: int = 20


class ItemRelaxedRanking(RelaxedRanking):
    """The same loss with the sides exchanged: an item ranks users (IR-RRD).

    Reference: Kang et al., Item-side ranking regularized distillation, Information Sciences 2021.
    """

    name = "item_relaxed_ranking"
    options_type = ItemRelaxedRankingOptions
    items_ask = True

    def __init__(self, options: ItemRelaxedRankingOptions, lessons: Lessons) -> None:
        super().__init__(options, lessons)
        self._transposed: Membership | None = None

    def _candidates(self) -> int:
        return self.lessons.n_users

    def _lists(self) -> TeacherLists:
        return self.lessons.user_lists(self.length)

    def _uninteresting(self, queries: Tensor, generator: torch.Generator) -> Tensor:
        """Draw users who neither had the item nor stand in its list."""
        if self._transposed is None:
            train = self.lessons.train
            by_item = Histories.from_pairs(train.items, train.users(), train.n_items, train.n_users)
            self._transposed = Membership(by_item, torch.from_numpy(np.asarray(self._lists().items, dtype=np.int64)))
        return sample_unseen(self._transposed, queries, self.options.uninteresting, generator)

    def loss(self, batch: Batch, queries: Tensor, score: Score, encoded: Encoded | None) -> Tensor:
        """Return the relaxed ranking loss over users, summed over items."""
        if encoded is None:
            raise UserError("item_relaxed_ranking: wanted a student with user vectors (mf, two_tower), got sasrec")
        return ranking.relaxed_ranking(
            encoded.columns(queries, batch["interesting"]),
            encoded.columns(queries, batch["uninteresting"]),
            mask=batch["mask"],
            reduction="sum",
        )
