"""Several worker processes as one service: a reload reaches them all, and says when it has.

They share a folder. ``target.json`` has the number of the last reload; ``worker-PID.json`` what each worker answers
with, under a lock that the system frees when the worker dies.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from kdcore.run import read_json, write_json

_POLL_SECONDS = 0.05


class Crew:
    """This worker's place among the others."""

    def __init__(self, folder: Path) -> None:
        """Join; the place is given up when the process ends."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._mine = folder, folder / f"worker-{os.getpid()}.json"
        self._target = folder / "target.json"
        self._lock = os.open(folder / f"worker-{os.getpid()}.lock", os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._stamp = 0

    def target(self) -> int:
        """Return the number of the last reload, 0 before the first."""
        try:
            return int(read_json(self._target)["reload"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def changed(self) -> bool:
        """Return whether another reload was asked for since this was last asked; costs one look at the file's time."""
        try:
            stamp = self._target.stat().st_mtime_ns
        except OSError:
            return False
        changed, self._stamp = stamp != self._stamp, stamp
        return changed

    def call(self) -> int:
        """Ask all workers to reload; return the number of this reload."""
        with open(self._folder / ".call", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            number = self.target() + 1
            write_json(self._target, {"reload": number})
        return number

    def report(self, reload: int, version: str, error: str | None = None) -> None:
        """Say what this worker answers with."""
        write_json(self._mine, {"reload": reload, "model_version": version, "error": error})

    def others(self) -> list[dict[str, Any]]:
        """Return what the living workers said, this one's own word among them; files of dead ones are removed."""
        said = []
        for lock in self._folder.glob("worker-*.lock"):
            file = lock.with_suffix(".json")
            if file != self._mine and not _held(lock):
                for left in (lock, file):
                    left.unlink(missing_ok=True)
                continue
            with suppress(OSError, ValueError):
                said.append(read_json(file))
        return said

    async def follow(self, reload: int, seconds: float) -> list[dict[str, Any]]:
        """Return what all workers said once each has answered a reload; TimeoutError if one does not in time."""
        async with asyncio.timeout(seconds):
            while True:
                said = self.others()
                if all(each["reload"] >= reload for each in said):
                    return said
                await asyncio.sleep(_POLL_SECONDS)

    def leave(self) -> None:
        """Give up the place."""
        self._mine.unlink(missing_ok=True)
        (self._folder / f"worker-{os.getpid()}.lock").unlink(missing_ok=True)
        os.close(self._lock)


def _held(lock: Path) -> bool:
    """Return whether a process holds a lock file."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
