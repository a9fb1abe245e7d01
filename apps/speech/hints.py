"""Losses between layers of a student that is some frames late and layers of its teacher: outputs, and attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apps.speech.models.conformer import rotate, rotations
from kdcore import losses
from kdcore.losses.contract import Reduction, in_full_precision, reduce_rows

# frames of 40 ms within which attention is compared: what a long utterance needs grows with its length alone
STRETCH = 256


def _in_time(student: Tensor, teacher: Tensor, lengths: Tensor, delay: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's frames behind the delay, the teacher's they follow, and how many of each utterance count.

    A layer may have frames beyond the longest utterance; none are left where no utterance outlasts the delay.
    """
    frames = max(min(student.shape[1] - delay, teacher.shape[1]), 0)
    return student[:, delay : delay + frames], teacher[:, :frames], (lengths - delay).clamp(0, frames)


class DelayedHint(nn.Module):
    """Mean over frames of half the squared distance of a projection of the student's frame to the teacher's.

    Reference: Romero et al., FitNets, 2015; with the delay of a streaming student.
    """

    def __init__(self, student: int, teacher: int, delay: int) -> None:
        super().__init__()
        self.project = nn.Linear(student, teacher)
        self.delay = delay

    def forward(self, student: Tensor, teacher: Tensor, lengths: Tensor, *, reduction: Reduction = "mean") -> Tensor:
        """Return the loss of frames [B, T, D] and [B, T, E]; lengths int64 [B]. An utterance in the delay counts 0."""
        late, heard, counts = _in_time(student, teacher, lengths, self.delay)
        counted = torch.arange(late.shape[1], device=lengths.device) < counts[:, None]
        apart = (self.project(late) - heard).pow(2).mean(2) / 2
        rows = apart.masked_fill(~counted, 0.0).sum(1) / counts.clamp(min=1)
        return reduce_rows(rows, None, reduction)


def delayed_attention(
    student: Tensor,
    teacher: Tensor,
    lengths: Tensor,
    *,
    student_heads: int,
    teacher_heads: int,
    back: int | None = None,
    delay: int = 0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean KL(teacher || student) of where a frame attends, over heads and frames; 0 where both attend alike.

    Shapes: student [B, T, 2 D] and teacher [B, T, 2 E], the queries and keys of all heads side by side, before they
    are turned by their places; lengths int64 [B], of which an utterance in the delay counts 0.

    A streaming student does not hear what its teacher attends to later, nor what is long past, so both are taken as if
    they attended to a frame and the ``back`` before it (None: all), of a stretch of ``STRETCH``. Where the numbers of
    heads differ, the means over the heads are compared.

    Reference: Aguilar et al., Knowledge Distillation from Internal Representations, AAAI 2020; with the delay of a
    streaming student.
    """
    late, heard, counts = _in_time(student, teacher, lengths, delay)
    rows, frames = late.shape[:2]
    size = max(min(frames, STRETCH), 1)
    starts = torch.arange(0, max(frames, 1), size, device=lengths.device)
    within = (counts[:, None] - starts).clamp(0, size).flatten()
    with torch.autocast(late.device.type, enabled=False):
        own = _scores(_stretches(in_full_precision(late), size), student_heads, back)
        theirs = _scores(_stretches(in_full_precision(heard), size), teacher_heads, back)
    apart = losses.attention_matrices(own, theirs, within, reduction="none")
    values = (apart * within).view(rows, -1).sum(1) / counts.clamp(min=1)
    return reduce_rows(values, None, reduction)


def _stretches(values: Tensor, size: int) -> Tensor:
    """Return [B, T, D] as [B n, size, D], n stretches an utterance, at least one, filled up with 0."""
    missing = size - values.shape[1] if values.shape[1] < size else -values.shape[1] % size
    return F.pad(values, (0, 0, 0, missing)).unflatten(1, (-1, size)).flatten(0, 1)


def _scores(mixed: Tensor, heads: int, back: int | None) -> Tensor:
    """Return the scores [B, heads, T, T] of queries and keys [B, T, 2 D], -inf for keys later or further ``back``."""
    queries, keys = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in mixed.chunk(2, 2))
    # attention sees distances alone, so that places may be counted from anywhere
    turns = rotations(mixed.shape[1], queries.shape[3], mixed)
    scores = rotate(queries, *turns) @ rotate(keys, *turns).transpose(2, 3) / math.sqrt(queries.shape[3])
    heard = torch.ones(scores.shape[2:], dtype=torch.bool, device=mixed.device).tril()
    return scores.masked_fill(~(heard if back is None else heard.triu(-back)), -torch.inf)
