"""Shards give back the corpus, as any other one that is trained on, and cannot do harm."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.speech.data.formats import read_corpus
from apps.speech.data.manifest import Row, collect
from apps.speech.data.shards import shard_paths, shard_rows, write_shards
from apps.speech.data.utterance import STORED, Corpus, LeftOut, Tally, Utterance, loaded
from data_scripts.simulate_speech import simulate
from kdcore.config import UserError
from tests.speech.small_runs import small


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    utterances = []
    for number in range(23):
        samples = generator.integers(-9000, 9000, 1600 + 160 * number).astype(np.int16)
        soundfile.write(folder / f"{number}.wav", samples, 16000)
        text = None if number == 5 else f"text {number}"
        utterances.append(Utterance(f"u{number}", f"{number}.wav", text, len(samples) / 16000, "s", {"n": number}))
    utterances.append(Utterance("part", "0.wav", "é", 0.05, "", {"offset": 0.025}))
    return Corpus(tuple(utterances), folder)


@pytest.fixture(scope="module")
def written(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_shards(corpus, tmp_path_factory.mktemp("shards"), per_shard=5)


def read(paths: list[Path], *, skip_bad: bool = False) -> Corpus:
    return collect(shard_rows(paths), paths[0].parent, paths[0], skip_bad)


def ids(paths: list[Path]) -> list[str]:
    return [utterance.id for utterance, _ in loaded(read(paths), Tally(False))]


def test_what_is_written_comes_back(corpus: Corpus, written: list[Path]) -> None:
    assert [path.name for path in written] == [f"shard-00000{n}.tar" for n in range(5)]
    assert shard_paths(written[0].parent) == written
    for source in (written[0].parent, written[0].parent / "shard-*.tar"):
        stored = read_corpus(source)
        assert len(stored) == len(corpus)
        for utterance, given_ in zip(stored.utterances, corpus.utterances, strict=True):
            np.testing.assert_array_equal(stored.load(utterance), corpus.load(given_))
            assert (utterance.id, utterance.text, utterance.speaker) == (given_.id, given_.text, given_.speaker)
            assert utterance.duration == pytest.approx(given_.duration)
            assert {key: utterance.extra[key] for key in utterance.extra if key not in STORED} == {
                key: value for key, value in given_.extra.items() if key != "offset"
            }
        assert stored.utterances[6].audio == "shard-000001.tar"
        assert stored.utterances[6].extra["stored_as"] == "00000006.flac"
    assert [each.id for each in read_corpus(written[1]).utterances] == ["u5", "u6", "u7", "u8", "u9"]
    assert [utterance.id for utterance in read(written).utterances] == [each.id for each in corpus.utterances]
    index = json.loads((written[0].parent / "shards.json").read_text())
    assert index["utterances"] == 24 and index["fingerprint"] == corpus.fingerprint


def test_the_same_bytes_each_time_and_never_over_others(corpus: Corpus, written: list[Path], tmp_path: Path) -> None:
    (tmp_path / "shard-000077.tar").write_bytes(b"of a run that was killed")
    again = write_shards(corpus, tmp_path, per_shard=5)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]
    assert sorted(tmp_path.glob("*.tar")) == again
    with pytest.raises(UserError, match="holds shards already"):
        write_shards(corpus, tmp_path)


def test_shards_that_were_broken_off_are_no_corpus(corpus: Corpus, written: list[Path], tmp_path: Path) -> None:
    audio = Path(tmp_path / "source")
    shutil.copytree(corpus.folder, audio)
    (audio / "17.wav").write_bytes(b"")  # an error does what a kill would
    with pytest.raises(UserError, match=r"17\.wav"):
        write_shards(replace(corpus, folder=audio), tmp_path / "shards", per_shard=5)
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 3
    for source in (tmp_path / "shards", tmp_path / "shards" / "shard-*.tar", tmp_path / "shards" / "shard-000001.tar"):
        with pytest.raises(UserError, match="holds a part of a corpus: kd speech shards was broken off"):
            read_corpus(source)
    # the same command makes them, also where it was killed after its last word but one
    for _ in range(2):
        again = write_shards(corpus, tmp_path / "shards", per_shard=5)
        assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]
        assert len(read_corpus(tmp_path / "shards")) == len(corpus)
        (tmp_path / "shards" / "shards.incomplete").touch()


def test_a_run_is_trained_on_shards(tmp_path: Path) -> None:
    data = simulate(tmp_path / "data", utterances=30)
    folders = {part: tmp_path / part for part in ("train", "valid", "test")}
    for part, folder in folders.items():
        write_shards(read_corpus(data / f"{part}.jsonl"), folder, per_shard=7)
    given_ = {
        "train": str(folders["train"] / "shard-*.tar"),
        "valid": str(folders["valid"]),
        "test": str(folders["test"]),
    }
    stored = small("ctc_frame_level", data, tmp_path / "stored", data=given_).prepared
    plain = small("ctc_frame_level", data, tmp_path / "plain").prepared
    for part, view in (("train", "clean"), ("valid", "noise:0:10")):
        assert stored.texts(part) == plain.texts(part)
        np.testing.assert_array_equal(stored.store(part, view).frames, plain.store(part, view).frames)
    labels = stored.training(["clean"]).labels
    assert labels == plain.training(["clean"]).labels and labels[0]


def test_a_shard_that_changed_since_is_named(written: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(written[0].read_bytes())
    stored = read_corpus(path)
    path.write_bytes(written[0].read_bytes()[:20_000])
    with pytest.raises(UserError, match=r"shard\.tar: member 00000004\.flac: is truncated"):
        stored.load(stored.utterances[4])
    path.write_bytes(bytes(written[0].stat().st_size))
    with pytest.raises(UserError, match=r"shard\.tar: member 00000000\.flac: cannot be read as audio"):
        stored.load(stored.utterances[0])
    path.unlink()
    with pytest.raises(UserError, match=r"shard\.tar: cannot be read"):
        stored.load(stored.utterances[0])


@pytest.mark.parametrize("place", [(-1, 5), (0, 0), (0, 1 << 40), (10**30, 5), ("0", 5), (None, 5), (True, 5)])
def test_places_that_cannot_be_are_refused(written: list[Path], place: tuple[object, object]) -> None:
    odd = Utterance("x", written[0].name, "x", 1.0, "", dict(zip(STORED, ("a.flac", *place), strict=True)))
    with pytest.raises(UserError, match=r"x: stored_at, stored_bytes: got .*, wanted bytes"):
        Corpus((odd,), written[0].parent).load(odd)


def test_webdataset_reads_them_and_its_shards_are_read(written: list[Path], corpus: Corpus, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset([str(path) for path in written], shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in samples] == [u.id for u in corpus.utterances]
    with webdataset.TarWriter(str(tmp_path / "other.tar")) as writer:
        for number in range(3):
            data = (corpus.folder / f"{number}.wav").read_bytes()
            writer.write({"__key__": f"dir/x{number}", "wav": data, "txt": f"text {number}\n".encode(), "cls": b"1"})
    other = read_corpus(tmp_path)
    for utterance, number in zip(other.utterances, range(3), strict=True):
        assert (utterance.id, utterance.text) == (f"dir/x{number}", f"text {number}")
        np.testing.assert_array_equal(other.load(utterance), corpus.load(corpus.utterances[number]))
        assert utterance.duration == corpus.utterances[number].duration


def test_no_list_of_members_grows(written: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    members = []
    next_member = tarfile.TarFile.next

    def counting(self: tarfile.TarFile) -> tarfile.TarInfo | None:
        members.append(len(self.members))  # type: ignore[attr-defined]
        return next_member(self)

    monkeypatch.setattr(tarfile.TarFile, "next", counting)
    rows = [row for row in shard_rows(written * 20) if isinstance(row, Row)]
    assert len(rows) == 480 and max(members) <= 1
    assert not any(isinstance(value, bytes) for row in rows for value in (*row.values.values(), *row.extra.values()))


def tar(path: Path, *members: tuple[tarfile.TarInfo | str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def wave() -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(800), 16000, format="WAV")
    return stream.getvalue()


@pytest.mark.parametrize("name", ["/etc/a.wav", "../a.wav", "a/../../b.wav", "..\\a.wav", "C:\\a.wav", "\\a.wav"])
def test_names_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"x\.tar: member .*: leaves the archive"):
        ids([tar(tmp_path / "x.tar", (name, wave()))])


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("a.wav")
    member.type, member.linkname = kind, "/etc/passwd"
    with pytest.raises(UserError, match=r"x\.tar: member 'a\.wav': is a (link|device)"):
        ids([tar(tmp_path / "x.tar", (member, b""))])


def test_sizes_that_are_claimed_are_not_allocated(tmp_path: Path) -> None:
    for number, (kind, size) in enumerate([(tarfile.REGTYPE, 1 << 40), (tarfile.XHDTYPE, 1 << 40), (b"L", 1 << 35)]):
        member = tarfile.TarInfo("a.wav")
        member.type, member.size = kind, size
        path = tmp_path / f"{number}.tar"
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        with pytest.raises(UserError, match=rf"{number}\.tar"):
            ids([path])
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, b"L"):  # sizes below zero once sent readers back for ever
        member = tarfile.TarInfo("a.wav")
        member.type = kind
        header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
        header[124:136] = (-1024).to_bytes(12, "big", signed=True)
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        (tmp_path / "below.tar").write_bytes(header + bytes(4096))
        with pytest.raises(UserError, match=r"below\.tar"):
            ids([tmp_path / "below.tar"])


def test_truncated_shards_are_named_wherever_they_are_cut(written: list[Path], tmp_path: Path) -> None:
    whole = written[0].read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for cut in {0, 1, 511, 512, 1024, 1536, 5000, end - 512, end, *range(512, end, 2048)}:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut\.tar: (member .*: )?is truncated"):
            ids([path])


def test_what_lies_before_a_cut_and_in_other_shards_is_kept(written: list[Path], tmp_path: Path) -> None:
    names = [ids([path]) for path in written]
    assert len(names) > 1 and len(names[0]) > 1
    others = [Path(shutil.copy(path, tmp_path)) for path in written[1:]]
    cut = tmp_path / "cut.tar"
    cut.write_bytes(written[0].read_bytes().rstrip(b"\0")[:-2000])
    kept = read([cut, *others], skip_bad=True)
    assert kept.counts == {"unreadable shard": 1} and "cut.tar" in kept.problems[0]
    assert [each.id for each in kept.utterances] == [*names[0][:-1], *(name for more in names[1:] for name in more)]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_shard_gives_utterances_or_a_user_error(
    written: list[Path], tmp_path: Path, data: st.DataObject
) -> None:
    raw = bytearray(written[-1].read_bytes()[:20_480])
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, 1535))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):  # a header that is wrong and says that it is not
        checksum = sum(raw[:148]) + 8 * 32 + sum(raw[156:512])
        raw[148:156] = b"%06o\0 " % checksum
    (tmp_path / "bad.tar").write_bytes(raw)
    for tally in (Tally(True), Tally(False)):
        try:
            stored = read([tmp_path / "bad.tar"], skip_bad=tally.skip_bad)
            assert all(len(samples) for _, samples in loaded(stored, tally))
        except UserError as error:
            assert "bad.tar" in str(error) and "\n" not in str(error)


def test_bad_utterances_are_named_or_counted(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "x.tar",
        *[("a.wav", wave()), ("a.txt", b"yes"), ("b.txt", b"no audio"), ("c.wav", b"noise"), ("d.wav", wave())],
        *[("d.json", b"{"), ("e.wav", wave()), ("e.json", b"[]"), ("f.wav", wave()), ("f.json", b'{"text": 3}')],
        *[("g.wav", wave()), ("g.txt", b" "), ("h.wav", wave()), ("readme", b"hello"), (".wav", wave())],
        *[("i.wav", wave()), ("i.json", b'{"split": ["train"]}')],
    )
    stored = read([path], skip_bad=True)
    assert [(each.id, each.text) for each in stored.utterances] == [("a", "yes"), ("h", None)]
    assert stored.counts == {"no audio": 1, "bad audio": 1, "unreadable row": 2, "bad field": 2, "empty text": 1}
    with pytest.raises(UserError, match=r"x\.tar: member b: has no audio beside \.txt"):
        ids([path])


def test_lists_of_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shards"):
        shard_paths(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    assert shard_paths(tmp_path) == [tmp_path / "a.tar"]
    for content in ("{", "[]", '{"shards": 3}', '{"shards": ["../a.tar"]}'):
        (tmp_path / "shards.json").write_text(content)
        with pytest.raises(UserError, match=r"shards\.json"):
            shard_paths(tmp_path)
    (tmp_path / "shards.json").write_text('{"shards": ["b.tar"]}')
    with pytest.raises(UserError, match=r"b\.tar: does not exist"):
        shard_paths(tmp_path)
    (tmp_path / "x.zip").write_bytes(b"")
    for odd, message in (("x.zip", "is no shard"), ("*.zip", "is no shard"), ("y*.tar", "fits no shard")):
        with pytest.raises(UserError, match=message):
            shard_paths(tmp_path / odd)
    with pytest.raises(UserError, match=r"b\.tar: cannot be read"):
        ids([tmp_path / "b.tar"])


def test_audio_that_cannot_be_read_is_left_out_and_counted(corpus: Corpus, tmp_path: Path) -> None:
    gone = Utterance("gone", "gone.wav", "x", 1.0)
    some = Corpus((*corpus.utterances[:2], gone), corpus.folder)
    with pytest.raises(UserError, match="utterance gone"):
        write_shards(some, tmp_path / "a")
    assert not (tmp_path / "a" / "shards.json").exists()
    assert ids(write_shards(some, tmp_path / "b", skip_bad=True)) == ["u0", "u1"]
    assert json.loads((tmp_path / "b" / "shards.json").read_text())["left_out"] == {"bad audio": 1}
    # beside what was left out when the corpus was read
    read = replace(some, left_out=(LeftOut("unreadable row", None, 2), LeftOut("bad audio", "train", 3)))
    write_shards(read, tmp_path / "c", skip_bad=True)
    counted = json.loads((tmp_path / "c" / "shards.json").read_text())["left_out"]
    assert counted == {"unreadable row": 2, "bad audio": 4}
