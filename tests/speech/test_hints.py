"""Losses between layers: outputs frame by frame, and attention against what the model itself attends to."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from apps.speech.fitting import ask
from apps.speech.hints import STRETCH, DelayedHint, delayed_attention
from apps.speech.models.base import ATTENTION
from apps.speech.models.conformer import (
    ChunkedConformer,
    ChunkedConformerOptions,
    Conformer,
    ConformerOptions,
    rotate,
    rotations,
)
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


def attended(mixed: torch.Tensor, heads: int, back: int | None = None) -> torch.Tensor:
    """Where each frame attends, [B, heads, T, T], as torch's own product weighs one-hot values."""
    queries, keys = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in mixed.chunk(2, 2))
    frames = mixed.shape[1]
    turns = rotations(frames, queries.shape[3], mixed)
    one_hot = torch.eye(frames).expand(*queries.shape[:2], frames, frames)
    behind = torch.arange(frames)[:, None] - torch.arange(frames)
    mask = (behind >= 0) & (behind <= (frames if back is None else back))
    return torch.nn.functional.scaled_dot_product_attention(
        rotate(queries, *turns), rotate(keys, *turns), one_hot, attn_mask=mask
    )


def divergence(student: torch.Tensor, teacher: torch.Tensor, heads: tuple[int, int], back: int | None) -> torch.Tensor:
    """KL(teacher || student) of each frame of one utterance, [T], the mean over heads."""
    q, p = (attended(each[None], count, back) for each, count in zip((student, teacher), heads, strict=True))
    if heads[0] != heads[1]:
        q, p = q.mean(1, keepdim=True), p.mean(1, keepdim=True)
    apart: torch.Tensor = torch.where(p > 0, p * (p / q.clamp(min=1e-30)).log(), 0.0).sum(3).mean(1)[0]
    return apart


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("back", [None, 2, 70])
@pytest.mark.parametrize("heads", [(2, 2), (2, 1)])
def test_attention_is_the_divergence_of_where_both_attend(heads: tuple[int, int], back: int | None, delay: int) -> None:
    """Ragged utterances of one, two and three stretches, each against itself alone and stretch by stretch."""
    torch.manual_seed(0)
    lengths = [2 * STRETCH + 40, 9, STRETCH + 1]
    student, teacher = torch.randn(3, max(lengths), 16), torch.randn(3, max(lengths), 8)
    expected = torch.zeros(())
    for row, length in enumerate(lengths):
        late, heard = student[row, delay:length], teacher[row, : length - delay]
        parts = [
            divergence(late[start : start + STRETCH], heard[start : start + STRETCH], heads, back)
            for start in range(0, length - delay, STRETCH)
        ]
        expected = expected + torch.cat(parts).mean()
    options = {"student_heads": heads[0], "teacher_heads": heads[1], "back": back, "delay": delay}
    found = delayed_attention(student, teacher, torch.tensor(lengths), reduction="sum", **options)
    torch.testing.assert_close(found, expected)
    each = delayed_attention(student, teacher, torch.tensor(lengths), reduction="none", **options)
    torch.testing.assert_close(each.sum(), expected)


@pytest.mark.parametrize("delay", [0, 2])
def test_a_student_that_attends_alike_and_late_loses_nothing(delay: int) -> None:
    torch.manual_seed(0)
    teacher = torch.randn(2, 9, 16)
    student = teacher.roll(delay, 1).requires_grad_()
    loss = partial(delayed_attention, student_heads=2, teacher_heads=2, delay=delay)
    value = loss(student, teacher, LENGTHS)
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    value.backward()
    assert float(student.grad.abs().max()) < 1e-6  # type: ignore[union-attr]
    other = student.detach().clone()
    other[1, 6:] += 5  # behind the second utterance's end
    assert float(loss(other, teacher, LENGTHS)) == pytest.approx(0.0, abs=1e-6)
    other[0, 4:] += torch.randn(5, 16)
    assert float(loss(other, teacher, LENGTHS)) > 1e-2


def test_attention_is_compared_in_full_precision_under_autocast() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    loss = partial(delayed_attention, student_heads=2, teacher_heads=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(student.bfloat16(), teacher.half(), LENGTHS)
    torch.testing.assert_close(found, loss(student.bfloat16().float(), teacher.half().float(), LENGTHS))


@pytest.mark.parametrize("delay", [9, 200])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_attention_after_the_end_of_all_utterances_counts_nothing(delay: int, reduction: Reduction) -> None:
    student = torch.randn(2, 9, 8, requires_grad=True)
    options = {"student_heads": 1, "teacher_heads": 1, "delay": delay}
    value = delayed_attention(student, torch.randn(2, 9, 8), LENGTHS, reduction=reduction, **options)
    assert float(value.detach()) == 0
    value.backward()
    assert student.grad is None or not student.grad.any()


def test_a_streaming_conformer_attends_as_it_is_said_to() -> None:
    """In chunks of one frame it attends to itself and those within its reach: queries and keys of its layer say how."""
    torch.manual_seed(0)
    options = ChunkedConformerOptions((2, 4), 16, 2, 1, 16, 3, 0.0, chunk=1, left_chunks=5)
    model = ChunkedConformer(5, options).eval()
    layer = f"blocks.0.{ATTENTION}"
    with torch.no_grad(), Taps(model, {"mixed": layer, "given": "blocks.0.attention.output:in"}) as taps:
        model(torch.randn(2, 48, 80), torch.tensor([48, 48]))
        kept = taps.take()
    width = model.width(layer)
    values = kept["mixed"][..., width:].unflatten(2, (2, -1)).transpose(1, 2)
    mixed = (attended(kept["mixed"][..., :width], model.heads(), model.reach()) @ values).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixed, kept["given"], atol=1e-5, rtol=1e-4)
    # in several chunks what it is sure to hear is what the smallest reach
    assert model.reach() == 5 and ChunkedConformer(5, replace(options, chunks=(8, 2, 4))).reach() == 10


def test_a_teacher_is_asked_for_its_queries_and_keys_alone() -> None:
    torch.manual_seed(0)
    model = Conformer(5, ConformerOptions((2, 4), 16, 2, 2, 16, 3))
    layer = f"blocks.1.{ATTENTION}"
    said = ask(model, [np.random.default_rng(0).standard_normal((20, 80)).astype(np.float32)], layers=[layer])
    assert said[layer][0].shape == (5, model.width(layer)) == (5, 32) and model.reach() is None
