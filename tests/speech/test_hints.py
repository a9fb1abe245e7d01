"""Losses between layers: outputs frame by frame, and attention against what the model itself attends to."""

from __future__ import annotations

import pytest
import torch

from apps.speech.hints import STRETCH, DelayedAttention, DelayedHint
from apps.speech.models.base import ATTENTION
from apps.speech.models.conformer import ChunkedConformer, ChunkedConformerOptions, rotate, rotations
from kdcore.losses.contract import Reduction
from kdcore.teaching import Taps

LENGTHS = torch.tensor([9, 6])


def test_a_hint_compares_a_frame_with_the_teachers_earlier_one() -> None:
    hint = DelayedHint(3, 3, delay=2)
    torch.nn.init.eye_(hint.project.weight)
    torch.nn.init.zeros_(hint.project.bias)
    teacher = torch.randn(2, 9, 3)
    student = teacher.roll(2, 1)
    assert float(hint(student, teacher, LENGTHS)) == pytest.approx(0.0, abs=1e-6)
    student[1, 6:] += 5  # behind the second utterance's end
    assert float(hint(student, teacher, LENGTHS)) == pytest.approx(0.0, abs=1e-6)
    student[0, 5] += 1.0
    assert float(hint(student, teacher, LENGTHS, reduction="sum")) == pytest.approx(0.5 / 7, rel=1e-5)


@pytest.mark.parametrize("delay", [9, 10, 200])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_hint_after_the_end_of_all_utterances_counts_nothing(delay: int, reduction: Reduction) -> None:
    hint = DelayedHint(3, 4, delay)
    student = torch.randn(2, 9, 3, requires_grad=True)
    value = hint(student, torch.randn(2, 9, 4), LENGTHS, reduction=reduction)
    assert float(value.detach()) == 0
    value.backward()
    assert not student.grad.any()  # type: ignore[union-attr]


def causal(mixed: torch.Tensor, heads: int) -> torch.Tensor:
    """Where each frame attends, [B, heads, T, T], as torch's own product weighs one-hot values."""
    queries, keys, _ = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in mixed.chunk(3, 2))
    frames = mixed.shape[1]
    turns = rotations(frames, queries.shape[3], mixed)
    one_hot = torch.eye(frames).expand(*queries.shape[:2], frames, frames)
    return torch.nn.functional.scaled_dot_product_attention(
        rotate(queries, *turns), rotate(keys, *turns), one_hot, is_causal=True
    )


@pytest.mark.parametrize(("own", "theirs"), [(2, 2), (2, 1)])
def test_attention_is_the_divergence_of_where_both_attend(own: int, theirs: int) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 24), torch.randn(2, 9, 12)
    q, p = causal(student, own), causal(teacher, theirs)
    if own != theirs:
        q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
    apart = torch.where(p > 0, p * (p / q.clamp(min=1e-30)).log(), 0.0).sum(3).mean(1)
    expected = apart[0].mean() + apart[1, :6].mean()
    found = DelayedAttention(own, theirs, 0)(student, teacher, LENGTHS, reduction="sum")
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_student_that_attends_alike_and_late_loses_nothing(delay: int) -> None:
    torch.manual_seed(0)
    teacher = torch.randn(2, 9, 24)
    student = teacher.roll(delay, 1).requires_grad_()
    loss = DelayedAttention(2, 2, delay)
    value = loss(student, teacher, LENGTHS)
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    value.backward()
    assert float(student.grad.abs().max()) < 1e-6  # type: ignore[union-attr]
    # what stands behind an utterance's end, or is said of values, is not looked at
    other = student.detach().clone()
    other[1, 6:] += 5
    other[..., 16:] += 5
    assert float(loss(other, teacher, LENGTHS)) == pytest.approx(0.0, abs=1e-6)
    other[0, 4:, :16] += torch.randn(5, 16)
    assert float(loss(other, teacher, LENGTHS)) > 1e-2


def test_a_long_utterance_is_compared_in_stretches() -> None:
    torch.manual_seed(0)
    count = 2 * STRETCH + 40
    student, teacher = torch.randn(1, count, 12), torch.randn(1, count, 12)
    loss = DelayedAttention(1, 1, 0)
    parts = [
        float(loss(student[:, start : start + STRETCH], teacher[:, start : start + STRETCH], torch.tensor([STRETCH])))
        for start in (0, STRETCH)
    ]
    last = float(loss(student[:, 2 * STRETCH :], teacher[:, 2 * STRETCH :], torch.tensor([40])))
    expected = (STRETCH * sum(parts) + 40 * last) / count
    assert float(loss(student, teacher, torch.tensor([count]))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("delay", [9, 200])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_attention_after_the_end_of_all_utterances_counts_nothing(delay: int, reduction: Reduction) -> None:
    student = torch.randn(2, 9, 12, requires_grad=True)
    value = DelayedAttention(1, 1, delay)(student, torch.randn(2, 9, 12), LENGTHS, reduction=reduction)
    assert float(value.detach()) == 0
    value.backward()
    assert student.grad is None or not student.grad.any()


def test_a_streaming_conformer_attends_as_it_is_said_to() -> None:
    """In chunks of one frame it attends to itself and those before: the queries and keys of its layer say how."""
    torch.manual_seed(0)
    options = ChunkedConformerOptions((2, 4), 16, 2, 1, 16, 3, 0.0, chunk=1, left_chunks=200)
    model = ChunkedConformer(5, options).eval()
    attention = model.blocks[0].attention
    layer = f"blocks.0.{ATTENTION}"
    with torch.no_grad(), Taps(model, {"mixed": layer, "given": "blocks.0.attention.output:in"}) as taps:
        model(torch.randn(2, 48, 80), torch.tensor([48, 48]))
        kept = taps.take()
    values = kept["mixed"].chunk(3, 2)[2].unflatten(2, (2, -1)).transpose(1, 2)
    mixed = (causal(kept["mixed"], attention.heads) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, kept["given"], atol=1e-5, rtol=1e-4)
    assert model.width(layer) == kept["mixed"].shape[2] == 48 and model.heads() == 2
