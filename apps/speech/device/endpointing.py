"""Log-posteriors in packets made into segments: words between pauses, final once they are handed out. No torch.

A segment ends at a pause (``decode.endpoint``), or, where nobody pauses, at the widest gap between two words. Frames
behind that gap are searched again for the next segment, so that no word is cut, lost or said twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from apps.speech.decode.ctc import FRAME_SECONDS, check_log_probs
from apps.speech.decode.endpoint import RULES, Endpointer, Rule
from apps.speech.decode.words import Word
from apps.speech.device.decoding import Search

# a word that goes on for so many times the length at which a segment should end is none, and is ended
_PATIENCE = 3


@dataclass(frozen=True)
class Segment:
    """What is said between two pauses; never changed once it is handed out.

    Attributes:
        text: its words, joined by spaces.
        words: each with times in seconds from the start of the audio, and confidence.
        start, end: of the first and the last word, in seconds.
    """

    text: str
    words: tuple[Word, ...]
    start: float
    end: float

    @classmethod
    def of(cls, words: Sequence[Word]) -> Segment:
        """Return the segment of one or more words."""
        if not words:
            raise ValueError("words: got none, wanted one or more")
        text = " ".join(word["word"] for word in words)
        return cls(text, tuple(words), words[0]["start"], words[-1]["end"])


class Segmenter:
    """Finds segments; what they are does not depend on how the frames are split.

    With rules, memory is bounded by three times the longest segment; without, everything is one segment, which grows.

    ``paused`` says whether a segment ended at a pause in the frames last taken, with or without words.

    Options:
        search: makes the search of a segment.
        rules: as in ``decode.endpoint``. A rule without silence says how long a segment may be where nobody pauses.
        delay_ms: how long after a word the model emits it; the times of words are earlier by that, and not below 0.
            Words that would begin before 0 take a frame each from there on.
    """

    def __init__(
        self, search: Callable[[], Search], rules: Sequence[Rule] | None = RULES, *, delay_ms: float = 0.0
    ) -> None:
        self._new_search, self._delay = search, delay_ms / 1000
        self._pause_rules = [rule for rule in rules or () if rule.silence > 0]
        lengths = [rule.length for rule in rules or () if rule.silence == 0]
        self._longest = math.ceil(round(min(lengths) / FRAME_SECONDS, 6)) if lengths else None
        self._frames = 0
        # seconds at which the last word ends
        self._said = 0.0
        self.paused = False
        self._begin(0)

    @property
    def frames(self) -> int:
        """The frames taken so far."""
        return self._frames

    @property
    def shortest_pause(self) -> int:
        """Frames without a symbol that stand before every pause at which a segment ends, at least; 0 without rules."""
        pauses = [rule.silence for rule in self._pause_rules]
        return math.ceil(round(min(pauses) / FRAME_SECONDS, 6)) if pauses else 0

    def rewind(self, frames: int) -> None:
        """Begin the segment behind a pause so many frames earlier: they come again.

        Raises:
            ValueError: there was no pause in the frames last taken, or it was shorter.
        """
        if not self.paused or not 0 <= frames <= self.shortest_pause:
            raise ValueError(f"frames: got {frames}, wanted at most the {self.shortest_pause} of a pause just before")
        self._frames -= frames
        self._begin(self._frames)

    def _begin(self, first: int) -> None:
        """Begin a segment at a frame."""
        self._first = first
        self._search = self._new_search()
        self._pauses = Endpointer(self._pause_rules) if self._pause_rules else None
        self._kept: list[np.ndarray] = []
        self._room = self._longest

    def accept(self, log_probs: np.ndarray) -> list[Segment]:
        """Take frames [T, C] and return the segments that end in them; ValueError as ``check_log_probs``."""
        values = check_log_probs(log_probs)
        found: list[Segment] = []
        self.paused = False
        while len(values):
            part = values if self._room is None else values[: self._room]
            ends = self._pauses.accept(part) if self._pauses else []
            if ends:
                # frames of this segment up to its first pause; the others are looked at again as the next one's
                part = part[: ends[0] - (self._frames - self._first)]
            self._search.accept(part)
            self._frames += len(part)
            values = values[len(part) :]
            if self._room is not None:
                self._kept.append(part)
                self._room -= len(part)
            if ends:
                self.paused = True
                found += self._ended()
            elif self._room == 0:
                found += self._split()
        return found

    def partial(self) -> str:
        """Return the text of the segment that goes on."""
        return self._search.partial()

    def finish(self) -> list[Segment]:
        """Return the last segment, if anything was said in it; a next one begins."""
        return self._ended()

    def _ended(self) -> list[Segment]:
        words = self._timed(self._search.words(ended=True))
        self._begin(self._frames)
        return [Segment.of(words)] if words else []

    def _split(self) -> list[Segment]:
        """End a segment that is as long as it may be between two words, and begin the next one there."""
        words = self._search.words(ended=False)
        length = self._frames - self._first
        if len(words) < 2 and (words or self._begun()) and length < _PATIENCE * (self._longest or 0):
            self._room = self._longest  # a word that nothing follows yet may go on
            return []
        if len(words) < 2:
            return self._ended()
        place, cut = _widest_gap(words, length)
        segment = Segment.of(self._timed(words[:place]))
        kept = np.concatenate(self._kept)
        # paths of a beam may emit the word a little before the best one does
        said = round(words[place - 1]["end"] / FRAME_SECONDS)
        while cut > said and kept[cut - 1].argmax() == kept.shape[1] - 1:
            cut -= 1
        rest = kept[cut:]
        self._begin(self._first + cut)
        self._search.accept(rest)
        if self._pauses:
            self._pauses.accept(rest)
        self._kept = [rest]
        self._room = max(1, (self._longest or 0) - len(rest))
        return [segment]

    def _begun(self) -> bool:
        """Return whether any frame has a symbol: of a word list's words those are told that are whole."""
        return any((part.argmax(1) != part.shape[1] - 1).any() for part in self._kept)

    def _timed(self, words: Sequence[Word]) -> list[Word]:
        """Return words with the times of the audio instead of the segment's, in ms, and confidences to four places.

        Each begins where the one before it ends, or later, and has a frame at least.
        """
        shift = self._first * FRAME_SECONDS - self._delay
        timed: list[Word] = []
        for word in words:
            start = round(max(self._said, word["start"] + shift), 3)
            self._said = round(max(start + FRAME_SECONDS, word["end"] + shift), 3)
            confidence = round(word["confidence"], 4)
            timed.append({"word": word["word"], "start": start, "end": self._said, "confidence": confidence})
        return timed


def _widest_gap(words: Sequence[Word], length: int) -> tuple[int, int]:
    """Return the place of the word before which to cut, and the frame: in the second half, where there is a choice."""
    gaps = [(words[place]["start"] - words[place - 1]["end"], place) for place in range(1, len(words))]
    half = length * FRAME_SECONDS / 2
    late = [gap for gap in gaps if words[gap[1]]["start"] >= half]
    _, place = max(late or gaps[-1:])
    return place, round(words[place]["start"] / FRAME_SECONDS)
