"""Whether a corpus is still what it was when a run read it: names, sizes and times of its files, not their content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from apps.speech.data.formats import pattern_files
from kdcore.run import fingerprint


def state(source: Path) -> str | None:
    """Return 16 hex digits that change when a file of a corpus is written, added or removed; None where there is none.

    Of a manifest, that is the file alone: the recordings that it names may be anywhere.
    """
    files = sorted(_files(source))
    return fingerprint({"files": files}) if files else None


def _files(source: Path) -> Iterator[tuple[str, int, int]]:
    """Yield name, bytes and time of the last change, in ns."""
    if source.is_dir():
        waiting, seen = [os.fspath(source)], {os.path.realpath(source)}
        while waiting:
            # a folder that may not be read, or a link that leads to itself, holds nothing that was read
            with suppress(OSError), os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    with suppress(OSError):
                        if entry.is_file():
                            yield _about(entry.path[len(os.fspath(source)) :], entry.stat())
                        # a link may lead back
                        elif entry.is_dir() and (real := os.path.realpath(entry.path)) not in seen:
                            seen.add(real)
                            waiting.append(entry.path)
        return
    for file in [source] if source.is_file() else pattern_files(source):
        yield _about(file.name, file.stat())


def _about(name: str, about: os.stat_result) -> tuple[str, int, int]:
    return os.fsencode(name).decode("utf-8", "replace"), about.st_size, about.st_mtime_ns
