from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apps.speech.device.outputs import Output, subtitle_paths
from apps.speech.device.transcribe import Item
from kdcore.config import UserError


@pytest.mark.parametrize("content", ["my notes\n", "my notes", '{"a": 1}\n', "[1]\n", '{"audio_filepath": "a"}\n'])
def test_a_file_that_is_no_output_is_not_touched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="line 1: is no row"):
        Output(path, {})
    assert path.read_text(encoding="utf-8") == content
    assert list(tmp_path.iterdir()) == [path]


def test_no_more_of_a_line_is_read_than_a_row_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apps.speech.device.outputs._LONGEST_ROW", 100)
    row = b'{"audio_filepath": "a", "text": "", "words": []}\n'
    path = tmp_path / "texts.jsonl"
    for number, content in enumerate((row[:-2] + b" " * 60, row + b" " * 101, row * 2 + row[:20] + b" " * 99), start=1):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"texts\.jsonl: line {number}: is no row"):
            Output(path, {})
        assert path.read_bytes() == content


def test_only_a_regular_file_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it would wait for a writer
    for path in (pipe, Path("/dev/null"), Path("/dev/full")):
        with pytest.raises(UserError, match=f"--out: {path} is no regular file; wanted a file"):
            Output(path, {})
        assert not path.with_name(f"{path.name}.settings.json").exists()


def names(*items: Item) -> list[str]:
    """Return the names of pieces, in their order; "" for one that has none."""
    paths, bad = subtitle_paths(items, Path("cues"), ".srt")
    assert len(bad) == len(items) - len(paths)
    return [paths[item].name if item in paths else "" for item in items]


def test_subtitles_have_the_least_name_that_tells_them_apart() -> None:
    assert names(Item("talk.wav", ""), Item("calls/monday.flac", "", id="7")) == ["talk.srt", "monday.srt"]
    assert names(*(Item("a.wav", "", channel=channel) for channel in (0, 1))) == ["a-channel0.srt", "a-channel1.srt"]
    offsets = names(*(Item("a.wav", "", offset) for offset in (0, 12.34561, 12.34564, 100.0)))
    assert offsets == ["a@0.srt", "a@12.34561.srt", "a@12.34564.srt", "a@100.srt"]
    assert names(*(Item("a.wav", "", 0.5, length) for length in (1.0, 2.5))) == ["a@0.5+1.srt", "a@0.5+2.5.srt"]
    assert names(*(Item("a.wav", "", id=each) for each in ("x/1", "../2"))) == ["a-x_1.srt", "a-.._2.srt"]
    assert names(Item("0.wav", ""), Item("sub2/0.wav", ""), Item("1.wav", "")) == ["0.srt", "sub2-0.srt", "1.srt"]
    assert names(Item("/a/x/0.wav", ""), Item("/b/x/0.wav", "")) == ["a-x-0.srt", "b-x-0.srt"]
    assert names(Item("a/0.wav", ""), Item("a/0.flac", "")) == ["0.wav.srt", "0.flac.srt"]
    here = Path.cwd().name
    assert names(Item("x/0.wav", "", id="1"), Item("/x/0.wav", "", id="1")) == [f"{here}-x-0.srt", "x-0.srt"]


def test_a_piece_without_a_name_of_its_own_is_told_alone() -> None:
    items = [Item("a.wav", ""), Item("./a.wav", ""), Item("b" * 250 + ".wav", "", 1.0), Item("c.wav", "")]
    paths, (clash, long) = subtitle_paths(items, Path("cues"), ".vtt")
    assert list(paths) == [items[0], items[3]]
    assert str(clash) == "./a.wav: would be written to cues/a.vtt, as a.wav before it"
    assert "b... is too long for the name of a file" in str(long)


NUMBERS = st.none() | st.floats(0, 1e6) | st.integers(0, 99)


@given(
    st.lists(
        st.builds(
            Item,
            st.sampled_from(["a.wav", "x/a.wav", "y/x/a.wav", "/x/a.wav", "x/a.flac", "b.wav"]),
            st.just(""),
            NUMBERS,
            NUMBERS,
            st.sampled_from([0, 1, "mix"]),
            st.sampled_from([None, "1", "2"]),
        ),
        max_size=12,
        unique_by=lambda item: (item.audio, item.offset, item.duration, item.channel),
    )
)
def test_pieces_that_differ_in_what_is_heard_never_share_a_name(items: list[Item]) -> None:
    found = sorted(names(*items))
    assert all(before != after for before, after in pairwise(found)) and "" not in found
