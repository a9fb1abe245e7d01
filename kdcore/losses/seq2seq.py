"""Losses of decoders that predict the next token: word by word, and on the sequences a teacher's beam search found."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses.contract import (
    Reduction,
    check_float,
    check_pair,
    check_positive,
    check_shape,
    hide,
    in_full_precision,
    reduce_rows,
    row_mask,
    teacher_like,
)
from kdcore.losses.examples import normal, pair
from kdcore.losses.nbest import check_hypotheses, hypothesis_weights
from kdcore.losses.registry import register
from kdcore.losses.sequence import checked_lengths, divergences, mean_of_places, within

_KIM_RUSH = "Kim & Rush, Sequence-Level Knowledge Distillation, EMNLP 2016"


def _tokens(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    lengths = torch.randint(2, 6, (rows,), generator=generator)
    return {**pair(rows, 5, 4, generator=generator), "lengths": lengths}


@register(
    "word_level",
    "sequence",
    _KIM_RUSH,
    examples=_tokens,
    laws=(
        "zero_at_equality",
        "stationary_at_equality",
        "nonnegative",
        "student_shift",
        "teacher_shift",
        "padding",
    ),
    variants=({}, {"temperature": 3.0}),
)
def word_level(
    student: Tensor,
    teacher: Tensor,
    lengths: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Soft next tokens: mean over the tokens of a sequence of T^2 * KL(softmax(teacher/T) || softmax(student/T)).

    Shapes: student and teacher logits [B, U, C] for the same prefixes (of the transcript); lengths int64 [B], tokens
    with the end of the sequence; mask bool [B]. What stands beyond a length is never looked at. Zero where student
    equals teacher up to a constant a token. The paper has the cross-entropy (the same gradient) and a sum over tokens.

    Raises:
        ValueError: shapes differ, a length is not in 0..U, temperature <= 0, or an unknown reduction.

    Reference: Kim & Rush, 2016.
    """
    check_pair(student, teacher, 3)
    check_positive("temperature", temperature)
    rows = row_mask(mask, student.shape[0])
    lengths = checked_lengths("lengths", lengths, (student.shape[0],), student.shape[1], rows)
    inside = within(lengths, student.shape[1])
    student = hide(in_full_precision(student), inside)
    teacher = hide(teacher_like(teacher, student), inside)
    log_q = torch.log_softmax(student / temperature, 2)
    log_p = torch.log_softmax(teacher / temperature, 2)
    losses = mean_of_places(divergences(log_p, log_q), inside.to(student.dtype))
    return reduce_rows(losses * temperature**2, rows, reduction)


def _beams(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "student": normal(rows, 2, 4, 5, generator=generator),
        "hypotheses": torch.randint(5, (rows, 2, 4), generator=generator),
        "hypothesis_lengths": torch.randint(1, 5, (rows, 2), generator=generator),
        "log_scores": normal(rows, 2, generator=generator),
    }


@register(
    "sequence_level",
    "sequence",
    _KIM_RUSH,
    examples=_beams,
    teacher=("log_scores",),
    laws=("nonnegative", "student_shift", "teacher_shift"),
    variants=({}, {"temperature": 3.0, "per_token": True}),
)
def sequence_level(
    student: Tensor,
    hypotheses: Tensor,
    hypothesis_lengths: Tensor,
    log_scores: Tensor,
    *,
    temperature: float = 1.0,
    per_token: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Likelihood of the teacher's beam: sum_h w_h * sum_u -log p_student(h_u | h_<u), w = softmax(log_scores / tau).

    Shapes: student logits [B, N, U, C], the student having read each hypothesis; hypotheses int64 [B, N, U];
    hypothesis_lengths int64 [B, N], tokens with the end of the sequence, 0 where there is no such hypothesis (as is a
    score of -inf); log_scores [B, N] of the teacher; mask bool [B]. What stands beyond a length is never looked at.
    N = 1 is the paper's: the teacher's best output in place of the transcript. Zero only where the student is sure
    of the one hypothesis; a row without a hypothesis counts 0.

    Options: ``temperature`` tau of the weights; ``per_token`` divides each hypothesis by its length.

    Raises:
        ValueError: shapes do not fit, a length or a token is out of range, temperature <= 0, or unknown reduction.

    Reference: Kim & Rush, 2016.
    """
    check_float("student", student, 4)
    check_float("log_scores", log_scores, 2)
    check_positive("temperature", temperature)
    if hypotheses.dtype != torch.int64:
        raise ValueError(f"hypotheses: wanted int64 tokens, got {hypotheses.dtype}")
    batch, n_best, longest, classes = student.shape
    check_shape("hypotheses", hypotheses, (batch, n_best, longest))
    check_shape("log_scores", log_scores, (batch, n_best))
    rows = row_mask(mask, batch)
    sizes = checked_lengths("hypothesis_lengths", hypothesis_lengths, (batch, n_best), longest, rows)
    check_hypotheses(hypotheses, sizes, classes, None)
    inside = within(sizes, longest)
    student = hide(in_full_precision(student), inside)
    targets = hypotheses.masked_fill(~inside, -100)
    losses = F.cross_entropy(student.flatten(0, 2), targets.flatten(), reduction="none", ignore_index=-100)
    losses = losses.view(batch, n_best, longest).sum(2)
    if per_token:
        losses = losses / sizes.clamp(min=1)
    weights = hypothesis_weights(hide(teacher_like(log_scores, student), rows), sizes > 0, temperature)
    return reduce_rows((losses.masked_fill(weights == 0, 0.0) * weights).sum(1), rows, reduction)
