"""Losses on intermediate features: hints, attention maps, kernels of a batch, selectivity patterns, boundaries."""

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
    hide,
    in_full_precision,
    reduce_rows,
    row_mask,
    teacher_like,
)
from kdcore.losses.examples import pair
from kdcore.losses.registry import register
from kdcore.losses.vectors import gram, unit

Elements = Literal["mean", "sum"]
Distance = Literal["norm", "mean_squared"]
Kernel = Literal["polynomial", "linear"]


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Raise unless both are floating feature maps [B, C, H, W] of the same number of rows."""
    check_float("student", student, 4)
    check_float("teacher", teacher, 4)
    check_shape("teacher", teacher, (student.shape[0], *teacher.shape[1:]))


def check_elements(elements: str) -> None:
    """Raise unless ``elements`` is "mean" or "sum"."""
    if elements not in get_args(Elements):
        raise ValueError(f"elements: wanted one of {', '.join(get_args(Elements))}, got {elements!r}")


def over_elements(values: Tensor, elements: Elements) -> Tensor:
    """Return the mean or the sum [B] over all but the first axis."""
    values = values.flatten(1)
    return values.mean(1) if elements == "mean" else values.sum(1)


def pool_to_smaller(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool maps [..., H, W] of either side to the smaller height and the smaller width of the two."""
    height, width = (min(student.shape[axis], teacher.shape[axis]) for axis in (-2, -1))
    pooled = [x if x.shape[-2:] == (height, width) else _average(x, height, width) for x in (student, teacher)]
    return pooled[0], pooled[1]


def _average(maps: Tensor, height: int, width: int) -> Tensor:
    if maps.numel() == 0:  # the pooling kernel refuses a batch of none
        return maps[..., :height, :width]
    return F.adaptive_avg_pool2d(maps, (height, width))


def row_norm(values: Tensor) -> Tensor:
    """Return the Euclidean norm [B] of rows [B, D]; the gradient at a zero row is zero, not NaN."""
    squared = values.square().sum(1)
    zero = squared == 0
    return squared.masked_fill(zero, 1.0).sqrt().masked_fill(zero, 0.0)


@register(
    "hint",
    "feature",
    "Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015",
    examples=lambda b, g: pair(b, 5, generator=g),
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "symmetric", "permutation"),
    variants=({}, {"elements": "sum"}),
)
def hint(
    student: Tensor,
    teacher: Tensor,
    *,
    elements: Elements = "mean",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Half the squared error of features of one shape: 1/2 * mean or sum of (student - teacher)^2.

    Shapes: student and teacher [B, D] or [B, C, H, W], alike; mask bool [B]. Zero where student equals teacher. For
    features of different width or size see Hint.

    Options: elements "mean" makes the value independent of the size of a feature, "sum" is the paper's.

    Raises:
        ValueError: shapes differ, or an unknown option.

    Reference: Romero et al., 2015.
    """
    check_pair(student, teacher, 2, 4)
    check_elements(elements)
    valid = row_mask(mask, student.shape[0])
    student = hide(in_full_precision(student), valid)
    error = student - hide(teacher_like(teacher, student), valid)
    return reduce_rows(over_elements(error.square(), elements) / 2, valid, reduction)


@register(
    "attention_transfer",
    "feature",
    "Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017",
    examples=lambda b, g: pair(b, 3, 2, 4, generator=g),
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "symmetric", "student_scale", "permutation"),
    variants=({}, {"distance": "mean_squared"}, {"power": 1.0}, {"power": 4.0, "distance": "mean_squared"}),
)
def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    power: float = 2.0,
    distance: Distance = "norm",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Distance of normalised attention maps: || Q_S / ||Q_S|| - Q_T / ||Q_T|| ||, Q = vec(sum_c |F_c|^p).

    Shapes: student [B, C_S, H, W]; teacher [B, C_T, H', W']; mask bool [B]. Where the sizes differ the maps Q (not
    the features, whose signs would cancel) are average-pooled to the smaller. Zero where student equals teacher up to
    a factor a row; a map of zeros is at the distance 1 from any other.

    Options: power p >= 1 (2 in the paper's experiments); distance "norm" the Euclidean norm of the paper's equation 2,
    "mean_squared" the mean of the squares over the positions, which is what the authors' code computes. The factor
    beta / 2 is left to the weight of the term.

    Raises:
        ValueError: not feature maps of the same number of rows, or an option is out of range.

    Reference: Zagoruyko and Komodakis, 2017.
    """
    check_maps(student, teacher)
    if not 1 <= power < float("inf"):
        raise ValueError(f"power: wanted a finite number >= 1, got {power}")
    if distance not in get_args(Distance):
        raise ValueError(f"distance: wanted one of {', '.join(get_args(Distance))}, got {distance!r}")
    valid = row_mask(mask, student.shape[0])
    student = hide(in_full_precision(student), valid)
    teacher = hide(teacher_like(teacher, student), valid)
    student, teacher = pool_to_smaller(_attention_map(student, power), _attention_map(teacher, power))
    difference = unit(student.flatten(1)) - unit(teacher.flatten(1))
    values = row_norm(difference) if distance == "norm" else difference.square().mean(1)
    return reduce_rows(values, valid, reduction)


def _attention_map(features: Tensor, power: float) -> Tensor:
    """Return sum_c |F_c|^p [B, H, W] up to a factor a row, which keeps high powers in range (see unit)."""
    scale = features.detach().abs().amax((1, 2, 3), keepdim=True)
    return (features / scale.masked_fill(scale == 0, 1.0)).abs().pow(power).sum(1)


@register(
    "probabilistic_transfer",
    "feature",
    "Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018",
    examples=lambda b, g: pair(b, 4, generator=g),
    batchwise=True,
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "student_scale", "rotation", "permutation"),
    variants=({}, {"diagonal": True}),
)
def probabilistic_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    diagonal: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence of the neighbourhoods in a batch: KL(p_i || q_i), p_ij = K_ij / sum_k K_ik, K = (1 + cosine) / 2.

    p is the teacher's, q the student's; each row is compared with the other valid rows. PKT.

    Shapes: student [B, D_S] and teacher [B, D_T], whose widths may differ; mask bool [B]. Zero where student equals
    teacher up to rotation and scale, and for a batch of one. A vector of zeros is equally near to all others.

    Options: diagonal: False compares different rows only, as in the paper; True counts a row among its own neighbours,
    as in the authors' code. That code also averages over the B^2 pairs: its value is this mean divided by B.

    Raises:
        ValueError: shapes do not fit, or an unknown reduction.

    Reference: Passalis and Tefas, 2018.
    """
    check_float("student", student, 2)
    check_float("teacher", teacher, 2)
    check_shape("teacher", teacher, (student.shape[0], teacher.shape[1]))
    rows = student.shape[0]
    valid = row_mask(mask, rows)
    student = hide(in_full_precision(student), valid)
    teacher = hide(teacher_like(teacher, student), valid)
    pairs = torch.ones(rows, rows, dtype=torch.bool, device=student.device)
    if not diagonal:
        pairs = pairs & ~torch.eye(rows, dtype=torch.bool, device=student.device)
    if valid is not None:
        pairs = pairs & valid[:, None] & valid
    log_q, log_p = _log_conditional(student, pairs), _log_conditional(teacher, pairs)
    values = (log_p.exp() * (log_p - log_q)).masked_fill(~pairs, 0.0).sum(1)
    return reduce_rows(values, valid, reduction)


def _log_conditional(features: Tensor, pairs: Tensor) -> Tensor:
    """Return log p_ij [B, B] of the cosine kernel, normalised over the pairs that count."""
    cosine = gram(unit(features))
    # Opposed vectors have K = 0 up to rounding; below the rounding of 1 + cosine its logarithm means nothing.
    kernel = ((1 + cosine) / 2).clamp(min=torch.finfo(features.dtype).eps)
    total = kernel.masked_fill(~pairs, 0.0).sum(1, keepdim=True)
    return kernel.log() - total.masked_fill(total == 0, 1.0).log()


@register(
    "neuron_selectivity",
    "feature",
    "Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017",
    examples=lambda b, g: pair(b, 3, 2, 3, generator=g),
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "symmetric", "student_scale", "permutation"),
    variants=({}, {"kernel": "linear"}),
)
def neuron_selectivity(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Kernel = "polynomial",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Squared maximum mean discrepancy of channel patterns: mean k(s, s') + mean k(t, t') - 2 * mean k(s, t). NST.

    The patterns of a row are its channels, each a vector over the positions scaled to unit norm (zero if all zero).

    Shapes: student [B, C_S, H, W]; teacher [B, C_T, H', W']; mask bool [B]. Where the sizes differ the features are
    average-pooled to the smaller. Zero where student equals teacher, up to a positive factor a channel.

    Options: kernel "polynomial" (x . y)^2, the paper's best (degree 2, offset 0), "linear" x . y.

    Raises:
        ValueError: not feature maps of the same number of rows, or an unknown option.

    Reference: Huang and Wang, 2017.
    """
    check_maps(student, teacher)
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel: wanted one of {', '.join(get_args(Kernel))}, got {kernel!r}")
    valid = row_mask(mask, student.shape[0])
    student = hide(in_full_precision(student), valid)
    student, teacher = pool_to_smaller(student, hide(teacher_like(teacher, student), valid))
    student, teacher = unit(student.flatten(2)), unit(teacher.flatten(2))
    if kernel == "linear":
        values = (student.mean(1) - teacher.mean(1)).square().sum(1)
    else:
        with torch.autocast(student.device.type, enabled=False):
            values = _polynomial_discrepancy(student, teacher)
    return reduce_rows(values, valid, reduction)


def _polynomial_discrepancy(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the discrepancy [B] of patterns [B, C, N] through the smaller of its two Gram matrices."""
    if student.shape[2] <= max(student.shape[1], teacher.shape[1]):
        # sum_ij (x_i . x_j)^2 = || X^T X ||^2 makes it the distance of two N x N matrices.
        grams = [x.transpose(1, 2) @ x / x.shape[1] for x in (student, teacher)]
        return (grams[0] - grams[1]).square().sum((1, 2))
    pairs = ((student, student), (teacher, teacher), (student, teacher))
    within_student, within_teacher, between = ((a @ b.transpose(1, 2)).square().mean((1, 2)) for a, b in pairs)
    return within_student + within_teacher - 2 * between


def channel_weights(losses_without: Tensor, loss_with: Tensor | float) -> Tensor:
    """Weights of channels by what the teacher loses without them: softmax over c of (losses_without_c - loss_with).

    Shapes: losses_without [C], the supervised loss of the teacher with channel c set to zero, averaged over the data;
    loss_with, that of the whole teacher, a number or 0-d tensor. Returns [C], which sum to 1.

    The softmax does not depend on loss_with; it is an argument so that the increase can be read in the call.

    Raises:
        ValueError: losses_without is not a floating [C], or loss_with is not one number.

    Reference: Li et al., 2019.
    """
    check_float("losses_without", losses_without, 1)
    if isinstance(loss_with, Tensor):
        check_float("loss_with", loss_with, 0)
    return torch.softmax(in_full_precision(losses_without.detach()) - loss_with, 0)


@register(
    "weighted_channels",
    "feature",
    "Li et al., DELTA: Deep Learning Transfer using Feature Map with Attention, ICLR 2019",
    examples=lambda b, g: pair(b, 3, 2, 4, generator=g),
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "symmetric", "permutation"),
    variants=({"weights": torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)},),
)
def weighted_channels(
    student: Tensor,
    teacher: Tensor,
    *,
    weights: Tensor,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Half the squared error of feature maps, weighted by channel: 1/2 * sum_c w_c * mean_hw (S_c - T_c)^2. DELTA.

    Shapes: student and teacher [B, C, H, W], alike; mask bool [B]. Zero where student equals teacher; with weights
    1 / C it is hint.

    Options: weights [C] >= 0, of which a sum of 1 is expected; see channel_weights. They get no gradient. The mean over
    the positions is that of the authors' code (the paper sums); their code also multiplies by C.

    Raises:
        ValueError: shapes differ, or weights is not a floating [C].

    Reference: Li et al., 2019.
    """
    check_pair(student, teacher, 4)
    check_float("weights", weights, 1)
    check_shape("weights", weights, (student.shape[1],))
    valid = row_mask(mask, student.shape[0])
    student = hide(in_full_precision(student), valid)
    error = (student - hide(teacher_like(teacher, student), valid)).square().mean((2, 3))
    return reduce_rows((error * weights.detach().to(error)).sum(1) / 2, valid, reduction)


@register(
    "activation_boundary",
    "feature",
    "Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons, AAAI 2019",
    examples=lambda b, g: pair(b, 5, generator=g),
    laws=("nonnegative", "permutation"),
    variants=({}, {"margin": 0.5, "elements": "sum"}),
)
def activation_boundary(
    student: Tensor,
    teacher: Tensor,
    *,
    margin: float = 1.0,
    elements: Elements = "mean",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Squared hinge on a neuron's boundary: max(0, m - student)^2 where teacher > 0, else max(0, m + student)^2.

    Both are responses before the activation. Only the teacher's sign counts.

    Shapes: student and teacher [B, D] or [B, C, H, W], alike; mask bool [B]. Where student equals teacher it is the
    hinge of what lies within the margin; zero where the student has the teacher's sign and a size of m or more.

    Options: margin m > 0 (1 in the paper); elements "mean" or "sum" over the neurons, "sum" is the paper's.

    Raises:
        ValueError: shapes differ, margin <= 0, or an unknown option.

    Reference: Heo et al., 2019.
    """
    check_pair(student, teacher, 2, 4)
    check_positive("margin", margin)
    check_elements(elements)
    valid = row_mask(mask, student.shape[0])
    student, teacher = hide(in_full_precision(student), valid), hide(teacher.detach(), valid)
    hinge = torch.relu(margin + torch.where(teacher > 0, -student, student))
    return reduce_rows(over_elements(hinge.square(), elements), valid, reduction)
