"""Words with their times and confidences, from the symbols of any decoder. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypedDict

import numpy as np

from apps.speech.decode.confidence import Calibration, word_confidence
from apps.speech.decode.ctc import BOUNDARY, FRAME_SECONDS, Hypothesis


class Word(TypedDict):
    """A word as it is handed out: times in seconds from the start of the audio, confidence 0..1."""

    word: str
    start: float
    end: float
    confidence: float


class Spoken(Protocol):
    """A word sequence with its symbols, as ``lexicon.WordHypothesis``."""

    @property
    def words(self) -> tuple[str, ...]:
        """The words."""

    @property
    def score(self) -> float:
        """Their natural log score."""

    @property
    def symbols(self) -> Hypothesis:
        """The symbols that spell them."""


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
    delay_ms: float = 0.0,
    words: Sequence[str] | None = None,
    confidences: Sequence[float] | None = None,
    calibration: Calibration | None = None,
) -> list[Word]:
    """Return the words of a hypothesis with times and confidences.

    A word starts at the frame of its first symbol and ends after the frame of its last one, both earlier by what the
    model lags behind, and not before 0. CTC emits a symbol somewhere within its sound: the word may sound for longer.

    Options:
        delay_ms: the model's emission delay in milliseconds.
        words: the words themselves, where a lexicon knows them; else they are read from the symbols.
        confidences: those of ``word_shares``; else a word has the least posterior of its symbols.
        calibration: turns the confidence into the share of such words that are right.

    Raises:
        ValueError: another number of words or confidences than the symbols spell.
    """
    spans = word_spans(hypothesis.ids, symbols)
    for name, given in (("words", words), ("confidences", confidences)):
        if given is not None and len(given) != len(spans):
            raise ValueError(f"{name}: got {len(given)}, wanted the {len(spans)} that the symbols spell")
    result: list[Word] = []
    for index, (text, first, stop) in enumerate(spans):
        least = word_confidence(hypothesis.probabilities[first:stop])
        confidence = least if confidences is None else float(confidences[index])
        start = max(0.0, hypothesis.frames[first] * FRAME_SECONDS - delay_ms / 1000)
        end = max(start, (hypothesis.frames[stop - 1] + 1) * FRAME_SECONDS - delay_ms / 1000)
        result.append(
            {
                "word": words[index] if words is not None else text,
                "start": round(start, 3),
                "end": round(end, 3),
                "confidence": calibration.apply(confidence) if calibration else confidence,
            }
        )
    return result


def word_shares(n_best: Sequence[Spoken], symbols: Sequence[str]) -> list[float]:
    """Return the confidence, 0..1, of each word of the first hypothesis: the share of the N best that have it too.

    Each hypothesis counts by its probability, and has the word if it does at overlapping frames. With a language
    model this tells right words from wrong ones, which the posteriors of their symbols do not; the N best must come
    from a decoder that does not recombine.

    Raises:
        ValueError: no hypotheses.
    """
    if not n_best:
        raise ValueError("n_best: got no hypotheses, wanted one or more")
    weights = np.exp(np.array([one.score for one in n_best]) - max(one.score for one in n_best))
    weights /= weights.sum()
    heard = [_frames(one, symbols) for one in n_best]
    return [
        min(1.0, float(sum(weight for weight, other in zip(weights, heard, strict=True) if _hears(other, *word))))
        for word in heard[0]
    ]


def _frames(one: Spoken, symbols: Sequence[str]) -> list[tuple[str, int, int]]:
    frames, spans = one.symbols.frames, word_spans(one.symbols.ids, symbols)
    return [(word, frames[a], frames[b - 1]) for word, (_, a, b) in zip(one.words, spans, strict=True)]


def _hears(words: list[tuple[str, int, int]], word: str, first: int, last: int) -> bool:
    return any(other == word and start <= last and end >= first for other, start, end in words)
