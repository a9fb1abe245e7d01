"""Starts the service of an exported recogniser, and ends it so that what was said is told. No torch."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import uvicorn

from apps.speech.server.app import JsonFormatter, build
from apps.speech.server.websocket import WebSocketProtocol
from kdcore.listening import listening_socket

if TYPE_CHECKING:
    from fastapi import FastAPI

    from apps.speech.runtime import Recognizer
    from apps.speech.server.settings import ServeSettings


class Server(uvicorn.Server):
    """A server whose live streams are told what they said before their connections end."""

    def __init__(self, application: FastAPI, settings: ServeSettings, announce: Callable[[], None]) -> None:
        WebSocketProtocol.max_message = settings.max_message
        WebSocketProtocol.max_connections = settings.max_connections
        self._application, self._announce = application, announce
        super().__init__(
            uvicorn.Config(
                application,
                http="httptools",
                ws=WebSocketProtocol,
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
            self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish live streams, then what else was begun."""
        await self._application.state.service.drain()
        await super().shutdown(sockets)


def serve(recognizer: Recognizer, settings: ServeSettings, announce: Callable[[str], None]) -> int:
    """Serve until SIGTERM or SIGINT, then finish what was begun; return the exit code.

    Raises:
        UserError: the address cannot be had.
    """
    _configure_logging()
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


def _configure_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
