from __future__ import annotations

import json
import logging
import os

import pytest

from kdcore.json_logs import JsonFormatter


def line(record: logging.LogRecord) -> dict[str, object]:
    text = JsonFormatter().format(record)
    assert "\n" not in text
    found: dict[str, object] = json.loads(text)
    assert found.pop("worker") == os.getpid() and found.pop("time") == round(record.created, 3)
    return found


def test_what_libraries_log_and_events() -> None:
    record = logging.LogRecord("some.library", logging.WARNING, "x.py", 1, 'a "%s"\n', ("é\n",), None)
    assert line(record) == {
        **{"level": "warning", "event": "log", "logger": "some.library", "message": 'a "é\n"\n'},
    }
    event = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "fields": {"path": '/"\n', "ms": 1.5}})
    assert line(event) == {"level": "info", "event": "request", "path": '/"\n', "ms": 1.5}


def test_a_traceback_stays_on_the_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    found = line(logging.LogRecord("x", logging.ERROR, "x.py", 1, "failed", None, info))
    assert "two\nlines" in str(found["traceback"])


def test_a_process_logs_json(capfd: pytest.CaptureFixture[str]) -> None:
    import subprocess
    import sys

    code = "import logging, kdcore.json_logs as j; j.configure_logging(); logging.getLogger('uvicorn.error').info('hi')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "" and json.loads(done.stderr)["message"] == "hi"
