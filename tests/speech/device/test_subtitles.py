from __future__ import annotations

import html
import re
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.decode.words import Word
from apps.speech.device.subtitles import LINE, LINES, LONGEST, PAUSE, Cue, clock, cues, paragraphs, srt, vtt

TEXTS = st.text(st.sampled_from("abcdefghé<>&-'\"1"), min_size=1, max_size=100)


def made(*rows: tuple[str, float, float]) -> list[Word]:
    return [{"word": word, "start": start, "end": end, "confidence": 1.0} for word, start, end in rows]


@st.composite
def spoken(draw: st.DrawFn) -> list[Word]:
    """Words in order, with pauses of any length, and times that may touch or be equal."""
    rows, now = [], draw(st.floats(0, 4000))
    for text in draw(st.lists(TEXTS, max_size=40)):
        start = now + draw(st.sampled_from([0.0, 0.04, 0.3, PAUSE, 3.0]))
        now = start + draw(st.sampled_from([0.0, 0.04, 0.5, 9.0]))
        rows.append((text, round(start, 3), round(now, 3)))
    return made(*rows)


STAMP = r"(\d{2,}):([0-5]\d):([0-5]\d)[,.](\d{3})"


def parsed(text: str, *, numbered: bool) -> list[Cue]:
    """Read subtitles back, strictly: blocks parted by a blank line, a time line, one or more lines of text."""
    found = []
    for number, block in enumerate(text.split("\n\n")[:-1], start=1):
        lines = block.split("\n")
        if numbered:
            assert lines.pop(0) == str(number)
        match = re.fullmatch(f"{STAMP} --> {STAMP}", lines.pop(0))
        assert match, block
        values = [int(each) for each in match.groups()]
        times = [((hour * 60 + minute) * 60 + second) * 1000 + rest for hour, minute, second, rest in
                 (values[:4], values[4:])]  # fmt: skip
        assert lines
        for line in lines:
            assert line
            assert not re.search(r"[<>]|&(?!(amp|lt|gt);)", line)
        found.append(Cue(times[0], times[1], tuple(html.unescape(line) for line in lines)))
    return found


@settings(max_examples=150, deadline=None)
@given(spoken())
def test_both_forms_read_back_and_keep_the_rules(words: list[Word]) -> None:
    expected = list(cues(words))
    assert parsed("".join(srt(expected)), numbered=True) == expected
    head, *rest = vtt(expected)
    assert head == "WEBVTT\n\n"
    assert parsed("".join(rest), numbered=False) == expected
    # nothing is lost, nothing is added
    assert "".join("".join(cue.lines) for cue in expected).replace(" ", "") == "".join(word["word"] for word in words)
    for cue in expected:
        assert 0 <= cue.start < cue.end
        assert 1 <= len(cue.lines) <= LINES
        assert all(0 < len(line) <= LINE for line in cue.lines)
    for before, after in pairwise(expected):
        assert before.end <= after.start


def test_a_cue_ends_at_a_pause_at_two_lines_and_when_it_is_long() -> None:
    pause = made(("one", 0.0, 0.5), ("two", 0.6, 1.0), ("three", 1.0 + PAUSE, 2.5))
    assert [cue.lines for cue in cues(pause)] == [("one two",), ("three",)]
    wide = made(*[("ten" + "n" * 7, 0.1 * place, 0.1 * place + 0.1) for place in range(9)])
    assert [len(cue.lines) for cue in cues(wide)] == [2, 1]
    slow = made(*[("slow", 2.0 * place, 2.0 * place + 1.9) for place in range(6)])
    assert all(cue.end - cue.start <= 1000 * LONGEST for cue in cues(slow))
    assert len(list(cues(slow))) == 2


def test_a_short_cue_stands_for_a_second_unless_another_comes() -> None:
    alone = list(cues(made(("yes", 1.0, 1.2))))
    assert alone == [Cue(1000, 2000, ("yes",))]
    followed = list(cues(made(("yes", 1.0, 1.2), ("no", 1.95, 2.4))))
    assert [(cue.start, cue.end) for cue in followed] == [(1000, 1950), (1950, 2950)]


def test_times_beyond_an_hour_and_escaping() -> None:
    cue = Cue(3_723_004, 360_000_000, ("a<b>&c --> d",))
    assert next(srt([cue])) == "1\n01:02:03,004 --> 100:00:00,000\na&lt;b&gt;&amp;c --&gt; d\n\n"
    assert [clock(each) for each in (0, 62.34, 3723.96)] == ["0:00:00.0", "0:01:02.3", "1:02:04.0"]


def test_cues_come_while_words_come() -> None:
    asked = []

    def live() -> object:
        for word in made(("one", 0.0, 0.5), ("two", 2.0, 2.5), ("three", 4.0, 4.5)):
            asked.append(word["word"])
            yield word

    stream = cues(live())  # type: ignore[arg-type]
    assert next(stream).lines == ("one",)
    assert asked == ["one", "two", "three"]


def test_paragraphs_are_parted_by_pauses() -> None:
    words = made(("a", 0, 1), ("b", 2, 3), ("c", 5, 6), ("d", 6, 7))
    assert [[word["word"] for word in group] for group in paragraphs(words)] == [["a", "b"], ["c", "d"]]
    assert list(paragraphs([])) == []
