"""Losses on intermediate features with networks of their own between student and teacher, thrown away afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
)
from kdcore.losses.examples import pair
from kdcore.losses.feature import Elements, check_elements, over_elements, pool_to_smaller, row_norm
from kdcore.losses.registry import register
from kdcore.losses.vectors import unit

Norm = Literal[1, 2]


def _check_channels(student: Tensor, teacher: Tensor, channels: tuple[int, int], spatial: bool) -> None:
    for argument, values, wanted in (("student", student, channels[0]), ("teacher", teacher, channels[1])):
        check_float(argument, values, 4 if spatial else 2)
        check_shape(argument, values, (student.shape[0], wanted, *values.shape[2:]))


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def small() -> nn.Module:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return build().eval()

    return small


@register(
    "regressed_hint",
    "feature",
    "Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015",
    examples=lambda b, g: pair(b, 3, 4, 3, teacher=(b, 2, 2, 3), generator=g),
    laws=("nonnegative",),
    variants=({}, {"elements": "sum"}),
    build=_seeded(lambda: Hint(3, 2)),
)
class Hint(nn.Module):
    """Half the squared error of a regressor from student to teacher: 1/2 * mean or sum of (r(student) - teacher)^2.

    r is a 1 x 1 convolution, or a linear layer for vectors. (FitNets' convolution has a wider kernel without padding,
    to fit the sizes; here maps of other sizes are average-pooled to the smaller instead.)

    Options: student_channels and teacher_channels; spatial: feature maps (True) or vectors (False).

    Raises:
        ValueError: a number of channels below 1.

    Reference: Romero et al., 2015.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, spatial: bool = True) -> None:
        """Make the regressor, initialised as nn.Conv2d or nn.Linear is."""
        super().__init__()
        check_at_least("student_channels", student_channels, 1)
        check_at_least("teacher_channels", teacher_channels, 1)
        self.channels, self.spatial = (student_channels, teacher_channels), spatial
        self.regressor = nn.Conv2d(*self.channels, 1) if spatial else nn.Linear(*self.channels)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        elements: Elements = "mean",
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Return half the squared error of a row, reduced.

        Shapes: student [B, C_S, H, W] and teacher [B, C_T, H', W'], or [B, D_S] and [B, D_T]; mask bool [B]. The
        teacher is detached. ``elements``: see hint.

        Raises:
            ValueError: shapes do not fit, or an unknown option.
        """
        _check_channels(student, teacher, self.channels, self.spatial)
        check_elements(elements)
        valid = row_mask(mask, student.shape[0])
        student, teacher = hide(student, valid), hide(in_full_precision(teacher.detach()), valid)
        student = student.to(self.regressor.weight.dtype)
        if self.spatial:
            student, teacher = pool_to_smaller(student, teacher)  # commutes with the 1 x 1 convolution
        error = in_full_precision(self.regressor(student)) - teacher
        return reduce_rows(over_elements(error.square(), elements) / 2, valid, reduction)


def _stack(layer: Callable[..., nn.Module], *channels: int) -> nn.Sequential:
    """Return 3 x 3 layers with leaky ReLUs of slope 0.1 (the paper's) between them."""
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        layers += [layer(before, after, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers[:-1])


@register(
    "factor_transfer",
    "feature",
    "Kim et al., Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018",
    examples=lambda b, g: pair(b, 3, 2, 3, teacher=(b, 4, 3, 2), generator=g),
    laws=("nonnegative",),
    variants=({}, {"norm": 2}),
    build=_seeded(lambda: FactorTransfer(3, 4)),
)
class FactorTransfer(nn.Module):
    """Distance of factors of unit norm: || F_T / ||F_T||_2 - F_S / ||F_S||_2 ||_p, p 1 or 2.

    The paraphraser, an autoencoder of the teacher's features, is trained first and alone by ``reconstruction_loss``;
    its code is the factor F_T, and ``forward`` gives it no gradient. The translator makes F_S of the student's
    features and is trained with the student. Unlike the authors' there is no batch normalisation: the loss of a row
    does not depend on the other rows.

    Options: student_channels and teacher_channels; rate k, the channels of a factor over those of the teacher (0.5 in
    the paper's CIFAR experiments).

    Raises:
        ValueError: a number of channels below 1, or rate <= 0.

    Reference: Kim et al., 2018.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, rate: float = 0.5) -> None:
        """Make paraphraser (encoder and decoder) and translator, initialised as nn.Conv2d is."""
        super().__init__()
        check_at_least("student_channels", student_channels, 1)
        check_at_least("teacher_channels", teacher_channels, 1)
        check_positive("rate", rate)
        self.channels = student_channels, teacher_channels
        self.factor_channels = factors = max(1, round(rate * teacher_channels))
        self.encoder = _stack(nn.Conv2d, teacher_channels, teacher_channels, factors, factors)
        self.decoder = _stack(nn.ConvTranspose2d, factors, factors, teacher_channels, teacher_channels)
        self.translator = _stack(nn.Conv2d, student_channels, student_channels, factors, factors)

    def reconstruction_loss(
        self, teacher: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        """Return the mean squared error of a row after encoder and decoder, reduced; it trains the paraphraser.

        Shapes: teacher [B, C_T, H, W], detached; mask bool [B].

        Raises:
            ValueError: shapes do not fit, or an unknown reduction.
        """
        check_float("teacher", teacher, 4)
        check_shape("teacher", teacher, (teacher.shape[0], self.channels[1], *teacher.shape[2:]))
        valid = row_mask(mask, teacher.shape[0])
        teacher = hide(in_full_precision(teacher.detach()), valid)
        error = in_full_precision(self.decoder(self.encoder(teacher.to(self._dtype())))) - teacher
        return reduce_rows(over_elements(error.square(), "mean"), valid, reduction)

    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        norm: Norm = 1,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Return the distance of the factors of a row, reduced.

        Shapes: student [B, C_S, H, W]; teacher [B, C_T, H', W'], detached; mask bool [B]. Where the sizes differ the
        factors are average-pooled to the smaller. ``norm`` p is 1 (the paper's choice) or 2; the authors' code divides
        the 1-norm by the number of elements.

        Raises:
            ValueError: shapes do not fit, or an unknown option.
        """
        _check_channels(student, teacher, self.channels, True)
        if norm not in get_args(Norm):
            raise ValueError(f"norm: wanted 1 or 2, got {norm}")
        valid = row_mask(mask, student.shape[0])
        with torch.no_grad():
            teacher_factor = self.encoder(hide(teacher, valid).to(self._dtype()))
        student_factor = self.translator(hide(student, valid).to(self._dtype()))
        student_factor, teacher_factor = pool_to_smaller(
            in_full_precision(student_factor), in_full_precision(teacher_factor)
        )
        difference = unit(student_factor.flatten(1)) - unit(teacher_factor.flatten(1))
        values = difference.abs().sum(1) if norm == 1 else row_norm(difference)
        return reduce_rows(values, valid, reduction)


@register(
    "variational_information",
    "feature",
    "Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019",
    examples=lambda b, g: pair(b, 3, 2, 3, teacher=(b, 4, 2, 2), generator=g),
    variants=({}, {"elements": "sum"}),
    build=_seeded(lambda: VariationalInformation(3, 4)),
)
class VariationalInformation(nn.Module):
    """Negative log-likelihood of the teacher's features: log(v_c) / 2 + (teacher - mu(student))^2 / (2 * v_c). VID.

    Minus a variational lower bound of the mutual information, without the constants log(2 pi) / 2 and the teacher's
    entropy; it may be negative. The variance v_c = softplus(a_c) + least_variance is one parameter a channel. mu is a
    stack of three 1 x 1 convolutions with ReLUs between, or one linear layer for vectors, as in the paper.

    Options: student_channels and teacher_channels; spatial: feature maps (True) or vectors (False); initial_variance
    (5) and least_variance (1e-5), which bounds the loss from below, as in the authors' code.

    Raises:
        ValueError: a number of channels below 1, or not 0 < least_variance < initial_variance.

    Reference: Ahn et al., 2019.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        *,
        spatial: bool = True,
        initial_variance: float = 5.0,
        least_variance: float = 1e-5,
    ) -> None:
        """Make mean and variances; the mean is initialised as nn.Conv2d or nn.Linear is."""
        super().__init__()
        check_at_least("student_channels", student_channels, 1)
        check_at_least("teacher_channels", teacher_channels, 1)
        check_positive("least_variance", least_variance)
        if not least_variance < initial_variance < math.inf:
            raise ValueError(f"initial_variance: wanted a number above {least_variance}, got {initial_variance}")
        self.channels, self.spatial, self.least_variance = (student_channels, teacher_channels), spatial, least_variance
        self.mean: nn.Module = nn.Linear(*self.channels)
        if spatial:
            first, *others = (nn.Conv2d(c, teacher_channels, 1) for c in (student_channels, *[teacher_channels] * 2))
            self.mean = nn.Sequential(first, *(layer for conv in others for layer in (nn.ReLU(), conv)))
        difference = initial_variance - least_variance
        inverse_softplus = difference + math.log(-math.expm1(-difference))
        self.raw_variance = nn.Parameter(torch.full((teacher_channels,), inverse_softplus))

    def variance(self) -> Tensor:
        """Return the variance of each channel, [C_T] or [D_T]."""
        return F.softplus(in_full_precision(self.raw_variance)) + self.least_variance

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        elements: Elements = "mean",
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Return the negative log-likelihood of a row, reduced.

        Shapes: student [B, C_S, H, W] and teacher [B, C_T, H', W'], or [B, D_S] and [B, D_T]; mask bool [B]. The
        teacher is detached. Maps of different sizes are average-pooled to the smaller. ``elements`` "mean" (the common
        codes) or "sum" (the paper) over the elements of a feature.

        Raises:
            ValueError: shapes do not fit, or an unknown option.
        """
        _check_channels(student, teacher, self.channels, self.spatial)
        check_elements(elements)
        valid = row_mask(mask, student.shape[0])
        student, teacher = hide(student, valid), hide(in_full_precision(teacher.detach()), valid)
        student = student.to(self.raw_variance.dtype)
        if self.spatial:
            student, teacher = pool_to_smaller(student, teacher)
        variance = self.variance().view(-1, *(1,) * (teacher.dim() - 2))
        error = in_full_precision(self.mean(student)) - teacher
        values = (variance.log() + error.square() / variance) / 2
        return reduce_rows(over_elements(values, elements), valid, reduction)
