"""Numbers and names as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kdcore.statistics import Estimate

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
_ACRONYMS = frozenset(
    {"auc", "auprc", "auroc", "cer", "ece", "eer", "hr", "ic", "ir", "mae", "map", "mape", "mrr", "mse", "ndcg", "nll"}
    | {"rmse", "wer"}
)
ROLE_NAMES = {
    "teacher": "teacher",
    "assistant": "assistant",
    "student": "student",
    "student_alone": "student alone",
    "baseline": "baseline",
}


def metric_name(metric: str) -> str:
    """Return ``ndcg@10`` as NDCG@10; a name that is no known acronym only loses its underscores."""
    head, at, tail = metric.partition("@")
    return (head.upper() if head.lower() in _ACRONYMS else head.replace("_", " ")) + at + tail


def decimals_for(values: Iterable[float | None]) -> int:
    """Return how many decimals show four digits of the largest value; four for values between 0.01 and 10."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if largest == 0 or 0.01 <= largest < 10:
        return 4
    return min(10, max(0, 3 - math.floor(math.log10(largest))))


def number(value: float | None, decimals: int) -> str:
    """Return a number with a real minus sign; a dash where there is none."""
    return DASH if value is None else f"{value:,.{decimals}f}".replace("-", MINUS)


def signed(value: float | None, decimals: int) -> str:
    """Return a number that always has its sign."""
    return DASH if value is None else f"{value:+,.{decimals}f}".replace("-", MINUS)


def mean_sd(mean: float | None, sd: float | None, decimals: int) -> str:
    """Return ``mean ± sd``; the mean alone with one seed."""
    return number(mean, decimals) + ("" if sd is None else f" ± {number(sd, decimals)}")


def interval(estimate: Estimate, decimals: int) -> str:
    """Return ``[low, high]`` with signs, a word where there is no interval."""
    if estimate.low is None:
        return "no interval"
    return f"[{signed(estimate.low, decimals)}, {signed(estimate.high, decimals)}]"


def bounds(value: tuple[float, float] | None, decimals: int) -> str:
    """Return ``[low, high]`` of a quantity that is no difference, without signs."""
    return "no interval" if value is None else f"[{number(value[0], decimals)}, {number(value[1], decimals)}]"


def percent(value: float) -> str:
    """Return a share in whole percent."""
    return f"{100 * value:.0f} %".replace("-", MINUS)


def level_name(level: float) -> str:
    """Return 0.95 as 95 %."""
    return f"{100 * level:g} %"


def count(value: float | None) -> str:
    """Return a count in three digits: 22,682 as it is, 1,234,567 as 1.23 M; a dash for none or zero."""
    if not value:
        return DASH
    return f"{value:,.0f}" if value < 1e6 else _scaled(value, 1000.0, ("", " k", " M", " G", " T"))


def size(value: float | None) -> str:
    """Return bytes as kB, MB or GB; a dash for none or zero."""
    return _scaled(value, 1000.0, (" B", " kB", " MB", " GB", " TB")) if value else DASH


def duration(seconds: float | None) -> str:
    """Return a time as 0.3 s, 12 s, 3 min 20 s or 2 h 05 min; a dash for none or zero."""
    if not seconds:
        return DASH
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def milliseconds(value: float | None) -> str:
    """Return a latency in three digits."""
    return DASH if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    position = 0
    while value >= 0.9995 * step and position < len(units) - 1:
        value, position = value / step, position + 1
    return f"{value:.3g}{units[position]}"
