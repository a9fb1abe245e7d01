"""The teacher's probabilities of all items, whole or kept for its top items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from apps.recsys.knowledge.base import Knowledge, Score
from apps.recsys.models.base import Encoded
from apps.recsys.models.kernels import LinearScore, linear_sparse_soft_targets
from apps.recsys.models.options import above_zero, at_least
from kdcore.losses import response, sparse
from kdcore.trainer import Batch


@dataclass(frozen=True)
class SoftTargetsOptions:
    """Temperatures of the listwise soft targets."""

    # divides teacher and student scores alike
    temperature: float = 1.0
    # multiplies the standardised scores of a teacher without a scale of its own: how peaked the target is
    sharpness: float = 3.0

    def __post_init__(self) -> None:
        above_zero(self, "temperature", "sharpness")


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

    def __post_init__(self) -> None:
        at_least(self, length=1)
        above_zero(self, "temperature")


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
        items, log_probs, temperature = batch["items"], batch["log_probs"], self.options.temperature
        if isinstance(score, LinearScore):  # the same loss, without ever holding the scores of all items
            return linear_sparse_soft_targets(score.hidden, score.weight, items, log_probs, temperature)
        return sparse.sparse_soft_targets(score(queries), items, log_probs, temperature=temperature, reduction="sum")
