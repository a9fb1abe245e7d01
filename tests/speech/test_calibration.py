"""Calibration: the error is by the book, and the decoder's calibration brings it down."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit, logit

from apps.speech.calibration import expected_calibration_error, word_outcomes
from apps.speech.decode.confidence import Calibration

SAMPLES = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.float64, n, elements=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]) | st.floats(0, 1)),
        hnp.arrays(np.bool_, n),
    )
)


def overconfident(n: int, temperature: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return confidences whose log-odds are ``temperature`` times too large, and outcomes."""
    generator = np.random.default_rng(seed)
    truth = generator.beta(4, 2, size=n)
    return expit(temperature * logit(truth)), generator.random(n) < truth


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_decoders_calibration_brings_the_error_down(temperature: float) -> None:
    fitted = Calibration.fit(*overconfident(20_000, temperature))
    fresh, outcome = overconfident(20_000, temperature, seed=1)
    calibrated = [fitted.apply(each) for each in fresh]
    assert expected_calibration_error(calibrated, outcome) < 0.015
    if temperature != 1.0:
        assert expected_calibration_error(fresh, outcome) > 0.05


@settings(max_examples=40)
@given(SAMPLES, st.integers(1, 20))
def test_the_error_is_by_the_book(sample: tuple[np.ndarray, np.ndarray], bins: int) -> None:
    confidence, correct = sample
    slots = [min(int(value * bins), bins - 1) for value in confidence]
    total = 0.0
    for each in set(slots):
        inside = [at for at, slot in enumerate(slots) if slot == each]
        gap = np.mean([correct[at] for at in inside]) - np.mean([confidence[at] for at in inside])
        total += len(inside) / len(confidence) * abs(gap)
    found = expected_calibration_error(confidence, correct, bins=bins)
    assert found == pytest.approx(total, abs=1e-9) and 0 <= found <= 1


def test_error_of_the_extremes() -> None:
    assert expected_calibration_error([1.0, 0.0], [True, False]) == 0
    assert expected_calibration_error([1.0, 0.0], [False, True]) == 1


def test_word_outcomes_are_those_of_the_alignment() -> None:
    first = [{"word": "one", "confidence": 0.9}, {"word": "oh", "confidence": 0.2}, {"word": "two", "confidence": 0.8}]
    second = [{"word": "yes", "confidence": 0.6}]
    confidence, correct = word_outcomes([(first, "one two"), (second, "no"), ([], "three")])
    assert confidence.tolist() == [0.9, 0.2, 0.8, 0.6]
    assert correct.tolist() == [True, False, True, False]
    with pytest.raises(ValueError, match="without white space"):
        word_outcomes([([{"word": "one two", "confidence": 1.0}], "one two")])


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(1,\)"):
        expected_calibration_error([0.1, 0.2], [True])
    with pytest.raises(ValueError, match="M > 0"):
        expected_calibration_error([], [])
    with pytest.raises(ValueError, match=r"confidence: got 1\.5"):
        expected_calibration_error([1.5], [True])
    with pytest.raises(ValueError, match="confidence: got nan"):
        expected_calibration_error([float("nan")], [True])
    with pytest.raises(ValueError, match="bins: got 0"):
        expected_calibration_error([0.5], [True], bins=0)
