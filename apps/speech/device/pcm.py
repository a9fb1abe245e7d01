"""Raw 16-bit samples of any rate and number of channels, in messages of any size, as samples at 16 kHz. No torch."""

from __future__ import annotations

import numpy as np

from apps.speech.audio import Resampler
from apps.speech.features import SAMPLE_RATE
from kdcore.config import UserError

RATES = (8_000, 192_000)
CHANNELS = 32


class Pcm:
    """16-bit little-endian samples, channels in turn; their mean is heard."""

    def __init__(self, rate: int, channels: int) -> None:
        if not RATES[0] <= rate <= RATES[1]:
            raise UserError(f"rate: got {rate}, wanted {RATES[0]} to {RATES[1]}")
        if not 1 <= channels <= CHANNELS:
            raise UserError(f"channels: got {channels}, wanted 1 to {CHANNELS}")
        self._width = 2 * channels
        self.portion = rate // 2 * self._width
        # a resampler is not run for less than 40 ms
        self._least = rate // 25 * self._width if rate != SAMPLE_RATE else self._width
        self._channels = channels
        self._data = bytearray()
        self._ended = False
        self._resampler = Resampler(rate) if rate != SAMPLE_RATE else None

    @property
    def torn(self) -> str | None:
        """Whether a sample is cut."""
        return f"{len(self._data)} bytes of a sample" if self._ended and self._data else None

    def feed(self, data: bytes) -> None:
        """Take bytes."""
        self._data += data

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True

    def read(self) -> np.ndarray | None:
        """Return the next samples."""
        size = min(len(self._data), 2 * self.portion) // self._width * self._width
        if size < self._least and not self._ended:
            return None
        if not size:
            return self._rest()
        values = np.frombuffer(bytes(self._data[:size]), "<i2").astype(np.float32)
        del self._data[:size]
        mono = (values if self._channels == 1 else values.reshape(-1, self._channels).mean(axis=1)) / np.float32(32768)
        return np.clip(self._resampler.accept(mono), -1.0, 1.0) if self._resampler else mono

    def _rest(self) -> np.ndarray | None:
        """Return what the resampler still has, once."""
        resampler, self._resampler = self._resampler, None
        return np.clip(resampler.finish(), -1.0, 1.0) if resampler else None
