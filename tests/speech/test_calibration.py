"""Calibration: known temperatures are found, isotonic regression is scikit-learn's, errors are by the book."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import expit, logit

from apps.speech.calibration import (
    Isotonic,
    Temperature,
    expected_calibration_error,
    fit_isotonic,
    fit_temperature,
    from_dict,
    word_outcomes,
)
from kdcore.config import UserError

sklearn_isotonic = pytest.importorskip("sklearn.isotonic")
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
def test_the_temperature_is_found_and_calibrates(temperature: float) -> None:
    confidence, correct = overconfident(20_000, temperature)
    fitted = fit_temperature(confidence, correct)
    assert fitted.temperature == pytest.approx(temperature, rel=0.06)
    fresh, outcome = overconfident(20_000, temperature, seed=1)
    assert expected_calibration_error(fitted(fresh), outcome) < 0.012
    if temperature != 1.0:
        assert expected_calibration_error(fresh, outcome) > 0.05


def test_isotonic_calibrates_a_shape_no_temperature_can() -> None:
    generator = np.random.default_rng(0)
    confidence = generator.random(20_000)
    correct = generator.random(20_000) < 0.3 + 0.5 * confidence**2
    fit, held = slice(0, 10_000), slice(10_000, None)
    isotonic = fit_isotonic(confidence[fit], correct[fit])
    temperature = fit_temperature(confidence[fit], correct[fit])
    assert expected_calibration_error(isotonic(confidence[held]), correct[held]) < 0.02
    assert expected_calibration_error(temperature(confidence[held]), correct[held]) > 0.05


@settings(max_examples=40, deadline=None)
@given(SAMPLES)
def test_isotonic_is_scikit_learns(sample: tuple[np.ndarray, np.ndarray]) -> None:
    confidence, correct = sample
    fitted = fit_isotonic(confidence, correct)
    values = fitted(confidence)
    order = np.argsort(confidence)
    assert (np.diff(values[order]) >= -1e-12).all() and (values >= 0).all() and (values <= 1).all()
    # scikit-learn takes nearly equal confidences for one
    gaps = np.diff(np.unique(confidence))
    if not len(gaps) or gaps.min() > 1e-6:
        reference = sklearn_isotonic.IsotonicRegression(out_of_bounds="clip").fit(confidence, correct)
        assert values == pytest.approx(reference.predict(confidence), abs=1e-9)
        between = np.linspace(0, 1, 23)
        assert fitted(between) == pytest.approx(reference.predict(between), abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(SAMPLES)
def test_temperature_keeps_order_and_range(sample: tuple[np.ndarray, np.ndarray]) -> None:
    confidence, correct = sample
    fitted = fit_temperature(confidence, correct)
    values = fitted(confidence)
    assert 0.02 <= fitted.temperature <= 50.0 + 1e-9
    assert (values >= 0).all() and (values <= 1).all()
    assert (np.diff(values[np.argsort(confidence)]) >= 0).all()

    def loss(temperature: float) -> float:
        p = np.clip(Temperature(temperature)(confidence), 1e-300, 1)
        q = np.clip(Temperature(temperature)(1 - confidence), 1e-300, 1)
        return -float(np.mean(np.where(correct, np.log(p), np.log(q))))

    best = min(loss(each) for each in np.geomspace(0.02, 50, 12))
    assert loss(fitted.temperature) <= best + 1e-4 * (1 + abs(best))


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


@pytest.mark.parametrize("calibration", [Temperature(1.7), Isotonic((0.1, 0.5, 0.9), (0.2, 0.2, 1.0))])
def test_written_and_read(calibration: Temperature | Isotonic) -> None:
    assert from_dict(json.loads(json.dumps(calibration.as_dict()))) == calibration


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "c.json: kind: got None"),
        ({"kind": "temperature", "temperature": 0}, "temperature: got 0, wanted a number above 0"),
        ({"kind": "temperature", "temperature": float("nan")}, "temperature: got nan"),
        ({"kind": "temperature", "temperature": True}, "temperature: got True"),
        ({"kind": "isotonic", "confidences": [0.5], "shares": []}, "shares: wanted a list"),
        ({"kind": "isotonic", "confidences": [0.5, 0.4], "shares": [0.1, 0.2]}, "confidences: wanted rising"),
        ({"kind": "isotonic", "confidences": [0.5], "shares": [0.1, 0.2]}, "got 1 confidences and 2 shares"),
        ({"kind": "isotonic", "confidences": [0.5], "shares": [1.2]}, "shares: wanted a list of numbers from 0 to 1"),
    ],
)
def test_bad_files(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_dict(values, "c.json")


def test_bad_input() -> None:
    for function in (fit_temperature, fit_isotonic, expected_calibration_error):
        with pytest.raises(ValueError, match=r"got shapes \(2,\) and \(1,\)"):
            function([0.1, 0.2], [True])
        with pytest.raises(ValueError, match="M > 0"):
            function([], [])
        with pytest.raises(ValueError, match=r"confidence: got 1\.5"):
            function([1.5], [True])
        with pytest.raises(ValueError, match="confidence: got nan"):
            function([float("nan")], [True])
    with pytest.raises(ValueError, match="bins: got 0"):
        expected_calibration_error([0.5], [True], bins=0)
