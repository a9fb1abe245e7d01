"""What a teacher passes on: one class a way of teaching, each made of kdcore losses.

A student answers for *queries*: for a factor model a query is a user; for a sequential model it is a position in a
user's history. A knowledge adds what it needs to a batch (which items of the teacher's list to ask for) and sums its
loss over the batch's queries from the student's scores of those items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from apps.recsys.data.histories import Histories
from apps.recsys.models.base import DotRecommender, Encoded
from apps.recsys.sampling import Membership, sample_unseen
from kdcore.config import UserError
from kdcore.losses import ranking, response
from kdcore.trainer import Batch

# queries whose lists are drawn at a time: bounds the memory of the noise, [rows, length] floats
_DRAW_ROWS = 16_384


@dataclass
class TeacherLists:
    """The teacher's top-K unobserved items of every query, best first, and their scores (memory-mapped).

    ``items`` int32 [n_queries, K], ``scores`` float32 [n_queries, K].
    """

    items: np.ndarray
    scores: np.ndarray

    def take(self, queries: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return items int64 and scores float32 of ``queries`` int64 [B], at ``positions`` int64 [B, K] if given."""
        rows = queries.numpy()
        if positions is None:
            items, scores = self.items[rows], self.scores[rows]
        else:
            items, scores = self.items[rows[:, None], positions.numpy()], self.scores[rows[:, None], positions.numpy()]
        return torch.from_numpy(items.astype(np.int64)), torch.from_numpy(np.ascontiguousarray(scores))


class Lessons(Protocol):
    """Where a knowledge gets a teacher's outputs from: computed on first use, cached on disk."""

    n_users: int
    n_items: int
    train: Histories
    # width of the student's vectors
    student_dimension: int
    # False: a query is a user; True: a query is a place in the training log
    by_position: bool

    def lists(self, length: int) -> TeacherLists:
        """Return the top-``length`` unobserved items of every query."""

    def user_lists(self, length: int) -> TeacherLists:
        """Return the top-``length`` users of every item among those who have not had it."""

    def log_probabilities(self, length: int, temperature: float) -> TeacherLists:
        """Return the teacher's ``length`` most probable items of every query and their log-probabilities."""

    def full_scores(self) -> np.ndarray:
        """Return all scores of the teacher, float32 [n_queries, n_items]."""

    def vectors(self) -> DotRecommender:
        """Return the teacher as a model with user and item vectors."""

    def seen(self) -> Membership:
        """Return which user has which item in training."""

    def user_of(self, queries: Tensor) -> Tensor:
        """Return the user of each query, int64 of the same shape."""


class Score(Protocol):
    """The student's scores for the queries of a batch."""

    def __call__(self, queries: Tensor, items: Tensor | None = None) -> Tensor:
        """Return float32 [B, K] for item lists int64 [B, K], or [B, n_items] for all items."""


class Knowledge(nn.Module):
    """One way of teaching: prepares a batch, then sums its loss over it.

    ``options`` is a frozen dataclass; ``name`` prefixes the tensors it adds to a batch.
    """

    name: ClassVar[str]
    options_type: ClassVar[type]
    items_ask: ClassVar[bool] = False  # True: queries are the batch's unique items, not its users

    def __init__(self, options: Any, lessons: Lessons) -> None:
        super().__init__()
        self.options, self.lessons = options, lessons

    def begin_epoch(self, epoch: int, max_epochs: int, student: DotRecommender, generator: torch.Generator) -> None:
        """Refresh what depends on the student; results live in buffers."""

    def draw(self, generator: torch.Generator) -> None:
        """Draw what is drawn once an epoch, from the generator alone: a resumed run draws it again."""

    def prepare(self, queries: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Return the tensors this knowledge needs for ``queries`` int64 [B], rows aligned with them."""
        raise TypeError(f"{type(self).__name__} does not define prepare()")

    def loss(self, batch: Batch, queries: Tensor, score: Score, encoded: Encoded | None) -> Tensor:
        """Return the sum of the loss over ``queries``; ``batch`` has what ``prepare`` returned."""
        raise TypeError(f"{type(self).__name__} does not define loss()")


@dataclass(frozen=True)
class RankingDistillationOptions:
    """Defaults of the authors' code."""

    length: int = 10
    # position weight exp(-rank / position_scale)
    position_scale: float = 1.0
    # discrepancy weight tanh(mu * (student rank - teacher rank)), ranks estimated from `sample` random items
    mu: float = 0.1
    sample: int = 100
    warm_up: int = 10


class RankingDistillation(Knowledge):
    """The teacher's top-K as further positives, weighted by position and by how far the student ranks them too low.

    Reference: Tang and Wang, KDD 2018.
    """

    name = "ranking_distillation"
    options_type = RankingDistillationOptions

    def __init__(self, options: RankingDistillationOptions, lessons: Lessons) -> None:
        super().__init__(options, lessons)
        self.weights: Tensor
        self.dynamic: Tensor
        self.register_buffer("weights", ranking.position_weights(options.length, options.position_scale))
        self.register_buffer("dynamic", torch.zeros((), dtype=torch.bool))

    def begin_epoch(self, epoch: int, max_epochs: int, student: DotRecommender, generator: torch.Generator) -> None:
        """Switch the discrepancy weights on after the warm-up: before it the student's ranks mean nothing."""
        self.dynamic.fill_(epoch >= self.options.warm_up)

    def prepare(self, queries: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Take the teacher's top-K and a uniform sample of unseen items."""
        items, _ = self.lessons.lists(self.options.length).take(queries)
        users = self.lessons.user_of(queries)
        return {"items": items, "sample": sample_unseen(self.lessons.seen(), users, self.options.sample, generator)}

    def loss(self, batch: Batch, queries: Tensor, score: Score, encoded: Encoded | None) -> Tensor:
        """Return sum_r w_r * -log sigma(s_r), summed over queries."""
        scores = score(queries, batch["items"])
        weights = self.weights.expand_as(scores)
        if self.dynamic:
            with torch.no_grad():
                sample = score(queries, batch["sample"])
            weights = weights * ranking.ranking_discrepancy_weights(
                scores.detach(), sample, n_items=self.lessons.n_items, mu=self.options.mu
            )
        return ranking.ranking_distillation(scores, weights=weights, reduction="sum")


@dataclass(frozen=True)
class CollaborativeDistillationOptions:
    """Length of the teacher's ranking that is drawn from, and how."""

    length: int = 1000
    sample: int = 50
    # softens the teacher's scores into probabilities sigma(t / temperature)
    temperature: float = 1.0
    # teacher-guided sampling draws rank r with p ~ exp(-r / rank_scale)
    rank_scale: float = 50.0
    sampling: str = "teacher"
    # student-guided sampling draws with p ~ tanh(mu * (student rank - teacher rank))
    mu: float = 0.01

    def __post_init__(self) -> None:
        if self.sampling not in ("teacher", "student", "mixed"):
            raise ValueError(f"sampling: got {self.sampling!r}, wanted 'teacher', 'student' or 'mixed'")


class CollaborativeDistillation(Knowledge):
    """Soft targets for unobserved items, sampled by rank from the teacher's whole ranking.

    Scores of a teacher are turned into logits by standardising each query's list: a teacher such as EASE has no
    scale of its own on which a sigmoid would mean something.

    Reference: Lee et al., ICDM 2019; the student's ranks are estimated from a uniform sample (RD's estimate).
    """

    name = "collaborative_distillation"
    options_type = CollaborativeDistillationOptions

    def __init__(self, options: CollaborativeDistillationOptions, lessons: Lessons) -> None:
        super().__init__(options, lessons)
        self.length = min(options.length, lessons.n_items)
        self.student_rank: Tensor
        guided = options.sampling != "teacher"
        self.register_buffer(
            "student_rank", torch.zeros(lessons.n_users if guided else 0, self.length, dtype=torch.int32)
        )

    @torch.no_grad()
    def begin_epoch(self, epoch: int, max_epochs: int, student: DotRecommender, generator: torch.Generator) -> None:
        """Estimate the student's rank of every listed item, once an epoch."""
        if not len(self.student_rank):
            return
        encoded = student.encode()
        for start in range(0, len(self.student_rank), 4096):
            users = torch.arange(start, min(start + 4096, len(self.student_rank)))
            items, _ = self.lessons.lists(self.length).take(users)
            listed = encoded.lists(users, items)
            sample = encoded.lists(users, sample_unseen(self.lessons.seen(), users, 100, generator)).sort(dim=1).values
            above = sample.shape[1] - torch.searchsorted(sample, listed.contiguous(), right=True)
            self.student_rank[users] = (above * self.lessons.n_items // sample.shape[1]).to(torch.int32)

    def prepare(self, queries: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw positions of the teacher's list and take their items and standardised scores."""
        options, n = self.options, len(queries)
        k = min(options.sample, self.length)
        by_teacher = k if options.sampling == "teacher" else k // 2 if options.sampling == "mixed" else 0
        parts, masks = [], []
        if by_teacher:
            parts.append(
                ranking.teacher_guided_positions(n, self.length, by_teacher, options.rank_scale, generator)
            )
            masks.append(torch.ones_like(parts[0], dtype=torch.bool))
        if by_teacher < k:
            positions, mask = ranking.student_guided_positions(
                torch.arange(self.length).expand(n, -1),
                self.student_rank[queries],
                k - by_teacher,
                mu=options.mu,
                generator=generator,
            )
            parts.append(positions)
            masks.append(mask)
        positions = torch.cat(parts, dim=1)
        items, scores = self.lessons.lists(self.length).take(queries, positions)
        whole = torch.from_numpy(self.lessons.lists(self.length).scores[queries.numpy()])
        valid = torch.cat(masks, dim=1) & torch.isfinite(scores)
        finite = torch.isfinite(whole)
        count = finite.sum(dim=1, keepdim=True).clamp(min=1)
        centre = whole.where(finite, 0.0).sum(dim=1, keepdim=True) / count
        spread = ((whole - centre).where(finite, 0.0).square().sum(dim=1, keepdim=True) / count).sqrt().clamp(min=1e-6)
        targets = ((scores - centre) / spread).where(valid, 0.0)
        return {"items": items, "targets": targets, "mask": valid}

    def loss(self, batch: Batch, queries: Tensor, score: Score, encoded: Encoded | None) -> Tensor:
        """Return the cross-entropy against the soft targets, summed over items and queries."""
        return ranking.collaborative_distillation(
            score(queries, batch["items"]),
            batch["targets"],
            temperature=self.options.temperature,
            mask=batch["mask"],
            reduction="sum",
        )


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

    Reference: Kang et al., extended version of DE-RRD (Knowledge-Based Systems 2021).
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


@dataclass(frozen=True)
class SoftTargetsOptions:
    """Temperatures of the listwise soft targets."""

    # divides teacher and student scores alike
    temperature: float = 1.0
    # multiplies the standardised scores of a teacher without a scale of its own: how peaked the target is
    sharpness: float = 3.0


class SoftTargets(Knowledge):
    """KL between the teacher's and the student's distribution over all items (Hinton et al., 2015; ListNet's form).

    The teacher's scores are standardised per query, so one ``sharpness`` fits any teacher. It sees observed items as
    well: an item the teacher ranks high and the user had is as true as one to be recommended.
    """

    name = "soft_targets"
    options_type = SoftTargetsOptions

    def prepare(self, queries: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Take the teacher's standardised scores of all items."""
        scores = torch.from_numpy(np.ascontiguousarray(self.lessons.full_scores()[queries.numpy()])).float()
        centred = scores - scores.mean(dim=1, keepdim=True)
        spread = centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
        return {"targets": centred / spread * self.options.sharpness}

    def loss(self, batch: Batch, queries: Tensor, score: Score, encoded: Encoded | None) -> Tensor:
        """Return T^2 KL(teacher || student) over all items, summed over queries."""
        return response.soft_targets(
            score(queries), batch["targets"], temperature=self.options.temperature, reduction="sum"
        )


@dataclass(frozen=True)
class SparseSoftTargetsOptions:
    """How much of the teacher's distribution is kept."""

    length: int = 100
    temperature: float = 1.0


class SparseSoftTargets(Knowledge):
    """The teacher's softmax probabilities of its top items; what is left is one lump, matched as a whole.

    For teachers trained with cross-entropy (sasrec), whose scores are logits, and for any number of queries: only
    ``length`` probabilities of each are kept. T^2 times the KL, as in Hinton et al., 2015.
    """

    name = "sparse_soft_targets"
    options_type = SparseSoftTargetsOptions

    def prepare(self, queries: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Take the teacher's top items and their log-probabilities."""
        kept = self.lessons.log_probabilities(min(self.options.length, self.lessons.n_items), self.options.temperature)
        items, log_probs = kept.take(queries)
        return {"items": items, "log_probs": log_probs}

    def loss(self, batch: Batch, queries: Tensor, score: Score, encoded: Encoded | None) -> Tensor:
        """Return T^2 KL(teacher || student) over the kept items and the lump, summed over queries."""
        return response.sparse_soft_targets(
            score(queries),
            batch["items"],
            batch["log_probs"],
            temperature=self.options.temperature,
            reduction="sum",
        )


@dataclass(frozen=True)
class DistillationExpertsOptions:
    """Defaults of the authors' code."""

    experts: int = 30
    # temperature of the gate in the first and after the last epoch
    start: float = 1.0
    end: float = 1e-10


class DistillationExperts(Knowledge):
    """Experts rebuild the teacher's user vectors from the student's, chosen by a gate that anneals to one expert.

    Experts and gates are thrown away after training. Reference: Kang et al., CIKM 2020 (DE), the users' half.
    """

    name = "distillation_experts"
    options_type = DistillationExpertsOptions

    def __init__(self, options: DistillationExpertsOptions, lessons: Lessons) -> None:
        super().__init__(options, lessons)
        with torch.no_grad():
            target = self._target(lessons.vectors()).detach().clone()
        self.target: Tensor
        self.register_buffer("target", target, persistent=False)
        self.experts = ranking.DistillationExperts(lessons.student_dimension, target.shape[1], options.experts)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.tensor(options.start, dtype=torch.float64))

    def _target(self, teacher: DotRecommender) -> Tensor:
        return teacher.user_vectors(torch.arange(self.lessons.n_users), self.lessons.train)

    def _source(self, encoded: Encoded) -> Tensor:
        return encoded.user

    def begin_epoch(self, epoch: int, max_epochs: int, student: DotRecommender, generator: torch.Generator) -> None:
        """Anneal the gate."""
        value = ranking.annealed_temperature(epoch, max_epochs, self.options.start, self.options.end)
        self.temperature.fill_(value)

    def prepare(self, queries: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Need nothing but the queries: the teacher's vectors are held here."""
        return {}

    def loss(self, batch: Batch, queries: Tensor, score: Score, encoded: Encoded | None) -> Tensor:
        """Return || e_T - h ||^2, summed over queries."""
        if encoded is None:
            raise UserError(f"{self.name}: wanted a student with user vectors (mf, two_tower), got sasrec")
        source = self._source(encoded)[queries]
        return self.experts(source, self.target[queries], temperature=float(self.temperature), reduction="sum")


class ItemDistillationExperts(DistillationExperts):
    """The items' half of DE, with experts of its own; the paper weights it half as much as the users'."""

    name = "item_distillation_experts"
    items_ask = True

    def _target(self, teacher: DotRecommender) -> Tensor:
        return teacher.item_vectors()

    def _source(self, encoded: Encoded) -> Tensor:
        return encoded.item


KNOWLEDGE: dict[str, type[Knowledge]] = {
    cls.name: cls
    for cls in (
        RankingDistillation,
        CollaborativeDistillation,
        RelaxedRanking,
        ItemRelaxedRanking,
        SoftTargets,
        SparseSoftTargets,
        DistillationExperts,
        ItemDistillationExperts,
    )
}

