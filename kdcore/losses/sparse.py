"""Soft targets of which only the teacher's top classes are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from kdcore.losses.contract import (
    Reduction,
    check_float,
    check_positive,
    check_shape,
    element_mask,
    hide,
    in_full_precision,
    reduce_rows,
    teacher_like,
)
from kdcore.losses.examples import pair
from kdcore.losses.registry import register

Rest = Literal["lump", "renormalise"]


def _kept_teacher(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    both = pair(rows, 5, generator=generator)
    log_probs, items = torch.log_softmax(both["teacher"], 1).topk(3, 1)
    return {"student": both["student"], "items": items, "teacher_log_probs": log_probs}


def _kept_student(inputs: dict[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    log_probs = torch.log_softmax(inputs["student"] / options.get("temperature", 1.0), 1)
    return {**inputs, "teacher_log_probs": log_probs.gather(1, inputs["items"])}


@register(
    "sparse_soft_targets",
    "response",
    "Hinton et al., Distilling the Knowledge in a Neural Network, 2015, on the teacher's top classes",
    examples=_kept_teacher,
    teacher=("teacher_log_probs",),
    fixed=("teacher_log_probs",),
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "student_shift"),
    variants=({}, {"temperature": 3.0}, {"rest": "renormalise", "temperature": 2.0}),
    at_equality=_kept_student,
)
def sparse_soft_targets(
    student: Tensor,
    items: Tensor,
    teacher_log_probs: Tensor,
    *,
    temperature: float = 1.0,
    rest: Rest = "lump",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Soft targets of which the teacher's top K are kept: T^2 * KL over those K classes and one lump of all others.

    By the data-processing inequality never more than soft_targets, and equal to it where K = C.

    ``rest`` "renormalise" leaves the other classes out instead: both sides sum to 1 over the kept. Nothing then
    teaches how much the kept are worth together, and a class the teacher never had may rise for free.

    Shapes: student logits [B, C]; items int64 [B, K], the classes kept, distinct in a row; teacher_log_probs [B, K],
    the teacher's log-probabilities of them over all C classes, at the same temperature; mask bool [B] or [B, K] (a
    class that is not valid belongs to the rest). Zero where the student gives the kept classes these probabilities.

    Raises:
        ValueError: shapes do not fit, temperature <= 0, an unknown rest, or an unknown reduction.

    Reference: Hinton et al., 2015.
    """
    check_float("student", student, 2)
    check_float("teacher_log_probs", teacher_log_probs, 2)
    check_positive("temperature", temperature)
    if items.dtype != torch.int64:
        raise ValueError(f"items: wanted int64 class indices, got {items.dtype}")
    classes = student.shape[1]
    if items.dim() != 2 or items.shape[0] != student.shape[0] or items.shape[1] > classes:
        wanted = f"({student.shape[0]}, K <= {classes})"
        raise ValueError(f"items: wanted shape {wanted}, got {tuple(items.shape)}")
    check_shape("teacher_log_probs", teacher_log_probs, tuple(items.shape))
    if rest not in get_args(Rest):
        raise ValueError(f"rest: wanted one of {', '.join(get_args(Rest))}, got {rest!r}")
    rows, elements = element_mask(mask, tuple(items.shape))
    scores = hide(in_full_precision(student), rows) / temperature
    log_p = teacher_like(teacher_log_probs, scores)
    valid_items = torch.ones_like(items, dtype=torch.bool) if elements is None else elements
    items = items.masked_fill(~valid_items, 0)
    if rest == "lump":
        losses = _lumped(scores, items, log_p.masked_fill(~valid_items, -torch.inf), valid_items)
    else:
        losses = _renormalised(scores.gather(1, items), log_p, valid_items)
    return reduce_rows(losses * temperature**2, rows, reduction)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of each row [B]; a class with p = 0 (log-probability -inf) adds nothing, not 0 * inf."""
    ratio = (log_p - log_q).masked_fill_(log_p == -torch.inf, 0.0)  # in place: the difference is needed no more
    return (log_p.exp() * ratio).sum(1)


def _lumped(scores: Tensor, items: Tensor, log_p: Tensor, valid: Tensor) -> Tensor:
    """Return the divergence [B] over the kept classes and one lump; log_p [B, K] is -inf where not valid."""
    log_q = torch.log_softmax(scores, 1)
    kept_q = log_q.gather(1, items).masked_fill(~valid, -torch.inf)
    lump_q = _rest(kept_q, log_q, items, valid)
    lump_p = (-torch.expm1(torch.logsumexp(log_p, 1, keepdim=True))).clamp(min=0).log()
    everything_kept = valid.sum(1, keepdim=True) == scores.shape[1]
    lump_p = lump_p.masked_fill(everything_kept, -torch.inf)  # rounding must not leave mass in no class
    return _kl(torch.cat([log_p, lump_p], 1), torch.cat([kept_q, lump_q], 1))


def _renormalised(kept: Tensor, log_p: Tensor, valid: Tensor) -> Tensor:
    """Return the divergence [B] over the valid of the kept classes; without one all are equal and it is zero."""
    none = ~valid.any(1, keepdim=True)
    out = ~valid & ~none
    kept, log_p = (x.masked_fill(none, 0.0).masked_fill(out, -torch.inf) for x in (kept, log_p))
    return _kl(torch.log_softmax(log_p, 1), torch.log_softmax(kept, 1))


# Below this the lump, as 1 - the kept, has lost digits (float32 keeps 5 of them here) and is summed up instead.
_SMALL_LUMP = 1e-2


def _rest(kept: Tensor, log_probs: Tensor, items: Tensor, valid: Tensor) -> Tensor:
    """Return the log-probability [B, 1] of all classes but those kept (log-probabilities [B, K], -inf if not valid).

    1 - the kept needs no pass over all classes; only rows where it would lose digits are summed up.
    """
    mass = torch.logsumexp(kept, 1, keepdim=True)
    few = (mass.detach().exp() > 1 - _SMALL_LUMP)[:, 0]
    rest = torch.log1p(-torch.exp(mass.masked_fill(few[:, None], -1.0)))
    if not bool(few.any()):
        return rest
    part, classes = log_probs[few], log_probs.shape[1]
    column = items[few].masked_fill(~valid[few], classes)  # one column more than there are classes, cut off below
    out = part.new_zeros((len(part), classes + 1), dtype=torch.bool).scatter_(1, column, True)[:, :classes]
    summed = torch.logsumexp(part.masked_fill(out, -torch.inf), 1, keepdim=True)
    return rest.index_put((few.nonzero()[:, 0],), summed)
