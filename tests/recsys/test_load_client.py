"""The load client against a small server whose answers, errors and stalls are known."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from apps.recsys import load_client
from apps.recsys.load_client import Histogram, Load

GOOD = json.dumps({"items": [{"item_id": item} for item in range(3)], "model_version": "v1"}).encode()


class Known:
    """A server that answers what ``behave`` says of the number of a request: (status, body), or a word."""

    def __init__(self, behave: Callable[[int], object]) -> None:
        self.behave, self.requests, self.port = behave, [], 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0])
                number = len(self.requests)
                self.requests.append(head + await reader.readexactly(length))
                said = self.behave(number)
                if said == "close":
                    break
                if isinstance(said, float):
                    await asyncio.sleep(said)
                    said = (200, GOOD)
                status, body = said
                answer = b"HTTP/1.1 %d Word\r\nContent-Length: %d\r\nx: y\r\n\r\n" % (status, len(body)) + body
                # in two parts, as a network may
                writer.write(answer[:50])
                await writer.drain()
                await asyncio.sleep(0)
                writer.write(answer[50:])
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()


@contextmanager
def known(behave: Callable[[int], object]) -> Iterator[Known]:
    server, ready, ending = Known(behave), threading.Event(), []

    async def live() -> None:
        over = asyncio.Event()
        ending.append((asyncio.get_running_loop(), over))
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        ready.set()
        await over.wait()
        listening.close()

    thread = threading.Thread(target=lambda: asyncio.run(live()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop, over = ending[0]
        loop.call_soon_threadsafe(over.set)
        thread.join()


def good(number: int) -> object:
    return 200, GOOD


def test_histogram_quantiles_are_within_a_percent() -> None:
    generator, histogram = random.Random(0), Histogram()
    values = sorted(int(generator.lognormvariate(7, 2)) for _ in range(20_000))
    size = len(histogram.counts)
    for value in values:
        histogram.add(value)
    for share in (0.01, 0.5, 0.95, 0.99, 0.999):
        assert histogram.quantile(share) == pytest.approx(values[round(share * len(values)) - 1], rel=0.01)
    assert histogram.quantile(1.0) == pytest.approx(values[-1], rel=0.01)
    histogram.add(3_600_000_000)
    assert histogram.largest == 3_600_000_000 and len(histogram.counts) == size


def test_small_values_are_exact() -> None:
    histogram = Histogram()
    for value in range(256):
        histogram.add(value)
    assert [histogram.quantile((value + 1) / 256) for value in range(256)] == list(range(256))


def test_closed_loop_sends_all_bodies_and_counts_every_answer() -> None:
    with known(good) as server:
        report = load_client.run(Load(server.port, ["{}", '{"a":1}'], connections=4, requests=501, sample=10, wanted=3))
    assert report["requests"] == len(server.requests) == 501
    assert report["failed"] == 0 and report["checked"] == 50 and report["model_versions"] == {"v1": 50}
    bodies = [request.rpartition(b"\r\n\r\n")[2] for request in server.requests]
    assert {bodies.count(b"{}"), bodies.count(b'{"a":1}')} == {251, 250}
    assert report["requests_per_second"] > 0 and 0 < report["latency_ms"]["p50"] <= report["latency_ms"]["max"]


def test_closed_loop_ends_when_its_time_is_over() -> None:
    with known(good) as server:
        report = load_client.run(Load(server.port, ["{}"], connections=3, seconds=0.4))
    assert 0.3 < report["seconds"] < 5 and report["requests"] == len(server.requests) > 3
    assert report["failed"] == 0


def test_errors_are_counted_by_what_they_are() -> None:
    other = json.dumps({"items": [{"item_id": 1}, {"item_id": 1}, {"item_id": 2}]}).encode()

    def behave(number: int) -> object:
        return {3: (500, b"{}"), 5: (429, b"{}"), 7: (500, b""), 11: "close", 13: (200, other), 17: (200, b"<p>")}.get(
            number, (200, GOOD)
        )

    with known(behave) as server:
        report = load_client.run(Load(server.port, ["{}"], connections=1, requests=40, sample=1, wanted=3))
    assert report["errors"] == {
        "connection": 1,
        "unanswered": 0,
        "status": {"429": 1, "500": 2},
        "bad_answers": {"2 distinct items of 3": 1, "not the JSON wanted: JSONDecodeError": 1},
    }
    assert report["failed"] == 6
    assert report["requests"] == 39 and len(server.requests) == 40


def test_batches_are_checked_result_by_result() -> None:
    answer = json.dumps({"results": [{"items": [{"item_id": 1}]}, {"error": {}}]}).encode()
    with known(lambda number: (200, answer)) as server:
        report = load_client.run(Load(server.port, ["[]"], connections=1, requests=2, sample=1, wanted=1))
    assert report["errors"]["bad_answers"] == {"not the JSON wanted: KeyError": 2}


def test_a_server_that_is_not_there_is_an_error() -> None:
    with known(good) as server:
        port = server.port
    report = load_client.run(Load(port, ["{}"], connections=2, requests=10, patience=0.5))
    assert report["requests"] == 0 and report["failed"] > 2


@pytest.mark.parametrize("arrivals", ["even", "poisson"])
def test_open_loop_keeps_its_schedule(arrivals: str) -> None:
    with known(good) as server:
        load = Load(server.port, ["{}"], connections=8, rate=400, seconds=1.0, arrivals=arrivals)
        report = load_client.run(load)
    assert report["requests"] == len(server.requests) == 400 and report["failed"] == 0
    assert report["seconds"] > 0.7 and "sent_late_ms" in report


def test_a_stall_shows_in_open_loop_latencies() -> None:
    """One answer that takes 0.5 s holds up the requests that fall due meanwhile, and each of them counts."""

    def behave(number: int) -> object:
        return 0.5 if number == 20 else (200, GOOD)

    with known(behave) as server:
        closed = load_client.run(Load(server.port, ["{}"], connections=1, requests=200))
    with known(behave) as server:
        opened = load_client.run(Load(server.port, ["{}"], connections=1, rate=200, seconds=1.0))
    assert closed["latency_ms"]["max"] > 490 and closed["latency_ms"]["p95"] < 250
    # about 100 of 200 were due during the stall, at latencies from 0.5 s down
    assert opened["requests"] == 200 and opened["latency_ms"]["max"] > 490 and opened["latency_ms"]["p95"] > 350


def test_unanswered_requests_are_given_up_and_counted() -> None:
    with known(lambda number: 60.0 if number >= 10 else (200, GOOD)) as server:
        report = load_client.run(Load(server.port, ["{}"], connections=2, requests=50, patience=0.5))
    assert report["requests"] == 10 and report["errors"]["unanswered"] == 2 and report["seconds"] < 10


def test_a_source_makes_requests_and_answers_are_told() -> None:
    told = []
    wire = Load(0, ['{"n":1}']).wire()
    assert len(wire) == 1 and wire[0].endswith(b'content-length: 7\r\n\r\n{"n":1}')
    with known(lambda number: (201, b"x") if number == 1 else (200, GOOD)) as server:
        load = Load(server.port, [], connections=1, requests=3)
        load_client.run(load, source=lambda: wire[0], told=lambda *each: told.append(each))
    assert told == [(wire[0], 200, GOOD), (wire[0], 201, b"x"), (wire[0], 200, GOOD)]


def test_another_process_drives_and_can_be_ended() -> None:
    with known(good) as server:
        report = load_client.drive(Load(server.port, ["{}"], connections=2, requests=100, wanted=3, sample=1))
        assert report["requests"] == 100 and report["checked"] == 100 and report["failed"] == 0
        driver = load_client.Driver(Load(server.port, ["{}"], connections=2))
        try:
            while len(server.requests) < 200:
                pass
            report = driver.finish()
        finally:
            driver.stop()
    assert report["failed"] == 0 and report["requests"] == len(server.requests) - 100
