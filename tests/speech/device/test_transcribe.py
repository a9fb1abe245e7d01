from __future__ import annotations

import argparse
import io
import json
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.audio import resample
from apps.speech.device.transcribe import Output, pcm_blocks
from apps.speech.device.transcribe_cli import add_transcribe, run_transcribe
from apps.speech.runtime import Recognizer
from kdcore.command_line import Parser
from kdcore.config import UserError
from tests.speech.device.exported import export_tones, silence, spoken


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tones(tmp_path_factory.mktemp("exported") / "tones")


@pytest.fixture
def clips(tmp_path: Path) -> list[str]:
    """Files of other rates, widths and channels, each saying something else."""
    texts = ("yes no", "day", "sad")
    for place, text in enumerate(texts):
        samples = spoken(text)
        stereo = np.stack([samples, samples], axis=1) if place == 1 else samples
        soundfile.write(tmp_path / f"{place}.{'flac' if place else 'wav'}", stereo, 16_000)
    return [str(tmp_path / name) for name in ("0.wav", "1.flac", "2.flac")]


def run(folder: Path, *words: str) -> int:
    parser = Parser(prog="kd speech")
    add_transcribe(parser.add_subparsers(dest="verb"))
    args: argparse.Namespace = parser.parse_args(["transcribe", "--model", str(folder), *words])
    return run_transcribe(args)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_file_in_every_form(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "talk.wav")
    soundfile.write(path, np.concatenate([spoken("yes no"), silence(3), spoken("day")]), 16_000)
    shown = {}
    for form in ("", "--timestamps", "--paragraphs", "--srt", "--vtt", "--json"):
        assert run(folder, path, *([form] if form else [])) == 0
        shown[form] = capsys.readouterr().out
    assert shown[""] == "yes no\nday\n"
    assert shown["--paragraphs"] == "yes no\n\nday\n"
    first, second = shown["--timestamps"].splitlines()
    assert first.startswith("[0:00:00.2 - 0:00:01.") and first.endswith("] yes no")
    assert second.endswith("] day")
    assert shown["--srt"].startswith("1\n00:00:00,2") and "\n\n2\n00:00:0" in shown["--srt"]
    assert shown["--vtt"].startswith("WEBVTT\n\n00:00:00.2")
    row = json.loads(shown["--json"])
    assert (row["audio_filepath"], row["text"]) == (path, "yes no day")
    assert [set(word) for word in row["words"]] == [{"word", "start", "end", "confidence"}] * 3
    assert row["duration"] == pytest.approx(soundfile.info(path).duration, abs=1e-3)


def test_a_terminal_shows_what_may_change_in_place(
    folder: Path, clips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    assert run(folder, clips[0]) == 0
    parts = screen.getvalue().split("\r\x1b[K")
    assert "yes no\n" in parts  # the line that stays
    assert "yes no" in parts or "yes n" in parts  # what stood there before
    assert parts[-1] == ""


def test_bad_files_are_a_line_each_and_lose_nothing(
    folder: Path, clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("no audio at all", encoding="utf-8")
    (tmp_path / "cut.wav").write_bytes(Path(clips[0]).read_bytes()[:9000])
    bad = [str(tmp_path / name) for name in ("empty.wav", "text.wav", "cut.wav", "missing.wav")]
    files = [clips[0], *bad[:2], clips[1], *bad[2:], clips[2]]
    assert run(folder, *files) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{clips[0]}: yes no", f"{clips[1]}: day", f"{clips[2]}: sad"]
    *lines, last = err.splitlines()
    assert len(lines) == 4 and all(name in line for name, line in zip(bad, lines, strict=True))
    assert last == "kd: 4 of 7 could not be transcribed"
    assert run(folder, "--skip-bad", *files) == 0
    # one damaged file, alone: what was heard before is there
    capsys.readouterr()
    assert run(folder, bad[2]) == 2
    assert "is truncated" in capsys.readouterr().err


def test_processes_give_the_same_in_the_same_order(folder: Path, clips: list[str], tmp_path: Path) -> None:
    files = [clips[place % 3] for place in range(3)]
    copies = [str(tmp_path / f"copy{place}.wav") for place in range(4)]
    for place, copy in enumerate(copies):
        Path(copy).write_bytes(Path(clips[0]).read_bytes() if place != 2 else b"bad")
    assert run(folder, "--out", str(tmp_path / "one.jsonl"), *files, *copies) == 2
    assert run(folder, "--out", str(tmp_path / "two.jsonl"), "--jobs", "2", *files, *copies) == 2
    assert rows(tmp_path / "one.jsonl") == rows(tmp_path / "two.jsonl")
    assert [row["text"] for row in rows(tmp_path / "one.jsonl")] == ["yes no", "day", "sad"] + ["yes no"] * 3


def test_an_interrupted_batch_goes_on(folder: Path, clips: list[str], tmp_path: Path) -> None:
    out = tmp_path / "texts.jsonl"
    assert run(folder, "--out", str(out), *clips) == 0
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    for torn in (first, first + 30, len(whole) - 1):
        kept = whole[:first].replace(b"yes no", b"as it was")
        out.write_bytes(kept + whole[first:torn])
        assert run(folder, "--out", str(out), *clips) == 0
        assert out.read_bytes() == kept + whole[first:]  # what was there is kept, the torn line is made again
    with pytest.raises(UserError, match="made with another beam"):
        run(folder, "--out", str(out), "--beam", "4", *clips)
    assert out.read_bytes() == kept + whole[first:]
    (tmp_path / "texts.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        run(folder, "--out", str(out), *clips)


@pytest.mark.parametrize("content", ["my notes\n", "my notes", '{"a": 1}\n', "[1]\n", '{"audio_filepath": "a"}\n'])
def test_a_file_that_is_no_output_is_not_touched(tmp_path: Path, content: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="line 1: is no row"):
        Output(path, {})
    assert path.read_text(encoding="utf-8") == content


def test_manifest_with_parts_and_bad_rows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "talk.wav", np.concatenate([spoken("yes"), spoken("no")]), 16_000)
    middle = len(spoken("yes")) / 16_000
    lines = [
        {"audio_filepath": "talk.wav", "text": ""},
        {"audio_filepath": "talk.wav", "offset": 0.0, "duration": middle, "id": "first"},
        {"audio_filepath": "gone.wav"},
        {"audio_filepath": "talk.wav", "offset": middle, "duration": middle},
        {"audio_filepath": "talk.wav", "offset": 99.0, "duration": 1.0},
    ]
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join([*map(json.dumps, lines), "{broken"]), encoding="utf-8")
    assert run(folder, "--manifest", str(manifest), "--json") == 2
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    assert [row["text"] for row in found] == ["yesno", "yes", "no"]
    assert [row.get("offset") for row in found] == [None, 0.0, middle]
    assert [row.get("id") for row in found] == [None, "first", None]
    assert "row 3" in err and "row 6" in err and "begins at 99 s" in err
    assert err.splitlines()[-1] == "kd: 3 of 6 could not be transcribed"


def test_subtitles_of_several_files(folder: Path, clips: list[str], tmp_path: Path) -> None:
    out = tmp_path / "cues"
    assert run(folder, "--srt", "--out", str(out), *clips) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0.srt", "1.srt", "2.srt"]
    assert (out / "1.srt").read_text(encoding="utf-8").endswith("\nday\n\n")
    (out / "1.srt").write_text("kept", encoding="utf-8")
    (out / "2.srt").unlink()
    assert run(folder, "--srt", "--out", str(out), *clips) == 0
    assert (out / "1.srt").read_text(encoding="utf-8") == "kept"
    assert (out / "2.srt").exists()
    with pytest.raises(UserError, match="--out FOLDER"):
        run(folder, "--vtt", *clips)
    with pytest.raises(UserError, match="both would be written"):
        run(folder, "--vtt", "--out", str(out), "a/0.wav", "b/0.wav")
    one = tmp_path / "one.vtt"
    assert run(folder, "--vtt", "--out", str(one), clips[1]) == 0
    assert one.read_text(encoding="utf-8").startswith("WEBVTT")


@settings(max_examples=40, deadline=None)
@given(samples=st.lists(st.integers(-32768, 32767), max_size=40), data=st.data())
def test_pcm_packets_of_odd_sizes(samples: list[int], data: st.DataObject) -> None:
    raw = np.array(samples, "<i2").tobytes()
    edges = [0, *sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8))), len(raw)]
    packets = iter([raw[first:last] for first, last in pairwise(edges) if last > first])

    class Pipe(io.RawIOBase):
        def read1(self, size: int = -1) -> bytes:
            return next(packets, b"")

    found = np.concatenate([np.zeros(0, np.float32), *pcm_blocks(Pipe())])  # type: ignore[arg-type]
    assert found.dtype == np.float32
    assert (found * 32768).tolist() == samples


def test_live_audio_from_standard_input(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = np.concatenate([spoken("yes no"), silence(2), spoken("day")])
    raw = (samples * 32767).astype("<i2").tobytes()

    class Stdin:
        buffer = io.BytesIO(raw)

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert run(folder, "--stdin-pcm", "--json") == 0
    assert [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()] == ["yes no", "day"]
    # the same at 48 kHz in two channels
    wide = np.repeat(resample(samples, 3, 1), 2)
    Stdin.buffer = io.BytesIO((np.clip(wide, -1, 1) * 32767).astype("<i2").tobytes())
    assert run(folder, "--stdin-pcm", "--rate", "48000", "--channels", "2") == 0
    assert capsys.readouterr().out == "yes no\nday\n"
    assert run(folder, "--stdin-pcm", "--rate", "4000") == 2
    assert "rate: got 4000, wanted 8000 to 192000" in capsys.readouterr().err
    Stdin.buffer = io.BytesIO(raw + b"\0")
    assert run(folder, "--stdin-pcm") == 2
    out, err = capsys.readouterr()
    assert out == "yes no\nday\n"
    assert "ends within a sample" in err


def test_a_microphone_that_disappears_keeps_what_was_heard(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = spoken("yes no")

    class Stream:
        def __init__(self, **options: Any) -> None:
            self.options = options

        def __enter__(self) -> None:
            size = self.options["blocksize"]
            for first in range(0, len(samples), size):
                self.options["callback"](samples[first : first + size, None], size, None, None)
            self.options["finished_callback"]()

        def __exit__(self, *error: object) -> None:
            return None

    fake = ModuleType("sounddevice")
    fake.check_input_settings = lambda **options: None  # type: ignore[attr-defined]
    fake.InputStream = Stream  # type: ignore[attr-defined]
    fake.PortAudioError = RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", fake)
    assert run(folder, "--mic") == 2
    out, err = capsys.readouterr()
    assert out == "yes no\n"
    assert err.splitlines() == ["kd: error: microphone (the default one): has gone; what was heard until then is kept"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "wanted one of FILE"),
        (["a.wav", "--mic"], "wanted one of FILE"),
        (["a.wav", "--jobs", "0"], "--jobs: got 0"),
        (["a.wav", "--device", "1"], "--device"),
        (["a.wav", "--channel", "left"], "--channel: got 'left'"),
        (["a.wav", "--hot-word", "yes"], "PHRASE=BOOST"),
        (["a.wav", "--hot-word", "yes=often"], "PHRASE=BOOST"),
        (["a.wav", "--endpoint", "1,2"], "--endpoint"),
        (["a.wav", "--grammar", "missing.txt"], "missing.txt"),
        (["a.wav", "--lm", "missing.arpa"], "missing.arpa"),
        (["a.wav", "--json", "--srt"], "not allowed with"),
        (["--stdin-pcm", "--out", "x"], "--out: is for files"),
        (["--mic", "--rate", "48000"], "--rate: wanted --stdin-pcm with it"),
    ],
)
def test_what_is_asked_wrongly(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, *words)


def test_settings_reach_the_recogniser(
    folder: Path, clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grammar = tmp_path / "words.txt"
    grammar.write_text("# two words\nday\nSad\n", encoding="utf-8")
    assert run(folder, "--grammar", str(grammar), "--fp32", "--endpoint", "2,0.5,10", "--gate", *clips[1:]) == 0
    assert capsys.readouterr().out == f"{clips[1]}: day\n{clips[2]}: sad\n"
    assert Recognizer(folder).transcribe([]) is not None
