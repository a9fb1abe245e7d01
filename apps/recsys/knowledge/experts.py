"""The teacher's embeddings rebuilt from the student's by experts that are thrown away after training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from apps.recsys.knowledge.base import Knowledge, Lessons, Score
from apps.recsys.models.base import DotRecommender, Encoded
from apps.recsys.models.options import above_zero, at_least
from kdcore.losses import ranking
from kdcore.trainer import Batch


@dataclass(frozen=True)
class DistillationExpertsOptions:
    """Defaults of the authors' code."""

    experts: int = 30
    # temperature of the gate in the first and after the last epoch
    start: float = 1.0
    end: float = 1e-10

    def __post_init__(self) -> None:
        at_least(self, experts=1)
        above_zero(self, "start", "end")


class DistillationExperts(Knowledge):
    """Experts rebuild the teacher's user vectors from the student's, chosen by a gate that anneals to one expert.

    Experts and gates are thrown away after training. Reference: Kang et al., CIKM 2020 (DE), the users' half.
    """

    name = "distillation_experts"
    options_type = DistillationExpertsOptions
    needs_user_vectors = True
    needs_teacher_vectors = True

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
        users = torch.arange(self.lessons.n_users).split(512)  # a sequential teacher encodes a history for each
        return torch.cat([teacher.user_vectors(block, self.lessons.train) for block in users])

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
            raise TypeError(f"{self.name}: wanted the student's vectors, got None")
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
