"""Divergences of tempered distributions with their gradients in closed form: one exponential a logit and network.

Autograd over log_softmax, exp and sum takes twice the time and keeps three arrays of the logits' size; these keep one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def _tempered(
    logits: Tensor, temperature: float, excluded: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return logits / T less their largest, softmax of it, log of its normaliser [B], and the largest [B].

    ``excluded`` int64 [B, 1] is a class that takes no part; its entry is -inf, its probability 0.
    """
    scaled = logits * (1 / temperature)  # products take half the time of divisions
    if excluded is not None:
        scaled.scatter_(1, excluded, -torch.inf)
    top = scaled.amax(1, keepdim=True)
    scaled -= top
    powers = scaled.exp()
    total = powers.sum(1, keepdim=True)
    powers *= total.reciprocal()
    return scaled, powers, total.log()[:, 0], top[:, 0]


def _between(p: Tensor, teacher: Tensor, student: Tensor, teacher_norm: Tensor, student_norm: Tensor) -> Tensor:
    """Return KL(p || q) [B]; ``teacher`` is overwritten.

    A class the teacher excludes adds nothing, not 0 * inf; NaN in the logits still is NaN, by the norms.
    """
    teacher -= student
    teacher.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=0.0)
    with torch.autocast(p.device.type, enabled=False):
        return torch.linalg.vecdot(p, teacher) + (student_norm - teacher_norm)


class ForwardDivergence(torch.autograd.Function):
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)) of each row [B]; its gradient is T * (q - p)."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Return the divergences; logits are float [B, C] of one dtype."""
        log_q, q, student_norm, _ = _tempered(student, temperature)
        log_p, p, teacher_norm, _ = _tempered(teacher, temperature)
        rows = _between(p, log_p, log_q, teacher_norm, student_norm)
        q -= p
        ctx.save_for_backward(q)
        ctx.temperature = temperature
        return rows * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient by the student's logits."""
        (difference,) = ctx.saved_tensors
        return difference * (upstream * ctx.temperature)[:, None], None, None


class DecoupledDivergence(torch.autograd.Function):
    """T^2 * (alpha * KL of [target, not target] + beta * KL among the other classes) of each row [B].

    With hats for the distributions among the other classes, the gradient is T times alpha (q_t - p_t) at the target and
    (beta - alpha (q_t - p_t)) q^ - beta p^ elsewhere.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float
    ) -> Tensor:
        """Return the losses; logits are float [B, C] of one dtype, labels int64 [B]."""
        target = labels[:, None]
        log_q, q, student_norm, student_top = _tempered(student, temperature, target)
        log_p, p, teacher_norm, teacher_top = _tempered(teacher, temperature, target)
        # log-odds of the target: the sum over the other classes keeps its digits where 1 - p would not
        student_odds = student.gather(1, target)[:, 0] * (1 / temperature) - student_top - student_norm
        teacher_odds = teacher.gather(1, target)[:, 0] * (1 / temperature) - teacher_top - teacher_norm
        yes, no = torch.sigmoid(teacher_odds), torch.sigmoid(-teacher_odds)
        binary = yes * (F.logsigmoid(teacher_odds) - F.logsigmoid(student_odds))
        binary += no * (F.logsigmoid(-teacher_odds) - F.logsigmoid(-student_odds))
        others = _between(p, log_p, log_q, teacher_norm, student_norm)
        miss = torch.sigmoid(student_odds) - yes
        q *= (beta - alpha * miss)[:, None]
        q.sub_(p, alpha=beta)
        q.scatter_(1, target, alpha * miss[:, None])
        ctx.save_for_backward(q)
        ctx.temperature = temperature
        return (alpha * binary + beta * others) * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient by the student's logits."""
        (gradient,) = ctx.saved_tensors
        return gradient * (upstream * ctx.temperature)[:, None], None, None, None, None, None
