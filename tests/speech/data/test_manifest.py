"""What rows say of parts of files, channels and names, and what a folder holds that is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from apps.speech.data.formats import pattern_files, read_corpus
from apps.speech.data.manifest import write_manifest
from kdcore.config import UserError

TIME = np.arange(32_000) / 16_000


@pytest.fixture
def stereo(tmp_path: Path) -> np.ndarray:
    """Write two seconds of two channels that differ, and return them float32 [32000, 2]."""
    both = np.stack([0.5 * np.sin(500 * TIME), 0.25 * np.sin(900 * TIME)], 1)
    soundfile.write(tmp_path / "st.wav", both, 16_000, subtype="FLOAT")
    return both.astype(np.float32)


def manifest(folder: Path, *rows: dict[str, Any]) -> Path:
    lines = [json.dumps({"audio_filepath": "st.wav", "text": "yes", **row}) + "\n" for row in rows]
    (folder / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "rows.jsonl"


def test_a_duration_without_an_offset_is_the_beginning_of_a_longer_file(tmp_path: Path, stereo: np.ndarray) -> None:
    corpus = read_corpus(manifest(tmp_path, {"duration": 0.5, "id": "a"}, {"duration": 1.95, "id": "b"}, {"id": "c"}))
    heard = [corpus.load(each) for each in corpus.utterances]
    # what rounding explains is no part
    assert [len(each) for each in heard] == [8_000, 32_000, 32_000]
    np.testing.assert_allclose(heard[0], stereo[:8000].mean(1), atol=1e-6)
    write_manifest(tmp_path / "again.jsonl", corpus)
    again = read_corpus(tmp_path / "again.jsonl")
    np.testing.assert_array_equal(again.load(again.utterances[0]), heard[0])


def test_channels_and_close_offsets_of_one_file_are_utterances_of_their_own(tmp_path: Path, stereo: np.ndarray) -> None:
    rows = [{"channel": 0}, {"channel": 1}, {"offset": 1.0000001, "duration": 0.5}, {"offset": 1.0, "duration": 0.5}]
    corpus = read_corpus(manifest(tmp_path, *rows))
    assert [each.id for each in corpus.utterances] == ["st#0", "st#1", "st@1.0000001", "st@1"]
    np.testing.assert_allclose(corpus.load(corpus.utterances[1]), stereo[:, 1], atol=1e-6)


@pytest.mark.parametrize("channel", ["1", 1.0, True, -1, [0]])
def test_a_channel_that_is_no_number_is_named(tmp_path: Path, stereo: np.ndarray, channel: object) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl: row 1: channel: got .*, wanted a number, the first is 0"):
        read_corpus(manifest(tmp_path, {"channel": channel}))


def test_what_cannot_be_written_as_text_is_a_bad_field_wherever_it_stands(tmp_path: Path, stereo: np.ndarray) -> None:
    for extra in ({"note": "\ud800"}, {"\udfff": 1}, {"notes": [{"deep": "\udc00"}]}):
        file = manifest(tmp_path, {"id": "a"}, {"id": "b", **extra})
        with pytest.raises(UserError, match=r"row 2: .* cannot be written as text"):
            read_corpus(file)
        corpus = read_corpus(file, skip_bad=True)
        assert corpus.counts == {"bad field": 1}
        write_manifest(tmp_path / "again.jsonl", corpus)


def test_other_audio_and_long_texts_of_a_folder_are_named_and_counted(tmp_path: Path, stereo: np.ndarray) -> None:
    (tmp_path / "talk.m4a").write_bytes(b"x")
    soundfile.write(tmp_path / "long.wav", TIME[:8000], 16_000)
    (tmp_path / "long.txt").write_text("word\n" * 1001)
    with pytest.raises(UserError, match=r"long\.txt: has more than 1000 lines"):
        read_corpus(tmp_path)
    (tmp_path / "long.txt").write_text("word\n" * 1000)
    with pytest.raises(UserError, match=r"talk\.m4a: \.m4a is not read; wanted wav"):
        read_corpus(tmp_path)
    (tmp_path / "st.mp4").write_bytes(b"what st.wav was made of")
    corpus = read_corpus(tmp_path, skip_bad=True)
    assert [each.id for each in corpus.utterances] == ["long", "st"] and corpus.counts == {"audio of another kind": 1}
    assert len((corpus.utterances[0].text or "").split()) == 1000


def test_sides_of_kaldi_recordings_are_channels_where_a_file_has_several(tmp_path: Path, stereo: np.ndarray) -> None:
    soundfile.write(tmp_path / "mono.wav", TIME[:8000], 16_000)
    (tmp_path / "wav.scp").write_text("a st.wav\nb st.wav\nm mono.wav\n")
    (tmp_path / "reco2file_and_channel").write_text("a st A\nb st B\nm mono L\n")
    corpus = read_corpus(tmp_path)
    assert [each.extra for each in corpus.utterances] == [{"channel": 0}, {"channel": 1}, {}]
    np.testing.assert_allclose(corpus.load(corpus.utterances[1]), stereo[:, 1], atol=1e-6)
    (tmp_path / "reco2file_and_channel").write_text("a st C\n")
    with pytest.raises(UserError, match=r"reco2file_and_channel: row 1: got 'C', wanted a channel, A or B"):
        read_corpus(tmp_path)


def test_manifests_of_nemo_are_splits_and_others_are_none(tmp_path: Path, stereo: np.ndarray) -> None:
    (tmp_path / "manifest.json").write_text('{\n  "files": 1\n}\n')
    assert [each.id for each in read_corpus(tmp_path).utterances] == ["st"]
    for split in ("train", "dev"):
        manifest(tmp_path, {"id": split}).rename(tmp_path / f"{split}_manifest.json")
    assert read_corpus(tmp_path).splits == ("dev_manifest", "train_manifest")


def test_shards_of_a_range_of_numbers(tmp_path: Path) -> None:
    for number in (0, 2, 11):
        (tmp_path / f"part-{number:04d}.tar").touch()
        (tmp_path / f"s{number}.tar").touch()

    def names(pattern: str) -> list[str]:
        return [each.name for each in pattern_files(tmp_path / pattern)]

    assert names("part-{0000..0003}.tar") == ["part-0000.tar", "part-0002.tar"]
    assert names("s{2..11}.tar") == ["s2.tar", "s11.tar"]
    assert names("part-00?[12].tar") == ["part-0002.tar", "part-0011.tar"]
    assert names("part-{0000..x}.tar") == names("s{5..4}.tar") == []
