"""What every request passes: limits, keys, a request id, errors in one shape, a log line, a count.

The POST endpoints are answered here, from bytes to bytes; everything else goes on to the FastAPI application, under the
same rules. FastAPI's own way from request to function and back costs more than an approximate search of a million
items.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from apps.recsys.serve.guard import Guard
from apps.recsys.serve.logs import EventLines
from apps.recsys.serve.metrics import Metrics
from apps.recsys.serve.schema import Failure, ServiceError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
# (body, request id, key) -> body of the answer
Endpoint = Callable[[bytes, str, bytes | None], Awaitable[bytes]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_JSON = (b"content-type", b"application/json")
_SAFE = [(b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store")]
_log = logging.getLogger("kdsuite.serve")


_DIRECT = (
    b"HTTP/1.1 200 OK\r\n%bcontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n"
    b"x-content-type-options: nosniff\r\ncache-control: no-store\r\n\r\n%b"
)


class _Disconnected(Exception):
    """The client went away before its request had arrived."""


class Head:
    """The headers that matter, found in one pass."""

    __slots__ = ("address", "key", "length", "request_id", "type")

    def __init__(self, headers: list[tuple[bytes, bytes]], client: tuple[str, int] | None) -> None:
        self.key: bytes | None = None
        self.request_id: bytes | None = None
        self.type = self.length = b""
        self.address: str = client[0] if client else ""
        for name, value in headers:
            if name == b"content-type":
                self.type = value
            elif name == b"content-length":
                self.length = value
            elif name == b"authorization":
                scheme, _, key = value.partition(b" ")
                if scheme.lower() == b"bearer":
                    self.key = key.strip()
            elif name == b"x-api-key":
                self.key = value
            elif name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                self.request_id = value


class Front:
    """The ASGI application that is served."""

    def __init__(
        self,
        application: Application,
        guard: Guard,
        metrics: Metrics,
        lines: EventLines,
        *,
        max_body: int,
        log_all: bool = True,
    ) -> None:
        """Take the application behind, and what every request is held against."""
        self._application, self._guard, self._metrics, self._lines = application, guard, metrics, lines
        self._max_body, self._log_all = max_body, log_all
        self.posts: dict[str, Endpoint] = {}
        # those of them that can mostly be answered without waiting: they return None where not
        self.at_once: dict[str, Callable[[bytes, str], bytes | None]] = {}
        # paths of the application that are counted by name; any other is counted as "other"
        self.paths: set[str] = set()
        # paths that need another key, which they check themselves
        self.admin_paths: set[str] = set()
        # what stands in answers and counts beside the endpoint
        self.model_version, self.index = "", "none"
        self._prefix, self._counter = secrets.token_hex(6), itertools.count()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        started = time.perf_counter()
        head, path, code = Head(scope["headers"], scope.get("client")), scope["path"], None
        request_id, caller = self._request_id(head), head.address
        try:
            if path.startswith("/v1/") and not self._guard.open:
                if path not in self.admin_paths:
                    caller = self._guard.caller(head.key, head.address)
                self._guard.admit(caller)
            endpoint = self.posts.get(path)
            if endpoint is None:
                status = await self._pass_on(scope, receive, send, request_id)
            else:
                body = await self._body(scope["method"], head, receive)
                answer = await endpoint(body, request_id, head.key)
                status = 200
                await _send(send, status, answer, request_id)
        except _Disconnected:
            status, code = 499, "disconnected"
        except ServiceError as error:
            status, code = error.status, error.code
            await _send(send, status, self._failure(error, request_id), request_id, error.headers)
        except Exception:  # a defect: say so to the client, and all of it to the log
            _log.exception("request %s failed", request_id)
            status, code = 500, "internal"
            failure = ServiceError(500, "internal", "the service failed; its log has the request id")
            await _send(send, status, self._failure(failure, request_id), request_id)
        name = path if path in self.posts or path in self.paths else "other"
        self._note(request_id, name, scope["method"], status, time.perf_counter() - started, caller, code)

    def direct(self, path: str) -> Callable[[list[tuple[bytes, bytes]], Any, bytes, bytes], bytes | None]:
        """Return what gives a whole HTTP answer to a POST request to ``path``, or None where it has to be waited for.

        It takes the headers, the client's address, the body, and header lines to add. Whatever is not a plain success
        is left to the long way, which says what is wrong.
        """
        now = self.at_once[path]

        def answer(headers: list[tuple[bytes, bytes]], client: Any, body: bytes, common: bytes) -> bytes | None:
            started = time.perf_counter()
            head = Head(headers, client)
            if head.type != b"application/json":
                return None
            request_id, caller = self._request_id(head), head.address
            try:
                if not self._guard.open:
                    caller = self._guard.caller(head.key, caller)
                found = now(body, request_id)
                if found is None:
                    return None
                self._guard.admit(caller)  # last: what goes the long way is counted there
            except ServiceError:
                return None
            self._note(request_id, path, "POST", 200, time.perf_counter() - started, caller, None)
            return _DIRECT % (common, len(found), request_id.encode("ascii"), found)

        return answer

    def _request_id(self, head: Head) -> str:
        """Return the client's request id, or a new one."""
        given = head.request_id
        return given.decode("ascii") if given is not None else f"{self._prefix}-{next(self._counter):x}"

    def _note(
        self, request_id: str, name: str, method: str, status: int, seconds: float, caller: str, code: str | None
    ) -> None:
        self._metrics.request(name, status, self.index, seconds)
        if self._log_all or status >= 400:
            self._lines.request(request_id, name, method, status, seconds, caller, code)

    async def _body(self, method: str, head: Head, receive: Receive) -> bytes:
        """Return the body of a POST request; ServiceError for another method or type, or too much of it."""
        if method != "POST":
            raise ServiceError(405, "method_not_allowed", f"{method[:16]}: wanted POST", headers={"allow": "POST"})
        if head.type and head.type.partition(b";")[0].strip().lower() != b"application/json":
            raise ServiceError(415, "unsupported_media_type", "wanted content-type: application/json")
        if head.length.isdigit() and int(head.length) > self._max_body:
            raise self._too_large()
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Disconnected
        body: bytes = message.get("body", b"")
        if not message.get("more_body"):
            if len(body) > self._max_body:
                raise self._too_large()
            return body
        parts, size = [body], len(body)
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Disconnected
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body:
                raise self._too_large()
        return b"".join(parts)

    def _too_large(self) -> ServiceError:
        return ServiceError(413, "too_large", f"wanted at most {self._max_body} bytes", headers={"connection": "close"})

    async def _pass_on(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, request_id: str) -> int:
        """Let the application answer; return its status."""
        status = 500
        scope["state"]["request_id"] = request_id

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode("ascii"))]
            await send(message)

        await self._application(scope, receive, sending)
        return status

    def _failure(self, error: ServiceError, request_id: str) -> bytes:
        return msgspec.json.encode(Failure(error.problem(), request_id, self.model_version or None))


async def _send(send: Send, status: int, body: bytes, request_id: str, headers: dict[str, str] | None = None) -> None:
    head = [_JSON, (b"content-length", b"%d" % len(body)), (b"x-request-id", request_id.encode("ascii")), *_SAFE]
    if headers:
        head += [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
