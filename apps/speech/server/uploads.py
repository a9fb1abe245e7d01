"""``POST /v1/audio/transcriptions`` as the OpenAI API has it: a form with a file in, its words out. No torch."""

from __future__ import annotations

import asyncio
import json
import math
import os
import tempfile
import zlib
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from apps.speech.audio import Examination, audio_info, blocks
from apps.speech.device.subtitles import cues, srt, vtt
from apps.speech.server.containers import WebM
from apps.speech.server.forms import Form, read_form
from apps.speech.server.metrics import Metrics
from apps.speech.server.settings import ServeSettings, ServiceError
from apps.speech.server.sources import source
from kdcore.config import UserError, nearest

if TYPE_CHECKING:
    from apps.speech.device.endpointing import Segment
    from apps.speech.runtime import Recognizer

FORMATS = ("json", "text", "srt", "vtt", "verbose_json")
GRANULARITIES = ("word", "segment")
# of audio that is heard before another file has its turn
_TURN_SECONDS = 1.0
# of the length that a file states, what it has at the least: for some formats that is an estimate
_AT_LEAST = 0.98
_WEBM = b"\x1a\x45\xdf\xa3"
_PLAIN = {"text": "text/plain", "srt": "application/x-subrip", "vtt": "text/vtt"}


@dataclass(frozen=True)
class Wanted:
    """How an answer is written."""

    form: str
    granularities: frozenset[str]
    language: str

    @classmethod
    def of(cls, form: Form) -> Wanted:
        """Return what a form asks for; ServiceError for what there is not."""
        chosen = form.one("response_format", "json")
        if chosen not in FORMATS:
            hint = nearest(chosen[:40], FORMATS)
            raise ServiceError(422, "invalid", f"response_format: got {chosen[:40]!r}: {hint}", "response_format")
        given = form.fields.get("timestamp_granularities[]", form.fields.get("timestamp_granularities", []))
        for each in given:
            if each not in GRANULARITIES:
                message = f"timestamp_granularities: got {each[:40]!r}, wanted {' or '.join(GRANULARITIES)}"
                raise ServiceError(422, "invalid", message, "timestamp_granularities")
        if given and chosen != "verbose_json":
            message = "timestamp_granularities: are for response_format=verbose_json"
            raise ServiceError(422, "invalid", message, "timestamp_granularities")
        if form.one("stream", "false").lower() not in ("false", "0", ""):
            raise ServiceError(
                422, "invalid", "stream: is not offered here; /v1/listen answers as words come", "stream"
            )
        return cls(chosen, frozenset(given or ["segment"]), form.one("language", "")[:40])


@dataclass(frozen=True)
class Heard:
    """What was said: segments, the length of the audio in seconds, and what is wrong with it."""

    segments: tuple[Segment, ...]
    seconds: float
    remarks: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join(segment.text for segment in self.segments)

    def response(self, wanted: Wanted) -> Response:
        """Return the answer in the form that is wanted."""
        words = [word for segment in self.segments for word in segment.words]
        if wanted.form in _PLAIN:
            write = {"srt": srt, "vtt": vtt}.get(wanted.form)
            text = "".join(write(cues(words))) if write else self.text + "\n"
            return Response(text, media_type=_PLAIN[wanted.form])
        content: dict[str, Any] = {"text": self.text}
        if wanted.form == "verbose_json":
            content |= {"task": "transcribe", "language": wanted.language, "duration": round(self.seconds, 3)}
            if "word" in wanted.granularities:
                content["words"] = words
            if "segment" in wanted.granularities:
                content["segments"] = [_segment(*each) for each in enumerate(self.segments)]
            content |= {"remarks": list(self.remarks)} if self.remarks else {}
        # json.dumps in one go would let no other thread run till its end
        pieces = json.JSONEncoder(ensure_ascii=False).iterencode(content)
        return Response("".join(pieces), media_type="application/json")


def _segment(number: int, segment: Segment) -> dict[str, Any]:
    """Return a segment as the OpenAI API has it; what this model has no word for is at rest."""
    confidence = [math.log(max(word["confidence"], 1e-6)) for word in segment.words]
    data = segment.text.encode()
    return {
        "id": number,
        "seek": 0,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": [],
        "temperature": 0.0,
        "avg_logprob": round(sum(confidence) / len(confidence), 4),
        "compression_ratio": round(len(data) / len(zlib.compress(data)), 4),
        "no_speech_prob": 0.0,
    }


_Work = Generator[tuple[float, Response] | None]


class Uploads:
    """Files that clients send: so many may be there, and are heard in turn, a second each, by so many threads."""

    def __init__(self, recognizer: Recognizer, settings: ServeSettings, metrics: Metrics) -> None:
        self._recognizer, self._settings, self._metrics = recognizer, settings, metrics
        self._pool = ThreadPoolExecutor(settings.jobs, "uploads")
        self.waiting = 0

    def close(self) -> None:
        """End the threads once they have finished."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def answer(self, request: Request) -> Response:
        """Return the answer to one request.

        Raises:
            ServiceError: what is wrong with it, or too many are waiting.
            ClientDisconnect: nobody waits for the answer any more.
        """
        self._refuse_overload()  # who cannot be heard need not send the file
        with ExitStack() as place, tempfile.TemporaryDirectory(prefix="kd-upload-") as folder:
            form = await read_form(request, Path(folder) / "audio", self._settings)
            wanted = Wanted.of(form)
            if form.filename is None:
                raise ServiceError(422, "invalid", "file: is missing", "file")
            # only now: those that arrive slowly would keep the places from all others
            self._refuse_overload()
            self.waiting += 1
            place.callback(self._leave)
            return await self._heard(request, form, wanted)

    def _refuse_overload(self) -> None:
        if self.waiting >= self._settings.jobs + self._settings.max_waiting:
            message = f"{self.waiting} files are waiting already"
            raise ServiceError(503, "overloaded", message, headers={"retry-after": "5", "connection": "close"})

    def _leave(self) -> None:
        self.waiting -= 1

    async def _heard(self, request: Request, form: Form, wanted: Wanted) -> Response:
        """Transcribe and write the answer turn by turn; stop, or do not even begin, if the client goes away."""
        work = self._work(form, wanted)
        gone = asyncio.create_task(_gone(request))
        try:
            done = None
            while done is None:
                done = await self._turn(work, gone)
        finally:
            gone.cancel()
            work.close()
        seconds, response = done
        self._metrics.upload(seconds)
        return response

    async def _turn(self, work: _Work, gone: asyncio.Task[None]) -> tuple[float, Response] | None:
        """Let a thread go on with a file behind those that wait for one; ClientDisconnect if the client goes away."""
        job = self._pool.submit(next, work)
        turn = asyncio.wrap_future(job)
        try:
            both: list[asyncio.Future[Any]] = [turn, gone]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # whoever leaves does not keep the place till the turn; if it is on, the file may go only afterwards
            if not job.cancel() and not turn.done():
                await asyncio.wait([turn])
        if job.cancelled():
            raise ClientDisconnect
        done = turn.result()
        if gone.done():
            raise ClientDisconnect
        return done

    def _work(self, form: Form, wanted: Wanted) -> _Work:
        """Yield None after each turn, then seconds of audio and answer: the event loop has no time for long ones."""
        name = _shown(form.filename or "")
        for heard in transcribe(self._recognizer, form.path, name, self._settings.max_seconds):
            yield None if heard is None else (heard.seconds, heard.response(wanted))


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _shown(name: str) -> str:
    """Return the name of a client's file as messages may have it."""
    return "".join(sign if sign.isprintable() else "?" for sign in os.path.basename(name)[:80]) or "file"


def transcribe(recognizer: Recognizer, path: Path, name: str, max_seconds: float) -> Iterator[Heard | None]:
    """Yield None after each turn, then what is said in a file. ServiceError for what is no audio, or too long."""
    stream, examination = recognizer.stream(), Examination()
    segments: list[Segment] = []
    turn = 0.0
    too_long = ServiceError(413, "too_long", f"{name}: wanted at most {max_seconds:g} s of audio", "file")
    try:
        if _AT_LEAST * (_stated_seconds(path) or 0.0) > max_seconds:
            raise too_long
        for block in _samples(path):
            if stream.seconds + len(block) / 16_000 > max_seconds:
                raise too_long
            examination.accept(block)
            segments += stream.accept(block).final
            if stream.seconds >= turn + _TURN_SECONDS:
                turn = stream.seconds
                yield None
    except UserError as error:
        message = str(error).replace(os.fspath(path), name)
        message = f"{name}{message[5:]}" if message.startswith("audio:") else message
        raise ServiceError(422, "unreadable", message, "file") from None
    segments += stream.finish().final
    yield Heard(tuple(segments), stream.seconds, tuple(examination.remarks()))


def _stated_seconds(path: Path) -> float | None:
    """Return the length that a file states; nothing is decoded."""
    with open(path, "rb") as handle:
        if handle.read(len(_WEBM)) != _WEBM:
            return audio_info(path).seconds
        handle.seek(0)
        reader = WebM()
        while data := handle.read(1 << 14):
            if next(reader.feed(data), None):
                break
        return reader.seconds


def _samples(path: Path) -> Iterator[np.ndarray]:
    """Yield the samples of a file: WebM, or whatever libsndfile reads."""
    with open(path, "rb") as handle:
        if handle.read(len(_WEBM)) == _WEBM:
            handle.seek(0)
            yield from _webm(handle)
            return
    yield from blocks(path, _TURN_SECONDS)


def _webm(handle: BinaryIO) -> Iterator[np.ndarray]:
    reader = source("webm")
    count = 0
    while True:
        data = handle.read(reader.portion)
        if data:
            reader.feed(data)
        else:
            reader.end()
        while (samples := reader.read()) is not None:
            count += len(samples)
            yield samples
        if not data:
            break
    if reader.torn:
        raise UserError(f"audio: is truncated: it ends within {reader.torn}")
    if not count:
        raise UserError("audio: has no samples")
