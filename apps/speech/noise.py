"""Generated noise, and the power of the speech it is added to. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from apps.speech.features import SAMPLE_RATE

NOISES = ("white", "pink", "babble")
_FRAME = SAMPLE_RATE // 50  # 20 ms
_ACTIVE_DB = 30.0  # frames further below the loudest one are pauses
_TALKERS = 6


def active_power(samples: np.ndarray) -> float:
    """Return the mean power of the speech in samples: of the 20 ms frames at most 30 dB below the loudest one.

    The offset is left out of it; 0 for silence.
    """
    if not len(samples):
        return 0.0
    centred = samples.astype(np.float64) - samples.mean(dtype=np.float64)
    whole = len(centred) // _FRAME * _FRAME
    frames = centred[:whole].reshape(-1, _FRAME) if whole else centred[None]
    powers = np.square(frames).mean(axis=1)
    return float(powers[powers >= powers.max() * 10 ** (-_ACTIVE_DB / 10)].mean())


def generated_noise(what: str, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return ``count`` samples float64 of white, pink (power falls with 1 / frequency) or babble-like noise.

    Babble is the sum of six noises with the slope of speech (flat to 500 Hz, then -9 dB an octave), each of which
    swells 2 to 6 times a second, as syllables do. Its level is not set.
    """
    if what == "white":
        return generator.standard_normal(count)
    if what == "pink":
        return _shaped(generator, count, lambda hertz: 1 / np.sqrt(np.maximum(hertz, 20.0)))
    if what != "babble":
        raise ValueError(f"what: got {what!r}, wanted one of {', '.join(NOISES)}")
    total = np.zeros(count)
    time = np.arange(count) / SAMPLE_RATE
    for _ in range(_TALKERS):
        voice = _shaped(generator, count, lambda hertz: np.minimum(1.0, (np.maximum(hertz, 1.0) / 500) ** -1.5))
        rate, phase = generator.uniform(2.0, 6.0), generator.uniform(0.0, 2 * math.pi)
        total += voice * np.square(np.sin(math.pi * rate * time + phase))
    return total


def _shaped(generator: np.random.Generator, count: int, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    spectrum = np.fft.rfft(generator.standard_normal(count))
    return np.fft.irfft(spectrum * gain(np.fft.rfftfreq(count, 1 / SAMPLE_RATE)), count)
