from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.decode.ctc import ctc_log_probabilities
from apps.speech.decode.hotwords import Hotwords
from apps.speech.decode.lexicon import Grammar, WordDecoder
from apps.speech.decode.lm import LOG10, LanguageModel
from apps.speech.decode.ngram import write_arpa
from kdcore.config import UserError
from tests.speech.decode.made import Characters, Pieces, an4_texts, noisy, posteriors

SMALL = Characters(("a", "b", "▁"))
WIDE: dict[str, Any] = {"recombine": False, "beam": 5000, "tokens": 30, "floor": 0.0, "threshold": 600.0}


def flashlight(log_probs: np.ndarray, units: Characters, words: list[str], lm: str, weight: float) -> tuple[str, ...]:
    """Return the words of flashlight-text's lexicon decoder: words end in ▁, and so does the audio."""
    from flashlight.lib.text import decoder
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    dictionary = Dictionary()
    for index, word in enumerate(words):
        dictionary.add_entry(word, index)
    boundary, blank = units.symbols.index("▁"), len(units.symbols)
    model = KenLM(lm, dictionary)
    trie = decoder.Trie(blank + 1, boundary)
    for index, word in enumerate(words):
        trie.insert([*units.encode(word), boundary], index, model.score(model.start(True), index)[1])
    trie.smear(decoder.SmearingMode.MAX)
    options = decoder.LexiconDecoderOptions(64, 29, 40.0, weight, 0.0, -np.inf, 0.0, True, decoder.CriterionType.CTC)
    search = decoder.LexiconDecoder(options, trie, model, boundary, blank, -1, [], False)
    end = np.full((1, blank + 1), -1e4, np.float32)
    end[0, boundary] = 0.0
    emissions = np.ascontiguousarray(np.concatenate([log_probs, end]))
    best = search.decode(emissions.ctypes.data, *emissions.shape)[0]
    return tuple(words[index] for index in best.words if index >= 0)


@pytest.fixture(scope="module")
def arpa(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lm") / "an4.arpa"
    write_arpa(path, an4_texts("train"), 3)
    return str(path)


@pytest.fixture(scope="module")
def vocabulary() -> list[str]:
    return sorted({word for text in an4_texts("train") for word in text.split()})


def test_it_agrees_with_flashlight(arpa: str, vocabulary: list[str]) -> None:
    units, rng = Characters(), np.random.default_rng(0)
    decoder = WordDecoder(units, vocabulary, arpa, lm_weight=0.8, beam=64, floor=1e-6, threshold=40.0)
    same, right = 0, 0
    texts = an4_texts("train")[100:112]
    for text in texts:
        log_probs = posteriors(units.encode(text), 29, rng, noise=1.8)
        words = decoder.decode(log_probs)[0].words
        same += words == flashlight(log_probs, units, vocabulary, arpa, 0.8 * LOG10)
        right += words == tuple(text.split())
    assert same >= 11  # equal but for ties of the beams
    assert right >= 9


@pytest.mark.parametrize("seed", range(6))
def test_scores_are_those_of_all_spellings(tmp_path: Path, seed: int) -> None:
    """Every word sequence has its exact score: all spellings, the model's words and end, and the word score."""
    rng = np.random.default_rng(seed)
    log_probs = noisy(5, 4, rng, scale=1.0)
    words = ["a", "b", "ab"]
    write_arpa(tmp_path / "lm.arpa", ["a b", "ab", "b", "ab a"], 2)
    model = LanguageModel(tmp_path / "lm.arpa", words)
    decoder = WordDecoder(SMALL, words, model, lm_weight=0.7, word_score=-0.4, **WIDE)
    # a spelling may have more boundaries than it needs, anywhere between words
    expected: dict[tuple[str, ...], float] = {}
    spellings = [ids for size in range(6) for ids in itertools.product(range(3), repeat=size)]
    for ids, score in zip(spellings, ctc_log_probabilities(log_probs, spellings), strict=True):
        text = tuple("".join(SMALL.symbols[index] for index in ids).replace("▁", " ").split())
        if all(word in words for word in text):
            expected[text] = float(np.logaddexp(expected.get(text, -np.inf), score))
    found = {one.words: one.score for one in decoder.decode(log_probs, 1000)}
    for text, acoustic in expected.items():
        if not np.isfinite(acoustic):
            continue
        state, score = model.start(), 0.0
        for word in text:
            state, step = model.score(state, words.index(word))
            score += step
        score = acoustic + 0.7 * (score + model.finish(state)) - 0.4 * len(text)
        assert found[text] == pytest.approx(score, abs=1e-4), text


@pytest.mark.parametrize("units", [SMALL, Pieces(("▁a", "b", "▁b"))], ids=["characters", "pieces"])
@pytest.mark.parametrize("order", [2, 3])
def test_recombining_finds_the_same_words(tmp_path: Path, units: Characters | Pieces, order: int) -> None:
    write_arpa(tmp_path / "lm.arpa", ["a b a", "ab b", "b b ab", "ab a"], order)
    wide = {**WIDE, "beam": 800}
    apart = WordDecoder(units, ["a", "b", "ab"], str(tmp_path / "lm.arpa"), **wide)
    together = WordDecoder(units, ["a", "b", "ab"], str(tmp_path / "lm.arpa"), **{**wide, "recombine": True})
    for seed in range(8):
        log_probs = noisy(9, 4, np.random.default_rng(seed))
        found = {one.words: one.score for one in apart.decode(log_probs, 10_000)}
        best = together.decode(log_probs, 10_000)[0]
        # paths of other histories count for it, so it may win over one that is nearly as likely
        assert found[best.words] > max(found.values()) - 0.5
        assert best.score > found[best.words] - 0.5


def test_pieces_may_repeat_over_frames() -> None:
    units = Pieces()
    grammar = Grammar(units, ["yes", "no", "nine", "one", "two"])
    rng = np.random.default_rng(5)
    for text in ("yes no nine one", "one one two", "nine", "no no yes"):
        ids = units.encode(text)
        log_probs = posteriors(ids, 12, rng, sure=12.0)
        found = grammar.decode(log_probs)[0]
        assert found.words == tuple(text.split())
        assert found.symbols.ids == tuple(ids)
        assert np.all(np.diff(found.symbols.frames) > 0)


@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(0, 90), max_size=8), seed=st.integers(0, 3))
def test_any_split_equals_the_whole(arpa: str, vocabulary: list[str], cuts: list[int], seed: int) -> None:
    units = Characters()
    text = " ".join(an4_texts("train")[200 + seed : 201 + seed])
    log_probs = posteriors(units.encode(text), 29, np.random.default_rng(seed), noise=1.5)
    hotwords = Hotwords(units, {"november": 2.0, "rubout g": 1.0})
    decoder = WordDecoder(units, vocabulary, arpa, lm_weight=0.8, hotwords=hotwords, beam=8)
    whole = decoder.decode(log_probs, 3)
    stream = decoder.stream()
    edges = [0, *sorted(min(cut, len(log_probs)) for cut in cuts), len(log_probs)]
    for first, last in itertools.pairwise(edges):
        stream.accept(log_probs[first:last])
    found = stream.finish(3)
    assert [one.words for one in found] == [one.words for one in whole]
    assert [one.symbols.frames for one in found] == [one.symbols.frames for one in whole]
    assert [one.score for one in found] == pytest.approx([one.score for one in whole])


def test_partial_words_are_whole_ones() -> None:
    units = Characters()
    grammar = Grammar(units, ["yes", "no"])
    log_probs = posteriors(units.encode("yes no"), 29, np.random.default_rng(1), sure=12.0)
    stream = grammar.stream()
    seen = [stream.partial().words]
    for frame in log_probs:
        stream.accept(frame[None])
        seen.append(stream.partial().words)
    assert [words for words, _ in itertools.groupby(seen)] == [(), ("yes",), ("yes", "no")]


def test_a_word_that_the_audio_cuts_is_left_out() -> None:
    units = Characters()
    log_probs = posteriors(units.encode("yes n"), 29, np.random.default_rng(1), noise=0.1, sure=25.0)
    found = WordDecoder(units, ["yes", "no"], threshold=5.0).decode(log_probs)[0]
    assert found.words == ("yes",)
    assert "".join(units.symbols[index] for index in found.symbols.ids) == "yes"


def test_digits_are_heard_in_anything() -> None:
    units = Characters()
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    grammar = Grammar(units, digits, max_words=1)
    rng = np.random.default_rng(2)
    for digit in digits:
        assert grammar.decode(posteriors(units.encode(digit), 29, rng, noise=1.5))[0].words == (digit,)
    for found in grammar.decode(posteriors(units.encode("one two three"), 29, rng), 5):
        assert len(found.words) <= 1
        assert set(found.words) <= set(digits)
    assert grammar.decode(np.zeros((0, 29), np.float32))[0].words == ()


def test_a_grammar_hears_what_is_hardly_likely() -> None:
    """Letters far below what a search over all words looks at: the scores are still those of every path."""
    units = Characters()
    digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    rng = np.random.default_rng(3)
    for _ in range(5):
        logits = rng.normal(size=(16, len(units.symbols) + 1)) * 4
        logits[:, -1] += 25  # nearly all of it blank
        log_probs = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)
        found = {one.words: one.score for one in Grammar(units, digits, max_words=1).decode(log_probs, 20)}
        for digit in digits:
            letters, boundary = units.encode(digit), units.symbols.index("▁")
            # more boundaries than these on either side have next to no probability
            spellings = [
                [boundary] * before + letters + [boundary] * after for before in range(4) for after in range(4)
            ]
            wanted = np.logaddexp.reduce(ctc_log_probabilities(log_probs, spellings))
            assert found[(digit,)] == pytest.approx(wanted, abs=1e-2)


def test_max_words_of_pieces() -> None:
    units = Pieces()
    log_probs = posteriors(units.encode("yes no"), 12, np.random.default_rng(0), sure=8.0)
    for most in (1, 2):
        grammar = WordDecoder(units, ["yes", "no"], max_words=most, recombine=False)
        assert max(len(one.words) for one in grammar.decode(log_probs, 50)) == most
    assert grammar.decode(log_probs)[0].words == ("yes", "no")


def test_hot_words_in_a_lexicon() -> None:
    units = Characters()
    log_probs = posteriors(units.encode("call ann"), 29, np.random.default_rng(0), noise=0.3, sure=5.0)
    words = ["call", "ann", "anna", "dan"]
    assert WordDecoder(units, words).decode(log_probs)[0].words == ("call", "ann")
    hot = WordDecoder(units, words, hotwords=Hotwords(units, {"anna": 20.0}))
    assert hot.decode(log_probs)[0].words == ("call", "anna")


def test_a_language_model_decides_between_likely_words(tmp_path: Path) -> None:
    write_arpa(tmp_path / "lm.arpa", ["two b", "two b", "two b", "d two"], 2)
    log_probs = np.log(np.full((1, 29), 1e-4, np.float32))
    units = Characters()
    log_probs[0, units.symbols.index("b")] = np.log(0.45)
    log_probs[0, units.symbols.index("d")] = np.log(0.5)
    spoken = posteriors(units.encode("two"), 29, np.random.default_rng(0), sure=12.0)
    gap = np.full((1, 29), -12.0, np.float32)
    gap[0, units.symbols.index("▁")] = -0.001
    log_probs = np.concatenate([spoken, gap, log_probs])
    assert WordDecoder(units, ["two", "b", "d"]).decode(log_probs)[0].words == ("two", "d")
    assert WordDecoder(units, ["two", "b", "d"], str(tmp_path / "lm.arpa")).decode(log_probs)[0].words == ("two", "b")


def test_memory_does_not_grow_with_the_audio(arpa: str, vocabulary: list[str]) -> None:
    units, rng = Characters(), np.random.default_rng(0)
    stream = WordDecoder(units, vocabulary, arpa, beam=4).stream()
    log_probs = posteriors(units.encode(" ".join(an4_texts("train")[:40])), 29, rng, sure=9.0)
    stream.accept(log_probs)
    search = stream._search
    assert len(log_probs) > 1000
    assert max(node.depth for node in search._beam) - search._root.depth < 150
    assert len(stream.finish()[0].words) > 100


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "no words"),
        (["yes", "naïve"], "word 'naïve' cannot be spelled: 'ï'"),
        (["yes", "two words"], "got 'two words', wanted one word"),
        (["yes", ""], "wanted one word"),
    ],
)
def test_bad_words_are_named(words: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        WordDecoder(Characters(), words)


def test_words_spelled_alike_are_named() -> None:
    class Lower(Characters):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.lower())

    with pytest.raises(UserError, match="'Yes' and 'yes' are spelled alike"):
        WordDecoder(Lower(), ["yes", "Yes"])


def test_bad_posteriors_and_files_are_named(tmp_path: Path) -> None:
    decoder = WordDecoder(Characters(), ["yes"])
    with pytest.raises(ValueError, match=r"wanted \[T, 29\]"):
        decoder.decode(np.zeros((2, 5), np.float32))
    with pytest.raises(ValueError, match="NaN"):
        decoder.decode(np.full((2, 29), np.nan, np.float32))
    with pytest.raises(UserError, match="No such file"):
        WordDecoder(Characters(), ["yes"], str(tmp_path / "no.arpa"))
    (tmp_path / "bad.arpa").write_text(json.dumps({}))
    with pytest.raises(UserError, match="line 1"):
        WordDecoder(Characters(), ["yes"], str(tmp_path / "bad.arpa"))
    with pytest.raises(ValueError, match="max_words: got 0"):
        Grammar(Characters(), ["yes"], max_words=0)
    with pytest.raises(ValueError, match="beam: got 0"):
        WordDecoder(Characters(), ["yes"], beam=0)
