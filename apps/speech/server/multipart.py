"""Forms with a file (multipart/form-data, RFC 7578), read as they come, so that the file need not be in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_MOST_HEADERS = 8192
_BOUNDARY = re.compile(rb"[A-Za-z0-9'()+_,\-./:=? ]{0,69}[A-Za-z0-9'()+_,\-./:=?]")
_PARAMETER = re.compile(r';\s*([\w*-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]*)')


class FormError(ValueError):
    """What is wrong with a form."""


@dataclass(frozen=True)
class Part:
    """A part begins: the name of its field, and of its file if it is one."""

    name: str
    filename: str | None


def boundary_of(content_type: str) -> bytes:
    """Return the boundary that a content type states; FormError without a good one."""
    for name, value in _parameters(content_type):
        boundary = value.encode("latin-1", "replace")
        if name == "boundary" and _BOUNDARY.fullmatch(boundary):
            return boundary
    raise FormError("the content type states no boundary")


def _parameters(header: str) -> Iterator[tuple[str, str]]:
    for found in _PARAMETER.finditer(header):
        value = found[2]
        if value.startswith('"'):
            value = re.sub(r"\\([\"\\])", r"\1", value[1:-1])
        yield found[1].lower(), value


class FormReader:
    """``feed`` yields a ``Part`` where one begins and bytes of its content after it; ``finished`` after the last.

    Raises:
        FormError: what is no such form.
    """

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"\r\n--" + boundary
        self._data = bytearray(b"\r\n")  # the first delimiter may stand at the very beginning
        self._state = "before"
        self.finished = False

    def feed(self, data: bytes) -> Iterator[Part | bytes]:
        """Take bytes."""
        self._data += data
        while True:
            if self._state in ("before", "content"):
                at = self._data.find(self._delimiter)
                if at < 0:
                    ready = len(self._data) - len(self._delimiter) + 1
                    if ready > 0:
                        content = bytes(self._data[:ready])
                        del self._data[:ready]
                        if self._state == "content":
                            yield content
                    return
                content = bytes(self._data[:at])
                del self._data[: at + len(self._delimiter)]
                if self._state == "content" and content:
                    yield content
                self._state = "delimiter"
            elif self._state == "delimiter":
                if len(self._data) < 2:
                    return
                self.finished = self._data.startswith(b"--")
                if not self.finished and not self._data.startswith(b"\r\n"):
                    raise FormError("the form is damaged (no line ends after a boundary)")
                self._state = "after" if self.finished else "headers"
            elif self._state == "headers":
                end = self._data.find(b"\r\n\r\n")
                if end > _MOST_HEADERS or (end < 0 and len(self._data) > _MOST_HEADERS):
                    raise FormError(f"a part of the form has more than {_MOST_HEADERS} bytes of headers")
                if end < 0:
                    return
                head = bytes(self._data[2:end]).decode("utf-8", "replace")
                del self._data[: end + 4]
                self._state = "content"
                yield _part(head)
            else:
                self._data.clear()
                return


def _part(head: str) -> Part:
    for line in head.split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() != "content-disposition" or not value.strip().lower().startswith("form-data"):
            continue
        about = dict(_parameters(value))
        if about.get("name"):
            return Part(about["name"], about.get("filename"))
    raise FormError("a part of the form has no name")
