"""A teacher's answers for every user or query, computed once and kept in the run's teacher cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from apps.recsys.data.histories import Histories
from apps.recsys.knowledge import TeacherLists
from apps.recsys.models.base import DotRecommender, Recommender
from apps.recsys.models.ensemble import Ensemble
from apps.recsys.models.linear import Ease
from apps.recsys.models.sasrec import Sasrec
from apps.recsys.models.store import describe
from apps.recsys.sampling import Membership
from apps.recsys.topk import inference, top_k
from kdcore.config import UserError
from kdcore.run import fingerprint
from kdcore.teacher_cache import TeacherCache

# all scores of a teacher are kept only up to this size on disk; beyond it lists do
_FULL_SCORE_BYTES = 4 << 30
# scores held at a time, and queries that a teacher encodes at a time
_ANSWER_CELLS, _ANSWER_QUERIES = 1 << 24, 512
Progress = Callable[[str, int, int], None]


def model_fingerprint(model: Recommender) -> str:
    """Return a fingerprint of what a model answers from: kind, options and all weights."""
    weights = (part for name, value in model.state_dict().items() for part in (name, value.cpu().numpy()))
    return fingerprint(describe(model), *weights)


def reads_histories(model: Recommender) -> bool:
    """Return whether a model answers from the history it is given alone, so that it can be asked about any prefix.

    A factor model knows users, not histories: asked for row r it would answer for user r.
    """
    if isinstance(model, Ensemble):
        return all(reads_histories(member) for member in model.members)  # type: ignore[arg-type]
    return isinstance(model, Sasrec | Ease)


class TeacherLessons:
    """What a student asks of its teacher, for every query.

    With ``by_position`` False a query is a user and the teacher answers from the whole training history. With True a
    query is a place in the training log, and the teacher answers from that user's last ``context`` items up to it: the
    teacher must be one that reads histories.
    """

    def __init__(
        self,
        teacher: Recommender,
        train: Histories,
        cache: TeacherCache,
        *,
        student_dimension: int,
        by_position: bool = False,
        context: int = 50,
        progress: Progress | None = None,
    ) -> None:
        if by_position and not reads_histories(teacher):
            raise UserError(
                f"teacher: a sequential student needs one that answers from any history, got {teacher.label()}; "
                "wanted sasrec, ease, or an ensemble of those"
            )
        self.teacher, self.train, self.cache = teacher, train, cache
        self.n_users, self.n_items = train.n_users, train.n_items
        self.student_dimension = student_dimension
        self.by_position, self.context = by_position, context
        self.n_queries = len(train) if by_position else self.n_users
        self._progress = progress
        self._lists: dict[int, TeacherLists] = {}
        self._user_lists: dict[int, TeacherLists] = {}
        self._log_probabilities: dict[tuple[int, float], TeacherLists] = {}

    @cached_property
    def _data_key(self) -> str:
        asked = f"positions of {self.context}" if self.by_position else "users"
        return fingerprint(self.train.indptr, self.train.items, asked)

    @cached_property
    def _teacher_key(self) -> str:
        return model_fingerprint(self.teacher)

    @cached_property
    def _seen(self) -> Membership:
        return Membership(self.train)

    def seen(self) -> Membership:
        """Return which user has which item in training."""
        return self._seen

    def user_of(self, queries: Tensor) -> Tensor:
        """Return the user of each query, int64 of the same shape."""
        if not self.by_position:
            return queries
        return torch.searchsorted(torch.from_numpy(self.train.indptr), queries, right=True) - 1

    def _question(self, start: int, stop: int) -> tuple[np.ndarray, Histories]:
        """Return the users to ask the teacher for, and the histories it may know, for queries [start, stop)."""
        if not self.by_position:
            return np.arange(start, stop), self.train
        place = np.arange(start, stop)
        first = self.train.indptr[self.user_of(torch.from_numpy(place)).numpy()]
        begin = np.maximum(first, place + 1 - self.context)
        indptr = np.concatenate([[0], np.cumsum(place + 1 - begin)])
        offset = np.arange(indptr[-1]) - np.repeat(indptr[:-1], np.diff(indptr))
        items = self.train.items[np.repeat(begin, np.diff(indptr)) + offset]
        return np.arange(stop - start), Histories(indptr, items, self.n_items)

    def _answers(self, start: int, stop: int, keep: Callable[[Tensor], tuple[Tensor, ...]]) -> list[np.ndarray]:
        """Return what ``keep`` takes from the scores float32 [B, n_items] of queries [start, stop), in small blocks."""
        step = max(1, min(_ANSWER_QUERIES, _ANSWER_CELLS // self.n_items))
        kept = []
        with inference(self.teacher):
            for first in range(start, stop, step):
                users, histories = self._question(first, min(first + step, stop))
                kept.append(keep(self.teacher.scores(torch.from_numpy(users), histories)))
        return [torch.cat(parts).numpy() for parts in zip(*kept, strict=True)]

    def vectors(self) -> DotRecommender:
        """Return the teacher; UserError if it has no vectors."""
        if not isinstance(self.teacher, DotRecommender):
            raise UserError(
                f"distillation_experts: the teacher is {self.teacher.kind}, which has no user and item vectors; "
                "wanted lightgcn, ials, mf or sasrec"
            )
        return self.teacher

    def lists(self, length: int) -> TeacherLists:
        """Return the teacher's top-``length`` unobserved items of every query.

        Where there are fewer the list ends in item 0 with the score -inf.
        """
        if length not in self._lists:

            def compute(start: int, stop: int) -> dict[str, np.ndarray]:
                parts = []
                for first in range(start, stop, self.n_users):  # row numbers stand for users: no more than there are
                    users, histories = self._question(first, min(first + self.n_users, stop))
                    parts.append(top_k(self.teacher, users, length, histories, histories))
                items, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
                return {"items": np.maximum(items, 0), "scores": scores}

            entry = self.cache.get_or_compute(
                data=self._data_key,
                teacher=self._teacher_key,
                kind=f"topk-{length}",
                n_rows=self.n_queries,
                fields={"items": ("int32", (length,)), "scores": ("float32", (length,))},
                compute=compute,
                block_rows=max(1024, (1 << 22) // length),
                progress=self._report("teacher's lists"),
            )
            self._lists[length] = TeacherLists(entry["items"], entry["scores"])
        return self._lists[length]

    def log_probabilities(self, length: int, temperature: float) -> TeacherLists:
        """Return the teacher's ``length`` most probable items of every query and their log-probabilities."""
        key = length, temperature
        if key not in self._log_probabilities:

            def most_probable(scores: Tensor) -> tuple[Tensor, ...]:
                log_probs, items = torch.log_softmax(scores / temperature, dim=1).topk(length, dim=1)
                return items.to(torch.int32), log_probs

            def compute(start: int, stop: int) -> dict[str, np.ndarray]:
                items, log_probs = self._answers(start, stop, most_probable)
                return {"items": items, "log_probs": log_probs}

            entry = self.cache.get_or_compute(
                data=self._data_key,
                teacher=self._teacher_key,
                kind=f"log-probabilities-{length}-T{temperature!r}",
                n_rows=self.n_queries,
                fields={"items": ("int32", (length,)), "log_probs": ("float32", (length,))},
                compute=compute,
                block_rows=max(256, (1 << 24) // self.n_items),
                progress=self._report("teacher's probabilities"),
            )
            self._log_probabilities[key] = TeacherLists(entry["items"], entry["log_probs"])
        return self._log_probabilities[key]

    def user_lists(self, length: int) -> TeacherLists:
        """Return the top-``length`` users of every item among those who have not had it.

        One pass over the users keeps the best of every item so far: memory is n_items x length, whatever n_users.
        """
        if length not in self._user_lists:
            entry = self.cache.get_or_compute(
                data=self._data_key,
                teacher=self._teacher_key,
                kind=f"users-topk-{length}",
                n_rows=self.n_items,
                fields={"items": ("int32", (length,)), "scores": ("float32", (length,))},
                compute=lambda start, stop: self._best_users(length),
                block_rows=self.n_items,
            )
            self._user_lists[length] = TeacherLists(entry["items"], entry["scores"])
        return self._user_lists[length]

    @torch.no_grad()
    def _best_users(self, length: int) -> dict[str, np.ndarray]:
        block = max(1, min(1024, (1 << 24) // self.n_items))
        best_scores = torch.full((self.n_items, length), -torch.inf)
        best_users = torch.zeros((self.n_items, length), dtype=torch.int64)
        report = self._report("teacher's user lists")
        for start in range(0, self.n_users, block):
            users = np.arange(start, min(start + block, self.n_users))
            scores = self.teacher.scores(torch.from_numpy(users), self.train).clone()
            row, item = self.train.rows(users)
            scores[torch.from_numpy(row), torch.from_numpy(item)] = -torch.inf
            merged = torch.cat([best_scores, scores.T], dim=1)
            candidates = torch.cat([best_users, torch.from_numpy(users).expand(self.n_items, -1)], dim=1)
            # a stable sort keeps the lower user first among equal scores, whatever the block size
            order = merged.sort(dim=1, descending=True, stable=True).indices[:, :length]
            best_scores, best_users = merged.gather(1, order), candidates.gather(1, order)
            if report is not None:
                report(int(users[-1]) + 1, self.n_users)
        return {"items": best_users.numpy().astype(np.int32), "scores": best_scores.numpy()}

    def full_scores(self) -> np.ndarray:
        """Return the teacher's scores of all items for every query, float32 [n_queries, n_items]."""
        if self.n_queries * self.n_items * 4 > _FULL_SCORE_BYTES:
            raise UserError(
                f"soft_targets: all scores of {self.n_queries} queries x {self.n_items} items take more than "
                f"{_FULL_SCORE_BYTES >> 30} GiB; wanted sparse_soft_targets or relaxed_ranking, which keep lists"
            )

        def compute(start: int, stop: int) -> dict[str, np.ndarray]:
            return {"scores": self._answers(start, stop, lambda scores: (scores,))[0]}

        return self.cache.get_or_compute(
            data=self._data_key,
            teacher=self._teacher_key,
            kind="scores",
            n_rows=self.n_queries,
            fields={"scores": ("float32", (self.n_items,))},
            compute=compute,
            progress=self._report("teacher's scores"),
        )["scores"]

    def _report(self, what: str) -> Callable[[int, int], None] | None:
        progress = self._progress
        return None if progress is None else lambda done, total: progress(what, done, total)
