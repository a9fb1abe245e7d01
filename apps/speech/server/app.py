"""The application: routes, one shape of errors, a request id and a log line for each, the page."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.websockets import WebSocket

from apps.speech.device.folder import ABOUT
from apps.speech.server.listening import check_client, listen
from apps.speech.server.metrics import Metrics
from apps.speech.server.sessions import Hub
from apps.speech.server.settings import ServeSettings, ServiceError
from apps.speech.server.uploads import FORMATS, GRANULARITIES, Uploads
from kdcore import __version__
from kdcore.run import fingerprint

if TYPE_CHECKING:
    from apps.speech.runtime import Recognizer

# the page may load itself and nothing else
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # noqa: E501
_PAGES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_log = logging.getLogger("kdsuite.serve")


class Service:
    """What a running service consists of."""

    def __init__(self, recognizer: Recognizer, settings: ServeSettings) -> None:
        self.settings = settings
        self.folder = recognizer.folder
        about = self.folder.path / ABOUT
        self.version = fingerprint(about.read_bytes())
        self.created = int(about.stat().st_mtime)
        self.hub = Hub(recognizer, max_streams=settings.max_streams, max_seconds=settings.max_seconds)
        self.metrics = Metrics(lambda: len(self.hub.sessions), self.hub.heard)
        self.uploads = Uploads(recognizer, settings, self.metrics)

    async def drain(self) -> None:
        """Finish what was begun."""
        await self.hub.drain(self.settings.drain_seconds)

    def close(self) -> None:
        """End the threads."""
        self.hub.stop()
        self.uploads.close()

    def about(self) -> dict[str, Any]:
        """Return the model as the OpenAI API lists one."""
        return {"id": self.folder.name, "object": "model", "created": self.created, "owned_by": "kdsuite"}


def build(recognizer: Recognizer, settings: ServeSettings) -> FastAPI:
    """Return the application; its ``state.service`` is the ``Service``."""
    service = Service(recognizer, settings)

    @asynccontextmanager
    async def lifespan(application: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            service.close()

    application = FastAPI(
        title="kdsuite recogniser", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan
    )
    application.state.service = service
    _add_errors(application)
    _add_routes(application, service)
    _add_pages(application)
    application.add_middleware(Front)
    return application


class Front:
    """Gives every request an id, headers that browsers heed, and a line in the log."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        status, began = 0, time.perf_counter()

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                status = message["status"]
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            seconds = time.perf_counter() - began
            about = {"request_id": request_id, "path": scope["path"][:200], "ms": round(seconds * 1e3, 1)}
            ended = scope["state"].get("ended") or status
            _log.info("request", extra={"fields": {**about, "ended": ended}})


def _add_errors(application: FastAPI) -> None:
    @application.exception_handler(ServiceError)
    async def refused(request: Request, error: ServiceError) -> Response:
        return _refusal(request, error)

    @application.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        codes = {404: "not_found", 405: "method_not_allowed"}
        about = {"code": codes.get(error.status_code, "refused"), "message": str(error.detail)}
        return _answer(request, {"error": about}, error.status_code, dict(error.headers or {}))

    @application.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        about = {"code": "invalid", "message": first["msg"], "field": str(first["loc"][-1])}
        return _answer(request, {"error": about}, 422)

    @application.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # which nobody reads, but the log

    @application.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        about = {"code": "internal", "message": "the service failed; its log has the request id"}
        return _answer(request, {"error": about}, 500)


def _refusal(client: HTTPConnection, error: ServiceError) -> Response:
    client.app.state.service.metrics.refusal(error.code)
    return _answer(client, {"error": error.problem()}, error.status, error.headers)


def _answer(
    client: HTTPConnection, content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    service: Service = client.app.state.service
    tail = {"model_version": service.version, "request_id": client.state.request_id}
    return JSONResponse({**content, **tail}, status, headers={"cache-control": "no-store", **(headers or {})})


def _form_schema() -> dict[str, Any]:
    properties = {
        "file": {"type": "string", "format": "binary"},
        "model": {"type": "string", "description": "any: the service has one model"},
        "language": {"type": "string", "description": "repeated in verbose_json; the model has its own"},
        "response_format": {"type": "string", "enum": list(FORMATS), "default": "json"},
        "timestamp_granularities[]": {"type": "array", "items": {"type": "string", "enum": list(GRANULARITIES)}},
    }
    schema = {"type": "object", "required": ["file"], "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _add_routes(application: FastAPI, service: Service) -> None:
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"description": "an error, with code and message"} for status in (400, 408, 413, 415, 422, 503)
    }

    @application.get("/health")
    async def health(request: Request) -> Response:
        """Whether it takes streams, and how many it has."""
        hub = service.hub
        state = "stopping" if hub.stopping else "ok"
        about = {"status": state, "streams": len(hub.sessions), "max_streams": hub.max_streams}
        return _answer(request, {**about, "uploads": service.uploads.waiting}, 503 if hub.stopping else 200)

    @application.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics(request: Request) -> Response:
        """What Prometheus reads."""
        text, kind = service.metrics.text()
        return Response(text, headers={"content-type": kind, "cache-control": "no-store"})

    @application.get("/v1/models")
    async def models(request: Request) -> Response:
        """The one model."""
        return _answer(request, {"object": "list", "data": [service.about()]})

    @application.get("/v1/models/{name}", responses={404: {"description": "another model"}})
    async def model(request: Request, name: str) -> Response:
        """The model by its name."""
        if name != service.folder.name:
            raise HTTPException(404, "unknown model")
        return _answer(request, service.about())

    @application.post("/v1/audio/transcriptions", responses=refusals, openapi_extra=_form_schema())
    async def transcriptions(request: Request) -> Response:
        """Transcribe a file."""
        if service.hub.stopping:
            raise ServiceError(503, "stopping", "the service stops", headers={"connection": "close"})
        return await service.uploads.answer(request)

    @application.websocket("/v1/listen")
    async def listening(websocket: WebSocket) -> None:
        try:
            check_client(websocket, service.settings)
        except ServiceError as error:
            websocket.state.ended = error.code
            with suppress(OSError):  # whoever has gone need not be told
                await websocket.send_denial_response(_refusal(websocket, error))
            return
        websocket.state.ended = await listen(websocket, service.hub, service.settings, service.metrics)


def _add_pages(application: FastAPI) -> None:
    headers = {"content-security-policy": _POLICY, "referrer-policy": "no-referrer", "cache-control": "max-age=60"}
    folder = resources.files("apps.speech") / "pages"
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        kind = _PAGES[file.name.rpartition(".")[2]]
        path = "/" if file.name == "listen.html" else f"/{file.name}"

        def page(content: bytes = file.read_bytes(), kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers=headers)

        application.add_api_route(path, page, methods=["GET"], include_in_schema=False)
