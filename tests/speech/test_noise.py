"""Generated noises have their spectra, and the power of speech leaves out its pauses."""

from __future__ import annotations

import numpy as np
import pytest

from apps.speech.noise import active_power, generated_noise
from tests.speech.spectra import band


def test_active_power_leaves_out_pauses_and_offset() -> None:
    burst = np.sin(2 * np.pi * 200 * np.arange(3200) / 16000).astype(np.float32)
    silence = np.zeros(32000, np.float32)
    assert active_power(np.concatenate([silence, burst, silence])) == pytest.approx(0.5, rel=1e-3)
    assert active_power(0.5 * burst + np.float32(0.3)) == pytest.approx(0.125, rel=1e-2)
    assert active_power(silence) == 0.0 and active_power(silence[:0]) == 0.0 and active_power(burst[:80]) > 0


def test_generated_noises_have_their_spectra() -> None:
    generator = np.random.default_rng(0)
    white, pink, babble = (generated_noise(what, 160_000, generator) for what in ("white", "pink", "babble"))
    assert band(white, 1000, 2000) == pytest.approx(1 / 8, rel=0.05)
    # the same power in every octave; 3 dB an octave
    assert band(pink, 1000, 2000) / band(pink, 2000, 4000) == pytest.approx(1.0, rel=0.05)
    assert band(babble, 0, 1000) > 0.8 and band(babble, 1000, 2000) / band(babble, 2000, 4000) > 3
    with pytest.raises(ValueError, match="wanted one of white, pink, babble"):
        generated_noise("brown", 10, generator)
