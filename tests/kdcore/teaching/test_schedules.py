"""Weights over epochs, at their boundaries and between."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdcore.teaching import Schedule, switched_on, warm_up


def test_constant_after_a_delay() -> None:
    assert [Schedule(0.7).at(epoch) for epoch in (0, 1, 999)] == [0.7] * 3
    assert [switched_on(0.7, 3).at(epoch) for epoch in range(6)] == [0, 0, 0, 0.7, 0.7, 0.7]
    assert switched_on(0.7, 0).at(0) == 0.7


def test_linear_reaches_its_end_and_stays() -> None:
    schedule = Schedule(1.0, 0.2, "linear", epochs=4, delay=2)
    wanted = [0.0, 0.0, *np.linspace(1.0, 0.2, 5), 0.2, 0.2]
    assert [schedule.at(epoch) for epoch in range(9)] == pytest.approx(wanted)
    assert schedule.at(6) == schedule.at(10**6) == pytest.approx(0.2, abs=1e-15)


def test_warm_up_grows_from_zero() -> None:
    assert [warm_up(3.0, 3).at(epoch) for epoch in range(5)] == pytest.approx([0, 1, 2, 3, 3])


def test_cosine_is_slow_at_both_ends() -> None:
    schedule = Schedule(0.0, 2.0, "cosine", epochs=4)
    half = 1 - math.sqrt(0.5)
    assert [schedule.at(epoch) for epoch in range(6)] == pytest.approx([0, half, 1, 2 - half, 2, 2])


@given(st.floats(0, 10), st.floats(0, 10), st.sampled_from(["linear", "cosine"]), st.integers(1, 30), st.integers(0, 9))
def test_moving_weights_stay_between_their_ends_and_never_turn(
    start: float, end: float, shape: Any, epochs: int, delay: int
) -> None:
    schedule = Schedule(start, end, shape, epochs=epochs, delay=delay)
    values = [schedule.at(epoch) for epoch in range(delay, delay + epochs + 3)]
    assert values[0] == start and values[-1] == pytest.approx(end, abs=1e-12)
    assert min(start, end) - 1e-12 <= min(values) and max(values) <= max(start, end) + 1e-12
    steps = np.diff(values) * (1 if end >= start else -1)
    assert (steps >= -1e-12).all()
    assert all(schedule.at(epoch) == 0 for epoch in range(delay))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": "square"}, r"shape: wanted one of constant, linear, cosine, got 'square'"),
        ({"start": -0.1}, r"start: wanted a finite weight >= 0, got -0.1"),
        ({"start": math.nan}, r"start: wanted a finite weight >= 0, got nan"),
        ({"start": 1.0, "end": math.inf, "shape": "linear", "epochs": 1}, r"end: wanted a finite weight >= 0, got inf"),
        ({"delay": -1}, r"epochs, delay: wanted 0 or more, got 0, -1"),
        (
            {"shape": "linear", "end": 1.0},
            r"shape 'linear': wanted an end and at least 1 epoch .*got end 1.0, epochs 0",
        ),
        ({"shape": "cosine", "epochs": 3}, r"shape 'cosine': wanted an end"),
        ({"end": 1.0}, r"neither for constant, got end 1.0"),
        ({"epochs": 3}, r"neither for constant, got end None, epochs 3"),
    ],
)
def test_bad_schedules_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**options)
