"""Features: a reference by hand, and what does not depend on how audio is split."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.features import FEATURES, SAMPLE_RATE, SILENCE, TAIL_MS, OnlineFeatures, fbank, with_tail


def tone(seconds: float, hertz: float = 440.0) -> np.ndarray:
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    noise = np.random.default_rng(0).normal(0, 0.01, len(time))
    return (0.3 * np.sin(2 * np.pi * hertz * time) + noise).astype(np.float32)


def hertz_of(mel: np.ndarray) -> np.ndarray:
    """Slaney's scale: linear to 1000 Hz (15 mel), then 27 mel for each factor of 6.4."""
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))


def reference(samples: np.ndarray) -> np.ndarray:
    """Log-mel bins as their definition reads: Slaney, Auditory Toolbox, 1998, on frames as Kaldi takes them."""
    size, shift, points = 400, 160, 512
    count = (len(samples) + shift // 2) // shift
    padded = np.pad(samples.astype(np.float64), size, "symmetric")  # beyond the ends the signal is mirrored
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)  # periodic
    edges = hertz_of(np.linspace(0, 15 + 27 * np.log(SAMPLE_RATE / 2 / 1000) / np.log(6.4), FEATURES + 2))
    bins = np.arange(points // 2 + 1) * SAMPLE_RATE / points
    rise = (bins - edges[:-2, None]) / (edges[1:-1, None] - edges[:-2, None])
    fall = (edges[2:, None] - bins) / (edges[2:, None] - edges[1:-1, None])
    filters = np.maximum(np.minimum(rise, fall), 0.0) * (2 / (edges[2:] - edges[:-2]))[:, None]
    rows = []
    for index in range(count):
        start = size + index * shift + shift // 2 - size // 2
        frame = padded[start : start + size]
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, points)) ** 2
        rows.append(np.log(np.maximum(filters @ power, np.finfo(np.float32).eps)))
    return np.array(rows)


def test_agree_with_the_definition_to_a_thousandth() -> None:
    samples = tone(0.6)
    np.testing.assert_allclose(fbank(samples), reference(samples), atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 8000), max_size=6))
def test_packets_of_any_size_give_the_same(cuts: list[int]) -> None:
    samples = tone(0.5)
    features = OnlineFeatures()
    parts = [features.accept(part) for part in np.split(samples, sorted(cuts))]
    np.testing.assert_array_equal(np.concatenate([*parts, features.finish()]), fbank(samples))


def test_digital_silence_has_its_value_and_no_audio_no_frames() -> None:
    assert np.unique(fbank(np.zeros(1600, np.float32))).tolist() == [np.float32(SILENCE)]
    assert fbank(np.zeros(0, np.float32)).shape == (0, FEATURES)


def test_a_tail_is_silence_behind_the_samples() -> None:
    samples = tone(0.5)
    longer = with_tail(samples)
    assert longer.dtype == np.float32 and len(longer) == len(samples) + TAIL_MS * 16
    np.testing.assert_array_equal(longer[: len(samples)], samples)
    assert not longer[len(samples) :].any()


@pytest.mark.parametrize("wrong", [np.zeros(10), np.zeros((10, 2), np.float32)])
def test_other_arrays_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"samples: wanted float32 \[n\]"):
        fbank(wrong)
