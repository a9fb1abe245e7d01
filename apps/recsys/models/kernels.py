"""Operations a SASRec spends its training time in, written for a CPU; elsewhere torch's own take over."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdcore.losses import sparse

# logits of a chunk of rows: small enough to stay in a core's cache between the passes over them
_CHUNK_BYTES = 1 << 21
_LEVELS = 1 << 16


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Zero each value of ``x`` (any shape) with probability ``rate`` in [0, 1) and scale the others up.

    On a CPU torch draws one random number a value; here four 16-bit numbers come from one 64-bit draw (of the same
    default generator), so the rate is met to within 2^-17 and the mean is kept exactly for the rate that is met.

    Reference: Srivastava et al., 2014.
    """
    if not training or rate == 0.0 or x.device.type != "cpu":
        return functional.dropout(x, rate, training)
    kept = round((1.0 - rate) * _LEVELS)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    numbers = words.view(torch.int16)[: x.numel()].view(x.shape)
    return x * ((numbers < kept - _LEVELS // 2).to(x.dtype) * (_LEVELS / max(kept, 1)))


class Dropout(nn.Module):
    """:func:`dropout` as a layer."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Drop values of ``x`` while training."""
        return dropout(x, self.rate, self.training)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the summed cross-entropy of ``targets`` int64 [N] under logits ``hidden @ weight.T``.

    ``hidden`` is float32 [N, D], ``weight`` float32 [C, D]. On a CPU the logits [N, C] never exist at once: the
    gradients are computed chunk by chunk while a chunk's logits are in the cache, which takes less time and, for a
    large catalogue, a fraction of the memory. Differentiable once.

    Reference: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", ICLR 2025 (the idea).
    """
    if _plain(hidden, weight):
        return functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    return _LinearCrossEntropy.apply(hidden, weight, targets)


def linear_sparse_soft_targets(
    hidden: Tensor, weight: Tensor, items: Tensor, teacher_log_probs: Tensor, temperature: float
) -> Tensor:
    """Return the sum over rows of :func:`kdcore.losses.sparse.sparse_soft_targets` at logits ``hidden @ weight.T``.

    Shapes as in :func:`linear_cross_entropy`; ``items`` int64 [N, K] distinct in a row, ``teacher_log_probs`` float32
    [N, K]. Computed chunk by chunk as there, with the gradient in closed form: q - p for the classes kept, and
    q (1 - P / Q) for the others, P and Q the teacher's and the student's probability of all of them.
    """
    if _plain(hidden, weight):
        logits = hidden @ weight.T
        return sparse.sparse_soft_targets(logits, items, teacher_log_probs, temperature=temperature, reduction="sum")
    return _LinearSparseSoftTargets.apply(hidden, weight, items, teacher_log_probs, temperature)


def _plain(hidden: Tensor, weight: Tensor) -> bool:
    """Return whether torch's own operations are to be used."""
    other = hidden.device.type != "cpu" or hidden.dtype != weight.dtype or torch.is_autocast_enabled("cpu")
    return other or not torch.is_grad_enabled()


class LinearScore:
    """Scores ``hidden @ weight.T`` of a batch's queries, computed only as far as a knowledge asks for them."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        """Take the states of the queries [N, D] and the vectors of all items [n_items, D]."""
        self.hidden, self.weight = hidden, weight

    def __call__(self, queries: Tensor, items: Tensor | None = None) -> Tensor:
        """Return [N, K] for item lists int64 [N, K], or [N, n_items] for all items; queries are the batch's own."""
        if items is None:
            return self.hidden @ self.weight.T
        return (functional.embedding(items, self.weight) * self.hidden[:, None]).sum(dim=-1)


class _LinearSparseSoftTargets(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: object, hidden: Tensor, weight: Tensor, items: Tensor, log_probs: Tensor, temperature: float
    ) -> Tensor:
        rows = max(_CHUNK_BYTES // (weight.element_size() * max(len(weight), 1)), 16)
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
        tiny = torch.finfo(hidden.dtype).tiny
        loss = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, len(hidden), rows):
            part, kept = hidden[start : start + rows], items[start : start + rows]
            log_p = log_probs[start : start + rows]
            p, rest_p = log_p.exp(), (-torch.expm1(torch.logsumexp(log_p, dim=1))).clamp(min=0.0)
            logits = torch.mm(part, weight.T, out=buffer[: len(part)]).div_(temperature)
            kept_logits, top = logits.gather(1, kept), logits.amax(dim=1)
            q = torch.softmax(logits, dim=1, out=logits)
            log_sum = top - q.amax(dim=1).log()
            kept_q = q.gather(1, kept)
            q.scatter_(1, kept, 0.0)
            rest_q = q.sum(dim=1).clamp(min=tiny)
            loss += (p * (log_p - kept_logits + log_sum[:, None])).sum() + torch.xlogy(rest_p, rest_p / rest_q).sum()
            q.mul_((1.0 - rest_p / rest_q)[:, None]).scatter_(1, kept, kept_q - p)
            torch.mm(q, weight, out=hidden_gradient[start : start + rows])
            weight_gradient.addmm_(q.T, part)
        # T^2 times the loss, of which 1 / T is left in the gradient by the division of the logits
        ctx.save_for_backward(hidden_gradient.mul_(temperature), weight_gradient.mul_(temperature))  # type: ignore[attr-defined]
        return (loss * temperature**2).to(hidden.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors  # type: ignore[attr-defined]
        return hidden_gradient * gradient, weight_gradient * gradient, None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        rows = max(_CHUNK_BYTES // (weight.element_size() * max(len(weight), 1)), 16)
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
        loss = hidden.new_zeros(())
        for start in range(0, len(hidden), rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]
            logits = torch.mm(part, weight.T, out=buffer[: len(part)])
            loss -= logits.gather(1, target).sum()
            top = logits.amax(dim=1)
            chosen = torch.softmax(logits, dim=1, out=logits)
            # the largest probability is exp(top - logsumexp): no second pass over the logits
            loss += (top - chosen.amax(dim=1).log()).sum()
            chosen.scatter_add_(1, target, chosen.new_full(target.shape, -1.0))
            torch.mm(chosen, weight, out=hidden_gradient[start : start + rows])
            weight_gradient.addmm_(chosen.T, part)
        ctx.save_for_backward(hidden_gradient, weight_gradient)  # type: ignore[attr-defined]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors  # type: ignore[attr-defined]
        return hidden_gradient * gradient, weight_gradient * gradient, None
