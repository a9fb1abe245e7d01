"""Batches by length: every row once, bounded, little padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.data.batches import bucketed, padded, padding_share


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=80), frames=st.integers(1, 2000), seed=st.integers(0, 9)
)
def test_every_row_once_and_no_batch_too_large(lengths: list[int], frames: int, seed: int) -> None:
    sizes = np.array(lengths)
    batches = bucketed(sizes, frames, torch.Generator().manual_seed(seed))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * sizes[batch].max() <= frames


def test_speech_wastes_less_than_a_tenth_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).lognormal(5.4, 0.6, 1000).astype(np.int64) + 40
    generator = torch.Generator().manual_seed(0)
    first, second = (bucketed(lengths, 6000, generator) for _ in range(2))
    assert padding_share(lengths, first) < 0.1
    assert {tuple(sorted(batch)) for batch in first} != {tuple(sorted(batch)) for batch in second}
    shuffled = [np.arange(start, min(start + 16, 1000)) for start in range(0, 1000, 16)]
    assert padding_share(lengths, shuffled) > 0.3  # what it is without buckets


def test_the_same_generator_gives_the_same_batches() -> None:
    lengths = np.arange(1, 200)
    one, other = (bucketed(lengths, 1000, torch.Generator().manual_seed(4)) for _ in range(2))
    assert [batch.tolist() for batch in one] == [batch.tolist() for batch in other]


def test_padding_fills_up_behind() -> None:
    rows = [np.ones((2, 3), np.float32), np.ones((4, 3), np.float32)]
    out = padded(rows, -1.0)
    assert out.shape == (2, 4, 3) and out.dtype == np.float32
    assert out[0, 2:].tolist() == [[-1.0] * 3] * 2 and (out[0, :2] == 1).all() and (out[1] == 1).all()


@pytest.mark.parametrize(("frames", "jitter"), [(0, 0.1), (10, 1.0), (10, -0.1)])
def test_options_out_of_range(frames: int, jitter: float) -> None:
    with pytest.raises(ValueError, match="frames, jitter"):
        bucketed(np.array([1]), frames, torch.Generator(), jitter=jitter)
