"""What libraries in C print on stderr, as records of the log: the decoder of mp3 cannot be told not to. No torch."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_STDERR = 2
_MOST_CHARACTERS = 1000
_END_SECONDS = 1.0
_log = logging.getLogger("native")


@contextmanager
def native_stderr_logged() -> Iterator[None]:
    """Log each line that is written to file descriptor 2 as a warning, while Python writes to the real stderr.

    Once for the whole process, as the descriptor belongs to all threads. What is written faster than it is logged is
    lost: a library must not wait for a thread that may wait for it. Where the process crashes, Python says where.
    """
    sys.stderr.flush()
    before = sys.stderr
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    real = os.dup(_STDERR)
    # closed with the last handler of the log that writes to it
    sys.stderr = os.fdopen(real, "w", buffering=1, encoding=before.encoding, errors="backslashreplace")
    os.dup2(write_end, _STDERR)
    os.close(write_end)
    faulthandler.enable(sys.stderr)
    reader = threading.Thread(target=_log_lines, args=(read_end,), name="native-stderr", daemon=True)
    reader.start()
    try:
        yield
    finally:
        faulthandler.disable()
        os.dup2(real, _STDERR)  # the last end to write to is closed, unless a child has one: the reader ends
        reader.join(_END_SECONDS)
        sys.stderr = before


def _log_lines(descriptor: int) -> None:
    with open(descriptor, "rb") as lines:
        while line := lines.readline(_MOST_CHARACTERS):
            if text := line.decode("utf-8", "replace").strip():
                _log.warning("%s", text)
