"""Alignments: counts against a slow reference, and the text people read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.speech.alignment import align, count_characters

WORDS = st.lists(st.sampled_from(["one", "two", "oh", "enter", "ü"]), max_size=7)


def distance(a: list[str] | str, b: list[str] | str) -> int:
    """The recurrence of Levenshtein as it is written in books."""
    table = [[max(i, j) if not i or not j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return table[-1][-1]


@given(WORDS, WORDS)
def test_counts_are_the_distance_and_pairs_cover_both(reference: list[str], hypothesis: list[str]) -> None:
    [found] = align([" ".join(reference)], [" ".join(hypothesis)])
    assert list(found.reference) == reference and list(found.hypothesis) == hypothesis
    assert sum(found.counts) == distance(reference, hypothesis)
    substitutions, deletions, insertions = found.counts
    assert len(reference) == len(found.hits) + substitutions + deletions
    assert len(hypothesis) == len(found.hits) + substitutions + insertions
    assert [i for i, _ in found.pairs if i is not None] == list(range(len(reference)))
    assert [j for _, j in found.pairs if j is not None] == list(range(len(hypothesis)))


@given(WORDS, WORDS)
def test_characters_are_counted_with_spaces(reference: list[str], hypothesis: list[str]) -> None:
    first, second = " ".join(reference), " ".join(hypothesis)
    assert count_characters([first], [second]) == [(distance(first, second), len(first))]


def test_text() -> None:
    [found] = align(["enter four six no"], ["go enter for six"])
    assert found.show() == "REF: ** enter four six no\nHYP: go enter for  six **\n     I        S        D"
    assert found.counts == (1, 1, 1) and found.hits == [(0, 1), (2, 3)]
    assert found.show(16) == (
        "REF: ** enter\nHYP: go enter\n     I\n\nREF: four six no\nHYP: for  six **\n     S        D"
    )
    assert align(["a b"], ["a b"])[0].show() == "REF: a b\nHYP: a b"
    assert align([""], ["a"])[0].show() == "REF: *\nHYP: a\n     I"
    assert align(["bb"], [""])[0].show() == "REF: bb\nHYP: **\n     D"
    assert align([""], [""])[0].show() == "REF:\nHYP:"


def test_wide_characters_stand_below_each_other() -> None:
    assert align(["你好 a"], ["hello a"])[0].show() == "REF: 你好  a\nHYP: hello a\n     S"


@given(WORDS, WORDS, st.integers(1, 40))
def test_blocks_keep_the_width_and_every_word(reference: list[str], hypothesis: list[str], width: int) -> None:
    shown = align([" ".join(reference)], [" ".join(hypothesis)])[0].show(width)
    blocks = [block.split("\n") for block in shown.split("\n\n")]
    assert all(len(line) <= max(width, 10) for block in blocks for line in block)  # "REF: enter" is the longest word
    for row, words in ((0, reference), (1, hypothesis)):
        said = [word for block in blocks for word in block[row][4:].split() if set(word) != {"*"}]
        assert said == words


def test_white_space_of_any_kind_parts_words() -> None:
    [found] = align([" one\ttwo\n"], ["one  two"])
    assert found.counts == (0, 0, 0) and len(found.hits) == 2


def test_none_at_all() -> None:
    assert align([], []) == [] == count_characters([], [])
    for function in (align, count_characters):
        with pytest.raises(ValueError, match="hypotheses: got 1, wanted one for each of 2"):
            function(["a", "b"], ["a"])
