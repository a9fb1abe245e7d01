"""WebSocket (RFC 6455) for uvicorn, with back-pressure: who is not listened to is not read, who does not read waits.

uvicorn brings none of its own. No extensions and no subprotocols, so a message is as long as its bytes on the wire.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.parse import unquote

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0, 1, 2, 8, 9, 10
# what is kept for the application before the socket is no longer read
_QUEUED_BYTES, _QUEUED_MESSAGES = 1 << 16, 16
# after a close frame the other side has so long to answer it
_CLOSE_SECONDS = 2.0
_log = logging.getLogger("kdsuite.serve")


class Violation(Exception):
    """What a client may not send; ``code`` is the close code for it."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class FrameReader:
    """Frames of a client to messages.

    ``feed`` yields (opcode, payload): text and binary messages put together from their fragments, and control frames
    as they stand between them.

    Raises:
        Violation: what is no frame of a client, text that is not UTF-8, a message of more than ``max_message`` bytes.
    """

    def __init__(self, max_message: int) -> None:
        self._max = max_message
        self._data = bytearray()
        self._kind: int | None = None
        self._parts: list[bytes] = []
        self._size = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """Take bytes and yield the messages that are complete."""
        self._data += data
        while (frame := self._next()) is not None:
            final, opcode, payload = frame
            if opcode >= _CLOSE:
                yield opcode, payload
                continue
            if opcode != _CONTINUATION:
                self._kind = opcode
            self._parts.append(payload)
            if final:
                whole, kind = b"".join(self._parts), self._kind
                self._kind, self._parts, self._size = None, [], 0
                if kind is None:
                    raise ValueError("kind: a continued message has no first frame")
                if kind == _TEXT:
                    _check_text(whole)
                yield kind, whole

    def _next(self) -> tuple[bool, int, bytes] | None:
        data = self._data
        if len(data) < 2:
            return None
        final, opcode, size = bool(data[0] & 0x80), data[0] & 0x0F, data[1] & 0x7F
        self._check(data[0], data[1])
        head = 2 + {126: 2, 127: 8}.get(size, 0)
        if len(data) < head + 4:
            return None
        if size >= 126:
            size = int.from_bytes(data[2:head], "big")
        if opcode < _CLOSE and self._size + size > self._max:
            raise Violation(1009, f"a message of more than {self._max} bytes")
        if len(data) < head + 4 + size:
            return None
        mask, payload = bytes(data[head : head + 4]), bytes(data[head + 4 : head + 4 + size])
        del data[: head + 4 + size]
        if opcode < _CLOSE:
            self._size += size
            if len(self._parts) >= 1024:
                raise Violation(1009, "a message of more than 1024 frames")
        return final, opcode, masked(payload, mask)

    def _check(self, first: int, second: int) -> None:
        opcode = first & 0x0F
        if first & 0x70:
            raise Violation(1002, "reserved bits are set")
        if opcode not in (_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG):
            raise Violation(1002, f"unknown opcode {opcode}")
        if not second & 0x80:
            raise Violation(1002, "a frame of a client without a mask")
        if opcode >= _CLOSE and (not first & 0x80 or second & 0x7F > 125):
            raise Violation(1002, "a control frame that is long or in fragments")
        if (opcode == _CONTINUATION) != (self._kind is not None) and opcode < _CLOSE:
            raise Violation(1002, "fragments out of order")


def _check_text(data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError:
        raise Violation(1007, "text that is not UTF-8") from None


def masked(payload: bytes, mask: bytes) -> bytes:
    """Return the payload with the four bytes of the mask applied over and over; twice gives it back."""
    size = len(payload)
    if not size:
        return b""
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")


def frame(opcode: int, payload: bytes) -> bytes:
    """Return a frame of a server: whole, not masked."""
    size = len(payload)
    if size < 126:
        head = bytes([0x80 | opcode, size])
    elif size < 1 << 16:
        head = bytes([0x80 | opcode, 126]) + size.to_bytes(2, "big")
    else:
        head = bytes([0x80 | opcode, 127]) + size.to_bytes(8, "big")
    return head + payload


class WebSocketProtocol(asyncio.Protocol):
    """One connection; uvicorn's HTTP protocol hands it over with the request that asks for it."""

    max_message: ClassVar[int] = 1 << 20
    max_connections: ClassVar[int] = 1024
    live: ClassVar[set[WebSocketProtocol]] = set()

    def __init__(self, config: Any, server_state: Any, app_state: dict[str, Any], _loop: Any = None) -> None:
        self._config, self._server, self._app_state = config, server_state, app_state
        self._reader = FrameReader(self.max_message)
        self._waiting: deque[dict[str, Any]] = deque([{"type": "websocket.connect"}])
        self._queued = 0
        self._arrived = asyncio.Event()
        self._arrived.set()
        self._writable = asyncio.Event()
        self._writable.set()
        self._reading = True
        self._key = b""
        # "asked", "open", "closing" (a close frame was sent), "closed"
        self._stage = "asked"
        self._began = False

    def connection_made(self, transport: Any) -> None:
        """Take over the connection."""
        self.transport = transport
        transport.set_write_buffer_limits(high=1 << 16)
        self._server.connections.add(self)
        self.live.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the application, and whoever waits to write."""
        self._server.connections.discard(self)
        self.live.discard(self)
        self._writable.set()
        if self._stage != "closed":
            self._end(1006 if self._stage != "closing" else 1000)
        self._stage = "closed"

    def data_received(self, data: bytes) -> None:
        """Take the request first, then frames."""
        if not self._began:
            self._began = True
            self._open(data)
            return
        if self._stage == "asked":
            self._refuse(400, "frames before the connection is open")
            return
        try:
            for opcode, payload in self._reader.feed(data):
                self._take(opcode, payload)
                if self._stage == "closed":
                    return
        except Violation as problem:
            self._close(problem.code, problem.reason)
            self._end(problem.code)
            self.transport.close()
        self._pace()

    def _open(self, data: bytes) -> None:
        head, _, _ = data.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        method, _, rest = first.partition(b" ")
        target = rest.rpartition(b" ")[0]
        headers = [(name.strip().lower(), value.strip()) for name, _, value in (line.partition(b":") for line in lines)]
        about = dict(headers)
        self._key = about.get(b"sec-websocket-key", b"")
        try:
            whole = len(base64.b64decode(self._key, validate=True)) == 16
        except binascii.Error:
            whole = False
        if method != b"GET" or not whole or about.get(b"sec-websocket-version") != b"13":
            self._refuse(400, "no WebSocket request of version 13")
            return
        if len(self.live) > self.max_connections:
            self._refuse(503, "too many connections")
            return
        path, _, query = target.partition(b"?")
        scope = {
            "type": "websocket",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "scheme": "ws",
            "server": self.transport.get_extra_info("sockname"),
            "client": self.transport.get_extra_info("peername"),
            "root_path": "",
            "path": unquote(path.decode("latin-1")),
            "raw_path": path,
            "query_string": query,
            "headers": headers,
            "subprotocols": [],
            "state": self._app_state.copy(),
        }
        task = asyncio.get_running_loop().create_task(self._run(scope))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    async def _run(self, scope: dict[str, Any]) -> None:
        try:
            await self._config.loaded_app(scope, self._receive, self._send)
        except Exception:  # a defect: all of it to the log
            _log.exception("a WebSocket connection failed")
        if self._stage == "asked":
            self._refuse(500, "the service failed")
        elif self._stage == "open":
            self._close(1011, "the service failed")
            self.transport.close()

    def _take(self, opcode: int, payload: bytes) -> None:
        if opcode == _CLOSE:
            code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else 1005
            if self._stage == "open":
                # 1005 stands for no code, and is never sent
                self._close(1000 if code == 1005 else code if 1000 <= code < 5000 else 1002, "")
            self._end(code)
            self.transport.close()
        elif self._stage != "open":
            return  # the application has closed: nobody is interested
        elif opcode == _PING:
            self.transport.write(frame(_PONG, payload))
        elif opcode in (_TEXT, _BINARY):
            value = {"text": payload.decode()} if opcode == _TEXT else {"bytes": payload}
            self._queued += len(payload)
            self._waiting.append({"type": "websocket.receive", **value})
            self._arrived.set()

    def _end(self, code: int) -> None:
        """The application hears it once."""
        if self._stage != "closed":
            self._stage = "closed"
            self._waiting.append({"type": "websocket.disconnect", "code": code})
            self._arrived.set()

    async def _receive(self) -> dict[str, Any]:
        while not self._waiting:
            self._arrived.clear()
            await self._arrived.wait()
        message = self._waiting.popleft()
        self._queued -= len(message.get("bytes") or message.get("text", "").encode())
        self._pace()
        return message

    def _pace(self) -> None:
        """Read the socket only while the application takes what comes and the client takes what goes."""
        full = self._queued > _QUEUED_BYTES or len(self._waiting) > _QUEUED_MESSAGES
        wanted = self._stage == "closing" or (not full and self._writable.is_set())
        if wanted != self._reading and self._stage in ("open", "closing") and not self.transport.is_closing():
            self._reading = wanted
            (self.transport.resume_reading if wanted else self.transport.pause_reading)()

    async def _send(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "websocket.accept" and self._stage == "asked":
            accept = base64.b64encode(hashlib.sha1(self._key + _GUID, usedforsecurity=False).digest())
            self.transport.write(
                b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: Upgrade\r\n"
                b"sec-websocket-accept: " + accept + b"\r\n\r\n"
            )
            self._stage = "open"
        elif kind == "websocket.send" and self._stage == "open":
            text = message.get("text")
            self.transport.write(frame(_BINARY, message["bytes"]) if text is None else frame(_TEXT, text.encode()))
        elif kind == "websocket.close" and self._stage == "asked":
            self._refuse(403, "refused")
        elif kind == "websocket.close" and self._stage == "open":
            self._close(message.get("code", 1000), message.get("reason") or "")
            self._pace()
        if not self._writable.is_set():
            await self._writable.wait()

    def _close(self, code: int, reason: str) -> None:
        """Send a close frame; the connection ends when it is answered, or after a while."""
        if self._stage in ("open", "asked"):
            text = reason.encode()[:123].decode(errors="ignore").encode()
            self.transport.write(frame(_CLOSE, code.to_bytes(2, "big") + text))
            self._stage = "closing"
            asyncio.get_running_loop().call_later(_CLOSE_SECONDS, self._give_up)

    def _give_up(self) -> None:
        """The other side does not answer, and perhaps does not read either."""
        if self in self.live:
            self.transport.abort()

    def abort(self) -> None:
        """End the connection at once."""
        self.transport.abort()

    def _refuse(self, status: int, reason: str) -> None:
        """Answer the request with an error instead of a connection."""
        body = b'{"error": {"code": "refused", "message": "' + reason.encode() + b'"}}'
        self.transport.write(
            b"HTTP/1.1 %d \r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (status, len(body), body)
        )
        self._end(1006)
        self.transport.close()

    def pause_writing(self) -> None:
        """The client does not read."""
        self._writable.clear()
        self._pace()

    def resume_writing(self) -> None:
        """It reads again."""
        self._writable.set()
        self._pace()

    def shutdown(self) -> None:
        """The server stops; the application has had its time to finish the stream."""
        if self._stage == "asked":
            self._refuse(503, "stopping")
        elif self._stage == "open":
            self._close(1012, "stopping")
            self._end(1012)
            self.transport.close()
