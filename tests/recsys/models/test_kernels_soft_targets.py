"""The fused soft targets equal the plain loss, value and gradient."""

from __future__ import annotations

import pytest
import torch

from apps.recsys.models.kernels import LinearScore, linear_sparse_soft_targets
from kdcore.losses.sparse import sparse_soft_targets


def _case(rows: int, classes: int, kept: int, scale: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + classes)
    hidden = torch.randn(rows, 5, generator=generator, dtype=torch.float64) * scale
    weight = torch.randn(classes, 5, generator=generator, dtype=torch.float64)
    items = torch.rand(rows, classes, generator=generator).topk(kept, dim=1).indices
    log_probs = torch.log_softmax(torch.randn(rows, classes, generator=generator, dtype=torch.float64), 1)
    return hidden, weight, items, log_probs.gather(1, items)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("rows", "classes", "kept", "scale"), [(7, 11, 3, 1.0), (1, 6, 6, 1.0), (40, 70_000, 9, 3.0)])
def test_fused_equals_plain(rows: int, classes: int, kept: int, scale: float, temperature: float) -> None:
    results = []
    for fused in (True, False):
        hidden, weight, items, log_probs = _case(rows, classes, kept, scale)
        hidden.requires_grad_()
        weight.requires_grad_()
        if fused:
            loss = linear_sparse_soft_targets(hidden, weight, items, log_probs, temperature)
        else:
            logits = hidden @ weight.T
            loss = sparse_soft_targets(logits, items, log_probs, temperature=temperature, reduction="sum")
        (loss * 0.7).backward()
        results.append((loss.detach(), hidden.grad, weight.grad))
    for fused_value, plain_value in zip(*results, strict=True):
        assert fused_value is not None and plain_value is not None
        torch.testing.assert_close(fused_value, plain_value, rtol=1e-7, atol=1e-9)


def test_zero_at_the_teachers_own_probabilities() -> None:
    hidden, weight, items, _ = _case(6, 12, 4, 1.0)
    hidden.requires_grad_()
    log_probs = torch.log_softmax(hidden.detach() @ weight.T, 1).gather(1, items)
    loss = linear_sparse_soft_targets(hidden, weight, items, log_probs, 1.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(hidden.grad, torch.zeros_like(hidden), atol=1e-12, rtol=0.0)


def test_finite_at_extreme_logits() -> None:
    hidden, weight, items, log_probs = (
        each.float() if each.is_floating_point() else each for each in _case(5, 9, 3, 1e4)
    )
    hidden.requires_grad_()
    loss = linear_sparse_soft_targets(hidden, weight, items, log_probs, 1.0)
    loss.backward()
    assert torch.isfinite(loss) and hidden.grad is not None and torch.isfinite(hidden.grad).all()


def test_lists_are_the_entries_of_all_scores() -> None:
    hidden, weight, items, _ = _case(6, 12, 4, 1.0)
    score = LinearScore(hidden, weight)
    torch.testing.assert_close(score(torch.arange(6), items), score(torch.arange(6)).gather(1, items))
