"""Distilling into trees: the objective of a boosted student, its targets, and leaf values with shrinkage."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses.contract import (
    Reduction,
    check_at_least,
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
from kdcore.losses.examples import pair
from kdcore.losses.registry import register

Shrinkage = Literal["none", "equal", "unequal"]


def _check_share(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: wanted a number in 0..1, got {alpha}")


def _check_blend(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, temperature: float) -> None:
    check_pair(student, teacher, 1)
    check_float("labels", labels, 1)
    check_shape("labels", labels, tuple(student.shape))
    _check_share(alpha)
    check_positive("temperature", temperature)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    # Two logsigmoids keep the digits where softplus(s) - target * s cancels.
    return -targets * F.logsigmoid(logits) - (1 - targets) * F.logsigmoid(-logits)


def _labelled_pair(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    labels = torch.randint(2, (rows,), generator=generator, dtype=torch.float64)
    return {**pair(rows, generator=generator), "labels": labels}


@register(
    "blended_cross_entropy",
    "trees",
    "Li et al., TNT: An Interpretable Tree-Network-Tree Learning Framework, Entropy 2020 (from memory); Hinton, 2015",
    examples=_labelled_pair,
    teacher=("teacher", "labels"),
    fixed=("labels",),
    laws=("nonnegative",),
    variants=({}, {"alpha": 0.9, "temperature": 3.0}, {"alpha": 0.0}, {"alpha": 1.0}),
)
def blended_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Labels and teacher: (1 - alpha) * BCE(labels, sigmoid(s)) + alpha * T^2 * BCE(sigmoid(t/T), sigmoid(s/T)).

    Shapes: student and teacher logits [B]; labels floating [B] in [0, 1]; mask bool [B]. At T = 1 it is the
    cross-entropy against tree_targets, so a booster may be given those instead. Where student equals teacher it is
    not zero: the targets have an entropy, and the labels differ. ``alpha`` in 0..1 is the teacher's share.

    Raises:
        ValueError: shapes differ, alpha outside 0..1, temperature <= 0, or an unknown reduction.

    Reference: Li et al., 2020 (the distillable GBDT); Hinton et al., 2015.
    """
    _check_blend(student, teacher, labels, alpha, temperature)
    rows = row_mask(mask, student.shape[0])
    student = hide(in_full_precision(student), rows)
    teacher, labels = (hide(teacher_like(values, student), rows) for values in (teacher, labels))
    soft = _cross_entropy(student / temperature, torch.sigmoid(teacher / temperature))
    losses = (1 - alpha) * _cross_entropy(student, labels) + alpha * temperature**2 * soft
    return reduce_rows(losses, rows, reduction)


@torch.no_grad()
def gradient_and_hessian(
    student: Tensor, teacher: Tensor, labels: Tensor, *, alpha: float = 0.5, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return first and second derivative [B] of each row's blended_cross_entropy by ``student``, for a booster.

    (1 - alpha) * (p - y) + alpha * T * (p_T - q) and (1 - alpha) * p * (1 - p) + alpha * p_T * (1 - p_T). The second
    is never negative. It underflows to 0 far out, where a booster wants a floor of its own.

    Shapes and Raises: as blended_cross_entropy.
    """
    _check_blend(student, teacher, labels, alpha, temperature)
    student = in_full_precision(student)
    teacher, labels = teacher_like(teacher, student), teacher_like(labels, student)
    p, soft = torch.sigmoid(student), torch.sigmoid(student / temperature)
    q = torch.sigmoid(teacher / temperature)
    gradient = (1 - alpha) * (p - labels) + alpha * temperature * (soft - q)
    # sigmoid(-s), not 1 - p: it keeps its digits where p rounds to 1.
    hessian = (1 - alpha) * p * torch.sigmoid(-student) + alpha * soft * torch.sigmoid(-student / temperature)
    return gradient, hessian


@torch.no_grad()
def tree_targets(
    labels: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 0.5,
    keep_positives: bool = False,
    known: Tensor | None = None,
) -> Tensor:
    """Return the targets u = (1 - alpha) * labels + alpha * teacher, [N], for a tree or booster with soft targets.

    ``keep_positives`` leaves u = 1 where the label is 1: a confirmed fraud is not talked down. Where ``known`` bool
    [N] is false (labels that come later) u is the teacher's probability alone, and the label may be NaN.

    Shapes: labels floating [N] in [0, 1]; teacher probabilities [N].

    Raises:
        ValueError: shapes differ, or alpha outside 0..1.

    Reference: Li et al., 2020; Shen & Kursun, Label Augmentation via Time-based Knowledge Distillation, 2021.
    """
    check_float("labels", labels, 1)
    check_float("teacher", teacher, 1)
    check_shape("teacher", teacher, tuple(labels.shape))
    _check_share(alpha)
    known = row_mask(known, labels.shape[0])
    labels = in_full_precision(labels)
    teacher = teacher_like(teacher, labels)
    targets = torch.lerp(labels, teacher, alpha)
    if keep_positives:
        targets = torch.where(labels == 1, labels, targets)
    return targets if known is None else torch.where(known, targets, teacher)


@torch.no_grad()
def james_stein(means: Tensor, counts: Tensor, variance: Tensor | float, *, unequal: bool = False) -> Tensor:
    """Return the shrunken means [k]: m + max(0, 1 - (k - 3) * v / sum_j (z_j - m)^2) * (z_j - m).

    m is the mean of the means z and v the mean of ``variance`` / counts, the variance of a mean. ``unequal`` takes
    each mean's own variance / counts_j for v (a mean of few rows moves further) and for m the mean weighted by
    counts. An empty leaf (count 0) is not one of the k and becomes m. Three means or fewer are left as they are.

    Shapes: means and counts [k]; variance of a single row, pooled over the leaves, 0-d or a number.

    Raises:
        ValueError: shapes differ.

    Reference: Efron & Morris, Data Analysis Using Stein's Estimator, 1975 (k - 3, positive part); for trees from
    memory of Li et al., 2020.
    """
    check_float("means", means, 1)
    check_float("counts", counts, 1)
    check_shape("counts", counts, tuple(means.shape))
    means = in_full_precision(means)
    counts = teacher_like(counts, means)
    filled = counts > 0
    k = filled.sum()
    importance = counts if unequal else filled.to(means.dtype)
    means = hide(means, filled)
    centre = (means * importance).sum() / importance.sum().masked_fill(k == 0, 1.0)
    away = hide(means - centre, filled)
    spread = away.square().sum()
    noise = hide(variance / counts.masked_fill(~filled, 1.0), filled)
    if not unequal:
        noise = noise.sum() / k.clamp(min=1)
    # No spread: every mean is m already, whatever the factor.
    factor = (1 - (k - 3).clamp(min=0) * noise / spread.masked_fill(spread == 0, 1.0)).clamp(min=0)
    return centre + factor * away


@torch.no_grad()
def refit_leaves(
    leaves: Tensor,
    targets: Tensor,
    weights: Tensor | None = None,
    *,
    n_leaves: int,
    shrinkage: Shrinkage = "none",
) -> Tensor:
    """Return the value of each leaf [n_leaves]: the weighted mean of its targets, shrunken by james_stein if asked.

    The structure of a tree is kept while its values follow new targets. A leaf without weight gets the mean of all
    rows, or what james_stein gives an empty one. For the shrinkage a leaf counts as (sum w)^2 / sum w^2 rows and the
    pooled variance is unbiased for such weights, so that a common factor on the weights changes nothing.

    Shapes: leaves int64 [N], in 0..n_leaves - 1; targets [N]; weights [N], >= 0 (None: 1 each). Summed in float64.

    Raises:
        ValueError: shapes differ, a leaf is out of range, a weight is negative, or an unknown shrinkage.

    Reference: Li et al., 2020, from memory; Kish, Survey Sampling, 1965 (rows a weighted mean is worth).
    """
    check_float("targets", targets, 1)
    check_at_least("n_leaves", n_leaves, 1)
    if leaves.dtype != torch.int64:
        raise ValueError(f"leaves: wanted int64, got {leaves.dtype}")
    check_shape("leaves", leaves, tuple(targets.shape))
    if shrinkage not in get_args(Shrinkage):
        raise ValueError(f"shrinkage: wanted one of {', '.join(get_args(Shrinkage))}, got {shrinkage!r}")
    if leaves.numel() and not 0 <= int(leaves.min()) <= int(leaves.max()) < n_leaves:
        raise ValueError(f"leaves: wanted 0..{n_leaves - 1}, got {int(leaves.min())}..{int(leaves.max())}")
    w = torch.ones_like(targets, dtype=torch.float64) if weights is None else weights.double()
    check_shape("weights", w, tuple(targets.shape))
    if bool((w < 0).any()):
        raise ValueError(f"weights: wanted numbers >= 0, got {float(w.min())}")
    u = targets.double()

    def total(values: Tensor) -> Tensor:
        return torch.zeros(n_leaves, dtype=torch.float64, device=u.device).index_add_(0, leaves, values)

    mass = total(w)
    safe = mass.masked_fill(mass == 0, 1.0)
    overall = (w * u).sum() / w.sum().masked_fill(w.sum() == 0, 1.0)
    means = torch.where(mass > 0, total(w * u) / safe, overall)
    if shrinkage != "none":
        squares = total(w.square())
        worth = mass.square() / squares.masked_fill(squares == 0, 1.0)
        free = (mass - squares / safe).sum()
        error = (w * (u - means[leaves]).square()).sum()
        # Nothing is free where each leaf has one row: the noise is unknown, and nothing is shrunken.
        variance = torch.where(free > 1e-12 * w.sum(), error / free.masked_fill(free <= 0, 1.0), 0.0)
        means = james_stein(means, worth, variance, unequal=shrinkage == "unequal")
    return means.to(in_full_precision(targets).dtype)
