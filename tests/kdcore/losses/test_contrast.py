"""Contrast: the bank and its constants, torchdistill with the same bank, and the queue."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses import ContrastiveRepresentation, Queue, contrastive_in_batch

M, K, B, D = 40, 6, 5, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(M, generator=generator)[:B]
    contrast = torch.randint(M, (B, K + 1), generator=generator)
    contrast[:, 0] = indices
    return normal(B, 4, seed=seed + 1), normal(B, 7, seed=seed + 2), contrast, indices


def bank(**options: Any) -> ContrastiveRepresentation:
    torch.manual_seed(0)
    return ContrastiveRepresentation(4, 7, M, dim=D, generator=torch.Generator().manual_seed(1), **options).double()


def test_loss_gradient_and_update_are_those_of_torchdistill_without_its_eps() -> None:
    mid_level = pytest.importorskip("torchdistill.losses.mid_level")
    ours = bank()
    # Its eps = 1e-7 is not small beside P = 1 / M: at M = 50,000 it adds half a percent to every negative. Its own
    # drawing of negatives fails (self.prob does not exist), so they are given.
    theirs = mid_level.CRDLoss("n", "e", "n", D, M, K, M, eps=0.0).double()
    theirs.memory_v1.copy_(ours.student_bank)
    theirs.memory_v2.copy_(ours.teacher_bank)
    for step in range(3):
        student, teacher, contrast, indices = batch(step)
        if step == 0:
            ours.estimate_constants(student, teacher, contrast)
        mine, other = student.clone().requires_grad_(), student.clone().requires_grad_()
        got = ours(mine, teacher, contrast)
        extra = {"e": {"input": {"pos_idx": indices, "contrast_idx": contrast}}}
        want = theirs(
            {"n": {"output": F.normalize(ours.student_head(other))}, **extra},
            {"n": {"output": F.normalize(ours.teacher_head(teacher))}},
        )
        assert got.item() == pytest.approx(want.item(), rel=1e-5)
        heads = list(ours.student_head.parameters()) + list(ours.teacher_head.parameters())
        for a, b in zip(
            torch.autograd.grad(got, [mine, *heads]), torch.autograd.grad(want, [other, *heads]), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
        ours.update(student, teacher, indices)
        torch.testing.assert_close(ours.student_bank, theirs.memory_v1)
        torch.testing.assert_close(ours.teacher_bank, theirs.memory_v2)


def test_forward_changes_nothing_and_update_only_the_rows_named() -> None:
    loss = bank()
    student, teacher, contrast, indices = batch()
    loss.estimate_constants(student, teacher, contrast)
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    loss(student, teacher, contrast).backward()
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())
    loss.update(student, teacher, indices)
    after = loss.state_dict()
    rest = torch.ones(M, dtype=torch.bool)
    rest[indices] = False
    for name in ("student_bank", "teacher_bank"):
        assert torch.equal(after[name][rest], before[name][rest])
        torch.testing.assert_close(after[name][indices].norm(dim=1), torch.ones(B, dtype=torch.float64))
    assert torch.equal(after["log_constants"], before["log_constants"])


def test_a_first_loss_wants_constants_and_a_saved_bank_has_them() -> None:
    loss, again = bank(), bank()
    student, teacher, contrast, _ = batch()
    with pytest.raises(ValueError, match="log_constants: wanted a call of estimate_constants before the first loss"):
        loss(student, teacher, contrast)
    loss.estimate_constants(student, teacher, contrast)
    embedding = F.normalize(loss.student_head(student))
    scores = torch.einsum("bd,bkd->bk", embedding, loss.teacher_bank[contrast]) / 0.07
    assert loss.log_constants[0].exp().item() == pytest.approx(M * scores.exp().mean().item())
    again.load_state_dict(loss.state_dict())
    torch.testing.assert_close(again(student, teacher, contrast), loss(student, teacher, contrast))


def test_bank_size_and_half_precision() -> None:
    loss = ContrastiveRepresentation(4, 7, 50_000)
    stored = sum(b.numel() * b.element_size() for b in (loss.student_bank, loss.teacher_bank))
    assert stored == 51_200_000
    assert loss.student_bank.norm(dim=1).mean().item() == pytest.approx(1, abs=0.01)
    full, half = (
        ContrastiveRepresentation(4, 7, M, dim=D, bank_dtype=d, generator=torch.Generator().manual_seed(1))
        for d in (torch.float32, torch.float16)
    )
    half.load_state_dict({**full.state_dict(), **{k: v for k, v in half.state_dict().items() if "bank" in k}})
    student, teacher, contrast, indices = (x.float() if x.is_floating_point() else x for x in batch())
    full.estimate_constants(student, teacher, contrast)
    half.estimate_constants(student, teacher, contrast)
    assert half(student, teacher, contrast).item() == pytest.approx(full(student, teacher, contrast).item(), rel=5e-3)
    half.update(student, teacher, indices)
    assert half.student_bank.dtype == torch.float16


def test_wrong_arguments_are_named() -> None:
    for options, message in (
        ({"temperature": 0.0}, "temperature: wanted a finite number > 0, got 0"),
        ({"momentum": 1.0}, r"momentum: wanted a number in 0\.\.1, below 1, got 1"),
        ({"bank_dtype": torch.int8}, "bank_dtype: wanted a floating dtype, got torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            bank(**options)
    loss = bank()
    student, teacher, contrast, indices = batch()
    loss.estimate_constants(student, teacher, contrast)
    with pytest.raises(ValueError, match=r"contrast: wanted int64 sample indices, got torch.float32"):
        loss(student, teacher, contrast.float())
    with pytest.raises(ValueError, match=r"contrast: wanted shape \(5, 1 \+ K\) with K >= 1, got \(5, 1\)"):
        loss(student, teacher, contrast[:, :1])
    with pytest.raises(ValueError, match="chunk_size: wanted at least 1, got 0"):
        loss(student, teacher, contrast, chunk_size=0)
    with pytest.raises(ValueError, match=r"indices: wanted shape \(5,\), got \(4,\)"):
        loss.update(student, teacher, indices[:4])


# In the batch, and the queue.


def test_in_batch_is_cross_entropy_of_cosines_with_a_queue() -> None:
    student, teacher, queue = normal(5, 4), normal(5, 4, seed=1), normal(7, 4, seed=2).requires_grad_()
    keys = F.normalize(torch.cat([teacher, queue]))
    want = F.cross_entropy(F.normalize(student) @ keys.T / 0.07, torch.arange(5), reduction="none")
    got = contrastive_in_batch(student.requires_grad_(), teacher, queue=queue, reduction="none")
    torch.testing.assert_close(got, want)
    got.sum().backward()
    assert queue.grad is None
    mask = torch.tensor([True, False, True, True, False])
    masked = contrastive_in_batch(student, teacher.masked_fill(~mask[:, None], torch.nan), queue=queue, mask=mask)
    torch.testing.assert_close(masked, contrastive_in_batch(student[mask], teacher[mask], queue=queue))
    with pytest.raises(ValueError, match=r"queue: wanted shape \(7, 4\), got \(7, 3\)"):
        contrastive_in_batch(student, teacher, queue=queue[:, :3])


def test_in_batch_of_equal_embeddings_is_the_log_of_their_number() -> None:
    ones = torch.ones(6, 3)
    assert contrastive_in_batch(ones, ones).item() == pytest.approx(math.log(6))
    assert contrastive_in_batch(ones[:1], ones[:1]).item() == 0
    assert contrastive_in_batch(ones[:1], ones[:1], queue=ones[:3]).item() == pytest.approx(math.log(4))


def test_queue_keeps_the_last_rows() -> None:
    queue, rows = Queue(5, 2), torch.arange(24.0).view(12, 2)
    assert queue.contents().shape == (0, 2)
    for start, stop in ((0, 3), (3, 4), (4, 4), (4, 7)):
        queue.push(rows[start:stop])
        kept = rows[max(0, stop - 5) : stop]
        assert sorted(queue.contents().tolist()) == kept.tolist()
    queue.push(rows)  # more than it holds
    assert sorted(queue.contents().tolist()) == rows[-5:].tolist()
    again = Queue(5, 2)
    again.load_state_dict(queue.state_dict())
    assert torch.equal(again.contents(), queue.contents())
    with pytest.raises(ValueError, match=r"embeddings: wanted shape \(3, 2\), got \(3, 4\)"):
        queue.push(torch.zeros(3, 4))


def test_queue_may_be_pushed_before_the_backward_pass() -> None:
    queue, student = Queue(8, 4), normal(3, 4).requires_grad_()
    queue.push(normal(6, 4, seed=1))
    value = contrastive_in_batch(student, normal(3, 4, seed=2), queue=queue.contents())
    queue.push(normal(6, 4, seed=3))
    value.backward()
    assert student.grad.isfinite().all()
