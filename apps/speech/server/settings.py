"""How the service is run, and what it refuses with: settings, errors in the form of every answer. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ServeSettings:
    """One service.

    Attributes:
        max_streams: live streams at once; one more is refused.
        max_connections: WebSocket connections at once, those among them that are being refused, and as many of HTTP.
        jobs: uploaded files that are heard at once; the others take turns with them, by seconds of audio.
        max_waiting: uploads that may be there beside those; one more is refused. What still arrives is not counted.
        max_upload: bytes of a request with a file.
        max_seconds: of audio of one file or one stream.
        max_message: bytes of a WebSocket message.
        idle_seconds: a stream that sends no audio for so long is ended; empty messages are none.
        receive_seconds: how long the head of a request may take, and an upload may pause or lag behind 1 kB/s.
        send_seconds: how long a client may leave an answer unread.
        drain_seconds: what a stopping service finishes its work in.
        allow_origins: origins of pages elsewhere that may open a stream, as ``origins.origin`` returns them.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    max_streams: int = 64
    max_connections: int = 1024
    jobs: int = 1
    max_waiting: int = 16
    max_upload: int = 100 << 20
    max_seconds: float = 7200.0
    max_message: int = 1 << 20
    idle_seconds: float = 30.0
    receive_seconds: float = 30.0
    send_seconds: float = 10.0
    drain_seconds: float = 30.0
    allow_origins: tuple[str, ...] = ()


class ServiceError(Exception):
    """What the service says instead of an answer: status of HTTP, code for programs, message for people."""

    def __init__(
        self, status: int, code: str, message: str, field: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.field = status, code, field
        self.headers = headers or {}

    def problem(self) -> dict[str, Any]:
        """Return the ``error`` object of an answer."""
        about = {"code": self.code, "message": str(self)}
        return about | ({"field": self.field} if self.field else {})
