"""What a client may do to its connection: limits, violations of the protocol, pages of other origins."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.websockets import WebSocket

from apps.speech.server.websocket import BoundedWebSocket
from tests.speech.device.exported import silence, spoken
from tests.speech.server.served import WAIT, Served, connected, dictate, pcm, running

SHORT = spoken("no", before=0.1, after=0.1)
AUDIO = np.concatenate([spoken("yes no"), silence(2), spoken("day")])
MASK = b"\x37\xfa\x21\x3d"
UPGRADE = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
KEY = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with running(folder, max_message=1000) as served:
        yield served


@pytest.fixture(autouse=True)
def calm(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What a client does wrong is no error of the service."""
    yield
    errors = [record for record in caplog.get_records("call") if record.levelname in ("ERROR", "CRITICAL")]
    assert [each.getMessage() for each in errors if "Invalid UTF-8" not in each.getMessage()] == []


def until(true: Callable[[], bool]) -> bool:
    """Wait for what soon is true."""
    end = time.monotonic() + WAIT
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def frame(opcode: int, payload: bytes, *, final: bool = True, mask: bytes | None = MASK, bits: int = 0) -> bytes:
    """Return a frame as a client sends it, masked byte by byte as the standard says."""
    head = bytes([opcode | (0x80 if final else 0) | bits])
    size = len(payload)
    flag = 0x80 if mask else 0
    head += bytes([flag | size]) if size < 126 else bytes([flag | 126]) + size.to_bytes(2, "big")
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))


def raw(served: Served, head: str = UPGRADE + KEY, *, buffer: int | None = None) -> socket.socket:
    """Return a connection that has sent its request."""
    host, port = served.url.removeprefix("http://").split(":")
    client = socket.socket()
    client.settimeout(WAIT)
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.connect((host, int(port)))
    client.sendall(f"GET /v1/listen HTTP/1.1\r\nHost: {host}:{port}\r\n{head}\r\n".encode("latin-1"))
    return client


def opened(served: Served, **options: Any) -> socket.socket:
    client = raw(served, **options)
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += client.recv(1)
    assert answer.startswith(b"HTTP/1.1 101") and b"extensions" not in answer.lower()
    return client


def rest(client: socket.socket) -> bytes:
    """Return what comes until the connection ends."""
    data = b""
    try:
        while part := client.recv(1 << 16):
            data += part
    except ConnectionResetError:
        pass
    client.close()
    return data


def close_code(data: bytes) -> int | None:
    """Return the code of the close frame that the frames of a server end with."""
    code = None
    while data:
        opcode, size, at = data[0] & 15, data[1], 2
        if size == 126:
            size, at = struct.unpack(">H", data[2:4])[0], 4
        if opcode == 8:
            code = struct.unpack(">H", data[at : at + 2])[0]
        data = data[at + size :]
    return code


def live(served: Served) -> list[BoundedWebSocket]:
    return [each for each in served.server.server_state.connections if isinstance(each, BoundedWebSocket)]


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (frame(1, b"x", mask=None), 1002),
        (frame(1, b"x", bits=0x40), 1002),
        (frame(3, b"x"), 1002),
        (frame(9, b"x", final=False), 1002),
        (frame(9, bytes(126)), 1002),
        (frame(0, b"x"), 1002),
        (frame(1, b"x", final=False) + frame(1, b"y"), 1002),
        (frame(1, b"\xff"), 1007),
        (frame(2, bytes(1001)), 1009),
        (frame(2, bytes(600), final=False) + frame(0, bytes(600)), 1009),
        (b"\x82\xff" + b"\x7f" + b"\xff" * 7 + MASK, 1009),
        (frame(2, b"", final=False) + frame(0, b"", final=False) * 1100, 1009),
    ],
)
def test_what_a_client_may_not_send(served: Served, wire: bytes, code: int) -> None:
    client = opened(served)
    client.sendall(wire)
    said = rest(client)
    assert close_code(said) == code
    assert (b'"code":"too_large","message":"wanted messages' in said) == (code == 1009)
    assert until(lambda: not live(served) and not served.service.hub.sessions)


def test_who_sends_on_what_is_too_large_is_told_what_was_heard(served: Served) -> None:
    data = pcm(SHORT)
    client = opened(served)
    said = b"".join(frame(2, data[at : at + 900]) for at in range(0, len(data), 900))
    began = time.monotonic()
    client.sendall(said + b"\x82\xff" + (1 << 40).to_bytes(8, "big") + MASK + bytes(300_000))
    client.sendall(bytes(3_000_000))
    answer = rest(client)
    assert b'"type":"final","text":"no"' in answer and b'"code":"too_large"' in answer
    assert close_code(answer) == 1009 and time.monotonic() - began < WAIT / 2
    assert until(lambda: not live(served) and not served.service.hub.sessions)


def test_fragments_with_a_ping_between_them(served: Served) -> None:
    data = pcm(SHORT)
    client = opened(served)
    for at in range(0, len(data), 900):
        part = data[at : at + 900]
        client.sendall(frame(2, part[:1], final=False) + frame(9, b"p") + frame(0, part[1:]))
    client.sendall(frame(1, b'{"type": "stop"}') + frame(8, b"\x03\xe8"))
    client.sendall(b"nothing follows a close")
    said = rest(client)
    assert said.count(b"\x8a\x01p") == len(range(0, len(data), 900))
    assert close_code(said) == 1000


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(min_size=1, max_size=300), st.booleans())
def test_noise_hurts_nobody(served: Served, data: bytes, first: bool) -> None:
    client = raw(served, "") if first else opened(served)
    try:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # it was ended before
    rest(client)
    assert until(lambda: not live(served) and not served.service.hub.sessions)
    assert httpx.get(f"{served.url}/health").json()["streams"] == 0


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (UPGRADE, 400),
        (UPGRADE + "Sec-WebSocket-Key: abc\r\n", 400),
        (UPGRADE.replace("13", "12") + KEY, 400),
        (UPGRADE + KEY + "X: y\r\n" * 200, 431),
        (UPGRADE + KEY + f"X: {'y' * 9000}\r\n", 431),
        (UPGRADE + KEY + f"X: {'y' * 40_000}\r\n", 431),
        (UPGRADE + KEY + "X-\xff: y\r\n", 400),
    ],
)
def test_what_is_no_handshake(served: Served, head: str, status: int) -> None:
    assert rest(raw(served, head)).startswith(b"HTTP/1.1 %d" % status)
    assert until(lambda: not live(served))


def test_frames_before_the_connection_is_open(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, began = WebSocket.accept, threading.Event()

    async def slow(websocket: WebSocket) -> None:
        began.set()
        await asyncio.sleep(0.5)
        await accept(websocket)

    monkeypatch.setattr(WebSocket, "accept", slow)
    eager = raw(served)
    assert began.wait(WAIT)
    eager.sendall(frame(2, b"xy") * 50)
    assert rest(eager) == b""
    assert until(lambda: not live(served)) and not served.service.hub.sessions


def test_another_path(served: Served) -> None:
    async def client() -> None:
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            async with connected(served.ws + "er"):
                pass
        assert caught.value.status == 403

    asyncio.run(client())


def test_compression_is_not_offered(served: Served) -> None:
    head = UPGRADE + KEY + "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits\r\n"
    opened(served, head=head).close()


def test_slow_heads(folder: Path) -> None:
    with running(folder, receive_seconds=0.3) as served:
        host, port = served.url.removeprefix("http://").split(":")
        for sent in (b"", b"GET /v1/li", b"GET /health HTTP/1.1\r\n"):
            with socket.create_connection((host, int(port)), WAIT) as client:
                client.sendall(sent)
                assert client.recv(100).startswith(b"HTTP/1.1 408")
        assert httpx.get(f"{served.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("{own}", 101),
        (None, 101),
        ("https://friend.example", 101),
        ("https://FRIEND.example:443", 101),
        ("http://friend.example", 403),
        ("https://friend.example.evil", 403),
        ("http://127.0.0.1", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_pages_of_other_origins(folder: Path, origins: Served, origin: str | None, status: int) -> None:
    given = "" if origin is None else f"Origin: {origin.format(own=origins.url)}\r\n"
    client = raw(origins, UPGRADE + KEY + given)
    answer = client.recv(4000)
    assert answer.startswith(b"HTTP/1.1 %d" % status)
    if status == 403:
        answer += rest(client)
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert body["error"]["code"] == "origin" and body["request_id"].encode() in answer.partition(b"\r\n\r\n")[0]
    client.close()
    assert until(lambda: not live(origins))


@pytest.fixture(scope="module")
def origins(folder: Path) -> Iterator[Served]:
    with running(folder, allow_origins=("https://friend.example",)) as served:
        yield served


def test_a_crowd_does_not_hurt_those_that_are_there(folder: Path) -> None:
    with running(folder, max_connections=40, max_streams=2) as served:
        first = opened(served)
        assert until(lambda: len(served.service.hub.sessions) == 1)
        crowd = [raw(served) for _ in range(1000)]
        answers = [client.recv(4000) for client in crowd]
        refused = [answer for answer in answers if answer.startswith(b"HTTP/1.1 503")]
        assert len(refused) > 800 and all(b"retry-after" in answer for answer in refused)
        assert until(lambda: len(live(served)) <= 40)
        data = pcm(SHORT)
        first.sendall(b"".join(frame(2, data[at : at + 3200]) for at in range(0, len(data), 3200)))
        first.sendall(frame(1, b'{"type": "stop"}'))
        said = rest(first)
        assert b'"type":"final","text":"no"' in said and close_code(said) == 1000
        # one of the crowd has the second stream; whoever has a connection and no stream is told so, and cut off
        assert 'kd_refusals_total{code="overloaded"} 999.0' in httpx.get(f"{served.url}/metrics").text
        assert until(lambda: len(live(served)) == 1)
        for client in crowd:
            client.close()
        assert until(lambda: not live(served))
        assert asyncio.run(dictate(served.ws, data)).final == ["no"]


def test_a_refusal_has_the_shape_of_every_error(folder: Path) -> None:
    with running(folder, max_connections=1) as served:
        one = opened(served)
        answer = rest(raw(served))
        head, _, body = answer.partition(b"\r\n\r\n")
        about = json.loads(body)
        assert head.startswith(b"HTTP/1.1 503") and b"retry-after: 5" in head
        assert set(about) == {"error", "model_version", "request_id"} and about["error"]["code"] == "overloaded"
        assert about["request_id"].encode() in head
        one.close()


def test_small_messages_wait_until_the_application_has_time(served: Served) -> None:
    hasty = opened(served)
    (connection,) = live(served)
    hasty.sendall((frame(2, b"") * 5000 + frame(9, b"") * 2000) * 2 + frame(8, b""))
    most, end = 0, time.monotonic() + WAIT
    while live(served) and time.monotonic() < end:
        most = max(most, connection.queue.qsize())
        time.sleep(0.0005)
    assert 0 < most < 1000
    assert rest(hasty).endswith(b"\x88\x00")


def test_one_that_never_reads_is_cut_off_and_slows_nobody(folder: Path) -> None:
    with running(folder, send_seconds=0.5) as served:
        deaf = opened(served, buffer=2048)
        # a pong for every ping is an answer that it does not read
        deaf.settimeout(1.0)
        ping = bytes([0x89, 0x80 | 125]) + bytes(4) + bytes(125)
        deaf.sendall(ping * 40_000)
        (connection,) = live(served)
        assert until(lambda: not connection.writable.is_set())
        assert connection.transport.get_write_buffer_size() < 1 << 20
        assert asyncio.run(dictate(served.ws, pcm(AUDIO))).final == ["yes no", "day"]
        # words that it does not take
        data = pcm(AUDIO)
        deaf.sendall(b"".join(frame(2, data[at : at + 32_000]) for at in range(0, len(data), 32_000)))
        assert until(lambda: not live(served) and not served.service.hub.sessions)
        assert 'kd_streams_total{ended="unread"} 1.0' in httpx.get(f"{served.url}/metrics").text
        deaf.close()


def test_a_client_that_reads_again_gets_its_pong(served: Served) -> None:
    late = opened(served, buffer=2048)
    ping = bytes([0x89, 0x80 | 125]) + bytes(4) + bytes(125)
    late.sendall(ping * 40_000)
    (connection,) = live(served)
    assert until(lambda: not connection.writable.is_set())
    late.sendall(frame(9, b"last"))
    late.sendall(frame(1, b'{"type": "stop"}'))
    assert b"\x8a\x04last" in rest(late)


def test_metrics(folder: Path) -> None:
    with running(folder, max_streams=1) as served:
        asyncio.run(dictate(served.ws, pcm(AUDIO)))
        asyncio.run(dictate(f"{served.ws}?format=mp3", b"", stop=False))

        async def while_one_speaks() -> str:
            async with connected(served.ws) as one:
                await one.send_bytes(pcm(SHORT))
                assert json.loads((await one.receive()).data)["type"] == "partial"
                return httpx.get(f"{served.url}/metrics").text

        during = asyncio.run(while_one_speaks())
        assert "kd_streams_live 1.0" in during
        assert until(lambda: not served.service.hub.sessions)
        post = f"{served.url}/v1/audio/transcriptions"
        httpx.post(post, json={})
        answer = httpx.get(f"{served.url}/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        lines = dict(line.rsplit(" ", 1) for line in answer.text.splitlines() if not line.startswith("#"))
        assert lines["kd_streams_live"] == "0.0"
        assert lines['kd_streams_total{ended="end"}'] == lines['kd_streams_total{ended="gone"}'] == "1.0"
        assert lines['kd_refusals_total{code="invalid"}'] == "1.0"
        assert lines['kd_refusals_total{code="unsupported_media_type"}'] == "1.0"
        assert lines["kd_final_seconds_count"] == "2.0"
        assert 0 < float(lines["kd_final_seconds_sum"]) < WAIT
        heard = float(lines['kd_audio_seconds_total{endpoint="/v1/listen"}'])
        assert len(AUDIO) / 16_000 < heard <= (len(AUDIO) + len(SHORT)) / 16_000 + 1e-6
