"""Corpora by name, with selections, alone and joined: nothing clashes, nothing is in two parts, all is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from apps.speech.config import DataConfig
from apps.speech.data.corpora import Selection, absolute_name, find_data, parse_corpus
from apps.speech.data.formats import read_corpus
from apps.speech.data.parts import Parts, read_parts
from apps.speech.data.shards import write_shards
from apps.speech.data.splits import part_of
from kdcore.config import UserError
from kdcore.run import read_json
from tests.speech.small_runs import small

REAL = Path(os.environ.get("KD_DATA", "../shared/data")) / "speech"


def corpus(folder: Path, files: dict[str, list[tuple[str, str]]], rate: int = 16_000) -> Path:
    """Write manifests of (id, speaker) with half a second of noise each."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(len(str(folder)))
    for name, rows in files.items():
        lines = []
        for number, (utterance, speaker) in enumerate(rows):
            audio = f"{name}-{utterance}.wav"
            soundfile.write(folder / audio, generator.normal(0, 0.1, rate // 2).clip(-0.9, 0.9), rate)
            row = {"id": utterance, "path": audio, "text": f"yes {utterance[0]}", "duration": 0.5}
            lines.append(json.dumps({**row, "speaker": speaker, "take": number}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


def test_splits_are_parts_by_their_names(tmp_path: Path) -> None:
    splits = {"train-clean-100": "r", "train_other": "q", "dev-clean": "s", "test-clean": "t", "test-other": "u"}
    folder = corpus(tmp_path / "c", {split: [(speaker, speaker)] for split, speaker in splits.items()})
    said: list[str] = []
    parts = read_parts(DataConfig(path=str(folder)), said.append)
    assert ids(parts) == {"train": ["r", "q"], "valid": ["s"], "test": ["t", "u"]}
    assert "train: train-clean-100, train_other" in said and "test: test-clean, test-other" in said
    assert ids(read(path=str(folder), test=f"{folder}@split=test-clean"))["test"] == ["t"]
    # a split that is named is taken as it is, and what is of no part is said
    named = {"train": "train-clean-100", "valid": "train_other", "test": "test-clean,dev-clean"}
    both = read(**{part: f"{folder}@split={splits}" for part, splits in named.items()})
    assert ids(both)["test"] == ["s", "t"] and ids(both)["valid"] == ["q"]
    other = corpus(
        tmp_path / "d", {"train_nodup": [("a", "a"), ("b", "b")], "eval1": [("c", "c")], "extra": [("d", "d")]}
    )
    said.clear()
    parts = read_parts(DataConfig(path=str(other), valid_speakers=1), said.append)
    assert (
        ids(parts)["test"] == ["c"] and "not used: extra (--train, --valid or --test CORPUS@split=NAME would)" in said
    )
    assert not any(line.startswith("valid: train_nodup") for line in said)


def test_rows_that_name_no_split_are_trained_on(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "c", {"all": [(name, name) for name in "abcdef"]})
    rows = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    splits = {"a": "train", "c": "dev", "d": "test", "e": "extra"}
    named = [{**row, "split": splits[row["id"]]} if row["id"] in splits else row for row in rows]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    wanted = {"train": ["a", "b", "f"], "valid": ["c"], "test": ["d"]}
    assert ids(read(path=str(folder))) == wanted
    said: list[str] = []
    given = {part: str(folder) for part in ("train", "valid", "test")}
    assert ids(read_parts(DataConfig(**given), said.append)) == wanted  # type: ignore[arg-type]
    assert "not used: extra (--train, --valid or --test CORPUS@split=NAME would)" in said
    write_shards(read_corpus(folder), tmp_path / "shards")
    assert ids(read(path=str(tmp_path / "shards"))) == wanted


def test_a_split_that_is_bad_throughout_is_counted(both: tuple[Path, Path], tmp_path: Path) -> None:
    (both[0] / "dev.jsonl").write_text('{"id": "x", "path": "gone.wav", "text": "yes"}\n{\n')
    parts = read(path=str(both[0]), valid_speakers=1, skip_bad=True)
    assert parts.left_out == {"valid: no audio": 1, "valid: unreadable row": 1}
    folder = corpus(tmp_path / "unnamed", {"all": [(name, name) for name in "abc"]})
    rows = [json.loads(line) | {"split": "test"} for line in (folder / "all.jsonl").read_text().splitlines()[:1]]
    rows += [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()[1:]]
    (folder / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"train": str(folder), "valid": f"{both[0]}@split=train", "test": str(folder)}
    assert ids(read(**given, skip_bad=True)) == {"train": ["b", "c"], "valid": ["a", "b", "c"], "test": ["a"]}


def test_what_is_held_out_is_said(both: tuple[Path, Path]) -> None:
    said: list[str] = []
    read_parts(DataConfig(path=str(both[1]), valid_speakers=1, test_speakers=2), said.append)
    assert "test: speakers held out: 2 (data.test_speakers), left to train on: 2" in said
    assert "valid: speakers held out: 1 (data.valid_speakers), left to train on: 1" in said
    said.clear()
    read_parts(DataConfig(path=str(both[0]), valid_speakers=1, test_speakers=2), said.append)
    assert "data.test_speakers: not needed, there is a part to test on" in said


def test_training_without_any_text_is_refused(both: tuple[Path, Path]) -> None:
    rows = [json.loads(line) for line in (both[1] / "metadata.jsonl").read_text().splitlines()]
    (both[1] / "metadata.jsonl").write_text("".join(json.dumps({**row, "text": None}) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"^train: none of the 4 utterances in .*two has a text"):
        read(path=str(both[1]))


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (
            "train train-clean-100 train.clean.100 train_960 tr_no_dev train_nodev train_si284 valid_train_en TRAIN",
            "train",
        ),
        ("dev dev_manifest train_dev dev-other valid_dev_en test_dev93 validation dev93 Development", "valid"),
        ("test an4-test eval1 eval-92 Eval2000 test_eval92 valid_test_en testing tst-COMMON", "test"),
        ("latest validated other contrast extra trainer invalidated", None),
    ],
)
def test_parts_of_the_names_that_corpora_have(names: str, part: str | None) -> None:
    assert {name: part_of(name) for name in names.split()} == dict.fromkeys(names.split(), part)


def test_a_split_of_just_the_name_goes_before_others(tmp_path: Path) -> None:
    splits = {"train": "a", "train_noisy": "b", "dev": "c", "test": "d", "test_noisy": "e"}
    folder = corpus(tmp_path / "c", {split: [(speaker, speaker)] for split, speaker in splits.items()})
    assert ids(read(path=str(folder))) == {"train": ["a"], "valid": ["c"], "test": ["d"]}


def test_what_is_tested_with_is_not_heard_without_its_text_either(both: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"utterance d is in unlabelled and in test: both hear .*test-d\.wav"):
        read(path=str(both[0]), valid_speakers=1, unlabelled=str(both[0]))
    assert "unlabelled" in ids(read(path=str(both[0]), valid_speakers=1, unlabelled=str(both[1])))


@pytest.mark.parametrize("content", ["[]", "{", "\xff", '{"simulated": "no"}'])
def test_a_file_that_says_nothing_of_simulation_is_no_matter(content: str, both: tuple[Path, Path]) -> None:
    (both[1] / "dataset.json").write_bytes(content.encode("latin-1"))
    assert not read(path=str(both[1]), valid_speakers=1, test_speakers=1).simulated


@pytest.fixture
def both(tmp_path: Path) -> tuple[Path, Path]:
    """A corpus with parts, and one without, whose ids and speakers are the same."""
    first = corpus(tmp_path / "one", {"train": [("a", "s"), ("b", "t"), ("c", "u")], "test": [("d", "v")]})
    (first / "dataset.json").write_text('{"simulated": true}')
    return first, corpus(tmp_path / "two", {"metadata": [("a", "s"), ("b", "t"), ("d", "v"), ("e", "w")]}, 8_000)


def read(**settings: object) -> Parts:
    return read_parts(DataConfig(**settings))  # type: ignore[arg-type]


def ids(parts: Parts) -> dict[str, list[str]]:
    return {part: [each.id for each in corpus.utterances] for part, corpus in parts.corpora.items()}


def test_one_corpus_stays_as_it_is(both: tuple[Path, Path]) -> None:
    parts = read(path=str(both[0]), valid_speakers=1)
    found = ids(parts)
    assert found["test"] == ["d"] and sorted(found["train"] + found["valid"]) == ["a", "b", "c"]
    assert "corpus" not in parts["train"].utterances[0].extra and parts.simulated
    assert ids(read(path=[str(both[0])], valid_speakers=1)) == found


def test_several_corpora_are_joined_by_their_parts(both: tuple[Path, Path]) -> None:
    parts = read(path=[str(both[0]), f"{both[1]}@speaker!=w"], valid=f"{both[1]}@speaker=w")
    assert ids(parts) == {
        "train": ["one/a", "one/b", "one/c", "two/a", "two/b", "two/d"],
        "test": ["one/d"],
        "valid": ["two/e"],
    }
    assert [(source.name, source.simulated) for source in parts.sources] == [("one", True), ("two", False)]
    last = parts["train"].utterances[-1]
    assert (last.speaker, last.extra["corpus"], last.duration) == ("two/v", "two", 0.5)
    # each from its own folder, at 16 kHz whatever it was recorded at
    for each in parts["train"].utterances:
        assert len(parts["train"].load(each)) == 8_000
    assert parts["train"].path(last).parent == both[1]


def test_parts_are_chosen_where_a_corpus_has_them(both: tuple[Path, Path]) -> None:
    first, second = map(str, both)
    assert ids(read(train=first, test=first, valid=second)) == {
        "train": ["a", "b", "c"],
        "test": ["d"],
        "valid": ["a", "b", "d", "e"],
    }
    with pytest.raises(UserError, match=r"one has no split valid, it has test, train; choose: .*one@split=NAME"):
        read(train=first, valid=first, test=second)
    known = f"{first}@split=train@speaker"
    chosen = read(train=f"{known}!=s,t", valid=f"{known}=s,t", test=f"{first}@split=test")
    assert ids(chosen)["valid"] == ["a", "b"]
    assert ids(read(path=[f"{second}@take!=3", f"{second}@speaker=w"], valid_speakers=1, test_speakers=1))


@pytest.mark.parametrize(
    ("row", "first", "name"),
    [
        ({"path": "link.wav", "offset": 2.0, "duration": 0.25}, "train", "1"),
        ({"path": "../data/long.wav", "offset": 1, "channel": 1}, "valid", "0"),
        ({"channel": 0}, None, None),
        ({"offset": 0.5}, None, None),
        # the mix of a file holds each of its channels
        ({"offset": 1}, "train", "0"),
        ({"offset": 1.6, "channel": 0}, "valid", "1"),
        # of the second half of a piece, of a whole that holds one, and neighbours that share a little
        ({"offset": 2.25}, "train", "1"),
        ({"duration": 2.6}, "train", "0"),
        ({"offset": 2.4}, None, None),
    ],
)
def test_parts_share_no_recording_whatever_it_is_called(
    row: dict[str, object], first: str | None, name: str | None, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    soundfile.write(folder / "long.wav", np.random.default_rng(0).normal(0, 0.1, (48_000, 2)).clip(-0.9, 0.9), 16_000)
    (folder / "link.wav").symlink_to(folder / "long.wav")

    def part(name: str, *rows: dict[str, object]) -> str:
        lines = [json.dumps({"path": "long.wav", "text": "yes", "duration": 0.5, **row}) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        return str(folder / f"{name}.jsonl")

    # the ids of one file say nothing of another's
    train = part("a", {"id": "0", "offset": 1, "channel": 0}, {"id": "1", "offset": 2})
    valid = part("b", {"id": "0", "offset": 1, "channel": 1}, {"id": "1", "offset": 1.6})
    given_ = {"train": train, "valid": valid, "test": part("c", {"id": "0", **row})}
    if first is None:
        assert ids(read(**given_)) == {"train": ["0", "1"], "valid": ["0", "1"], "test": ["0"]}
        return
    called = r" \(there 1\)" if name == "1" else ""
    with pytest.raises(UserError, match=f"utterance 0 is in {first}{called} and in test: both hear "):
        read(**given_)


def test_other_tests_beside_a_test_are_never_trained_on(tmp_path: Path) -> None:
    trained = corpus(tmp_path / "one", {"train": [("a", "s"), ("b", "t")]})
    tests = corpus(tmp_path / "two", {"test": [("c", "u")], "test_noisy": [("d", "u")], "dev": [("e", "v")]})
    said = list[str]()
    parts = read_parts(DataConfig(path=[str(trained), str(tests)]), said.append)
    assert ids(parts) == {"train": ["one/a", "one/b"], "valid": ["two/e"], "test": ["two/c"]}
    assert any(line.startswith("not used: test_noisy of ") for line in said)
    # a split whose name says nothing is for training, where no other one is
    splits = {"960": "a", "dev": "b", "test": "c", "eval92": "d"}
    named = corpus(tmp_path / "three", {split: [(speaker, speaker)] for split, speaker in splits.items()})
    found = read_parts(DataConfig(path=str(named)), said.append)
    assert ids(found) == {"train": ["a"], "valid": ["b"], "test": ["c"]}
    assert any(line.startswith("not used: eval92 ") for line in said)


def test_members_of_one_shard_are_recordings_of_their_own(both: tuple[Path, Path], tmp_path: Path) -> None:
    write_shards(read_corpus(both[1]), tmp_path / "shards")
    shard, test = f"{tmp_path / 'shards'}@speaker", f"{both[0]}@split=test"
    assert ids(read(train=f"{shard}!=s", valid=f"{shard}=s", test=test))["valid"] == ["a"]
    with pytest.raises(UserError, match="utterance a is in train and in valid"):
        read(train=f"{shard}=s,t", valid=f"{shard}=s", test=test)


def test_each_bad_row_is_counted_once(tmp_path: Path) -> None:
    rows = [(name, name) for name in "abcdef"]
    folder = corpus(tmp_path / "one", {"all": rows})
    whole = folder / "all.jsonl"
    whole.write_text(whole.read_text() + "{\n" + json.dumps({"path": "gone.wav", "text": "yes"}) + "\n")
    held = {"valid_speakers": 1, "test_speakers": 1, "skip_bad": True}
    parts = read(path=str(whole), **held)
    # held out by speaker: nobody knows what a row that cannot be read was for
    assert parts.left_out == {"part unknown: unreadable row": 1, "part unknown: no audio": 1}
    assert len(parts.problems) == 2
    parts = read(path=f"{whole}@speaker!=a,b", valid=f"{whole}@speaker=a", test=f"{whole}@speaker=b", skip_bad=True)
    assert parts.left_out == {"part unknown: unreadable row": 1, "part unknown: no audio": 1}
    # of files that are splits it is known, whether validation is held out or not
    whole.rename(folder / "train.jsonl")
    other = corpus(tmp_path / "two", {"all": [("x", "x")]})
    (folder / "test.jsonl").write_text("{\n" + (other / "all.jsonl").read_text().replace("all-", "../two/all-"))
    wanted = {"train: unreadable row": 1, "train: no audio": 1, "test: unreadable row": 1}
    for given_ in ({"path": str(folder)}, {"train": f"{folder}@split=train", "test": f"{folder}@split=test"}):
        assert read(**given_, **held).left_out == wanted
    assert read(path=f"{folder}@split=train", test=str(other), **held).left_out == {
        "train: unreadable row": 1,
        "train: no audio": 1,
    }


def test_names_are_kept_apart(tmp_path: Path) -> None:
    first = corpus(tmp_path / "x" / "data", {"all": [("a", "s"), ("b", "t")]})
    second = corpus(tmp_path / "y" / "data", {"all": [("a", "s"), ("b", "t")]})
    found = read(path=[str(first), str(second)], valid_speakers=1, test_speakers=1)
    names = sorted(name for part in ids(found).values() for name in part)
    assert names == ["data-2/a", "data-2/b", "data/a", "data/b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": ["{two}@speaker=x", "{one}"]}, "two: no utterance has speaker 'x', wanted one of s, t, v, w"),
        ({"path": ["{two}@mood=x", "{one}"]}, "two: no utterance has a mood"),
        ({"path": ["{two}@speaker!=s,t,v,w", "{one}"]}, "speaker leaves no utterance of 4"),
        ({"path": ["{two}@speaker=", "{one}"]}, "wanted values after speaker="),
        ({"path": ["{two}", "{two}@speaker=s"]}, "utterance two/a is selected twice"),
        ({"path": ["{one}", "{two}"], "valid": "{two}@speaker=s"}, "two/a is in train and in valid"),
        ({"path": ["{one}", "nowhere"]}, "nowhere is no file or folder"),
        ({"train": [], "path": "{one}"}, "got an empty list"),
        ({"train": "{two}", "valid": "{two}", "test": "{one}"}, "utterance a is in train and in valid: both hear"),
        ({"path": "{one}", "valid": "{one}@split=test"}, "utterance d is in valid and in test: both hear"),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], message: str, both: tuple[Path, Path]) -> None:
    def filled(value: object) -> object:
        if isinstance(value, list):
            return [filled(each) for each in value]
        return str(value).format(one=both[0], two=both[1])

    with pytest.raises(UserError, match=message):
        read(**{"valid_speakers": 1, **{name: filled(value) for name, value in settings.items()}})


@given(
    st.text("ab/.@ ", min_size=1, max_size=6).filter(lambda name: not Path(name).exists()),
    st.lists(
        st.tuples(st.sampled_from(["speaker", "split"]), st.lists(st.text("xyz", min_size=1), min_size=1)), max_size=3
    ),
    st.booleans(),
)
def test_what_is_written_is_what_is_selected(name: str, fields: list[tuple[str, list[str]]], exclude: bool) -> None:
    sign = "!=" if exclude else "="
    text = name + "".join(f"@{field}{sign}{','.join(values)}" for field, values in fields)
    wanted = tuple(Selection(field, tuple(dict.fromkeys(values)), exclude) for field, values in fields)
    assert parse_corpus(text) == (name, wanted)


def test_a_path_may_hold_the_sign(tmp_path: Path) -> None:
    odd = corpus(tmp_path / "me@speaker=s", {"all": [("a", "s"), ("b", "t"), ("c", "u")]})
    assert parse_corpus(str(odd)) == (str(odd), ())
    assert find_data(str(odd)) == odd


def test_a_run_names_all_of_them_and_what_is_bad(both: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = both
    for name, level in (("a", 0.0), ("b", 0.5)):
        soundfile.write(second / f"metadata-{name}.wav", np.full(4_000, level), 8_000)
    (second / "metadata-d.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"two/d: .*metadata-d\.wav"):
        read(path=[str(first), str(second)], valid_speakers=1)
    data = {"path": [str(first), str(second)], "valid": f"{second}@speaker=w", "skip_bad": True}
    data["path"][1] += "@speaker!=w"  # type: ignore[index]
    (second / "metadata.jsonl").write_text((second / "metadata.jsonl").read_text() + "{\n")
    prepared = small("ctc_sequence_level", first, tmp_path / "run", data=data).prepared
    about = read_json(tmp_path / "run" / "run" / "data" / "data.json")
    assert about["left_out"] == {"train: two: bad audio": 1, "part unknown: two: unreadable row": 1}
    assert [problem.count("row 5: is no JSON") for problem in about["problems"]].count(1) == 1
    rows = {row["part"]: row for row in prepared.statistics()}
    assert rows["train"]["corpora"] == "3 one, 2 two" and rows["test"]["left out"] == "none"
    assert rows["train"]["left out"] == "1 two: bad audio, 1 two: unreadable row (part unknown)"
    assert rows["train"]["remarks"] == "1 silence (two/a); 1 DC offset (two/b)"
    assert rows["test"]["remarks"] == "1 text outside the units (one/d)"
    about = read_json(tmp_path / "run" / "run" / "provenance.json")
    assert about["simulated"] is True and about["data"]["name"] == "one+two"
    assert about["data"]["corpora"] == [{"name": "one", "simulated": True}, {"name": "two", "simulated": False}]
    assert about["data"]["parts"]["train"] == rows["train"]
    store = prepared.store("train", "clean")
    assert len(store) == 5 and (store.lengths == 74).all()  # 500 ms and the tail
    other = {**data, "path": [str(first), f"{second}@speaker!=w,t"]}
    assert (
        small("ctc_sequence_level", first, tmp_path / "other", data=other).prepared.fingerprint != prepared.fingerprint
    )


@pytest.mark.skipif(not (REAL / "fsdd").is_dir(), reason="KD_DATA has no speech/fsdd")
def test_fsdd_is_read_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_DATA", str(REAL.parent))
    parts = read(
        path="fsdd@index=0,1@digit=1,2,3", valid="fsdd@speaker=lucas@index=2", test="fsdd@speaker=george@index=3"
    )
    assert {part: len(corpus) for part, corpus in parts.corpora.items()} == {"train": 24, "valid": 10, "test": 10}
    assert {each.speaker for each in parts["test"].utterances} == {"george"}
    samples = parts["test"].load(parts["test"].utterances[0])
    assert len(samples) / 16_000 == pytest.approx(parts["test"].utterances[0].duration, abs=1e-3)


def test_a_corpus_is_named_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("here/own", "here/data/made", "known/speech/an4"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("KD_DATA", str(tmp_path / "known"))
    assert absolute_name("own") == str(tmp_path / "here" / "own")
    assert absolute_name("own@speaker!=ann,bob") == str(tmp_path / "here" / "own") + "@speaker!=ann,bob"
    assert absolute_name("made@split=test") == str(tmp_path / "here" / "data" / "made") + "@split=test"
    # the data folder may be elsewhere on another machine, and what is not there is said later
    assert absolute_name("an4") == "an4" and absolute_name("nowhere") == "nowhere"
    # without it, the data folder is where README says, as for every other domain; another folder has no such sibling
    monkeypatch.delenv("KD_DATA")
    (tmp_path / "shared" / "data" / "speech" / "fsdd").mkdir(parents=True)
    assert find_data("fsdd").samefile(tmp_path / "shared" / "data" / "speech" / "fsdd")
    assert absolute_name("fsdd") == os.path.abspath("../shared/data/speech/fsdd")
    with pytest.raises(UserError, match=r"--data: an4 is no file .*\.\./shared/data/speech/an4, data/an4; set KD_DATA"):
        find_data("an4")
