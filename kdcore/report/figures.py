"""The figures of the HTML report: differences, quality against size, training curves, slices."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kdcore.report import svg
from kdcore.report.analysis import Comparison, Entry
from kdcore.report.files import finite
from kdcore.report.svg import Line, Mark, Style, esc
from kdcore.report.tables import html_table, value_cell
from kdcore.report.text import ROLE_NAMES, count, decimals_for, interval, mean_sd, metric_name, number, signed, size

# The report stays small however long the log is: points are dropped, evenly, from curves that have more.
MAX_POINTS, MIN_POINTS_OF_A_CURVE, MAX_POINTS_OF_A_CURVE = 24_000, 24, 240
MAX_PANELS, MAX_CURVES_OF_A_PANEL, MAX_SERIES, MAX_CATEGORIES, MAX_AXES = 12, 40, 8, 40, 12

Key = tuple[str, str]
Curves = dict[tuple[str, str, str], dict[float, float]]  # (role, model, seed) -> epoch -> value
Styles = Mapping[Key, Style]


def assign_styles(comparison: Comparison | None, log: Sequence[Mapping[str, Any]], slices: Any) -> dict[Key, Style]:
    """Return the look of every model, the same in all figures: colour by role, dashes and marker within it."""
    keys: list[Key] = [entry.key for entry in comparison.entries] if comparison else []
    keys += [(str(event.get("role")), str(event.get("model"))) for event in log if event.get("event") == "epoch"]
    keys += [(str(item["role"]), str(item["model"])) for item in (slices or {}).get("slices", [])]
    styles: dict[Key, Style] = {}
    for role, label in dict.fromkeys(keys):
        styles[role, label] = Style(role, sum(other == role for other, _ in styles))
    return styles


def display_name(key: Key) -> str:
    """Return ``model (role)``; a baseline's name stands alone."""
    role, label = key
    return label if role == "baseline" else f"{label} ({ROLE_NAMES.get(role, role)})"


def figure(title: str, plot: str, caption: str = "") -> str:
    """Return one framed plot."""
    note = f"<figcaption>{esc(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{esc(title)}</h3>{plot}{note}</figure>"


def legend(keys: Iterable[Key], styles: Styles, line: bool) -> str:
    """Return the legend of the models."""
    items = "".join(f"<li>{svg.swatch(styles[key], line)}<span>{esc(display_name(key))}</span></li>" for key in keys)
    return f'<ul class="legend" aria-label="Legend">{items}</ul>'


def difference_figure(comparison: Comparison, styles: Styles) -> str:
    """Return the student's differences with their intervals, nothing without a student or another model."""
    near, far = near_and_far(comparison)
    entries = [entry for entry in near if entry.key in comparison.differences][:MAX_CATEGORIES]
    if not entries or comparison.student is None:
        return ""
    name = metric_name(comparison.metric)
    decimals = decimals_for(entry.mean(comparison.metric) for entry in comparison.entries)
    marks = []
    for entry in entries:
        estimate = comparison.differences[entry.key].estimate
        note = f"{signed(estimate.value, decimals)} {interval(estimate, decimals)}"
        marks.append(
            Mark(display_name(entry.key), styles[entry.key], estimate.value, 0, estimate.low, estimate.high, note)
        )
    better = "right" if comparison.higher_is_better else "left"
    title = f"{name}: {comparison.student.label} minus each model"
    spoken = "; ".join(f"{mark.label} {mark.note}" for mark in marks)
    plot = svg.interval_plot(title, spoken, marks, f"difference in {name}; the student is better to the {better}")
    caption = "Whiskers: interval. A point without whiskers has no interval and is not to be quoted."
    return figure(title, plot, caption + _off_scale(far, comparison.metric, decimals))


def size_figure(comparison: Comparison, styles: Styles) -> str:
    """Return quality against size; by bytes on disk where not every model has a number of parameters."""
    metric = comparison.metric
    entries, far = near_and_far(comparison)
    by_bytes = not all(entry.params > 0 for entry in entries) and all(entry.bytes > 0 for entry in entries)
    drawn = [entry for entry in entries if (entry.bytes if by_bytes else entry.params) > 0]
    if not drawn:
        return ""
    decimals = decimals_for(entry.mean(metric) for entry in entries)
    marks = [_size_mark(entry, metric, by_bytes, decimals, styles) for entry in drawn[:MAX_CATEGORIES]]
    unit = "size on disk" if by_bytes else "parameters"
    title = f"{metric_name(metric)} against {unit}"
    better = "up" if comparison.higher_is_better else "down"
    spoken = "; ".join(f"{mark.label}: {mark.note}" for mark in marks)
    numbers = size if by_bytes else count
    plot = svg.scatter_plot(title, spoken, marks, f"{unit}, logarithmic", numbers)
    caption = f"Small and good is {better} and left. Whiskers: standard deviation between seeds."
    absent = [entry.label for entry in entries if entry not in drawn]
    if absent:
        caption += f" Not drawn, for want of a size: {', '.join(absent)}."
    return figure(title, plot, caption + _off_scale(far, metric, decimals))


def near_and_far(comparison: Comparison) -> tuple[list[Entry], list[Entry]]:
    """Return the models to draw and those so far off that they would squeeze the others into one point.

    Far is more than three times the span of teacher, student and controls away from that span.
    """
    metric = comparison.metric
    core = [comparison.teacher, comparison.student, comparison.alone, comparison.reference]
    means = [entry.mean(metric) or 0.0 for entry in core if entry is not None]
    low, high = min(means, default=0.0), max(means, default=0.0)
    reach = 3 * (high - low) or math.inf
    near = [entry for entry in comparison.entries if low - reach <= (entry.mean(metric) or 0.0) <= high + reach]
    return near, [entry for entry in comparison.entries if entry not in near]


def _off_scale(far: Sequence[Entry], metric: str, decimals: int) -> str:
    named = ", ".join(f"{entry.label} ({number(entry.mean(metric), decimals)})" for entry in far)
    return f" Off the scale: {named}." if named else ""


def _size_mark(entry: Entry, metric: str, by_bytes: bool, decimals: int, styles: Styles) -> Mark:
    mean, sd = entry.mean(metric) or 0.0, entry.sd(metric)
    low, high = (None, None) if sd is None else (mean - sd, mean + sd)
    note = f"{mean_sd(mean, sd, decimals)}, {size(entry.bytes) if by_bytes else count(entry.params) + ' parameters'}"
    name = f"{entry.label} (alone)" if entry.role == "student_alone" else entry.label
    return Mark(name, styles[entry.key], entry.bytes if by_bytes else entry.params, mean, low, high, note)


def curves_section(log: Sequence[Mapping[str, Any]], metric: str | None, styles: Styles) -> str:
    """Return training curves by epoch: one panel a validation metric, then one a term of the loss."""
    panels = _panels(log, metric)
    if not panels:
        return ""
    shown = dict(list(panels.items())[:MAX_PANELS])
    n_curves = sum(min(len(curves), MAX_CURVES_OF_A_PANEL) for curves in shown.values())
    budget = min(MAX_POINTS_OF_A_CURVE, max(MIN_POINTS_OF_A_CURVE, MAX_POINTS // max(1, n_curves)))
    figures, keys = [], {}
    for title, curves in shown.items():
        lines = []
        for (role, label, seed), points in list(curves.items())[:MAX_CURVES_OF_A_PANEL]:
            keys[role, label] = True
            name = f"{display_name((role, label))}, seed {seed}"
            lines.append(Line(name, styles[role, label], thin_out(sorted(points.items()), budget)))
        spoken = "; ".join(f"{line.label}: from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
        left_out = len(curves) - len(lines)
        caption = f"{left_out} more curves are not drawn." if left_out else ""
        figures.append(figure(title, svg.line_plot(title, spoken, lines, "epoch"), caption))
    more = len(panels) - len(shown)
    note = f'<p class="note">{more} more panels are not drawn.</p>' if more else ""
    return f'{legend(keys, styles, True)}<div class="grid-of-plots">{"".join(figures)}</div>{note}'


def thin_out(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """Return at most ``most`` of the points, evenly spread, the first and the last always among them."""
    if len(points) <= most:
        return list(points)
    return [points[index] for index in np.linspace(0, len(points) - 1, most).round().astype(int)]


def _panels(log: Sequence[Mapping[str, Any]], metric: str | None) -> dict[str, Curves]:
    """Return the curves of every panel by its title; the reported metric comes first."""
    validation: dict[str, Curves] = {}
    terms: dict[str, Curves] = {}
    for event in log:
        epoch = finite(event.get("epoch"))
        if event.get("event") != "epoch" or epoch is None:
            continue
        curve = (str(event.get("role")), str(event.get("model")), str(event.get("seed")))
        owner = "Teacher's loss" if curve[0] == "teacher" else "Loss"
        for target, values, prefix in ((validation, event.get("validation"), ""), (terms, event.get("terms"), owner)):
            for name, value in values.items() if isinstance(values, Mapping) else ():
                point = finite(value)
                if point is not None:
                    title = f"{prefix}: {name}" if prefix else str(name)
                    target.setdefault(title, {}).setdefault(curve, {})[epoch] = point
    ordered = sorted(validation, key=lambda name: name != metric)
    panels = {f"{metric_name(name)} in validation": validation[name] for name in ordered}
    return panels | {title: terms[title] for title in sorted(terms, key=lambda title: title.startswith("Teacher"))}


def slices_section(slices: Mapping[str, Any] | None, styles: Styles) -> str:
    """Return one panel an axis of ``slices.json``, with the numbers in a table below."""
    if not slices or not slices["slices"]:
        return ""
    axes: dict[str, list[Mapping[str, Any]]] = {}
    for item in slices["slices"]:
        if finite(item["value"]) is not None:
            axes.setdefault(str(item["axis"]), []).append(item)
    metric = str(slices["metric"])
    panels, tables, keys = [], [], {}
    for axis, items in list(axes.items())[:MAX_AXES]:
        plot, table, series = _slice_axis(axis, items, metric, styles)
        panels.append(plot)
        tables.append(table)
        keys.update(dict.fromkeys(series))
    more = len(axes) - len(panels)
    note = f'<p class="note">{more} more axes are not drawn.</p>' if more > 0 else ""
    return (
        f'{legend(keys, styles, False)}<div class="grid-of-plots">{"".join(panels)}</div>{note}'
        f"<details><summary>The numbers behind these plots</summary>{''.join(tables)}</details>"
    )


def _slice_axis(
    axis: str, items: Sequence[Mapping[str, Any]], metric: str, styles: Styles
) -> tuple[str, str, list[Key]]:
    """Return plot, table and models of one axis; slices keep the order of the file."""
    names = list(dict.fromkeys(str(item["slice"]) for item in items))[:MAX_CATEGORIES]
    units = {str(item["slice"]): finite(item.get("n")) for item in reversed(items)}
    groups: dict[Key, dict[str, list[float]]] = {}
    for item in items:
        key = (str(item["role"]), str(item["model"]))
        groups.setdefault(key, {}).setdefault(str(item["slice"]), []).append(float(item["value"]))
    roles = list(ROLE_NAMES)
    series = sorted(groups, key=lambda key: roles.index(key[0]) if key[0] in roles else len(roles))[:MAX_SERIES]
    decimals = decimals_for(value for group in groups.values() for values in group.values() for value in values)
    marks, rows = [], []
    for key in series:
        cells = []
        for position, name in enumerate(names):
            values = groups[key].get(name, [])
            mean = sum(values) / len(values) if values else None
            sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
            cells.append(value_cell(mean, sd, decimals))
            if mean is not None:
                low, high = (None, None) if sd is None else (mean - sd, mean + sd)
                note = mean_sd(mean, sd, decimals)
                marks.append(Mark(display_name(key), styles[key], position, mean, low, high, note))
        rows.append(f'<tr><th scope="row">{esc(display_name(key))}</th>{"".join(cells)}</tr>')
    labels = [(name, "" if units[name] is None else f"n={_compact(units[name])}") for name in names]
    title = f"{metric_name(metric)} by {axis}"
    spoken = "; ".join(f"{mark.label}, {names[int(mark.x)]}: {mark.note}" for mark in marks)
    caption = "Whiskers: standard deviation between seeds."
    left_out = len(groups) - len(series)
    if left_out:
        caption += f" {left_out} more models are not drawn."
    plot = figure(title, svg.category_plot(title, spoken, labels, marks, axis), caption)
    head = ["Model", *(f"{name} ({second})" if second else name for name, second in labels)]
    return plot, html_table(f"{title}, mean ± sd between seeds", head, f"<tbody>{''.join(rows)}</tbody>"), series


def _compact(value: float | None) -> str:
    if value is None or value < 10_000:
        return f"{value:,.0f}" if value is not None else ""
    power = int(math.log10(value) // 3)
    return f"{value / 1000**power:.3g}{('', 'k', 'M', 'G')[min(power, 3)]}"
