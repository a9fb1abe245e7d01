"""Words with times as subtitles (SubRip, WebVTT) and as paragraphs. No torch.

A cue has at most two lines of 42 characters, ends at a pause, and stands long enough to be read where nothing follows.
Cues are in order and never overlap, whatever times the words have.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from apps.speech.decode.words import Word

LINE = 42
LINES = 2
# seconds: a pause that ends a cue, the longest cue, and how long one stands at least
PAUSE, LONGEST, SHORTEST = 0.7, 7.0, 1.0
# seconds of silence between two paragraphs
PARAGRAPH_PAUSE = 2.0


@dataclass(frozen=True)
class Cue:
    """A subtitle: milliseconds from the start of the audio, start < end, and its lines as they are said."""

    start: int
    end: int
    lines: tuple[str, ...]


def cues(words: Iterable[Word]) -> Iterator[Cue]:
    """Yield the cues of words as they come; one is held back until it is known how long it may stand.

    A word that is longer than a line is cut into lines.
    """
    held: Cue | None = None
    for group in _groups(words):
        start = _milliseconds(group[0]["start"])
        if held is not None:
            start = max(start, held.start + 1)
            shown = max(held.end, held.start + round(1000 * SHORTEST))
            yield Cue(held.start, max(held.start + 1, min(shown, start)), held.lines)
        for lines, more in _pages([word["word"] for word in group]):
            end = max(start + 1, _milliseconds(group[-1]["end"]))
            if more:  # only of a word longer than a cue, which has one time
                yield Cue(start, start + 1, lines)
                start += 1
            else:
                held = Cue(start, end, lines)
    if held is not None:
        yield Cue(held.start, max(held.end, held.start + round(1000 * SHORTEST)), held.lines)


def srt(numbered: Iterable[Cue]) -> Iterator[str]:
    """Yield each cue in SubRip's form; ``&``, ``<`` and ``>`` are escaped, since players read tags there too."""
    for number, cue in enumerate(numbered, start=1):
        yield f"{number}\n{_clock(cue.start, ',')} --> {_clock(cue.end, ',')}\n{_escaped(cue)}\n\n"


def vtt(found: Iterable[Cue]) -> Iterator[str]:
    """Yield the head of a WebVTT file and each cue, escaped."""
    yield "WEBVTT\n\n"
    for cue in found:
        yield f"{_clock(cue.start, '.')} --> {_clock(cue.end, '.')}\n{_escaped(cue)}\n\n"


def paragraphs(words: Iterable[Word], *, pause: float = PARAGRAPH_PAUSE) -> Iterator[list[Word]]:
    """Yield the words of each paragraph: they are parted by ``pause`` seconds in which nothing is said."""
    kept: list[Word] = []
    for word in words:
        if kept and word["start"] - kept[-1]["end"] >= pause:
            yield kept
            kept = []
        kept.append(word)
    if kept:
        yield kept


def clock(seconds: float) -> str:
    """Return a time as ``0:01:02.3``, for people."""
    tenths = round(max(0.0, seconds) * 10)
    return f"{tenths // 36000}:{tenths // 600 % 60:02}:{tenths // 10 % 60:02}.{tenths % 10}"


def _groups(words: Iterable[Word]) -> Iterator[list[Word]]:
    """Yield the words of each cue."""
    kept: list[Word] = []
    for word in words:
        if kept and (
            word["start"] - kept[-1]["end"] >= PAUSE
            or word["end"] - kept[0]["start"] > LONGEST
            or len(wrapped([each["word"] for each in kept] + [word["word"]])) > LINES
        ):
            yield kept
            kept = []
        kept.append(word)
    if kept:
        yield kept


def _pages(words: Sequence[str]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Yield the lines of one cue, and whether more come."""
    lines = wrapped(words)
    for first in range(0, len(lines), LINES):
        yield tuple(lines[first : first + LINES]), first + LINES < len(lines)


def wrapped(words: Sequence[str], width: int = LINE) -> list[str]:
    """Return lines of at most ``width`` characters; a longer word is cut."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
            continue
        lines += [word[first : first + width] for first in range(0, len(word), width)]
    return lines


def _milliseconds(seconds: float) -> int:
    return max(0, round(1000 * seconds))


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}{rest:03}"


def _escaped(cue: Cue) -> str:
    return "\n".join(html.escape(line, quote=False) for line in cue.lines)
