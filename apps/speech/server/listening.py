"""The WebSocket ``/v1/listen``: audio in, partial and final words out. No torch."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from apps.speech.features import SAMPLE_RATE
from apps.speech.server.metrics import Metrics
from apps.speech.server.origins import permitted
from apps.speech.server.sessions import Hub, Message, Session
from apps.speech.server.settings import ServeSettings, ServiceError
from apps.speech.server.sources import Source, source
from kdcore.config import UserError, nearest

# how a connection is closed for what went wrong
_CLOSE_CODES = {
    **{"invalid": 1008, "idle": 1008, "too_long": 1008, "unreadable": 1007},
    **{"too_large": 1009, "overloaded": 1013, "stopping": 1012, "internal": 1011},
}
_QUERY = ("format", "rate", "channels")


def check_client(websocket: WebSocket, settings: ServeSettings) -> None:
    """Raise ServiceError where a client may not connect: too many have, or the page it is may not."""
    if websocket.state.connections > settings.max_connections:
        raise ServiceError(503, "overloaded", "too many connections", headers={"retry-after": "5"})
    headers = websocket.headers
    if not permitted(headers.getlist("origin"), headers.get("host", ""), settings.allow_origins):
        raise ServiceError(403, "origin", "pages of this origin may not connect (--allow-origin lets them)")


async def listen(websocket: WebSocket, hub: Hub, settings: ServeSettings, metrics: Metrics) -> str:
    """Serve one client until its stream has ended; return how: "end", "gone", "unread" or the code of an error.

    Messages to the client are JSON: ``partial`` and ``final`` with ``text``, ``words``, ``start`` and ``end`` in
    seconds and ``heard``, the seconds of audio so far; then ``end``, with ``remarks`` where the audio is bad, or
    ``error`` with code and message.
    """
    try:
        await websocket.accept()
    except OSError:
        return "gone"
    try:
        session = hub.open(_source(websocket))
    except ServiceError as error:
        metrics.refusal(error.code)
        last = Message({"type": "error", "error": error.problem()}, True, error)
        return await _tell(websocket, last, settings) or error.code
    reader = asyncio.create_task(_read(websocket, session, settings))
    ended = "gone"
    try:
        ended = await _write(websocket, session, settings, metrics)
        return ended
    finally:
        metrics.stream(ended)
        hub.close(session)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


def _source(websocket: WebSocket) -> Source:
    """Return what reads the audio that the query announces; ServiceError for what is not offered."""
    query = websocket.query_params
    for name in query:
        if name in _QUERY and len(query.getlist(name)) > 1:
            raise ServiceError(422, "invalid", f"{name}: is given more than once", name)
        if name not in _QUERY:
            raise ServiceError(422, "invalid", f"unknown option {name[:40]!r}: {nearest(name[:40], _QUERY)}", name[:40])
    numbers = {}
    for name, otherwise in (("rate", SAMPLE_RATE), ("channels", 1)):
        text = query.get(name, str(otherwise))
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise ServiceError(422, "invalid", f"{name}: got {text[:40]!r}, wanted a number", name)
        numbers[name] = int(text)
    form = query.get("format", "pcm")
    if form != "pcm" and ("rate" in query or "channels" in query):
        raise ServiceError(
            422, "invalid", f"rate, channels: are for format=pcm; {form[:10]} states them itself", "rate"
        )
    try:
        return source(form[:40], **numbers)
    except UserError as error:
        raise ServiceError(422, "invalid", str(error), str(error).partition(":")[0]) from None


async def _read(websocket: WebSocket, session: Session, settings: ServeSettings) -> None:
    """Put what the client sends into its stream; it is not read while there is no room, nor kept for empty messages."""
    loop = asyncio.get_running_loop()
    until = loop.time() + settings.idle_seconds
    while True:
        try:
            async with asyncio.timeout_at(until):
                message = await websocket.receive()
            if message.get("bytes") == b"":
                if loop.time() < until:
                    continue
                raise TimeoutError  # messages that are there already are not waited for, so no timer would end it
        except TimeoutError:
            session.stop(ServiceError(408, "idle", f"no audio was sent for {settings.idle_seconds:g} s"))
            return
        if message["type"] == "websocket.disconnect":
            session.leave()
            return
        if wanted := message.get("too_big"):
            session.stop(ServiceError(413, "too_large", f"wanted messages {wanted}"))
            continue
        if (data := message.get("bytes")) is not None:
            await session.put(data)
            until = loop.time() + settings.idle_seconds
            continue
        try:
            asked = json.loads(message["text"])
            known = isinstance(asked, dict) and asked.get("type") == "stop"
        except (ValueError, RecursionError):
            known = False
        until = loop.time() + settings.idle_seconds
        session.stop(None if known else ServiceError(422, "invalid", 'wanted audio in binary, or {"type": "stop"}'))


async def _write(websocket: WebSocket, session: Session, settings: ServeSettings, metrics: Metrics) -> str:
    """Send what the stream says, and close when it has said everything."""
    while (message := await session.next()) is not None:
        if ended := await _tell(websocket, message, settings):
            return ended
        if message.since is not None:
            metrics.final(time.monotonic() - message.since)
    return "gone"


async def _tell(websocket: WebSocket, message: Message, settings: ServeSettings) -> str | None:
    """Send a message, and close after the last; return how the stream has ended, None where it goes on."""
    code = message.error.code if message.error else "end"
    try:
        async with asyncio.timeout(settings.send_seconds):
            await websocket.send_text(_text(message.content))
            if message.last:
                await websocket.close(_CLOSE_CODES.get(code, 1000), code)
    except TimeoutError:
        return "unread"
    except (WebSocketDisconnect, RuntimeError):
        return "gone"
    return code if message.last else None


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
