"""Forms with a file (multipart/form-data, RFC 7578), written to disk as they come. No torch."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import unquote_to_bytes

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from apps.speech.server.settings import ServeSettings, ServiceError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MOST_FIELDS, _MOST_VALUE = 64, 1 << 14
# bytes a second in which a form arrives, in the mean: less than speech in Opus has, sent while it is recorded
_LEAST_RATE = 1000
_FILENAME = re.compile(rb";\s*filename\*\s*=\s*\"?(utf-8|iso-8859-1)'[^';]*'([^\s;\"]*)", re.IGNORECASE)


@dataclass
class Form:
    """What was asked for; ``path`` holds the file, ``filename`` is its name at the client, for messages."""

    path: Path
    fields: dict[str, list[str]] = field(default_factory=dict)
    filename: str | None = None

    def one(self, name: str, otherwise: str) -> str:
        """Return the value of a field that may stand once; ServiceError where it stands twice."""
        values = self.fields.get(name, [otherwise])
        if len(values) > 1:
            raise ServiceError(422, "invalid", f"{name}: is given {len(values)} times", name)
        return values[0]


async def read_form(request: Request, path: Path, settings: ServeSettings) -> Form:
    """Write the file of a form to ``path`` as it comes and return the rest.

    Raises:
        ServiceError: no such form, too large, or it does not arrive.
        ClientDisconnect: the client has gone.
    """
    kind, options = parse_options_header(request.headers.get("content-type", "").encode("latin-1"))
    if kind != b"multipart/form-data":
        raise ServiceError(415, "unsupported_media_type", "wanted content-type: multipart/form-data")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > settings.max_upload:
        raise _too_large(settings)
    boundary = options.get(b"boundary")
    if not boundary:
        raise _bad("the content type states no boundary")
    form, size = Form(path), 0
    try:
        with open(path, "wb") as handle:
            filler = _Filler(form, handle)
            parser = MultipartParser(boundary, filler.callbacks())
            arrival = _Arrival(request, settings.receive_seconds)
            while (data := await arrival.next(size)) is not None:
                size += len(data)
                if size > settings.max_upload:
                    raise _too_large(settings)
                parser.write(data)
    except FormParserError as error:
        raise _bad(f"the form is damaged: {error}") from None
    except OSError as error:
        raise ServiceError(507, "no_room", f"the file cannot be kept: {error.strerror}") from None
    if not filler.finished:
        raise _bad("the form is cut off before its last boundary")
    return form


class _Arrival:
    """A body as it arrives, which may pause, and lag behind the least rate, for so many seconds."""

    def __init__(self, request: Request, seconds: float) -> None:
        self._chunks = request.stream().__aiter__()
        self._time, self._seconds = asyncio.get_running_loop().time, seconds
        self._began = self._time()

    async def next(self, size: int) -> bytes | None:
        """Return the next bytes behind the first ``size``, None behind the last; ServiceError for who is too slow."""
        until = min(self._time(), self._began + size / _LEAST_RATE) + self._seconds
        try:
            async with asyncio.timeout_at(until):  # what is there already has come in time
                return await anext(self._chunks, None)
        except TimeoutError:
            message = f"the form did not arrive: {size} bytes in {self._time() - self._began:.1f} s"
            raise ServiceError(408, "timeout", message, headers={"connection": "close"}) from None


def _bad(message: str) -> ServiceError:
    return ServiceError(400, "bad_form", message, headers={"connection": "close"})


def _too_large(settings: ServeSettings) -> ServiceError:
    message = f"wanted at most {settings.max_upload} bytes"
    return ServiceError(413, "too_large", message, headers={"connection": "close"})


def _filename(disposition: bytes, options: dict[bytes, bytes]) -> str | None:
    """Return the name of a part's file; ``filename*`` (RFC 5987), which forms should not have, where it is the only."""
    if b"filename" in options:
        return options[b"filename"].decode("utf-8", "replace")
    found = _FILENAME.search(disposition)
    return unquote_to_bytes(found[2]).decode(found[1].decode(), "replace") if found else None


class _Filler:
    """Puts the parts of a form where they belong; the parser bounds the headers of a part."""

    def __init__(self, form: Form, handle: BinaryIO) -> None:
        self._form, self._handle = form, handle
        self._header, self._content, self._disposition = b"", b"", b""
        # of the part that is read
        self._name = ""
        self._value = bytearray()
        self._count = 0
        self.finished = False

    def callbacks(self) -> MultipartCallbacks:
        """Return what the parser calls."""
        return {
            "on_part_begin": self._begin,
            "on_header_begin": self._begin_header,
            "on_header_field": self._take_header,
            "on_header_value": self._take_content,
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": self._take,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._disposition = b""
        self._count += 1
        if self._count > _MOST_FIELDS:
            raise _bad(f"more than {_MOST_FIELDS} fields")

    def _begin_header(self) -> None:
        self._header = self._content = b""

    def _take_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _take_content(self, data: bytes, start: int, end: int) -> None:
        self._content += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._content

    def _open(self) -> None:
        """The headers of a part are complete."""
        kind, options = parse_options_header(self._disposition)
        if kind != b"form-data" or not options.get(b"name"):
            raise _bad("a part of the form has no name")
        self._name, self._value = options[b"name"].decode("utf-8", "replace"), bytearray()
        if self._name == "file":
            filename = _filename(self._disposition, options)
            if self._form.filename is not None or filename is None:
                what = "is no file (it has no filename)" if filename is None else "is given twice"
                raise ServiceError(422, "invalid", f"file: {what}", "file", {"connection": "close"})
            self._form.filename = filename

    def _take(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._handle.write(memoryview(data)[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > _MOST_VALUE:
            raise _bad(f"a field of more than {_MOST_VALUE} bytes")

    def _end(self) -> None:
        if self._name != "file":
            self._form.fields.setdefault(self._name, []).append(self._value.decode("utf-8", "replace"))

    def _finish(self) -> None:
        self.finished = True
