from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.speech.decode.confidence import Calibration, word_confidence
from apps.speech.decode.ctc import Hypothesis
from apps.speech.decode.words import timed_words, word_spans
from tests.speech.decode.made import Characters, Pieces


@given(words=st.lists(st.text("abcxyz", min_size=1, max_size=5), max_size=6))
def test_spans_spell_the_words_of_characters(words: list[str]) -> None:
    units = Characters()
    ids = units.encode(" ".join(words))
    spans = word_spans(ids, units.symbols)
    assert [text for text, _, _ in spans] == words
    assert ["".join(units.symbols[index] for index in ids[first:stop]) for _, first, stop in spans] == words


@given(words=st.lists(st.sampled_from(["yes", "no", "nine", "one", "two", "went"]), max_size=6))
def test_spans_spell_the_words_of_pieces(words: list[str]) -> None:
    units = Pieces((*Pieces().symbols, "n", "▁went"))
    ids = units.encode(" ".join(words))
    spans = word_spans(ids, units.symbols)
    assert [text for text, _, _ in spans] == words
    assert [first for _, first, _ in spans[1:]] == [stop for _, _, stop in spans[:-1]]


def test_stray_boundaries_are_no_words() -> None:
    units = Characters()
    edge = units.symbols.index("▁")
    assert [text for text, _, _ in word_spans([edge, 0, edge, edge, 1, edge], units.symbols)] == ["a", "b"]
    assert word_spans([], units.symbols) == []


def test_times_and_confidences() -> None:
    units = Characters()
    hypothesis = Hypothesis(tuple(units.encode("no yes")), -1.0, (5, 6, 8, 10, 12, 15), (0.9, 0.8, 0.1, 0.99, 0.5, 0.7))
    assert timed_words(hypothesis, units.symbols) == [
        {"word": "no", "start": 0.2, "end": 0.28, "confidence": 0.8},
        {"word": "yes", "start": 0.4, "end": 0.64, "confidence": 0.5},
    ]
    shorter = timed_words(hypothesis, units.symbols, frame_seconds=0.02)
    assert [(each["start"], each["end"]) for each in shorter] == [(0.1, 0.14), (0.2, 0.32)]
    named = timed_words(hypothesis, units.symbols, words=["No", "Yes"], calibration=Calibration(1.0, 0.0))
    assert [word["word"] for word in named] == ["No", "Yes"]
    assert [word["confidence"] for word in named] == pytest.approx([0.8, 0.5])
    with pytest.raises(ValueError, match="got 1, wanted the 2"):
        timed_words(hypothesis, units.symbols, words=["no"])


def test_a_word_is_as_sure_as_its_least_symbol() -> None:
    assert word_confidence([0.9, 0.2, 1.0]) == 0.2
    for bad in ([], [1.5], [-0.1]):
        with pytest.raises(ValueError, match="probabilities"):
            word_confidence(bad)


def test_calibration_gives_the_share_of_right_words() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.02, 0.98, 20_000)
    logit = np.log(confidence / (1 - confidence))
    chance = 1 / (1 + np.exp(-(0.5 * logit + 1.0)))
    fitted = Calibration.fit(confidence, rng.uniform(size=20_000) < chance)
    assert fitted.scale == pytest.approx(0.5, abs=0.05)
    assert fitted.offset == pytest.approx(1.0, abs=0.05)
    assert fitted.apply(0.5) == pytest.approx(1 / (1 + np.exp(-1.0)), abs=0.02)


def test_calibration_of_few_words() -> None:
    sure = Calibration.fit([0.9, 0.95, 0.99], [True, True, True])
    assert 0.5 < sure.apply(0.95) < 1.0
    parted = Calibration.fit([0.1, 0.2, 0.8, 0.9], [False, False, True, True])
    assert parted.apply(0.1) < 0.5 < parted.apply(0.9)
    assert 0.0 < parted.apply(0.0) < parted.apply(1.0) < 1.0
    with pytest.raises(ValueError, match="scale"):
        Calibration.fit([0.1, 0.2, 0.8, 0.9] * 20, [True, True, False, False] * 20)
    for confidences, correct in (([], []), ([0.5], [True, False]), ([1.2], [True])):
        with pytest.raises(ValueError, match="confidences"):
            Calibration.fit(confidences, correct)


def test_decoding_needs_no_torch() -> None:
    names = "beam, confidence, ctc, endpoint, greedy, hotwords, lexicon, lm, nbest, ngram, words"
    imports = f"from apps.speech.decode import {names}"
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules or 'flashlight' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
