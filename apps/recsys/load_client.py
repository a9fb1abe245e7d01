"""An HTTP/1.1 client for load: keep-alive connections, requests made beforehand, latencies in a histogram.

It runs in a process of its own (:func:`drive`), so that it can have a core of its own. In a closed loop every
connection sends its next request when the last is answered. In an open loop requests fall due by a schedule, whatever
the server does, and a latency counts from the moment a request was due: a server that stalls is not spared the requests
it held up (what Gil Tene named coordinated omission).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from kdcore.child_processes import environment, pinned

_EXACT = 7  # bits of a latency that a bucket keeps: 1 part in 128
_RECONNECT_SECONDS = 0.05


class Histogram:
    """Counts of microseconds in buckets of less than 1 % of their value; its memory does not grow with what it saw."""

    def __init__(self) -> None:
        self.counts = array("Q", bytes(8 * (34 - _EXACT) << _EXACT))  # up to 2.3 hours
        self.total, self.largest = 0, 0

    def add(self, micros: int) -> None:
        """Count one value."""
        shift = max(micros.bit_length() - _EXACT - 1, 0)
        self.counts[(shift << _EXACT) + (micros >> shift)] += 1
        self.total += micros
        if micros > self.largest:
            self.largest = micros

    def quantile(self, share: float) -> float:
        """Return the microseconds that this share of the values does not exceed: the middle of their bucket."""
        wanted, seen = share * sum(self.counts), 0
        for place, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                shift = max((place >> _EXACT) - 1, 0)
                return min((place - (shift << _EXACT) << shift) + ((1 << shift) - 1) / 2, self.largest)
        return 0.0

    def milliseconds(self) -> dict[str, float]:
        """Return the figures of a report."""
        shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
        figures = {name: round(self.quantile(share) / 1e3, 3) for name, share in shares.items()}
        mean = self.total / max(sum(self.counts), 1)
        return {**figures, "max": round(self.largest / 1e3, 3), "mean": round(mean / 1e3, 3)}


@dataclass(frozen=True)
class Load:
    """What is sent, and how.

    Stops after ``requests`` or ``seconds``, whichever is given (both: what comes first). ``rate`` (requests a second)
    makes it an open loop, at even distances or with ``arrivals`` at random ones ("poisson"). Of every answer the
    status is read, of one in ``sample`` the JSON: it must hold ``wanted`` distinct items (None: it is not looked at).
    """

    port: int
    bodies: Sequence[str]
    path: str = "/v1/recommend"
    method: str = "POST"
    host: str = "127.0.0.1"
    headers: dict[str, str] = field(default_factory=dict)
    connections: int = 32
    requests: int | None = None
    seconds: float | None = None
    rate: float | None = None
    arrivals: str = "even"
    wanted: int | None = None
    sample: int = 64
    # without any answer for so long, what waits is given up
    patience: float = 30.0

    def wire(self) -> list[bytes]:
        """Return the requests as they are sent."""
        head = f"{self.method} {self.path} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        if self.method != "POST":
            return [f"{head}\r\n".encode()]
        head += "content-type: application/json\r\ncontent-length: "
        return [f"{head}{len(body)}\r\n\r\n".encode() + body for body in map(str.encode, self.bodies)]


class _Connection(asyncio.Protocol):
    """One connection with at most one request under way: ``due`` is when that was to be sent, None if there is none."""

    __slots__ = ("due", "left", "run", "sent", "transport")

    def __init__(self, run: Runner) -> None:
        self.run, self.left, self.due, self.sent = run, b"", 0.0, b""
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.run.connected(self)

    def send(self, request: bytes, due: float) -> None:
        self.sent, self.due = request, due
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self.left:
            data = self.left + data
        end = data.find(b"\r\n\r\n")
        if end < 0 or len(data) < end + 4 + _length(data, end):
            self.left = data
            return
        self.left = b""
        self.run.answered(self, data, end)

    def connection_lost(self, exc: Exception | None) -> None:
        self.run.lost(self)


def _length(data: bytes, end: int) -> int:
    place = data.find(b"content-length:", 0, end)
    if place < 0:
        place = data.lower().find(b"content-length:", 0, end)
        if place < 0:
            return 0
    return int(data[place + 15 : data.find(b"\r\n", place)])


class Runner:
    """Sends a load and counts what comes back."""

    def __init__(
        self,
        load: Load,
        *,
        source: Callable[[], bytes] | None = None,
        told: Callable[[bytes, int, bytes], None] | None = None,
        signals: bool = False,
    ) -> None:
        """Take a load; ``source`` gives the next request instead of its bodies, ``told`` gets request, status, body.

        ``signals``: SIGTERM ends the load, with a report.
        """
        self._load, self._told, self._signals = load, told, signals
        self._next = source or itertools.cycle(load.wire()).__next__
        self._latencies, self._late = Histogram(), Histogram()
        self._idle: deque[_Connection] = deque()
        self._live: set[_Connection] = set()
        self._statuses: Counter[int] = Counter()
        self._bad: Counter[str] = Counter()
        self._versions: Counter[str] = Counter()
        self._broken = self._refused = self._given = self._done = self._checked = self._bytes = 0
        self._closing = False

    async def run(self) -> dict[str, Any]:
        """Send it all, and return the report."""
        load, loop = self._load, asyncio.get_running_loop()
        self._end = loop.create_future()
        self._most = load.requests if load.requests is not None else sys.maxsize
        self._heard = self._begin = time.perf_counter()
        self._deadline = self._begin + load.seconds if load.seconds is not None else float("inf")
        if load.rate is not None and load.seconds is not None:
            self._most = min(self._most, int(load.rate * load.seconds))
        self._started = False
        await asyncio.gather(*(self._connect() for _ in range(load.connections)))
        self._heard = self._begin = time.perf_counter()
        self._deadline = self._begin + load.seconds if load.seconds is not None else float("inf")
        cpu = time.process_time()
        self._started = True
        if self._signals:
            loop.add_signal_handler(signal.SIGTERM, self._enough)
        watch = asyncio.create_task(self._watch())
        if load.rate is None:
            for connection in list(self._idle):
                self._offer(connection)
        else:
            self._schedule = self._arrivals(load.rate)
            self._due = next(self._schedule)
            self._tick()
        unanswered = await self._end
        seconds, cpu = time.perf_counter() - self._begin, time.process_time() - cpu
        self._closing = True
        watch.cancel()
        for connection in list(self._live):
            connection.transport.abort()
        return self._report(seconds, cpu, unanswered)

    # -- what connections tell ---------------------------------------------------------------------------------------

    def connected(self, connection: _Connection) -> None:
        """A connection is there."""
        self._live.add(connection)
        self._idle.append(connection)
        if self._started and self._load.rate is None:
            self._offer(connection)

    def answered(self, connection: _Connection, data: bytes, end: int) -> None:
        """An answer is whole: its head ends at ``end``."""
        now = self._heard = time.perf_counter()
        self._latencies.add(int((now - connection.due) * 1e6))
        self._done += 1
        self._bytes += len(data)
        connection.due = 0.0
        self._idle.append(connection)
        if data[9:12] != b"200":
            self._statuses[int(data[9:12])] += 1
        elif self._done % self._load.sample == 0:
            self._check(data[end + 4 :])
        if self._told is not None:
            self._told(connection.sent, int(data[9:12]), data[end + 4 :])
        if self._load.rate is None:
            self._offer(connection)
        elif self._due <= now and self._given < self._most:  # somebody waits for a connection
            self._send_due(now)
        elif self._done >= self._most:
            self._finish()

    def lost(self, connection: _Connection) -> None:
        """A connection is gone; another takes its place."""
        self._live.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)
        if self._closing:
            return
        if connection.due:  # a request was under way
            self._broken += 1
            self._done += 1
        asyncio.get_running_loop().call_later(_RECONNECT_SECONDS, self._reconnect)
        self._stop_if_done()

    # -- sending -----------------------------------------------------------------------------------------------------

    def _offer(self, connection: _Connection) -> None:
        """Let an idle connection of a closed loop send its next request, unless that was all."""
        now = time.perf_counter()
        if self._given >= self._most or now >= self._deadline:
            self._most = min(self._most, self._given)
            self._stop_if_done()
            return
        self._idle.remove(connection) if self._idle[-1] is not connection else self._idle.pop()
        self._given += 1
        connection.send(self._next(), now)

    def _arrivals(self, rate: float) -> Any:
        if self._load.arrivals == "poisson":
            generator, at = random.Random(0), self._begin
            while True:
                at += generator.expovariate(rate)
                yield at
        yield from (self._begin + number / rate for number in itertools.count())

    def _tick(self) -> None:
        """Send what is due, and look again at once: timers of an event loop are a millisecond coarse."""
        if self._closing or self._end.done():
            return
        now = time.perf_counter()
        if self._due <= now and self._idle and self._given < self._most:
            self._late.add(int((now - self._due) * 1e6))
            self._send_due(now)
        loop = asyncio.get_running_loop()
        if self._given >= self._most:
            self._stop_if_done()
        elif self._due - now > 0.005:
            loop.call_later(self._due - now - 0.003, self._tick)
        else:
            loop.call_soon(self._tick)

    def _send_due(self, now: float) -> None:
        while self._idle and self._due <= now and self._given < self._most:
            self._given += 1
            self._idle.popleft().send(self._next(), self._due)
            self._due = next(self._schedule)

    # -- connections -------------------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: _Connection(self), self._load.host, self._load.port)
        except OSError:
            if not self._closing:
                self._refused += 1
                loop.call_later(_RECONNECT_SECONDS, self._reconnect)

    def _reconnect(self) -> None:
        if not self._closing:
            self._task = asyncio.get_running_loop().create_task(self._connect())

    # -- the end -----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Give up where nothing is heard any more, and end a closed loop whose time is over."""
        while True:
            await asyncio.sleep(0.1)
            now = time.perf_counter()
            if now >= self._deadline and self._load.rate is None:
                self._most = min(self._most, self._given)
            self._stop_if_done()
            if now - max(self._heard, self._begin) > self._load.patience:
                self._finish()

    def _enough(self) -> None:
        """Send nothing more."""
        self._most = self._given
        self._stop_if_done()

    def _stop_if_done(self) -> None:
        if self._started and self._given >= self._most and self._done >= self._most:
            self._finish()

    def _finish(self) -> None:
        if not self._end.done():
            wanted = self._given if self._load.rate is None else self._most
            self._end.set_result(wanted - self._done)

    # -- the report --------------------------------------------------------------------------------------------------

    def _check(self, body: bytes) -> None:
        self._checked += 1
        wanted = self._load.wanted
        try:
            answer = json.loads(body)
            self._versions[answer.get("model_version", "")] += 1
            if wanted is None:
                return
            for each in answer.get("results", [answer]):
                ids = [item["item_id"] for item in each["items"]]
                if len(ids) != wanted or len(set(ids)) != wanted:
                    self._bad[f"{len(set(ids))} distinct items of {len(ids)}"] += 1
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._bad[f"not the JSON wanted: {type(error).__name__}"] += 1

    def _report(self, seconds: float, cpu: float, unanswered: int) -> dict[str, Any]:
        load, done = self._load, self._done - self._broken
        errors: dict[str, Any] = {
            "connection": self._broken + self._refused,
            "unanswered": unanswered,
            "status": {str(status): count for status, count in sorted(self._statuses.items())},
            "bad_answers": dict(self._bad),
        }
        report = {
            "client": f"apps.recsys.load_client ({type(asyncio.get_running_loop()).__module__.partition('.')[0]})",
            "loop": "closed" if load.rate is None else f"open, {load.arrivals} arrivals",
            "connections": load.connections,
            "requests": done,
            "seconds": round(seconds, 3),
            "requests_per_second": round(done / seconds, 1),
            "latency_ms": self._latencies.milliseconds(),
            "failed": errors["connection"] + unanswered + self._statuses.total() + self._bad.total(),
            "errors": errors,
            "checked": self._checked,
            "model_versions": dict(self._versions),
            "bytes_per_answer": round(self._bytes / max(done, 1)),
            "client_cpu_us_per_request": round(1e6 * cpu / max(done, 1), 2),
        }
        if load.rate is not None:
            # how late the client itself was while a connection was free: no fault of the server
            report |= {"rate": load.rate, "sent_late_ms": self._late.milliseconds()}
        return report


def run(load: Load, **options: Any) -> dict[str, Any]:
    """Send a load from this process and return the report; ``options`` are those of :class:`Runner`."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(Runner(load, **options).run())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Runner(load, **options).run())


class Driver:
    """A load that another process sends, on the cores given (None: any), while this one does something else."""

    def __init__(self, load: Load, cores: Sequence[int] | None = None) -> None:
        """Start it."""
        with pinned(cores), tempfile.TemporaryFile("w+") as plan:
            json.dump(asdict(load), plan)
            plan.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "apps.recsys.load_client"],
                stdin=plan,
                stdout=subprocess.PIPE,
                env=environment(),
            )

    def result(self) -> dict[str, Any]:
        """Wait for its end and return the report; RuntimeError if there is none."""
        text = self._process.communicate()[0]
        if self._process.returncode:
            raise RuntimeError(f"the load client ended with code {self._process.returncode}")
        report: dict[str, Any] = json.loads(text)
        return report

    def finish(self) -> dict[str, Any]:
        """Let it send nothing more, and return the report."""
        self._process.terminate()
        return self.result()

    def stop(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()


def drive(load: Load, cores: Sequence[int] | None = None) -> dict[str, Any]:
    """Send a load from another process and return the report."""
    driver = Driver(load, cores)
    try:
        return driver.result()
    except BaseException:
        driver.stop()
        raise


def _main() -> None:
    print(json.dumps(run(Load(**json.load(sys.stdin)), signals=True)))


if __name__ == "__main__":
    _main()
