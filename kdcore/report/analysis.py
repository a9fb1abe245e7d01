"""From the rows of ``metrics.json`` to what a reader wants to know: who is better, by how much, how sure.

The difference column is always "the student minus this model". The reference of the verdict is the best model that
had no teacher and is not bigger than the student: the model one would otherwise deploy. It is chosen by the very
metric that is reported, which favours the reference and never the student.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdcore.config import UserError
from kdcore.report.files import RunFiles, check_rows, finite
from kdcore.statistics import Estimate, gap_closed, paired_difference

# Metrics where less is better, by their name before any "@"; a configuration can say otherwise.
LOWER_IS_BETTER = frozenset(
    {"bce", "brier", "cer", "cross_entropy", "ece", "eer", "error", "fdr", "fpr", "kl", "log_loss", "logloss", "loss"}
    | {"mae", "mape", "mse", "nll", "perplexity", "rmse", "rtf", "ser", "wer"}
)
# of the intervals that a row has of its own metrics
OWN_LEVEL = 0.95
VALIDATION_SPLITS = ("valid", "validation", "val", "dev")
# Two models count as of one size up to this ratio: a bias vector more is no other size.
SIZE_TOLERANCE = 1.05

TEACHER, ASSISTANT, STUDENT, SAME_SIZE, LARGER = "teacher", "assistant", "student", "same_size", "larger"
GROUP_TITLES = {
    TEACHER: "Teacher",
    ASSISTANT: "Assistant",
    STUDENT: "Student, with the teacher",
    SAME_SIZE: "Baselines of the student's size or smaller",
    LARGER: "Baselines larger than the student",
}


@dataclass(frozen=True)
class Entry:
    """One model in one role: ``metrics[name][seed]`` on one split, ``params`` and the rest as means over seeds.

    ``intervals[metric][unit]`` are the bounds of the model's own 95 % interval over a resampled unit, means over seeds;
    None where it has none. ``memory`` is in bytes. ``notes`` explain a metric or another field of a row by its name.
    """

    role: str
    model: str
    label: str
    params: float
    bytes: float
    metrics: Mapping[str, Mapping[Any, float]]
    latency_p50: float | None
    latency_p99: float | None
    train_seconds: float | None
    memory: float | None = None
    intervals: Mapping[str, Mapping[str, tuple[float, float] | None]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the entry in a report."""
        return self.role, self.label

    def seeds(self, metric: str) -> list[Any]:
        """Return the seeds with a value of ``metric``, sorted."""
        return sorted(self.metrics.get(metric, {}), key=lambda seed: (str(type(seed)), seed))

    def values(self, metric: str) -> np.ndarray:
        """Return the values of ``metric`` in the order of ``seeds``."""
        return np.array([self.metrics[metric][seed] for seed in self.seeds(metric)], dtype=np.float64)

    def mean(self, metric: str) -> float | None:
        """Return the mean over seeds, None without a value."""
        return float(self.values(metric).mean()) if self.metrics.get(metric) else None

    def sd(self, metric: str) -> float | None:
        """Return the standard deviation between seeds (ddof 1), None with fewer than two."""
        return float(self.values(metric).std(ddof=1)) if len(self.metrics.get(metric, {})) > 1 else None


@dataclass(frozen=True)
class Difference:
    """``a`` minus ``b`` on one metric; ``better`` and ``worse`` only where the interval leaves zero out."""

    metric: str
    a: str
    b: str
    estimate: Estimate
    higher_is_better: bool

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval and zero lies outside it."""
        low, high = self.estimate.low, self.estimate.high
        return low is not None and high is not None and (low > 0 or high < 0)

    @property
    def gain(self) -> float:
        """The difference with the sign turned so that more is better."""
        return self.estimate.value if self.higher_is_better else -self.estimate.value

    @property
    def quotable(self) -> bool:
        """Whether the interval covers the luck of training: it exists and stands on two seeds or more."""
        return self.estimate.low is not None and self.estimate.n_seeds > 1


@dataclass(frozen=True)
class Comparison:
    """All models of a run on one metric and one split, and what the student is held against."""

    metric: str
    split: str
    higher_is_better: bool
    level: float
    entries: tuple[Entry, ...]
    groups: Mapping[tuple[str, str], str]
    student: Entry | None
    selected_on: str | None
    alone: Entry | None
    reference: Entry | None
    teacher: Entry | None
    differences: Mapping[tuple[str, str], Difference]
    gap: Estimate | None

    @property
    def units(self) -> list[str]:
        """What the models' own intervals of the reported metric are over; empty where the run has none."""
        return list(dict.fromkeys(unit for entry in self.entries for unit in entry.intervals.get(self.metric, {})))

    @property
    def has_memory(self) -> bool:
        """Whether the memory of a model was measured."""
        return any(entry.memory is not None for entry in self.entries)

    @property
    def metric_names(self) -> list[str]:
        """All metrics of the split, the reported one first."""
        names = dict.fromkeys([self.metric, *(name for entry in self.entries for name in entry.metrics)])
        return list(names)


def compare(
    rows: Sequence[Mapping[str, Any]],
    *,
    metric: str | None = None,
    split: str | None = None,
    higher_is_better: bool | Mapping[str, bool] | None = None,
    comparisons: Sequence[Mapping[str, Any]] | None = None,
    level: float = 0.95,
) -> Comparison | None:
    """Return the comparison of all models in ``rows`` (the contract of ``metrics.json``), None if there are no rows.

    ``metric``: by default that of the first comparison, else the first of the first row; ``split``: test if there is
    one, else the last named. ``higher_is_better``: for all metrics, or by metric's name; the rest as
    ``metric_direction`` says. ``comparisons``: as in ``comparisons.json``; a pair that is not there is paired by seed.
    Raises: UserError if a row breaks the contract, or the metric or the split is not in the rows.
    """
    check_rows(rows)
    if not rows:
        return None
    chosen_split = _choose_split(rows, split)
    entries = collect(rows, chosen_split)
    chosen = _choose_metric(entries, metric, comparisons)
    entries = [entry for entry in entries if entry.metrics.get(chosen)]
    direction = metric_direction(chosen, higher_is_better)
    student, selected_on = _choose_student(rows, entries, chosen, direction)
    alone = _student_alone(entries, student)
    groups = {entry.key: _group(entry, student, alone) for entry in entries}
    controls = [entry for entry in entries if student and groups[entry.key] == SAME_SIZE]
    reference = _best(controls, chosen, direction)
    teacher = _best([entry for entry in entries if entry.role == TEACHER], chosen, direction)
    given = [
        item
        for item in comparisons or []
        if item["metric"] == chosen and item.get("split", chosen_split) == chosen_split
    ]
    order = list(GROUP_TITLES)
    sign = -1.0 if direction else 1.0
    entries.sort(key=lambda entry: (order.index(groups[entry.key]), sign * (entry.mean(chosen) or 0.0), entry.label))
    return Comparison(
        metric=chosen,
        split=chosen_split,
        higher_is_better=direction,
        level=level,
        entries=tuple(entries),
        groups=groups,
        student=student,
        selected_on=selected_on,
        alone=alone,
        reference=reference,
        teacher=teacher,
        differences=_differences(given, student, entries, chosen, direction, level),
        gap=_gap(given, student, reference, teacher, chosen, direction, level),
    )


def compare_run(
    run: RunFiles,
    *,
    metric: str | None = None,
    split: str | None = None,
    higher_is_better: bool | Mapping[str, bool] | None = None,
    level: float = 0.95,
) -> Comparison | None:
    """Return ``compare`` of a run; what is not given comes from the section ``report`` of its configuration."""
    options = run.options
    return compare(
        run.rows,
        metric=metric or options.get("metric"),
        split=split or options.get("split"),
        higher_is_better=options.get("higher_is_better") if higher_is_better is None else higher_is_better,
        comparisons=run.comparisons,
        level=level,
    )


def collect(rows: Iterable[Mapping[str, Any]], split: str) -> list[Entry]:
    """Return one entry for every model and role on ``split``, in the order of first appearance."""
    kept = [row for row in rows if row["split"] == split]
    several = len({(row.get("domain"), row.get("recipe")) for row in kept}) > 1
    grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in kept:
        label = f"{row.get('recipe')}: {row['model']}" if several else str(row["model"])
        grouped.setdefault((row["role"], label), []).append(row)
    entries = []
    for (role, label), members in grouped.items():
        metrics: dict[str, dict[Any, float]] = {}
        for row in members:
            for name, value in row["metrics"].items():
                number = finite(value)
                if number is not None:
                    metrics.setdefault(str(name), {})[row["seed"]] = number
        latency = [row.get("latency_ms") or {} for row in members]
        entries.append(
            Entry(
                role=role,
                model=str(members[0]["model"]),
                label=label,
                params=_mean(row.get("params") for row in members) or 0.0,
                bytes=_mean(row.get("bytes") for row in members) or 0.0,
                metrics=metrics,
                latency_p50=_mean(item.get("p50") for item in latency),
                latency_p99=_mean(item.get("p99") for item in latency),
                train_seconds=_mean(row.get("train_seconds") for row in members),
                memory=_mean(row.get("peak_memory_bytes") for row in members),
                intervals=_own_intervals(members),
                notes=dict(members[0].get("notes") or {}),
            )
        )
    return entries


def _own_intervals(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float] | None]]:
    """Return the means of the rows' bounds by metric and unit; None where a row has no interval."""
    bounds: dict[str, dict[str, list[tuple[float | None, float | None]]]] = {}
    for row in rows:
        for metric, by_unit in (row.get("intervals") or {}).items():
            for unit, (low, high) in by_unit.items():
                bounds.setdefault(metric, {}).setdefault(unit, []).append((finite(low), finite(high)))
    found: dict[str, dict[str, tuple[float, float] | None]] = {}
    for metric, by_unit in bounds.items():
        for unit, each in by_unit.items():
            known = [(low, high) for low, high in each if low is not None and high is not None]
            means = (sum(low for low, _ in known) / len(each), sum(high for _, high in known) / len(each))
            found.setdefault(metric, {})[unit] = means if len(known) == len(each) else None
    return found


def metric_direction(metric: str, higher_is_better: bool | Mapping[str, bool] | None = None) -> bool:
    """Return whether more of ``metric`` is better: as given, else unless its name is one of ``LOWER_IS_BETTER``."""
    if isinstance(higher_is_better, bool):
        return higher_is_better
    if higher_is_better and metric in higher_is_better:
        return bool(higher_is_better[metric])
    return metric.split("@")[0].strip().lower().replace("-", "_") not in LOWER_IS_BETTER


def paired(a: Entry, b: Entry, metric: str, level: float) -> Estimate:
    """Return ``a`` minus ``b`` paired by seed; no interval where the seeds allow none, and ``method`` says why.

    A teacher or a baseline that was run once stands for itself: the interval is then over the seeds of the other.
    """
    seeds_a, seeds_b = a.seeds(metric), b.seeds(metric)
    common = [seed for seed in seeds_a if seed in set(seeds_b)]
    value = float(a.values(metric).mean() - b.values(metric).mean())
    n_seeds = min(len(seeds_a), len(seeds_b))
    if len(seeds_b) == 1 and len(seeds_a) > 1 and b.role in ("teacher", "baseline"):
        estimate = paired_difference(a.values(metric), np.full(len(seeds_a), b.values(metric)[0]), level=level)
        method = f"{b.label} was run once; Student t over {len(seeds_a)} seeds of {a.label}"
        return Estimate(value, estimate.low, estimate.high, level, len(seeds_a), 0, method)
    if n_seeds == 1:
        return Estimate(value, None, None, level, 1, 0, "one seed: no interval")
    if len(common) < 2:
        return Estimate(value, None, None, level, len(common), 0, "fewer than two seeds in common: no interval")
    first = [a.metrics[metric][seed] for seed in common]
    second = [b.metrics[metric][seed] for seed in common]
    return paired_difference(first, second, level=level)


def given_estimate(item: Mapping[str, Any], level: float) -> Estimate:
    """Return an entry of ``comparisons.json`` as an estimate; half an interval is none."""
    low, high = finite(item.get("low")), finite(item.get("high"))
    if low is None or high is None:
        low = high = None
    return Estimate(
        float(item["difference"]),
        low,
        high,
        finite(item.get("level")) or level,
        int(finite(item.get("n_seeds")) or 1),
        int(finite(item.get("n_units")) or 0),
        str(item.get("method") or "method not recorded"),
    )


def _differences(
    given: Sequence[Mapping[str, Any]],
    student: Entry | None,
    entries: Sequence[Entry],
    metric: str,
    direction: bool,
    level: float,
) -> dict[tuple[str, str], Difference]:
    """Return the student minus each other entry, as the run recorded it, else paired by seed."""
    if student is None:
        return {}
    differences = {}
    for other in entries:
        if other is not student:
            estimate = _given_difference(given, student, other, level) or paired(student, other, metric, level)
            differences[other.key] = Difference(metric, student.label, other.label, estimate, direction)
    return differences


def _given_difference(
    given: Sequence[Mapping[str, Any]], student: Entry, other: Entry, level: float
) -> Estimate | None:
    for item in given:
        if _is(item["a"], student) and _is(item["b"], other):
            return given_estimate(item, level)
        if _is(item["a"], other) and _is(item["b"], student):
            return given_estimate(item, level).negated()
    return None


def _is(side: Mapping[str, Any], entry: Entry) -> bool:
    return side["role"] == entry.role and side["model"] in (entry.model, entry.label)


def _gap(
    given: Sequence[Mapping[str, Any]],
    student: Entry | None,
    reference: Entry | None,
    teacher: Entry | None,
    metric: str,
    direction: bool,
    level: float,
) -> Estimate | None:
    """Return the share of the gap that is closed: as measured from units if the run has it, else from seeds."""
    if student is None or reference is None or teacher is None:
        return None
    for item in given:
        share = item.get("gap_closed")
        if isinstance(share, Mapping) and _is(item["a"], student) and _is(item["b"], reference):
            value = finite(share.get("value"))
            if value is not None:
                return given_estimate({**item, **share, "difference": value}, level)
    several = [entry for entry in (student, reference, teacher) if len(entry.seeds(metric)) > 1]
    common = set.intersection(*(set(entry.seeds(metric)) for entry in several)) if several else set()
    means = []
    for entry in (student, reference, teacher):
        values = entry.values(metric)
        if len(common) > 1 and entry in several:
            values = np.array([entry.metrics[metric][seed] for seed in entry.seeds(metric) if seed in common])
        else:
            values = values.mean(keepdims=True)
        means.append(values[:, None])
    generator = np.random.default_rng(0)  # fixed: the same run gives the same report
    return gap_closed(*means, generator=generator, level=level, higher_is_better=direction)


def _choose_split(rows: Sequence[Mapping[str, Any]], split: str | None) -> str:
    splits = list(dict.fromkeys(str(row["split"]) for row in rows))
    if split is None:
        return "test" if "test" in splits else splits[-1]
    if split not in splits:
        raise UserError(f"split: got {split!r}, the run has {', '.join(splits)}")
    return split


def _choose_metric(
    entries: Sequence[Entry], metric: str | None, comparisons: Sequence[Mapping[str, Any]] | None
) -> str:
    names = list(dict.fromkeys(name for entry in entries for name in entry.metrics))
    if metric is not None and metric not in names:
        raise UserError(f"metric: got {metric!r}, the run has {', '.join(names)}")
    if not names:
        raise UserError("metrics: no row has a finite metric")
    proposed = [metric, *(str(item["metric"]) for item in comparisons or []), names[0]]
    return next(name for name in proposed if name in names)


def _choose_student(
    rows: Sequence[Mapping[str, Any]], entries: Sequence[Entry], metric: str, direction: bool
) -> tuple[Entry | None, str | None]:
    """Return the student of the verdict and, where there were several, the split it was selected on."""
    students = [entry for entry in entries if entry.role == "student"]
    if len(students) < 2:
        return (students[0] if students else None), None
    for split in VALIDATION_SPLITS:
        measured = {entry.key: entry for entry in collect(rows, split) if entry.metrics.get(metric)}
        if all(entry.key in measured for entry in students):
            best = _best([measured[entry.key] for entry in students], metric, direction)
            return next(entry for entry in students if best and entry.key == best.key), split
    return _best(students, metric, direction), "the reported split itself"


def _student_alone(entries: Sequence[Entry], student: Entry | None) -> Entry | None:
    """Return the control: the student's architecture without a teacher, by name, else by number of parameters."""
    if student is None:
        return None
    alone = [entry for entry in entries if entry.role == "student_alone"]
    by_name = [entry for entry in alone if entry.label == student.label]
    by_size = [entry for entry in alone if entry.params == student.params]
    return next(iter(by_name or by_size), None)


def _group(entry: Entry, student: Entry | None, alone: Entry | None) -> str:
    if entry.role in (TEACHER, ASSISTANT, STUDENT):
        return entry.role
    if student is None or entry is alone:
        return SAME_SIZE
    # A model without counted parameters (neighbours, popularity) is judged by what it weighs on disk.
    mine, other = (entry.params, student.params) if entry.params > 0 else (entry.bytes, student.bytes)
    return SAME_SIZE if mine <= SIZE_TOLERANCE * other else LARGER


def _best(entries: Sequence[Entry], metric: str, direction: bool) -> Entry | None:
    sign = 1.0 if direction else -1.0
    return max(entries, key=lambda entry: sign * (entry.mean(metric) or 0.0), default=None)


def _mean(values: Iterable[Any]) -> float | None:
    numbers = [number for number in map(finite, values) if number is not None]
    return sum(numbers) / len(numbers) if numbers else None
