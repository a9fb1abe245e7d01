"""The WebSocket ``/v1/listen``: audio in, partial and final words out."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from apps.speech.features import SAMPLE_RATE
from apps.speech.server.sessions import Hub, Session
from apps.speech.server.settings import ServeSettings, ServiceError
from apps.speech.server.sources import Source, source
from kdcore.config import UserError, nearest

# how a connection is closed for what went wrong
_CLOSE_CODES = {
    **{"invalid": 1008, "idle": 1008, "too_long": 1008, "unreadable": 1007},
    **{"overloaded": 1013, "stopping": 1012, "internal": 1011},
}
_QUERY = ("format", "rate", "channels")


async def listen(websocket: WebSocket, hub: Hub, settings: ServeSettings) -> str:
    """Serve one client until its stream has ended; return how: "end", "gone", "unread" or the code of an error.

    Messages to the client are JSON: ``partial`` and ``final`` with ``text``, ``words``, ``start`` and ``end`` in
    seconds and ``heard``, the seconds of audio so far; then ``end``, or ``error`` with code and message.
    """
    await websocket.accept()
    try:
        session = hub.open(_source(websocket))
    except ServiceError as error:
        return await _refuse(websocket, error)
    reader = asyncio.create_task(_read(websocket, session, settings))
    try:
        return await _write(websocket, session, settings)
    finally:
        hub.close(session)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


def _source(websocket: WebSocket) -> Source:
    """Return what reads the audio that the query announces; ServiceError for what is not offered."""
    query = websocket.query_params
    for name in query:
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


async def _refuse(websocket: WebSocket, error: ServiceError) -> str:
    try:
        await websocket.send_text(_text({"type": "error", "error": error.problem()}))
        await websocket.close(_CLOSE_CODES[error.code], error.code)
    except (WebSocketDisconnect, RuntimeError):
        return "gone"
    return error.code


async def _read(websocket: WebSocket, session: Session, settings: ServeSettings) -> None:
    """Put what the client sends into its stream; it is not read while there is no room."""
    while True:
        try:
            message = await asyncio.wait_for(websocket.receive(), settings.idle_seconds)
        except TimeoutError:
            session.stop(ServiceError(408, "idle", f"nothing was sent for {settings.idle_seconds:g} s"))
            return
        if message["type"] == "websocket.disconnect":
            session.leave()
            return
        if (data := message.get("bytes")) is not None:
            await session.put(data)
            continue
        try:
            asked = json.loads(message["text"])
            known = isinstance(asked, dict) and asked.get("type") == "stop"
        except (ValueError, RecursionError):
            known = False
        session.stop(None if known else ServiceError(422, "invalid", 'wanted audio in binary, or {"type": "stop"}'))


async def _write(websocket: WebSocket, session: Session, settings: ServeSettings) -> str:
    """Send what the stream says, and close when it has said everything."""
    while (message := await session.next()) is not None:
        try:
            await asyncio.wait_for(websocket.send_text(_text(message.content)), settings.send_seconds)
        except TimeoutError:
            return "unread"
        except (WebSocketDisconnect, RuntimeError):
            return "gone"
        if message.last:
            code = message.error.code if message.error else "end"
            await websocket.close(_CLOSE_CODES.get(code, 1000), code)
            return code
    return "gone"


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))
