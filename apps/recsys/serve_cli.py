"""The commands of serving: ``serve`` and ``export-events``; everything heavy is imported when they are called."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from kdcore.command_line import example
from kdcore.config import UserError

_INDEXES = ("auto", "exact", "int8", "hnsw", "ivfpq")


def add_serve(verbs: Any) -> None:
    """Add ``serve``."""
    parser = verbs.add_parser(
        "serve",
        help="answer over HTTP with an exported model; needs no torch",
        description="Serve an exported model: recommendations, stored events, metrics, and a page to try it at /.",
        epilog=example(
            "kd recsys serve --model exported --port 8000",
            "kd recsys serve --model exported --index hnsw --workers 2 --api-keys keys.txt --admin-key admin.txt",
            "curl -s localhost:8000/v1/recommend -H 'content-type: application/json' -d '{\"user_id\": 196, \"k\": 5}'",
        ),
    )
    parser.add_argument("--model", type=Path, required=True, help="a folder that kd recsys export wrote")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any (default 8000)")
    parser.add_argument("--workers", type=int, default=1, help="processes that answer (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the index in each worker (default 1)")
    parser.add_argument("--index", choices=_INDEXES, default="auto", help="how items are found (default auto)")
    parser.add_argument("--recall", type=float, default=0.97, help="recall@10 an index is tuned to (default 0.97)")
    parser.add_argument("--cache", type=Path, help="where derived files go (default .serving in the model's folder)")
    parser.add_argument(
        "--shadow", type=Path, help="another export: scored beside, compared in /metrics, never answered"
    )
    parser.add_argument(
        "--events",
        help="where events are stored: a file, sqlite:///FILE or postgresql://..., or none "
        "(default MODEL.events.db beside the model)",
    )
    parser.add_argument("--api-keys", type=Path, help="a file with `name key` a line; without it anybody may ask")
    parser.add_argument(
        "--admin-key", type=Path, help="a file with the key of /v1/reload; without it nobody may reload"
    )
    parser.add_argument("--rate-limit", type=float, help="requests a second of one key, or of one address without keys")
    parser.add_argument("--max-body", type=int, default=1 << 20, help="bytes of a request at the most (default 1 MiB)")
    parser.add_argument("--receive-timeout", type=float, default=10, help="seconds a request may take to arrive")
    parser.add_argument("--answer-timeout", type=float, default=10, help="seconds an answer may take")
    parser.add_argument(
        "--drain-timeout", type=float, default=30, help="seconds a stopping service finishes its work in"
    )
    parser.add_argument("--max-connections", type=int, default=2048, help="connections of one worker at the most")
    parser.add_argument(
        "--log", choices=("all", "errors"), default="all", help="which requests are logged (default all)"
    )
    parser.add_argument("--prepare-only", action="store_true", help="check, prepare and index the model, then exit")


def serve(args: argparse.Namespace) -> int:
    """Run the service until it is stopped."""
    from apps.recsys.serve import run
    from kdcore.progress import Announcer

    for name in ("workers", "threads", "max_connections", "max_body"):
        _at_least(name, getattr(args, name), 1)
    for name in ("receive_timeout", "answer_timeout", "drain_timeout", "rate_limit"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')}: got {value:g}, wanted more than 0")
    if not 0 < args.recall <= 1:
        raise UserError(f"--recall: got {args.recall:g}, wanted more than 0 and at most 1")
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port: got {args.port}, wanted 0 to 65535")
    plain = {name: getattr(args, name) for name in _PLAIN}
    paths = {name: _absolute(getattr(args, name)) for name in ("model", "cache", "shadow", "api_keys", "admin_key")}
    settings = run.ServeSettings(**plain, **paths, state="", events=_events(args.events, args.model))  # type: ignore[arg-type]
    if args.prepare_only:
        run.prepare(settings, Announcer())
        return 0
    return run.serve(settings, Announcer())


_PLAIN = (
    *("host", "port", "workers", "threads", "index", "recall", "rate_limit", "max_body", "receive_timeout"),
    *("answer_timeout", "drain_timeout", "max_connections", "log"),
)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"--{name.replace('_', '-')}: got {value}, wanted at least {least}")


def _absolute(path: Path | None) -> str | None:
    """Return a path as workers find it, whatever folder they start in."""
    return None if path is None else os.path.abspath(path)


def _events(url: str | None, model: Path) -> str | None:
    if url == "none":
        return None
    if url is None:
        return os.path.abspath(model) + ".events.db"
    return url if "://" in url else os.path.abspath(url)


def add_export_events(verbs: Any) -> None:
    """Add ``export-events``."""
    parser = verbs.add_parser(
        "export-events",
        help="write what a service has stored as Parquet for the next distillation",
        epilog=example(
            "kd recsys export-events --events exported.events.db --out events.parquet",
            "kd recsys run --recipe relaxed_ranking --data events.parquet --out runs/next",
        ),
    )
    parser.add_argument("--events", required=True, help="the file or URL that kd recsys serve was given")
    parser.add_argument("--out", type=Path, required=True, help="Parquet: user_id, item_id, timestamp and more")
    parser.add_argument("--json", action="store_true", help="print a summary as JSON")


def export_events(args: argparse.Namespace) -> int:
    """Write stored events as Parquet."""
    from apps.recsys.events import export_events
    from kdcore.progress import Announcer

    summary = export_events(_events(args.events, Path()) or "", args.out, progress=Announcer())
    print(json.dumps(summary) if args.json else f"{summary['rows']} events of {summary['users']} users: {args.out}")
    return 0
