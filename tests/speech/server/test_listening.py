from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import aiohttp
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.speech.device.exported import noise, silence, spoken
from tests.speech.server.recordings import ogg_opus, packets, webm
from tests.speech.server.served import WAIT, Served, connected, dictate, heard_as, pcm, running, told, wav

AUDIO = np.concatenate([spoken("yes no"), silence(2), spoken("day")])
SHORT = spoken("no", before=0.1, after=0.1)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with running(folder, max_streams=24) as served:
        yield served


def quiet(served: Served) -> bool:
    """Wait until no stream is left."""
    until = time.monotonic() + WAIT
    while served.service.hub.sessions and time.monotonic() < until:
        time.sleep(0.01)
    return not served.service.hub.sessions


def test_what_is_said_is_what_the_recogniser_hears(served: Served) -> None:
    found = asyncio.run(dictate(served.ws, pcm(AUDIO)))
    assert found.final == served.text(heard_as(AUDIO)) == ["yes no", "day"]
    assert found.code == 1000
    assert found.last == {"type": "end", "heard": round(len(AUDIO) / 16_000, 3)}
    kinds = [message["type"] for message in found.messages]
    assert kinds[-2:] == ["final", "end"]
    # a busy machine may hear all that was sent in one turn, and has nothing partial to say then
    tries = (asyncio.run(dictate(served.ws, pcm(AUDIO))).messages[0] for _ in range(10))
    partial = next(message for message in itertools.chain([found.messages[0]], tries) if message["type"] == "partial")
    assert set(partial) == {"type", "text", "words", "start", "end", "heard"}
    first = next(message for message in found.messages if message["type"] == "final")
    assert [word["word"] for word in first["words"]] == ["yes", "no"]
    assert first["start"] == first["words"][0]["start"] and first["end"] == first["words"][-1]["end"]


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 300 * len(sizes)))
def test_packets_may_have_any_size(served: Served, sizes: list[int]) -> None:
    found = asyncio.run(dictate(served.ws, pcm(SHORT), sizes))
    assert (found.final, found.code) == (["no"], 1000)


@pytest.mark.parametrize(("rate", "channels"), [(48_000, 1), (44_100, 2), (192_000, 32)])
def test_other_rates_and_channels(served: Served, rate: int, channels: int) -> None:
    places = np.arange(0, len(SHORT) - 1, 16_000 / rate)
    mono = np.interp(places, np.arange(len(SHORT)), SHORT).astype(np.float32)
    data = pcm(np.repeat(mono, channels))
    found = asyncio.run(dictate(f"{served.ws}?rate={rate}&channels={channels}", data, 100_001))
    assert (found.final, found.code) == (["no"], 1000)


def test_an_odd_byte_at_the_end_is_said(served: Served) -> None:
    found = asyncio.run(dictate(served.ws, pcm(SHORT) + b"x"))
    assert found.final == ["no"] and "1 bytes of a sample" in found.last["warning"]


@pytest.mark.parametrize("size", [150, 100_000])
def test_opus_in_ogg_and_webm(served: Served, size: int) -> None:
    ogg = ogg_opus(AUDIO)
    for form, data in (("ogg", ogg), ("webm", webm(packets(ogg)))):
        found = asyncio.run(dictate(f"{served.ws}?format={form}", data, size))
        assert (found.final, found.code) == (["yes no", "day"], 1000)
        assert "warning" not in found.last


def test_webm_cut_in_the_middle(served: Served) -> None:
    data = webm(packets(ogg_opus(AUDIO)))
    found = asyncio.run(dictate(f"{served.ws}?format=webm", data[: len(data) // 2 + 5], 500))
    assert (found.final, found.code) == (["yes no"], 1000)
    assert "a part of a packet" in found.last["warning"]


def test_webm_that_breaks_off_into_noise_loses_nothing_before(served: Served) -> None:
    data = webm(packets(ogg_opus(spoken("yes no", after=1.0))))
    found = asyncio.run(dictate(f"{served.ws}?format=webm", data + b"\0" * 5000, 500))
    assert found.final == ["yes no"]
    assert found.code == 1007
    assert found.last["error"]["code"] == "unreadable" and "WebM is damaged" in found.last["error"]["message"]


def test_nothing_and_silence(served: Served) -> None:
    for data in (b"", bytes(64_000)):
        found = asyncio.run(dictate(served.ws, data))
        assert [message["type"] for message in found.messages] == ["end"] and found.code == 1000
        assert found.last["remarks"] == ["silence (digital)" if data else "no samples"]


def test_what_is_wrong_with_the_audio_is_said_at_the_end(served: Served) -> None:
    found = asyncio.run(dictate(served.ws, pcm(SHORT + np.float32(0.1))))
    assert found.final == ["no"] and found.last["remarks"] == ["DC offset of +10.0 % of full scale"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("rate=7999", "rate"),
        ("rate=x", "rate"),
        ("rate=١٦٠٠٠", "rate"),
        ("channels=33", "channels"),
        ("channels=0", "channels"),
        ("format=mp3", "format"),
        ("format=webm&rate=48000", "rate"),
        ("sample_rate=16000", "sample_rate"),
        ("rate=16000&rate=8000", "rate"),
        ("format=pcm&format=pcm", "format"),
        ("channels=&channels=1", "channels"),
    ],
)
def test_what_is_asked_for_wrongly_is_said(served: Served, query: str, field: str) -> None:
    found = asyncio.run(dictate(f"{served.ws}?{query}", b"", stop=False))
    error = found.last["error"]
    assert (error["code"], error["field"], found.code) == ("invalid", field, 1008)
    assert len(error["message"]) < 200


@pytest.mark.parametrize("text", ["", "stop", "[]", '{"type": "begin"}', "[" * 5000])
def test_other_words_than_stop_end_the_stream_with_what_was_said(served: Served, text: str) -> None:
    async def client() -> None:
        async with connected(served.ws) as socket:
            await socket.send_bytes(pcm(SHORT))
            await socket.send_str(text)
            found = await told(socket)
            assert (found.final, found.code, found.last["error"]["code"]) == (["no"], 1008, "invalid")

    asyncio.run(client())


def test_twenty_at_once_and_one_too_many(served: Served) -> None:
    assert quiet(served)
    texts = ["yes no", "day", "sad", "no", "yes"]

    async def clients() -> None:
        async with asyncio.TaskGroup() as group:
            jobs = [group.create_task(dictate(served.ws, pcm(spoken(texts[n % 5])), 1600 + n)) for n in range(20)]
        for place, job in enumerate(jobs):
            assert job.result().final == [texts[place % 5]]
        waiting = [connected(served.ws) for _ in range(24)]
        open_ones = [await each.__aenter__() for each in waiting]
        while len(served.service.hub.sessions) < 24:
            await asyncio.sleep(0.01)
        health = httpx.get(f"{served.url}/health").json()
        assert (health["streams"], health["max_streams"]) == (24, 24)
        refused = await dictate(served.ws, b"", stop=False)
        assert (refused.code, refused.last["error"]["code"]) == (1013, "overloaded")
        # those that are there are not disturbed
        await open_ones[3].send_bytes(pcm(SHORT))
        await open_ones[3].send_str('{"type": "stop"}')
        assert (await told(open_ones[3])).final == ["no"]
        for each in waiting:
            await each.__aexit__(None, None, None)

    asyncio.run(clients())
    assert quiet(served)


def test_one_that_vanishes_is_forgotten(served: Served) -> None:
    async def client() -> None:
        async with connected(served.ws) as socket:
            await socket.send_bytes(pcm(AUDIO))
            assert json.loads((await socket.receive()).data)["type"] in ("partial", "final")
            connection = socket._response.connection
            assert connection is not None and connection.transport is not None
            connection.transport.abort()  # no close frame

    asyncio.run(client())
    assert quiet(served)
    assert asyncio.run(dictate(served.ws, pcm(SHORT))).final == ["no"]


def test_a_hasty_client_is_read_no_faster_than_it_is_heard(served: Served) -> None:
    async def client() -> None:
        async with connected(served.ws) as socket:
            reading = asyncio.create_task(told(socket))
            while not served.service.hub.sessions:
                await asyncio.sleep(0.01)
            (session,) = served.service.hub.sessions
            most, data = 0, pcm(noise(20, 0.01))
            for at in range(0, len(data), 32_000):
                await socket.send_bytes(data[at : at + 32_000])
                most = max(most, session.pending_bytes)
            await socket.send_str('{"type": "stop"}')
            assert (await reading).code == 1000
            assert most <= 64_000 + 32_000  # four portions and a message

    assert quiet(served)
    asyncio.run(client())


def test_limits_of_time_and_size(folder: Path) -> None:
    with running(folder, idle_seconds=0.3, max_seconds=1.0, max_message=20_000) as served:

        async def idle() -> None:
            async with connected(served.ws) as socket:
                await socket.send_bytes(pcm(SHORT)[:20_000])
                found = await told(socket)
                assert (found.final, found.code, found.last["error"]["code"]) == (["no"], 1008, "idle")

        asyncio.run(idle())
        found = asyncio.run(dictate(served.ws, pcm(AUDIO), stop=False))
        assert (found.final, found.code, found.last["error"]["code"]) == (["yes"], 1008, "too_long")
        short = pcm(SHORT)[:20_000]
        found = asyncio.run(dictate(served.ws, short + bytes(20_001), [len(short), 20_001], stop=False))
        assert (found.final, found.code, found.last["error"]["code"]) == (["no"], 1009, "too_large")
        assert found.last["error"]["message"] == "wanted messages of at most 20000 bytes"
        assert quiet(served)


def test_empty_messages_do_not_keep_a_stream(folder: Path) -> None:
    async def client(url: str) -> None:
        async with connected(url) as socket:
            await socket.send_bytes(pcm(SHORT))
            reading = asyncio.create_task(told(socket))
            for _ in range(100):
                if reading.done():
                    break
                with suppress(ConnectionError, aiohttp.ClientError):
                    await socket.send_bytes(b"")
                await asyncio.sleep(0.05)
            assert reading.done(), "the stream goes on"
            found = reading.result()
            assert (found.final, found.code, found.last["error"]["code"]) == (["no"], 1008, "idle")

    with running(folder, idle_seconds=0.5) as served:
        asyncio.run(client(served.ws))
        assert quiet(served)


def test_a_service_that_stops_tells_what_was_said(folder: Path) -> None:
    words = ["-m", "tests.speech.server.serving", "--model", str(folder), "--port", "0", "--drain-seconds", "5"]
    root = Path(__file__).resolve().parents[3]
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True, cwd=root, env=os.environ)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        while "serving on http://" not in line:
            assert line, "the service did not start"
            line = process.stderr.readline()
        url = line.split("serving on http")[1].strip()

        async def client() -> None:
            async with connected(f"ws{url}/v1/listen") as socket:
                await socket.send_bytes(pcm(SHORT))
                await socket.receive()
                process.send_signal(signal.SIGTERM)
                found = await told(socket)
                assert (found.final, found.last["error"]["code"], found.code) == (["no"], "stopping", 1012)

        # libmpg123 warns of it on stderr
        cut = wav(noise(4, 0.1), format="MP3")[:6000]
        assert httpx.post(f"http{url}/v1/audio/transcriptions", files={"file": ("a.mp3", cut)}).status_code == 422
        asyncio.run(client())
        rest = process.communicate(timeout=WAIT)[1]
        assert process.returncode == 0, rest
        assert '"ended": "stopping"' in rest and "traceback" not in rest
        assert "torch: False" in rest
        logged = [json.loads(each) for each in rest.splitlines() if not each.startswith("torch: ")]
        assert any("Xing" in each["message"] for each in logged if each.get("logger") == "native")
    finally:
        process.kill()
        process.wait()
