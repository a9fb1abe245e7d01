"""Made-up histories, splits and teachers for the tests of models and teaching, small enough to check by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from apps.recsys.data.histories import Histories
from apps.recsys.data.splits import Split, make_split
from apps.recsys.lessons import TeacherLessons
from apps.recsys.models.base import Recommender
from apps.recsys.models.factors import MatrixFactorization
from apps.recsys.models.sasrec import Sasrec, SasrecOptions
from kdcore.teacher_cache import TeacherCache


@dataclass(frozen=True)
class TableOptions:
    """A table has none."""


class Table(Recommender):
    """Scores read from a matrix [n_users, n_items]."""

    kind = "table"

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", scores)
        self.n_users, self.n_items = scores.shape
        self.options = TableOptions()

    def scores(self, users, histories):
        return self.table[users]


def history_of(lists: list[list[int]], n_items: int) -> Histories:
    """Return histories with exactly these items, oldest first."""
    indptr = np.cumsum([0, *map(len, lists)])
    return Histories(indptr, np.array([item for each in lists for item in each], dtype=np.int32), n_items)


def histories(n_users: int = 12, n_items: int = 20, *, longest: int = 9, shortest: int = 0, seed: int = 0) -> Histories:
    """Return random histories of distinct items."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(shortest, longest + 1, size=n_users)
    return history_of([rng.permutation(n_items)[:size].tolist() for size in sizes], n_items)


def split(n_users: int = 12, n_items: int = 20, *, longest: int = 9, seed: int = 0) -> Split:
    """Return a split whose parts do not overlap; every user has 2 items in valid and 2 in test."""
    rng = np.random.default_rng(seed)
    parts: list[list[list[int]]] = [[], [], []]
    for _ in range(n_users):
        items = rng.permutation(n_items)
        cuts = np.cumsum([rng.integers(2, longest + 1), 2, 2])
        for part, own in zip(parts, np.split(items, cuts)[:3], strict=True):
            part.append(own.tolist())
    return make_split("made up", *(history_of(part, n_items) for part in parts))


def factors(n_users: int, n_items: int, dimension: int = 4, *, bias: bool = True, seed: int = 0) -> MatrixFactorization:
    """Return a factor model with scores of about unit size."""
    g = torch.Generator().manual_seed(seed)
    return MatrixFactorization.from_vectors(
        torch.randn(n_users, dimension, generator=g),
        torch.randn(n_items, dimension, generator=g),
        torch.randn(n_items, generator=g) if bias else None,
    )


def sasrec(n_users: int, n_items: int, *, length: int = 5, seed: int = 0, dimension: int = 8) -> Sasrec:
    """Return a random sequential model whose scores differ clearly, in evaluation mode."""
    torch.manual_seed(seed)
    options = SasrecOptions(dimension=dimension, layers=2, heads=2, length=length, dropout=0.2, scale=0.5)
    return Sasrec(n_users, n_items, options).eval()


def lessons(teacher: Recommender, train: Histories, folder: Path, **options) -> TeacherLessons:
    """Return a teacher's lessons, cached in ``folder``."""
    return TeacherLessons(teacher, train, TeacherCache(folder / "cache"), student_dimension=3, **options)


def prefixes(train: Histories, length: int) -> list[tuple[int, np.ndarray]]:
    """Return (user, the last ``length`` items up to and with it) of every place in the log, in its order."""
    found = []
    for user in range(train.n_users):
        own = train.of(user)
        found += [(user, own[max(0, place + 1 - length) : place + 1]) for place in range(len(own))]
    return found


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
