"""Relaxed ranking: the order of interesting items above unordered uninteresting ones, for users and for items."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apps.recsys.data.histories import Histories
from apps.recsys.knowledge.base import Knowledge, Lessons, Score, TeacherLists
from apps.recsys.models.base import Encoded
from apps.recsys.models.options import above_zero, at_least
from apps.recsys.sampling import Membership, sample_unseen
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

    def __post_init__(self) -> None:
        at_least(self, length=1, interesting=1, uninteresting=1)
        above_zero(self, "temperature")
        if self.sampling not in ("exp", "none"):
            raise ValueError(f"sampling: got {self.sampling!r}, wanted 'exp' or 'none'")


class RelaxedRanking(Knowledge):
    """The order of interesting items above unordered uninteresting ones (Plackett-Luce, relaxed).

    Reference: Kang et al., CIKM 2020 (RRD); sampling 'none' after their later note.
    """

    name = "relaxed_ranking"
    options_type = RelaxedRankingOptions

    def __init__(self, options: RelaxedRankingOptions, lessons: Lessons) -> None:
        super().__init__(options, lessons)
        self.length = min(options.length, self._candidates())
        self._drawn: dict[str, Tensor] = {}

    def _candidates(self) -> int:
        return self.lessons.n_items

    def _lists(self) -> TeacherLists:
        return self.lessons.lists(self.length)

    def _seen(self) -> Membership:
        return self.lessons.seen()

    def _rows(self, queries: Tensor) -> Tensor:
        """Return the row of ``_seen`` that each query stands for."""
        return self.lessons.user_of(queries)

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
        listed, scores = self._lists().take(queries)
        # neither seen nor in the teacher's list
        uninteresting = sample_unseen(self._seen(), self._rows(queries), options.uninteresting, generator, listed)
        return {
            "interesting": listed.gather(1, positions).to(torch.int32),
            "mask": torch.isfinite(scores.gather(1, positions)),
            "uninteresting": uninteresting.to(torch.int32),
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
    needs_user_vectors = True

    def __init__(self, options: ItemRelaxedRankingOptions, lessons: Lessons) -> None:
        super().__init__(options, lessons)
        self._transposed: Membership | None = None

    def _candidates(self) -> int:
        return self.lessons.n_users

    def _lists(self) -> TeacherLists:
        return self.lessons.user_lists(self.length)

    def _seen(self) -> Membership:
        """Return which item has which user."""
        if self._transposed is None:
            train = self.lessons.train
            self._transposed = Membership(
                Histories.from_pairs(train.items, train.users(), train.n_items, train.n_users)
            )
        return self._transposed

    def _rows(self, queries: Tensor) -> Tensor:
        return queries

    def loss(self, batch: Batch, queries: Tensor, score: Score, encoded: Encoded | None) -> Tensor:
        """Return the relaxed ranking loss over users, summed over items."""
        if encoded is None:
            raise TypeError(f"{self.name}: wanted the student's vectors, got None")
        return ranking.relaxed_ranking(
            encoded.columns(queries, batch["interesting"]),
            encoded.columns(queries, batch["uninteresting"]),
            mask=batch["mask"],
            reduction="sum",
        )
