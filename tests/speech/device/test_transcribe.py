from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import shutil
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
from apps.speech.device.transcribe import Item, pcm_blocks, transcribe
from apps.speech.device.transcribe_cli import add_transcribe, run_transcribe, setup_of
from apps.speech.device.vad import GateOptions
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


def parsed(folder: Path, *words: str) -> argparse.Namespace:
    parser = Parser(prog="kd speech")
    add_transcribe(parser.add_subparsers(dest="verb"))
    return parser.parse_args(["transcribe", "--model", str(folder), *words])


def run(folder: Path, *words: str) -> int:
    return run_transcribe(parsed(folder, *words))


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
    with pytest.raises(UserError, match="made with beam 1; choose"):
        run(folder, "--out", str(out), "--beam", "4", *clips)
    assert out.read_bytes() == kept + whole[first:]
    (tmp_path / "texts.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        run(folder, "--out", str(out), *clips)


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
    one = tmp_path / "one.vtt"
    assert run(folder, "--vtt", "--out", str(one), clips[1]) == 0
    assert one.read_text(encoding="utf-8").startswith("WEBVTT")


def test_a_file_named_for_other_subtitles_is_not_written(folder: Path, clips: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.srt is named for other subtitles, wanted a\.vtt of --vtt"):
        run(folder, "--vtt", "--out", str(tmp_path / "a.srt"), clips[0])
    assert not (tmp_path / "a.srt").exists()


def test_a_folder_of_subtitles_has_one_batchs_settings(folder: Path, clips: list[str], tmp_path: Path) -> None:
    out = tmp_path / "cues"
    assert run(folder, "--srt", "--out", str(out), clips[0]) == 0
    for form, file in (("--srt", clips[1]), ("--vtt", clips[0])):
        with pytest.raises(UserError, match="cues: was made with int8 true; choose another --out or remove it"):
            run(folder, "--fp32", form, "--out", str(out), file)
    assert [path.name for path in out.iterdir()] == ["0.srt"]
    assert json.loads((tmp_path / "cues.settings.json").read_text(encoding="utf-8"))["int8"] is True
    assert run(folder, "--srt", "--out", str(out), *clips[:2]) == 0
    # subtitles that nobody's settings are known of are not those of a batch, unless they are wanted
    (tmp_path / "cues.settings.json").unlink()
    with pytest.raises(UserError, match="missing or damaged"):
        run(folder, "--srt", "--out", str(out), clips[1])
    assert run(folder, "--fp32", "--srt", "--out", str(out), clips[2]) == 0
    # what was removed is begun anew
    shutil.rmtree(out)
    assert run(folder, "--srt", "--out", str(out), clips[1]) == 0


def test_subtitles_of_pieces_and_one_that_has_no_name_of_its_own(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = [np.concatenate([spoken(word), silence(1)]) for word in ("yes", "no")]
    soundfile.write(tmp_path / "call.wav", np.stack([np.resize(each, 20_000) for each in said], axis=1), 16_000)
    lines: list[dict[str, Any]] = [{"audio_filepath": "call.wav", "channel": channel} for channel in (0, 1, 1)]
    manifest, out = tmp_path / "manifest.jsonl", tmp_path / "cues"
    manifest.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for words, code in (([], 2), (["--skip-bad"], 0)):
        assert run(folder, "--srt", "--out", str(out), "--manifest", str(manifest), *words) == code
        first, last = capsys.readouterr().err.splitlines()
        assert first.startswith("kd: error: call.wav: would be written to ") and first.endswith(
            "call-channel1.srt, as call.wav before it"
        )
        assert last == "kd: 1 of 3 could not be transcribed"
    texts = {path.name: path.read_text(encoding="utf-8").splitlines()[2] for path in out.iterdir()}
    assert texts == {"call-channel0.srt": "yes", "call-channel1.srt": "no"}


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
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="--stdin-pcm: standard input is closed"):
        run(folder, "--stdin-pcm")


@pytest.mark.parametrize(("device", "wanted"), [("3", 3), ("usb", "usb"), ("²", "²")])
def test_a_device_is_a_number_or_a_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, device: str, wanted: int | str
) -> None:
    asked: list[int | str | None] = []

    def source(device: int | str | None) -> list[np.ndarray]:
        asked.append(device)
        return []

    monkeypatch.setattr("apps.speech.device.microphone.microphone", source)
    assert run(folder, "--mic", "--device", device) == 0
    assert asked == [wanted]


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
        (["a.wav", "--lm-weight", "2"], "--lm-weight: wanted --lm with it"),
        (["a.wav", "--word-score", "2"], "--word-score: wanted --lm or --grammar with it"),
        (["a.wav", "--lm", "a.arpa", "--lm-weight", "nan"], "lm_weight: got nan, wanted -50 to 50"),
        (["a.wav", "--lm", "a.arpa", "--word-score=-inf"], "word_score: got -inf"),
        (["a.wav", "--lm", "a.arpa", "--word-score", "1000"], "word_score: got 1000, wanted -50 to 50"),
        (["a.wav", "--hot-word", "!!!=4"], "hot words: got '!!!', wanted a phrase"),
        (["a.wav", "--endpoint", "1,nan,3"], "--endpoint"),
        (["a.wav", "--gate-rule", "4"], "--gate-rule: got '4', wanted decibels and seconds such as 4,1.6"),
        (["a.wav", "--gate-rule", "4,-1"], "gate: hold: got -1.0, wanted 0 or more"),
        (["a.wav", "--hot-word", "a\udcff=2"], "cannot be written as text"),
        (["--stdin-pcm", "--skip-bad"], "--skip-bad: is for files"),
        (["--mic", "--jobs", "2"], "--jobs: is for files"),
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
    grammar.write_text("day\nyes zoo\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"words\.txt, line 2: 'zoo' cannot be spelled: 'z' is not among"):
        run(folder, "--grammar", str(grammar), *clips)
    assert Recognizer(folder).transcribe([]) is not None


def test_the_gate_has_its_own_rule(folder: Path, clips: list[str]) -> None:
    asked = ([], ["--gate"], ["--gate-rule", "6,0.5"], ["--gate", "--gate-rule", "0,0.5"])
    gates = [setup_of(parsed(folder, "a.wav", *words)).gate for words in asked]
    assert gates == [None, GateOptions(), GateOptions(rise=6.0, hold=0.5), GateOptions(rise=0.0, hold=0.5)]
    assert run(folder, "--gate-rule", "6,0.5", clips[0]) == 0


def says(path: Path, text: str = "yes no") -> str:
    soundfile.write(str(path.parent / "made.wav"), spoken(text), 16_000)
    (path.parent / "made.wav").rename(path)
    return str(path)


def test_a_name_that_is_not_utf8_stays_itself(
    folder: Path, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = says(Path(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff\xe9.wav")))
    out = tmp_path / "texts.jsonl"
    assert run(folder, "--json", "--out", str(out), odd, clips[1]) == 0
    whole = out.read_bytes()
    assert b"/a\\udcff\\udce9.wav" in whole
    assert [(row["audio_filepath"], row["text"]) for row in rows(out)] == [(odd, "yes no"), (clips[1], "day")]
    assert run(folder, "--json", "--out", str(out), odd, clips[1]) == 0
    assert out.read_bytes() == whole  # both are known to be done
    for encoding, errors in (("utf-8", "strict"), ("utf-8", "surrogateescape"), ("ascii", "strict")):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors=errors))
        assert run(folder, "--json", odd, says(tmp_path / "é.wav")) == 0
        written = [json.loads(line)["audio_filepath"] for line in raw.getvalue().decode().splitlines()]
        assert written == [odd, str(tmp_path / "é.wav")]
        raw.seek(0)
        raw.truncate()
        assert run(folder, odd, str(tmp_path / "é.wav")) == 0
        assert raw.getvalue().startswith(os.fsencode(tmp_path) + b"/a\\udcff\\udce9.wav: yes no\n")
    assert capsys.readouterr().err == ""


def test_control_characters_of_a_name_do_not_reach_the_terminal(
    folder: Path, clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = says(tmp_path / "\x1b[2J\x9b1m.wav")
    missing = str(tmp_path / "\x1b]0;gone.wav")
    assert run(folder, name, missing, clips[1]) == 2
    assert run(folder, "--timestamps", name, clips[1]) == 0
    assert run(folder, "--paragraphs", name, clips[1]) == 0
    assert run(folder, "--json", name) == 0
    assert run(folder, missing) == 2
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["audio_filepath"] == name
    assert not set("\x1b\x9b") & set(out + err)
    assert out.startswith(f"{tmp_path}/\\x1b[2J\\x9b1m.wav: yes no\n")
    assert err.count("\\x1b]0;gone.wav") == 2
    with pytest.raises(UserError) as error:
        run(folder, "--json", "--manifest", missing)
    assert "\\x1b]0;gone.wav" in str(error.value)


def test_pieces_that_differ_in_length_or_id_are_resumed_each(folder: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "talk.wav", np.concatenate([spoken("yes"), spoken("no")]), 16_000)
    short, long = len(spoken("yes")) / 16_000, (len(spoken("yes")) + len(spoken("no"))) / 16_000 - 0.1
    lines: list[dict[str, Any]] = [
        {"audio_filepath": "talk.wav", "offset": 0, "duration": short},
        {"audio_filepath": "talk.wav", "offset": 0, "duration": long},
        {"audio_filepath": "talk.wav", "offset": 0, "duration": 99},
        {"audio_filepath": "talk.wav", "id": 0},
        {"audio_filepath": "talk.wav", "id": "b"},
        {"audio_filepath": "talk.wav", "offset": short},
    ]
    manifest, out = tmp_path / "manifest.jsonl", tmp_path / "texts.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert run(folder, "--json", "--out", str(out), "--manifest", str(manifest)) == 0
    whole = out.read_bytes()
    found = rows(out)
    assert [row["text"] for row in found] == ["yes", "yesno", "yesno", "yesno", "yesno", "no"]
    assert [row.get("id") for row in found] == [None, None, None, "0", "b", None]
    assert [row.get("asked_duration") for row in found] == [short, long, 99, None, None, None]
    assert [row["duration"] for row in found[:3]] == pytest.approx([short, long, long + 0.1], abs=1e-3)
    for done in range(len(found)):
        out.write_bytes(b"".join(whole.splitlines(keepends=True)[:done]))
        assert run(folder, "--json", "--out", str(out), "--manifest", str(manifest)) == 0
        assert out.read_bytes() == whole


def test_rows_that_stand_twice_are_resumed_twice(folder: Path, clips: list[str], tmp_path: Path) -> None:
    manifest, out = tmp_path / "manifest.jsonl", tmp_path / "texts.jsonl"
    manifest.write_text('{"audio_filepath": "1.flac"}\n' * 2, encoding="utf-8")
    assert run(folder, "--json", "--out", str(out), "--manifest", str(manifest)) == 0
    whole = out.read_bytes()
    assert [row["text"] for row in rows(out)] == ["day", "day"]
    out.write_bytes(whole[: whole.index(b"\n") + 1])
    assert run(folder, "--json", "--out", str(out), "--manifest", str(manifest)) == 0
    assert out.read_bytes() == whole


def test_a_duration_without_offset_is_the_beginning(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = np.concatenate([spoken("yes"), spoken("no")])
    soundfile.write(tmp_path / "talk.wav", samples, 16_000)
    whole = len(samples) / 16_000
    durations = [len(spoken("yes")) / 16_000, whole, round(whole - 0.04, 2), whole + 5]
    manifest = tmp_path / "manifest.jsonl"
    lines = [{"audio_filepath": "talk.wav", "duration": duration} for duration in durations]
    manifest.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert run(folder, "--json", "--manifest", str(manifest)) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in found] == ["yes", "yesno", "yesno", "yesno"]
    assert [row.get("offset") for row in found] == [0.0, None, None, None]
    assert [row["duration"] for row in found] == pytest.approx([durations[0], whole, whole, whole], abs=1e-3)


def test_a_piece_longer_than_what_is_read_at_once(
    folder: Path, clips: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("apps.speech.audio.LONGEST_SECONDS", 0.5)
    monkeypatch.setattr("apps.speech.device.transcribe._BLOCK_SECONDS", 0.25)
    pieces = list(Item("0", clips[0], 0.1, 1.01).samples())
    assert [len(piece) for piece in pieces] == [4000] * 4 + [160]
    assert np.concatenate(pieces) == pytest.approx(spoken("yes no")[1600:17760], abs=1e-4)
    assert transcribe(Recognizer(folder), Item("0", clips[0], 0.1, 99.0)).text == "yes no"


def test_subtitles_of_one_file_in_a_folder(
    folder: Path, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for out in (there, tmp_path / "new", tmp_path / "of.tuesday"):
        assert run(folder, "--srt", "--out", str(out), clips[1]) == 0
        assert (out / "1.srt").read_text(encoding="utf-8").endswith("\nday\n\n")
    monkeypatch.chdir(there)
    assert run(folder, "--vtt", "--out", ".", clips[1]) == 0
    assert (there / "1.vtt").read_text(encoding="utf-8").startswith("WEBVTT")
    with pytest.raises(UserError, match="is a file; wanted a folder"):
        run(folder, "--srt", "--out", clips[2], clips[1])


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("out", ["cues.srt", "cues"])
def test_one_bad_file_with_out(
    folder: Path, clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, skip: bool
) -> None:
    cut = tmp_path / "cut.wav"
    cut.write_bytes(Path(clips[0]).read_bytes()[:9000])
    before = set(tmp_path.rglob("*.srt"))
    words = ["--skip-bad"] if skip else []
    assert run(folder, "--srt", "--out", str(tmp_path / out), *words, str(cut)) == (0 if skip else 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kd: error: {cut}: ") and "truncated" in line
    assert set(tmp_path.rglob("*.srt")) == before == set()


def test_the_exports_word_score_is_that_of_a_language_model(folder: Path, tmp_path: Path, arpa: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(folder, tuned)
    about = json.loads((tuned / "kdsuite.json").read_text(encoding="utf-8"))
    about["decode"] = {"lm_weight": 0.5, "word_score": -3.0}
    (tuned / "kdsuite.json").write_text(json.dumps(about), encoding="utf-8")
    words = tmp_path / "words.txt"
    words.write_text("day\n", encoding="utf-8")
    assert setup_of(parsed(tuned, "a.wav", "--grammar", str(words))).decoding.word_score == 0.0
    assert setup_of(parsed(tuned, "a.wav", "--grammar", str(words), "--word-score", "1")).decoding.word_score == 1.0
    known = setup_of(parsed(tuned, "a.wav", "--lm", str(arpa))).decoding
    assert (known.lm_weight, known.word_score) == (0.5, -3.0)


@pytest.mark.parametrize("more", [[], ["--jobs", "2"]])
def test_words_left_out_are_told_once(
    folder: Path, clips: list[str], arpa: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    assert run(folder, "--lm", str(arpa), *more, *clips) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[1] == f"{clips[1]}: day"
    assert err == f"kd: {arpa}: 1 words that cannot be spelled are left out: zebra\n"


def test_a_text_is_no_language_model(folder: Path, clips: list[str], tmp_path: Path, arpa: Path) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("yes no\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"notes.txt, line 1: no \\data\\ line, wanted an ARPA text"):
        run(folder, "--lm", str(notes), *clips)
    packed = tmp_path / "lm.arpa.gz"
    packed.write_bytes(gzip.compress(arpa.read_bytes()))
    with pytest.raises(UserError, match=r"lm\.arpa\.gz, line 1: a KenLM binary or a compressed file"):
        run(folder, "--lm", str(packed), *clips)
    text = arpa.read_text(encoding="utf-8")
    for word in ("yes", "no", "day", "sad"):
        text = text.replace(f"\t{word}\t", f"\tz{word}\t").replace("yes no\n", "zyes zno\n")
    arpa.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="holds no word that the model's symbols can spell"):
        run(folder, "--lm", str(arpa), *clips)


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    path = tmp_path / "lm.arpa"
    words = ("<unk>", "<s>", "</s>", "yes", "no", "day", "sad", "zebra")
    lines = "".join(f"-1.0\t{word}" + ("\n" if word == "</s>" else "\t0.0\n") for word in words)
    counts = f"\\data\\\nngram 1={len(words)}\nngram 2=1\n"
    grams = f"\\1-grams:\n{lines}\n\\2-grams:\n-0.5\tyes no\n"
    path.write_text(f"{counts}\n{grams}\n\\end\\\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_an_empty_manifest_says_so(folder: Path, tmp_path: Path, content: str) -> None:
    manifest, out = tmp_path / "empty.jsonl", tmp_path / "texts.jsonl"
    manifest.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"empty.jsonl: holds no row"):
        run(folder, "--json", "--out", str(out), "--manifest", str(manifest))
    assert not out.exists()


@pytest.fixture
def remarkable(tmp_path: Path) -> list[str]:
    """A good file, one with an offset, and a silent one."""
    files = {"good.wav": spoken("yes no"), "shifted.wav": spoken("yes no") + np.float32(0.1), "silent.wav": silence(1)}
    for name, samples in files.items():
        soundfile.write(tmp_path / name, samples, 16_000)
    return [str(tmp_path / name) for name in files]


OFFSET, SILENT = "DC offset of +10.0 % of full scale", "silence (digital)"


def test_rows_say_what_is_wrong_with_the_audio(
    folder: Path, remarkable: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = [None, [OFFSET], [SILENT]]
    assert run(folder, "--json", *remarkable) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line).get("remarks") for line in out.splitlines()] == wanted and not err
    manifest, output = tmp_path / "all.jsonl", tmp_path / "out.jsonl"
    lines = [json.dumps({"audio_filepath": name, "offset": 0.1, "duration": 0.8}) + "\n" for name in remarkable]
    manifest.write_text("".join(lines), encoding="utf-8")
    assert run(folder, "--manifest", str(manifest), "--out", str(output), "--jobs", "2") == 0
    assert [row.get("remarks") for row in rows(output)] == wanted
    assert not capsys.readouterr().err


@pytest.mark.parametrize("form", ["", "--timestamps", "--paragraphs", "--srt"])
def test_a_line_a_file_says_what_is_wrong_with_the_audio(
    folder: Path, remarkable: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    words = [form] if form else []
    more = ["--out", str(tmp_path / "cues")] if form == "--srt" else []
    _, shifted, silent = remarkable
    assert run(folder, *words, *more, *remarkable) == 0
    assert capsys.readouterr().err == f"kd: {shifted}: {OFFSET}\nkd: {silent}: {SILENT}\n"
    for name, line in zip(remarkable, ["", f"kd: {shifted}: {OFFSET}\n", f"kd: {silent}: {SILENT}\n"], strict=True):
        assert run(folder, *words, name) == 0
        out, err = capsys.readouterr()
        assert err == line and bool(out) == (name != silent)


def test_live_audio_is_examined_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = np.round((spoken("yes no") + 0.1) * 32768).astype("<i2").tobytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert run(folder, "--stdin-pcm") == 0
    assert capsys.readouterr() == ("yes no\n", f"kd: standard input: {OFFSET}\n")


def test_an_offset_is_removed_where_it_is_asked_for(folder: Path, remarkable: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    made = [setup_of(parsed(folder, "a.wav", *words)) for words in ([], ["--remove-offset"])]
    assert [each.recognizer().remove_offset for each in made] == [False, True]
    assert run(folder, "--remove-offset", "--out", str(out), "--json", remarkable[0]) == 0
    with pytest.raises(UserError, match="was made with remove_offset true; choose"):
        run(folder, "--out", str(out), *remarkable)
    # an output from before there was the option is gone on with
    settings_file = tmp_path / "out.jsonl.settings.json"
    about = json.loads(settings_file.read_text(encoding="utf-8"))
    del about["remove_offset"]
    settings_file.write_text(json.dumps(about), encoding="utf-8")
    assert run(folder, "--out", str(out), *remarkable) == 0
    assert [row["text"] for row in rows(out)] == ["yes no", "yes no", ""]
