"""A server to put under load: the service or an empty handler in a process of its own, what it uses, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdcore.config import UserError

_ROOT = Path(__file__).resolve().parents[2]
_EMPTY_BODY = json.dumps({"items": [0] * 78}).encode()  # 247 bytes


async def empty(scope: Any, receive: Any, send: Any) -> None:
    """Answer a constant: the ASGI application that measures the machine and uvicorn."""
    if scope["type"] != "http":
        return
    await receive()
    length = (b"content-length", b"%d" % len(_EMPTY_BODY))
    headers = [(b"content-type", b"application/json"), length]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _EMPTY_BODY})


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


class Server:
    """A server in its own process group, on its own core; leaves with the ``with`` block."""

    def __init__(self, words: Sequence[str], folder: Path, cores: Sequence[int] | None, *, bare: bool = False) -> None:
        """Start ``kd recsys serve`` with these words (``bare``: the empty handler) and wait until it is ready."""
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "server.log"
        command = [sys.executable, "-m", "apps.cli", "recsys", "serve", "--port", "0", *words]
        if bare:
            options = ["--port", "0", "--loop", "uvloop", "--http", "httptools", "--no-access-log"]
            command = [sys.executable, "-m", "uvicorn", "apps.recsys.load_server:empty", *options]
        started = time.perf_counter()
        with open(self._log, "wb") as log, pinned(cores):
            self.process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log, start_new_session=True)
        try:
            self.port = self._port()
            while self.ask("/readyz" if not bare else "/")[0] != 200:
                time.sleep(0.01)
        except BaseException:
            self.kill()
            raise
        self.ready_seconds = time.perf_counter() - started

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

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Return status and answer of one request; status 0 where nobody listens yet."""
        data = None if body is None else json.dumps(body).encode()
        head = {"content-type": "application/json", **(headers or {})}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, head)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")
        except (urllib.error.URLError, ConnectionError):
            return 0, None

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

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
        self._log.unlink(missing_ok=True)
