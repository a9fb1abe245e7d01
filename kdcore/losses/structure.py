"""Structure as knowledge: graphs of instances and of pixels, and a discriminator that sees whole distributions."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.losses.contract import (
    Reduction,
    check_at_least,
    check_float,
    check_pair,
    check_shape,
    hide,
    in_full_precision,
    reduce_rows,
    row_mask,
    teacher_like,
)
from kdcore.losses.examples import normal, pair
from kdcore.losses.registry import register
from kdcore.losses.relation import first_two_equal, two_layers
from kdcore.losses.similarity import mean_over_columns, row_distances
from kdcore.losses.vectors import unit


def _four_embeddings(rows: int, generator: torch.Generator) -> dict[str, Tensor]:
    names = ("student_first", "student_second", "teacher_first", "teacher_second")
    return {name: normal(rows, 4, generator=generator) for name in names}


@register(
    "instance_graph",
    "structure",
    "Liu et al., Knowledge Distillation via Instance Relationship Graph, CVPR 2019",
    examples=_four_embeddings,
    teacher=("teacher_first", "teacher_second"),
    batchwise=True,
    laws=("zero_at_equality", "nonnegative", "permutation"),
    variants=({}, {"vertices": 0.0, "edges": 0.5, "transformation": 0.0}),
    at_equality=first_two_equal,
)
def instance_graph(
    student_first: Tensor,
    student_second: Tensor,
    teacher_first: Tensor,
    teacher_second: Tensor,
    *,
    vertices: float = 1.0,
    edges: float = 1.0,
    transformation: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Graphs of a batch at two layers: vertices * |dV|^2 + edges * mean_j sum_l (dA_l)_ij^2 + transformation * dL^2.

    d is student - teacher. V are the embeddings of the second layer, A_ij = ||x_i - x_j||^2 in each of the two layers,
    L_i = ||x_i(second) - x_i(first)||^2. The paper's transformation of edges is left out as in the paper: it follows
    from A. Its mean is the paper's 1 / B and 1 / B^2.

    Shapes: student_first, student_second, teacher_first, teacher_second [B, D], pooled features; with vertices > 0 both
    second widths agree, with transformation > 0 both widths of each network; mask bool [B]; j over the valid rows.
    Zero where student equals teacher. The three weights (>= 0, 1 each here) depend on the scale of the features, of
    which edges are the fourth power.

    Raises:
        ValueError: shapes do not fit, a weight is negative, or an unknown reduction.

    Reference: Liu et al., 2019.
    """
    layers = {
        "student_first": student_first,
        "student_second": student_second,
        "teacher_first": teacher_first,
        "teacher_second": teacher_second,
    }
    features, valid = two_layers(layers, mask, 2)
    weights = (("vertices", vertices), ("edges", edges), ("transformation", transformation))
    for argument, weight in weights:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{argument}: wanted a finite number >= 0, got {weight}")
    rows = features[0].new_zeros(len(student_first)) + 0.0 * sum(f.sum() for f in features[:2])
    if vertices:
        check_shape("teacher_second (vertices > 0)", features[3], tuple(features[1].shape))
        rows = rows + vertices * (features[1] - features[3]).square().sum(1)
    if edges:
        for student, teacher in ((features[0], features[2]), (features[1], features[3])):
            difference = row_distances(student) - row_distances(teacher)
            rows = rows + edges * mean_over_columns(difference.square(), valid).to(rows.dtype)
    if transformation:
        lengths = []
        for network, at in (("student", 0), ("teacher", 2)):
            check_shape(f"{network}_second (transformation > 0)", features[at + 1], tuple(features[at].shape))
            lengths.append((features[at + 1] - features[at]).square().sum(1))
        rows = rows + transformation * (lengths[0] - lengths[1]).square()
    return reduce_rows(rows, valid, reduction)


@register(
    "pixel_pairs",
    "structure",
    "Liu et al., Structured Knowledge Distillation for Semantic Segmentation, CVPR 2019 (pair-wise)",
    examples=lambda b, g: pair(b, 2, 3, 4, generator=g),
    laws=("zero_at_equality", "stationary_at_equality", "nonnegative", "student_scale", "symmetric"),
    variants=({}, {"grid": 2}),
)
def pixel_pairs(
    student: Tensor,
    teacher: Tensor,
    *,
    grid: int = 8,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Similarities of an image's places: mean_ij (a_ij(student) - a_ij(teacher))^2, a_ij the cosine of two nodes.

    A node is the average of a cell of the feature map; there are at most grid x grid of them, fewer where a map is
    smaller. The paper connects nodes of beta pixels within a range alpha; here all nodes are connected.

    Shapes: student [B, C, H, W], teacher [B, C', H', W']; mask bool [B]. Memory B * grid^4. Zero where student equals
    teacher up to a scale or rotation of the channels. grid 8 by default (this library's).

    Raises:
        ValueError: shapes do not fit, grid < 1, or an unknown reduction.

    Reference: Liu et al., 2019.
    """
    check_float("student", student, 4)
    check_float("teacher", teacher, 4)
    check_shape("teacher", teacher, (student.shape[0], *teacher.shape[1:]))
    check_at_least("grid", grid, 1)
    valid = row_mask(mask, student.shape[0])
    student = hide(in_full_precision(student), valid)
    maps = (student, hide(teacher_like(teacher, student), valid))
    height, width = (min(grid, *(m.shape[axis] for m in maps)) for axis in (2, 3))
    if 0 in (height, width):
        raise ValueError(f"student: wanted maps with pixels, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    similarities = []
    for values in maps:
        nodes = unit(F.adaptive_avg_pool2d(values, (height, width)).flatten(2).mT)
        with torch.autocast(nodes.device.type, enabled=False):
            similarities.append(nodes @ nodes.mT)
    return reduce_rows((similarities[0] - similarities[1]).square().flatten(1).mean(1), valid, reduction)


Form = Literal["nonsaturating", "wasserstein"]


def _small_discriminator() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return AdversarialAlignment(4, hidden_dim=5).eval()


@register(
    "adversarial_alignment",
    "structure",
    "Goodfellow et al., NIPS 2014; Liu et al., Structured Knowledge Distillation, CVPR 2019 (holistic)",
    examples=lambda b, g: {"student": normal(b, 4, generator=g)},
    teacher=(),
    laws=("nonnegative",),
    build=_small_discriminator,
)
class AdversarialAlignment(nn.Module):
    """A discriminator tells student from teacher, the student fools it: softplus(-D(s)), or -D(s) as a critic.

    D is an MLP with two hidden layers. ``forward`` is the student's loss and gives D no gradient;
    ``discriminator_loss`` is D's own, for its own optimiser. It matches the distributions of a batch, not its rows:
    pair it with a loss that compares row by row. In the holistic form of Liu et al. D is a convolutional critic of
    score maps given the image; here D sees what it is given, so append features of the image to both for that.

    Options: dim the width of the inputs; hidden_dim (128); form "nonsaturating" (Goodfellow et al.) or "wasserstein"
    (Gulrajani et al., with a gradient penalty; Liu et al.).

    Reference: Goodfellow et al., 2014; Gulrajani et al., NIPS 2017; Liu et al., 2019.
    """

    def __init__(self, dim: int, *, hidden_dim: int = 128, form: Form = "nonsaturating") -> None:
        """Make the discriminator, initialised as nn.Linear is."""
        super().__init__()
        check_at_least("dim", dim, 1)
        check_at_least("hidden_dim", hidden_dim, 1)
        if form not in get_args(Form):
            raise ValueError(f"form: wanted one of {', '.join(get_args(Form))}, got {form!r}")
        self.dim, self.form = dim, form
        self.first, self.second = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, hidden_dim)
        self.last = nn.Linear(hidden_dim, 1)

    def score(self, values: Tensor, *, frozen: bool = False) -> Tensor:
        """Return D's raw score [B] of values [B, dim], high for the teacher; ``frozen`` gives D no gradient."""
        with torch.autocast(values.device.type, enabled=False):
            for place, layer in enumerate((self.first, self.second, self.last)):
                weight, bias = (p.detach() if frozen else p for p in (layer.weight, layer.bias))
                values = F.linear(F.leaky_relu(values, 0.2) if place else values.to(weight.dtype), weight, bias)
            return values[:, 0]

    def forward(self, student: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
        """Return the student's loss of every row, reduced.

        Shapes: student [B, dim]; mask bool [B].

        Raises:
            ValueError: shapes do not fit, or an unknown reduction.
        """
        check_float("student", student, 2)
        check_shape("student", student, (student.shape[0], self.dim))
        valid = row_mask(mask, student.shape[0])
        score = self.score(hide(student, valid), frozen=True)
        return reduce_rows(-score if self.form == "wasserstein" else F.softplus(-score), valid, reduction)

    def discriminator_loss(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        gradient_penalty: float = 10.0,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Return D's loss: softplus(D(s)) + softplus(-D(t)), or D(s) - D(t) + gradient_penalty * (||grad D|| - 1)^2.

        Both inputs are detached. The penalty (10 in Gulrajani et al., 0 for none) is of the critic only, at a uniform
        random point between student and teacher, drawn from ``generator`` on the device of the inputs.

        Shapes: student and teacher [B, dim]; mask bool [B].

        Raises:
            ValueError: shapes do not fit, gradient_penalty < 0, or an unknown reduction.
        """
        check_pair(student, teacher, 2)
        check_shape("student", student, (student.shape[0], self.dim))
        if not (math.isfinite(gradient_penalty) and gradient_penalty >= 0):
            raise ValueError(f"gradient_penalty: wanted a finite number >= 0, got {gradient_penalty}")
        valid = row_mask(mask, student.shape[0])
        student = hide(in_full_precision(student.detach()), valid)
        teacher = hide(teacher_like(teacher, student), valid)
        of_student, of_teacher = self.score(student), self.score(teacher)
        if self.form == "nonsaturating":
            return reduce_rows(F.softplus(of_student) + F.softplus(-of_teacher), valid, reduction)
        losses = of_student - of_teacher
        if gradient_penalty:
            share = torch.rand(len(student), 1, generator=generator, dtype=student.dtype, device=student.device)
            between = torch.lerp(teacher, student, share).requires_grad_()
            slope = torch.autograd.grad(self.score(between).sum(), between, create_graph=True)[0]
            losses = losses + gradient_penalty * (torch.linalg.vector_norm(slope, dim=1) - 1).square()
        return reduce_rows(losses, valid, reduction)
