"""The data sets that can be prepared, by name: the one list that ``kd data list`` shows and ``prepare`` looks in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_scripts import amazon_reviews, lastfm, movielens, simulate_interactions
from data_scripts.entry import Entry
from data_scripts.names import nearest
from kdcore.config import UserError


def _registry(*groups: tuple[Entry, ...]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for group in groups:
        for entry in group:
            if entry.name in entries:
                raise ValueError(f"two data sets are named {entry.name!r}")
            entries[entry.name] = entry
    return entries


CATALOGUE: Mapping[str, Entry] = _registry(
    simulate_interactions.ENTRIES, movielens.ENTRIES, amazon_reviews.ENTRIES, lastfm.ENTRIES
)


def names() -> tuple[str, ...]:
    """Return the names in the catalogue, the embedded default first."""
    return tuple(CATALOGUE)


def describe() -> list[dict[str, Any]]:
    """Return name, what, size, licence, citation, url and simulated of every data set."""
    fields = ("name", "what", "size", "licence", "citation", "url", "simulated")
    return [{field: getattr(entry, field) for field in fields} for entry in CATALOGUE.values()]


def print_list(*, as_json: bool = False) -> int:
    """Print the catalogue as a table, or as JSON for a program; return the exit code 0."""
    rows = describe()
    if as_json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return 0
    table = Table(box=None, show_header=False, padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True, style="bold")
    for row in rows:
        table.add_row(row["name"], f"{row['what']}\n{row['size']}\n{row['licence']}")
    Console().print(table)
    return 0


def find(name: str) -> tuple[Entry, dict[str, Any]]:
    """Return the entry of a name and the options the name carries (``amazon-2014-5core:Beauty`` has a category).

    Raises:
        UserError: there is no such name; the message has the nearest ones.
    """
    family, colon, category = name.partition(":")
    if family not in CATALOGUE:
        raise UserError(f"no data set is named {name!r}{nearest(family, CATALOGUE)}")
    return CATALOGUE[family], {"category": category} if colon else {}


def folder_name(name: str) -> str:
    """Return a name for the folder of a prepared data set: ``amazon-2014-5core:Beauty`` -> amazon-2014-5core-beauty."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def prepare(name: str, out: Path, *, source: Path | None = None, options: Mapping[str, Any] | None = None) -> Path:
    """Write the prepared folder ``out`` of a data set and return it; a complete one of the same source is kept.

    Options:
        source: a local copy instead of the network: the publisher's file, or a folder with it or with its content.
        options: of the data set: ``category`` and ``metadata`` for Amazon, the parameters of the simulation.

    Raises:
        UserError: the name or an option is unknown, the source cannot be had or read, or ``out`` holds other files.
    """
    entry, carried = find(name)
    if source is not None:
        source = Path(source).expanduser()
        if not source.exists():
            raise UserError(f"{source}: no such file or folder (given with --from)")
    return entry.prepare(Path(out), source, {**carried, **(options or {})})
