"""What is heard, shown as it comes: lines, subtitles or paragraphs; partials on a terminal. No torch."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from apps.speech.audio import Examination
from apps.speech.decode.words import Word
from apps.speech.device.subtitles import clock, cues, paragraphs, srt, vtt
from kdcore.config import UserError

if TYPE_CHECKING:
    from apps.speech.runtime import Recognizer, Segment, Update

# what would steer a terminal or reorder its line: control characters, line separators, directions; and surrogates
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

Form = Callable[[Iterable["Update"]], Iterator[str]]


class Listening:
    """The updates of a source of samples, to the end also where the source fails or is stopped.

    ``problem`` is then what it failed of, and ``stop`` ends it after the block in hand. ``remarks`` are what is wrong
    with the samples so far (``audio.Examination``).
    """

    def __init__(self, recognizer: Recognizer, blocks: Iterable[np.ndarray]) -> None:
        self._recognizer, self._blocks = recognizer, blocks
        self._examination = Examination()
        self._stopped = False
        self.problem: UserError | None = None

    @property
    def remarks(self) -> list[str]:
        """What is wrong with the samples so far."""
        return self._examination.remarks()

    def __iter__(self) -> Iterator[Update]:
        stream = self._recognizer.stream()
        try:
            for block in self._blocks:
                self._examination.accept(block)
                yield stream.accept(block)
                if self._stopped:
                    break
        except UserError as error:
            self.problem = error
        yield stream.finish()

    def stop(self) -> None:
        """End the audio here."""
        self._stopped = True


@contextmanager
def interrupt_stops(listening: Listening) -> Iterator[None]:
    """Make the first Ctrl-C the end of the audio; a second one interrupts."""

    def stop(number: int, frame: FrameType | None) -> None:
        listening.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def printable(text: str) -> str:
    """Return a file's name (or a message with one) for a line of text: what is no character to show is escaped."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def json_line(row: dict[str, Any]) -> str:
    """Return a row of JSON lines for a file or terminal; ``json.loads`` gives back also names that are not UTF-8."""
    text = json.dumps(row, ensure_ascii=False)
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def as_lines(updates: Iterable[Update]) -> Iterator[str]:
    """Yield a line a segment."""
    return (f"{segment.text}\n" for update in updates for segment in update.final)


def as_timed_lines(updates: Iterable[Update]) -> Iterator[str]:
    """Yield a line a segment, with its times."""
    return (timed_line(segment.words) for update in updates for segment in update.final)


def timed_line(words: tuple[Word, ...]) -> str:
    """Return a segment's line with its times."""
    text = " ".join(word["word"] for word in words)
    return f"[{clock(words[0]['start'])} - {clock(words[-1]['end'])}] {text}\n"


def as_json(updates: Iterable[Update]) -> Iterator[str]:
    """Yield a JSON line a segment."""
    return (_json(segment) for update in updates for segment in update.final)


def as_srt(updates: Iterable[Update]) -> Iterator[str]:
    """Yield SubRip, cue by cue."""
    return srt(cues(_words(updates)))


def as_vtt(updates: Iterable[Update]) -> Iterator[str]:
    """Yield WebVTT, cue by cue."""
    return vtt(cues(_words(updates)))


def as_paragraphs(updates: Iterable[Update]) -> Iterator[str]:
    """Yield paragraphs, parted by empty lines."""
    for number, words in enumerate(paragraphs(_words(updates))):
        yield ("\n" if number else "") + " ".join(word["word"] for word in words) + "\n"


def write(updates: Iterable[Update], form: Form, out: TextIO) -> None:
    """Write updates as they come; on a terminal what may still change stands in the last line and is replaced."""
    terminal = out.isatty()
    clear = "\r\x1b[K" if terminal else ""

    def shown() -> Iterator[Update]:
        for update in updates:
            yield update
            if terminal:
                room = max(1, shutil.get_terminal_size().columns - 1)
                out.write(clear + update.partial[-room:])
                out.flush()

    for text in form(shown()):
        out.write(clear + text)
        out.flush()
    out.write(clear)
    out.flush()


def _words(updates: Iterable[Update]) -> Iterator[Word]:
    return (word for update in updates for segment in update.final for word in segment.words)


def _json(segment: Segment) -> str:
    row = {"text": segment.text, "start": segment.start, "end": segment.end, "words": list(segment.words)}
    return json_line(row)
