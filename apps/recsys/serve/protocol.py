"""The wire: uvicorn's HTTP protocol with limits on what a client may keep open and for how long."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD = 1 << 15
_SWEEP_SECONDS = 0.5
# a body longer than this takes the long way
_MAX_HELD = 1 << 16


class BoundedProtocol(HttpToolsProtocol):
    """Ends connections whose request does not arrive in time or whose headers are too large.

    No timer per request: a connection notes when its request began, and one sweep looks at all of them.

    A request for a path in ``direct`` is held until its body is there, and answered from it without ASGI if that can
    be done at once: the task, events, dictionaries and two messages of an ASGI call cost as much as an approximate
    search of a million items. What cannot be answered so goes the long way, where nothing is different.
    """

    # of all connections of this process, set once before it listens
    receive_timeout: ClassVar[float] = 10.0
    max_connections: ClassVar[int] = 2048
    keep_alive: ClassVar[float] = 30.0
    live: ClassVar[set[BoundedProtocol]] = set()
    # path -> what returns a whole answer, or None for the long way
    direct: ClassVar[dict[bytes, Callable[[list[tuple[bytes, bytes]], Any, bytes, bytes], bytes | None]]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note when: a client that connects and says nothing is slow as well."""
        self._since: float | None = time.monotonic()
        self._stalled: float | None = None
        # since when the connection has had nothing to do, after a direct answer; uvicorn has a timer for the others
        self._idle: float | None = None
        self._held: list[bytes] | None = None
        self._held_bytes = 0
        self._common: tuple[Any, bytes] = (None, b"")
        self._head = 0
        self._in_head = True
        super().connection_made(transport)
        if len(self.live) >= self.max_connections:
            self.refuse(503, "overloaded", "too many connections")
        self.live.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self.live.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the bytes of headers before they are parsed."""
        if self._in_head:
            self._head += len(data)
        super().data_received(data)
        if self._in_head and self._head > _MAX_HEAD and self.transport is not None and not self.transport.is_closing():
            self.refuse(431, "headers_too_large", f"more than {_MAX_HEAD} bytes of headers")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._since, self._idle = time.monotonic(), None
        self._in_head = True
        self.url, self.headers, self.expect_100_continue = b"", [], False

    def on_headers_complete(self) -> None:
        """Its body is counted by who reads it."""
        self._in_head, self._head = False, 0
        if self.url in self.direct and self._plain():
            self._held, self._held_bytes = [], 0
        else:
            self._long_way()

    def _plain(self) -> bool:
        """Return whether this is a request like most: nothing before it is unanswered, nothing about it is special."""
        return (
            (self.cycle is None or self.cycle.response_complete)
            and self._stalled is None
            and not self.expect_100_continue
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and self.parser.should_keep_alive()
            and not self.parser.should_upgrade()
        )

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._held is None:
            super().on_body(body)
            return
        self._held.append(body)
        self._held_bytes += len(body)
        if self._held_bytes > _MAX_HELD:
            self._let_go()

    def _let_go(self) -> None:
        """Send a held request the long way after all."""
        held, self._held = self._held or [], None
        self._long_way()
        for part in held:
            super().on_body(part)

    def _long_way(self) -> None:
        """Make what uvicorn needs to let the application answer."""
        url, headers, expected = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expected
        self.headers += headers
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """It has arrived."""
        self._since, self._in_head, self._head = None, True, 0
        if self._held is not None:
            body = self._held[0] if len(self._held) == 1 else b"".join(self._held)
            answer = self.direct[self.url](self.headers, self.client, body, self._every_answer())
            if answer is not None:
                self._held, self._idle = None, time.monotonic()
                self.server_state.total_requests += 1
                self.transport.write(answer)
                return
            self._let_go()
        super().on_message_complete()

    def _every_answer(self) -> bytes:
        """Return the header lines that uvicorn gives to all answers (the date); it renews their list every second."""
        headers = self.server_state.default_headers
        if self._common[0] is not headers:
            self._common = headers, b"".join(b"%b: %b\r\n" % header for header in headers)
        return self._common[1]

    def shutdown(self) -> None:
        """A request that is half here is answered before the connection ends."""
        if self._held is not None:
            self._let_go()
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the shape of every other error."""
        self.refuse(400, "bad_http", msg)

    def refuse(self, status: int, code: str, message: str) -> None:
        """Answer without the application, and close."""
        started = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not started:  # else half an answer is on the wire: nothing sensible can follow it
            body = json.dumps({"error": {"code": code, "message": message}, "request_id": ""}).encode()
            head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read."""
        self._stalled = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """It reads again."""
        self._stalled = None
        super().resume_writing()

    def end_if_overdue(self, now: float) -> None:
        """End the connection if the client takes too long to send a request or to read an answer."""
        if self._stalled is not None and now - self._stalled > self.receive_timeout:
            self.transport.abort()
        elif self._since is not None and now - self._since > self.receive_timeout:
            self.refuse(408, "timeout", "the request did not arrive in time")
        elif self._idle is not None and now - self._idle > self.keep_alive:
            self.transport.close()


async def sweep() -> None:
    """End overdue connections, for ever."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        now = time.monotonic()
        for connection in list(BoundedProtocol.live):
            connection.end_if_overdue(now)
