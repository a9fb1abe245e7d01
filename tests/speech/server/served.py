"""A real server on loopback in a thread of the test, and a WebSocket client that is not ours."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import soundfile

from apps.speech.runtime import Recognizer
from apps.speech.serve import Server
from apps.speech.server.app import Service, build
from apps.speech.server.settings import ServeSettings
from kdcore.listening import listening_socket
from tests.speech.device.exported import export_tones

WAIT = 20.0


@dataclass
class Served:
    """A server that runs."""

    url: str
    server: Server
    service: Service
    recognizer: Recognizer

    @property
    def ws(self) -> str:
        return self.url.replace("http", "ws", 1) + "/v1/listen"

    def text(self, samples: np.ndarray) -> list[str]:
        """Return what the recogniser itself hears, segment by segment."""
        updates = self.recognizer.transcribe([samples])
        return [segment.text for update in updates for segment in update.final]


@contextmanager
def running(folder: Path, **settings: Any) -> Iterator[Served]:
    """Serve an exported folder until the block ends."""
    recognizer = Recognizer(folder)
    options = ServeSettings(port=0, **settings)
    application = build(recognizer, options)
    ready = threading.Event()
    server = Server(application, options, ready.set)
    listener = listening_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    assert ready.wait(WAIT)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield Served(url, server, application.state.service, recognizer)
    finally:
        server.should_exit = True
        thread.join(WAIT)
        assert not thread.is_alive(), "the server did not stop"


def exported(folder: Path) -> Path:
    return export_tones(folder / "tones")


def pcm(samples: np.ndarray) -> bytes:
    return np.clip(np.round(samples * 32768), -32768, 32767).astype("<i2").tobytes()


def heard_as(samples: np.ndarray) -> np.ndarray:
    """Return samples as they are after 16 bits."""
    return np.frombuffer(pcm(samples), "<i2").astype(np.float32) / 32768


def wav(samples: np.ndarray, rate: int = 16_000, **options: Any) -> bytes:
    handle = io.BytesIO()
    soundfile.write(handle, samples, rate, format=options.pop("format", "WAV"), **options)
    return handle.getvalue()


@dataclass
class Told:
    """What a client was told: all messages, and how its connection was closed."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    code: int | None = None

    @property
    def final(self) -> list[str]:
        return [message["text"] for message in self.messages if message["type"] == "final"]

    @property
    def last(self) -> dict[str, Any]:
        return self.messages[-1]


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
    async with aiohttp.ClientSession() as client, client.ws_connect(url, autoping=True, max_msg_size=0) as socket:
        yield socket


async def told(socket: aiohttp.ClientWebSocketResponse) -> Told:
    """Read until the server closes."""
    found = Told()
    async with asyncio.timeout(WAIT):
        async for message in socket:
            assert message.type == aiohttp.WSMsgType.TEXT, message
            found.messages.append(json.loads(message.data))
    found.code = socket.close_code
    return found


async def dictate(url: str, data: bytes, sizes: list[int] | int = 3200, *, stop: bool = True) -> Told:
    """Send bytes in packets (their sizes in turn), then stop; return what the server said."""
    turns = [sizes] if isinstance(sizes, int) else sizes
    async with connected(url) as socket:
        reading = asyncio.create_task(told(socket))
        at = turn = 0
        while at < len(data):
            size = turns[turn % len(turns)]
            try:
                await socket.send_bytes(data[at : at + size])
            except (ConnectionError, aiohttp.ClientError):
                break
            at, turn = at + size, turn + 1
        if stop and not socket.closed:
            await socket.send_str('{"type": "stop"}')
        return await reading
