"""The data of a run says what it left out, what no model can write, and whether its source has changed since."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from apps.speech import prepared as module
from apps.speech.features import SAMPLE_RATE, TAIL_MS
from apps.speech.prepared import Prepared
from data_scripts.simulate_speech import simulate
from kdcore.config import UserError
from tests.speech.small_runs import small


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Some seconds of simulated speech."""
    return simulate(tmp_path / "data", utterances=24)


def change(file: Path, row: int, **fields: Any) -> str:
    """Change a row of a manifest and return its id."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[row] |= fields
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return str(rows[row]["id"])


def prepared(source: Path, folder: Path, **changes: Any) -> tuple[Prepared, list[str]]:
    """Return the data of a run and what was said on the way, but for progress."""
    pipeline, said = small("demo", source, folder, **changes), list[str]()
    pipeline.announce = said.append
    return pipeline.prepared, said


def test_a_source_that_changes_is_named(data: Path, tmp_path: Path) -> None:
    first, said = prepared(data, tmp_path)
    assert not any("changed" in text for text in said)
    again, said = prepared(data, tmp_path)
    assert again.fingerprint == first.fingerprint and said == []
    change(data / "train.jsonl", 0, text="go")
    kept, said = prepared(data, tmp_path)
    assert kept.fingerprint == first.fingerprint
    (text,) = said
    assert text.startswith(f"{data}: has changed since {tmp_path / 'run'} read it") and "another --out" in text


def test_audio_that_changes_is_refused_by_who_would_mix_it(data: Path, tmp_path: Path) -> None:
    first, _ = prepared(data, tmp_path)
    first.refuse_changed()
    file = first.corpora["test"].path(first.corpora["test"].utterances[-1])
    kept = file.read_bytes()
    samples, rate = soundfile.read(file, dtype="float32")
    soundfile.write(file, samples[: len(samples) // 2], rate)
    os.utime(file, (later := time.time() + 5, later))
    pipeline = small("demo", data, tmp_path)
    assert pipeline.prepared.units == first.units  # whoever only reads the run is not stopped
    message = f"^{re.escape(str(file))}: test: audio has changed since .*run read it; wanted it as it was, or another"
    for stage in (lambda: pipeline.fit_alone(0), lambda: pipeline.teach(0), pipeline.prepared.refuse_changed):
        with pytest.raises(UserError, match=message):
            stage()
    file.write_bytes(kept)
    small("demo", data, tmp_path).prepared.refuse_changed()


def test_the_microphone_at_the_mouth_teaches_the_one_far_off(data: Path, tmp_path: Path) -> None:
    """Two channels of the same recordings are two views of them, of the same frames."""
    for file in data.rglob("*.flac"):
        samples, rate = soundfile.read(file, dtype="float32")
        soundfile.write(file, np.stack([samples, np.roll(samples, 80) * 0.1], 1), rate)
    pipeline = small("ctc_frame_level", data, tmp_path, views=[{"student": "channel:1", "teacher": "channel:0"}])
    near, far = (pipeline.prepared.store("train", f"channel:{number}") for number in (0, 1))
    assert near.lengths.tolist() == far.lengths.tolist() and not np.allclose(near.frames, far.frames)
    pipeline.fit_student(0)
    # the teacher is chosen and tested in its own channel
    assert pipeline.config.tested_view("teacher") == "channel:0" and pipeline.config.tested_view("student") == "clean"
    settings = {"views": [{"student": "channel:1", "teacher": "channel:0+speed:0.9"}], "test_view": "channel:1"}
    file = pipeline.prepared.corpora["test"].path(pipeline.prepared.corpora["test"].utterances[-1])
    soundfile.write(file, soundfile.read(file, dtype="float32")[0][:, 0], 16_000)
    wrong = small("ctc_frame_level", data, tmp_path / "wrong", **{**settings, "views": [{"student": "channel:1"}]})
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: .* wanted channel 1, it has 1, counted from 0"):
        _ = wrong.prepared
    assert not (tmp_path / "wrong" / "run" / "config.yaml").exists()


def test_recordings_of_a_view_that_change_are_named(data: Path, tmp_path: Path) -> None:
    noises, rooms = tmp_path / "noises", tmp_path / "rooms"
    for folder in (noises, rooms):
        folder.mkdir()
        soundfile.write(folder / "one.wav", np.linspace(-0.5, 0.5, SAMPLE_RATE, dtype=np.float32), SAMPLE_RATE)
    views = {"views": [{"student": f"noise:0:5:{noises}", "teacher": "clean"}], "test_view": f"room:{rooms}+noise:0:5"}
    assert not any("changed" in text for text in prepared(data, tmp_path, **views)[1])
    assert prepared(data, tmp_path, **views)[1] == []
    soundfile.write(noises / "one.wav", np.zeros(800, np.float32), SAMPLE_RATE)
    (text,) = prepared(data, tmp_path, **views)[1]
    assert text.startswith(f"{noises}: has changed since {tmp_path / 'run'} was made") and "another --out" in text
    soundfile.write(rooms / "two.wav", np.zeros(800, np.float32), SAMPLE_RATE)
    assert [text.split(":")[0] for text in prepared(data, tmp_path, **views)[1]] == [str(noises), str(rooms)]


def test_features_of_another_version_are_other_data(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = prepared(data, tmp_path)
    names = set()
    for version, tail in ((2, 240), (3, 240), (2, 400)):
        monkeypatch.setattr(module, "VERSION", version)
        monkeypatch.setattr(module, "TAIL_MS", tail)
        names.add(found.fingerprint)
    assert len(names) == 3


def test_what_no_model_can_write_is_counted_where_it_is_tested(data: Path, tmp_path: Path) -> None:
    outside = change(data / "test.jsonl", 0, text="Ünïcode 学")
    words = " ".join(json.loads((data / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"].split())
    short = change(data / "valid.jsonl", 0, text=" ".join([words] * 40))
    found, _ = prepared(data, tmp_path)
    rows = {row["part"]: row for row in found.statistics()}
    assert rows["test"]["remarks"] == f"1 text outside the units ({outside})"
    assert rows["valid"]["remarks"] == f"1 longer text than frames ({short})"
    assert rows["train"]["remarks"] == "good" and rows["test"]["left out"] == "none"


def test_texts_that_are_left_out_are_named(data: Path, tmp_path: Path) -> None:
    words = json.loads((data / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"]
    names = [change(data / "train.jsonl", row, text=" ".join([words] * 40)) for row in range(5)]
    _, said = prepared(data, tmp_path)
    at = said.index("left out, train: longer text than frames: 5")
    assert [text.split(":")[0].strip() for text in said[at + 1 : at + 4]] == names[:3] and "frames" in said[at + 1]
    assert said[at + 4] == f"  and others: {tmp_path / 'run' / 'data' / 'data.json'}, problems"


def test_a_text_may_be_too_long_in_one_view_alone(data: Path, tmp_path: Path) -> None:
    found, said = prepared(data, tmp_path)
    store = found.store("train", "clean")
    frames = int(-(-store.lengths[3] // 4)) - TAIL_MS // 40
    # as many symbols, no two alike in a row, as the recording has frames
    spelled = ("ab" * frames)[:frames]
    known = set("".join(text or "" for text in found.texts("train")))
    letters = sorted(known - {" "})[:2]
    name = change(data / "train.jsonl", 3, text=spelled.replace("a", letters[0]).replace("b", letters[1]))
    found, said = prepared(data, tmp_path / "other")
    assert list(found.training(["clean"]).rows) == list(range(len(found.corpora["train"])))
    said.clear()
    kept = found.training(["clean", "speed:1.5"]).rows
    assert 3 not in kept and len(kept) == len(found.corpora["train"]) - 1
    assert f"left out, longer text than frames in view speed:1.5: 1 (first {name})" in said
    assert np.array_equal(kept, found.training(["speed:1.5", "clean"]).rows)


def test_what_a_refused_command_read_is_read_anew(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^teacher\.folds: got 500"):
        prepared(data, tmp_path, teacher={"folds": 500})
    assert (tmp_path / "run" / "data" / "data.json").exists() and not (tmp_path / "run" / "config.yaml").exists()
    rows = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(rows[:-4]), encoding="utf-8")
    found, _ = prepared(data, tmp_path)
    assert len(found.corpora["train"]) == len(rows) - 4 == len(found.training(["clean"]).rows)


def test_nothing_left_to_train_on_is_said(data: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    fast = {"views": [{"student": "speed:2", "teacher": "speed:2"}]}
    for place, each in enumerate(rows):
        # more symbols than there are frames at double speed
        change(data / "train.jsonl", place, text=("abcd " * 100)[: int(each["duration"] / 0.04 * 0.9)])
    with pytest.raises(UserError, match=r"^views: no utterance is left to train the teacher on, heard as speed:2$"):
        small("ctc_frame_level", data, tmp_path / "views", **fast).teach(0)
    for place in range(len(rows)):
        change(data / "train.jsonl", place, text="abcd " * 100)
    for _ in range(2):  # whatever the first left behind
        with pytest.raises(UserError, match=r"^train: no utterance is left to train on \(first problem: .*frames"):
            prepared(data, tmp_path)


def test_symbols_of_language_models_are_no_words(data: Path, tmp_path: Path) -> None:
    name = change(data / "train.jsonl", 2, text="stop <unk>")
    given = {"path": str(data), "text": {"strip_punctuation": False}}
    with pytest.raises(UserError, match=rf"utterance {name}: text 'stop <unk>' holds <unk>"):
        prepared(data, tmp_path, data=given)
    found, said = prepared(data, tmp_path, data={**given, "skip_bad": True})
    assert "left out, train: symbol of language models: 1" in said
    assert name not in [each.id for each in found.corpora["train"].utterances]
    # by the default rules it is a word like others
    assert "stop unk" in prepared(data, tmp_path / "default")[0].texts("train")
