"""The HTML report: one file, no script, no network; what comes from data is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from kdcore.report import figures, tables
from kdcore.report.analysis import Comparison, compare_run
from kdcore.report.files import RunFiles
from kdcore.report.style import STYLE
from kdcore.report.svg import esc
from kdcore.report.text import (
    DASH,
    decimals_for,
    interval,
    level_name,
    mean_sd,
    metric_name,
    milliseconds,
    percent,
    signed,
)
from kdcore.report.verdict import remarks, verdict

MAX_CONFIG = 200_000
# Nothing may be loaded, from anywhere, and no script may run: a second lock behind the escaping.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_page(
    run: RunFiles,
    *,
    metric: str | None = None,
    split: str | None = None,
    higher_is_better: bool | Mapping[str, bool] | None = None,
    level: float = 0.95,
) -> str:
    """Return the report as HTML; arguments default to the section ``report`` of the run's configuration."""
    direction = higher_is_better if higher_is_better is not None else run.options.get("higher_is_better")
    comparison = compare_run(run, metric=metric, split=split, higher_is_better=higher_is_better, level=level)
    styles = figures.assign_styles(comparison, run.log, run.slices)
    chosen = comparison.metric if comparison else metric
    parts = [
        _verdict(comparison),
        _tiles(comparison) if comparison else "",
        _section("Comparison", _comparison(run, comparison, direction), "No results yet: no metrics.json."),
        _section("Differences, and quality against size", _plots(comparison, styles), "Nothing to draw in this run."),
        _section(
            "Training curves",
            figures.curves_section(run.log, chosen, styles),
            "No training log in this run.",
            "One line a seed.",
        ),
        _section("Slices", figures.slices_section(run.slices, styles), "No slices were measured in this run."),
        _examples(run.examples),
        _section("What was run", _provenance(run), ""),
    ]
    title = f"{run.name}: distillation report"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{esc(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{esc(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{_header(run)}\n<main>\n{chr(10).join(part for part in parts if part)}\n</main>\n{_footer(comparison)}\n"
        "</body>\n</html>\n"
    )


def _examples(examples: Mapping[str, Any] | None) -> str:
    """Return the section of texts worth reading; nothing where the run has none."""
    if examples is None or not examples["blocks"]:
        return ""
    blocks = "".join(
        f"<h3>{esc(str(block['title']))}</h3><pre>{esc(str(block['text']))}</pre>" for block in examples["blocks"]
    )
    return _section(str(examples["title"]), blocks, "")


def _header(run: RunFiles) -> str:
    recipes = dict.fromkeys(str(row["recipe"]) for row in run.rows if row.get("recipe"))
    domains = dict.fromkeys(str(row["domain"]) for row in run.rows if row.get("domain"))
    facts = [", ".join(domains), ("recipe " if recipes else "") + ", ".join(recipes)]
    facts += [str(run.provenance[key]) for key in ("started",) if run.provenance.get(key)]
    if run.provenance.get("commit"):
        facts.append(f"commit {str(run.provenance['commit'])[:12]}")
    banner = ""
    if run.simulated:
        banner = (
            '<p class="banner" role="note"><strong>Simulated data.</strong> Every number here is measured on data '
            "made by a simulator. It says how the methods behave there, not what they would gain in the field.</p>"
        )
    sub = " · ".join(fact for fact in facts if fact)
    return f'<header><h1>{esc(run.name)}</h1><p class="sub">{esc(sub)}</p>{banner}</header>'


def _verdict(comparison: Comparison | None) -> str:
    notes = "".join(f"<li>{esc(text)}</li>" for text in remarks(comparison))
    listed = f"<ul>{notes}</ul>" if notes else ""
    return f'<section class="verdict" aria-label="Verdict"><p>{esc(verdict(comparison))}</p>{listed}</section>'


def _tiles(comparison: Comparison) -> str:
    student, metric = comparison.student, comparison.metric
    if student is None:
        return ""
    decimals = decimals_for(entry.mean(metric) for entry in comparison.entries)
    sd = student.sd(metric)
    seeds = len(student.seeds(metric))
    spread = f"± {mean_sd(sd, None, decimals)} over {seeds} seeds" if sd is not None else "one seed"
    tiles = [(f"{metric_name(metric)}, {comparison.split}", mean_sd(student.mean(metric), None, decimals), spread)]
    if comparison.reference is not None:
        difference = comparison.differences[comparison.reference.key]
        estimate = difference.estimate
        value = signed(estimate.value, decimals) if difference.quotable else DASH
        tiles.append((f"Against {comparison.reference.label}, a baseline", value, interval(estimate, decimals)))
        if comparison.gap is not None and difference.quotable:
            gap = comparison.gap
            known = gap.low is not None and gap.high is not None
            shown = f"{percent(gap.low or 0)} to {percent(gap.high or 0)}" if known else "no interval"
            tiles.append(("Gap to the teacher closed", percent(gap.value), shown))
    if comparison.teacher is not None and student.params > 0 and comparison.teacher.params > student.params:
        ratio = comparison.teacher.params / student.params
        tiles.append(("Smaller than the teacher", f"{ratio:.3g} ×", "by parameters"))
    if student.latency_p50 is not None:
        teacher = comparison.teacher.latency_p50 if comparison.teacher else None
        versus = f"teacher {milliseconds(teacher)} ms" if teacher is not None else "median"
        tiles.append(("Latency, p50", f"{milliseconds(student.latency_p50)} ms", versus))
    body = "".join(
        f'<dl class="tile"><dt>{esc(name)}</dt><dd>{esc(value)}</dd><dd>{esc(note)}</dd></dl>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{body}</div>'


def _section(title: str, body: str, absent: str, note: str = "") -> str:
    if not body:
        return f'<section><h2>{esc(title)}</h2><p class="note">{esc(absent)}</p></section>'
    below = f'<p class="note">{esc(note)}</p>' if note else ""
    return f"<section><h2>{esc(title)}</h2>{below}{body}</section>"


def _comparison(
    run: RunFiles,
    comparison: Comparison | None,
    direction: bool | Mapping[str, bool] | None,
) -> str:
    if comparison is None:
        return ""
    body = tables.main_table(comparison)
    body += "".join(f'<p class="note">{esc(line)}</p>' for line in tables.notes(comparison))

    if len(comparison.metric_names) > 1:
        body += f"<details><summary>All metrics</summary>{tables.metrics_table(comparison)}</details>"
    if run.comparisons:
        table = tables.comparisons_table(run.comparisons, direction, comparison.level)
        body += f"<details><summary>All recorded paired differences ({len(run.comparisons)})</summary>{table}</details>"
    return body


def _plots(comparison: Comparison | None, styles: figures.Styles) -> str:
    if comparison is None:
        return ""
    plots = figures.difference_figure(comparison, styles) + figures.size_figure(comparison, styles)
    keys = [entry.key for entry in comparison.entries]
    return f'{figures.legend(keys, styles, False)}<div class="grid-of-plots">{plots}</div>' if plots else ""


def _provenance(run: RunFiles) -> str:
    parts = []
    command = run.provenance.get("command")
    if command:
        text = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
        parts.append(f'<pre class="wrap" tabindex="0" aria-label="Command">{esc(text)}</pre>')
    else:
        parts.append('<p class="note">The command was not recorded.</p>')
    rest: dict[str, Any] = {key: value for key, value in run.provenance.items() if key != "command"}
    if rest:
        table = tables.mapping_table("Where the numbers come from.", rest)
        parts.append(f"<details><summary>Provenance: versions, commit, machine, data</summary>{table}</details>")
    if run.config_text:
        text = run.config_text[:MAX_CONFIG]
        cut = "" if text == run.config_text else f'<p class="note">Cut at {MAX_CONFIG:,} characters.</p>'
        parts.append(
            "<details><summary>Resolved configuration</summary>"
            f'<pre tabindex="0" aria-label="Resolved configuration">{esc(text)}</pre>{cut}</details>'
        )
    else:
        parts.append('<p class="note">No configuration was recorded.</p>')
    return "".join(parts)


def _footer(comparison: Comparison | None) -> str:
    level = level_name(comparison.level) if comparison else "95 %"
    own = ""
    if comparison and comparison.units:
        own = (
            " A model's own interval says how its value moves with other test units; whether two models differ is "
            "told by their difference, not by whether these intervals overlap."
        )
    return (
        "<footer><h2>How to read this</h2><p>The student is held against the best model of its size that had no "
        "teacher, chosen on the reported split, which favours that model. sd is the standard deviation between seeds: "
        f"the luck of training. A {level} interval of a difference is paired by seed; one made from seeds alone does "
        "not cover the choice of the test set. Where the interval includes zero, neither model is shown to be better. "
        f"The intervals are not corrected for the number of models compared.{own}</p></footer>"
    )
