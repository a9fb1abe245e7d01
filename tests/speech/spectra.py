"""Spectra of samples at 16 kHz."""

from __future__ import annotations

import numpy as np


def band(samples: np.ndarray, low: float, high: float) -> float:
    """Return the share of the power of samples between two frequencies in Hz."""
    power = np.square(np.abs(np.fft.rfft(samples.astype(np.float64))))
    hertz = np.fft.rfftfreq(len(samples), 1 / 16000)
    return float(power[(hertz >= low) & (hertz < high)].sum() / power.sum())
