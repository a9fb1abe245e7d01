"""A constant offset taken out of samples as they come, for recordings of hardware that adds one. No torch.

The features leave an offset in (``apps.speech.features``), and a model that never heard one mishears speech with it.
"""

from __future__ import annotations

import math

import numpy as np

from apps.speech.features import SAMPLE_RATE

# far below any voice; an offset that drifts is followed within some 10 ms
CUTOFF_HZ = 20.0
_KEPT = math.exp(-2 * math.pi * CUTOFF_HZ / SAMPLE_RATE)
# the powers of one span are applied at once; _KEPT ** 4096 is 1e-14, which float64 can divide by
_SPAN = 4096
_DECAY = _KEPT ** np.arange(1, _SPAN + 1, dtype=np.float64)
_WEIGHT = (1 - _KEPT) / _DECAY


class OffsetRemover:
    """A causal one-pole high-pass at ``CUTOFF_HZ``: y[n] = x[n] - m[n], m[n] = k m[n-1] + (1 - k) x[n].

    m begins at the first sample, so that a constant becomes 0 from the start, and samples with any constant added
    become the same but for rounding. What comes out does not depend on how the audio is cut.
    """

    def __init__(self) -> None:
        # of the span in hand: m / _DECAY, and how many of its samples have come
        self._sum: float | None = None
        self._place = 0

    def accept(self, samples: np.ndarray) -> np.ndarray:
        """Take samples float32 [n] in [-1, 1] at 16 kHz, n >= 0, and return float32 [n] in [-2, 2], without a delay."""
        found = np.empty(len(samples), np.float32)
        at = 0
        while at < len(samples):
            part = samples[at : at + _SPAN - self._place].astype(np.float64)
            place = slice(self._place, self._place + len(part))
            before = float(part[0]) if self._sum is None else self._sum
            # one after the other, from what the packet before left: the same sums whatever the cuts
            sums = np.add.accumulate(np.concatenate([[before], part * _WEIGHT[place]]))
            means = sums[1:] * _DECAY[place]
            found[at : at + len(part)] = part - means
            at, self._place = at + len(part), place.stop % _SPAN
            self._sum = float(sums[-1] if self._place else means[-1])
        return found
