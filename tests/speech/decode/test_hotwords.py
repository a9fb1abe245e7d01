from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.decode.hotwords import Hotwords
from kdcore.config import UserError
from tests.speech.decode.made import Characters, Pieces, beam_search, normalise, posteriors


def total(hotwords: Hotwords, ids: list[int]) -> float:
    state, score = hotwords.start(), 0.0
    for symbol in ids:
        state, step = hotwords.advance(state, symbol)
        score += step
    return score + hotwords.finish(state)


def occurrences(words: list[str], phrase: list[str]) -> int:
    return sum(words[place : place + len(phrase)] == phrase for place in range(len(words)))


phrases = st.dictionaries(
    st.lists(st.sampled_from(["a", "b", "ab", "ba", "aa"]), min_size=1, max_size=3).map(" ".join),
    st.floats(0.5, 8),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(phrases=phrases, words=st.lists(st.sampled_from(["a", "b", "ab", "ba", "aa", "aba"]), max_size=8))
@pytest.mark.parametrize("units", [Characters(), Pieces(("▁", "▁a", "a", "b", "▁ab"))], ids=["characters", "pieces"])
def test_a_text_gets_the_boost_of_each_phrase_in_it(
    units: Characters | Pieces, phrases: dict[str, float], words: list[str]
) -> None:
    expected = sum(boost * occurrences(words, phrase.split()) for phrase, boost in phrases.items())
    assert total(Hotwords(units, phrases), units.encode(" ".join(words))) == pytest.approx(expected, abs=1e-9)


def test_a_boost_comes_in_parts_and_is_given_back() -> None:
    units = Characters()
    hotwords = Hotwords(units, {"no": 4.0})
    state, first = hotwords.advance(hotwords.start(), units.symbols.index("n"))
    state, second = hotwords.advance(state, units.symbols.index("o"))
    assert (first, second) == (2.0, 2.0)
    assert hotwords.finish(state) == 0.0
    _, third = hotwords.advance(state, units.symbols.index("v"))
    assert third == -4.0


def test_a_hot_word_wins_where_the_audio_allows_it() -> None:
    units, rng = Characters(), np.random.default_rng(0)
    log_probs = posteriors(units.encode("call ann"), 29, rng, noise=0.3, sure=9.0).astype(np.float64)
    plain = beam_search(log_probs)[0]
    assert plain.ids == tuple(units.encode("call ann"))
    for frame in range(len(log_probs)):  # every n might be an m, though less likely so
        log_probs[frame, units.symbols.index("m")] = log_probs[frame, units.symbols.index("n")] - 1.0
    log_probs = normalise(log_probs).astype(np.float64)
    assert beam_search(log_probs)[0].ids == plain.ids
    hot = beam_search(log_probs, Hotwords(units, {"amm": 6.0}))[0]
    assert hot.ids == tuple(units.encode("call amm"))
    assert beam_search(log_probs, Hotwords(units, {"am": 6.0}))[0].ids == plain.ids
    certain = posteriors(units.encode("call bob"), 29, rng, noise=0.3, sure=14.0)
    assert beam_search(certain, Hotwords(units, {"amm": 6.0}))[0].ids == tuple(units.encode("call bob"))


@pytest.mark.parametrize(
    ("phrases", "problem"),
    [
        ({}, "no phrases"),
        ({" ": 2.0}, "wanted a phrase"),
        ({"naïve": 2.0}, "'naïve' cannot be spelled: 'ï'"),
        ({"yes": 0.0}, "boost of 'yes': got 0.0"),
        ({"yes": float("nan")}, "boost of 'yes'"),
        ({"yes": 1e9}, "at most 50"),
    ],
)
def test_bad_phrases_are_named(phrases: dict[str, float], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        Hotwords(Characters(), phrases)
