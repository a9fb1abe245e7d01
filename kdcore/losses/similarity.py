"""Relations between the samples of a batch as knowledge: similarities, rankings and attention.

Distances and angles of a batch are in geometry.py.
"""

from __future__ import annotations

import math
from itertools import permutations
from typing import Literal, get_args

import torch
from torch import Tensor

from kdcore.losses.contract import (
    Reduction,
    check_at_least,
    check_float,
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
from kdcore.losses.vectors import gram, squared_distances, unit

_DARK_RANK = (
    "Chen et al., DarkRank: Accelerating Deep Metric Learning via Cross Sample Similarities Transfer, AAAI 2018"
)
Kernel = Literal["gaussian", "bilinear"]


# What they share; relation.py and structure.py use it too.


def row_distances(features: Tensor) -> Tensor:
    """Return the squared distances float64 [B, B] of rows [B, D]; those that are rounding (duplicate rows) are 0."""
    # centred and in float64, so that the digits of close rows survive; the shift has no gradient
    return squared_distances(gram(features.double() - features.detach().double().mean(0)))


def mean_over_columns(pairs: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean [B] of every row of [B, B] over the valid columns; what is not valid must be finite."""
    if valid is None:
        return pairs.sum(1) / max(pairs.shape[1], 1)
    return (pairs * valid).sum(1) / valid.sum().clamp(min=1)


def two_batches(
    student: Tensor, teacher: Tensor, mask: Tensor | None, *dimensions: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check two tensors of as many rows (widths may differ); return both, hidden and flattened, and the valid rows."""
    check_float("student", student, *dimensions)
    check_float("teacher", teacher, *dimensions)
    check_shape("teacher", teacher, (student.shape[0], *teacher.shape[1:]))
    valid = row_mask(mask, student.shape[0])
    student = hide(in_full_precision(student), valid)
    return student.flatten(1), hide(teacher_like(teacher, student), valid).flatten(1), valid


@register(
    "correlation_congruence",
    "relation",
    "Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019",
    examples=lambda b, g: pair(b, 4, generator=g),
    batchwise=True,
    laws=(
        *("zero_at_equality", "stationary_at_equality", "nonnegative"),
        *("student_scale", "rotation", "symmetric", "permutation"),
    ),
    variants=({}, {"kernel": "bilinear"}, {"gamma": 1.0, "order": 4}),
)
def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Kernel = "gaussian",
    gamma: float = 0.4,
    order: int = 2,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Correlations of a batch: mean_j (k(s_i, s_j) - k(t_i, t_j))^2, k = exp(-2 gamma) sum_{p<=P} (2 gamma x.y)^p / p!.

    Shapes: student [B, D], teacher [B, D'], L2-normalised inside; mask bool [B]; j over the valid rows, i included.
    kernel="gaussian" is the Taylor series of exp(-gamma ||x - y||^2) up to ``order`` P (0.4 and 2 in the paper),
    "bilinear" is x . y. Zero where the student is the teacher up to rotation and scale.

    Raises:
        ValueError: shapes do not fit, an option is out of range, or an unknown kernel or reduction.

    Reference: Peng et al., 2019.
    """
    student, teacher, valid = two_batches(student, teacher, mask, 2)
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel: wanted one of {', '.join(get_args(Kernel))}, got {kernel!r}")
    check_positive("gamma", gamma)
    check_at_least("order", order, 1)
    correlations = []
    for rows in (unit(student), unit(teacher)):
        with torch.autocast(rows.device.type, enabled=False):
            products = rows @ rows.T
        if kernel == "gaussian":
            scaled, series = 2 * gamma * products, torch.ones_like(products)
            for power in range(order, 0, -1):
                series = 1 + scaled / power * series
            products = series * math.exp(-2 * gamma)
        correlations.append(products)
    return reduce_rows(mean_over_columns((correlations[0] - correlations[1]).square(), valid), valid, reduction)


@register(
    "similarity_preserving",
    "relation",
    "Tung & Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019",
    examples=lambda b, g: pair(b, 2, 2, 3, generator=g),
    batchwise=True,
    laws=(
        *("zero_at_equality", "stationary_at_equality", "nonnegative"),
        *("student_scale", "rotation", "symmetric", "permutation"),
    ),
)
def similarity_preserving(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Similarities of a batch: mean_j (G_s - G_t)_ij^2, G = A A^T of the flattened rows, each row of G over its norm.

    Shapes: student and teacher [B, D], [B, T, D] or [B, C, H, W], of any widths; mask bool [B]; j over the valid rows,
    i included, so that the mean is the paper's ||G_s - G_t||_F^2 / B^2. Zero where the student is the teacher up to
    rotation and scale.

    Raises:
        ValueError: shapes do not fit, or an unknown reduction.

    Reference: Tung & Mori, 2019.
    """
    student, teacher, valid = two_batches(student, teacher, mask, 2, 3, 4)
    difference = unit(gram(student)) - unit(gram(teacher))  # hidden rows are zero columns
    return reduce_rows(mean_over_columns(difference.square(), valid), valid, reduction)


def _others(rows: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """Return which [B, B] of the columns are valid rows other than the row itself."""
    others = ~torch.eye(rows, dtype=torch.bool, device=device)
    return others if valid is None else others & valid


def _scores(features: Tensor, alpha: float, beta: float) -> Tensor:
    """Return -alpha ||x_i - x_j||^beta [B, B]."""
    squared = row_distances(features)
    apart = squared > 0
    return -alpha * (squared.masked_fill(~apart, 1.0) ** (beta / 2) * apart).to(features.dtype)


def _check_dark_rank(alpha: float, beta: float) -> None:
    check_positive("alpha", alpha)
    if not 1 <= beta < torch.inf:
        raise ValueError(f"beta: wanted a finite number >= 1, got {beta}")


@register(
    "darkrank_hard",
    "relation",
    _DARK_RANK,
    examples=lambda b, g: pair(b, 4, generator=g),
    batchwise=True,
    laws=("nonnegative", "student_scale", "rotation", "permutation"),
    variants=({}, {"alpha": 1.5, "beta": 1.0}),
)
def darkrank_hard(
    student: Tensor,
    teacher: Tensor,
    *,
    alpha: float = 3.0,
    beta: float = 3.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Likelihood of the teacher's ranking: -sum_k [S_k - log sum_{l>=k} exp S_l], S = -alpha ||query - x||^beta.

    Every row is the query once; its list is all other valid rows, by the teacher's distances (ties in batch order).
    The paper takes the first row of a batch as query. Rows are L2-normalised inside.

    Shapes: student [B, D], teacher [B, D'], embeddings; mask bool [B]. Not zero at equality: it falls with the gaps of
    the student's scores. Options: alpha > 0 and beta >= 1, both 3 in the paper.

    Raises:
        ValueError: shapes do not fit, an option is out of range, or an unknown reduction.

    Reference: Chen et al., 2018; Xia et al., ICML 2008 (ListMLE).
    """
    student, teacher, valid = two_batches(student, teacher, mask, 2)
    _check_dark_rank(alpha, beta)
    others = _others(len(student), valid, student.device)
    order = (
        _scores(unit(teacher), alpha, beta)
        .masked_fill(~others, -torch.inf)
        .argsort(dim=1, descending=True, stable=True)
    )
    # A finite floor: logcumsumexp has NaN gradients at -inf.
    listed = _scores(unit(student), alpha, beta).masked_fill(~others, torch.finfo(student.dtype).min / 4)
    listed = listed.gather(1, order)
    remaining = torch.logcumsumexp(listed.flip(1), 1).flip(1)
    return reduce_rows(hide(remaining - listed, others.gather(1, order)).sum(1), valid, reduction)


def _log_plackett_luce(scores: Tensor, present: Tensor, orders: Tensor) -> Tensor:
    """Return log-probabilities [B, P] of orders [P, K] of scores [B, K]; an absent item counts for nothing."""
    listed = scores.masked_fill(~present, torch.finfo(scores.dtype).min / 64)[:, orders]
    present = present[:, orders]
    result = torch.zeros_like(listed[:, :, 0]) if orders.shape[1] else listed.sum(2)
    for place in range(orders.shape[1] - 1):
        first = torch.log_softmax(listed[:, :, place:], 2)[:, :, 0]
        result = result + first.masked_fill(~present[:, :, place], 0.0)
    return result


@register(
    "darkrank_soft",
    "relation",
    _DARK_RANK,
    examples=lambda b, g: pair(b, 4, generator=g),
    batchwise=True,
    laws=(
        *("zero_at_equality", "stationary_at_equality", "nonnegative"),
        *("student_scale", "rotation", "permutation"),
    ),
    variants=({}, {"length": 3, "alpha": 1.5, "beta": 1.0}),
)
def darkrank_soft(
    student: Tensor,
    teacher: Tensor,
    *,
    length: int = 4,
    alpha: float = 3.0,
    beta: float = 3.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence of rankings: KL(P_t || P_s) over all orders of a short list, P Plackett-Luce, S = -alpha d^beta.

    Every row is the query once; its list is the teacher's ``length`` nearest other valid rows (fewer where the batch
    has fewer). All length! orders are enumerated, so time and memory are B * length! * length. Rows are L2-normalised
    inside; d is the distance to the query.

    Shapes: student [B, D], teacher [B, D'], embeddings; mask bool [B]. Zero where the student is the teacher up to
    rotation and scale. Options: length 2..6; alpha > 0 and beta >= 1, both 3 in the paper.

    Raises:
        ValueError: shapes do not fit, an option is out of range, or an unknown reduction.

    Reference: Chen et al., 2018.
    """
    student, teacher, valid = two_batches(student, teacher, mask, 2)
    _check_dark_rank(alpha, beta)
    if not 2 <= length <= 6:
        raise ValueError(f"length: wanted 2..6, got {length}")
    others = _others(len(student), valid, student.device)
    teacher_scores = _scores(unit(teacher), alpha, beta)
    length = min(length, max(len(student) - 1, 0))
    nearest = teacher_scores.masked_fill(~others, -torch.inf).topk(length, 1).indices
    present = others.gather(1, nearest)
    orders = torch.tensor(list(permutations(range(length))), dtype=torch.int64, device=student.device)
    log_p = _log_plackett_luce(teacher_scores.gather(1, nearest), present, orders)
    log_q = _log_plackett_luce(_scores(unit(student), alpha, beta).gather(1, nearest), present, orders)
    # Absent items stand last, in any order among themselves: one order of the present ones is there that many times.
    moved = present[:, orders]
    proper = (moved[..., :-1] | ~moved[..., 1:]).all(2)
    copies = torch.lgamma((length - present.sum(1) + 1).to(log_p.dtype)).exp()
    losses = (log_p.exp() * (log_p - log_q)).masked_fill(~proper, 0.0).sum(1) / copies
    return reduce_rows(losses, valid, reduction)


@register(
    "graph_relations",
    "relation",
    "Lee & Song, Graph-based Knowledge Distillation by Multi-head Attention Network, BMVC 2019",
    examples=lambda b, g: pair(b, 4, teacher=(b, 6), generator=g),
    batchwise=True,
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "student_scale"),
    variants=({"heads": 1}, {"heads": 2, "temperature": 0.5}),
)
def graph_relations(
    student: Tensor,
    teacher: Tensor,
    *,
    heads: int = 4,
    temperature: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Attention between samples: mean over heads of KL(A_t || A_s), A_i = softmax_j(cos(x_i, x_j) / temperature).

    Without parameters: head h sees the h-th of ``heads`` equal slices of the channels, where the paper learns
    projections of two layers' singular vectors on the teacher. j runs over the other valid rows; a row with fewer than
    two of them has value 0.

    Shapes: student [B, D], teacher [B, D'], D and D' multiples of heads; mask bool [B]. Zero where student equals
    teacher up to a scale and a rotation of each slice. Defaults heads 4, temperature 0.1 (this library's).

    Raises:
        ValueError: shapes do not fit, an option is out of range, or an unknown reduction.

    Reference: Lee & Song, 2019.
    """
    student, teacher, valid = two_batches(student, teacher, mask, 2)
    check_at_least("heads", heads, 1)
    check_positive("temperature", temperature)
    others, log_attention = _others(len(student), valid, student.device), []
    for argument, rows in (("student", student), ("teacher", teacher)):
        if rows.shape[1] % heads:
            raise ValueError(f"{argument}: wanted a width that is a multiple of {heads} heads, got {rows.shape[1]}")
        slices = unit(rows.unflatten(1, (heads, rows.shape[1] // heads))).transpose(0, 1)
        with torch.autocast(rows.device.type, enabled=False):
            cosines = torch.bmm(slices, slices.mT) / temperature
        # A finite floor: a row without others would be NaN.
        log_attention.append(torch.log_softmax(cosines.masked_fill(~others, torch.finfo(rows.dtype).min / 4), 2))
    log_q, log_p = log_attention
    divergence = (log_p.exp() * (log_p - log_q)).masked_fill(~others, 0.0).sum(2)
    return reduce_rows(divergence.mean(0), valid, reduction)
