"""Relations inside a network as knowledge: between two layers, and between output and input.

Relations between the samples of a batch are in similarity.py and geometry.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

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
)
from kdcore.losses.examples import normal, pair
from kdcore.losses.registry import register
from kdcore.losses.similarity import two_batches
from kdcore.losses.vectors import unit


def two_layers(
    layers: Mapping[str, Tensor], mask: Tensor | None, dimensions: int
) -> tuple[list[Tensor], Tensor | None]:
    """Check student_first, student_second, teacher_first and teacher_second; return them hidden, and the valid rows."""
    rows, result = next(iter(layers.values())).shape[:1], []
    for argument, values in layers.items():
        check_float(argument, values, dimensions)
        check_shape(argument, values, (*rows, *values.shape[1:]))
        if 0 in values.shape[1:]:
            raise ValueError(f"{argument}: wanted no empty axis but the first, got shape {tuple(values.shape)}")
    valid = row_mask(mask, rows[0])
    for argument, values in layers.items():
        values = values.detach() if argument.startswith("teacher") else values
        result.append(hide(in_full_precision(values).to(in_full_precision(layers["student_first"]).dtype), valid))
    return result, valid


def first_two_equal(inputs: dict[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make the student's two layers those of the teacher."""
    return {**inputs, **{f"student_{layer}": inputs[f"teacher_{layer}"].clone() for layer in ("first", "second")}}


# Between two layers.


def _check_channels(layers: Mapping[str, Tensor]) -> None:
    for layer in ("first", "second"):
        student, teacher = layers[f"student_{layer}"], layers[f"teacher_{layer}"]
        check_shape(f"teacher_{layer}", teacher, (*student.shape[:2], *teacher.shape[2:]))


def _two_maps(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "student_first": normal(rows, 3, 4, 4, generator=generator),
        "student_second": normal(rows, 2, 2, 3, generator=generator),
        "teacher_first": normal(rows, 3, 5, 4, generator=generator),
        "teacher_second": normal(rows, 2, 5, 4, generator=generator),
    }


def _flow(first: Tensor, second: Tensor) -> Tensor:
    """Return G [B, C1, C2] of two feature maps [B, C, H, W]."""
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    first, second = (
        (maps if tuple(maps.shape[2:]) == size else F.adaptive_max_pool2d(maps, size)).flatten(2)
        for maps in (first, second)
    )
    with torch.autocast(first.device.type, enabled=False):
        return first @ second.mT / first.shape[2]


@register(
    "flow_of_solution",
    "relation",
    "Yim et al., A Gift from Knowledge Distillation, CVPR 2017",
    examples=_two_maps,
    teacher=("teacher_first", "teacher_second"),
    laws=("zero_at_equality", "nonnegative"),
    variants=({}, {"entries": "mean"}),
    at_equality=first_two_equal,
)
def flow_of_solution(
    student_first: Tensor,
    student_second: Tensor,
    teacher_first: Tensor,
    teacher_second: Tensor,
    *,
    entries: Literal["sum", "mean"] = "sum",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Flow between two layers: sum_ij (G_s - G_t)_ij^2, G_ij = sum over positions of F1_i F2_j / (h w).

    Shapes: student_first, student_second, teacher_first, teacher_second [B, C, H, W], feature maps at the start and
    the end of a block; student and teacher agree in C at each, and may differ in H and W. Of two maps of one network
    the larger is max-pooled to the smaller. mask bool [B]. Zero where student equals teacher. entries="sum" as in the
    paper, "mean" divides by C1 * C2.

    Raises:
        ValueError: shapes do not fit, or an unknown entries or reduction.

    Reference: Yim et al., 2017.
    """
    layers = {
        "student_first": student_first,
        "student_second": student_second,
        "teacher_first": teacher_first,
        "teacher_second": teacher_second,
    }
    maps, valid = two_layers(layers, mask, 4)
    _check_channels(layers)
    if entries not in ("sum", "mean"):
        raise ValueError(f"entries: wanted 'sum' or 'mean', got {entries!r}")
    squares = (_flow(maps[0], maps[1]) - _flow(maps[2], maps[3])).square().flatten(1)
    return reduce_rows(squares.sum(1) if entries == "sum" else squares.mean(1), valid, reduction)


def _right_singular_vectors(maps: Tensor, count: int) -> Tensor:
    """Return the first right singular vectors [B, C, count] of the matrices [H W, C] of feature maps [B, C, H, W].

    With A = M^T M and eigenvalues l: dv_j = sum_{i != j} v_i (v_i . dA v_j) / (l_j - l_i). The decomposition is taken
    without a graph and this derivative is put on it; a term whose gap is rounding is left out, and a vector without
    a singular value is zero, so gradients are finite.
    """
    with torch.autocast(maps.device.type, enabled=False):
        matrix = maps.flatten(2).mT
        _, singular, right = torch.linalg.svd(matrix.detach(), full_matrices=False)
        values, right = singular.square(), right.mT
        rounding = torch.finfo(values.dtype).eps * max(matrix.shape[1:]) * values[:, :1]
        top = right[..., :count] * (values[:, :count] > rounding)[:, None]
        gaps = values[:, None, :count] - values[:, :, None]
        between = gaps.masked_fill(gaps.abs() <= rounding[:, None], torch.inf).reciprocal()
        # the directions beyond the rank, where l_i = 0
        beyond = values[:, None, :count].masked_fill(values[:, None, :count] <= rounding[:, None], torch.inf)
        change = matrix.mT @ (matrix @ top)
        change = change - change.detach()  # zero, with the derivative dA v_j
        inside = right.mT @ change
        return top + right @ (between * inside) + (change - right @ inside) / beyond


def _with_sign(vectors: Tensor, like: Tensor) -> Tensor:
    return torch.where((vectors.detach() * like).sum(1, keepdim=True) < 0, -vectors, vectors)


@register(
    "singular_vectors",
    "relation",
    "Lee et al., Self-supervised Knowledge Distillation Using Singular Value Decomposition, ECCV 2018",
    examples=_two_maps,
    teacher=("teacher_first", "teacher_second"),
    laws=("zero_at_equality", "nonnegative"),
    variants=({}, {"count": 2, "bandwidth": 1.0}),
    at_equality=first_two_equal,
)
def singular_vectors(
    student_first: Tensor,
    student_second: Tensor,
    teacher_first: Tensor,
    teacher_second: Tensor,
    *,
    count: int = 1,
    bandwidth: float = 8.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Relation of two layers' singular vectors: mean_ijk (R_s - R_t)^2, R_ijk = exp(-(v1_ik - v2_jk)^2 / bandwidth).

    v_k in R^C is the k-th right singular vector of a feature map [H W, C]. Its sign is free: a teacher's is such that
    the entry of largest size is positive, a student's such that its product with the teacher's of that layer is not
    negative (the authors also re-order the student's vectors by likeness; here they keep their order). Gradients are
    those of the singular vectors, without terms whose singular values coincide.

    Shapes: student_first, student_second, teacher_first, teacher_second [B, C, H, W], feature maps at two layers;
    student and teacher agree in C at each, and may differ in H and W; mask bool [B]. R is [B, C1, C2, count] in
    memory. Zero where student equals teacher. ``count``
    vectors, at most min(H W, C) of any map; ``bandwidth`` 8 as in the authors' code, which sums where this averages.

    Raises:
        ValueError: shapes do not fit, count or bandwidth is out of range, or an unknown reduction.

    Reference: Lee et al., 2018.
    """
    layers = {
        "student_first": student_first,
        "student_second": student_second,
        "teacher_first": teacher_first,
        "teacher_second": teacher_second,
    }
    maps, valid = two_layers(layers, mask, 4)
    _check_channels(layers)
    check_positive("bandwidth", bandwidth)
    most = min(min(m.shape[1], m.shape[2] * m.shape[3]) for m in maps)
    if not 1 <= count <= most:
        raise ValueError(f"count: wanted 1..{most} (the smallest rank), got {count}")
    vectors = [_right_singular_vectors(m, count) for m in maps]
    for student, teacher in ((0, 2), (1, 3)):
        largest = vectors[teacher].abs().argmax(1, keepdim=True)
        vectors[teacher] = vectors[teacher] * (vectors[teacher].gather(1, largest).sign())
        vectors[student] = _with_sign(vectors[student], vectors[teacher])
    relations = [
        torch.exp((first[:, :, None] - second[:, None]).square() / -bandwidth)
        for first, second in (vectors[:2], vectors[2:])
    ]
    return reduce_rows((relations[0] - relations[1]).square().flatten(1).mean(1), valid, reduction)


# Between output and input.


@register(
    "jacobian_matching",
    "relation",
    "Srinivas & Fleuret, Knowledge Transfer with Jacobian Matching, ICML 2018",
    examples=lambda b, g: pair(b, 2, 3, generator=g),
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "student_scale", "symmetric", "permutation"),
)
def jacobian_matching(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Match directions of input gradients: || J_s / ||J_s|| - J_t / ||J_t|| ||^2, norms over all inputs of a row.

    Shapes: student and teacher [B, D, ...] (1 to 4 axes beside B), gradients of one output by the same input, see
    input_jacobian; mask bool [B]. It is 2 - 2 cos, so 0 where they point the same way and at most 4; a zero gradient
    counts as the zero vector.

    Raises:
        ValueError: shapes differ, or an unknown reduction.

    Reference: Srinivas & Fleuret, 2018.
    """
    check_pair(student, teacher, 2, 3, 4, 5)
    student, teacher, valid = two_batches(student, teacher, mask, *range(2, 6))
    return reduce_rows((unit(student) - unit(teacher)).square().sum(1), valid, reduction)


def input_jacobian(outputs: Tensor, inputs: Tensor, index: Tensor, *, create_graph: bool = False) -> Tensor:
    """Return the gradient of outputs[b, index[b]] by inputs[b], of the shape of ``inputs``.

    Shapes: outputs [B, C], computed from inputs [B, D, ...], which require a gradient; index int64 [B], in the paper
    the teacher's best class. The student's needs create_graph=True for a loss on it to reach the parameters. Rows
    must not see each other: batch normalisation has to be in evaluation mode.

    Raises:
        ValueError: shapes do not fit, or ``inputs`` requires no gradient.

    Reference: Srinivas & Fleuret, 2018.
    """
    check_float("outputs", outputs, 2)
    if index.dtype != torch.int64:
        raise ValueError(f"index: wanted int64, got {index.dtype}")
    check_shape("index", index, (outputs.shape[0],))
    check_shape("inputs", inputs, (outputs.shape[0], *inputs.shape[1:]))
    if not inputs.requires_grad:
        raise ValueError("inputs: wanted a tensor that requires a gradient, got one that does not")
    chosen = outputs.gather(1, index[:, None]).sum()
    return torch.autograd.grad(chosen, inputs, create_graph=create_graph, retain_graph=True)[0]
