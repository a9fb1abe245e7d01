"""Voice activity: which feature frames may hold speech, so that a network need not hear the others. No torch.

The gate errs to one side. A frame is quiet only if no band of the spectrum rises above what was lately the least in it;
the gate closes only after a long quiet, and whoever opens it hears what came before (``Gate.before``).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from apps.speech.features import FEATURE_SHIFT_MS, FEATURES
from kdcore.config import UserError

_BANDS = 8
# frames over which levels are averaged: single ones of steady noise vary by more than speech may rise
_SMOOTH = 16
_DECIBEL = math.log(10.0) / 10
# of which the least is the noise: longer than anybody speaks without a gap
_MEMORY_SECONDS = 8.0
_BLOCK = 25


@dataclass(frozen=True)
class GateOptions:
    """How careful the gate is.

    Attributes:
        rise: decibels by which speech is above the noise in at least one band.
        hold: seconds of quiet after which the gate closes.
        before: seconds of quiet that are heard nevertheless before the gate opens.
        warm_up: seconds at the start through which it is open, since nothing is known of the noise.
    """

    rise: float = 4.0
    hold: float = 1.6
    before: float = 0.48
    warm_up: float = 3.0

    def __post_init__(self) -> None:
        for name in ("rise", "hold", "before", "warm_up"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise UserError(f"gate: {name}: got {value}, wanted 0 or more")


class Gate:
    """Says of feature frames that come in packets whether the gate is open; the answer does not depend on the split."""

    def __init__(self, options: GateOptions | None = None) -> None:
        options = options or GateOptions()
        self._rise = options.rise * _DECIBEL
        self._hold, self._warm_up = _frames(options.hold), _frames(options.warm_up)
        self._count = 0
        self._quiet = 0
        self._before: np.ndarray | None = None
        # the least level of each block of frames, and of the block that goes on
        self._least: deque[np.ndarray] = deque(maxlen=math.ceil(_frames(_MEMORY_SECONDS) / _BLOCK))
        self._current = np.full(_BANDS, np.inf)

    def accept(self, features: np.ndarray) -> np.ndarray:
        """Return bool [T] for log-mel features float32 [T, 80].

        Raises:
            ValueError: another shape.
        """
        if features.ndim != 2 or features.shape[1] != FEATURES:
            raise ValueError(f"features: got shape {features.shape}, wanted [T, {FEATURES}]")
        is_open = np.zeros(len(features), bool)
        if not len(features):
            return is_open
        levels, done = self._levels(features), 0
        while done < len(levels):
            part = levels[done : done + _BLOCK - self._count % _BLOCK]
            for place, above in enumerate((part - self._floor(part)).max(axis=1) > self._rise, start=done):
                self._count += 1
                self._quiet = 0 if above else self._quiet + 1
                is_open[place] = self._count <= self._warm_up or self._quiet < self._hold
            if self._count % _BLOCK == 0:
                self._least.append(self._current)
                self._current = np.full(_BANDS, np.inf)
            done += len(part)
        return is_open

    def _levels(self, features: np.ndarray) -> np.ndarray:
        """Return the levels of the bands [T, bands], each the mean of the last frames."""
        bands = features.reshape(len(features), _BANDS, -1).mean(axis=2, dtype=np.float64)
        before = np.repeat(bands[:1], _SMOOTH - 1, axis=0) if self._before is None else self._before
        joined = np.concatenate([before, bands])
        self._before = joined[len(bands) :]
        total = joined[: len(bands)].copy()
        for shift in range(1, _SMOOTH):  # in this order however the audio is split, so that the sums are the same
            total += joined[shift : shift + len(bands)]
        return total / _SMOOTH

    def _floor(self, levels: np.ndarray) -> np.ndarray:
        """Return the least level of late up to each frame of one block."""
        running = np.minimum.accumulate(np.concatenate([self._current[None], levels]))[1:]
        self._current = running[-1]
        return np.minimum(running, np.min(self._least, axis=0)) if self._least else running


def _frames(seconds: float) -> int:
    return math.ceil(round(seconds * 1000 / FEATURE_SHIFT_MS, 6))
