"""The folder of data; and folders that appear whole or not at all: an export takes the place of an earlier one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kdcore.config import UserError
from kdcore.run import flush

# whether a folder is one that the caller wrote, so that it may give way
Ours = Callable[[Path], bool]


def data_folder() -> Path:
    """Return the folder that has corpora by domain and name: ``KD_DATA``, where that is not set ``../shared/data``."""
    return Path(os.environ.get("KD_DATA") or "../shared/data")


def check_target(out: Path, ours: Ours) -> None:
    """Raise UserError unless ``out`` is absent, empty, or an earlier export."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file, wanted a folder to write to")
    if out.is_dir() and any(out.iterdir()) and not ours(out):
        raise UserError(f"--out: {out} holds files that no export wrote; name another folder or empty it")


def refuse_unwritable(out: Path) -> None:
    """Raise UserError if a folder cannot be made or written to, as far as that can be told without doing it."""
    there = out.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UserError(f"--out: {out} cannot be a folder: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"--out: {out} cannot be written to: {there} does not allow it")


@contextmanager
def replacing(out: Path, ours: Ours) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` at the end, on disk; an export there gives way only then.

    Raises:
        UserError: as ``check_target``, at the end: writing may have taken minutes.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, aside = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        check_target(out, ours)
        # a rename onto a folder that is not empty fails, so the earlier export steps aside
        if out.exists():
            os.replace(out, aside)
        try:
            os.replace(temporary, out)
        except OSError:
            if aside.exists():
                os.replace(aside, out)
            raise
        flush(out.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
