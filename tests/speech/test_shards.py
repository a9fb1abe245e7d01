"""Shards give back the corpus, in an order and a division that can be relied on, and cannot do harm."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.speech.data import shards
from apps.speech.data.shards import read_shards, shard_paths, write_shards
from apps.speech.data.utterance import Corpus, Tally, Utterance
from kdcore.config import UserError


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


def ids(*args: object, **options: object) -> list[str]:
    return [utterance.id for utterance, _ in read_shards(*args, **options)]  # type: ignore[arg-type]


def test_what_is_written_comes_back(corpus: Corpus, written: list[Path]) -> None:
    assert [path.name for path in written] == [f"shard-00000{n}.tar" for n in range(5)]
    assert shard_paths(written[0].parent) == written
    read = list(read_shards(written))
    assert len(read) == len(corpus)
    for (utterance, samples), given_ in zip(read, corpus.utterances, strict=True):
        np.testing.assert_array_equal(samples, corpus.load(given_))
        assert (utterance.id, utterance.text, utterance.speaker) == (given_.id, given_.text, given_.speaker)
        assert utterance.duration == pytest.approx(given_.duration)
        assert utterance.extra == {key: value for key, value in given_.extra.items() if key != "offset"}
    assert read[6][0].audio == "shard-000001.tar/00000006.flac"
    index = json.loads((written[0].parent / "shards.json").read_text())
    assert index["utterances"] == 24 and index["fingerprint"] == corpus.fingerprint


def test_the_same_bytes_each_time_and_never_over_others(corpus: Corpus, written: list[Path], tmp_path: Path) -> None:
    (tmp_path / "shard-000077.tar").write_bytes(b"of a run that was killed")
    again = write_shards(corpus, tmp_path, per_shard=5)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written]
    assert sorted(tmp_path.glob("*.tar")) == again
    with pytest.raises(UserError, match="holds shards already"):
        write_shards(corpus, tmp_path)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.integers(1, 7), seed=st.none() | st.integers(-3, 3), epoch=st.integers(0, 3), buffer=st.integers(1, 30))
def test_every_utterance_goes_to_one_part(
    corpus: Corpus, written: list[Path], parts: int, seed: int | None, epoch: int, buffer: int
) -> None:
    options = {"seed": seed, "epoch": epoch, "buffer": buffer, "parts": parts}
    each = [ids(written, part=part, **options) for part in range(parts)]
    assert sorted(name for names in each for name in names) == sorted(u.id for u in corpus.utterances)
    assert max(map(len, each)) - min(map(len, each)) <= 1
    assert each[0] == ids(written, part=0, **options)


def test_the_order_is_a_function_of_seed_and_epoch(corpus: Corpus, written: list[Path]) -> None:
    stored = [u.id for u in corpus.utterances]
    orders = [tuple(ids(written, seed=seed, epoch=epoch, buffer=100)) for seed in (0, 1) for epoch in (0, 1)]
    assert len({*orders, tuple(stored)}) == 5
    assert ids(written) == stored
    # with a small buffer, too, an utterance may come from far away, but not before it was read
    shuffled = ids(written[:1] * 1, seed=0, buffer=2)
    assert sorted(shuffled) == sorted(stored[:5]) and shuffled != stored[:5]


def test_webdataset_reads_them_and_its_shards_are_read(written: list[Path], corpus: Corpus, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    read = list(webdataset.WebDataset([str(path) for path in written], shardshuffle=False))
    assert [json.loads(sample["json"])["id"] for sample in read] == [u.id for u in corpus.utterances]
    with webdataset.TarWriter(str(tmp_path / "other.tar")) as writer:
        for number in range(3):
            data = (corpus.folder / f"{number}.wav").read_bytes()
            writer.write({"__key__": f"dir/x{number}", "wav": data, "txt": f"text {number}\n".encode(), "cls": b"1"})
    for (utterance, samples), number in zip(read_shards([tmp_path / "other.tar"]), range(3), strict=True):
        assert (utterance.id, utterance.text) == (f"dir/x{number}", f"text {number}")
        np.testing.assert_array_equal(samples, corpus.load(corpus.utterances[number]))


def test_memory_is_that_of_the_buffer(written: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a hundred shards no more utterances are held than the buffer has, and no list of members grows."""
    held, most, decode = 0, 0, shards.decode_audio
    members = []

    def counted(stored: Iterator[shards._Stored]) -> Iterator[shards._Stored]:
        nonlocal held, most
        for each in stored:
            held += 1
            most = max(most, held)
            yield each

    original = shards._stored
    monkeypatch.setattr(shards, "_stored", lambda *args: counted(original(*args)))

    def decoded(data: bytes, name: str) -> np.ndarray:
        nonlocal held
        held -= 1
        return decode(data, name)

    monkeypatch.setattr(shards, "decode_audio", decoded)
    next_member = tarfile.TarFile.next

    def counting(self: tarfile.TarFile) -> tarfile.TarInfo | None:
        members.append(len(self.members))  # type: ignore[attr-defined]
        return next_member(self)

    monkeypatch.setattr(tarfile.TarFile, "next", counting)
    assert sum(1 for _ in read_shards(written * 20, seed=0, buffer=8)) == 480
    assert most == 9 and max(members) <= 1


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
            assert all(len(samples) for _, samples in read_shards([tmp_path / "bad.tar"], tally=tally))
        except UserError as error:
            assert "bad.tar" in str(error) and "\n" not in str(error)


def test_bad_utterances_are_named_or_counted(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "x.tar",
        *[("a.wav", wave()), ("a.txt", b"yes"), ("b.txt", b"no audio"), ("c.wav", b"noise"), ("d.wav", wave())],
        *[("d.json", b"{"), ("e.wav", wave()), ("e.json", b"[]"), ("f.wav", wave()), ("f.json", b'{"text": 3}')],
        *[("g.wav", wave()), ("g.txt", b" "), ("h.wav", wave()), ("readme", b"hello"), (".wav", wave())],
    )
    tally = Tally(True)
    assert [(u.id, u.text) for u, _ in read_shards([path], tally=tally)] == [("a", "yes"), ("h", None)]
    assert tally.counts == {"no audio": 1, "bad audio": 1, "unreadable row": 2, "bad field": 1, "empty text": 1}
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
