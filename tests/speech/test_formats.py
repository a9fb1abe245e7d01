"""Every format gives the utterances that are there; what is wrong is named by file, row and field, or counted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.speech.data.formats import read_corpus
from apps.speech.data.manifest import write_manifest
from apps.speech.data.utterance import Corpus, Tally, Utterance, hold_out_speakers, impossible, loaded, outside_units
from apps.speech.features import fbank
from apps.speech.units import Units
from kdcore.config import UserError

REAL = Path(os.environ.get("KD_DATA", "../shared/data")) / "speech"
needs_data = pytest.mark.skipif(not (REAL / "an4").is_dir(), reason="KD_DATA has no speech/an4")


def audio(path: Path, seconds: float = 0.5, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wave = 0.3 * np.sin(np.arange(round(seconds * rate)) / 9)
    soundfile.write(path, wave, rate, format="NIST" if path.suffix == ".sph" else None)
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def manifest(path: Path, *rows: Any) -> Path:
    return text(path, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


@needs_data
def test_an4() -> None:
    corpus = read_corpus(REAL / "an4")
    assert corpus.splits == ("test", "train") and len(corpus) == 1078 and not corpus.counts
    rows = [json.loads(line) for line in (REAL / "an4" / "train.jsonl").read_text().splitlines()]
    train = corpus.split("train")
    assert [(u.id, u.audio, u.text, u.duration, u.speaker) for u in train.utterances] == [
        (row["id"], row["audio_filepath"], row["text"], row["duration"], row["speaker"]) for row in rows
    ]
    assert [u.text for u in read_corpus(REAL / "an4" / "train.jsonl").utterances] == [row["text"] for row in rows]
    assert train.seconds == pytest.approx(0.707 * 3600, rel=1e-3)
    for utterance in train.utterances[::200]:
        assert len(train.load(utterance)) / 16000 == pytest.approx(utterance.duration, abs=0.01)
    kept, held = hold_out_speakers(train, count=8, seed=0)
    assert len({u.speaker for u in held.utterances}) == 8 and len(kept) + len(held) == 948
    units = Units.of_characters([u.text or "" for u in train.utterances])
    assert impossible(train, units) == []
    with pytest.raises(UserError, match="has no split 'dev'; there is test, train"):
        corpus.split("dev")


@needs_data
def test_fsdd() -> None:
    corpus = read_corpus(REAL / "fsdd")
    assert (
        len(corpus) == 2000
        and corpus.splits == ()
        and {u.speaker for u in corpus.utterances} == {*("george", "jackson", "lucas", "nicolas")}
    )
    first = corpus.utterances[0]
    assert (first.id, first.text, first.extra["digit"]) == ("0_george_0", "zero", 0)
    assert len(corpus.load(first)) == pytest.approx(0.298 * 16000, abs=2)  # from 8 kHz


def test_manifest_fields(tmp_path: Path) -> None:
    other = audio(tmp_path / "elsewhere" / "b.flac", 2.0, 8000)
    audio(tmp_path / "m" / "clips" / "a.wav", 0.5)
    path = manifest(
        tmp_path / "m" / "all.jsonl",
        {"audio_filepath": "clips/a.wav", "text": "Yes!", "duration": 0.5, "lang": "en", "speaker": 7},
        "",
        {"audio_filepath": str(other), "text": None, "offset": 0.5, "duration": 1, "id": "x"},
        {"audio_filepath": "../elsewhere/b.flac", "offset": 1.5},
        {"path": "clips/a.wav", "id": "y", "text": "no", "speaker_id": "s"},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    corpus = read_corpus(path)
    assert corpus.utterances == (
        Utterance("clips/a", "clips/a.wav", "Yes!", 0.5, "7", {"lang": "en"}),
        Utterance("x", str(other), None, 1.0, "", {"offset": 0.5}),
        Utterance("../elsewhere/b@1.5", "../elsewhere/b.flac", None, 0.5, "", {"offset": 1.5}),
        Utterance("y", "clips/a.wav", "no", 0.5, "s"),
    )
    assert [len(corpus.load(u)) for u in corpus.utterances] == [8000, 16000, 8000, 8000]
    assert read_corpus(tmp_path / "m").utterances == corpus.utterances
    write_manifest(tmp_path / "copy" / "again.jsonl", corpus)
    again = read_corpus(tmp_path / "copy" / "again.jsonl")
    assert [(u.id, u.text, u.duration, u.speaker, u.extra) for u in again.utterances] == [
        (u.id, u.text, u.duration, u.speaker, u.extra) for u in corpus.utterances
    ]
    assert [again.path(u).resolve() for u in again.utterances] == [corpus.path(u).resolve() for u in corpus.utterances]


BAD = {
    "{": "row 2: is no JSON",
    "[1, 2]": "row 2: wanted an object with audio_filepath and text, got [1, 2]",
    '{"text": "yes"}': "row 2: audio_filepath: is missing",
    '{"path": 3}': "row 2: path: got 3, wanted text",
    '{"audio_filepath": "b.wav", "split": ["train"]}': 'row 2: split: got ["train"], wanted text',
    '{"audio_filepath": "b.wav", "split": {}}': "row 2: split: got {}, wanted text",
    '{"audio_filepath": "gone.wav", "text": "yes"}': "row 2: audio_filepath: {folder}/gone.wav is no file",
    '{"audio_filepath": ".", "text": "yes"}': "row 2: audio_filepath: {folder} is no file",
    '{"audio_filepath": "a\\u0000.wav"}': "row 2: audio_filepath: got 'a\\x00.wav', which cannot be written",
    '{"audio_filepath": "b.wav", "text": " "}': "row 2: text: is empty",
    '{"audio_filepath": "b.wav", "text": 5}': "row 2: text: got 5, wanted text",
    '{"audio_filepath": "b.wav", "text": "\\ud800"}': "row 2: text: got '\\ud800', which cannot be written",
    '{"audio_filepath": "b.wav", "duration": -1}': "row 2: duration: got -1, wanted seconds above 0",
    '{"audio_filepath": "b.wav", "duration": NaN}': "row 2: duration: got NaN, wanted seconds above 0",
    '{"audio_filepath": "b.wav", "duration": true}': "row 2: duration: got true",
    '{"audio_filepath": "b.wav", "duration": 1' + "0" * 400 + "}": "row 2: duration: got 100000",
    '{"audio_filepath": "b.wav", "offset": 9}': "row 2: offset: begins at 9 s, after the end of",
    '{"audio_filepath": "a.wav", "id": "a"}': "row 2: id: 'a' stands there twice",
    '{"audio_filepath": "none.wav"}': "row 2: audio_filepath: {folder}/none.wav has no samples",
    '{"audio_filepath": "no.wav"}': "row 2: audio_filepath: {folder}/no.wav: cannot be read as audio",
    "[" * 100_000: "row 2: is no JSON",
    '{"duration": 1' + "0" * 5000 + "}": "row 2: is no JSON",
    '"' + "x" * (1 << 20) + '"': "row 2: is longer than 1 MiB",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_row_is_named_or_counted(tmp_path: Path, line: str) -> None:
    for name in ("a.wav", "b.wav", "c.wav"):
        audio(tmp_path / name)
    text(tmp_path / "no.wav", "not audio " * 50)
    audio(tmp_path / "none.wav", seconds=0.0)
    good = [{"audio_filepath": name, "text": "yes", "id": name[0]} for name in ("a.wav", "c.wav")]
    path = manifest(tmp_path / "all.jsonl", good[0], line, good[1])
    with pytest.raises(UserError) as caught:
        read_corpus(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {BAD[line].format(folder=tmp_path) if '{folder}' in BAD[line] else BAD[line]}")
    assert "\n" not in message and len(message) < 500
    corpus = read_corpus(path, skip_bad=True)
    assert [u.id for u in corpus.utterances] == ["a", "c"]
    assert sum(corpus.counts.values()) == 1 and corpus.problems == (message,)


def test_nothing_usable(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no corpus: no"):
        read_corpus(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_corpus(tmp_path / "gone")
    path = manifest(tmp_path / "a.jsonl", "{", "{")
    with pytest.raises(UserError, match=r"can be used \(2 unreadable row: .*a\.jsonl: row 1: is no JSON"):
        read_corpus(path, skip_bad=True)
    with pytest.raises(UserError, match="format: got 'kaldy', did you mean kaldi"):
        read_corpus(path, format="kaldy")
    with pytest.raises(UserError, match="is no folder; the format kaldi is one"):
        read_corpus(path, format="kaldi")
    with pytest.raises(UserError, match="wanted a manifest"):
        read_corpus(audio(tmp_path / "a.wav"))
    path.write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(UserError, match="row 1: is not UTF-8 text"):
        read_corpus(path)


def test_a_row_names_its_split_or_has_that_of_its_file(tmp_path: Path) -> None:
    for name in "abc":
        audio(tmp_path / f"{name}.wav")
    rows = [{"path": "a.wav", "split": None}, {"path": "b.wav", "split": "dev"}, "{", {"path": "x.wav", "split": "dev"}]
    manifest(tmp_path / "train.jsonl", *rows)
    manifest(tmp_path / "test.jsonl", {"path": "c.wav"}, {"path": "y.wav"})
    corpus = read_corpus(tmp_path, skip_bad=True)
    assert {u.id: u.extra["split"] for u in corpus.utterances} == {"a": "train", "b": "dev", "c": "test"}
    found = [(each.split, each.reason, each.count) for each in corpus.left_out]
    assert found == [("test", "no audio", 1), ("train", "unreadable row", 1), ("dev", "no audio", 1)]
    assert corpus.counts == {"no audio": 2, "unreadable row": 1}
    assert corpus.split("train").counts == {"unreadable row": 1} and corpus.split("dev").counts == {"no audio": 1}
    assert read_corpus(tmp_path / "train.jsonl", skip_bad=True).utterances[0].extra == {}


def test_what_a_source_says_beside_never_replaces_a_field(tmp_path: Path) -> None:
    audio(tmp_path / "a.wav")
    row = {"audio_filepath": "a.wav", "path": "gone.wav", "audio": 3, "speaker": "s", "speaker_id": "t", "mood": "calm"}
    (utterance,) = read_corpus(manifest(tmp_path / "m.jsonl", row)).utterances
    assert utterance == Utterance("a", "a.wav", None, 0.5, "s", {"mood": "calm"})
    odd = Utterance("a", "a.wav", "yes", 0.5, "", {"text": "no", "id": 3, "speaker": "t", "mood": "calm"})
    assert odd.row() == {"id": "a", "audio_filepath": "a.wav", "text": "yes", "duration": 0.5, "mood": "calm"}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)),
    name=st.sampled_from(["a.jsonl", "train.tsv", "wav.scp", "text", "segments", "1-2.trans.txt", "a.txt"]),
)
def test_any_bytes_give_a_corpus_or_a_user_error(tmp_path: Path, content: bytes, name: str) -> None:
    for each in tmp_path.iterdir():
        each.unlink()
    audio(tmp_path / "a.wav", 0.05)
    if name in ("text", "segments"):
        text(tmp_path / "wav.scp", "a a.wav\n")
    (tmp_path / name).write_bytes(content)
    for skip_bad in (False, True):
        try:
            corpus = read_corpus(tmp_path, skip_bad=skip_bad)
        except UserError as error:
            assert str(tmp_path) in str(error)
        else:
            assert all((tmp_path / u.audio).is_file() and u.duration > 0 for u in corpus.utterances)


def test_librispeech(tmp_path: Path) -> None:
    for split, speaker in (("dev-clean", "84"), ("test-clean", "61")):
        chapter = tmp_path / split / speaker / "121"
        names = [f"{speaker}-121-000{n}" for n in range(2)]
        for name in names:
            audio(chapter / f"{name}.flac", 0.4)
        text(chapter / f"{speaker}-121.trans.txt", f"{names[0]} GO DO YOU HEAR\n{names[1]} BUT IN LESS\n")
    corpus = read_corpus(tmp_path)
    assert corpus.utterances[0] == Utterance(
        "84-121-0000", "dev-clean/84/121/84-121-0000.flac", "GO DO YOU HEAR", 0.4, "84", {"split": "dev-clean"}
    )
    assert corpus.splits == ("dev-clean", "test-clean") and len(corpus.split("test-clean")) == 2
    # as the archives are unpacked, one folder further down
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "LibriSpeech").mkdir()
    for split in ("dev-clean", "test-clean"):
        shutil.copytree(tmp_path / split, tmp_path / "above" / "LibriSpeech" / split)
    assert read_corpus(tmp_path / "above").splits == ("dev-clean", "test-clean")
    shutil.rmtree(tmp_path / "above")
    assert [u.id for u in read_corpus(tmp_path / "dev-clean").utterances] == ["84-121-0000", "84-121-0001"]
    (tmp_path / "dev-clean" / "84" / "121" / "84-121-0001.flac").unlink()
    with pytest.raises(UserError, match=r"84-121\.trans\.txt: row 2: audio: .*84-121-0001\.flac is no file"):
        read_corpus(tmp_path)
    assert read_corpus(tmp_path, skip_bad=True).counts == {"no audio": 1}


def test_common_voice(tmp_path: Path) -> None:
    for name in "abc":
        audio(tmp_path / "clips" / f"{name}.mp3", 1.0)
    header = "client_id\tpath\tsentence\tup_votes\tage\n"
    text(tmp_path / "train.tsv", header + 's1\ta.mp3\tIt is "quoted\t2\t\n' + "s2\tb.mp3\tFine.\t3\tteens\n")
    text(tmp_path / "test.tsv", header + "s3\tc.mp3\tÉté\t2\t\n")
    text(tmp_path / "validated.tsv", header + "s1\ta.mp3\tagain\t2\t\n")
    corpus = read_corpus(tmp_path)
    assert [(u.id, u.audio, u.text, u.speaker, u.extra) for u in corpus.utterances] == [
        ("a", "clips/a.mp3", 'It is "quoted', "s1", {"up_votes": "2", "split": "train"}),
        ("b", "clips/b.mp3", "Fine.", "s2", {"up_votes": "3", "age": "teens", "split": "train"}),
        ("c", "clips/c.mp3", "Été", "s3", {"up_votes": "2", "split": "test"}),
    ]
    assert corpus.utterances[0].duration == pytest.approx(1.0, abs=0.1)
    assert [u.text for u in read_corpus(tmp_path / "validated.tsv").utterances] == ["again"]
    text(tmp_path / "train.tsv", header + "s1\ta.mp3\tfour\t2\n")
    with pytest.raises(UserError, match=r"train\.tsv: row 2: has 4 fields, wanted 5"):
        read_corpus(tmp_path)
    with pytest.raises(UserError, match=r"x\.tsv: row 1: has no column path and sentence; got a, b"):
        read_corpus(text(tmp_path / "x.tsv", "a\tb\n"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("s\tb.mp3\tone\rtwo", "row 3: sentence: holds a carriage return"),
        (f"s\tb.mp3\t{'x' * 140_000}", "row 3: sentence: has 140000 characters, wanted at most 131072"),
        ("s\t../../secret.mp3\tone", "row 3: path: got '../../secret.mp3', wanted a file below {folder}/clips"),
        ("s\t/{folder}/secret.mp3\tone", "row 3: path: got '/"),
        ("s\tC:\\secret.mp3\tone", "row 3: path: got 'C:"),
    ],
)
def test_a_bad_row_of_common_voice_loses_no_other(tmp_path: Path, row: str, message: str) -> None:
    folder = tmp_path / "cv"
    for name in ("cv/clips/a.mp3", "cv/clips/b.mp3", "cv/clips/c.mp3", "secret.mp3", "cv/secret.mp3"):
        audio(tmp_path / name)
    row, message = row.replace("{folder}", str(folder)), message.replace("{folder}", str(folder))
    rows = ["client_id\tpath\tsentence", "s\ta.mp3\tfirst", row, "s\tc.mp3\tthird"]
    (folder / "train.tsv").write_bytes("\r\n".join(rows).encode())
    with pytest.raises(UserError) as caught:
        read_corpus(folder)
    assert str(caught.value).startswith(f"{folder / 'train.tsv'}: {message}") and "\n" not in str(caught.value)
    corpus = read_corpus(folder, skip_bad=True)
    assert [(u.id, u.text) for u in corpus.utterances] == [("a", "first"), ("c", "third")]
    assert [(each.split, each.count) for each in corpus.left_out] == [("train", 1)]
    assert corpus.problems == (str(caught.value),)


def test_columns_of_common_voice_that_are_named_as_fields_are_left_out(tmp_path: Path) -> None:
    audio(tmp_path / "clips" / "a.mp3", 1.0)
    names = ["text", "duration", "offset", "id", "channel", "speaker", "audio_filepath", "audio", "speaker_id"]
    names += ["split", "corpus", "stored_as", "stored_at", "stored_bytes"]
    header = "\t".join(["client_id", "path", "sentence", *names, "age"])
    text(tmp_path / "train.tsv", f"{header}\n" + "\t".join(["s", "a.mp3", "Yes.", *["7"] * len(names), "teens"]) + "\n")
    for source, split in ((tmp_path, {"split": "train"}), (tmp_path / "train.tsv", {})):
        corpus = read_corpus(source)
        (utterance,) = corpus.utterances
        assert (utterance.id, utterance.audio, utterance.text, utterance.speaker) == ("a", "clips/a.mp3", "Yes.", "s")
        assert utterance.extra == {"age": "teens", **split} and len(corpus.load(utterance)) > 15_000
        write_manifest(tmp_path / "m" / "again.jsonl", corpus)
        assert read_corpus(tmp_path / "m").utterances[0].row() == {
            **utterance.row(),
            "audio_filepath": str(tmp_path / "clips" / "a.mp3"),
        }


@pytest.mark.parametrize("name", ["../../../../secret", "../secret", "{folder}/secret"])
def test_librispeech_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    chapter = tmp_path / "corpus" / "dev-clean" / "84" / "121"
    for file in (chapter / "84-121-0000.flac", tmp_path / "secret.flac", chapter.parent / "secret.flac"):
        audio(file)
    name = name.replace("{folder}", str(tmp_path))
    listing = text(chapter / "84-121.trans.txt", f"{name} hello\n84-121-0000 GO\n")
    with pytest.raises(UserError, match=rf"{listing}: row 1: id: got '.*', wanted a file below {chapter}"):
        read_corpus(tmp_path / "corpus")
    corpus = read_corpus(tmp_path / "corpus", skip_bad=True)
    assert [u.text for u in corpus.utterances] == ["GO"]
    assert [(each.split, each.reason) for each in corpus.left_out] == [("dev-clean", "outside the corpus")]


def an4(folder: Path, suffix: str = ".sph") -> Path:
    for name in ("an4_clstk/fash/an251-fash-b", "an4_clstk/fash/cen1-fash-b", "an4test_clstk/fcaw/an406-fcaw-b"):
        audio(folder / "wav" / f"{name}{suffix}")
    text(folder / "etc" / "an4_train.fileids", "an4_clstk/fash/an251-fash-b\nan4_clstk/fash/cen1-fash-b\n")
    lines = "<s> YES </s> (an251-fash-b)\n<s> RUBOUT G M E F THREE NINE </s> (cen1-fash-b)\n"
    text(folder / "etc" / "an4_train.transcription", lines)
    text(folder / "etc" / "an4_test.fileids", "an4test_clstk/fcaw/an406-fcaw-b\n")
    text(folder / "etc" / "an4_test.transcription", "GO (an406-fcaw-b)\n")
    return folder


@pytest.mark.parametrize("suffix", [".sph", ".wav"])
def test_an4_in_its_own_layout(tmp_path: Path, suffix: str) -> None:
    corpus = read_corpus(an4(tmp_path, suffix))
    assert [(u.id, u.text, u.duration, u.speaker, u.extra["split"]) for u in corpus.utterances] == [
        ("an251-fash-b", "YES", 0.5, "fash", "train"),
        ("cen1-fash-b", "RUBOUT G M E F THREE NINE", 0.5, "fash", "train"),
        ("an406-fcaw-b", "GO", 0.5, "fcaw", "test"),
    ]
    assert corpus.utterances[0].audio == f"wav/an4_clstk/fash/an251-fash-b{suffix}"
    assert len(corpus.load(corpus.utterances[2])) == 8000 and not corpus.counts


def test_what_is_wrong_in_an4_is_named_and_counted(tmp_path: Path) -> None:
    folder = an4(tmp_path)
    files = ["an4_clstk/fash/an251-fash-b", "an4_clstk/fash/an9-fash-b", "../../secret", "an4_clstk/odd/two"]
    text(folder / "etc" / "an4_train.fileids", "\n".join([*files, "an4_clstk/fash/cen1-fash-b"]) + "\n")
    lines = ["YES (an251-fash-b)", "NO (an251-fash-b)", "NO ID", "GO (other)", "<s> TWO </s> (two)", "X (secret)"]
    text(folder / "etc" / "an4_train.transcription", "\n".join([*lines, "<s>  </s> (cen1-fash-b)"]) + "\n")
    audio(tmp_path.parent / "secret.sph")
    corpus = read_corpus(folder, skip_bad=True)
    assert [u.text for u in corpus.utterances] == ["YES", "GO"]
    etc = folder / "etc"
    for wanted in (
        f"{etc}/an4_train.transcription: row 2: an251-fash-b stands there twice, first in row 1",
        f"{etc}/an4_train.transcription: row 3: got 'NO ID', wanted words and (ID)",
        f"{etc}/an4_train.fileids: row 2: an9-fash-b is not in {etc}/an4_train.transcription",
        f"{etc}/an4_train.fileids: row 3: file: got '../../secret', wanted a file below {folder}/wav",
        f"{etc}/an4_train.fileids: row 4: audio: {folder}/wav/an4_clstk/odd/two.sph is no file",
        f"{etc}/an4_train.fileids: row 5: text: is empty",
        f"{etc}/an4_train.transcription: row 4: other is not in {etc}/an4_train.fileids",
    ):
        assert any(problem.startswith(wanted) for problem in corpus.problems), wanted
    assert sum(corpus.counts.values()) == 7 == sum(each.count for each in corpus.left_out if each.split == "train")
    audio(folder / "wav" / "an4_clstk" / "odd" / "two.sph")
    assert read_corpus(folder, skip_bad=True).utterances[1].speaker == "odd"


def test_an4_without_a_header_or_a_list_is_refused(tmp_path: Path) -> None:
    folder = an4(tmp_path)
    (folder / "etc" / "an4_test.transcription").unlink()
    with pytest.raises(UserError, match=r"an4_test\.transcription: does not exist; AN4 has it"):
        read_corpus(folder)
    for file in (folder / "wav").rglob("*.sph"):
        file.rename(file.with_suffix(".raw"))
    with pytest.raises(UserError, match=r"wav: holds \.raw files only, .* wanted AN4 as \.sph or \.wav"):
        read_corpus(folder, skip_bad=True)
    with pytest.raises(UserError, match=r"holds neither an4_train\.fileids nor"):
        read_corpus(folder / "wav", format="an4")


def kaldi(folder: Path, **files: str) -> Path:
    audio(folder / "r1.sph", 2.0)
    audio(folder / "r2.flac", 1.0)
    text(folder / "wav.scp", f"r1 r1.sph\nr2 {folder / 'r2.flac'}\n")
    for name, content in files.items():
        text(folder / name, content)
    return folder


def test_kaldi_recordings_and_segments(tmp_path: Path) -> None:
    plain = read_corpus(
        kaldi(tmp_path / "a", text="r1 YES NO\nr2 STOP\n", utt2spk="r1 s1\nr2 s2\n", utt2dur="r2 1.25\n")
    )
    assert [(u.id, u.text, u.duration, u.speaker) for u in plain.utterances] == [
        ("r1", "YES NO", 2.0, "s1"),
        ("r2", "STOP", 1.25, "s2"),
    ]
    cut = kaldi(
        tmp_path / "b",
        segments="u1 r1 0 0.5\nu2 r1 0.5 2.0\nu3 r2 0.25 -1\n",
        text="u1 a\nu2 b\nu3 c\n",
        utt2spk="u1 s1\nu2 s1\nu3 s2\n",
    )
    corpus = read_corpus(cut)
    assert [(u.id, u.audio, u.duration, u.extra["offset"], u.speaker) for u in corpus.utterances] == [
        ("u1", "r1.sph", 0.5, 0.0, "s1"),
        ("u2", "r1.sph", 1.5, 0.5, "s1"),
        ("u3", str(cut / "r2.flac"), 0.75, 0.25, "s2"),
    ]
    whole, _ = soundfile.read(cut / "r1.sph", dtype="float32")
    np.testing.assert_array_equal(corpus.load(corpus.utterances[1]), whole[8000:])


def test_kaldi_commands_are_refused_and_never_run(tmp_path: Path) -> None:
    folder = kaldi(tmp_path / "a", text="r1 a\nr3 b\n")
    text(folder / "wav.scp", f"r1 r1.sph\nr3 touch {tmp_path / 'ran'}; cat r1.sph |\n")
    with pytest.raises(UserError, match=r"wav\.scp: row 2: holds a command, which is never run"):
        read_corpus(folder)
    corpus = read_corpus(folder, skip_bad=True)
    assert corpus.counts == {"command in wav.scp": 1} and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"text": "r1 a\n"}, r"wav\.scp: row 2: r2 is not in .*text"),
        ({"text": "r1 a\nr2 b\nr9 c\n"}, r"text: row 3: r9 has no audio"),
        ({"text": "r1 a\nr2\n"}, r"wav\.scp: row 2: text: is empty"),
        ({"segments": "u1 r1 0\n"}, r"segments: row 1: got 'r1 0', wanted a recording"),
        ({"segments": "u1 r1 0 x\n"}, r"segments: row 1: got 'x', wanted a number of seconds"),
        ({"segments": "u1 r1 2 1\n"}, r"segments: row 1: end: got -1\.0, wanted seconds above 0"),
        ({"segments": "u1 r7 0 1\n"}, r"segments: row 1: r7 is not in .*wav\.scp"),
        ({"text": "r1 a\nr1 b\n"}, r"text: row 2: r1 stands there twice, first in row 1"),
        ({"utt2spk": "r1 s\nr1 t\n"}, r"utt2spk: row 2: r1 stands there twice, first in row 1"),
    ],
)
def test_kaldi_mistakes(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_corpus(kaldi(tmp_path, **files))


def test_bad_rows_of_kaldi_lists_are_counted(tmp_path: Path) -> None:
    folder = kaldi(tmp_path)
    audio(folder / "r3.wav")
    text(folder / "wav.scp", "r1 r1.sph\nr2\tr2.flac\nr1 r3.wav\nr3 r3.wav\n")
    (folder / "text").write_bytes(b"r1 one\ttwo\n\xff\xfe three\nr3\tfour five\nr2  six\n")
    corpus = read_corpus(folder, skip_bad=True)
    assert [(u.id, u.audio, u.text) for u in corpus.utterances] == [
        ("r1", "r1.sph", "one\ttwo"),
        ("r2", "r2.flac", "six"),
        ("r3", "r3.wav", "four five"),
    ]
    assert corpus.counts == {"duplicate id": 1, "unreadable row": 1}
    assert corpus.problems == (
        f"{folder / 'wav.scp'}: row 3: r1 stands there twice, first in row 1",
        f"{folder / 'text'}: row 2: is not UTF-8 text",
    )


def test_a_folder_of_audio_and_text(tmp_path: Path) -> None:
    audio(tmp_path / "s" / "a.wav")
    audio(tmp_path / "b.flac")
    text(tmp_path / "s" / "a.txt", "yes\n no \n")
    assert read_corpus(tmp_path).utterances == (
        Utterance("b", "b.flac", None, 0.5),
        Utterance("s/a", "s/a.wav", "yes no", 0.5, "s"),
    )
    for name in ("dev/s/c.wav", "train/d.wav", "training course/s/e.wav"):
        audio(tmp_path / name)
    found = {u.id: (u.extra.get("split"), u.speaker) for u in read_corpus(tmp_path).utterances}
    wanted = {"b": (None, ""), "s/a": (None, "s"), "dev/s/c": ("dev", "s"), "train/d": ("train", "")}
    assert found == {**wanted, "training course/s/e": (None, "training course")}
    (tmp_path / "dev" / "s" / "f.m4a").touch()
    assert [each.split for each in read_corpus(tmp_path, skip_bad=True).left_out] == ["dev"]
    (tmp_path / "dev" / "s" / "f.m4a").unlink()
    text(tmp_path / "b.txt", "\n")
    with pytest.raises(UserError, match=r"b\.txt: text: is empty"):
        read_corpus(tmp_path)


def made(*rows: tuple[str, str, float, str]) -> Corpus:
    return Corpus(tuple(Utterance(id, f"{id}.wav", text, seconds, who) for id, text, seconds, who in rows), Path("."))


def test_the_fingerprint_sees_rows_order_and_audio_but_not_the_folder(tmp_path: Path) -> None:
    prints = []
    for folder, rows, seconds in (
        ("a", "xy", 0.5),
        ("b", "xy", 0.5),
        ("c", "yx", 0.5),
        ("d", "x", 0.5),
        ("e", "xy", 0.6),
    ):
        for name in "xy":
            audio(tmp_path / folder / f"{name}.wav", seconds)
        named = [{"audio_filepath": f"{name}.wav", "text": name, "duration": 0.5} for name in rows]
        prints.append(read_corpus(manifest(tmp_path / folder / "m.jsonl", *named)).fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 4


@given(
    speakers=st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=40).filter(lambda each: len(set(each)) > 1),
    seed=st.integers(0, 5),
    data=st.data(),
)
def test_held_out_speakers_are_apart_and_the_same_each_time(
    speakers: list[str], seed: int, data: st.DataObject
) -> None:
    corpus = made(*((str(at), "a", 1.0, who) for at, who in enumerate(speakers)))
    count = data.draw(st.integers(1, len(set(speakers)) - 1))
    train, held = hold_out_speakers(corpus, count=count, seed=seed)
    names = {u.speaker for u in held.utterances}
    assert len(names) == count and not names & {u.speaker for u in train.utterances}
    assert sorted([*train.utterances, *held.utterances], key=lambda u: int(u.id)) == list(corpus.utterances)
    shuffled = Corpus(tuple(data.draw(st.permutations(corpus.utterances))), corpus.folder)
    assert {u.speaker for u in hold_out_speakers(shuffled, count=count, seed=seed)[1].utterances} == names


def test_speakers_that_cannot_be_held_out() -> None:
    corpus = made(("1", "a", 1.0, "x"), ("2", "b", 1.0, "y"), ("3", "b", 1.0, "z"))
    assert len({u.speaker for u in hold_out_speakers(corpus, share=0.34)[1].utterances}) == 1
    for some, message in (
        (corpus, "has 3 speakers; 3 cannot be held out: lower --data.valid_speakers or --data.test_speakers, or name"),
        (made(("1", "a", 1.0, "x")), "has 1 speaker; 3 cannot be held out: name what validates and tests with --valid"),
        (made(("1", "a", 1.0, "")), "utterance 1 names no speaker; speakers cannot be held out: name .* --valid and"),
    ):
        with pytest.raises(UserError, match=message):
            hold_out_speakers(some, count=3)
    for options in ({}, {"count": 1, "share": 0.5}, {"share": 1.0}, {"count": 0}):
        with pytest.raises(ValueError, match="wanted"):
            hold_out_speakers(corpus, **options)  # type: ignore[arg-type]


def test_texts_longer_than_their_frames_are_named() -> None:
    units = Units.of_characters(["abc no"])
    # 0.2 s are 20 feature frames, 5 output frames; "aab" needs a blank more than "abc"
    corpus = made(("a", "abcab", 0.2, ""), ("b", "aabca", 0.2, ""), ("c", "No! ab", 0.2, ""), ("d", "a", 0.001, ""))
    found = impossible(corpus, units)
    assert [(each.utterance.id, each.needs, each.has) for each in found] == [("b", 6, 5), ("d", 1, 0)]
    assert str(found[0]) == "b: its text needs 6 frames, its 0.2 s have 5"
    with pytest.raises(UserError, match="utterance e: text 'xyz': holds 'x', which is outside the units"):
        impossible(made(("e", "xyz", 1.0, "")), units)
    assert list(outside_units(made(("e", "xyz", 1.0, ""), ("f", "abc", 1.0, "")).utterances, units)) == ["e"]


@given(st.integers(1, 4000))
def test_output_frames_are_those_of_the_features(count: int) -> None:
    from apps.speech.data.utterance import output_frames

    frames = len(fbank(np.zeros(count, np.float32)))
    assert output_frames(count) == -(-frames // 4)


def test_bad_audio_is_counted_and_nothing_else_lost(tmp_path: Path) -> None:
    for name in "abc":
        audio(tmp_path / f"{name}.wav")
    (tmp_path / "b.wav").write_bytes((tmp_path / "b.wav").read_bytes()[:3000])
    rows = [{"audio_filepath": f"{name}.wav", "text": "yes", "duration": 0.5} for name in "abc"]
    corpus = read_corpus(manifest(tmp_path / "m.jsonl", *rows))
    with pytest.raises(UserError, match=r"utterance b: .*b\.wav: is truncated"):
        list(loaded(corpus, Tally(False)))
    tally = Tally(True)
    assert [u.id for u, _ in loaded(corpus, tally)] == ["a", "c"] and tally.counts == {"bad audio": 1}


def test_kaldi_folders_in_a_folder_are_its_splits(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        audio(tmp_path / "data" / split / "wav" / f"{split}1.wav", 0.4)
        audio(tmp_path / "far" / f"{split}2.wav", 0.4)
        far = tmp_path / "far" / f"{split}2.wav"
        text(tmp_path / "data" / split / "wav.scp", f"{split}1 wav/{split}1.wav\n{split}2 {far}\n")
        text(tmp_path / "data" / split / "text", f"{split}1 yes\n{split}2 no\n")
        text(tmp_path / "data" / split / "utt2spk", f"{split}1 {split}-s\n{split}2 {split}-s\n")
    (tmp_path / "data" / "lang").mkdir()
    corpus = read_corpus(tmp_path / "data")
    assert corpus.splits == ("dev", "train")
    assert [(u.id, u.text, u.speaker) for u in corpus.split("dev").utterances] == [
        ("dev/dev1", "yes", "dev-s"),
        ("dev/dev2", "no", "dev-s"),
    ]
    assert all(len(corpus.load(each)) == 6400 for each in corpus.utterances)
    (tmp_path / "data" / "dev" / "wav.scp").write_text("dev1 |sox\n")
    with pytest.raises(UserError, match=r"data/dev/wav\.scp: row 1: holds a command"):
        read_corpus(tmp_path / "data")
    assert {each.split for each in read_corpus(tmp_path / "data", skip_bad=True).left_out} == {"dev"}
    # a manifest says what belongs to a corpus
    manifest(tmp_path / "data" / "all.jsonl", {"audio": "train/wav/train1.wav", "text": "yes"})
    assert [each.audio for each in read_corpus(tmp_path / "data").utterances] == ["train/wav/train1.wav"]
