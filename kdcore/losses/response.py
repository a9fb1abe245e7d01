"""Losses on what the networks answer: logits, labels, regression values; and virtual teachers."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kdcore.losses.contract import (
    Reduction,
    check_at_least,
    check_float,
    check_labels,
    check_pair,
    check_positive,
    element_mask,
    hide,
    in_full_precision,
    reduce_rows,
    row_mask,
    teacher_like,
)
from kdcore.losses.examples import normal
from kdcore.losses.kernels import DecoupledDivergence, ForwardDivergence
from kdcore.losses.registry import register

Direction = Literal["forward", "reverse", "symmetric", "jensen_shannon"]


def _pair(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"student": normal(rows, 5, generator=generator), "teacher": normal(rows, 5, generator=generator)}


def _pair_with_labels(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {**_pair(rows, generator), "labels": torch.randint(5, (rows,), generator=generator)}


def _student_with_labels(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "student": normal(rows, 5, generator=generator),
        "labels": torch.randint(5, (rows,), generator=generator),
    }


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) of each row [B]; a class with p = 0 (logit -inf) adds nothing, not 0 * inf."""
    ratio = (log_p - log_q).masked_fill_(log_p == -torch.inf, 0.0)  # in place: a third of the time at C = 3,700
    return (log_p.exp() * ratio).sum(1)


def _divergence(student: Tensor, teacher: Tensor, temperature: float, direction: Direction) -> Tensor:
    """Return T^2 times the divergence of each row [B] of raw logits [B, C]."""
    student = in_full_precision(student)
    if direction == "forward":
        rows: Tensor = ForwardDivergence.apply(student, teacher_like(teacher, student), temperature)
        return rows
    log_q = torch.log_softmax(student / temperature, 1)
    log_p = torch.log_softmax(teacher_like(teacher, student) / temperature, 1)
    if direction == "reverse":
        rows = _kl(log_q, log_p)
    elif direction == "symmetric":
        rows = (_kl(log_p, log_q) + _kl(log_q, log_p)) / 2
    else:
        excluded = (log_p == -torch.inf) & (log_q == -torch.inf)  # where logaddexp has a NaN gradient
        log_m = torch.logaddexp(log_p, log_q.masked_fill(excluded, 0.0)) - math.log(2)
        rows = (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    return rows * temperature**2


@register(
    "soft_targets",
    "response",
    "Hinton et al., Distilling the Knowledge in a Neural Network, 2015",
    examples=_pair,
    laws=(
        "zero_at_equality",
        "stationary_at_equality",
        "nonnegative",
        "student_shift",
        "teacher_shift",
        "permutation",
        "chunked",
    ),
    variants=(
        {},
        {"temperature": 3.0},
        {"direction": "reverse"},
        {"direction": "symmetric", "temperature": 2.0},
        {"direction": "jensen_shannon", "temperature": 0.5},
    ),
)
def soft_targets(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    direction: Direction = "forward",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """Tempered divergence of two distributions over classes: T^2 * KL(softmax(teacher/T) || softmax(student/T)).

    Shapes: student and teacher logits [B, C]; mask bool [B]. A class excluded from both by a logit of -inf adds
    nothing. Zero where student equals teacher up to a constant a row.

    Options: temperature T > 0; direction "forward" KL(teacher || student), "reverse" KL(student || teacher),
    "symmetric" the mean of both, "jensen_shannon"; chunk_size rows are worked on at a time and recomputed in the
    backward pass, which bounds the memory beyond the inputs at chunk_size * C values (None: all rows at once).

    Raises:
        ValueError: shapes differ, or an option is out of range.

    Reference: Hinton et al., 2015 (forward, T^2); Lin, 1991 (Jensen-Shannon).
    """
    check_pair(student, teacher, 2)
    check_positive("temperature", temperature)
    if direction not in get_args(Direction):
        raise ValueError(f"direction: wanted one of {', '.join(get_args(Direction))}, got {direction!r}")
    valid = row_mask(mask, student.shape[0])
    student, teacher = hide(student, valid), hide(teacher.detach(), valid)
    if chunk_size is None:
        return reduce_rows(_divergence(student, teacher, temperature, direction), valid, reduction)
    check_at_least("chunk_size", chunk_size, 1)
    parts = [
        checkpoint(_divergence, s, t, temperature, direction, use_reentrant=False, preserve_rng_state=False)
        for s, t in zip(student.split(chunk_size), teacher.split(chunk_size), strict=True)
    ]
    return reduce_rows(torch.cat(parts), valid, reduction)


@register(
    "logit_mse",
    "response",
    "Ba & Caruana, Do Deep Nets Really Need to be Deep?, NIPS 2014",
    examples=_pair,
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "symmetric", "permutation"),
)
def logit_mse(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Logit regression: mean over classes of (student - teacher)^2.

    Shapes: student and teacher logits [B, C]; mask bool [B]. Zero where student equals teacher. It is what
    soft_targets tends to at high temperature, up to a factor, once the logits of a row have mean zero.

    Raises:
        ValueError: shapes differ, or an unknown reduction.

    Reference: Ba & Caruana, 2014.
    """
    check_pair(student, teacher, 2)
    return regression(student, teacher, mask=mask, reduction=reduction)


@register(
    "regression",
    "response",
    "Huber, Robust Estimation of a Location Parameter, 1964 (delta); squared error without",
    examples=_pair,
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "symmetric", "permutation"),
    variants=({}, {"delta": 0.5}),
)
def regression(
    student: Tensor,
    teacher: Tensor,
    *,
    delta: float | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Regression on the teacher's predictions: mean over outputs of the squared (delta=None) or Huber error.

    The Huber error is e^2 / 2 for |e| <= delta and delta * (|e| - delta / 2) beyond, in the units of the output.

    Shapes: student and teacher [B] or [B, D]; mask bool [B]. Zero where student equals teacher.

    Raises:
        ValueError: shapes differ, delta <= 0, or an unknown reduction.

    Reference: Huber, 1964.
    """
    check_pair(student, teacher, 1, 2)
    valid = row_mask(mask, student.shape[0])
    student = hide(in_full_precision(student), valid)
    teacher = hide(teacher_like(teacher, student), valid)
    if delta is None:
        errors = (student - teacher).square()
    else:
        check_positive("delta", delta)
        errors = F.huber_loss(student, teacher, reduction="none", delta=delta)
    return reduce_rows(errors.mean(1) if errors.dim() == 2 else errors, valid, reduction)


@register(
    "binary_soft_targets",
    "response",
    "Hinton et al., 2015, for independent labels; Yang et al., Multi-Label Knowledge Distillation, ICCV 2023",
    examples=_pair,
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "permutation", "element_mask"),
    variants=({}, {"temperature": 3.0}),
)
def binary_soft_targets(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Soft targets of independent labels: T^2 * sum over labels of KL(Bern(sigmoid(t/T)) || Bern(sigmoid(s/T))).

    Shapes: student and teacher logits [B] (one label) or [B, C]; mask bool [B] or [B, C]. Zero where student
    equals teacher.

    Raises:
        ValueError: shapes differ, temperature <= 0, or an unknown reduction.

    Reference: Hinton et al., 2015.
    """
    check_pair(student, teacher, 1, 2)
    check_positive("temperature", temperature)
    rows, elements = element_mask(mask, tuple(student.shape))
    student = hide(in_full_precision(student), elements) / temperature
    teacher = hide(teacher_like(teacher, student), elements) / temperature
    yes = torch.sigmoid(teacher) * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = torch.sigmoid(-teacher) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    losses = (yes + no) * temperature**2
    return reduce_rows(losses.sum(1) if losses.dim() == 2 else losses, rows, reduction)


@register(
    "decoupled",
    "response",
    "Zhao et al., Decoupled Knowledge Distillation, CVPR 2022",
    examples=_pair_with_labels,
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "student_shift", "teacher_shift"),
    variants=({}, {"temperature": 1.0, "alpha": 0.5, "beta": 2.0}),
)
def decoupled(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Decoupled soft targets: T^2 * (alpha * KL of [target, not target] + beta * KL among the other classes).

    Soft targets are alpha = 1 and beta = the teacher's probability of "not target"; here beta is free, so that a
    teacher sure of the target still teaches about the others.

    Shapes: student and teacher logits [B, C], C >= 2; labels int64 [B]; mask bool [B]. Zero where student equals
    teacher up to a constant a row. Defaults alpha 1, beta 8, T 4 as in the authors' code for CIFAR-100.

    Raises:
        ValueError: shapes differ, C < 2, temperature <= 0, alpha or beta < 0, or an unknown reduction.

    Reference: Zhao et al., 2022.
    """
    check_pair(student, teacher, 2)
    check_positive("temperature", temperature)
    check_labels(labels, *student.shape)
    for argument, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{argument}: wanted a finite number >= 0, got {value}")
    valid = row_mask(mask, student.shape[0])
    labels = labels if valid is None else labels.masked_fill(~valid, 0)
    student = hide(in_full_precision(student), valid)
    teacher = hide(teacher_like(teacher, student), valid)
    losses = DecoupledDivergence.apply(student, teacher, labels, alpha, beta, temperature)
    return reduce_rows(losses, valid, reduction)


@register(
    "normalised",
    "response",
    "Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach, ICCV 2023",
    examples=_pair_with_labels,
    laws=("nonnegative", "student_shift", "teacher_shift"),
    variants=({}, {"gamma": 0.5, "temperature": 3.0}),
)
def normalised(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Normalised soft targets: -p_t * log q_t - gamma * T^2 * sum over the other classes of p'_i * log q'_i.

    p_t and q_t are teacher's and student's probability of the target at temperature 1, p' and q' the softmax at T
    over the other classes, which sum to 1 on both sides: so they can become equal, as they cannot where the target's
    probabilities differ. Added to the cross-entropy of the labels.

    Shapes: student and teacher logits [B, C], C >= 2; labels int64 [B]; mask bool [B]. Where student equals teacher
    it is not zero, but its second part is at its least, the entropy of p'. Defaults gamma 1.5 and T 1 as in the
    authors' code for ImageNet.

    Raises:
        ValueError: shapes differ, C < 2, temperature <= 0, gamma < 0, or an unknown reduction.

    Reference: Yang et al., 2023.
    """
    check_pair(student, teacher, 2)
    check_positive("temperature", temperature)
    check_labels(labels, *student.shape)
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma: wanted a finite number >= 0, got {gamma}")
    valid = row_mask(mask, student.shape[0])
    column = (labels if valid is None else labels.masked_fill(~valid, 0))[:, None]
    student = hide(in_full_precision(student), valid)
    teacher = hide(teacher_like(teacher, student), valid)
    log_q = torch.log_softmax(student, 1).gather(1, column)[:, 0]
    target = torch.softmax(teacher, 1).gather(1, column)[:, 0] * log_q
    others_q = torch.log_softmax((student / temperature).scatter(1, column, -torch.inf), 1).scatter(1, column, 0.0)
    others_p = torch.softmax((teacher / temperature).scatter(1, column, -torch.inf), 1)
    losses = -target - gamma * temperature**2 * (others_p * others_q).sum(1)
    return reduce_rows(losses, valid, reduction)


@register(
    "label_smoothing",
    "response",
    "Szegedy et al., CVPR 2016; as a virtual teacher: Yuan et al., Revisiting Knowledge Distillation, CVPR 2020",
    examples=_student_with_labels,
    teacher=(),
    laws=("nonnegative", "student_shift"),
    variants=({}, {"smoothing": 0.0}, {"smoothing": 1.0}),
)
def label_smoothing(
    student: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy against a virtual teacher, (1 - smoothing) * onehot(label) + smoothing / C.

    Shapes: student logits [B, C], C >= 2; labels int64 [B]; mask bool [B]. The smallest value is the entropy of the
    smoothed target. ``smoothing`` in 0..1 (0.1 in Szegedy et al.).

    Raises:
        ValueError: shapes differ, C < 2, smoothing outside 0..1, or an unknown reduction.

    Reference: Szegedy et al., 2016; Yuan et al., 2020.
    """
    check_float("student", student, 2)
    check_labels(labels, *student.shape)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing: wanted a number in 0..1, got {smoothing}")
    valid = row_mask(mask, student.shape[0])
    labels = labels if valid is None else labels.masked_fill(~valid, 0)
    log_probs = torch.log_softmax(hide(in_full_precision(student), valid), 1)
    losses = -(1 - smoothing) * log_probs.gather(1, labels[:, None])[:, 0] - smoothing * log_probs.mean(1)
    return reduce_rows(losses, valid, reduction)


@register(
    "confidence_penalty",
    "response",
    "Pereyra et al., Regularizing Neural Networks by Penalizing Confident Output Distributions, ICLR workshop 2017",
    examples=lambda b, g: {"student": normal(b, 5, generator=g)},
    teacher=(),
    laws=("nonnegative", "student_shift", "permutation"),
)
def confidence_penalty(student: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Penalty on confidence: log C - entropy(softmax(student)), the KL from the uniform distribution.

    Shapes: student logits [B, C]; mask bool [B]. Zero for equal logits. The paper adds -entropy: the same gradient.

    Raises:
        ValueError: wrong shapes, or an unknown reduction.

    Reference: Pereyra et al., 2017.
    """
    check_float("student", student, 2)
    valid = row_mask(mask, student.shape[0])
    log_probs = torch.log_softmax(hide(in_full_precision(student), valid), 1)
    return reduce_rows(_kl(log_probs, torch.full_like(log_probs, -math.log(student.shape[1]))), valid, reduction)
