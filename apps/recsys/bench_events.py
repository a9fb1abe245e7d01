"""Whether the event store keeps what it acknowledged when its process is killed, and how fast it acknowledges."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from apps.recsys.events import Event, EventStore

_TOGETHER = 8  # concurrent callers of the process that is killed


def kill_rounds(folder: Path, kills: int, seed: int, url: str | None = None) -> dict[str, int]:
    """Kill a process that is adding events, at random moments, and look for every event that it acknowledged.

    The process prints an acknowledgement when ``add`` returned; some calls have several events, which must be there
    together or not at all. All rounds use one store: a file in ``folder``, or the one of ``url``.
    Returns kills, acknowledged, stored, and what must be 0: ``lost`` (acknowledged, not stored), ``torn`` (a call of
    which a part is there) and ``repeated`` (stored twice).
    """
    folder.mkdir(parents=True, exist_ok=True)
    url = url or f"sqlite:///{folder / 'events.db'}"
    generator = random.Random(seed)
    acknowledged: list[tuple[str, str]] = []
    for number in range(kills):
        acknowledged += _killed(url, number, generator.uniform(0.0, 0.4))
    store = EventStore(url)
    try:
        users = [f"{number}-{caller}" for number in range(kills) for caller in range(_TOGETHER)]
        items = {user: store.items_of(user, sys.maxsize) for user in users}
        stored = store.count()
    finally:
        store.close()
    there = {user: set(each) for user, each in items.items()}
    torn = 0
    for its in there.values():
        parts: dict[str, int] = defaultdict(int)
        for item in its:
            parts[item.partition(".")[0]] += 1
        torn += sum(found != _size(int(call)) for call, found in parts.items())
    return {
        "kills": kills,
        "acknowledged": len(acknowledged),
        "stored": stored,
        "lost": sum(item not in there[user] for user, item in acknowledged),
        "torn": torn,
        "repeated": sum(len(each) for each in items.values()) - sum(len(each) for each in there.values()),
    }


def _size(call: int) -> int:
    return 1 + call % 3


def _killed(url: str, number: int, seconds: float) -> list[tuple[str, str]]:
    """Run a process that adds events, kill it so long after its first acknowledgement; return what it acknowledged."""
    with _child("add", url, str(number)) as process:
        stdout = process.stdout
        if stdout is None:
            raise RuntimeError("no pipe")
        try:
            lines = [stdout.readline()]
            # the pipe holds what is printed meanwhile; a child that fills it waits, which is as good as any moment
            time.sleep(seconds)
        finally:
            process.kill()
        lines += stdout.readlines()
    if not lines[0]:
        raise RuntimeError(f"the process that adds events ended with code {process.returncode}")
    # a last line without its end was never read by a client
    pairs = [line[:-1].split("\t") for line in lines if line.endswith("\n")]
    return [(user, item) for user, item in pairs]


def _child(*arguments: str) -> subprocess.Popen[str]:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-m", "apps.recsys.bench_events", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


async def _add_forever(url: str, number: str) -> None:
    store = EventStore(url)

    async def caller(which: int) -> None:
        user, call = f"{number}-{which}", 0
        while True:
            events = [Event(user, f"{call}.{part}", time.time()) for part in range(_size(call))]
            await store.add(events)
            # one write to a pipe is whole or not at all
            os.write(1, "".join(f"{each.user_id}\t{each.item_id}\n" for each in events).encode())
            call += 1

    await asyncio.gather(*(caller(which) for which in range(_TOGETHER)))


def throughput(
    folder: Path, connections: int = 16, seconds: float = 5.0, processes: int = 1, url: str | None = None
) -> dict[str, Any]:
    """Measure single-event adds from concurrent callers, each coming back when it is acknowledged, and ``items_of``.

    ``connections`` is per process. Returns adds a second in all, milliseconds of an add, and microseconds of a read
    for a user with no events and for one with 50.
    """
    folder.mkdir(parents=True, exist_ok=True)
    url = url or f"sqlite:///{folder / 'throughput.db'}"
    EventStore(url).close()
    children = [_child("measure", url, str(each), str(connections), str(seconds)) for each in range(processes)]
    answers = [json.loads(child.communicate()[0]) for child in children]
    latencies = sorted(each for answer in answers for each in answer["latencies"])
    store = EventStore(url)
    try:
        reader = f"reader-{store.count()}"
        asyncio.run(_fill(store, reader))
        reads = {
            f"items_of_{n}_us": _microseconds(partial(store.items_of, user))
            for n, user in ((0, "nobody"), (50, reader))
        }
    finally:
        store.close()
    return {
        "connections": connections,
        "processes": processes,
        "adds": len(latencies),
        "adds_per_second": round(sum(len(each["latencies"]) / each["seconds"] for each in answers), 1),
        "add_ms": {f"p{p}": round(1e3 * _quantile(latencies, p / 100), 3) for p in (50, 99)},
        **reads,
        "flush_ms": round(_flush(folder), 3),
    }


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _microseconds(call: Callable[[], Any], repeats: int = 5, times: int = 2_000) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(times):
            call()
        best = min(best, (time.perf_counter() - start) / times)
    return round(1e6 * best, 2)


def _flush(folder: Path, times: int = 50) -> float:
    """Return the mean milliseconds of one flush of 16 KiB to this disk: the floor of every commit."""
    file = folder / "flush"
    handle = os.open(file, os.O_RDWR | os.O_CREAT)
    start = time.perf_counter()
    for number in range(times):
        os.pwrite(handle, bytes(1 << 14), number << 14)
        os.fdatasync(handle)
    passed = time.perf_counter() - start
    os.close(handle)
    file.unlink()
    return 1e3 * passed / times


async def _fill(store: EventStore, user: str) -> None:
    await store.add([Event(user, f"i{each}", 0.0) for each in range(50)])


async def _measure(url: str, number: int, connections: int, seconds: float) -> dict[str, Any]:
    store = EventStore(url)
    latencies: list[float] = []
    start = time.perf_counter()

    async def caller(which: int) -> None:
        generator = random.Random(1000 * number + which)
        while time.perf_counter() - start < seconds:
            event = Event(f"u{generator.randrange(50_000)}", f"i{generator.randrange(20_000)}", time.time(), "click")
            begun = time.perf_counter()
            await store.add([event])
            latencies.append(time.perf_counter() - begun)

    await asyncio.gather(*(caller(which) for which in range(connections)))
    passed = time.perf_counter() - start
    await store.aclose()
    return {"latencies": latencies, "seconds": passed}


def _main(arguments: Sequence[str]) -> None:
    what, url, number, *rest = arguments
    if what == "add":
        asyncio.run(_add_forever(url, number))
    else:
        print(json.dumps(asyncio.run(_measure(url, int(number), int(rest[0]), float(rest[1])))))


if __name__ == "__main__":
    _main(sys.argv[1:])
