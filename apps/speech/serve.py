"""Starts the service of an exported recogniser, and ends it so that what was said is told. No torch."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvicorn

from apps.speech.server.app import build
from apps.speech.server.open_files import allow_open_files
from apps.speech.server.websocket import BoundedWebSocket
from kdcore.bounded_http import BoundedHttp, sweep
from kdcore.json_logs import configure_logging
from kdcore.listening import listening_socket

if TYPE_CHECKING:
    from fastapi import FastAPI

    from apps.speech.runtime import Recognizer
    from apps.speech.server.settings import ServeSettings


class Server(uvicorn.Server):
    """A server whose live streams are told what they said before their connections end."""

    def __init__(self, application: FastAPI, settings: ServeSettings, announce: Callable[[], None]) -> None:
        self._application, self._announce = application, announce
        self._http = BoundedHttp.limited(
            receive_timeout=settings.receive_seconds,
            send_timeout=settings.send_seconds,
            max_connections=settings.max_connections,
        )
        super().__init__(
            uvicorn.Config(
                application,
                http=self._http,
                ws=BoundedWebSocket,
                ws_max_size=settings.max_message,
                # compressed messages cost memory, and audio does not get smaller
                ws_per_message_deflate=False,
                # who is not read for a while because others are heard cannot answer; idle_seconds ends who is silent
                ws_ping_interval=None,
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        if self.started:
            self._sweeping = asyncio.create_task(sweep(self._http))
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish live streams, then what else was begun."""
        await self._application.state.service.drain()
        await super().shutdown(sockets)
        self._sweeping.cancel()


def serve(recognizer: Recognizer, settings: ServeSettings, announce: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT, then finish what was begun; return the exit code.

    Raises:
        UserError: the address cannot be had.
    """
    configure_logging()
    for name in ("uvicorn.error", "python_multipart"):  # a request has a line of its own, with what is wrong with it
        logging.getLogger(name).setLevel(logging.ERROR)
    allow_open_files(settings)
    listener = listening_socket(settings.host, settings.port)
    try:
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"http://{host}:{listener.getsockname()[1]}"
        server = Server(build(recognizer, settings), settings, lambda: announce(f"serving on {address}"))
        # when it has drained, uvicorn raises the signal it got once more, which would end this before it tidies up
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, _nothing)
        server.run(sockets=[listener])
        return 0 if server.started else 1
    finally:
        with suppress(OSError):
            listener.close()


def _nothing(number: int, frame: Any) -> None:
    """Take a signal that was heeded already."""
