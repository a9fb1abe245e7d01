"""The application of one worker: FastAPI's routes, the front before them, and what is opened and closed around them."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

import faiss
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from apps.recsys.events import EventStore
from apps.recsys.serve.catalogue import Catalogue
from apps.recsys.serve.front import Front
from apps.recsys.serve.guard import Guard, read_admin_key, read_keys
from apps.recsys.serve.logs import EventLines
from apps.recsys.serve.metrics import Metrics
from apps.recsys.serve.model import ServedModel
from apps.recsys.serve.openapi import describe
from apps.recsys.serve.protocol import BoundedProtocol
from apps.recsys.serve.schema import MAX_ID
from apps.recsys.serve.service import Service
from apps.recsys.serve.settings import ServeSettings
from apps.recsys.serve.shadow import Shadow
from apps.recsys.serve.workers import Crew
from kdcore import __version__
from kdcore.bounded_http import sweep
from kdcore.json_logs import configure_logging

# the page may load itself and nothing else
_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # noqa: E501
_PAGES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}


def create() -> Front:
    """Return the ASGI application of a worker whose settings the parent left in the environment."""
    return build(ServeSettings.from_environment())


def build(settings: ServeSettings) -> Front:
    """Return the ASGI application of one worker; it loads the model when the server starts it."""
    configure_logging()
    faiss.omp_set_num_threads(settings.threads)
    BoundedProtocol.receive_timeout = settings.receive_timeout
    BoundedProtocol.max_connections = settings.max_connections
    metrics, lines = Metrics(Path(settings.state) / "metrics"), EventLines()
    keys = read_keys(Path(settings.api_keys)) if settings.api_keys else []
    admin = read_admin_key(Path(settings.admin_key)) if settings.admin_key else None
    # every worker sees its share of the requests
    guard = Guard(keys, admin, settings.rate_limit / settings.workers if settings.rate_limit else None)
    application = FastAPI(title="kdsuite recommender", version=__version__, docs_url=None, redoc_url=None)
    front = Front(application, guard, metrics, lines, max_body=settings.max_body, log_all=settings.log == "all")
    application.router.lifespan_context = _lifespan(settings, front, metrics, guard, lines)
    _add_routes(application)
    _add_catalogue(application)
    _add_pages(application)
    describe(application)
    front.paths = {getattr(route, "path", "") for route in application.routes}
    front.admin_paths = {"/v1/reload"}
    return front


def _lifespan(settings: ServeSettings, front: Front, metrics: Metrics, guard: Guard, lines: EventLines) -> Any:
    @asynccontextmanager
    async def lifespan(application: FastAPI) -> AsyncIterator[None]:
        started = time.perf_counter()
        service = Service(
            settings,
            ServedModel(
                Path(settings.model), index=settings.index, cache=settings.cache_folder, recall=settings.recall
            ),
            metrics,
            guard,
            Crew(Path(settings.state) / "workers"),
            EventStore(settings.events) if settings.events else None,
            _shadow(settings, metrics),
        )

        def told(model: ServedModel) -> None:
            front.model_version, front.index = model.version, model.index_kind
            lines.event("model", model_version=model.version, label=model.about["label"], index=model.index_kind)

        service.on_model = told
        told(service.model)
        service.crew.report(service.crew.target(), service.model.version)
        service.crew.changed()
        front.posts = {
            "/v1/recommend": service.recommend,
            "/v1/events": service.store,
            "/v1/reload": service.reload,
        }
        front.at_once = {"/v1/recommend": service.at_once}
        BoundedProtocol.direct = {path.encode(): front.direct(path) for path in front.at_once}
        application.state.service = service
        background = [asyncio.create_task(sweep()), asyncio.create_task(service.keep_up())]
        gc.collect()
        gc.freeze()  # what is loaded by now stays: the collector need not look at it again
        lines.event("started", seconds=round(time.perf_counter() - started, 3))
        try:
            yield
        finally:
            for task in background:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            await service.close()
            lines.event("stopped")
            lines.flush()

    return lifespan


def _shadow(settings: ServeSettings, metrics: Metrics) -> Shadow | None:
    if settings.shadow is None:
        return None
    cache = settings.cache_folder
    return Shadow(
        ServedModel(Path(settings.shadow), index=settings.index, cache=cache, recall=settings.recall), metrics
    )


def _add_routes(application: FastAPI) -> None:
    text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @application.get("/healthz", tags=["operations"])
    async def healthz(request: Request) -> JSONResponse:
        """The process answers."""
        return _answer(request, {"status": "ok"})

    @application.get("/readyz", tags=["operations"])
    async def readyz(request: Request) -> JSONResponse:
        """It has a model and is not about to stop."""
        ready = request.app.state.service.ready
        return _answer(request, {"status": "ready" if ready else "stopping"}, 200 if ready else 503)

    @application.get("/metrics", tags=["operations"], response_class=Response, responses=text)  # type: ignore[arg-type]
    async def metrics(request: Request) -> Response:
        """What Prometheus reads, summed over the workers."""
        text, kind = request.app.state.service.metrics.text()
        return Response(text, headers={"content-type": kind})

    @application.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        codes = {404: "not_found", 405: "method_not_allowed"}
        about = {"code": codes.get(error.status_code, "refused"), "message": str(error.detail)}
        return _answer(request, {"error": about}, error.status_code, dict(error.headers or {}))

    @application.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        about = {"code": "invalid", "message": first["msg"], "field": str(first["loc"][-1])}
        return _answer(request, {"error": about}, 422)


def _add_catalogue(application: FastAPI) -> None:
    """Add what the page looks up."""

    @application.get("/v1/model", tags=["model"])
    async def model(request: Request) -> JSONResponse:
        """The model that answers: what it is, what it was measured at, what it can be asked."""
        service = request.app.state.service
        return _answer(request, {**Catalogue(service.model).about(), "events": service.events is not None})

    @application.get("/v1/items", tags=["model"])
    async def items(
        request: Request,
        query: str = Query("", max_length=100, description="part of a title or id; empty: the most popular"),
        limit: int = Query(10, ge=1, le=100),
    ) -> JSONResponse:
        """Items whose title or id holds a text, the most popular first."""
        catalogue = Catalogue(request.app.state.service.model)
        return _answer(request, {"items": await asyncio.to_thread(catalogue.items, query, limit)})

    @application.get("/v1/users", tags=["model"])
    async def users(
        request: Request,
        query: str = Query("", max_length=100, description="beginning of an id; empty: some users"),
        limit: int = Query(10, ge=1, le=100),
    ) -> JSONResponse:
        """Users whose id begins with a text, and how much each had."""
        catalogue = Catalogue(request.app.state.service.model)
        return _answer(request, {"users": await asyncio.to_thread(catalogue.users, query, limit)})

    @application.get("/v1/history", tags=["model"])
    async def history(request: Request, user_id: str = Query(min_length=1, max_length=MAX_ID)) -> JSONResponse:
        """What a user had last, newest first, stored events among it."""
        service = request.app.state.service
        found = Catalogue(service.model).history(user_id, await service.stored(user_id))
        if found is None:
            raise HTTPException(404, "unknown user")
        return _answer(request, {"user_id": user_id, "history": found})


def _answer(
    request: Request, content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> JSONResponse:
    service = request.app.state.service
    tail = {"model_version": service.model.version, "request_id": request.state.request_id}
    return JSONResponse({**content, **tail}, status, headers={"cache-control": "no-store", **(headers or {})})


def _add_pages(application: FastAPI) -> None:
    folder = resources.files("apps.recsys") / "pages"
    headers = {
        "content-security-policy": _POLICY,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        kind = _PAGES[file.name.rpartition(".")[2]]
        path = "/" if file.name == "index.html" else f"/{file.name}"
        content = file.read_bytes()

        def page(content: bytes = content, kind: str = kind) -> Response:
            return Response(content, media_type=kind, headers={**headers, "cache-control": "max-age=60"})

        application.add_api_route(path, page, methods=["GET"], include_in_schema=False)
