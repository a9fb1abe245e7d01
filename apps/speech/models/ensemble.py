"""Several teachers as one: their posteriors averaged frame by frame.

An average of CTC posteriors is of use where the teachers put their spikes at the same frames: those trained under one
guide do (Kurata and Audhkhasi, 2019). Others are better switched (Fukuda et al., 2017), which is ``teacher.combine:
switched``: one of them for each utterance and epoch, where the paper has one for each batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from apps.speech.models.base import FRAME_MS
from kdcore.config import UserError

By = Literal["equal", "error", "confidence"]
# an error rate below a tenth of a percent counts as that: one lucky teacher is not all of the ensemble
LEAST_ERROR = 1e-3


@dataclass(frozen=True)
class Member:
    """A teacher: its name, its symbols without the blank, milliseconds a frame, word error rate (0.1 is 10 %)."""

    name: str
    symbols: tuple[str, ...]
    frame_ms: int = FRAME_MS
    error: float | None = None


def average(log_probs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return ``log sum_m w_m p_m(t, k)``, of teachers' log-posteriors; no gradient goes to them.

    Shapes: each [B, T, C]; weights [M], or [M, B] for those of each utterance; they are divided by their sum.

    Raises:
        ValueError: none, shapes that differ, weights of another shape, below 0, not finite or all 0.
    """
    if not log_probs or any(each.shape != log_probs[0].shape or each.ndim != 3 for each in log_probs):
        raise ValueError(
            f"log_probs: got {[list(each.shape) for each in log_probs]}, wanted one or more alike [B, T, C]"
        )
    allowed = ((len(log_probs),), (len(log_probs), len(log_probs[0])))
    if tuple(weights.shape) not in allowed:
        raise ValueError(f"weights: got {list(weights.shape)}, wanted {list(allowed[0])} or {list(allowed[1])}")
    shares = weights.detach().to(log_probs[0].device, torch.float32)
    total = shares.sum(0)
    if not torch.isfinite(shares).all() or (shares < 0).any() or (total <= 0).any():
        raise ValueError(f"weights: got {weights.tolist()}, wanted at least 0 and not all 0")
    logs = (shares / total).log().reshape(len(log_probs), -1, 1, 1)
    # one after another: the sum needs two teachers' memory at a time, not all of theirs
    result = log_probs[0].detach().float() + logs[0]
    for each, log in zip(log_probs[1:], logs[1:], strict=True):
        result = torch.logaddexp(result, each.detach().float() + log)
    return result


def error_weights(errors: Sequence[float]) -> Tensor:
    """Return shares [M] in proportion to 1 / word error rate on validation data (0.1 is 10 %).

    Raises:
        ValueError: an error rate that is below 0 or not finite.
    """
    if any(not math.isfinite(error) or error < 0 for error in errors):
        raise ValueError(f"errors: got {list(errors)}, wanted word error rates of at least 0")
    parts = torch.tensor([1 / max(error, LEAST_ERROR) for error in errors])
    return parts / parts.sum()


def confidence(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Return how sure a teacher is of each utterance, float32 [B] in (0, 1].

    It is the geometric mean of the best symbol's posterior, over the frames where that is not the blank: blanks are
    many and sure in every utterance. Where no frame has another best symbol it is over all frames; 1 without frames.

    Shapes: log_probs [B, T, C], the blank last; lengths int64 [B] in frames.
    """
    best, symbol = log_probs.detach().float().max(-1)
    valid = torch.arange(best.shape[1], device=best.device) < lengths.to(best.device)[:, None]
    spoken = valid & (symbol != log_probs.shape[-1] - 1)
    counted = torch.where(spoken.any(1, keepdim=True), spoken, valid)
    return (torch.where(counted, best, 0).sum(1) / counted.sum(1).clamp(min=1)).exp()


class Ensemble:
    """Teachers with the same units and frames, averaged.

    ``by`` says what their weights are: equal, by the members' error rates, or by confidence in each utterance.

    Raises:
        UserError: no members, a name twice, other symbols or frames than the first's, an unknown ``by``, or no error
            rate where it is needed.
    """

    def __init__(self, members: Sequence[Member], by: By = "equal") -> None:
        if not members:
            raise UserError("ensemble: no teachers, wanted at least one")
        if by not in get_args(By):
            raise UserError(f"ensemble: by: got {by!r}, wanted one of {', '.join(get_args(By))}")
        self.members, self.by = tuple(members), by
        first = self.members[0]
        for at, member in enumerate(self.members):
            if member.name in [each.name for each in self.members[:at]]:
                raise UserError(f"ensemble: the teacher {member.name!r} stands there twice")
            if member.symbols != first.symbols:
                raise UserError(
                    f"ensemble: {member.name} has other units than {first.name}: {_difference(member, first)}"
                )
            if member.frame_ms != first.frame_ms:
                raise UserError(
                    f"ensemble: {member.name} has frames of {member.frame_ms} ms, {first.name} of {first.frame_ms} ms"
                )
            if by == "error" and (member.error is None or not 0 <= member.error < math.inf):
                raise UserError(
                    f"ensemble: {member.name}: error: got {member.error}, wanted its word error rate to weigh it by"
                )

    @property
    def weights(self) -> Tensor:
        """The shares [M] of the members; equal where only an utterance says them."""
        if self.by == "error":
            return error_weights([member.error or 0.0 for member in self.members])
        return torch.full((len(self.members),), 1 / len(self.members))

    def log_probs(self, given: Sequence[Tensor], lengths: Tensor) -> Tensor:
        """Return the average [B, T, C] of the members' log-posteriors, each [B, T, C]; lengths int64 [B] in frames.

        Raises:
            ValueError: another number of them than there are members, or shapes that differ.
        """
        if len(given) != len(self.members):
            raise ValueError(f"given: got log-posteriors of {len(given)}, wanted of {len(self.members)} teachers")
        if any(each.shape[-1] != len(self.members[0].symbols) + 1 for each in given):
            wanted = len(self.members[0].symbols) + 1
            raise ValueError(f"given: got {[each.shape[-1] for each in given]} classes, wanted {wanted} of each")
        if self.by == "confidence":
            return average(given, torch.stack([confidence(each, lengths) for each in given]))
        return average(given, self.weights)


def _difference(member: Member, first: Member) -> str:
    """Return the first symbol in which two teachers' units differ, in words."""
    for at, (got, wanted) in enumerate(zip(member.symbols, first.symbols, strict=False)):
        if got != wanted:
            return f"symbol {at} is {got!r}, wanted {wanted!r}"
    return f"{len(member.symbols)} symbols, wanted {len(first.symbols)}"
