"""The wire: a bounded HTTP protocol whose most frequent requests are answered without ASGI."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, ClassVar

from kdcore.bounded_http import BoundedHttp

# a body longer than this takes the long way
_MAX_HELD = 1 << 16


class BoundedProtocol(BoundedHttp):
    """Bounds the body of a request as well: all of it has to arrive in time.

    A request for a path in ``direct`` is held until its body is there, and answered from it without ASGI if that can
    be done at once: the task, events, dictionaries and two messages of an ASGI call cost as much as an approximate
    search of a million items. What cannot be answered so goes the long way, where nothing is different.
    """

    # of all connections of this process
    keep_alive: ClassVar[float] = 30.0
    # path -> what returns a whole answer, or None for the long way
    direct: ClassVar[dict[bytes, Callable[[list[tuple[bytes, bytes]], Any, bytes, bytes], bytes | None]]] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin without a request."""
        # since when the connection has had nothing to do, after a direct answer; uvicorn has a timer for the others
        self._idle: float | None = None
        self._held: list[bytes] | None = None
        self._held_bytes = 0
        self._common: tuple[Any, bytes] = (None, b"")
        super().connection_made(transport)

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
        """Make what uvicorn needs to let the application answer; the time of the request goes on."""
        url, headers, expected, since = self.url, self.headers, self.expect_100_continue, self._since
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expected
        self.headers += headers
        super().on_headers_complete()
        self._since = since

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

    def end_if_overdue(self, now: float) -> None:
        """End the connection as well if it has had nothing to do for long after a direct answer."""
        super().end_if_overdue(now)
        if self._idle is not None and now - self._idle > self.keep_alive:
            self.transport.close()
