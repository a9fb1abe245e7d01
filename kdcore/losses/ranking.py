"""Losses of top-N recommenders: base losses, ranking distillation, list-wise relaxed ranking, distillation experts.

The losses see scores only. For the user side a row is a user and a list holds items; for the item side (IR-RRD) a row
is an item and a list holds users: the same functions serve both.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.losses.contract import (
    Reduction,
    check_at_least,
    check_float,
    check_pair,
    check_positive,
    check_shape,
    element_mask,
    hide,
    in_full_precision,
    reduce_rows,
    row_mask,
    teacher_like,
)
from kdcore.losses.examples import normal
from kdcore.losses.registry import register

_RD = "Tang & Wang, Ranking Distillation, KDD 2018"
_CD = "Lee et al., Collaborative Distillation for Top-N Recommendation, ICDM 2019"
_DE_RRD = "Kang et al., DE-RRD: A Knowledge Distillation Framework for Recommender System, CIKM 2020"


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of sigmoid(scores) against targets in [0, 1], element by element.

    Two logsigmoids keep the digits on both sides, where softplus(s) - target * s cancels for a confident score.
    """
    return -targets * F.logsigmoid(scores) - (1 - targets) * F.logsigmoid(-scores)


@register(
    "bpr",
    "ranking",
    "Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, UAI 2009",
    examples=lambda b, g: {"positive": normal(b, generator=g), "negative": normal(b, 3, generator=g)},
    teacher=(),
    laws=("nonnegative", "student_shift"),
)
def bpr(positive: Tensor, negative: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Pairwise base loss of a row: mean over its negatives of -log sigmoid(positive - negative).

    Shapes: positive [B]; negative [B] or [B, N]; mask bool [B] or the shape of ``negative``.
    Value log 2 where both scores are equal.

    Raises:
        ValueError: shapes do not fit, or an unknown reduction.

    Reference: Rendle et al., 2009.
    """
    check_float("positive", positive, 1)
    check_float("negative", negative, 1, 2)
    if negative.shape[0] != positive.shape[0]:
        raise ValueError(f"negative: wanted {positive.shape[0]} rows as in positive, got {negative.shape[0]}")
    rows, elements = element_mask(mask, tuple(negative.shape))
    positive, negative = hide(in_full_precision(positive), rows), hide(in_full_precision(negative), elements)
    if negative.dim() == 1:
        return reduce_rows(-F.logsigmoid(positive - negative), rows, reduction)
    losses = hide(-F.logsigmoid(positive[:, None] - negative), elements).sum(1)
    count = max(negative.shape[1], 1) if elements is None else elements.sum(1).clamp(min=1)
    return reduce_rows(losses / count, rows, reduction)


@register(
    "pointwise_bce",
    "ranking",
    "He et al., Neural Collaborative Filtering, WWW 2017",
    examples=lambda b, g: {
        "scores": normal(b, 4, generator=g),
        "labels": torch.randint(2, (b, 4), generator=g, dtype=torch.float64),
    },
    teacher=("labels",),
    fixed=("labels",),
    laws=("nonnegative", "permutation", "element_mask"),
)
def pointwise_bce(
    scores: Tensor, labels: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Pointwise base loss of a row: sum over its items of the cross-entropy of sigmoid(score) against the label.

    Shapes: scores and labels [B] or [B, K], labels floating in [0, 1]; mask bool [B] or [B, K]. For a mean over
    single interactions give flat [B] scores.

    Raises:
        ValueError: shapes do not fit, or an unknown reduction.

    Reference: He et al., 2017.
    """
    check_float("scores", scores, 1, 2)
    check_float("labels", labels, 1, 2)
    check_shape("labels", labels, tuple(scores.shape))
    rows, elements = element_mask(mask, tuple(scores.shape))
    scores = hide(in_full_precision(scores), elements)
    losses = _cross_entropy(scores, hide(teacher_like(labels, scores), elements))
    losses = hide(losses, elements)
    return reduce_rows(losses.sum(1) if losses.dim() == 2 else losses, rows, reduction)


def position_weights(
    n: int, lam: float = 1.0, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Tensor:
    """Return the position importance of a teacher's list, w_r = exp(-r/lam) / sum of exp(-r'/lam), r = 1..n, [n].

    ``lam`` is in positions (default of the authors' code 1); a large one makes the weights equal.

    Raises:
        ValueError: n < 1 or lam <= 0.

    Reference: Tang & Wang, 2018.
    """
    check_at_least("n", n, 1)
    check_positive("lam", lam)
    return torch.softmax(torch.arange(n, dtype=torch.float64, device=device) / -lam, 0).to(dtype)


@torch.no_grad()
def ranking_discrepancy_weights(
    student_list: Tensor, student_sample: Tensor, *, n_items: int, mu: float = 0.1, first_rank: int = 0
) -> Tensor:
    """Return the dynamic weights w_r = max(0, tanh(mu * (rank_r - r0))), float32 [B, K] without gradient.

    rank_r is the student's rank of the teacher's r-th item, estimated from a uniform sample of unseen items as
    floor((n_items - 1) * e_r / Q), e_r = how many of the sample the student scores above it; r0 counts the
    teacher's ranks from ``first_rank`` (0, as the authors' code does). An item the student already ranks as high as
    the teacher gets 0.

    Shapes: student_list [B, K] the student's scores of the teacher's top K; student_sample [B, Q].

    Raises:
        ValueError: shapes do not fit, Q = 0, n_items < 1 or mu <= 0.

    Reference: Tang & Wang, 2018.
    """
    check_float("student_list", student_list, 2)
    check_float("student_sample", student_sample, 2)
    check_positive("mu", mu)
    check_at_least("n_items", n_items, 1)
    if student_sample.shape[0] != student_list.shape[0] or student_sample.shape[1] == 0:
        wanted = f"({student_list.shape[0]}, Q >= 1)"
        raise ValueError(f"student_sample: wanted shape {wanted}, got {tuple(student_sample.shape)}")
    # A sorted sample counts in O(log Q) a score, without a [B, K, Q] comparison.
    ordered = in_full_precision(student_sample).sort(dim=1).values
    scores = in_full_precision(student_list).to(ordered.dtype).contiguous()
    size = student_sample.shape[1]
    above = size - torch.searchsorted(ordered, scores, right=True)
    rank = (n_items - 1) * above // size
    teacher_rank = torch.arange(first_rank, first_rank + student_list.shape[1], device=rank.device)
    return torch.tanh(mu * (rank - teacher_rank)).clamp(min=0)


@register(
    "ranking_distillation",
    "ranking",
    _RD,
    examples=lambda b, g: {"student_list": normal(b, 5, generator=g)},
    teacher=(),
    laws=("nonnegative", "element_mask"),
    variants=({}, {"weights": position_weights(5, 2.0)}),
)
def ranking_distillation(
    student_list: Tensor, *, weights: Tensor | None = None, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Teacher's top K as extra positives: sum over r of w_r * -log sigmoid(s_r).

    Shapes: student_list [B, K] the student's scores of the teacher's top K, best first; weights [K] or [B, K],
    detached (None: 1 each), e.g. position_weights times ranking_discrepancy_weights; mask bool [B] or [B, K].
    Zero only where the student's scores go to infinity.

    Raises:
        ValueError: shapes do not fit, or an unknown reduction.

    Reference: Tang & Wang, 2018.
    """
    check_float("student_list", student_list, 2)
    rows, elements = element_mask(mask, tuple(student_list.shape))
    student_list = hide(in_full_precision(student_list), elements)
    losses = -F.logsigmoid(student_list)
    if weights is not None:
        if tuple(weights.shape) not in {tuple(student_list.shape), tuple(student_list.shape[1:])}:
            wanted = f"{tuple(student_list.shape[1:])} or {tuple(student_list.shape)}"
            raise ValueError(f"weights: wanted shape {wanted}, got {tuple(weights.shape)}")
        losses = losses * teacher_like(weights, losses)
    return reduce_rows(hide(losses, elements).sum(1), rows, reduction)


@register(
    "collaborative_distillation",
    "ranking",
    _CD,
    examples=lambda b, g: {"student": normal(b, 5, generator=g), "teacher": normal(b, 5, generator=g)},
    laws=("nonnegative", "stationary_at_equality", "permutation", "element_mask"),
)
def collaborative_distillation(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Soft positives: sum over sampled items of the cross-entropy of sigmoid(student) against sigmoid(teacher / T).

    Shapes: student and teacher [B, K], scores of the same sampled unobserved items; mask bool [B] or [B, K].
    ``temperature`` softens the targets only. Where student == teacher and T = 1 the value is the entropy of the
    targets, the smallest there is; it is not zero.

    Raises:
        ValueError: shapes do not fit, temperature <= 0, or an unknown reduction.

    Reference: Lee et al., 2019.
    """
    check_pair(student, teacher, 2)
    check_positive("temperature", temperature)
    rows, elements = element_mask(mask, tuple(student.shape))
    student = hide(in_full_precision(student), elements)
    target = torch.sigmoid(hide(teacher_like(teacher, student), elements) / temperature)
    losses = _cross_entropy(student, target)
    return reduce_rows(hide(losses, elements).sum(1), rows, reduction)


@register(
    "relaxed_ranking",
    "ranking",
    _DE_RRD,
    examples=lambda b, g: {"interesting": normal(b, 4, generator=g), "uninteresting": normal(b, 3, generator=g)},
    teacher=(),
    laws=("nonnegative", "student_shift", "element_mask"),
)
def relaxed_ranking(
    interesting: Tensor, uninteresting: Tensor, *, mask: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Relaxed Plackett-Luce: -sum_k [s_k - log(sum_{j>=k} exp s_j + sum_l exp s_l)], no order among the l.

    Shapes: interesting [B, K] the student's scores in the teacher's order, best first; uninteresting [B, L];
    mask bool [B] or [B, K] (an element that is not valid leaves the list). For the item side (IR-RRD) give rows of
    items and lists of users. The authors sum over the rows of a batch: reduction="sum".

    Raises:
        ValueError: shapes do not fit, or an unknown reduction.

    Reference: Kang et al., 2020.
    """
    check_float("interesting", interesting, 2)
    check_float("uninteresting", uninteresting, 2)
    if uninteresting.shape[0] != interesting.shape[0]:
        raise ValueError(f"uninteresting: wanted {interesting.shape[0]} rows, got {uninteresting.shape[0]}")
    rows, elements = element_mask(mask, tuple(interesting.shape))
    interesting = hide(in_full_precision(interesting), elements)
    uninteresting = hide(in_full_precision(uninteresting), rows)
    listed = interesting
    if elements is not None:
        # A finite floor: logcumsumexp has NaN gradients at -inf, which anomaly detection reports.
        listed = interesting.masked_fill(~elements, torch.finfo(interesting.dtype).min / 4)
    remaining = torch.logcumsumexp(listed.flip(1), 1).flip(1)
    denominator = torch.logaddexp(remaining, torch.logsumexp(uninteresting, 1, keepdim=True))
    return reduce_rows(hide(denominator - interesting, elements).sum(1), rows, reduction)


def _gumbel(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Return standard Gumbel noise, float32; finite, since exponential_ draws from the open interval (0, inf)."""
    return torch.empty(shape, device=device).exponential_(generator=generator).log_().neg_()


def sample_interesting(
    n_rows: int, n_list: int, k: int, temperature: float, generator: torch.Generator, *, sampling: str = "exp"
) -> Tensor:
    """Return positions in a teacher's list, int64 [n_rows, k], ascending, without repeats, on the generator's device.

    sampling="exp" draws without replacement with p(rank) proportional to exp(-rank / temperature) (Gumbel top-k,
    which is exactly that); "none" takes the first k of every list, which the authors later found better.
    ``temperature`` is in ranks (default of the authors 10).

    Raises:
        ValueError: k is not in 1..n_list, temperature <= 0, or an unknown sampling.

    Reference: Kang et al., 2020; Kool et al., Stochastic Beams and Where to Find Them, 2019 (Gumbel top-k).
    """
    check_positive("temperature", temperature)
    if not 1 <= k <= n_list:
        raise ValueError(f"k: wanted 1..{n_list} (the length of the list), got {k}")
    if sampling == "none":
        return torch.arange(k, device=generator.device).repeat(n_rows, 1)
    if sampling != "exp":
        raise ValueError(f"sampling: wanted 'exp' or 'none', got {sampling!r}")
    keys = _gumbel((n_rows, n_list), generator, generator.device)
    keys -= torch.arange(n_list, device=generator.device) / temperature
    return keys.topk(k, dim=1, sorted=False).indices.sort(dim=1).values


def teacher_guided_positions(
    n_rows: int, n_list: int, k: int, temperature: float, generator: torch.Generator
) -> Tensor:
    """Return positions of the teacher's list for collaborative distillation, int64 [n_rows, k], without repeats.

    p(rank) proportional to exp(-rank / temperature): the distribution of sample_interesting, which see.

    Reference: Lee et al., 2019.
    """
    return sample_interesting(n_rows, n_list, k, temperature, generator)


def student_guided_probabilities(teacher_rank: Tensor, student_rank: Tensor, *, mu: float) -> Tensor:
    """Return tanh(max(0, mu * (student_rank - teacher_rank))), float32 of the same shape.

    Items the student ranks lower than the teacher does get a positive value. The values are proportional to the
    sampling probabilities of a row; they do not sum to 1.

    Raises:
        ValueError: shapes differ or mu <= 0.

    Reference: Lee et al., 2019.
    """
    check_shape("student_rank", student_rank, tuple(teacher_rank.shape))
    check_positive("mu", mu)
    return torch.tanh(mu * (student_rank.float() - teacher_rank.float()).clamp(min=0))


def student_guided_positions(
    teacher_rank: Tensor, student_rank: Tensor, k: int, *, mu: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw k candidates a row without replacement by student_guided_probabilities.

    Returns (positions int64 [B, k], mask bool [B, k]). A row with fewer than k candidates of positive probability is
    filled up; mask is False on the filling.

    Shapes: teacher_rank and student_rank [B, N], ranks of the same N candidates.

    Raises:
        ValueError: shapes differ, k is not in 1..N, or mu <= 0.

    Reference: Lee et al., 2019.
    """
    probabilities = student_guided_probabilities(teacher_rank, student_rank, mu=mu)
    if not 1 <= k <= teacher_rank.shape[1]:
        raise ValueError(f"k: wanted 1..{teacher_rank.shape[1]} (the number of candidates), got {k}")
    keys = probabilities.log() + _gumbel(tuple(probabilities.shape), generator, probabilities.device)
    positions = keys.topk(k, dim=1).indices
    return positions, probabilities.gather(1, positions) > 0


def annealed_temperature(epoch: float, max_epoch: int, start: float = 1.0, end: float = 1e-10) -> float:
    """Return the temperature of an epoch, start * (end / start) ** (epoch / max_epoch).

    Raises:
        ValueError: epoch is not in 0..max_epoch, max_epoch < 1, or start or end <= 0.

    Reference: Kang et al., 2020 (start 1, end 1e-10).
    """
    check_at_least("max_epoch", max_epoch, 1)
    check_positive("start", start)
    check_positive("end", end)
    if not 0 <= epoch <= max_epoch:
        raise ValueError(f"epoch: wanted 0..{max_epoch}, got {epoch}")
    return start * math.exp(math.log(end / start) * epoch / max_epoch)


def _small_experts() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return DistillationExperts(3, 5, n_experts=4).eval()


@register(
    "distillation_experts",
    "ranking",
    _DE_RRD,
    examples=lambda b, g: {"student": normal(b, 3, generator=g), "teacher": normal(b, 5, generator=g)},
    laws=("nonnegative",),
    variants=({"temperature": 0.7}, {"temperature": 1e-10}),
    build=_small_experts,
)
class DistillationExperts(nn.Module):
    """Experts that rebuild the teacher's embedding: || e_T - sum_m z_m E_m(e_S) ||^2, z a Gumbel softmax gate on e_T.

    E_m is Linear(dS, (dS + dT) // 2), ReLU, Linear(dT). The gate sees the teacher's embedding, so an expert
    specialises on a region of the teacher's space. Experts and gate are thrown away after training. In evaluation
    mode the gate has no noise.

    Options: student_dim, teacher_dim the widths dS and dT; n_experts (30 in the paper).

    Reference: Kang et al., 2020.
    """

    def __init__(self, student_dim: int, teacher_dim: int, n_experts: int = 30) -> None:
        """Make the experts and the gate, initialised as nn.Linear is."""
        super().__init__()
        for argument, value in (("student_dim", student_dim), ("teacher_dim", teacher_dim), ("n_experts", n_experts)):
            check_at_least(argument, value, 1)
        self.student_dim, self.teacher_dim, self.n_experts = student_dim, teacher_dim, n_experts
        self.hidden_dim = (student_dim + teacher_dim) // 2
        self.gate = nn.Linear(teacher_dim, n_experts)
        self.first = nn.Linear(student_dim, n_experts * self.hidden_dim)  # all experts side by side
        self.second = nn.Parameter(torch.empty(n_experts, self.hidden_dim, teacher_dim))
        self.second_bias = nn.Parameter(torch.empty(n_experts, teacher_dim))
        bound = self.hidden_dim**-0.5
        nn.init.uniform_(self.second, -bound, bound)
        nn.init.uniform_(self.second_bias, -bound, bound)

    def selection(self, teacher: Tensor, *, temperature: float, generator: torch.Generator | None = None) -> Tensor:
        """Return the gate z [B, M] of the detached teacher embeddings [B, dT]; rows sum to 1."""
        check_positive("temperature", temperature)
        with torch.autocast(teacher.device.type, enabled=False):  # a cold gate turns rounding into another expert
            weight = in_full_precision(self.gate.weight)
            logits = F.linear(teacher_like(teacher, weight), weight, in_full_precision(self.gate.bias))
            log_alpha = torch.log_softmax(logits, 1)
            if self.training:
                log_alpha = log_alpha + _gumbel(tuple(log_alpha.shape), generator, log_alpha.device)
            return torch.softmax(log_alpha / temperature, 1)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        temperature: float,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """Return the squared error of a row, reduced.

        Shapes: student [B, dS]; teacher [B, dT], detached; mask bool [B]. ``temperature`` of the gate: see
        annealed_temperature. ``generator`` draws the noise, on the device of the inputs.

        Raises:
            ValueError: shapes do not fit, temperature <= 0, or an unknown reduction.
        """
        check_float("student", student, 2)
        check_float("teacher", teacher, 2)
        check_shape("student", student, (student.shape[0], self.student_dim))
        check_shape("teacher", teacher, (student.shape[0], self.teacher_dim))
        rows = row_mask(mask, student.shape[0])
        student, teacher = hide(student, rows), hide(in_full_precision(teacher.detach()), rows)
        hidden = torch.relu(self.first(student.to(self.first.weight.dtype)))
        z = self.selection(teacher, temperature=temperature, generator=generator).to(hidden.dtype)
        hidden = hidden.unflatten(1, (self.n_experts, self.hidden_dim)) * z[:, :, None]
        # Mixing before the second layer: one matrix product instead of M outputs [B, M, dT].
        rebuilt = hidden.flatten(1) @ self.second.flatten(0, 1) + z @ self.second_bias
        error = in_full_precision(rebuilt) - teacher
        return reduce_rows(error.square().sum(1), rows, reduction)
