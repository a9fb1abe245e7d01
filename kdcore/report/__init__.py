"""The report of a run: a comparison table for the terminal and one self-contained HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kdcore.report.analysis import Comparison, Difference, Entry, compare
from kdcore.report.files import RunFiles, read_run
from kdcore.report.page import render_page
from kdcore.report.table import comparison_table, run_table
from kdcore.report.verdict import verdict
from kdcore.run import write_text

__all__ = [
    "Comparison",
    "Difference",
    "Entry",
    "RunFiles",
    "compare",
    "comparison_table",
    "read_run",
    "render_page",
    "run_table",
    "verdict",
    "write_report",
]


def write_report(
    run_path: str | os.PathLike[str],
    *,
    metric: str | None = None,
    split: str | None = None,
    higher_is_better: bool | Mapping[str, bool] | None = None,
    level: float = 0.95,
) -> Path:
    """Write ``report.html`` into the run directory and return its path.

    The file needs no network and no other file; written twice from the same run it is the same, byte for byte.
    ``metric``, ``split`` and ``higher_is_better`` default to the section ``report`` of the run's configuration, then
    to what ``kdcore.report.analysis.compare`` chooses.
    Raises: UserError if there is no such run, or a file in it is damaged.
    """
    run = read_run(run_path)
    page = render_page(run, metric=metric, split=split, higher_is_better=higher_is_better, level=level)
    target = run.path / "report.html"
    write_text(target, page)
    return target
