"""Losses of rankers on lists a teacher has scored: privileged features, pairs, top-one chances, Plackett-Luce."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses.contract import (
    Reduction,
    check_float,
    check_pair,
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

PairTargets = Literal["soft", "hard"]


def _scored(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return pair(rows, 5, generator=generator)


def _scored_and_labelled(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    labels = torch.randint(2, (rows, 5), generator=generator, dtype=torch.float64)
    return {**_scored(rows, generator), "labels": labels}


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    # Two logsigmoids keep the digits where softplus(s) - target * s cancels.
    return -targets * F.logsigmoid(scores) - (1 - targets) * F.logsigmoid(-scores)


@register(
    "privileged_features",
    "ranking",
    "Xu et al., Privileged Features Distillation at Taobao Recommendations, KDD 2020",
    examples=_scored_and_labelled,
    teacher=("teacher", "labels"),
    fixed=("labels",),
    laws=("nonnegative", "permutation", "element_mask"),
    variants=({}, {"weight": 0.0}, {"weight": 1.0}),
)
def privileged_features(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    weight: float = 0.5,
    train_teacher: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """A teacher that also sees privileged features: (1 - w) * BCE(labels, s) + w * BCE(sigmoid(t), s), summed.

    Shapes: student [B] or [B, K], logits from the features there are at serving; teacher the same, logits from those
    and the privileged ones; labels floating in [0, 1] the same; mask bool [B] or [B, K]. Summed over the elements of
    a row. Where student equals teacher it is not zero: targets have an entropy, and the labels differ.

    Options: ``weight`` w in 0..1, 0 for the first steps, while the teacher knows nothing; ``train_teacher`` adds
    BCE(labels, t), through which alone the teacher gets a gradient: both learn in one step, as in the paper.

    Raises:
        ValueError: shapes do not fit, weight outside 0..1, or an unknown reduction.

    Reference: Xu et al., 2020 (the formula from memory).
    """
    check_pair(student, teacher, 1, 2)
    check_float("labels", labels, 1, 2)
    check_shape("labels", labels, tuple(student.shape))
    if not 0 <= weight <= 1:
        raise ValueError(f"weight: wanted a number in 0..1, got {weight}")
    rows, elements = element_mask(mask, tuple(student.shape))
    student = hide(in_full_precision(student), elements)
    labels = hide(teacher_like(labels, student), elements)
    own = hide(in_full_precision(teacher), elements)
    target = torch.sigmoid(teacher_like(own, student))
    losses = (1 - weight) * _cross_entropy(student, labels) + weight * _cross_entropy(student, target)
    if train_teacher:
        losses = losses + _cross_entropy(own, labels)
    losses = hide(losses, elements)
    return reduce_rows(losses.sum(1) if losses.dim() == 2 else losses, rows, reduction)


@register(
    "pairwise_ranking",
    "ranking",
    "Burges et al., Learning to Rank using Gradient Descent, ICML 2005 (RankNet, whose target chances a teacher gives)",
    examples=_scored,
    laws=("nonnegative", "student_shift", "teacher_shift", "permutation", "element_mask"),
    variants=({}, {"temperature": 3.0}, {"targets": "hard"}),
)
def pairwise_ranking(
    student: Tensor,
    teacher: Tensor,
    *,
    targets: PairTargets = "soft",
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Pairs in the teacher's order: mean over pairs i, j of BCE(sigmoid((t_i - t_j) / T), sigmoid(s_i - s_j)).

    Shapes: student and teacher [B, K], scores of the same items; mask bool [B] or [B, K]. A row without a pair counts
    0. Memory is B * K * (K - 1) / 2 a time. Soft targets at T = 1: where the student equals the teacher the value is
    the entropy of the targets, the least there is; it is not zero.

    Options: ``targets`` "soft", or "hard", which is -log sigmoid(s_i - s_j) over the pairs with t_i > t_j (ties do
    not count), what T tends to at 0; ``temperature`` T softens the targets only.

    Raises:
        ValueError: shapes differ, temperature <= 0, unknown targets, or an unknown reduction.

    Reference: Burges et al., 2005.
    """
    check_pair(student, teacher, 2)
    check_positive("temperature", temperature)
    if targets not in get_args(PairTargets):
        raise ValueError(f"targets: wanted one of {', '.join(get_args(PairTargets))}, got {targets!r}")
    rows, elements = element_mask(mask, tuple(student.shape))
    student = hide(in_full_precision(student), elements)
    teacher = hide(teacher_like(teacher, student), elements)
    size = student.shape[1]
    i, j = torch.triu_indices(size, size, 1, device=student.device)
    ahead = teacher[:, i] - teacher[:, j]
    counts = torch.ones_like(ahead, dtype=torch.bool) if elements is None else elements[:, i] & elements[:, j]
    difference = student[:, i] - student[:, j]
    if targets == "hard":
        counts = counts & (ahead != 0)
        losses = -F.logsigmoid(difference * ahead.sign())
    else:
        losses = _cross_entropy(difference, torch.sigmoid(ahead / temperature))
    return reduce_rows(hide(losses, counts).sum(1) / counts.sum(1).clamp(min=1), rows, reduction)


@register(
    "list_net",
    "ranking",
    "Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach, ICML 2007 (ListNet)",
    examples=_scored,
    laws=(
        "stationary_at_equality",
        "nonnegative",
        "student_shift",
        "teacher_shift",
        "permutation",
        "element_mask",
    ),
    variants=({}, {"temperature": 2.0}),
)
def list_net(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Top-one chances of the items of a list: -T^2 * sum_k softmax(teacher/T)_k * log softmax(student/T)_k.

    Shapes: student and teacher [B, K], scores of the same items; mask bool [B] or [B, K] (an item that is not valid
    leaves the list). Where student equals teacher it is T^2 times the entropy of the teacher, the least there is; it
    is soft_targets over the list plus that. The paper has T = 1.

    Raises:
        ValueError: shapes differ, temperature <= 0, or an unknown reduction.

    Reference: Cao et al., 2007.
    """
    check_pair(student, teacher, 2)
    check_positive("temperature", temperature)
    rows, elements = element_mask(mask, tuple(student.shape))
    student = hide(in_full_precision(student), elements) / temperature
    teacher = hide(teacher_like(teacher, student), elements) / temperature
    if elements is not None:
        # A finite floor, not -inf: a row with nothing valid has no NaN on the way either.
        floor = torch.finfo(student.dtype).min / 4
        student, teacher = student.masked_fill(~elements, floor), teacher.masked_fill(~elements, floor)
    losses = torch.softmax(teacher, 1) * torch.log_softmax(student, 1)
    return reduce_rows(-hide(losses, elements).sum(1) * temperature**2, rows, reduction)


@register(
    "plackett_luce",
    "ranking",
    "Xia et al., Listwise Approach to Learning to Rank: Theory and Algorithm, ICML 2008 (ListMLE)",
    examples=_scored,
    laws=("nonnegative", "student_shift", "teacher_shift", "permutation", "element_mask"),
)
def plackett_luce(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Likelihood of the teacher's order: -sum_k [s_k - log sum_{j>=k} exp s_j], k in the order of the teacher.

    Shapes: student and teacher [B, K], scores of the same items; mask bool [B] or [B, K] (an item that is not valid
    leaves the list). Items the teacher scores alike keep the order they are given in. It tends to zero as the student
    puts the items in that order ever farther apart; where student equals teacher it is positive. relaxed_ranking is
    the same of a teacher's top with all others tied below.

    Raises:
        ValueError: shapes differ, or an unknown reduction.

    Reference: Xia et al., 2008.
    """
    check_pair(student, teacher, 2)
    rows, elements = element_mask(mask, tuple(student.shape))
    student = hide(in_full_precision(student), elements)
    teacher = teacher_like(teacher, student)
    if elements is not None:
        # A finite floor: logcumsumexp has NaN gradients at -inf.
        student = student.masked_fill(~elements, torch.finfo(student.dtype).min / 4)
        teacher = teacher.masked_fill(~elements, -torch.inf)
    order = teacher.sort(dim=1, descending=True, stable=True).indices
    listed = student.gather(1, order)
    remaining = torch.logcumsumexp(listed.flip(1), 1).flip(1)
    losses = remaining - listed
    if elements is not None:
        losses = hide(losses, elements.gather(1, order))
    return reduce_rows(losses.sum(1), rows, reduction)
