"""The descriptor belongs to a process, so the tests have one of their own."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import ctypes, os, sys
from apps.speech.server.native_stderr import native_stderr_logged
from kdcore.json_logs import configure_logging

libc = ctypes.CDLL(None)
try:
    with native_stderr_logged():
        configure_logging()
        said = b"one\\n\\n  two \\xff\\n" + b"x" * 2500 + b"\\nhalf"
        libc.write(2, said, len(said))
        print("python", file=sys.stderr)
        assert not os.get_blocking(2)
        {more}
finally:
    os.write(2, b"after\\n")
    print("python after", file=sys.stderr)
"""


def run(more: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(more=more)], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr.splitlines()


def test_lines_are_logged_and_python_writes_as_before() -> None:
    code, lines = run("pass")
    logged = [line for line in lines if line.startswith("{")]
    assert code == 0 and all('"logger": "native"' in line and '"level": "warning"' in line for line in logged)
    said = [line.split('"message": "')[1].split('"')[0] for line in logged]
    assert said == ["one", "two \ufffd", "x" * 1000, "x" * 1000, "x" * 500, "half"]
    assert [line for line in lines if not line.startswith("{")] == ["python", "after", "python after"]


def test_errors_and_crashes_are_seen() -> None:
    code, lines = run("raise ValueError('wrong')")
    assert code == 1 and lines[-1] == "ValueError: wrong" and any('"half"' in line for line in lines)
    code, lines = run("libc.abort()")
    assert code < 0 and "Fatal Python error: Aborted" in lines
