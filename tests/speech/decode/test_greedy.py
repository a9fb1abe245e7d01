from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.decode.greedy import GreedyStream, greedy
from tests.speech.decode.made import noisy, normalise


def test_blanks_and_repeats_collapse() -> None:
    path = [2, 0, 0, 2, 0, 1, 1, 2]
    log_probs = normalise(10.0 * np.eye(3)[path])
    found = greedy(log_probs)
    assert found.ids == (0, 0, 1)
    assert found.frames == (1, 4, 5)
    assert found.score == pytest.approx(float(log_probs.max(axis=1).sum()))
    assert found.probabilities == pytest.approx(np.exp(log_probs.max(axis=1)[[1, 4, 5]]))


@settings(max_examples=60, deadline=None)
@given(frames=st.integers(0, 25), cuts=st.lists(st.integers(0, 25), max_size=6), seed=st.integers(0, 99))
def test_any_split_equals_the_whole(frames: int, cuts: list[int], seed: int) -> None:
    log_probs = noisy(frames, 4, np.random.default_rng(seed))
    whole = greedy(log_probs)
    stream = GreedyStream()
    edges = [0, *sorted(min(cut, frames) for cut in cuts), frames]
    parts = [stream.accept(log_probs[first:last]) for first, last in itertools.pairwise(edges)]
    assert tuple(symbol for part in parts for symbol in part.ids) == whole.ids
    assert tuple(frame for part in parts for frame in part.frames) == whole.frames
    assert tuple(value for part in parts for value in part.probabilities) == whole.probabilities
    assert sum(part.score for part in parts) == pytest.approx(whole.score)


def test_other_classes_midway_are_an_error() -> None:
    stream = GreedyStream()
    stream.accept(noisy(2, 4, np.random.default_rng(0)))
    with pytest.raises(ValueError, match="wanted"):
        stream.accept(noisy(2, 5, np.random.default_rng(0)))
