"""Several processes as torchrun starts them: which one this is, and how they wait for each other.

All processes must see the same files. The first one writes them; the others wait and read. Without torchrun there is
one process, nothing here but ``one_command_makes`` does anything, and torch is not even imported.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path

from kdcore.locks import beside, locked

# one process may solve, evaluate or fill a teacher's cache for hours while the others wait for it
_PATIENCE = timedelta(days=7)


def world_size() -> int:
    """Return how many processes torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Return whether this process is the one that writes files and speaks to the user."""
    return int(os.environ.get("RANK", "0")) == 0


def connect() -> None:
    """Join the process group (gloo on CPUs, NCCL on GPUs), once; must be called by all processes."""
    if world_size() == 1:
        return
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backend, timeout=_PATIENCE)
        atexit.register(distributed.destroy_process_group)


def agree(value: bool) -> bool:
    """Return what the first process says; must be called by all processes.

    Whoever looks at a file may look before or after another process wrote it: what all do next is decided once.
    """
    if world_size() == 1:
        return value
    import torch
    from torch import distributed

    connect()
    answer = torch.tensor(int(value))
    distributed.broadcast(answer, src=0)
    return bool(answer)


def total(value: float) -> float:
    """Return the sum of what all processes give; must be called by all of them."""
    if world_size() == 1:
        return value
    import torch
    from torch import distributed

    connect()
    found = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(found)
    return float(found)


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        import torch
        from torch import distributed

        connect()
        distributed.all_reduce(torch.zeros(1))  # on the CPU, whatever device trains


@contextmanager
def first_process_first() -> Iterator[None]:
    """Let the first process run the block alone, then the others, who find what it wrote.

    If it fails in the block, the others are not let in: torchrun ends them.
    """
    if not is_first_process():
        barrier()
    yield
    if is_first_process():
        barrier()


@contextmanager
def one_command_makes(path: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Let the processes of one command at a time run the block, which makes what is at ``path``.

    Another command says that it waits. It may find it made then: that is asked in the block, by ``agree``.
    """
    waiting = f"{path}: another command is making it; waiting"
    with locked(beside(path), lambda: announce(waiting)) if is_first_process() else nullcontext():
        yield


@contextmanager
def first_process_speaks() -> Iterator[None]:
    """Keep what the others print from standing on stdout a second time."""
    if is_first_process():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield
