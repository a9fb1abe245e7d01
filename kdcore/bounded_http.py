"""uvicorn's HTTP protocol with limits on what a client may keep open and for how long."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_MAX_HEAD = 1 << 15
_SWEEP_SECONDS = 0.5


class BoundedHttp(HttpToolsProtocol):
    """Ends connections whose request does not arrive in time or whose headers are too large.

    No timer per request: a connection notes when its request began, and one sweep looks at all of them. How long a
    body may take is up to whoever reads it.
    """

    # how long the head of a request may take, and an answer may stay unread (as long as a head where None)
    receive_timeout: ClassVar[float] = 10.0
    send_timeout: ClassVar[float | None] = None
    max_connections: ClassVar[int] = 2048
    live: ClassVar[set[BoundedHttp]] = set()

    @classmethod
    def limited(cls, **limits: Any) -> type[BoundedHttp]:
        """Return the protocol with limits of its own, for one of several servers in a process."""
        return type(cls.__name__, (cls,), {"live": set(), **limits})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Note when: a client that connects and says nothing is slow as well."""
        self._since: float | None = time.monotonic()
        self._stalled: float | None = None
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

    def handle_websocket_upgrade(self) -> None:
        """The connection is another protocol's from now on."""
        self.live.discard(self)
        super().handle_websocket_upgrade()

    def data_received(self, data: bytes) -> None:
        """Count the bytes of headers before they are parsed."""
        if self._in_head:
            self._head += len(data)
            if self._since is None and self._answered:  # an empty line begins no message, but stops uvicorn's timer
                self._since = time.monotonic()
        super().data_received(data)
        if self._in_head and self._head > _MAX_HEAD and self.transport is not None and not self.transport.is_closing():
            self.refuse(431, "headers_too_large", f"more than {_MAX_HEAD} bytes of headers")

    @property
    def _answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def on_message_begin(self) -> None:
        """A request begins; behind one that is not answered yet it has time."""
        self._since, self._in_head = time.monotonic() if self._answered else None, True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The rest is counted and timed by who reads it."""
        self._since, self._in_head, self._head = None, False, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """It has arrived."""
        self._since, self._in_head, self._head = None, True, 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP in the shape of every other error."""
        self.refuse(400, "bad_http", msg)

    def refuse(self, status: int, code: str, message: str) -> None:
        """Answer without the application, and close."""
        if (
            self._answered or not self.cycle.response_started
        ):  # else half an answer is on the wire: nothing sensible can follow it
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
        unread = self.receive_timeout if self.send_timeout is None else self.send_timeout
        if self._stalled is not None and now - self._stalled > unread:
            self.transport.abort()
        elif self._since is not None and now - self._since > self.receive_timeout:
            self.refuse(408, "timeout", "the request did not arrive in time")


async def sweep(protocol: type[BoundedHttp] = BoundedHttp) -> None:
    """End overdue connections of a protocol, for ever."""
    while True:
        await asyncio.sleep(_SWEEP_SECONDS)
        now = time.monotonic()
        for connection in list(protocol.live):
            connection.end_if_overdue(now)
