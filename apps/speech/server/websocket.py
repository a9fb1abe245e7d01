"""uvicorn's WebSocket protocol, with bounds where it has none."""

from __future__ import annotations

import logging
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import PayloadTooBig
from websockets.frames import CloseCode, Frame
from websockets.http11 import Request
from websockets.server import ServerProtocol

# a connection whose end its client does not take is cut off after so long
_CLOSE_SECONDS = 2.0
_MOST_FRAGMENTS = 1024
# bytes that are parsed at once: 700 frames at the most, some ten milliseconds
_PORTION = 4096


class _Frames(ServerProtocol):
    """The frames of a connection, which a message that is too big does not close yet."""

    def fail(self, code: CloseCode | int, reason: str = "") -> None:
        """Close, unless the application has something to say before."""
        if code != CloseCode.MESSAGE_TOO_BIG:
            super().fail(code, reason)


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """Ends what a client would keep open or for itself, and counts the connections for the application.

    The application finds the number of live WebSocket connections in ``scope["state"]["connections"]``. A message that
    is too big is not read, nor what follows it: the application receives ``{"type": "websocket.receive", "too_big":
    why}`` in its place, and closes.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = _Frames(max_size=self.config.ws_max_size, logger=logging.getLogger("uvicorn.error"))
        self._deaf = False
        self.close_timeout = _CLOSE_SECONDS
        self._unparsed = bytearray()
        self._pong = b""

    def data_received(self, data: bytes) -> None:
        """Take the request, then frames: portion by portion, so that those of one client keep no other waiting."""
        if self.handshake_initiated and not self.handshake_complete:
            self.transport.abort()  # frames before the connection is open
            return
        before = len(self._unparsed)
        self._unparsed += data
        if not before:  # else what is before it goes on with it
            self._parse()

    def _parse(self) -> None:
        """Parse a portion; the next one follows when the application has taken its messages and others had a turn."""
        portion = bytes(self._unparsed[:_PORTION])
        del self._unparsed[:_PORTION]
        if portion and not self.transport.is_closing() and not self._deaf:
            super().data_received(portion)
        if self.conn.handshake_exc is not None and not self.handshake_initiated:
            # headers that are too many or too long: uvicorn would neither answer nor close
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()
        if self.read_paused or self.transport.is_closing():
            return
        if self._unparsed:
            self.transport.pause_reading()
            self.loop.call_soon(self._parse)
        else:
            self.transport.resume_reading()

    async def receive(self) -> Any:
        """Return the next message; the client is read again when there is none left."""
        message = await self.queue.get()
        if self.read_paused and self.queue.empty():
            self.read_paused = False
            self._parse()
        return message

    async def send(self, message: Any) -> None:
        """Send; then the answer to a close may be among what is not parsed yet."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # a refusal ends the handshake: uvicorn would log an error for each
        elif self.close_sent and self._deaf:
            self._end_writing()  # the answer to the close is not read either
        elif self.close_sent and self._unparsed:
            self._parse()

    def handle_connect(self, event: Request) -> None:
        """Count the connections."""
        super().handle_connect(event)
        if not self.close_sent:
            count = sum(isinstance(each, BoundedWebSocket) for each in self.connections)
            self.scope["state"]["connections"] = count

    def handle_cont(self, event: Frame) -> None:
        """Bound the fragments of a message: empty ones have no size that would do it."""
        if self.close_sent or self._deaf:
            return
        if len(self.frames) >= _MOST_FRAGMENTS:
            self._hear_no_more(f"in at most {_MOST_FRAGMENTS} fragments")
        else:
            super().handle_cont(event)

    def handle_parser_exception(self) -> None:
        """Close for what is no WebSocket; tell the application of a message that is too big."""
        if not isinstance(self.conn.parser_exc, PayloadTooBig):
            super().handle_parser_exception()
            return
        self.handle_events()  # what came before it
        self._hear_no_more(f"of at most {self.config.ws_max_size} bytes")

    def _hear_no_more(self, wanted: str) -> None:
        """Read nothing any more, and say what a message should be."""
        self._deaf, self.frames = True, []
        if self.close_sent:
            self._end_writing()
        else:
            notice: Any = {"type": "websocket.receive", "too_big": wanted}
            self.queue.put_nowait(notice)

    def _end_writing(self) -> None:
        """Nothing follows; what the client still sends is dropped, as closing at once could lose what it was told."""
        if not self.transport.is_closing():
            self.transport.write_eof()

    def handle_ping(self) -> None:
        """Answer when the client reads answers, and then only the latest, so that they do not pile up."""
        if pongs := self.conn.data_to_send():  # of all pings of a portion
            self._pong = b"".join(pongs)
        if self.writable.is_set():
            self.resume_writing()

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        pong, self._pong = self._pong, b""
        if pong and not self.close_sent:
            self.transport.write(pong)

    async def run_asgi(self) -> None:
        """Cut the connection off if its end is not taken: what is not read would keep it for ever."""
        await super().run_asgi()
        self.loop.call_later(self.close_timeout, self._cut_off)

    def _cut_off(self) -> None:
        if not self.disconnected:
            self.transport.abort()
