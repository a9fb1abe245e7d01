"""Several teachers of one student: whom it listens to, row by row and step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.teaching.registry import teaching
from kdcore.teaching.step import DistillationStep
from kdcore.trainer import Batch

Strategy = Literal["average", "random", "confidence", "agreement", "curriculum"]


def _stacked(logits: Sequence[Tensor]) -> Tensor:
    """Return the teachers' logits as [M, B, C] without gradient."""
    if not logits:
        raise ValueError("teachers: wanted at least 1, got 0")
    shapes = {tuple(each.shape) for each in logits}
    if len(shapes) != 1 or logits[0].dim() != 2:
        raise ValueError(f"teachers: wanted logits [B, C] of one shape, got {sorted(shapes)}")
    return torch.stack([each.detach().float() for each in logits])


def _entropy(log_p: Tensor) -> Tensor:
    """Return the entropies over the last axis; a class of probability 0 adds nothing."""
    return torch.special.entr(log_p.exp()).sum(-1)


def confidence_weights(logits: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
    """Return how far each teacher is to be trusted on each row, [M, B], summing to 1 over teachers.

    With labels the surer of the true class the more, (1 - softmax of the teachers' cross-entropies) / (M - 1); without,
    a softmax of the negative entropies of what they say. One teacher has weight 1.

    Reference: Zhang et al., Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022 (with labels).
    """
    log_p = torch.log_softmax(_stacked(logits), 2)
    if len(log_p) == 1:
        return torch.ones(log_p.shape[:2], device=log_p.device)
    if labels is None:
        return torch.softmax(-_entropy(log_p), 0)
    errors = -log_p.gather(2, labels.expand(len(log_p), -1)[:, :, None])[:, :, 0]
    return (1 - torch.softmax(errors, 0)) / (len(log_p) - 1)


def agreement_weights(logits: Sequence[Tensor]) -> Tensor:
    """Return weights [M, B] of teachers by how near they are to what all say together: softmax of -KL(mean || teacher).

    An outlier on a row counts less there; it is the soft form of a majority vote.

    Reference: after You et al., Learning from Multiple Teacher Networks, KDD 2017 (vote over relations), on answers.
    """
    log_p = torch.log_softmax(_stacked(logits), 2)
    log_mean = torch.logsumexp(log_p, 0) - math.log(len(log_p))
    return torch.softmax(-(log_mean.exp() * (log_mean - log_p)).sum(2), 0)


def mixture(logits: Sequence[Tensor], weights: Tensor, temperature: float) -> Tensor:
    """Return T * log sum_m w_m softmax(t_m / T), float32 [B, C]: as ``teacher`` of soft_targets it is the mixture.

    Shapes: M logits [B, C]; weights [M, B], summing to 1 over teachers.

    Raises:
        ValueError: shapes do not fit, weights that do not sum to 1, or temperature <= 0.
    """
    stacked = _stacked(logits)
    if not temperature > 0:
        raise ValueError(f"temperature: wanted a number > 0, got {temperature}")
    if tuple(weights.shape) != tuple(stacked.shape[:2]):
        raise ValueError(f"weights: wanted shape {tuple(stacked.shape[:2])}, got {tuple(weights.shape)}")
    total = weights.sum(0)
    if not bool(((total - 1).abs() <= 1e-4).all()) or bool((weights < 0).any()):
        raise ValueError(f"weights: wanted numbers >= 0 that sum to 1 a row, got sums {total.min()} to {total.max()}")
    log_p = torch.log_softmax(stacked / temperature, 2)
    return temperature * torch.logsumexp(log_p + weights.log()[:, :, None], 0)


def easiest(difficulty: Tensor, share: float) -> Tensor:
    """Return which rows are among the easiest ``share`` (0..1) of a batch, bool [B]; at least one is."""
    if not 0 <= share <= 1:
        raise ValueError(f"share: wanted 0..1, got {share}")
    kept = max(1, round(share * len(difficulty)))
    mask = torch.zeros_like(difficulty, dtype=torch.bool)
    mask[difficulty.argsort(stable=True)[:kept]] = True
    return mask


@teaching(
    "several_teachers",
    "step",
    "two or more teachers of the student's classes; labels for confidence",
    "Fukuda et al., Interspeech 2017 (random); Zhang et al., ICASSP 2022 (confidence); You et al., KDD 2017 "
    "(agreement); Bengio et al., Curriculum Learning, ICML 2009, on the teachers' difficulty",
)
class SeveralTeachersStep(DistillationStep):
    """Teach from a mixture of several teachers: averaged, drawn at random, by confidence or agreement, easy rows first.

    The mixture is the value ``teacher`` of the terms, at the step's temperature: give soft targets the same. Under
    "curriculum" the value ``easy`` (bool [B]) marks rows easy enough for the epoch, by the teachers' mean entropy on
    ``inputs`` (found once, in a pass over all): give it to a term as its mask. Their share grows linearly from
    ``first_share`` to 1 over ``epochs``. What is drawn or marked is part of the global batch, so that several processes
    do what one does.
    """

    share: Tensor

    def __init__(
        self,
        student: nn.Module,
        *args: Any,
        strategy: Strategy = "average",
        temperature: float = 4.0,
        first_share: float = 0.3,
        epochs: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(student, *args, **kwargs)
        if strategy not in get_args(Strategy):
            raise ValueError(f"strategy: wanted one of {', '.join(get_args(Strategy))}, got {strategy!r}")
        if len(self.teachers) < 2:
            raise ValueError(f"teachers: wanted at least 2, got {len(self.teachers)}")
        if not temperature > 0:
            raise ValueError(f"temperature: wanted a number > 0, got {temperature}")
        if not 0 < first_share <= 1 or epochs < 1:
            raise ValueError(f"first_share, epochs: wanted 0..1 and at least 1, got {first_share} and {epochs}")
        self.strategy, self.temperature = strategy, temperature
        self.first_share, self.epochs = first_share, epochs
        self.difficulty: Tensor | None = None
        self.register_buffer("share", torch.tensor(first_share))

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Set the weights and the share of easy rows of the epoch."""
        super().begin_epoch(epoch, generator)
        self.share.fill_(min(self.first_share + (1 - self.first_share) * epoch / self.epochs, 1.0))

    def values(self, batch: Batch) -> dict[str, Tensor]:
        """Return the values of a batch with ``teacher`` the mixture."""
        found = super().values(batch)
        logits = [found["teacher"], *(found[f"teacher{n}"] for n in range(1, len(self.teachers)))]
        found["teacher"] = mixture(logits, self._weights(logits, batch), self.temperature)
        return found

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[Batch]:
        """Yield the rows in random order, with the teacher drawn for the batch or its easy rows."""
        if self.strategy == "curriculum" and self.difficulty is None:
            self.difficulty = self._difficulty()
        for batch in super().batches(epoch, generator):
            rows = batch["index"]
            if self.difficulty is not None:
                batch["easy"] = easiest(self.difficulty[rows], float(self.share))
            if self.strategy == "random":
                batch["drawn"] = torch.randint(len(self.teachers), (1,), generator=generator).expand(len(rows))
            yield batch

    @torch.no_grad()
    def _difficulty(self) -> Tensor:
        """Return the mean entropy of the teachers' answers to every row, [N]."""
        device = self.share.device
        parts = []
        for inputs in self.data["inputs"].split(self.learning.batch_size):
            said = [self.ask_teacher(each, inputs.to(device))["teacher"] for each in self.teachers]
            parts.append(torch.stack([_entropy(torch.log_softmax(each.float(), 1)) for each in said]).mean(0).cpu())
        return torch.cat(parts)

    def _weights(self, logits: list[Tensor], batch: Batch) -> Tensor:
        teachers, rows = len(logits), len(logits[0])
        if self.strategy == "confidence":
            return confidence_weights(logits, batch.get("labels"))
        if self.strategy == "agreement":
            return agreement_weights(logits)
        if self.strategy == "random":  # one teacher a step
            return F.one_hot(batch["drawn"], teachers).T.float()
        return torch.full((teachers, rows), 1 / teachers, device=logits[0].device)
