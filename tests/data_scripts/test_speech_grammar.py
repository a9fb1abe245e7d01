"""The grammar: only words of its vocabulary, numbers that read back as themselves, every word said sooner or later."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scripts.speech_grammar import DIGITS, TEENS, TENS, cardinal, ordinal, sentence, spoken, vocabulary

DATA = Path(os.environ.get("KD_DATA", "../shared/data"))


def value_of(words: list[str]) -> int:
    """Read a number's words back, by adding and multiplying from left to right."""
    units = {word: number for number, word in enumerate((*DIGITS, *TEENS))}
    units |= {word: 10 * number for number, word in enumerate(TENS, start=2)}
    total = current = 0
    for word in words:
        if word == "thousand":
            total, current = 1000 * current, 0
        elif word == "hundred":
            current *= 100
        elif word != "and":
            current += units[word]
    return total + current


@given(st.integers(0, 999_999), st.booleans())
def test_a_number_reads_back_as_itself(value: int, with_and: bool) -> None:
    assert value_of(cardinal(value, with_and=with_and)) == value


def test_numbers_as_people_say_them() -> None:
    assert " ".join(cardinal(4883)) == "four thousand eight hundred eighty three"
    assert " ".join(cardinal(206, with_and=True)) == "two hundred and six"
    assert " ".join(cardinal(0)) == "zero"
    assert " ".join(cardinal(19_010)) == "nineteen thousand ten"
    assert [" ".join(ordinal(day)) for day in (1, 12, 20, 21, 30, 31)] == [
        *("first", "twelfth", "twentieth", "twenty first", "thirtieth", "thirty first")
    ]
    assert len({tuple(ordinal(day)) for day in range(1, 32)}) == 31


@pytest.mark.parametrize(("function", "value"), [(cardinal, -1), (cardinal, 1_000_000), (ordinal, 0), (ordinal, 32)])
def test_numbers_out_of_range_are_refused(function, value: int) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=f"got {value}"):
        function(value)


def test_sentences_hold_the_vocabulary_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    sentences = [sentence(generator) for _ in range(8000)]
    words = Counter(word for text in sentences for word in text.split())
    assert set(words) == vocabulary()
    assert all(text == " ".join(text.split()) and 1 <= len(text.split()) <= 16 for text in sentences)
    assert len(set(sentences)) > 5500
    assert not any("fuc" in text.replace(" ", "") for text in sentences)


def test_the_seed_decides() -> None:
    first, again, other = (np.random.default_rng(seed) for seed in (1, 1, 2))
    texts = [[sentence(generator) for _ in range(20)] for generator in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]


def test_nearly_all_words_of_an4_are_in_it() -> None:
    manifest = DATA / "speech" / "an4" / "train.jsonl"
    if not manifest.exists():
        pytest.skip(f"{manifest} is not there")
    words = {word for line in manifest.read_text().splitlines() for word in json.loads(line)["text"].split()}
    assert words - vocabulary() == {"apostrophe", "half", "of"}


def test_the_letter_a_is_given_as_a_phoneme() -> None:
    assert spoken("b a c") == "b [['eI]] c"
    assert spoken("rubout april") == "rub out april"
