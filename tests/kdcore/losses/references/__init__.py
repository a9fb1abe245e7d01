"""A slow and obvious reference of every registered loss, in one module a family.

A reference gets the inputs of one row as (nested lists of) plain numbers, in the order of the loss's arguments, and
the options; it returns the loss of that row. That of a loss whose rows depend on each other (``batchwise``) gets the
inputs of all rows and returns the losses of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

REFERENCES: dict[str, Callable[..., Any]] = {}
for _file in sorted(Path(__file__).parent.glob("*.py")):
    if _file.stem not in ("__init__", "common"):
        REFERENCES.update(import_module(f"{__name__}.{_file.stem}").REFERENCES)
