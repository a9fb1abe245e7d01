"""Losses between the layers of two transformers: attention, relations of values, hidden states; which layer from which.

A position at or beyond ``lengths`` is padding: it is never looked at, neither as query nor as key. A row of length 0
does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from kdcore.losses.contract import (
    Reduction,
    check_at_least,
    check_float,
    check_shape,
    hide,
    in_full_precision,
    reduce_rows,
    row_mask,
    teacher_like,
)
from kdcore.losses.examples import pair
from kdcore.losses.registry import Examples, register
from kdcore.losses.vectors import unit

Divergence = Literal["kl", "mse"]
Strategy = Literal["uniform", "skip", "last"]


def _examples(student: tuple[int, ...], teacher: tuple[int, ...]) -> Examples:
    """Return a maker of inputs with lengths 2..4 (the attention of one position to itself is always 1)."""

    def make(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        inputs = pair(rows, *student, teacher=(rows, *teacher), generator=generator)
        return {**inputs, "lengths": torch.randint(2, 5, (rows,), generator=generator)}

    return make


def _positions(lengths: Tensor | None, mask: Tensor | None, values: Tensor, time: int) -> Tensor:
    """Return which positions count, bool [B, T]; a length above T (left unchecked: no sync here) is T."""
    rows = values.shape[0]
    valid = row_mask(mask, rows)
    positions = torch.ones(rows, time, dtype=torch.bool, device=values.device)
    if lengths is not None:
        if lengths.dtype != torch.int64:
            raise ValueError(f"lengths: wanted int64 numbers of positions, got {lengths.dtype}")
        check_shape("lengths", lengths, (rows,))
        positions = torch.arange(time, device=values.device) < lengths[:, None]
    return positions if valid is None else positions & valid[:, None]


def _attention_kl(student: Tensor, teacher: Tensor, positions: Tensor) -> Tensor:
    """Return the mean KL(teacher || student) [B] over heads and valid queries of scores [B, heads, T, T]."""
    # A large negative score instead of -inf, so that a column of excluded keys has a gradient (zero), not a NaN.
    least = torch.finfo(student.dtype).min / 2
    keys = positions[:, None, None, :]
    log_q, log_p = (torch.log_softmax(x.clamp(min=least).masked_fill(~keys, least), 3) for x in (student, teacher))
    if log_q.shape[1] != log_p.shape[1]:
        log_q, log_p = (x.logsumexp(1, keepdim=True) - math.log(x.shape[1]) for x in (log_q, log_p))
    queries = (log_p.exp() * (log_p - log_q)).sum(3).masked_fill(~positions[:, None], 0.0)
    return queries.sum((1, 2)) / (log_q.shape[1] * positions.sum(1).clamp(min=1))


def _attention_mse(student: Tensor, teacher: Tensor, pairs: Tensor) -> Tensor:
    """Return the mean squared error [B] over heads and pairs; what the teacher excludes by -inf is left out."""
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    counted = pairs & (teacher != -torch.inf)
    error = student.masked_fill(~counted, 0.0) - teacher.masked_fill(~counted, 0.0)
    return error.square().sum((1, 2, 3)) / counted.sum((1, 2, 3)).clamp(min=1)


@register(
    "attention_matrices",
    "feature",
    "Wang et al., MiniLM, NeurIPS 2020 (KL); Jiao et al., TinyBERT, EMNLP 2020 (MSE)",
    examples=_examples((2, 4, 4), (2, 4, 4)),
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative"),
    variants=({}, {"divergence": "mse"}),
)
def attention_matrices(
    student: Tensor,
    teacher: Tensor,
    lengths: Tensor | None = None,
    *,
    divergence: Divergence = "kl",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence of self-attention: mean over heads and queries of KL(softmax(teacher) || softmax(student)), or MSE.

    Shapes: student [B, heads_S, T, T] and teacher [B, heads_T, T, T], the scores before the softmax, queries before
    keys; lengths int64 [B] (None: no padding); mask bool [B]. Keys may be excluded by a score of -inf, as in causal
    attention, but not all keys of a valid query. Log-probabilities are scores as well. Zero where student equals
    teacher; with "kl" up to a constant a query.

    Options: divergence "kl" (MiniLM), "mse" the squared error of what is given, averaged over heads and valid pairs
    (TinyBERT gives the scores). Where the numbers of heads differ, the means over the heads are compared: of the
    probabilities for "kl", of the scores for "mse".

    Raises:
        ValueError: shapes do not fit, or an unknown option.

    Reference: Wang et al., 2020; Jiao et al., 2020.
    """
    check_float("student", student, 4)
    check_float("teacher", teacher, 4)
    if divergence not in get_args(Divergence):
        raise ValueError(f"divergence: wanted one of {', '.join(get_args(Divergence))}, got {divergence!r}")
    time = student.shape[3]
    check_shape("student", student, (*student.shape[:2], time, time))
    check_shape("teacher", teacher, (student.shape[0], teacher.shape[1], time, time))
    positions = _positions(lengths, mask, student, time)
    pairs = (positions[:, :, None] & positions[:, None, :])[:, None]
    student = in_full_precision(student).masked_fill(~pairs, 0.0)
    teacher = teacher_like(teacher, student).masked_fill(~pairs, 0.0)
    if divergence == "kl":
        values = _attention_kl(student, teacher, positions)
    else:
        values = _attention_mse(student, teacher, pairs)
    return reduce_rows(values, positions.any(1), reduction)


@register(
    "value_relations",
    "feature",
    "Wang et al., MiniLM: Deep Self-Attention Distillation, NeurIPS 2020; MiniLMv2, Findings of ACL 2021",
    examples=_examples((4, 4), (4, 4)),
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "padding"),
    variants=({}, {"heads": 2}),
)
def value_relations(
    student: Tensor,
    teacher: Tensor,
    lengths: Tensor | None = None,
    *,
    heads: int = 1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Divergence of the relations of values: mean KL(R_T || R_S) over heads and positions, R = softmax(V V'/sqrt(d)).

    Shapes: student [B, T, D_S] and teacher [B, T, D_T], the values of all heads side by side, as the value projection
    gives them (widths may differ; queries or keys can be related in the same way, as in MiniLMv2); lengths int64 [B]
    (None: no padding); mask bool [B]. Zero where student equals teacher up to a rotation in each head.

    Options: heads: the relation heads a width is cut into, d = D / heads wide. MiniLM: the attention heads of both.

    Raises:
        ValueError: shapes do not fit, heads does not divide a width, or an unknown reduction.

    Reference: Wang et al., 2020 and 2021.
    """
    check_float("student", student, 3)
    check_float("teacher", teacher, 3)
    check_shape("teacher", teacher, (*student.shape[:2], teacher.shape[2]))
    check_at_least("heads", heads, 1)
    for argument, values in (("student", student), ("teacher", teacher)):
        if values.shape[2] % heads:
            raise ValueError(f"heads: wanted a divisor of the width of {argument}, {values.shape[2]}, got {heads}")
    positions = _positions(lengths, mask, student, student.shape[1])
    student = hide(in_full_precision(student), positions)
    teacher = hide(teacher_like(teacher, student), positions)
    with torch.autocast(student.device.type, enabled=False):
        scores = _relations(student, heads), _relations(teacher, heads)
    return reduce_rows(_attention_kl(*scores, positions), positions.any(1), reduction)


def _relations(values: Tensor, heads: int) -> Tensor:
    """Return the scaled dot products [B, heads, T, T] of [B, T, D]."""
    values = values.unflatten(2, (heads, -1)).transpose(1, 2)
    return values @ values.transpose(2, 3) / math.sqrt(values.shape[3])


def map_layers(n_student: int, n_teacher: int, strategy: Strategy = "uniform") -> tuple[int, ...]:
    """Return for each student layer the index of the teacher layer it learns from, counted from 0, rising.

    "uniform": layer i (from 1) learns from i * n_teacher / n_student, rounded, half up; the last from the last
    (TinyBERT). "skip": from i * k, k = n_teacher // n_student (PKD-Skip). "last": from the last n_student (PKD-Last).
    The embedding layer is not counted. PKD leaves the top layer of both to the loss on logits: give it one layer less.

    Raises:
        ValueError: not 1 <= n_student <= n_teacher, or an unknown strategy.

    Reference: Jiao et al., 2020; Sun et al., 2019.
    """
    if not 1 <= n_student <= n_teacher:
        raise ValueError(f"n_student: wanted 1..{n_teacher} (n_teacher), got {n_student}")
    numbers = range(1, n_student + 1)
    if strategy == "uniform":
        return tuple((2 * i * n_teacher + n_student) // (2 * n_student) - 1 for i in numbers)
    if strategy == "skip":
        return tuple(i * (n_teacher // n_student) - 1 for i in numbers)
    if strategy == "last":
        return tuple(n_teacher - n_student + i - 1 for i in numbers)
    raise ValueError(f"strategy: wanted one of {', '.join(get_args(Strategy))}, got {strategy!r}")


def _mapped(inputs: dict[str, Tensor], options: Mapping[str, Any]) -> dict[str, Tensor]:
    layers = options.get("layers") or map_layers(inputs["student"].shape[1], inputs["teacher"].shape[1])
    return {**inputs, "student": inputs["teacher"][:, list(layers)].clone()}


def _over_positions(values: Tensor, positions: Tensor) -> Tensor:
    """Return the mean [B] over layers and valid positions of [B, L, T]."""
    return hide(values.mean(1), positions).sum(1) / positions.sum(1).clamp(min=1)


@register(
    "hidden_states",
    "feature",
    "Jiao et al., TinyBERT, EMNLP 2020; Sun et al., Patient Knowledge Distillation, EMNLP 2019 (normalised)",
    examples=_examples((2, 4, 3), (4, 4, 3)),
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative"),
    variants=({}, {"normalised": True}, {"layers": (0, 3)}),
    at_equality=_mapped,
)
def hidden_states(
    student: Tensor,
    teacher: Tensor,
    lengths: Tensor | None = None,
    *,
    layers: Sequence[int] | None = None,
    normalised: bool = False,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Squared error of hidden states with mapped layers: mean over layers i and positions of (S_i - T_layers[i])^2.

    Shapes: student [B, L_S, T, D] and teacher [B, L_T, T, D], the layers stacked; lengths int64 [B] (None: no
    padding); mask bool [B]. Zero where each student layer equals its teacher layer. For another width project the
    student first, or see LayerMapping.

    Options: layers: L_S indices of teacher layers, see map_layers (None: its "uniform"); normalised: False averages
    the squares over D (TinyBERT), True scales the states to unit norm and sums over D (PKD, which gives only the first
    position: T = 1). Both papers sum over the layers; this is their mean.

    Raises:
        ValueError: shapes do not fit, layers is not L_S indices, or an unknown reduction.

    Reference: Jiao et al., 2020; Sun et al., 2019.
    """
    check_float("student", student, 4)
    check_float("teacher", teacher, 4)
    check_shape("teacher", teacher, (student.shape[0], teacher.shape[1], *student.shape[2:]))
    depth = teacher.shape[1]
    if layers is None:
        layers = map_layers(student.shape[1], depth)
    if len(layers) != student.shape[1] or not all(0 <= i < depth for i in layers):
        raise ValueError(f"layers: wanted {student.shape[1]} indices in 0..{depth - 1}, got {tuple(layers)}")
    positions = _positions(lengths, mask, student, student.shape[2])
    student = in_full_precision(student).masked_fill(~positions[:, None, :, None], 0.0)
    teacher = teacher_like(teacher[:, list(layers)], student).masked_fill(~positions[:, None, :, None], 0.0)
    if normalised:
        values = (unit(student, 3) - unit(teacher, 3)).square().sum(3)
    else:
        values = (student - teacher).square().mean(3)
    return reduce_rows(_over_positions(values, positions), positions.any(1), reduction)


@register(
    "attended_layers",
    "feature",
    "Passban et al., ALP-KD: Attention-Based Layer Projection for Knowledge Distillation, AAAI 2021",
    examples=lambda b, g: pair(b, 2, 3, teacher=(b, 4, 3), generator=g),
    laws=("nonnegative", "permutation"),
)
def attended_layers(
    student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Squared error to a mixture of all teacher layers: mean of (S_i - sum_j a_ij T_j)^2, a_i = softmax_j(S_i . T_j).

    Shapes: student [B, L_S, D] and teacher [B, L_T, D], one vector a layer (in the paper that of [CLS]); mask bool
    [B]. Zero where each student layer equals its mixture: not where student equals teacher, but if L_T = 1. The
    student gets a gradient through a as well. The mean is over layers and D.

    Raises:
        ValueError: shapes do not fit, or an unknown reduction.

    Reference: Passban et al., 2021.
    """
    check_float("student", student, 3)
    check_float("teacher", teacher, 3)
    check_shape("teacher", teacher, (student.shape[0], teacher.shape[1], student.shape[2]))
    valid = row_mask(mask, student.shape[0])
    student = hide(in_full_precision(student), valid)
    teacher = hide(teacher_like(teacher, student), valid)
    with torch.autocast(student.device.type, enabled=False):
        mixture = torch.softmax(student @ teacher.transpose(1, 2), 2) @ teacher
    return reduce_rows((student - mixture).square().mean((1, 2)), valid, reduction)


def _small_mapping() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        mapping = LayerMapping(2, 4, 3, 5)
        nn.init.normal_(mapping.logits)
        return mapping.eval()


@register(
    "layer_mapping",
    "feature",
    "after Passban et al., ALP-KD, AAAI 2021, with one set of weights for all inputs; projection of TinyBERT, 2020",
    examples=_examples((2, 4, 3), (4, 4, 5)),
    laws=("nonnegative",),
    build=_small_mapping,
)
class LayerMapping(nn.Module):
    """Squared error to a learned mixture of layers: mean of (W S_i - sum_j w_ij T_j)^2, w_i = softmax(logits_i).

    The weights belong to the layers, not to the input (ALP-KD, which computes them from the states, is
    attended_layers). They start out even, and being trained on the loss they drift to the teacher layers that are
    easiest to match. W is a linear layer without bias (TinyBERT), or nothing where the widths are the same.

    Options: n_student and n_teacher, the numbers of layers; student_dim and teacher_dim, the widths.

    Raises:
        ValueError: a number below 1.

    Reference: after Passban et al., 2021; Jiao et al., 2020.
    """

    def __init__(self, n_student: int, n_teacher: int, student_dim: int, teacher_dim: int) -> None:
        """Make even weights and the projection, initialised as nn.Linear is."""
        super().__init__()
        self.sizes = {"n_student": n_student, "n_teacher": n_teacher}
        for argument, value in (*self.sizes.items(), ("student_dim", student_dim), ("teacher_dim", teacher_dim)):
            check_at_least(argument, value, 1)
        self.student_dim, self.teacher_dim = student_dim, teacher_dim
        self.logits = nn.Parameter(torch.zeros(n_student, n_teacher))
        same = student_dim == teacher_dim
        self.projection = nn.Identity() if same else nn.Linear(student_dim, teacher_dim, bias=False)

    def weights(self) -> Tensor:
        """Return the weights of the teacher layers [L_S, L_T]; rows sum to 1."""
        return torch.softmax(in_full_precision(self.logits), 1)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        lengths: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Return the mean squared error of a row over layers, valid positions and D_T, reduced.

        Shapes: student [B, L_S, T, D_S]; teacher [B, L_T, T, D_T], detached; lengths int64 [B] (None: no padding);
        mask bool [B].

        Raises:
            ValueError: shapes do not fit, or an unknown reduction.
        """
        check_float("student", student, 4)
        check_float("teacher", teacher, 4)
        rows, time = student.shape[0], student.shape[2]
        check_shape("student", student, (rows, self.sizes["n_student"], time, self.student_dim))
        check_shape("teacher", teacher, (rows, self.sizes["n_teacher"], time, self.teacher_dim))
        positions = _positions(lengths, mask, student, time)
        padding = ~positions[:, None, :, None]
        student = student.masked_fill(padding, 0.0).to(self.logits.dtype)
        teacher = in_full_precision(teacher.detach()).masked_fill(padding, 0.0)
        with torch.autocast(teacher.device.type, enabled=False):
            mixture = torch.einsum("sl,bltd->bstd", self.weights().to(teacher.dtype), teacher)
        error = in_full_precision(self.projection(student)) - mixture
        return reduce_rows(_over_positions(error.square().mean(3), positions), positions.any(1), reduction)
