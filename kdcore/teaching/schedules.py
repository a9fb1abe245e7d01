"""How the weight of a loss term moves over the epochs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Shape = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """A weight as a function of the epoch: from ``start`` to ``end`` over ``epochs`` epochs, after ``delay`` of 0.

    ``constant`` is ``start`` throughout; ``linear`` and ``cosine`` reach ``end`` at epoch ``delay + epochs`` and stay
    there. A warm-up is linear from 0; a term that is off until epoch n has ``delay=n``.
    """

    start: float = 1.0
    end: float | None = None
    shape: Shape = "constant"
    # epochs the change takes, and epochs before it begins, in which the weight is 0
    epochs: int = 0
    delay: int = 0

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"shape: wanted one of {', '.join(get_args(Shape))}, got {self.shape!r}")
        for name, value in (("start", self.start), ("end", self.start if self.end is None else self.end)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: wanted a finite weight >= 0, got {value}")
        if self.delay < 0 or self.epochs < 0:
            raise ValueError(f"epochs, delay: wanted 0 or more, got {self.epochs}, {self.delay}")
        moving = self.shape != "constant"
        if moving != (self.end is not None) or moving != (self.epochs > 0):
            raise ValueError(
                f"shape {self.shape!r}: wanted an end and at least 1 epoch for linear and cosine, neither for constant,"
                f" got end {self.end}, epochs {self.epochs}"
            )

    def at(self, epoch: int) -> float:
        """Return the weight in an epoch, counted from 0."""
        if epoch < self.delay:
            return 0.0
        if self.end is None:
            return self.start
        share = min((epoch - self.delay) / self.epochs, 1.0)
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share


def warm_up(weight: float, epochs: int) -> Schedule:
    """Return a weight that grows linearly from 0 over the first epochs."""
    return Schedule(0.0, weight, "linear", epochs=epochs)


def switched_on(weight: float, epoch: int) -> Schedule:
    """Return a weight that is 0 before an epoch."""
    return Schedule(weight, delay=epoch)
