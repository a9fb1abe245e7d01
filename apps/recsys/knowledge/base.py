"""What every way of teaching shares: the teacher's lists, the questions it is asked, and the base class.

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
from apps.recsys.sampling import Membership
from kdcore.config import UserError
from kdcore.trainer import Batch


@dataclass
class TeacherLists:
    """The teacher's top-K unobserved items of every query, best first, and their scores (memory-mapped).

    ``items`` int32 [n_queries, K], ``scores`` float32 [n_queries, K]; a list that ends early goes on with item 0 of
    score -inf.
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
    # what the student and the teacher must have; a sequential student has no vectors of all users at once
    needs_user_vectors: ClassVar[bool] = False
    needs_teacher_vectors: ClassVar[bool] = False

    def __init__(self, options: Any, lessons: Lessons) -> None:
        super().__init__()
        if self.needs_user_vectors and lessons.by_position:
            raise UserError(f"knowledge: {self.name} wants a student with a vector a user (mf, lightgcn), got sasrec")
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
