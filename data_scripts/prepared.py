"""The folder a prepared data set lies in: written beside its place, renamed when complete, kept when up to date.

``dataset.json`` is written last, so a folder that has it is complete; its ``source_fingerprint`` says what it was
made from, and a folder made from the same is not made again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcore.config import UserError
from kdcore.run import fingerprint, read_json, write_json

DESCRIPTION = "dataset.json"


def description(folder: Path) -> dict[str, Any] | None:
    """Return what ``dataset.json`` says of a prepared folder, None if there is no readable one."""
    try:
        found = read_json(Path(folder) / DESCRIPTION)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_prepared(out: Path, record: Mapping[str, Any]) -> bool:
    """Return whether ``out`` is complete and was made from ``record``."""
    found = description(out)
    return found is not None and found.get("source_fingerprint") == fingerprint(record)


@contextmanager
def preparing(out: Path, record: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield a temporary folder to fill and a dictionary of details; on success the folder becomes ``out``.

    ``dataset.json`` is then what the body wrote there, ``record`` and the details. On an error nothing stays; what a
    killed process left is removed by the next one.

    Raises:
        UserError: ``out`` is a file, or a folder with content that is not a prepared data set.
    """
    out = Path(out).absolute()
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file, wanted a folder to write to")
    if out.is_dir() and any(out.iterdir()) and "source_fingerprint" not in (description(out) or {}):
        raise UserError(f"{out}: holds files that no earlier preparation wrote; name another folder or empty it")
    out.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(out)
    folder = out.with_name(f".{out.name}.{os.getpid()}.partial")
    folder.mkdir()
    details: dict[str, Any] = {}
    try:
        yield folder, details
        merged = {**(description(folder) or {}), **record, **details, "source_fingerprint": fingerprint(record)}
        for path in folder.rglob("*"):
            if path.is_file():
                _flush(path)  # before dataset.json calls the folder complete
        write_json(folder / DESCRIPTION, merged)
        _replace_folder(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    with open(path, "rb+") as handle:
        os.fsync(handle.fileno())


def _replace_folder(folder: Path, out: Path) -> None:
    """Rename ``folder`` to ``out``; a folder that stands there is moved aside first, since rename wants it empty."""
    aside = out.with_name(f".{out.name}.{os.getpid()}.replaced")
    if out.exists():
        os.replace(out, aside)
    try:
        os.replace(folder, out)
    except OSError:
        if aside.exists():
            os.replace(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    """Remove what killed runs left beside ``out``; a folder moved aside comes back if nothing took its place."""
    for suffix in ("replaced", "partial"):
        for left in out.parent.glob(f".{out.name}.*.{suffix}"):
            owner = left.name.split(".")[-2]
            if not owner.isdigit() or _alive(int(owner)):
                continue
            if suffix == "replaced" and not out.exists():
                os.replace(left, out)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # an earlier process had our number: this one has not begun
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
