"""Commands of the suite as processes of their own: on which cores, what they use, where they listen, their end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from kdcore.config import UserError

_ROOT = Path(__file__).resolve().parents[1]


def environment() -> dict[str, str]:
    """Return the environment of processes that import these packages."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}


@contextlib.contextmanager
def pinned(cores: Sequence[int] | None) -> Iterator[None]:
    """Start processes on these cores: a child has its parent's from the start."""
    before = os.sched_getaffinity(0)
    try:
        if cores:
            os.sched_setaffinity(0, cores)
        yield
    finally:
        os.sched_setaffinity(0, before)


class ServerProcess:
    """A server in its own process group, on its own cores; leaves with the ``with`` block; ``port`` is its port.

    Options:
        words: the command; it says ``http://127.0.0.1:PORT`` once it listens.
        folder: where its output goes, to ``server.log``, which is gone when the server ends.
        cores: the processor's cores it may use; None for all.

    Raises:
        UserError: it ends instead, or does not listen in a quarter of an hour.
    """

    def __init__(self, words: Sequence[str], folder: Path, cores: Sequence[int] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "server.log"
        started = time.perf_counter()
        with open(self._log, "wb") as log, pinned(cores):
            self.process = subprocess.Popen(words, env=environment(), stdout=log, stderr=log, start_new_session=True)
        try:
            self.port = self._port()
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        self.ready_seconds = time.perf_counter() - started

    def wait_until_ready(self) -> None:
        """Return when it answers; one that says where it listens does."""

    def _port(self, seconds: float = 900.0) -> int:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with open(self._log, "rb") as log:
                said = log.read(1 << 16)
            if found := re.search(rb"http://127\.0\.0\.1:(\d+)", said):
                return int(found[1])
            if self.process.poll() is not None:
                raise UserError(f"the server ended with code {self.process.returncode}: {said[-500:].decode()}")
            time.sleep(0.005)
        raise UserError(f"the server did not say where it listens in {seconds:.0f} s")

    def pids(self) -> list[int]:
        """Return its process and the workers below it."""
        pids = [self.process.pid]
        for pid in pids:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    pids += [int(child) for child in (task / "children").read_text().split()]
        return pids

    def cpu_seconds(self) -> float:
        """Return the processor time all of it has used."""
        ticks = 0
        for pid in self.pids():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> dict[str, int]:
        """Return bytes over all its processes: resident, its share of what is shared (PSS), and what is its own."""
        total = {"rss": 0, "pss": 0, "anonymous": 0}
        for pid in self.pids():
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                name = line.partition(":")[0].lower()
                if name in total:
                    total[name] += 1024 * int(line.split()[1])
        return total

    def kill(self) -> None:
        """End it at once, without a word."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
        self._log.unlink(missing_ok=True)
