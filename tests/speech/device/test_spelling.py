from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.device.spelling import Symbols
from apps.speech.text import TextRules
from apps.speech.units import Units, train_sentencepiece, train_words
from kdcore.config import UserError

AN4 = Path(os.environ.get("KD_DATA", "../shared/data")) / "speech" / "an4"
TEXTS = ["yes no yes", "no nine ninety", "seventy seven even", "on one", "apple pie", "november nine nineteen"]


@pytest.fixture(scope="module")
def pieces() -> Units:
    return train_sentencepiece(TEXTS * 3, 40)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.text(st.sampled_from("aeilmnopstvxy"), min_size=1, max_size=12), max_size=5))
def test_pieces_are_merged_as_sentencepiece_merges_them(pieces: Units, words: list[str]) -> None:
    text = " ".join(words)
    symbols = Symbols(pieces.symbols)
    try:
        wanted = pieces.encode(text)
    except UserError:
        assert not symbols.can_spell(text)
        return
    assert symbols.encode(text) == wanted
    assert symbols.decode(wanted) == text


@pytest.mark.parametrize("size", [60, 150])
def test_pieces_of_real_texts(size: int) -> None:
    if not AN4.is_dir():
        pytest.skip("no AN4 in KD_DATA")
    texts = [json.loads(line)["text"] for line in (AN4 / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    units = train_sentencepiece(texts, size)
    symbols = Symbols(units.symbols)
    assert symbols.pieces
    for text in texts:
        assert symbols.encode(text) == units.encode(text)


def test_characters() -> None:
    units = Units.of_characters(TEXTS)
    symbols = Symbols(units.symbols)
    assert not symbols.pieces
    for text in TEXTS:
        assert symbols.encode(text) == units.encode(text)
        assert symbols.decode(units.encode(text)) == text
    with pytest.raises(UserError, match="'q' is not among"):
        symbols.encode("yes q")
    assert symbols.encode("") == []
    assert symbols.normalise("Yes,  NO!") == "yes no"
    assert Symbols(("▁", "A"), TextRules(lower=False)).normalise("A, a") == "A a"


def test_whole_words() -> None:
    units = train_words(TEXTS)
    symbols = Symbols(units.symbols)
    assert symbols.whole_words and not Symbols(train_sentencepiece(["a b", "b a b"], 5).symbols).whole_words
    for text in TEXTS:
        assert symbols.encode(text) == units.encode(text)
        assert symbols.decode(units.encode(text)) == text
    with pytest.raises(UserError, match="'maybe' is not among"):
        symbols.encode("yes maybe")
