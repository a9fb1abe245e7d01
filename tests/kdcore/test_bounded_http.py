"""The protocol before a plain ASGI application, on a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from kdcore.bounded_http import BoundedHttp, sweep
from kdcore.listening import listening_socket

WAIT = 20.0
GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answer with as many bytes as the path says, when the body is there."""
    while (await receive()).get("more_body"):
        pass
    if scope["path"] == "/slow":
        await asyncio.sleep(1.0)
    size = int(scope["path"][1:].replace("slow", "") or 2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % size)]})
    for at in range(0, size, 1 << 16):
        await send({"type": "http.response.body", "body": bytes(min(1 << 16, size - at)), "more_body": True})
    await send({"type": "http.response.body", "body": b""})


def serve(scenario: Callable[[int, type[BoundedHttp]], Awaitable[None]], **limits: Any) -> None:
    """Run a scenario, which is given port and protocol, against a server."""

    async def run() -> None:
        protocol = BoundedHttp.limited(**limits)
        options = {"http": protocol, "ws": "none", "lifespan": "off", "log_config": None, "timeout_keep_alive": 60}
        server = uvicorn.Server(uvicorn.Config(application, **options))  # type: ignore[arg-type]
        listener = listening_socket("127.0.0.1", 0)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        sweeping = asyncio.create_task(sweep(protocol))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            async with asyncio.timeout(WAIT):
                await scenario(listener.getsockname()[1], protocol)
        finally:
            sweeping.cancel()
            server.should_exit = server.force_exit = True
            await serving
            listener.close()

    asyncio.run(run())


async def connect(port: int, data: bytes = b"", limit: int = 1 << 16) -> tuple[asyncio.StreamReader, Any]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=limit)
    writer.write(data)
    return reader, writer


@pytest.mark.parametrize("data", [b"", b"GET / HT", GET[:-2]], ids=["nothing", "a line", "headers"])
def test_a_head_has_to_arrive_in_time(data: bytes) -> None:
    async def scenario(port: int, protocol: type[BoundedHttp]) -> None:
        reader, writer = await connect(port, data)
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
        writer.close()

    serve(scenario, receive_timeout=0.2)


@pytest.mark.parametrize("data", [b"\r\n", b"GET /"], ids=["an empty line", "a part of a request"])
def test_a_second_head_has_to_arrive_in_time(data: bytes) -> None:
    async def scenario(port: int, protocol: type[BoundedHttp]) -> None:
        reader, writer = await connect(port, GET)
        assert (await reader.readuntil(b"\r\n\r\n\0\0")).startswith(b"HTTP/1.1 200")
        writer.write(data)
        assert (await reader.read()).startswith(b"HTTP/1.1 408")
        writer.close()

    serve(scenario, receive_timeout=0.2)


def test_what_comes_behind_a_request_does_not_end_its_answer() -> None:
    async def scenario(port: int, protocol: type[BoundedHttp]) -> None:
        for data in (b"\r\n", b"GET /"):
            reader, writer = await connect(port, GET.replace(b"/", b"/slow", 1) + data)
            assert (await reader.readuntil(b"\r\n\r\n\0\0")).startswith(b"HTTP/1.1 200")
            writer.close()

    serve(scenario, receive_timeout=0.2)


def test_a_body_may_take_longer() -> None:
    async def scenario(port: int, protocol: type[BoundedHttp]) -> None:
        reader, writer = await connect(port, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\n\r\n1")
        await asyncio.sleep(1.0)
        writer.write(b"23")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()

    serve(scenario, receive_timeout=0.2)


def test_heads_that_are_too_large_and_no_http() -> None:
    async def scenario(port: int, protocol: type[BoundedHttp]) -> None:
        for data, status in ((GET[:-2] + b"x: y\r\n" * 6000, 431), (b"\0\0\0\0\r\n\r\n", 400)):
            reader, writer = await connect(port, data)
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 %d" % status) and b'{"error": {"code": ' in answer
            writer.close()

    serve(scenario)


def test_an_answer_that_is_not_read_is_given_up() -> None:
    async def scenario(port: int, protocol: type[BoundedHttp]) -> None:
        reader, writer = await connect(port, b"GET /50000000 HTTP/1.1\r\nhost: x\r\n\r\n", limit=1000)
        while not protocol.live:
            await asyncio.sleep(0.01)
        while protocol.live:
            await asyncio.sleep(0.01)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(50_000_000)
        writer.close()

    serve(scenario, send_timeout=0.2)


def test_more_connections_than_may_be_and_two_servers() -> None:
    async def scenario(port: int, protocol: type[BoundedHttp]) -> None:
        ones = [await connect(port) for _ in range(2)]
        while len(protocol.live) < 2:
            await asyncio.sleep(0.01)
        reader, writer = await connect(port)
        assert (await reader.readline()).startswith(b"HTTP/1.1 503")
        writer.close()
        ones[0][1].write(GET)
        assert (await ones[0][0].readline()).startswith(b"HTTP/1.1 200")
        for _, each in ones:
            each.close()
        while protocol.live:
            await asyncio.sleep(0.01)

    serve(scenario, max_connections=2)
    assert BoundedHttp.max_connections > 2 and not BoundedHttp.live
