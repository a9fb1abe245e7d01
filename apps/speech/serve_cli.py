"""The command ``kd speech serve``; everything heavy is imported when it is called."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from apps.speech.device import transcribe_cli
from kdcore.command_line import example
from kdcore.config import UserError

VERB = "serve"
# option, its default, its least value, help; floats are seconds
_LIMITS: tuple[tuple[str, int | float, int | float, str], ...] = (
    ("max_streams", 64, 1, "live streams at once; one more is refused"),
    ("max_connections", 1024, 1, "WebSocket connections at once, and as many of HTTP"),
    ("jobs", 1, 1, "uploaded files that are heard at once; the others take turns with them"),
    ("max_waiting", 16, 0, "uploads that may be there beside those; one more is refused"),
    ("max_upload", 100 << 20, 1024, "bytes of a request with a file"),
    ("max_message", 1 << 20, 1024, "bytes of a WebSocket message"),
    ("max_seconds", 7200.0, 0.1, "seconds of audio of a stream or file"),
    ("idle_seconds", 30.0, 0.1, "a stream that sends no audio for so long is ended"),
    ("receive_seconds", 30.0, 0.1, "how long a request's head may take, and an upload may pause or lag behind 1 kB/s"),
    ("send_seconds", 10.0, 0.1, "how long a client may leave an answer unread"),
    ("drain_seconds", 30.0, 0.1, "what a stopping service finishes its work in"),
)


def add_serve(verbs: Any) -> None:
    """Add ``serve``."""
    parser = verbs.add_parser(
        VERB,
        help="transcribe live audio over WebSocket and files over HTTP, with an exported student; needs no torch",
        description="Serve an exported student: live audio at /v1/listen (WebSocket), files at "
        "/v1/audio/transcriptions (as the OpenAI API), and a page at / that transcribes from the microphone.",
        epilog=example(
            "kd speech serve --model exported --port 8000",
            'kd speech serve --model exported --hot-word "kd suite=4" --max-streams 40',
            "curl -s localhost:8000/v1/audio/transcriptions -F file=@talk.flac -F response_format=srt",
        ),
    )
    parser.add_argument("--model", type=Path, required=True, help="the exported folder")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on, 0 for any (default 8000)")
    for name, default, _, what in _LIMITS:
        shown = f"{what} (default {default:g})" if isinstance(default, float) else f"{what} (default {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=shown)
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages of this origin (https://example.org) may open streams as well; repeatable. The service's own page "
        "and clients that are no browsers always may",
    )
    transcribe_cli.add_decoding(parser)


def run_serve(args: argparse.Namespace) -> int:
    """Run the service until it is stopped; return the exit code."""
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port: got {args.port}, wanted 0 to 65535")
    for name, _, least, _ in _LIMITS:
        value = getattr(args, name)
        if not least <= value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')}: got {value:g}, wanted {least:g} or more")
    from apps.speech.serve import serve
    from apps.speech.server.native_stderr import native_stderr_logged
    from apps.speech.server.origins import origin
    from apps.speech.server.settings import ServeSettings
    from kdcore.progress import Announcer

    try:
        origins = tuple(origin(each) for each in args.allow_origin)
    except ValueError as error:
        raise UserError(f"--allow-{error}") from None
    limits = {name: getattr(args, name) for name, *_ in _LIMITS}
    settings = ServeSettings(host=args.host, port=args.port, allow_origins=origins, **limits)
    with native_stderr_logged():
        return serve(transcribe_cli.setup_of(args).recognizer(), settings, Announcer())
