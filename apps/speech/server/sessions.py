"""Live streams, heard together: one thread lets the network hear a window of every stream that has one. No torch.

A stream gets its turn in every round, whatever the others send, so that one slow or hasty client never slows another.
What is kept for a client is bounded both ways: who sends more than can be heard is not read, who does not read is not
heard.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.speech.audio import Examination
from apps.speech.features import SAMPLE_RATE
from apps.speech.server.settings import ServiceError
from apps.speech.server.sources import Source
from kdcore.config import UserError

if TYPE_CHECKING:
    from apps.speech.device.endpointing import Segment
    from apps.speech.runtime import Recognizer, Stream

# messages that may wait for a client before its stream is not heard any more
_MOST_MESSAGES = 256
# portions of a source that may wait to be heard before the client is not read any more
_MOST_PORTIONS = 4
_log = logging.getLogger("kdsuite.serve")


@dataclass(frozen=True)
class Message:
    """What a client is told.

    Attributes:
        last: nothing follows.
        error: what ends the stream, if anything has gone wrong.
        since: of a final message, when what made it final arrived (in seconds of ``time.monotonic``).
    """

    content: dict[str, Any]
    last: bool = False
    error: ServiceError | None = None
    since: float | None = None


class Session:
    """A live stream: the event loop puts bytes in and takes messages, the thread of its ``Hub`` does the rest."""

    def __init__(self, hub: Hub, source: Source, stream: Stream, max_seconds: float) -> None:
        self._hub, self._source, self._stream, self._max_seconds = hub, source, stream, max_seconds
        self._room = _MOST_PORTIONS * source.portion
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        # shared between loop and thread, under the hub's lock
        # bytes, and when they arrived
        self.pending: deque[tuple[bytes, float]] = deque()
        self.pending_bytes = 0
        self.messages: deque[Message] = deque()
        self.partial: Message | None = None
        self.stopped = self.done = self._left = False
        self._problem: ServiceError | None = None
        self._stopped_at = 0.0
        # of the thread alone
        self.moved = self._more = self._exhausted = False
        self._said = ""
        self._final_end = self._since = 0.0
        self._examination = Examination()
        self._ended = False

    # what the event loop calls

    async def put(self, data: bytes) -> None:
        """Hand over bytes, and wait until there is room for more; ignored once the stream was stopped."""
        with self._hub.work:
            if self.stopped or not data:
                return
            self.pending.append((data, time.monotonic()))
            self.pending_bytes += len(data)
            self._hub.work.notify()
        while self.pending_bytes > self._room and not self.done:
            self._changed.clear()
            if self.pending_bytes > self._room and not self.done:
                await self._changed.wait()

    def stop(self, problem: ServiceError | None = None) -> None:
        """Nothing more comes: what is said so far is finished, then told with the problem that ends it, if any."""
        with self._hub.work:
            if not self.stopped:
                self.stopped, self._problem, self._stopped_at = True, problem, time.monotonic()
                self._hub.work.notify()

    def leave(self) -> None:
        """Nobody reads any more."""
        with self._hub.work:
            self.done = self._left = True
        self._changed.set()

    async def next(self) -> Message | None:
        """Return the next message, None once the client has left; partial ones out of date by then are left out."""
        while True:
            with self._hub.work:
                if self._left:
                    return None
                if self.messages:
                    if len(self.messages) >= _MOST_MESSAGES:
                        self._hub.work.notify()
                    return self.messages.popleft()
                if self.partial is not None:
                    found, self.partial = self.partial, None
                    return found
                self._changed.clear()
            await self._changed.wait()

    # what the thread of the hub calls

    @property
    def stream(self) -> Stream:
        """The stream in the recogniser."""
        return self._stream

    @property
    def seconds(self) -> float:
        """Seconds of audio that were heard."""
        return self._stream.seconds

    def has_work(self) -> bool:
        """Whether there is something to hear and somebody who reads what is said of it."""
        if self.done or len(self.messages) >= _MOST_MESSAGES:
            return False
        return bool(self.pending) or self.stopped or self._more or self._stream.ready > 0

    def listen(self) -> None:
        """Take up to a portion of what waits, unless the stream has windows to hear already."""
        if not self._stream.ready and not self._ended:
            samples = self._samples()
            self._more = samples is not None
            if samples is not None:
                self._queue(samples)
        self.moved = self._stream.ready > 0 or self._ended or self._hub.gated

    def _samples(self) -> np.ndarray | None:
        """Return the next samples of the source; the stream ends where there are none and none come."""
        try:
            samples = self._source.read()
            if samples is None and (portion := self._portion()):
                self._source.feed(portion)
                return self._source.read()
        except UserError as error:
            self._spoil(ServiceError(422, "unreadable", str(error)))
            return np.zeros(0, np.float32)
        if samples is None and self.stopped:
            if self._exhausted:
                self._stream.end()
                self._ended, self._since = True, max(self._since, self._stopped_at)
                return None
            self._exhausted = True
            self._source.end()
            return np.zeros(0, np.float32)
        return samples

    def _queue(self, samples: np.ndarray) -> None:
        room = max(0, round((self._max_seconds - self._stream.seconds) * SAMPLE_RATE))
        self._examination.accept(samples[:room])
        self._stream.queue(samples[:room])
        if len(samples) > room:
            self._spoil(ServiceError(413, "too_long", f"wanted at most {self._max_seconds:g} s of audio"))

    def _spoil(self, problem: ServiceError) -> None:
        """What comes now is not heard any more; what was heard is finished."""
        with self._hub.work:
            self.pending.clear()
            self.pending_bytes = 0  # whoever waits for room has it
            self.stopped, self._problem = True, problem
        self._tell()

    def _portion(self) -> bytes:
        with self._hub.work:
            if not self.pending:
                return b""
            first, self._since = self.pending.popleft()
            portion, rest = first[: self._source.portion], first[self._source.portion :]
            if rest:
                self.pending.appendleft((rest, self._since))
            before, self.pending_bytes = self.pending_bytes, self.pending_bytes - len(portion)
        if before > self._room >= self.pending_bytes:
            self._tell()
        return portion

    def speak(self) -> None:
        """Put what is new into messages."""
        update = self._stream.take()
        finished = self._ended and not self._stream.ready
        found = [Message(self._final(segment), since=self._since) for segment in update.final]
        if finished:
            found.append(self._last())
        elif found or update.partial != self._said:
            self._said = update.partial
        else:
            return
        content = self._partial(update.partial)
        with self._hub.work:
            self.messages += found
            self.partial = None if finished or (found and not update.partial) else Message(content)
            self.done = finished
        self._tell()

    def _final(self, segment: Segment) -> dict[str, Any]:
        self._final_end = segment.end
        about = {"text": segment.text, "words": list(segment.words), "start": segment.start, "end": segment.end}
        return {"type": "final", **about, "heard": round(self._stream.seconds, 3)}

    def _partial(self, text: str) -> dict[str, Any]:
        seconds = round(self._stream.seconds, 3)
        words = [{"word": word} for word in text.split()]
        start = min(self._final_end, seconds)
        return {"type": "partial", "text": text, "words": words, "start": start, "end": seconds, "heard": seconds}

    def _last(self) -> Message:
        if self._problem:
            return Message({"type": "error", "error": self._problem.problem()}, True, self._problem)
        content: dict[str, Any] = {"type": "end", "heard": round(self._stream.seconds, 3)}
        if torn := self._source.torn:
            content["warning"] = f"the audio ends within {torn}, which is left out"
        if remarks := self._examination.remarks():
            content["remarks"] = remarks
        return Message(content, True)

    def fail(self) -> None:
        """End the stream without finishing it: the service has failed it."""
        problem = ServiceError(500, "internal", "the service failed")
        with self._hub.work:
            self.messages.append(Message({"type": "error", "error": problem.problem()}, True, problem))
            self.done = True
        self._tell()

    def _tell(self) -> None:
        """Wake the event loop up, if it is still there."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._changed.set)


class Hub:
    """All live streams of the service."""

    def __init__(self, recognizer: Recognizer, *, max_streams: int, max_seconds: float) -> None:
        self._recognizer, self._max_seconds = recognizer, max_seconds
        self.max_streams, self.gated = max_streams, recognizer.gate is not None
        self.work = threading.Condition()
        self.sessions: set[Session] = set()
        self.stopping = False
        # by the streams that have ended
        self._heard = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="streams", daemon=True)
        self._thread.start()

    def open(self, source: Source) -> Session:
        """Return a new live stream; ServiceError where there are too many, or the service stops."""
        if self.stopping:
            raise ServiceError(503, "stopping", "the service stops")
        if len(self.sessions) >= self.max_streams:
            raise ServiceError(503, "overloaded", f"{self.max_streams} streams are heard already, which is the limit")
        session = Session(self, source, self._recognizer.stream(), self._max_seconds)
        with self.work:
            self.sessions.add(session)
        return session

    def close(self, session: Session) -> None:
        """Forget a stream: its client has been told everything, or has gone."""
        with self.work:
            session.done = True
            self.sessions.discard(session)
            self._heard += session.seconds

    def heard(self) -> float:
        """Return the seconds of audio that all streams were heard, those that have ended as well."""
        with self.work:
            return self._heard + sum(session.seconds for session in self.sessions)

    async def drain(self, seconds: float) -> None:
        """Take no more streams, let those that are there finish what was said, and wait until their clients know."""
        self.stopping = True
        for session in list(self.sessions):
            session.stop(ServiceError(503, "stopping", "the service stops"))
        until = asyncio.get_running_loop().time() + seconds
        while self.sessions and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(0.02)

    def stop(self) -> None:
        """End the thread."""
        with self.work:
            self._closed = True
            self.work.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self.work:
                while not self._closed and not any(session.has_work() for session in self.sessions):
                    self.work.wait()
                if self._closed:
                    return
                waiting = [session for session in self.sessions if session.has_work()]
            self._round(waiting)

    def _round(self, sessions: list[Session]) -> None:
        """Let every stream take a portion and hear one window."""
        sessions = [session for session in sessions if self._tried(session, session.listen)]
        try:
            self._recognizer.step_many([session.stream for session in sessions])
        except Exception:  # the network: nobody can go on without the window that was lost
            _log.exception("a step of %d streams failed", len(sessions))
            for session in sessions:
                session.fail()
            return
        for session in sessions:
            if session.moved:
                self._tried(session, session.speak)

    @staticmethod
    def _tried(session: Session, action: Any) -> bool:
        """Do something for a session; what goes wrong with one is nobody else's matter."""
        try:
            action()
        except Exception:
            _log.exception("a stream failed")
            session.fail()
            return False
        return True
