"""Texts survive units and files, tokens.txt is what a device reads, and what does not fit is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.text import TextRules
from apps.speech.units import Units, needed_frames, train_sentencepiece, train_words
from kdcore.config import UserError

AN4 = Path(os.environ.get("KD_DATA", "../shared/data")) / "speech" / "an4"
TEXTS = ["yes no stop", "enter seven three", "nine one two yes", "rubout g m e f three nine", "été don't"] * 4


def test_characters_as_the_contract_says() -> None:
    units = Units.of_characters(["yes no"])
    assert units.symbols == ("▁", "e", "n", "o", "s", "y") and units.blank == 6
    assert [units.symbols[each] for each in units.encode("yes  no ")] == list("yes▁no")
    assert units.decode(units.encode("yes no")) == "yes no" and units.encode("") == [] and units.decode([]) == ""
    assert units.decode([0, 0, 1, 0]) == "e"


@settings(max_examples=200)
@given(texts=st.lists(st.text(), min_size=1))
def test_normalised_texts_survive_characters(texts: list[str]) -> None:
    normal = [TextRules().normalise(text) for text in texts]
    if not any(normal):
        return
    units = Units.of_characters(normal)
    assert [units.decode(units.encode(text)) for text in normal] == normal


PIECES = {kind: train_sentencepiece(TEXTS, 28, kind=kind) for kind in ("bpe", "unigram")}  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@given(chosen=st.lists(st.text("abdefghimnorstuvwxyé'", min_size=1), max_size=8))
def test_texts_survive_pieces(kind: str, chosen: list[str]) -> None:
    units = PIECES[kind]
    letters = set("".join(units.symbols))
    text = " ".join(word for word in chosen if set(word) <= letters)
    ids = units.encode(text)
    assert units.decode(ids) == text
    # a device puts the symbols together by itself
    assert "".join(units.symbols[each] for each in ids).replace("▁", " ").strip() == text
    assert all(0 <= each < units.blank for each in ids)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic_and_has_no_unknown_piece(kind: str) -> None:
    again = train_sentencepiece(iter(TEXTS), 28, kind=kind)  # type: ignore[arg-type]
    assert again.model == PIECES[kind].model and again == PIECES[kind]
    assert "<unk>" not in again.symbols and len(again.symbols) <= 28
    assert kind != "bpe" or len(again.symbols) == 28


def test_words_are_symbols_of_their_own(tmp_path: Path) -> None:
    units = train_words(["yes no", " no  stop", "", "no"])
    assert set(units.symbols) == {"▁yes", "▁no", "▁stop"} and units.symbols[0] == "▁no"
    assert units.decode(units.encode("stop yes no no")) == "stop yes no no" and len(units.encode("stop yes")) == 2
    assert train_words(["yes no", " no  stop", "", "no"]) == units
    units.save(tmp_path)
    assert Units.load(tmp_path) == units
    with pytest.raises(UserError, match="holds '▁go', which is outside the units"):
        units.encode("yes go")
    with pytest.raises(UserError, match="no text"):
        train_words([" "])


def test_pieces_that_cannot_be_trained() -> None:
    with pytest.raises(
        UserError, match=r"words\.txt: 9000 pieces cannot be made of 20 texts: Vocabulary size too high"
    ):
        train_sentencepiece(TEXTS, 9000, name="words.txt")
    with pytest.raises(UserError, match="3 pieces cannot be made"):
        train_sentencepiece(TEXTS, 3)
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece(["", " "], 10)


@pytest.mark.parametrize("units", [Units.of_characters(TEXTS), *PIECES.values()], ids=["characters", *PIECES])
def test_outside_symbols_are_named(units: Units) -> None:
    with pytest.raises(UserError, match=r"text 'yes quiz': holds '.*q.*', which is outside the units"):
        units.encode("yes quiz")
    with pytest.raises(UserError, match="stands for the word boundary"):
        units.encode("a▁b")
    with pytest.raises(ValueError, match="got"):
        units.decode([units.blank])
    with pytest.raises(ValueError, match="got -1"):
        units.decode([-1])


@pytest.mark.parametrize("units", [Units.of_characters(TEXTS), *PIECES.values()], ids=["characters", *PIECES])
def test_saved_units_are_loaded(tmp_path: Path, units: Units) -> None:
    PIECES["bpe"].save(tmp_path)  # what was there before does not stay
    units.save(tmp_path)
    assert Units.load(tmp_path) == units
    lines = (tmp_path / "tokens.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ") for line in lines] == [[s, str(i)] for i, s in enumerate((*units.symbols, "<blk>"))]
    assert lines[-1] == f"<blk> {len(units.symbols)}" and any(line.startswith("▁") for line in lines)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    def wrong(text: str, match: str) -> None:
        (tmp_path / "tokens.txt").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=match):
            Units.load(tmp_path)

    with pytest.raises(UserError, match=r"tokens\.txt: cannot be read"):
        Units.load(tmp_path)
    wrong("", r"tokens\.txt: line 1")
    wrong("a 0\nb 2\n<blk> 2\n", "line 2: got 'b 2'")
    wrong("a 0\na 1\n<blk> 2\n", "line 2")
    wrong("a 0\nb 1\n", "line 2: got 'b', wanted <blk>")
    wrong("<blk> 0\na 1\n", "line 2: got 'a'")
    wrong("▁yes 0\n<blk> 1\n", r"line 1: '▁yes' is no character, and sentencepiece\.model is not beside it")
    PIECES["bpe"].save(tmp_path)
    wrong("a 0\n<blk> 1\n", r"does not hold the pieces of sentencepiece\.model")
    for data in (b"", b"hello", (PIECES["bpe"].model or b"")[:99]):
        with pytest.raises(UserError, match="is no SentencePiece model"):
            Units.from_sentencepiece(data)
    (tmp_path / "x.model").write_bytes(b"no")
    with pytest.raises(UserError, match=r"x\.model: is no SentencePiece model"):
        Units.from_sentencepiece(tmp_path / "x.model")


def test_wrong_symbols() -> None:
    for symbols in ((), ("a", "a"), ("a b",), ("",), ("<blk>",)):
        with pytest.raises(ValueError, match="symbols"):
            Units(symbols)
    with pytest.raises(UserError, match="no text has a character"):
        Units.of_characters(["", "  "])


@given(st.lists(st.integers(0, 2), max_size=8))
def test_needed_frames_against_the_shortest_alignment(ids: list[int]) -> None:
    path: list[int] = []
    for each in ids:
        path += [-1, each] if path and path[-1] == each else [each]
    assert needed_frames(ids) == len(path)


@pytest.mark.skipif(not AN4.is_dir(), reason="KD_DATA has no speech/an4")
def test_an4_texts() -> None:
    texts = [json.loads(line)["text"] for line in (AN4 / "train.jsonl").read_text().splitlines()]
    units = Units.of_characters(texts)
    assert units.symbols == ("▁", *"abcdefghijklmnopqrstuvwxyz")
    pieces = train_sentencepiece(texts, 64)
    for text in texts:
        assert TextRules().normalise(text) == text
        assert units.decode(units.encode(text)) == text == pieces.decode(pieces.encode(text))
