from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.decode.lm import LanguageModel, check_arpa
from apps.speech.decode.ngram import build_ngram, read_sentences, write_arpa
from kdcore.config import UserError
from tests.speech.decode.made import an4_texts

TINY = """\\data\\
ngram 1=4
ngram 2=2

\\1-grams:
-1.0\t<unk>
-99\t<s>\t-0.3
-0.5\t</s>
-0.3\tyes\t-0.2

\\2-grams:
-0.1\t<s> yes
-0.2\tyes </s>

\\end\\
"""

Table = dict[tuple[str, ...], tuple[float, float]]


def read(text: str) -> Table:
    """Return n-gram -> (probability, back-off weight), by another reading of the file than check_arpa's."""
    table: Table = {}
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) > 1:
            weight = 10 ** float(fields[2]) if len(fields) > 2 else 1.0
            table[tuple(fields[1].split())] = (10 ** float(fields[0]), weight)
    return table


def probability(table: Table, gram: tuple[str, ...]) -> float:
    if gram in table:
        return table[gram][0]
    return table.get(gram[:-1], (0.0, 1.0))[1] * probability(table, gram[1:])


def check_sums(text: str) -> None:
    table = read(text)
    words = [gram[0] for gram in table if len(gram) == 1 and gram != ("<s>",)]
    contexts = {gram[:-1] for gram in table} | {gram for gram in table if gram[-1] != "</s>"}
    for context in contexts:
        assert math.fsum(probability(table, (*context, word)) for word in words) == pytest.approx(1.0, abs=1e-5), (
            context
        )


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=30),
    order=st.integers(2, 4),
)
def test_every_context_sums_to_one(texts: list[str], order: int) -> None:
    check_sums(build_ngram(texts, order, vocabulary=["zebra"]))


def test_every_context_of_real_text_sums_to_one() -> None:
    check_sums(build_ngram(an4_texts("train")[::6], 3))


def test_kneser_ney_by_hand() -> None:
    # one pair of words 1, 2, 3, 4 times each: bigram counts of counts are known, and so are the discounts
    texts = ["a b"] * 1 + ["c d"] * 2 + ["e f"] * 3 + ["g h"] * 4
    table = read(build_ngram(texts, 2))
    # bigrams with counts 1..4: three of each (<s> x, x y, y </s>)
    share = 3 / (3 + 2 * 3)
    two = 2 - 3 * share * 3 / 3
    left = (4 * 0 + (1 - 2 * share) + two + 2 * (3 - 4 * share)) / 10
    # unigrams: 8 words follow one word each, </s> four: too regular for discounts, so Witten-Bell: 9 types, 12 tokens
    single = 1 / (12 + 9) + 9 / 21 / 10
    assert table[("d",)][0] == pytest.approx(single, rel=1e-5)
    assert table[("<s>",)][1] == pytest.approx(left, rel=1e-5)
    assert table[("<s>", "c")][0] == pytest.approx((2 - two) / 10 + left * single, rel=1e-5)
    assert table[("<unk>",)][0] == pytest.approx(9 / 21 / 10, rel=1e-5)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_kenlm_reads_what_is_written(tmp_path: Path, order: int) -> None:
    texts = an4_texts("train")
    held_out = an4_texts("test")
    path = tmp_path / "lm.arpa"
    write_arpa(path, texts, order)
    table = read(path.read_text(encoding="utf-8"))
    words = sorted({word for text in [*texts, *held_out] for word in text.split()})
    model = LanguageModel(path, words)
    assert model.order == order
    assert check_arpa(path) == {length: sum(len(gram) == length for gram in table) for length in range(1, order + 1)}
    total, count = 0.0, 0
    for text in held_out:
        state, score, history = model.start(), 0.0, ["<s>"]
        expected = 0.0
        for word in text.split():
            state, step = model.score(state, words.index(word))
            score += step
            history.append(word if (word,) in table else "<unk>")
            expected += math.log(probability(table, tuple(history[-order:])))
        score += model.finish(state)
        expected += math.log(probability(table, tuple([*history, "</s>"][-order:])))
        assert score == pytest.approx(expected, abs=1e-3)
        total, count = total + score, count + len(text.split()) + 1
    perplexity = math.exp(-total / count)
    # of single words it is 56
    assert perplexity < {2: 25, 3: 24, 4: 25}[order]


def test_unseen_words_of_the_vocabulary_are_as_likely_as_unknown_ones() -> None:
    table = read(build_ngram(["yes no", "no"], 2, vocabulary=["november"]))
    assert table[("november",)] == table[("<unk>",)]


def test_short_sentences_lower_the_order() -> None:
    text = build_ngram(["yes", "no"], 5)
    assert "\\3-grams:" in text
    assert "\\4-grams:" not in text
    check_sums(text)


@pytest.mark.parametrize("texts", [[], ["", "  "]])
def test_no_text_is_an_error(texts: list[str]) -> None:
    with pytest.raises(UserError, match="no text"):
        build_ngram(texts, 3)


def test_symbols_of_the_model_and_orders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="text 2: got </s>"):
        build_ngram(["yes", "no </s>"], 2)
    with pytest.raises(ValueError, match="order: got 1"):
        build_ngram(["yes"], 1)
    with pytest.raises(UserError, match="No such file"):
        read_sentences(tmp_path / "no.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="UTF-8"):
        read_sentences(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UserError, match="no text"):
        read_sentences(tmp_path / "empty.txt")


def test_other_tools_forms_pass(tmp_path: Path) -> None:
    path = tmp_path / "lm.arpa"
    loose = "made by hand\n\n" + TINY.replace("\t", "  ").replace("\n", "\r\n").replace("ngram 1=4", "ngram  1 = 4")
    path.write_bytes(loose.encode())
    assert check_arpa(path) == {1: 4, 2: 2}


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("\\data\\", "data", r"line \d+: no \\data\\"),
        ("ngram 1=4", "ngram 1=5", "line 11: 4 1-grams end here, the header says 5"),
        ("ngram 2=2", "ngram 3=2", "line 3: wanted 'ngram 2=COUNT'"),
        ("ngram 1=4", "ngram 1=many", "line 2: wanted 'ngram 1=COUNT'"),
        ("-0.5\t</s>", "0.5\t</s>", "line 8: log10 probability: got 0.5"),
        ("-0.5\t</s>", "nan\t</s>", "line 8: log10 probability: got 'nan'"),
        ("-0.3\tyes\t-0.2", "-0.3\tyes\tx", "line 9: back-off weight: got 'x'"),
        ("-0.1\t<s> yes", "-0.1\t<s>", "line 12: wanted a probability, 2 words"),
        ("-0.1\t<s> yes", "-0.1\t<s> yes\t-1", "line 12: wanted a probability and 2 words"),
        ("-99\t<s>\t-0.3", "-99\t<S>\t-0.3", "no <s> among"),
        ("\\end\\", "", "without"),
        ("\\2-grams:", "\\3-grams:", r"line 11: wanted \\2-grams:"),
    ],
)
def test_the_bad_line_is_named(tmp_path: Path, old: str, new: str, problem: str) -> None:
    path = tmp_path / "lm.arpa"
    path.write_text(TINY.replace(old, new, 1))
    with pytest.raises(UserError, match=problem):
        check_arpa(path)
    with pytest.raises(UserError, match=problem):
        LanguageModel(path, ["yes"])


@settings(max_examples=80, deadline=None)
@given(cut=st.integers(0, len(TINY) - 8), junk=st.binary(max_size=40))
def test_damaged_files_are_one_error(tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes) -> None:
    path = tmp_path_factory.mktemp("lm") / "lm.arpa"
    path.write_bytes(TINY[:cut].encode() + junk)
    with pytest.raises(UserError, match=r"lm\.arpa"):
        check_arpa(path)


def test_what_is_no_arpa_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        check_arpa(tmp_path / "no.arpa")
    path = tmp_path / "lm"
    path.write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\x00")
    with pytest.raises(UserError, match="KenLM binary"):
        check_arpa(path)
    path.write_bytes(b"\x00" * 100_000)
    with pytest.raises(UserError, match="longer than"):
        check_arpa(path)
    orders = "".join(f"ngram {order}={3 if order == 1 else 1}\n" for order in range(1, 8))
    sections = [f"\\{order}-grams:\n-0.5\t<s>{' a' * (order - 1)}\n\n" for order in range(2, 8)]
    path.write_text(f"\\data\\\n{orders}\n\\1-grams:\n-1\t<s>\t0\n-1\t</s>\n-1\ta\t0\n\n{''.join(sections)}\\end\\\n")
    with pytest.raises(UserError, match="order 7, wanted 2 to 6"):
        LanguageModel(path, ["a"])


def test_a_model_of_single_words_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lm.arpa"
    path.write_text("\\data\\\nngram 1=2\n\n\\1-grams:\n-1\t<s>\n-1\t</s>\n\n\\end\\\n")
    assert check_arpa(path) == {1: 2}
    with pytest.raises(UserError, match="order 1, wanted 2 to 6"):
        LanguageModel(path, ["a"])


def test_loading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lm.arpa"
    path.write_text(TINY)
    model = LanguageModel(path, ["yes", "no"])
    assert capfd.readouterr().err == ""
    state, score = model.score(model.start(), 0)
    assert score == pytest.approx(-0.1 * math.log(10))
    assert model.finish(state) == pytest.approx(-0.2 * math.log(10))
    assert model.alone(1) == pytest.approx(-1.0 * math.log(10))  # unknown
    assert model.alone(0) == pytest.approx(-0.3 * math.log(10))


def test_order_of_texts_does_not_matter() -> None:
    texts = ["a b c", "b c", "c a", "a"]
    assert len({build_ngram(list(order), 3) for order in itertools.permutations(texts)}) == 1
