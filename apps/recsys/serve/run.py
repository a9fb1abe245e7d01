"""Starts the service: checks and prepares everything first, then serves with one worker or several."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import uvicorn
from uvicorn.supervisors import Multiprocess

from apps.recsys.serve.guard import read_admin_key, read_keys
from apps.recsys.serve.settings import ServeSettings
from kdcore.json_logs import configure_logging
from kdcore.listening import listening_socket

Announce = Callable[[str], None]


def prepare(settings: ServeSettings, announce: Announce) -> None:
    """Check, prepare and index the model (and the shadow), so that workers only map files; UserError if it is bad."""
    from apps.recsys.serve.model import ServedModel

    for folder in filter(None, (settings.model, settings.shadow)):
        ServedModel(
            Path(folder),
            index=settings.index,
            cache=settings.cache_folder,
            recall=settings.recall,
            announce=announce,
        )


def serve(settings: ServeSettings, announce: Announce) -> int:
    """Serve until SIGTERM or SIGINT, then finish what was begun; return the exit code."""
    if settings.api_keys:
        read_keys(Path(settings.api_keys))
    if settings.admin_key:
        read_admin_key(Path(settings.admin_key))
    prepare(settings, announce)
    if settings.events:
        _try_events(settings.events)
    listener = listening_socket(settings.host, settings.port)
    state = Path(tempfile.mkdtemp(prefix="kd-serve-"))
    settings = replace(settings, state=str(state), port=listener.getsockname()[1])
    try:
        settings.to_environment()
        config = _config(settings)
        announce(f"serving on http://{settings.host}:{settings.port}")
        if settings.workers == 1:
            server = uvicorn.Server(config)
            # when it has drained, uvicorn raises the signal it got once more, which would end this before it tidies up
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, lambda number, frame: None)
            server.run(sockets=[listener])
            return 0 if server.started else 1
        configure_logging()
        supervisor = Multiprocess(config, sockets=[listener])
        supervisor.run()
        failed = [process for process in supervisor.processes if process.exitcode not in (0, None, -15)]
        return 1 if failed else 0
    finally:
        with suppress(OSError):
            listener.close()
        shutil.rmtree(state, ignore_errors=True)


def _try_events(url: str) -> None:
    """Open the event store once: what is wrong with it is said before anything listens."""
    from apps.recsys.events import EventStore

    EventStore(url).close()


def _config(settings: ServeSettings) -> uvicorn.Config:
    from apps.recsys.serve.protocol import BoundedProtocol

    return uvicorn.Config(
        "apps.recsys.serve.app:create",
        factory=True,
        http=BoundedProtocol,
        loop="uvloop",
        ws="none",
        lifespan="on",
        workers=settings.workers,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=30,
        # on a machine that has no time for it a worker may be slow to say that it lives: killing it helps nobody
        timeout_worker_healthcheck=60,
        timeout_graceful_shutdown=int(settings.drain_timeout),
        backlog=2048,
    )
