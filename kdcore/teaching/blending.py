"""Several teachers as one: blending their scores, mixing their tempered distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kdcore.config import UserError

Normalise = Literal["none", "zscore", "rank", "softmax"]


def blend_weights(weights: Sequence[float] | None, n_teachers: int) -> tuple[float, ...]:
    """Return the weights of ``n_teachers`` scaled to sum to 1; None gives equal ones.

    Raises:
        UserError: no teacher, another number of weights, a negative or infinite weight, or all of them zero.
    """
    if n_teachers < 1:
        raise UserError(f"teachers: wanted at least 1, got {n_teachers}")
    if weights is None:
        return (1.0 / n_teachers,) * n_teachers
    if len(weights) != n_teachers:
        raise UserError(f"weights: wanted {n_teachers} (one a teacher), got {len(weights)}")
    total = math.fsum(weights)
    if any(not math.isfinite(w) or w < 0 for w in weights) or total <= 0:
        raise UserError(f"weights: wanted finite numbers >= 0, one of them > 0, got {list(weights)}")
    return tuple(w / total for w in weights)


def normalise_scores(scores: Tensor, normalise: Normalise) -> Tensor:
    """Put the rows of a teacher's scores [B, N] on a common scale, without gradient, float32 (float64 stays).

    "none" leaves them; "zscore" gives mean 0 and standard deviation 1 a row (a constant row: zeros); "rank" gives
    1 for the best to 0 for the worst, ties share their average; "softmax" gives probabilities. -inf (an excluded
    item) stays -inf, except that its probability is 0, and does not count in the statistics.

    Raises:
        UserError: an unknown normalise, or scores that are not floating [B, N].
    """
    if normalise not in get_args(Normalise):
        raise UserError(f"normalise: wanted one of {', '.join(get_args(Normalise))}, got {normalise!r}")
    if scores.dim() != 2 or not scores.is_floating_point():
        raise UserError(f"scores: wanted floating [B, N], got {scores.dtype} {tuple(scores.shape)}")
    scores = scores.detach()
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if normalise == "none":
        return scores
    if normalise == "softmax":
        return torch.softmax(scores, 1)
    excluded = scores == -torch.inf
    count = (~excluded).sum(1, keepdim=True)
    if normalise == "rank":
        ordered = scores.sort(1).values
        below = torch.searchsorted(ordered, scores.contiguous(), right=False)
        up_to = torch.searchsorted(ordered, scores.contiguous(), right=True)
        average = (below + up_to - 1).to(scores.dtype) / 2 - excluded.sum(1, keepdim=True)
        scaled = average / (count - 1).clamp(min=1)
    else:
        mean = scores.masked_fill(excluded, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
        centred = (scores - mean).masked_fill(excluded, 0.0)
        deviation = (centred.square().sum(1, keepdim=True) / count.clamp(min=1)).sqrt()
        # A constant row leaves only the rounding of its mean; it says nothing, so it must not be blown up.
        floor = mean.abs() * torch.finfo(scores.dtype).eps * 4
        scaled = torch.where(deviation > floor, centred / deviation, 0.0)
    return scaled.masked_fill(excluded, -torch.inf)


def average_scores(
    scores: Sequence[Tensor], *, weights: Sequence[float] | None = None, normalise: Normalise = "none"
) -> Tensor:
    """Return the weighted average of several teachers' scores of the same items, [B, N], without gradient.

    Teachers on different scales need a ``normalise`` (see normalise_scores). ``weights`` are scaled to sum to 1; a
    teacher of weight 0 is left out, NaN and all. An item excluded (-inf) by one teacher is excluded, except under
    "softmax", where it has probability 0 with that teacher.

    Raises:
        UserError: no teacher, shapes that differ, bad weights, or an unknown normalise.
    """
    total: Tensor | None = None
    for weight, teacher in zip(blend_weights(weights, len(scores)), scores, strict=True):
        _check_shape(teacher, scores[0])
        if weight > 0:
            total = _add(total, normalise_scores(teacher, normalise) * weight)
    return _blended(total)


def average_soft_targets(
    logits: Sequence[Tensor], *, weights: Sequence[float] | None = None, temperature: float = 1.0
) -> Tensor:
    """Return the log of the mixture of the teachers' tempered distributions, log sum_m w_m softmax(t_m / T), [B, C].

    The result holds log-probabilities: as the teacher of soft_targets with temperature T give ``T * result``, so
    that tempering it brings the mixture back.

    Raises:
        UserError: no teacher, shapes that differ, bad weights, or temperature <= 0.

    Reference: Hinton et al., Distilling the Knowledge in a Neural Network, 2015 (arithmetic mean of an ensemble).
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise UserError(f"temperature: wanted a finite number > 0, got {temperature}")
    parts = []
    for weight, teacher in zip(blend_weights(weights, len(logits)), logits, strict=True):
        _check_shape(teacher, logits[0])
        if weight > 0:
            values = normalise_scores(teacher, "none")
            parts.append(torch.log_softmax(values / temperature, 1) + math.log(weight))
    return torch.logsumexp(torch.stack(parts), 0)


class TeacherEnsemble:
    """Several teachers as one callable that answers the average of their scores.

    The teachers are asked one after the other and their answers added up, so that only one teacher's scores [B, N]
    are held beside the sum. All get the same arguments and run without gradient; whether they are in evaluation
    mode is the caller's affair.
    """

    def __init__(
        self,
        teachers: Sequence[Callable[..., Tensor]],
        *,
        weights: Sequence[float] | None = None,
        normalise: Normalise = "zscore",
    ) -> None:
        """Store the teachers; see average_scores for ``weights`` and ``normalise``.

        Raises:
            UserError: no teacher, bad weights, or an unknown normalise.
        """
        if normalise not in get_args(Normalise):
            raise UserError(f"normalise: wanted one of {', '.join(get_args(Normalise))}, got {normalise!r}")
        self.weights = blend_weights(weights, len(teachers))
        self.teachers = tuple(teachers)
        self.normalise: Normalise = normalise

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the blended scores [B, N] of the teachers, each called with the arguments given."""
        total: Tensor | None = None
        for weight, teacher in zip(self.weights, self.teachers, strict=True):
            if weight > 0:
                scores = normalise_scores(teacher(*args, **kwargs), self.normalise) * weight
                total = _add(total, scores)
        return _blended(total)


def _check_shape(teacher: Tensor, first: Tensor) -> None:
    if teacher.shape != first.shape:
        raise UserError(f"scores: wanted shape {tuple(first.shape)} of every teacher, got {tuple(teacher.shape)}")


def _add(total: Tensor | None, scores: Tensor) -> Tensor:
    if total is None:
        return scores
    _check_shape(scores, total)
    return total.add_(scores) if total.dtype == scores.dtype else total + scores


def _blended(total: Tensor | None) -> Tensor:
    if total is None:
        raise UserError("teachers: wanted one with a weight > 0, got none")
    return total
