"""Contrast as knowledge: a student's embedding against its teacher's and those of other samples."""

from __future__ import annotations

import math
from collections.abc import Iterator

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
    hide,
    in_full_precision,
    reduce_rows,
    row_mask,
    teacher_like,
)
from kdcore.losses.examples import pair
from kdcore.losses.registry import register
from kdcore.losses.vectors import unit

_CRD = "Tian et al., Contrastive Representation Distillation, ICLR 2020"


def _check_contrast(contrast: Tensor, rows: int) -> None:
    if contrast.dtype != torch.int64:
        raise ValueError(f"contrast: wanted int64 sample indices, got {contrast.dtype}")
    if contrast.dim() != 2 or contrast.shape[0] != rows or contrast.shape[1] < 2:
        raise ValueError(f"contrast: wanted shape ({rows}, 1 + K) with K >= 1, got {tuple(contrast.shape)}")


def _gathered(anchors: Tensor, bank: Tensor, contrast: Tensor, chunk_size: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Yield (anchors [b, D], rows of the bank [b, K + 1, D]), a few rows at a time."""
    if chunk_size is None:  # gathered rows that stay in a processor's cache, or fill a GPU
        values = 1 << (20 if bank.device.type == "cpu" else 26)
        chunk_size = max(1, values // (contrast.shape[1] * bank.shape[1]))
    for some, picked in zip(anchors.split(chunk_size), contrast.split(chunk_size), strict=True):
        rows = bank.index_select(0, picked.flatten()).to(anchors.dtype)
        yield some, rows.view(*picked.shape, bank.shape[1])


def _small_contrast() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        loss = ContrastiveRepresentation(4, 5, samples=9, dim=3, temperature=0.5, generator=generator).eval()
    student, teacher = torch.randn(8, 4, generator=generator), torch.randn(8, 5, generator=generator)
    loss.estimate_constants(student, teacher, torch.randint(9, (8, 4), generator=generator))
    return loss


@register(
    "contrastive_representation",
    "structure",
    _CRD,
    examples=lambda b, g: {
        **pair(b, 4, teacher=(b, 5), generator=g),
        "contrast": torch.randint(9, (b, 4), generator=g),
    },
    laws=("nonnegative", "chunked"),
    build=_small_contrast,
)
class ContrastiveRepresentation(nn.Module):
    """Contrast with a memory bank: -log h(positive) - sum_k log(1 - h(negative_k)), both ways; h = P / (P + K / M).

    P = exp(x . y / temperature) / Z. x is a student's embedding and y a teacher's from the bank, plus the same with
    the roles swapped; an embedding is a linear head's output over its norm. Both heads learn; the banks do not, they
    follow with ``update``. Z, one for each way, is M times the mean of exp(x . y / temperature) over one batch: call
    ``estimate_constants`` once before the first loss. ``forward`` changes nothing.

    The bank takes 2 * samples * dim * (4 or 2) bytes: 51 MB for CIFAR (50,000 samples, dim 128, float32), 1.3 GB for
    ImageNet (1,281,167), half with bank_dtype=torch.float16. The gathered rows, B * (K + 1) * dim, are read a few at a
    time and not kept for the backward pass, whose gradient is taken on the way.

    Options: student_dim, teacher_dim the widths of the inputs; samples M of the training set; dim of the embeddings
    (128), temperature (0.07) and momentum (0.5) as in the authors' code, which also adds 1e-7 to the denominator of
    h; ``generator`` draws the first bank.

    Reference: Tian et al., 2020; Wu et al., CVPR 2018 (memory bank and Z).
    """

    student_bank: Tensor
    teacher_bank: Tensor
    log_constants: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        samples: int,
        *,
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        bank_dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ) -> None:
        """Make the heads and a bank of uniform vectors, of length 1 on average."""
        super().__init__()
        for argument, value, least in (
            *(("student_dim", student_dim, 1), ("teacher_dim", teacher_dim, 1)),
            *(("samples", samples, 2), ("dim", dim, 1)),
        ):
            check_at_least(argument, value, least)
        check_positive("temperature", temperature)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum: wanted a number in 0..1, below 1, got {momentum}")
        if not bank_dtype.is_floating_point:
            raise ValueError(f"bank_dtype: wanted a floating dtype, got {bank_dtype}")
        self.samples, self.temperature, self.momentum = samples, temperature, momentum
        self.student_head, self.teacher_head = nn.Linear(student_dim, dim), nn.Linear(teacher_dim, dim)
        bound = (3 / dim) ** 0.5
        for name in ("student_bank", "teacher_bank"):
            bank = torch.rand(samples, dim, generator=generator) * (2 * bound) - bound
            self.register_buffer(name, bank.to(bank_dtype))
        self.register_buffer("log_constants", torch.full((2,), torch.nan))

    def _embed(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        check_float("student", student, 2)
        check_float("teacher", teacher, 2)
        check_shape("student", student, (student.shape[0], self.student_head.in_features))
        check_shape("teacher", teacher, (student.shape[0], self.teacher_head.in_features))
        pairs = ((self.student_head, student), (self.teacher_head, teacher.detach()))
        first, second = (unit(head(values.to(head.weight.dtype))) for head, values in pairs)
        return first, second

    @torch.no_grad()
    def estimate_constants(self, student: Tensor, teacher: Tensor, contrast: Tensor) -> None:
        """Set both Z from the rows of one batch, all valid; call it once, before the first loss."""
        _check_contrast(contrast, student.shape[0])
        with torch.autocast(student.device.type, enabled=False):
            anchors = self._embed(student, teacher)
            for way, bank in enumerate((self.teacher_bank, self.student_bank)):
                parts = [
                    torch.logsumexp((rows @ some[:, :, None]).flatten() / self.temperature, 0)
                    for some, rows in _gathered(anchors[way], bank, contrast, None)
                ]
                total = torch.logsumexp(torch.stack(parts), 0)
                self.log_constants[way] = total + math.log(self.samples / max(contrast.numel(), 1))

    @torch.no_grad()
    def update(self, student: Tensor, teacher: Tensor, indices: Tensor) -> None:
        """Move the banks at ``indices`` int64 [B], without repeats, to unit(momentum * old + (1 - momentum) * new).

        Call it after the loss of the batch, with its valid rows only.
        """
        if indices.dtype != torch.int64:
            raise ValueError(f"indices: wanted int64 sample indices, got {indices.dtype}")
        check_shape("indices", indices, (student.shape[0],))
        with torch.autocast(student.device.type, enabled=False):
            embeddings = self._embed(student, teacher)
        for bank, new in zip((self.student_bank, self.teacher_bank), embeddings, strict=True):
            old = bank.index_select(0, indices).to(new.dtype)
            moved = unit(old * self.momentum + new * (1 - self.momentum))
            bank.index_copy_(0, indices, moved.to(bank.dtype))

    def _one_way(self, anchors: Tensor, bank: Tensor, contrast: Tensor, way: int, chunk_size: int | None) -> Tensor:
        """Return the losses [B] of anchors against a bank, their gradient by the anchors included."""
        # log of P / (K / M) is a logit of h
        shift = self.log_constants[way] + math.log((contrast.shape[1] - 1) / self.samples)
        learning = torch.is_grad_enabled() and anchors.requires_grad
        losses, slopes = [], []
        for some, rows in _gathered(anchors.detach(), bank.detach(), contrast, chunk_size):
            logits = torch.bmm(rows, some[:, :, None])[:, :, 0] / self.temperature - shift
            logits = torch.cat([-logits[:, :1], logits[:, 1:]], 1)
            losses.append(F.softplus(logits).sum(1))
            if learning:
                weights = torch.sigmoid(logits)
                weights = torch.cat([-weights[:, :1], weights[:, 1:]], 1) / self.temperature
                slopes.append(torch.bmm(weights[:, None], rows)[:, 0])
        result = torch.cat(losses)
        if learning:
            # Adds zero, and the gradient: the gathered rows are used for both while they are at hand.
            result = result + ((anchors - anchors.detach()) * torch.cat(slopes)).sum(1)
        return result

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        contrast: Tensor,
        *,
        mask: Tensor | None = None,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
    ) -> Tensor:
        """Return the loss of every row, both ways, reduced.

        Shapes: student [B, student_dim]; teacher [B, teacher_dim], detached; contrast int64 [B, 1 + K], indices of
        samples, the row's own first and then the negatives; mask bool [B]. ``chunk_size`` rows are worked on at a time
        (None: chosen by the device). The gradient is closed, so there is no second derivative by the embeddings.

        Raises:
            ValueError: shapes do not fit, an unknown reduction, or estimate_constants was never called.
        """
        check_float("student", student, 2)
        valid = row_mask(mask, student.shape[0])
        _check_contrast(contrast, student.shape[0])
        if chunk_size is not None:
            check_at_least("chunk_size", chunk_size, 1)
        check_float("teacher", teacher, 2)
        check_shape("teacher", teacher, (student.shape[0], self.teacher_head.in_features))
        if not bool(self.log_constants.isfinite().all()):
            raise ValueError("log_constants: wanted a call of estimate_constants before the first loss, got none")
        with torch.autocast(student.device.type, enabled=False):
            embeddings = self._embed(hide(student, valid), hide(teacher.detach(), valid))
            contrast = hide(contrast, valid)
            by_student = self._one_way(embeddings[0], self.teacher_bank, contrast, 0, chunk_size)
            by_teacher = self._one_way(embeddings[1], self.student_bank, contrast, 1, chunk_size)
        return reduce_rows(by_student + by_teacher, valid, reduction)


@register(
    "contrastive_in_batch",
    "structure",
    "van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018; as distillation: " + _CRD,
    examples=lambda b, g: pair(b, 5, generator=g),
    batchwise=True,
    laws=("nonnegative", "student_scale", "permutation"),
    variants=({}, {"temperature": 0.5}),
)
def contrastive_in_batch(
    student: Tensor,
    teacher: Tensor,
    *,
    queue: Tensor | None = None,
    temperature: float = 0.07,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """InfoNCE of student and teacher: -log softmax_j(cos(s_i, t_j) / temperature)_i, j over the batch and a queue.

    Shapes: student and teacher embeddings [B, D]; queue [Q, D], more teacher embeddings as negatives (see Queue);
    mask bool [B]; a row that is not valid is nobody's negative. At equality it is small but not zero; one valid row
    without a queue gives 0. temperature 0.07 as in Wu et al., 2018, and Tian et al., 2020.

    Raises:
        ValueError: shapes do not fit, temperature <= 0, or an unknown reduction.

    Reference: van den Oord et al., 2018; Tian et al., 2020.
    """
    check_pair(student, teacher, 2)
    check_positive("temperature", temperature)
    valid = row_mask(mask, student.shape[0])
    student = hide(in_full_precision(student), valid)
    keys = hide(teacher_like(teacher, student), valid)
    if queue is not None:
        check_float("queue", queue, 2)
        check_shape("queue", queue, (queue.shape[0], student.shape[1]))
        keys = torch.cat([keys, teacher_like(queue, student)])
    with torch.autocast(student.device.type, enabled=False):
        logits = unit(student) @ unit(keys).T / temperature
    if valid is not None:
        negatives = torch.cat([valid, valid.new_ones(len(keys) - len(valid))])
        logits = logits.masked_fill(~negatives, torch.finfo(logits.dtype).min / 4)
    positive = torch.arange(len(student), device=student.device)
    return reduce_rows(F.cross_entropy(logits, positive, reduction="none"), valid, reduction)


class Queue(nn.Module):
    """The last ``size`` embeddings [size, dim] that were pushed: first in, first out. Takes size * dim * 4 bytes.

    Reference: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020.
    """

    keys: Tensor
    pushed: Tensor

    def __init__(self, size: int, dim: int) -> None:
        """Make an empty queue."""
        super().__init__()
        check_at_least("size", size, 1)
        check_at_least("dim", dim, 1)
        self.register_buffer("keys", torch.zeros(size, dim))
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, embeddings: Tensor) -> None:
        """Put rows [N, dim] in, the last ``size`` of them if there are more."""
        check_float("embeddings", embeddings, 2)
        check_shape("embeddings", embeddings, (embeddings.shape[0], self.keys.shape[1]))
        size = self.keys.shape[0]
        places = self.pushed + torch.arange(len(embeddings), device=self.keys.device)
        self.keys[places[-size:] % size] = embeddings[-size:].to(self.keys)
        self.pushed += len(embeddings)

    def contents(self) -> Tensor:
        """Return a copy of what is in the queue [Q, dim], Q <= size, in no particular order."""
        return self.keys[: min(int(self.pushed), self.keys.shape[0])].clone()
