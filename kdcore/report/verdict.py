"""What the run showed, in plain words computed from the data, and never more than it showed."""

from __future__ import annotations

from kdcore.report.analysis import Comparison, Difference, Entry
from kdcore.report.text import decimals_for, interval, level_name, metric_name, number, percent, signed

ENOUGH_SEEDS = 3


def verdict(comparison: Comparison | None) -> str:
    """Return one sentence: what the student reaches, against what, how sure, and how much of the gap it closes."""
    if comparison is None:
        return "There are no results in this run yet."
    metric, student = comparison.metric, comparison.student
    if student is None:
        models = len(comparison.entries)
        return f"There is no student in this run: {models} models are compared on the {comparison.split} split."
    decimals = decimals_for(entry.mean(metric) for entry in comparison.entries)
    lower = "" if comparison.higher_is_better else " (lower is better)"
    opening = (
        f"The student {student.label}{_size(student)} reaches "
        f"{number(student.mean(metric), decimals)} {metric_name(metric)}{lower}"
    )
    if comparison.reference is None:
        return f"{opening}; no baseline of its size was run, so nothing shows what the teacher was worth."
    difference = comparison.differences[comparison.reference.key]
    against = f"the best baseline of its size ({_name(comparison.reference, student)})"
    return f"{opening}: {_against(difference, against, decimals)}{_gap(comparison, difference)}."


def remarks(comparison: Comparison | None) -> list[str]:
    """Return what a reader must know before quoting the verdict."""
    if comparison is None or comparison.student is None:
        return []
    found = []
    alone, reference = comparison.alone, comparison.reference
    decimals = decimals_for(entry.mean(comparison.metric) for entry in comparison.entries)
    if alone is None:
        found.append(
            "The student was not trained alone in this run: no difference here can be put down to the teacher."
        )
    elif reference is not None and alone is not reference:
        difference = comparison.differences[alone.key]
        sentence = _against(difference, "the same student trained without a teacher", decimals)
        found.append(f"Against the control: {sentence}.")
    if reference is not None:
        found += _seed_remarks(comparison.differences[reference.key])
    if comparison.selected_on is not None:
        students = sum(entry.role == "student" for entry in comparison.entries)
        optimistic = " The figure of the best of several is optimistic." if "itself" in comparison.selected_on else ""
        found.append(f"The student is the best of {students}, selected on {comparison.selected_on}.{optimistic}")
    return found


def _seed_remarks(difference: Difference) -> list[str]:
    n_seeds = difference.estimate.n_seeds
    found = []
    if difference.quotable and n_seeds < ENOUGH_SEEDS:
        found.append(f"{n_seeds} seeds are few: a claimed gain needs {ENOUGH_SEEDS} or more.")
    estimate = difference.estimate
    if estimate.low is not None:
        scope = "" if estimate.n_units else "; it does not cover the choice of the test set"
        found.append(f"How the interval was made: {estimate.method}{scope}.")
    return found


def _against(difference: Difference, other: str, decimals: int) -> str:
    estimate, gain = difference.estimate, difference.gain
    value = signed(estimate.value, decimals)
    if not difference.quotable:
        if estimate.low is None:
            reason = estimate.method if "no interval" in estimate.method else f"no interval: {estimate.method}"
        else:
            reason = f"one seed: {interval(estimate, decimals)} covers the test set, not the luck of training"
        return f"{value} against {other} ({reason}; do not quote this difference)"
    low, high = signed(estimate.low, decimals), signed(estimate.high, decimals)
    measured = f"{value} ({level_name(estimate.level)} interval {low} to {high})"
    if not difference.excludes_zero:
        return f"{measured} against {other}; the interval includes zero, so neither is shown to be better"
    if gain > 0:
        return f"{measured} over {other}" if difference.higher_is_better else f"{measured} against {other}"
    return f"{measured} against {other}: the student is worse"


def _gap(comparison: Comparison, difference: Difference) -> str:
    """Return the clause on the teacher; the share of a gap is named only where the gain is shown."""
    teacher = comparison.teacher
    if teacher is None or not difference.quotable:
        return ""
    if comparison.gap is None:
        return f"; the teacher ({teacher.label}) is no better than that model, so there is no gap to close"
    if not difference.excludes_zero or difference.gain <= 0:
        return ""
    if comparison.gap.low is None:
        return f"; what share of the gap to the teacher ({teacher.label}) that is, the data does not say"
    last = comparison.differences[teacher.key]
    beyond = ", passing it" if last.quotable and last.excludes_zero and last.gain > 0 else ""
    return f", and closes {percent(comparison.gap.value)} of the gap to the teacher ({teacher.label}){beyond}"


def _size(entry: Entry) -> str:
    return f" ({entry.params:,.0f} parameters)" if entry.params else ""


def _name(entry: Entry, student: Entry) -> str:
    return (
        f"{entry.label} trained alone"
        if entry.role == "student_alone" and entry.label == student.label
        else entry.label
    )
