"""Words with their times and confidences, from the symbols of any decoder. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from apps.speech.decode.confidence import Calibration, word_confidence
from apps.speech.decode.ctc import BOUNDARY, FRAME_SECONDS, Hypothesis


class Word(TypedDict):
    """A word as it is handed out: times in seconds from the start of the audio, confidence 0..1."""

    word: str
    start: float
    end: float
    confidence: float


def word_spans(ids: Sequence[int], symbols: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (word, first, stop) of each word that ``ids`` spell: its symbols are ``ids[first:stop]``.

    Both spellings are read: boundaries as symbols of their own, which belong to no word, and in front of pieces.
    """
    spans: list[tuple[str, int, int]] = []
    text, first = "", 0
    for place, symbol in enumerate([*(symbols[index] for index in ids), BOUNDARY]):
        if symbol.startswith(BOUNDARY):
            if text:
                spans.append((text, first, place))
            text, first = symbol[len(BOUNDARY) :], place + (symbol == BOUNDARY)
        else:
            text += symbol
    return spans


def timed_words(
    hypothesis: Hypothesis,
    symbols: Sequence[str],
    *,
    words: Sequence[str] | None = None,
    calibration: Calibration | None = None,
    frame_seconds: float = FRAME_SECONDS,
) -> list[Word]:
    """Return the words of a hypothesis with times and confidences.

    A word starts at the frame of its first symbol and ends after the frame of its last one. CTC emits a symbol
    somewhere within its sound, a streaming model behind it: ``device.endpointing`` takes that delay off. A word's
    confidence is the least posterior of its symbols.

    Options:
        words: the words themselves, where a lexicon knows them; else they are read from the symbols.
        calibration: turns the confidence into the share of such words that are right.
        frame_seconds: of the frames that were decoded, which a pretrained teacher has shorter.

    Raises:
        ValueError: another number of words than the symbols spell.
    """
    spans = word_spans(hypothesis.ids, symbols)
    if words is not None and len(words) != len(spans):
        raise ValueError(f"words: got {len(words)}, wanted the {len(spans)} that the symbols spell")
    result: list[Word] = []
    for index, (text, first, stop) in enumerate(spans):
        confidence = word_confidence(hypothesis.probabilities[first:stop])
        result.append(
            {
                "word": words[index] if words is not None else text,
                "start": round(hypothesis.frames[first] * frame_seconds, 3),
                "end": round((hypothesis.frames[stop - 1] + 1) * frame_seconds, 3),
                "confidence": calibration.apply(confidence) if calibration else confidence,
            }
        )
    return result
