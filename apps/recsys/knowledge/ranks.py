"""The teacher's order passed on item by item: ranking distillation and collaborative distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apps.recsys.knowledge.base import Knowledge, Lessons, Score
from apps.recsys.models.base import DotRecommender, Encoded
from apps.recsys.models.options import above_zero, at_least
from apps.recsys.sampling import sample_unseen
from kdcore.config import UserError
from kdcore.losses import ranking
from kdcore.trainer import Batch

# users whose whole lists are scored at a time: bounds the memory of their vectors, [users, length, dimension] floats
_RANK_USERS = 512


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

    def __post_init__(self) -> None:
        at_least(self, length=1, sample=1, warm_up=0)
        above_zero(self, "position_scale", "mu")


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
        items, scores = self.lessons.lists(self.options.length).take(queries)
        users = self.lessons.user_of(queries)
        sample = sample_unseen(self.lessons.seen(), users, self.options.sample, generator)
        # a user with fewer unseen items than the list is long has a list that ends early
        return {"items": items, "mask": torch.isfinite(scores), "sample": sample}

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
        return ranking.ranking_distillation(scores, weights=weights, mask=batch["mask"], reduction="sum")


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
        at_least(self, length=1, sample=1)
        above_zero(self, "temperature", "rank_scale", "mu")
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
        if options.sampling != "teacher" and lessons.by_position:
            raise UserError(
                f"{self.name}.sampling: got {options.sampling!r}, wanted 'teacher' for a sequential student: "
                "its ranks at every position of the log are not kept"
            )
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
        device = encoded.item.device
        for users in torch.arange(len(self.student_rank)).split(_RANK_USERS):
            items, _ = self.lessons.lists(self.length).take(users)
            unseen = sample_unseen(self.lessons.seen(), users, 100, generator)
            listed = encoded.lists(users.to(device), items.to(device))
            sample = encoded.lists(users.to(device), unseen.to(device)).sort(dim=1).values
            above = sample.shape[1] - torch.searchsorted(sample, listed.contiguous(), right=True)
            ranks = (self.lessons.n_items - 1) * above // sample.shape[1]
            self.student_rank[users.to(device)] = ranks.to(torch.int32)

    def prepare(self, queries: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw positions of the teacher's list and take their items and standardised scores."""
        options, n = self.options, len(queries)
        k = min(options.sample, self.length)
        by_teacher = k if options.sampling == "teacher" else k // 2 if options.sampling == "mixed" else 0
        parts, masks = [], []
        if by_teacher:
            parts.append(ranking.teacher_guided_positions(n, self.length, by_teacher, options.rank_scale, generator))
            masks.append(torch.ones_like(parts[0], dtype=torch.bool))
        if by_teacher < k:
            student_rank = self.student_rank[queries.to(self.student_rank.device)].cpu()
            if parts:
                student_rank = student_rank.scatter(1, parts[0], 0)  # what one half drew the other does not draw again
            positions, mask = ranking.student_guided_positions(
                torch.arange(self.length).expand(n, -1),
                student_rank,
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
