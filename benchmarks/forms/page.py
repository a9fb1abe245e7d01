"""docs/knowledge_forms.md from the study's JSON: no figure on it is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {"digits": "digits (8 x 8)", "mnist": "MNIST t10k (14 x 14)"}


def page(result: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    parts = result["data"]
    seeds, of_ways, strengths = (
        len(result["seeds"]),
        len(result["seeds_of_ways"]),
        ", ".join(f"{each:g}" for each in result["strengths"]),
    )
    command = " ".join(result["provenance"]["command"])
    lines = [
        "# Which knowledge is best, and where?",
        "",
        f"Generated from `benchmarks/results/knowledge_forms.json`; `{command}` makes both.",
        "",
        f"One small pair of networks, {seeds} seeds ({of_ways} for ways of teaching): a split and first weights each.",
        "A student has the same first weights, batches and updates with and without a teacher, and learns to its end:",
        "its learning rate falls as a cosine to 0. Without a teacher it got the best of three learning rates by",
        "validation, and what is taught uses that rate; a form's strength is the best of",
        f"{strengths} times the size of the cross-entropy, by validation on two seeds; test rows chose nothing.",
        "Intervals are 95 %, paired by seed; **helps** and **harms** mean that the interval leaves out zero. Among so",
        "many comparisons one in forty seems to help by chance.",
        "",
        *_answers(parts),
        "## Losses",
        "",
        "Accuracy in % on test images; losses of sequences read strips of three digits (strips without an error).",
        "",
        *_table(parts, "losses", _loss_cells, ["loss", "family"]),
        "",
        *_ways(parts),
        *_teachers(parts),
    ]
    return "\n".join(lines).rstrip() + "\n"


def verdict(difference: Mapping[str, Any]) -> str:
    """Return what an interval says: helps, harms, or nothing shown."""
    if difference["low"] is None or difference["low"] <= 0 <= difference["high"]:
        return "-"
    return "helps" if difference["low"] > 0 else "harms"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _answers(parts: Mapping[str, Any]) -> list[str]:
    """Return the study's answer in words: who helps everywhere, who nowhere, and the best of each family."""
    lines = ["## In short", ""]
    tables = {data: {row["name"]: row for row in part["losses"]} for data, part in parts.items()}
    common = set.intersection(*(set(table) for table in tables.values()))
    says = {name: {verdict(table[name]["difference"]) for table in tables.values()} for name in common}
    order = [row["name"] for row in next(iter(parts.values()))["losses"] if row["name"] in common]
    where = "on both data sets" if len(parts) > 1 else "here"
    for word, title in (("helps", "Help"), ("-", "Show nothing"), ("harms", "Harm")):
        names = [f"`{name}`" for name in order if says[name] == {word}]
        lines.append(f"* {title} {where}: {', '.join(names) or 'none'}.")
    families = list(dict.fromkeys(row["family"] for row in next(iter(parts.values()))["losses"]))
    for data, table in tables.items():
        best = []
        for family in families:
            rows = [row for row in table.values() if row["family"] == family]
            top = max(rows, key=lambda row: row["difference"]["value"])
            best.append(f"{family} `{top['name']}` ({top['difference']['value'] * 100:+.1f})")
        lines.append(f"* Best of each family on {NAMES[data]}, points over the student alone: {', '.join(best)}.")
    return [*lines, ""]


def _difference(row: Mapping[str, Any]) -> list[str]:
    change = row["difference"]
    says = verdict(change)
    interval = "" if change["low"] is None else f" [{change['low'] * 100:+.1f}, {change['high'] * 100:+.1f}]"
    return [
        f"{_mean(row['alone']) * 100:.1f}",
        f"{_mean(row['student']) * 100:.1f}",
        f"{change['value'] * 100:+.1f}{interval}",
        f"**{says}**" if says != "-" else says,
    ]


def _loss_cells(row: Mapping[str, Any]) -> list[str]:
    return [f"`{row['name']}`" + (f" ({row['note']})" if row["note"] else ""), row["family"]]


def _way_cells(row: Mapping[str, Any]) -> list[str]:
    return [f"`{row['name']}`", row["metric"], row["control"]]


def _table(parts: Mapping[str, Any], what: str, cells: Any, head: list[str]) -> list[str]:
    titles = [*head]
    for data in parts:
        titles += [f"{data} alone", "taught", "difference", ""]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    tables = {data: {row["name"]: row for row in part[what]} for data, part in parts.items()}
    for row in next(part[what] for part in parts.values() if part[what]):
        line = cells(row)
        for table in tables.values():
            line += _difference(table[row["name"]]) if row["name"] in table else ["", "", "", ""]
        lines.append("| " + " | ".join(line) + " |")
    return lines


def _ways(parts: Mapping[str, Any]) -> list[str]:
    if not any(part["ways"] for part in parts.values()):
        return ["Ways of teaching: not measured yet.", ""]
    table = _table(parts, "ways", _way_cells, ["way", "metric", "control"])
    return ["## Ways of teaching", "", "Each beside its own control, by its own metric, in %.", "", *table, ""]


def _teachers(parts: Mapping[str, Any]) -> list[str]:
    lines = ["## Teachers", ""]
    for data, part in parts.items():
        by_task = {row["task"]: row for row in part["losses"]}
        for task, row in by_task.items():
            rates = part["learning_rates"]["strips alone" if task == "strips" else "alone"]
            lines.append(
                f"* {NAMES[data]}, {task}: teacher {_mean(row['teacher']) * 100:.1f} %, student alone "
                f"{_mean(row['alone']) * 100:.1f} % at learning rate {rates:g}."
            )
    return lines
