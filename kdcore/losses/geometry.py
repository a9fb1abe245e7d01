"""Relations between the samples of a batch as geometry: how far apart they lie, and at which angles.

Both losses see a batch through its Gram matrix alone, which is why the widths of student and teacher may differ, and
why no difference of two rows [B, B, D] is ever formed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kdcore.losses.contract import (
    Reduction,
    check_float,
    check_shape,
    hide,
    in_full_precision,
    reduce_rows,
    row_mask,
    teacher_like,
)
from kdcore.losses.examples import pair
from kdcore.losses.registry import register
from kdcore.losses.vectors import gram, squared_distances

_RKD = "Park et al., Relational Knowledge Distillation, CVPR 2019"


def _inputs(student: Tensor, teacher: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Check the features of a batch; return both with zeros in the rows that do not count, and which count [B]."""
    check_float("student", student, 2)
    check_float("teacher", teacher, 2)
    check_shape("teacher", teacher, (student.shape[0], teacher.shape[1]))
    valid = row_mask(mask, student.shape[0])
    student = hide(in_full_precision(student), valid)
    teacher = hide(teacher_like(teacher, student), valid)
    return student, teacher, torch.ones_like(student[:, 0], dtype=torch.bool) if valid is None else valid


def _gram(features: Tensor, valid: Tensor) -> Tensor:
    """Return the inner products float64 [B, B] of rows that were centred: the digits of their differences survive."""
    with torch.autocast(features.device.type, enabled=False):
        return gram(_centred(features, valid).double())


def _centred(features: Tensor, valid: Tensor) -> Tensor:
    """Return the valid rows without their mean, 0 elsewhere; no distance and no angle sees the shift."""
    weight = (valid / valid.sum().clamp(min=1)).to(features.dtype)
    return (features - weight @ features) * valid[:, None]


@register(
    "distance_relations",
    "relation",
    _RKD,
    examples=lambda b, g: pair(b, 4, teacher=(b, 6), generator=g),
    batchwise=True,
    laws=(
        *("zero_at_equality", "stationary_at_equality", "nonnegative"),
        *("student_scale", "translation", "rotation"),
    ),
)
def distance_relations(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Relative distances of a batch: mean_j huber(d(s_i, s_j) / mu_s - d(t_i, t_j) / mu_t), mu the batch's mean.

    Shapes: student [B, D], teacher [B, D'], embeddings; mask bool [B]. d is Euclidean, mu the mean over pairs that are
    apart, huber(e) = e^2 / 2 up to 1 and |e| - 1/2 beyond; a row's mean is over all B rows, itself included, as in the
    authors' code (the paper sums over pairs). Zero where the student is the teacher up to rotation, shift and scale.

    Raises:
        ValueError: shapes do not fit, or an unknown reduction.

    Reference: Park et al., 2019.
    """
    student, teacher, valid = _inputs(student, teacher, mask)
    errors = F.huber_loss(_relative(student, valid), _relative(teacher, valid), reduction="none").to(student.dtype)
    rows = errors.sum(1) / valid.sum().clamp(min=1)
    return reduce_rows(rows, valid, reduction)


def _relative(features: Tensor, valid: Tensor) -> Tensor:
    """Return distances over their mean, float64 [B, B]; 0 where a row does not count."""
    squared = squared_distances(_gram(features, valid)) * (valid[:, None] & valid)
    apart = squared > 0
    distances = squared.masked_fill(~apart, 1.0).sqrt() * apart  # the root has no gradient at 0
    return distances / (distances.sum() / apart.sum().clamp(min=1)).masked_fill(~apart.any(), 1.0)


@register(
    "angle_relations",
    "relation",
    _RKD,
    examples=lambda b, g: pair(b, 4, teacher=(b, 6), generator=g),
    batchwise=True,
    laws=(
        *("zero_at_equality", "stationary_at_equality", "nonnegative"),
        *("student_scale", "translation", "rotation"),
    ),
)
def angle_relations(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Angles between triples of a batch: mean_ik huber(cos(s_i - s_j, s_k - s_j) - cos(t_i - t_j, t_k - t_j)).

    Shapes: student [B, D], teacher [B, D'], embeddings; mask bool [B]. A row j is the corner; its mean is over all B^2
    pairs (i, k), of which those without an angle (a row with itself or its duplicate) add 0, as in the authors' code.
    Zero where the student is the teacher up to rotation, shift and scale. Exact, in O(B^3) time and O(B^2) memory: the
    cosines of a corner come from the Gram matrix, (g_ik - g_ij - g_jk + g_jj) / (d_ij d_jk), a few corners at a time,
    and their gradient is taken on the way.

    Raises:
        ValueError: shapes do not fit, or an unknown reduction.

    Reference: Park et al., 2019.
    """
    student, teacher, valid = _inputs(student, teacher, mask)
    return reduce_rows(_Angles.apply(student, teacher, valid), valid, reduction)


# corners worked on together: two matrices [B, B] stay in a core's cache, and dispatching costs little
_CORNERS = 2


class _Angles(torch.autograd.Function):
    """Mean Huber error [B] of the cosines at every corner, with the gradient by the student's Gram matrix."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
        with torch.autocast(student.device.type, enabled=False):
            student_gram, teacher_gram = _gram(student, valid), _gram(teacher, valid)
            rows, gradient = _corners(student_gram, teacher_gram, valid, None, student.dtype)
        ctx.save_for_backward(student, gradient, student_gram, teacher_gram, valid)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, gradient, student_gram, teacher_gram, valid = ctx.saved_tensors
        counted = upstream[valid]
        with torch.autocast(student.device.type, enabled=False):
            if counted.numel() and bool((counted == counted[0]).all()):  # a mean or a sum
                gradient = gradient * counted[0]
            else:
                _, gradient = _corners(student_gram, teacher_gram, valid, upstream, student.dtype)
            # rows of the gradient by a Gram matrix sum to zero, so it is the same whether the rows were centred or not
            return (gradient + gradient.T) @ _centred(student, valid), None, None


def _corners(
    student: Tensor, teacher: Tensor, valid: Tensor, weights: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the rows [B] and the gradient of their (weighted) sum by the student's Gram matrix, [B, B]."""
    size, pairs = len(valid), valid.sum().clamp(min=1).to(dtype) ** 2
    student_inverse, teacher_inverse = (_inverse_distances(each, valid).to(dtype) for each in (student, teacher))
    student, teacher = student.to(dtype), teacher.to(dtype)
    rows = student.new_zeros(size)
    by_gram, by_half, by_square = torch.zeros_like(student), torch.zeros_like(student), torch.zeros_like(student)
    for start in range(0, size, _CORNERS):
        some = slice(start, start + _CORNERS)
        cosines, inverse = _cosines(student, student_inverse, some)
        error, _ = _cosines(teacher, teacher_inverse, some)
        error.neg_().add_(cosines)
        slope = error.clamp(-1, 1)  # the derivative of the Huber error, which is slope * (error - slope / 2)
        flat = slope.flatten(1)
        rows[some] = torch.linalg.vecdot(flat, error.flatten(1)) - torch.linalg.vecdot(flat, flat) / 2
        if weights is not None:
            slope *= weights[some, None, None]
        by_half[some] = -2 * inverse * torch.bmm(slope, inverse[:, :, None])[:, :, 0]
        # d cos / d inverse_i = cos / inverse_i, and d inverse / d squared distance = -inverse^3 / 2
        by_square[some] = -torch.linalg.vecdot(slope, cosines) * inverse.square()
        slope *= inverse[:, :, None]
        slope *= inverse[:, None, :]
        by_gram += slope.sum(0)
    # the half terms are g_ij - g_jj / 2, the squared distances g_ii + g_jj - 2 g_ij
    by_gram += by_half - 2 * by_square
    by_gram.diagonal().add_(by_square.sum(0) + by_square.sum(1) - by_half.sum(1) / 2)
    return rows / pairs, by_gram / pairs


def _inverse_distances(products: Tensor, valid: Tensor) -> Tensor:
    squared = squared_distances(products) * (valid[:, None] & valid)
    return squared.masked_fill(squared == 0, torch.inf).rsqrt()


def _cosines(products: Tensor, inverse: Tensor, some: slice) -> tuple[Tensor, Tensor]:
    """Return the cosines [J, B, B] at some corners j, and the inverse distances [J, B] from them.

    cos_ik = (g_ik - half_i - half_k) r_i r_k with half_i = g_ij - g_jj / 2 and r the inverse distances from j.
    """
    inverse = inverse[some]
    half = (products[some] - products.diagonal()[some, None] / 2) * inverse
    cosines = inverse[:, :, None] * inverse[:, None, :]
    cosines *= products
    left, right = torch.stack((half, inverse), 2), torch.stack((inverse, half), 1)
    return torch.baddbmm(cosines, left, right, alpha=-1), inverse
