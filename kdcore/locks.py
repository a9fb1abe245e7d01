"""What several commands would make at the same time, one of them makes: the others wait, and find it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# what a copy of a folder leaves behind
LOCKS = shutil.ignore_patterns(".*.lock")


@contextmanager
def locked(file: str | os.PathLike[str], waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file, which stays; ``waiting`` is called if another process has it, until which ends or dies.

    Threads of one process keep each other out too, each by a file description of its own.
    """
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def beside(path: Path) -> Path:
    """Return the lock file of what is made at a path: a hidden one beside it."""
    return path.with_name(f".{path.name}.lock")
