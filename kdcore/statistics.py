"""Paired differences and the gap closed, with intervals that do not promise more than the data holds.

A measured difference between two models moves for two reasons: training has luck in it (seeds), and the test set is
one draw of users, sentences or days (units). ``paired_difference`` sees seeds only. ``paired_bootstrap`` and
``gap_closed`` see both, from per-unit scores ``[S, U]``:

* units are resampled with replacement (percentile bootstrap of the mean over seeds);
* seeds are too few to resample: with 3 of them the bootstrap variance is 2/3 of what it should be and its tails are
  normal where Student's t has 2 degrees of freedom. Every resample is therefore shifted by a draw of
  ``s / sqrt(S) * t[S - 1]``, with ``s`` the standard deviation of the seeds' means.

Without variation between seeds this is the bootstrap over units; without variation between units it is Student's t
over seeds; in between it is the Behrens-Fisher sum of the two pivots, which errs on the wide side.

References: Student (1908); Efron (1979), bootstrap; Owen (2007), on the bootstrap of crossed factors.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

FloatArray = NDArray[np.float64]

# Elements of the largest temporary array of a resampling step: 2^21 float64 are 16 MiB.
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; ``low`` and ``high`` are None where the data allows no interval.

    ``n_seeds`` is the number of seeds that stand behind it, ``n_units`` the number of test units (0: not known).
    """

    value: float
    low: float | None
    high: float | None
    level: float
    n_seeds: int
    n_units: int
    method: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def negated(self) -> Estimate:
        """Return the estimate of minus the quantity."""
        low = None if self.high is None else -self.high
        high = None if self.low is None else -self.low
        return Estimate(-self.value, low, high, self.level, self.n_seeds, self.n_units, self.method)


def paired_difference(a: ArrayLike, b: ArrayLike, *, level: float = 0.95) -> Estimate:
    """Return mean(a - b) over seeds with Student's t interval; with one seed there is no interval.

    Shapes: ``a`` and ``b`` [S], one score a seed, same seeds in the same order.
    Raises: ValueError on shapes that differ, an empty or non-finite input, or a level outside (0, 1).
    Reference: Student (1908).
    """
    _check_level(level)
    first, second = _scores("a", a), _scores("b", b)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"a, b: got shapes {first.shape} and {second.shape}, wanted [S] twice")
    difference = first - second
    mean, n_seeds = float(difference.mean()), len(difference)
    if n_seeds == 1:
        return Estimate(mean, None, None, level, 1, 0, "one seed: no interval")
    half = float(special.stdtrit(n_seeds - 1, (1 + level) / 2) * difference.std(ddof=1) / math.sqrt(n_seeds))
    return Estimate(
        mean, mean - half, mean + half, level, n_seeds, 0, f"paired by seed, Student t over {n_seeds} seeds"
    )


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    *,
    generator: np.random.Generator,
    n_resamples: int = 10_000,
    level: float = 0.95,
    weights: ArrayLike | None = None,
) -> Estimate:
    """Return the mean of a - b over seeds and units, with an interval for both (see the module).

    With one seed the interval covers the choice of units only, and ``method`` says so.

    Shapes: ``a`` and ``b`` [S, U] or [U]; a model that is run once ([U] or [1, U]) is compared with every seed of
    the other. ``weights`` [U], positive: the mean over units is weighted (words of a sentence, for a word error
    rate); None counts units equally. Temporary memory stays below some 50 MiB; 10,000 resamples of 160,000 units
    take seconds.
    Raises: ValueError on shapes that do not match, an empty or non-finite input, or a level outside (0, 1).
    Reference: Efron (1979).
    """
    first, second = _aligned(a=a, b=b)
    difference = (first - second)[:, :, None]
    value, draws = _resample(difference, weights, n_resamples, level, generator)
    low, high = (None, None) if draws is None else _percentiles(draws[:, 0], level)
    n_seeds, n_units = difference.shape[:2]
    return Estimate(float(value[0]), low, high, level, n_seeds, n_units, _method(n_seeds, n_units, n_resamples))


def gap_closed(
    student: ArrayLike,
    baseline: ArrayLike,
    teacher: ArrayLike,
    *,
    generator: np.random.Generator,
    n_resamples: int = 10_000,
    level: float = 0.95,
    higher_is_better: bool = True,
    weights: ArrayLike | None = None,
) -> Estimate | None:
    """Return the share (student - baseline) / (teacher - baseline) of the means: 0 at the baseline, 1 at the teacher.

    None if the teacher is not better than the baseline: there is no gap to close. The interval comes from the same
    resampling as in ``paired_bootstrap``, jointly for the three models; it is None where more than (1 - level) / 2 of
    the resamples have no gap, since the share is then not determined.

    Shapes: each [S, U] or [U]; [S, 1] for means over units only. A model run once goes with every seed of the others.
    Raises: ValueError as ``paired_bootstrap``.
    """
    pupil, base, master = _aligned(student=student, baseline=baseline, teacher=teacher)
    sign = 1.0 if higher_is_better else -1.0
    stacked = sign * np.stack([pupil - base, master - base], axis=2)
    value, draws = _resample(stacked, weights, n_resamples, level, generator)
    if value[1] <= 0:
        return None
    n_seeds, n_units = stacked.shape[:2]
    low: float | None = None
    high: float | None = None
    method = _method(n_seeds, n_units, n_resamples)
    if draws is not None:
        if np.mean(draws[:, 1] <= 0) > (1 - level) / 2:
            method = "no interval: the teacher is not clearly better than the baseline"
        else:
            gap = draws[:, 1] != 0  # a resample without any gap has no share
            low, high = _percentiles(draws[gap, 0] / draws[gap, 1], level)
    return Estimate(float(value[0] / value[1]), low, high, level, n_seeds, n_units, method)


def _resample(
    values: FloatArray, weights: ArrayLike | None, n_resamples: int, level: float, generator: np.random.Generator
) -> tuple[FloatArray, FloatArray | None]:
    """Return the mean over seeds and units [K] of ``values`` [S, U, K] and its draws [R, K], None from [1, 1, K]."""
    _check_level(level)
    if n_resamples < 1:
        raise ValueError(f"n_resamples: got {n_resamples}, wanted at least 1")
    n_seeds, n_units, _ = values.shape
    weight = _unit_weights(weights, n_units)
    by_seed = np.einsum("suk,u->sk", values, weight) / weight.sum()
    mean = by_seed.mean(axis=0)
    if n_seeds == 1 and n_units == 1:
        return mean, None
    draws = _resampled_means(values.mean(axis=0), weight, n_resamples, generator)
    if n_seeds > 1:
        # Rows z @ (x - mean) / sqrt(S (S - 1)) have the covariance of the mean over seeds; the division by
        # sqrt(chi^2 / (S - 1)) makes each column exactly s / sqrt(S) * t[S - 1] and keeps the columns' correlation.
        normal = generator.standard_normal((n_resamples, n_seeds)) @ (by_seed - mean)
        chi = np.sqrt(generator.chisquare(n_seeds - 1, size=(n_resamples, 1)) / (n_seeds - 1))
        draws = draws + normal / math.sqrt(n_seeds * (n_seeds - 1)) / chi
    return mean, draws


def _resampled_means(
    units: FloatArray, weight: FloatArray, n_resamples: int, generator: np.random.Generator
) -> FloatArray:
    """Return [R, K] weighted means of ``units`` [U, K] over units drawn with replacement."""
    n_units, n_columns = units.shape
    totals = np.column_stack([units * weight[:, None], weight])
    distinct, counts = np.unique(totals, axis=0, return_counts=True)
    # Ranking metrics take few values. Drawing how often each distinct row comes is the same distribution as drawing
    # units, and a binomial draw costs about as much as drawing and gathering sixteen units.
    by_counts = len(distinct) * 16 <= n_units
    step = max(1, _CHUNK // (len(distinct) if by_counts else n_units))
    sums = np.empty((n_resamples, n_columns + 1))
    for start in range(0, n_resamples, step):
        size = min(step, n_resamples - start)
        if by_counts:
            drawn = generator.multinomial(n_units, counts / n_units, size=size)
            sums[start : start + size] = drawn @ distinct
        else:
            index = generator.integers(0, n_units, size=(size, n_units), dtype=np.int32)
            for column in range(n_columns + 1):
                sums[start : start + size, column] = totals[:, column][index].sum(axis=1)
    return sums[:, :-1] / sums[:, -1:]


def _percentiles(draws: FloatArray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _method(n_seeds: int, n_units: int, n_resamples: int) -> str:
    if n_units == 1:
        return "one seed: no interval" if n_seeds == 1 else f"Student t over {n_seeds} seeds, {n_resamples:,} draws"
    units = f"bootstrap of {n_units:,} units, {n_resamples:,} resamples"
    if n_seeds == 1:
        return f"{units}; one seed: the luck of training is not in the interval"
    return f"{units}, with Student t over {n_seeds} seeds"


def _aligned(**scores: ArrayLike) -> list[FloatArray]:
    """Return the scores as [S, U] arrays of one shape; an array with one seed is repeated for every seed."""
    arrays = {name: np.atleast_2d(_scores(name, value)) for name, value in scores.items()}
    n_seeds = max(array.shape[0] for array in arrays.values())
    n_units = next(iter(arrays.values())).shape[1]
    for name, array in arrays.items():
        if array.ndim != 2 or array.shape[1] != n_units or array.shape[0] not in (1, n_seeds):
            shapes = ", ".join(f"{key} {value.shape}" for key, value in arrays.items())
            raise ValueError(f"{name}: shapes do not match, wanted [S, U] or [U] with the same S and U: got {shapes}")
    return [np.broadcast_to(array, (n_seeds, n_units)) for array in arrays.values()]


def _scores(name: str, value: ArrayLike) -> FloatArray:
    array = np.asarray(value, dtype=np.float64)
    if array.size == 0 or array.ndim == 0:
        raise ValueError(f"{name}: got shape {array.shape}, wanted at least one score")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: got {int((~np.isfinite(array)).sum())} values that are not finite")
    return array


def _unit_weights(weights: ArrayLike | None, n_units: int) -> FloatArray:
    if weights is None:
        return np.ones(n_units)
    weight = _scores("weights", weights)
    if weight.shape != (n_units,) or (weight <= 0).any():
        raise ValueError(f"weights: got shape {weight.shape}, wanted {n_units} positive numbers")
    return weight


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: got {level}, wanted a number between 0 and 1")
