from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.decode.ctc import FRAME_SECONDS
from apps.speech.decode.endpoint import Rule
from apps.speech.decode.greedy import greedy
from apps.speech.device.decoding import Decoder, Decoding
from apps.speech.device.endpointing import Segment, Segmenter
from apps.speech.device.spelling import Symbols
from tests.speech.decode.made import Characters, posteriors

SYMBOLS = Symbols(Characters().symbols)
CLASSES = len(SYMBOLS.symbols) + 1
WORDS = ("yes", "no", "ten", "a", "seventeen")
RULES = (Rule(False, 1.0, 0.0), Rule(True, 0.4, 0.0), Rule(False, 0.0, 2.0))


def frames(words: list[str], pauses: list[int], seed: int) -> np.ndarray:
    """Return sure posteriors of words, each followed by so many frames of blank."""
    rng, parts = np.random.default_rng(seed), []
    silence = np.full((1, CLASSES), -12.0)
    silence[0, -1] = -1e-4
    for word, pause in zip(words, pauses, strict=True):
        spelling = [*SYMBOLS.encode(word), SYMBOLS.symbols.index("▁")]
        parts += [posteriors(spelling, CLASSES, rng, noise=0.1, sure=12.0), silence.repeat(pause, axis=0)]
    return np.concatenate(parts).astype(np.float64)


def segmenter(decoding: Decoding | None = None, rules: tuple[Rule, ...] | None = RULES) -> Segmenter:
    return Segmenter(Decoder(SYMBOLS, decoding or Decoding()).search, rules)


def found(made: Segmenter, log_probs: np.ndarray, edges: list[int]) -> list[Segment]:
    cuts = [0, *sorted(min(edge, len(log_probs)) for edge in edges), len(log_probs)]
    parts = [made.accept(log_probs[first:last]) for first, last in itertools.pairwise(cuts)]
    return [*itertools.chain(*parts), *made.finish()]


@settings(max_examples=40, deadline=None)
@given(
    spoken=st.lists(st.tuples(st.sampled_from(WORDS), st.integers(1, 40)), min_size=1, max_size=15),
    edges=st.lists(st.integers(0, 600), max_size=6),
    seed=st.integers(0, 99),
    decoding=st.sampled_from([Decoding(), Decoding(beam=4), Decoding(grammar=WORDS)]),
)
def test_segments_hold_every_word_once_whatever_the_split(
    spoken: list[tuple[str, int]], edges: list[int], seed: int, decoding: Decoding
) -> None:
    words = [word for word, _ in spoken]
    log_probs = frames(words, [pause for _, pause in spoken], seed)
    result = found(segmenter(decoding), log_probs, edges)
    assert result == found(segmenter(decoding), log_probs, [])
    assert " ".join(segment.text for segment in result).split() == words
    # times are those of the whole audio
    whole = segmenter(decoding, None)
    (alone,) = found(whole, log_probs, [])
    assert [word["word"] for word in alone.words] == words
    for segment, word in zip([word for each in result for word in each.words], alone.words, strict=True):
        assert abs(segment["start"] - word["start"]) <= 0.081
    assert whole.frames == len(log_probs)


def test_a_word_of_a_list_is_not_cut_where_a_segment_is_as_long_as_it_may_be() -> None:
    # 50 frames after the pause its last letter is still to come
    log_probs = frames(["seventeen", "a", "no", "seventeen"], [1, 1, 31, 1], 15)
    result = found(segmenter(Decoding(grammar=WORDS)), log_probs, [])
    assert [segment.text for segment in result] == ["seventeen", "a no", "seventeen"]
    # a beginning that never becomes a word is not waited for without end
    made, stuck = segmenter(Decoding(grammar=WORDS)), log_probs[108:109]
    assert SYMBOLS.symbols[int(stuck.argmax())] == "e"
    made.accept(np.concatenate([log_probs[88:108], stuck.repeat(400, axis=0)]))
    assert made.frames == 420 and sum(map(len, made._kept)) <= 150


def test_the_delay_of_the_model_is_taken_off_the_times() -> None:
    log_probs = frames(["yes", "no", "ten"], [20, 3, 20], seed=1)
    search = Decoder(SYMBOLS, Decoding()).search
    exact, early, none = (Segmenter(search, RULES, delay_ms=delay) for delay in (0, 120, 60_000))
    plain, shifted = found(exact, log_probs, []), found(early, log_probs, [])
    assert [segment.text for segment in shifted] == [segment.text for segment in plain] == ["yes", "no ten"]
    for one, other in zip(plain, shifted, strict=True):
        for word, earlier in zip(one.words, other.words, strict=True):
            assert earlier["start"] == pytest.approx(max(0.0, word["start"] - 0.12))
            assert earlier["end"] == pytest.approx(max(0.0, word["end"] - 0.12))
    # a frame each, as if they were said at once
    words = [word for segment in found(none, log_probs, []) for word in segment.words]
    assert [(word["start"], word["end"]) for word in words] == [(0.0, 0.04), (0.04, 0.08), (0.08, 0.12)]


@settings(max_examples=40, deadline=None)
@given(
    spoken=st.lists(st.tuples(st.sampled_from(WORDS), st.integers(1, 30)), min_size=1, max_size=12),
    edges=st.lists(st.integers(0, 400), max_size=4),
    delay=st.sampled_from([0, 40, 130, 480, 2000]),
    decoding=st.sampled_from([Decoding(), Decoding(beam=4), Decoding(grammar=WORDS)]),
)
def test_every_word_has_a_frame_of_its_own(
    spoken: list[tuple[str, int]], edges: list[int], delay: int, decoding: Decoding
) -> None:
    log_probs = frames([word for word, _ in spoken], [pause for _, pause in spoken], seed=2)
    search = Decoder(SYMBOLS, decoding).search
    words = [word for each in found(Segmenter(search, RULES, delay_ms=delay), log_probs, edges) for word in each.words]
    plain = [word for each in found(Segmenter(search, RULES), log_probs, edges) for word in each.words]
    before = 0.0
    for word, late in zip(words, plain, strict=True):
        assert word["start"] >= before and word["end"] >= word["start"] + FRAME_SECONDS - 1e-6
        assert late["start"] - delay / 1000 - 1e-6 <= word["start"] <= late["start"]
        before = word["end"]


def test_the_best_path_is_cut_into_what_it_is() -> None:
    log_probs = frames(["yes", "no"] * 10, [2] * 20, 1)
    result = found(segmenter(), log_probs, [])
    assert len(result) > 1
    assert " ".join(segment.text for segment in result) == SYMBOLS.decode(greedy(log_probs).ids)


def test_frames_behind_a_pause_may_come_again() -> None:
    made = segmenter(rules=(Rule(True, 0.4, 0.0),))
    log_probs = frames(["yes", "no"], [12, 12], 2)
    for place in range(len(log_probs)):
        if made.accept(log_probs[place : place + 1]):
            break
    assert made.paused and made.shortest_pause == 10
    made.rewind(6)
    (segment,) = found(made, log_probs[place - 5 :], [])
    (_, wanted) = found(segmenter(rules=(Rule(True, 0.4, 0.0),)), log_probs, [])
    assert segment == wanted
    assert made.frames == len(log_probs)
    with pytest.raises(ValueError, match="frames: got 11, wanted at most the 10"):
        made.rewind(11)
    with pytest.raises(ValueError, match="a pause just before"):
        segmenter().rewind(2)


def test_a_word_that_never_ends_is_ended() -> None:
    symbol = np.full((1, CLASSES), -12.0)
    symbol[0, 0] = -1e-4
    made = segmenter()
    result = []
    for _ in range(100):
        result += made.accept(symbol.repeat(25, axis=0))
    assert result and all(segment.end - segment.start <= 2.0 * 3 + FRAME_SECONDS for segment in result)


def test_a_segment_has_words() -> None:
    with pytest.raises(ValueError, match="words"):
        Segment.of([])
    assert found(segmenter(), np.zeros((0, CLASSES)), []) == []
