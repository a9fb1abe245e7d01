"""The limit of open files, in processes of their own with a real one."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from apps.speech.server.open_files import open_files
from apps.speech.server.settings import ServeSettings
from tests.speech.server.served import WAIT

ROOT = Path(__file__).resolve().parents[3]
CONNECTIONS = 200


@contextmanager
def limited(folder: Path, soft: int, hard: int) -> Iterator[tuple[str, list[str]]]:
    """Run the service with a limit until the block ends; yield its address and what it had logged by then."""
    words = ["-m", "tests.speech.server.serving", "--model", str(folder), "--port", "0"]
    words += ["--max-connections", str(CONNECTIONS)]
    # not preexec_fn, which may hang where threads run
    limit = f'ulimit -Sn {soft} && ulimit -Hn {hard} && exec "$@"'
    command = ["sh", "-c", limit, "sh", sys.executable, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        try:
            lines: list[str] = []
            while not lines or "serving on http://" not in lines[-1]:
                lines.append(process.stderr.readline())
                assert lines[-1], f"the service did not start: {lines}"
            yield lines[-1].split("serving on ")[1].strip(), lines
        finally:
            process.kill()


def test_as_many_connections_as_are_allowed(folder: Path) -> None:
    with limited(folder, 128, 4096) as (url, lines), ExitStack() as held:
        host, port = url.removeprefix("http://").split(":")
        for _ in range(CONNECTIONS - 1):
            held.enter_context(socket.create_connection((host, int(port)), WAIT))
        assert httpx.get(f"{url}/health", timeout=WAIT).status_code == 200
        assert not any("few_open_files" in line for line in lines)


def test_a_hard_limit_that_is_too_low_is_said(folder: Path) -> None:
    with limited(folder, 128, 256) as (url, lines):
        (said,) = [line for line in lines if "few_open_files" in line]
        assert f"--max-connections {CONNECTIONS} needs" in said and '"allowed": 256' in said
        assert httpx.get(f"{url}/health", timeout=WAIT).status_code == 200


def test_the_unit_lets_the_service_have_what_it_needs() -> None:
    unit = (ROOT / "examples" / "speech" / "kd-speech.service").read_text(encoding="utf-8")
    (limit,) = [line.partition("=")[2] for line in unit.splitlines() if line.startswith("LimitNOFILE=")]
    assert int(limit) >= open_files(ServeSettings())


@pytest.mark.parametrize("soft", [resource.RLIM_INFINITY, 10_000])
def test_a_limit_that_is_enough_is_left(monkeypatch: pytest.MonkeyPatch, soft: int) -> None:
    from apps.speech.server import open_files as module

    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("it was changed"))
    assert module.allow_open_files(ServeSettings()) == soft
