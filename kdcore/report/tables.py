"""The tables of the HTML report. Everything that comes from data goes through ``esc``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdcore.report.analysis import (
    GROUP_TITLES,
    OWN_LEVEL,
    Comparison,
    Difference,
    Entry,
    given_estimate,
    metric_direction,
)
from kdcore.report.svg import esc
from kdcore.report.text import (
    DASH,
    MINUS,
    ROLE_NAMES,
    bounds,
    count,
    decimals_for,
    duration,
    interval,
    level_name,
    mean_sd,
    metric_name,
    milliseconds,
    signed,
    size,
)

MAX_ROWS = 400


def html_table(caption: str, head: Sequence[str], body: str, *, text_last: bool = False) -> str:
    """Return a table that scrolls sideways on a narrow screen and can be reached by the keyboard.

    Columns hold numbers, set to the right; with ``text_last`` the last one holds text.
    """
    cells = f'<th scope="col" class="name">{esc(head[0])}</th>'
    cells += "".join(f'<th scope="col">{esc(text)}</th>' for text in head[1 : len(head) - text_last])
    cells += f'<th scope="col" class="left">{esc(head[-1])}</th>' if text_last else ""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{esc(caption)}"><table>'
        f"<caption><span>{esc(caption)}</span></caption><thead><tr>{cells}</tr></thead>{body}</table></div>"
    )


def main_table(comparison: Comparison) -> str:
    """Return the comparison table: the models in their groups, the student's difference to each."""
    name = metric_name(comparison.metric)
    head = ["Model", f"{name}, mean\u00a0±\u00a0sd"]
    if comparison.student:
        head.append(f"Student {MINUS} this, {level_name(comparison.level)} interval")
    latency = any(entry.latency_p50 is not None for entry in comparison.entries)
    head += ["Seeds", "Parameters", "On disk", *["Memory, peak"] * comparison.has_memory]
    head += [*["Latency p50 / p99, ms"] * latency, "Training"]
    decimals = decimals_for(entry.mean(comparison.metric) for entry in comparison.entries)
    bodies = []
    for group, title in GROUP_TITLES.items():
        members = [entry for entry in comparison.entries if comparison.groups[entry.key] == group]
        if members:
            rows = "".join(_main_row(entry, comparison, decimals, latency) for entry in members)
            over = f'<tr><th scope="rowgroup" colspan="{len(head)}"><span>{esc(title)}</span></th></tr>'
            bodies.append(f"<tbody>{over}{rows}</tbody>")
    better = "higher" if comparison.higher_is_better else "lower"
    caption = f"{name} on the {comparison.split} split; {better} is better. sd: between seeds."
    if comparison.units:
        caption += f" Below it the model's own {level_name(OWN_LEVEL)} interval; of several seeds, the mean bounds."
    return html_table(caption, head, "".join(bodies))


def notes(comparison: Comparison) -> list[str]:
    """Return what the rows say of their figures, a line each, with the models of which it holds if not of all."""
    found: dict[str, dict[str, list[str]]] = {}
    for entry in comparison.entries:
        for name, text in entry.notes.items():
            who = ROLE_NAMES.get(entry.role, entry.role)
            found.setdefault(name, {}).setdefault(text, []).append(f"{who} {entry.label}")
    lines = []
    for name, texts in found.items():
        several = len(texts) > 1
        parts = [f"{text} ({', '.join(who)})" if several else text for text, who in texts.items()]
        lines.append(f"{metric_name(name)}: {'; '.join(parts)}.")
    return lines


def metrics_table(comparison: Comparison) -> str:
    """Return mean and standard deviation of every metric of the split."""
    names = comparison.metric_names
    decimals = {name: decimals_for(entry.mean(name) for entry in comparison.entries) for name in names}
    rows = []
    for entry in comparison.entries:
        cells = "".join(
            value_cell(entry.mean(name), entry.sd(name), decimals[name], entry.intervals.get(name, {}))
            for name in names
        )
        rows.append(f'<tr><th scope="row">{_name(entry)}</th>{cells}</tr>')
    head = ["Model", *map(metric_name, names)]
    caption = f"All metrics on the {comparison.split} split, mean ± standard deviation between seeds."
    return html_table(caption, head, f"<tbody>{''.join(rows)}</tbody>")


def comparisons_table(
    comparisons: Sequence[Mapping[str, Any]], higher_is_better: bool | Mapping[str, bool] | None, level: float
) -> str:
    """Return the pairs of ``comparisons.json`` with how each interval was made."""
    rows = []
    for item in comparisons[:MAX_ROWS]:
        metric, estimate = str(item["metric"]), given_estimate(item, level)
        first, second = (
            f"{ROLE_NAMES.get(item[side]['role'], item[side]['role'])} {item[side]['model']}" for side in ("a", "b")
        )
        difference = Difference(metric, first, second, estimate, metric_direction(metric, higher_is_better))
        decimals = decimals_for([estimate.value, estimate.low, estimate.high])
        units = f"{estimate.n_units:,}" if estimate.n_units else DASH
        rows.append(
            f'<tr><th scope="row">{esc(first)} {MINUS} {esc(second)}</th><td>{esc(metric_name(metric))}</td>'
            f"{difference_cell(difference, decimals, first)}<td>{estimate.n_seeds}</td><td>{units}</td>"
            f'<td class="left">{esc(estimate.method)}</td></tr>'
        )
    head = ["Pair", "Metric", "Difference, interval", "Seeds", "Units", "Method"]
    return html_table(
        "Paired differences recorded by the run.", head, f"<tbody>{''.join(rows)}</tbody>", text_last=True
    )


def mapping_table(caption: str, values: Mapping[str, Any]) -> str:
    """Return nested values as two columns, keys joined by dots."""
    rows = "".join(
        f'<tr><th scope="row">{esc(key)}</th><td class="left">{esc(value)}</td></tr>'
        for key, value in list(_flat(values))[:MAX_ROWS]
    )
    return html_table(caption, ["What", "Value"], f"<tbody>{rows}</tbody>", text_last=True)


def difference_cell(difference: Difference | None, decimals: int, winner: str = "student") -> str:
    """Return the cell of one difference: the number, the interval and a word, so that colour is never all."""
    if difference is None:
        return f"<td>{DASH}</td>"
    estimate = difference.estimate
    css, word = "", "interval includes zero"
    if estimate.low is None:
        word = "do not quote"
    elif not difference.quotable:
        word = "one seed: do not quote"
    elif difference.excludes_zero:
        css, word = ("better", f"{winner} better") if difference.gain > 0 else ("worse", f"{winner} worse")
    value, between = esc(signed(estimate.value, decimals)), esc(interval(estimate, decimals))
    return (
        f'<td title="{esc(estimate.method)}">{value} <span class="interval">{between}</span>'
        f'<small class="{css}">{esc(word)}</small></td>'
    )


def _main_row(entry: Entry, comparison: Comparison, decimals: int, latency: bool) -> str:
    metric = comparison.metric
    cells = [value_cell(entry.mean(metric), entry.sd(metric), decimals, entry.intervals.get(metric, {}))]
    if comparison.student:
        cells.append(difference_cell(comparison.differences.get(entry.key), decimals))
    cells += [
        f"<td>{len(entry.seeds(metric))}</td>",
        f"<td>{esc(count(entry.params))}</td>",
        f"<td>{esc(size(entry.bytes))}</td>",
    ]
    if comparison.has_memory:
        cells.append(f"<td>{esc(size(entry.memory))}</td>")
    if latency:
        cells.append(f"<td>{esc(milliseconds(entry.latency_p50))} / {esc(milliseconds(entry.latency_p99))}</td>")
    cells.append(f"<td>{esc(duration(entry.train_seconds))}</td>")
    css = ' class="main"' if entry is comparison.student else ""
    return f'<tr{css}><th scope="row">{_name(entry)}</th>{"".join(cells)}</tr>'


def _name(entry: Entry) -> str:
    return f"{esc(entry.label)} (alone)" if entry.role == "student_alone" else esc(entry.label)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        else:
            yield f"{prefix}{key}", DASH if value is None else value


def value_cell(
    mean: float | None,
    sd: float | None,
    decimals: int,
    intervals: Mapping[str, tuple[float, float] | None] | None = None,
) -> str:
    """Return a cell with mean ± sd, a dash where there is none; below it the intervals by what they are over."""
    below = "".join(
        f"<small>by {esc(unit)} {esc(bounds(each, decimals))}</small>" for unit, each in (intervals or {}).items()
    )
    return f"<td>{esc(mean_sd(mean, sd, decimals))}{below}</td>"
