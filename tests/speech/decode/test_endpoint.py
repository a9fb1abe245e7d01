from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.decode.endpoint import Endpointer, Rule
from kdcore.config import UserError
from tests.speech.decode.made import normalise


def frames(pattern: list[tuple[str, int]]) -> np.ndarray:
    path = [0 if kind == "speech" else 2 for kind, count in pattern for _ in range(count)]
    return normalise(8.0 * np.eye(3)[path].reshape(-1, 3))


@pytest.mark.parametrize(
    ("pattern", "ends"),
    [
        ([("silence", 59)], []),
        ([("silence", 60)], [60]),  # 2.4 s
        ([("silence", 125)], [60, 120]),
        ([("silence", 10), ("speech", 5), ("silence", 29)], []),
        ([("silence", 10), ("speech", 5), ("silence", 30)], [45]),  # 1.2 s after speech
        ([("silence", 10), ("speech", 5), ("silence", 30), ("silence", 59)], [45]),
        ([("speech", 20), ("silence", 29), ("speech", 1), ("silence", 30)], [80]),
        ([("speech", 499)], []),
        ([("speech", 1001)], [500, 1000]),  # 20 s
    ],
)
def test_rules(pattern: list[tuple[str, int]], ends: list[int]) -> None:
    assert Endpointer().accept(frames(pattern)) == ends


@settings(max_examples=60, deadline=None)
@given(
    pattern=st.lists(st.tuples(st.sampled_from(["speech", "silence"]), st.integers(1, 90)), min_size=1, max_size=8),
    cuts=st.lists(st.integers(0, 700), max_size=8),
)
def test_any_split_equals_the_whole(pattern: list[tuple[str, int]], cuts: list[int]) -> None:
    log_probs = frames(pattern)
    edges = [0, *sorted(min(cut, len(log_probs)) for cut in cuts), len(log_probs)]
    endpointer = Endpointer()
    parts = [end for first, last in itertools.pairwise(edges) for end in endpointer.accept(log_probs[first:last])]
    assert parts == Endpointer().accept(log_probs)


def test_own_rules_and_bad_ones() -> None:
    assert Endpointer([Rule(True, 0.08, 0.4)]).accept(frames([("speech", 1), ("silence", 20)])) == [10]
    with pytest.raises(UserError, match="none"):
        Endpointer([])
    for silence, length in ((-1.0, 0.0), (0.0, 0.0), (float("inf"), 1.0)):
        with pytest.raises(UserError, match="endpoint rule"):
            Rule(False, silence, length)
