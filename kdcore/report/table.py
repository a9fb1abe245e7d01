"""The comparison table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from kdcore.report.analysis import (
    GROUP_TITLES,
    LARGER,
    OWN_LEVEL,
    SAME_SIZE,
    STUDENT,
    Comparison,
    Difference,
    Entry,
    compare,
    compare_run,
)
from kdcore.report.files import RunFiles
from kdcore.report.text import (
    bounds,
    count,
    decimals_for,
    interval,
    level_name,
    mean_sd,
    metric_name,
    milliseconds,
    signed,
    size,
)
from kdcore.report.verdict import verdict

# Headings short enough for the first column of a terminal.
SHORT_TITLES = GROUP_TITLES | {
    STUDENT: "Student, taught",
    SAME_SIZE: "Baselines, same size",
    LARGER: "Baselines, larger",
}


def comparison_table(
    rows: Sequence[Mapping[str, Any]],
    *,
    metric: str | None = None,
    split: str | None = None,
    higher_is_better: bool | Mapping[str, bool] | None = None,
    comparisons: Sequence[Mapping[str, Any]] | None = None,
    level: float = 0.95,
) -> Table:
    """Return the table of all models in ``rows`` for a terminal of 100 columns; its caption is the verdict.

    Arguments and errors as in ``kdcore.report.analysis.compare``. Names are shown as they are: square brackets in
    them are not markup.
    """
    return _table(
        compare(
            rows, metric=metric, split=split, higher_is_better=higher_is_better, comparisons=comparisons, level=level
        )
    )


def run_table(run: RunFiles, **options: Any) -> Table:
    """Return the table of a run that was read: the comparison of its HTML report, ``options`` as ``compare_run``."""
    return _table(compare_run(run, **options))


def _table(comparison: Comparison | None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), caption=Text(verdict(comparison)), caption_justify="left")
    if comparison is None:
        table.add_column("Model", min_width=60)
        return table
    arrow = "higher is better" if comparison.higher_is_better else "lower is better"
    table.title = Text(f"{metric_name(comparison.metric)} on {comparison.split} ({arrow})")
    table.add_column("Model", max_width=26, overflow="fold")
    own = "".join(f"\n{level_name(OWN_LEVEL)} by {unit}" for unit in comparison.units)
    titles = ["Params", "Seeds", f"{metric_name(comparison.metric)}\nmean ± sd{own}"]
    if comparison.student is not None:
        titles += ["Student\n− this", f"{level_name(comparison.level)} interval"]
    titles += ["Memory"] * comparison.has_memory
    latency = any(entry.latency_p50 is not None for entry in comparison.entries)
    titles += ["p50\nms"] * latency
    for title in titles:
        table.add_column(Text(title), justify="right", overflow="fold")
    decimals = decimals_for(entry.mean(comparison.metric) for entry in comparison.entries)
    for position, (group, title) in enumerate(SHORT_TITLES.items()):
        members = [entry for entry in comparison.entries if comparison.groups[entry.key] == group]
        if not members:
            continue
        if position and table.row_count:
            table.add_section()
        table.add_row(Text(title, style="bold"))
        for entry in members:
            table.add_row(*_cells(entry, comparison, decimals, latency))
    return table


def _cells(entry: Entry, comparison: Comparison, decimals: int, latency: bool) -> list[Text]:
    metric = comparison.metric
    name = entry.label + (" (alone)" if entry.role == "student_alone" else "")
    known = entry.intervals.get(metric, {})
    own = [bounds(known[unit], decimals) if unit in known else "" for unit in comparison.units]
    cells = [
        Text(name, style="bold" if entry is comparison.student else ""),
        Text(count(entry.params)),
        Text(str(len(entry.seeds(metric)))),
        Text("\n".join([mean_sd(entry.mean(metric), entry.sd(metric), decimals), *own])),
    ]
    if comparison.student is not None:
        cells += _difference(comparison.differences.get(entry.key), decimals)
    if comparison.has_memory:
        cells.append(Text(size(entry.memory)))
    if latency:
        cells.append(Text(milliseconds(entry.latency_p50)))
    return cells


def _difference(difference: Difference | None, decimals: int) -> list[Text]:
    if difference is None:
        return [Text(""), Text("")]
    estimate = difference.estimate
    style = ""
    if difference.quotable and difference.excludes_zero:
        style = "green" if difference.gain > 0 else "red"
    return [Text(signed(estimate.value, decimals), style=style), Text(interval(estimate, decimals), style=style)]
