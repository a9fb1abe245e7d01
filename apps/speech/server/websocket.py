"""uvicorn's WebSocket protocol, with bounds where it has none."""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame
from websockets.http11 import Request

# a connection whose end its client does not take is cut off after so long
_CLOSE_SECONDS = 2.0
_MOST_FRAGMENTS = 1024
# bytes that are parsed at once: 700 frames at the most, some ten milliseconds
_PORTION = 4096


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """Ends what a client would keep open or for itself, and counts the connections for the application.

    The application finds the number of live WebSocket connections in ``scope["state"]["connections"]``.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
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
        if portion and not self.transport.is_closing():
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
        if len(self.frames) >= _MOST_FRAGMENTS and not self.close_sent:
            self.conn.fail(CloseCode.MESSAGE_TOO_BIG, f"more than {_MOST_FRAGMENTS} fragments")
            self.handle_parser_exception()
        elif not self.close_sent:
            super().handle_cont(event)

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
