from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.decode.ctc import check_log_probs, ctc_log_probabilities, ctc_log_probability
from tests.speech.decode.made import enumerate_all, noisy


@pytest.mark.parametrize(("frames", "classes"), [(1, 2), (3, 3), (5, 3), (4, 4)])
def test_probability_is_that_of_all_paths(frames: int, classes: int) -> None:
    log_probs = noisy(frames, classes, np.random.default_rng(frames))
    expected = enumerate_all(log_probs)
    got = ctc_log_probabilities(log_probs, list(expected))
    np.testing.assert_allclose(got, list(expected.values()), atol=1e-5)
    assert np.logaddexp.reduce(got) == pytest.approx(0.0, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    frames=st.integers(1, 30),
    ids=st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_probability_equals_torch(frames: int, ids: list[list[int]], seed: int) -> None:
    log_probs = noisy(frames, 6, np.random.default_rng(seed))
    got = ctc_log_probabilities(log_probs, ids)
    for row, value in zip(ids, got, strict=True):
        loss = torch.nn.functional.ctc_loss(
            torch.from_numpy(log_probs).double()[:, None],
            torch.tensor([row], dtype=torch.long).reshape(1, len(row)),
            torch.tensor([frames]),
            torch.tensor([len(row)]),
            blank=5,
            reduction="none",
        )
        expected = -float(loss[0])
        if expected < -1e29 or not np.isfinite(expected):
            assert value == -np.inf
        else:
            assert value == pytest.approx(expected, rel=1e-6, abs=1e-5)


def test_what_does_not_fit_is_impossible() -> None:
    log_probs = noisy(3, 3, np.random.default_rng(0))
    assert ctc_log_probability(log_probs, [0, 0, 1]) == -np.inf  # a blank is needed between the two
    assert np.isfinite(ctc_log_probability(log_probs, [0, 1, 0]))
    nothing = np.zeros((0, 3), np.float32)
    assert ctc_log_probabilities(nothing, [[], [1]]).tolist() == [0.0, -np.inf]
    assert ctc_log_probabilities(log_probs, []).shape == (0,)


@pytest.mark.parametrize(
    ("log_probs", "problem"),
    [
        (np.zeros(3, np.float32), "shape"),
        (np.zeros((2, 1), np.float32), "shape"),
        (np.zeros((2, 3), np.int64), "int64"),
        (np.full((2, 3), 0.5, np.float32), "log-softmax"),
        (np.array([[-1.0, -1, -1], [-1, np.nan, -1]], np.float32), "NaN, first at frame 1"),
    ],
)
def test_bad_posteriors_are_named(log_probs: np.ndarray, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_log_probs(log_probs)


def test_classes_and_ids_are_checked() -> None:
    log_probs = noisy(2, 3, np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"wanted \[T, 4\]"):
        check_log_probs(log_probs, 4)
    with pytest.raises(ValueError, match=r"wanted symbols 0\.\.1"):
        ctc_log_probability(log_probs, [2])
