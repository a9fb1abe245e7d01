"""What several commands would make at the same time, one of them makes: the others wait, and find it."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# what a copy of a folder leaves behind
LOCKS = shutil.ignore_patterns(".*.lock")


@contextmanager
def locked(file: str | os.PathLike[str], waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock file, which stays; ``waiting`` is called if another process has it, until which ends or dies.

    Threads of one process keep each other out too, each by a file description of its own. Where the block fails,
    folders that were made for the lock and hold nothing else are removed with it.
    """
    path = Path(file)
    missing = [each for each in path.parents if not each.exists()]
    handle = _opened(path, waiting)
    try:
        yield
    except BaseException:
        if missing:
            _remove(path, missing)
        raise
    finally:
        os.close(handle)


def _opened(path: Path, waiting: Callable[[], None]) -> int:
    """Return the lock file, open and held."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        except FileNotFoundError:  # another process removed the folder just now
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        # who held it may have removed it, and what is held then keeps nobody out
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


def _remove(path: Path, made: Iterable[Path]) -> None:
    """Remove a lock file and the folders that were made for it, as far as they hold nothing else."""
    with suppress(OSError):
        if [each.name for each in path.parent.iterdir()] == [path.name]:
            path.unlink()
            for folder in made:
                folder.rmdir()


def beside(path: Path) -> Path:
    """Return the lock file of what is made at a path: a hidden one beside it."""
    return path.with_name(f".{path.name}.lock")
