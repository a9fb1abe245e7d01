"""A server to put under load: the service or an empty handler in a process of its own."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcore.child_processes import ServerProcess

_EMPTY_BODY = json.dumps({"items": [0] * 78}).encode()  # 247 bytes


async def empty(scope: Any, receive: Any, send: Any) -> None:
    """Answer a constant: the ASGI application that measures the machine and uvicorn."""
    if scope["type"] != "http":
        return
    await receive()
    length = (b"content-length", b"%d" % len(_EMPTY_BODY))
    headers = [(b"content-type", b"application/json"), length]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": _EMPTY_BODY})


class Server(ServerProcess):
    """``kd recsys serve`` with some words, or (``bare``) the empty handler; it is there when it is ready."""

    def __init__(self, words: Sequence[str], folder: Path, cores: Sequence[int] | None, *, bare: bool = False) -> None:
        self._ready_path = "/" if bare else "/readyz"
        command = [sys.executable, "-m", "apps.cli", "recsys", "serve", "--port", "0", *words]
        if bare:
            options = ["--port", "0", "--loop", "uvloop", "--http", "httptools", "--no-access-log"]
            command = [sys.executable, "-m", "uvicorn", "apps.recsys.load_server:empty", *options]
        super().__init__(command, folder, cores)

    def wait_until_ready(self) -> None:
        """Return when its models are loaded."""
        while self.ask(self._ready_path)[0] != 200:
            time.sleep(0.01)

    def ask(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
        """Return status and answer of one request; status 0 where nobody listens yet."""
        data = None if body is None else json.dumps(body).encode()
        head = {"content-type": "application/json", **(headers or {})}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, head)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")
        except (urllib.error.URLError, ConnectionError):
            return 0, None
