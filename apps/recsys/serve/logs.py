"""The log lines of requests and events: JSON, written in batches."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from functools import lru_cache
from typing import Any, TextIO

_FLUSH_SECONDS = 0.25
_FLUSH_LINES = 512


@lru_cache(maxsize=4096)
def _quoted(text: str) -> str:
    return json.dumps(text)


class EventLines:
    """Lines that are collected for a moment and written together: a write a request would cost more than the request.

    What is kept is written within a quarter of a second, and when the service stops.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lines: list[str] = []
        self._timer: asyncio.TimerHandle | None = None
        self._end = f', "worker": {os.getpid()}}}'

    def request(
        self, request_id: str, endpoint: str, method: str, status: int, seconds: float, caller: str, code: str | None
    ) -> None:
        """Note one request; nothing a client sent stands in the line unescaped."""
        error = f', "code": "{code}"' if code else ""
        # a request id has no sign that JSON escapes, endpoint and code are ours, a caller is a key's name or an address
        self._add(
            f'{{"time": {time.time():.3f}, "event": "request", "request_id": "{request_id}", "endpoint": "{endpoint}", '
            f'"method": {_quoted(method)}, "status": {status}, "ms": {seconds * 1e3:.3f}, '
            f'"caller": {_quoted(caller)}{error}{self._end}'
        )

    def event(self, event: str, **fields: Any) -> None:
        """Note something that is no request."""
        line = {"time": round(time.time(), 3), "event": event, **fields, "worker": os.getpid()}
        self._add(json.dumps(line, ensure_ascii=False))

    def flush(self) -> None:
        """Write what is kept."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._lines:
            text, self._lines = "\n".join(self._lines) + "\n", []
            self._stream.write(text)
            self._stream.flush()

    def _add(self, line: str) -> None:
        self._lines.append(line)
        if len(self._lines) >= _FLUSH_LINES:
            self.flush()
        elif self._timer is None:
            try:
                self._timer = asyncio.get_running_loop().call_later(_FLUSH_SECONDS, self.flush)
            except RuntimeError:  # no loop: nothing would write it later
                self.flush()
