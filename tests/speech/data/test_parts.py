"""What is left out of the parts of a run, and said, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from apps.speech.models import huggingface
from apps.speech.prepared import Prepared
from kdcore.config import UserError
from tests.speech.small_runs import small


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prepares utterances of 0.5 s, in each part one of a given length, for a teacher that hears 1 s at once."""
    monkeypatch.setattr(huggingface, "MOST_SECONDS", 1)
    # nothing is asked of it here: its weights are never opened
    folder = tmp_path / "pretrained"
    folder.mkdir()
    config = {"model_type": "wav2vec2", "architectures": ["Wav2Vec2ForCTC"], "vocab_size": 5}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, "y": 2, "e": 3, "s": 4}))
    (folder / "model.safetensors").touch()
    generator = np.random.default_rng(0)

    def prepared(train: float = 0.5, valid: float = 0.5, test: float = 0.5, **changes: Any) -> Prepared:
        for part, seconds in {"train": train, "valid": valid, "test": test}.items():
            lines = []
            for name, length in ((f"{part}-usual", 0.5), (f"{part}-other", seconds)):
                wave = generator.normal(0, 0.1, round(length * 16_000)).clip(-0.9, 0.9)
                soundfile.write(tmp_path / f"{name}.wav", wave, 16_000)
                lines.append(json.dumps({"id": name, "path": f"{name}.wav", "text": "yes", "duration": length}) + "\n")
            (tmp_path / f"{part}.jsonl").write_text("".join(lines))
        data = {"path": str(tmp_path), "skip_bad": changes.pop("skip_bad", False)}
        teacher = changes.pop("teacher", {"path": str(folder)})
        given = {"views": [{}], "teacher": teacher, "data": data, **changes}
        return small("ctc_frame_level", tmp_path, tmp_path / "config", **given).prepared

    return prepared


def test_a_file_of_a_few_samples_at_a_high_rate_has_none(heard: Any, tmp_path: Path) -> None:
    heard(skip_bad=True, teacher={})
    soundfile.write(tmp_path / "test-other.wav", np.array([0.5]), 192_000)
    prepared = small_again(tmp_path)
    assert [each.id for each in prepared.corpora["test"].utterances] == ["test-usual"]
    assert prepared.counts["test: bad audio"] == 1
    # and what is shorter than its row says is kept, and said
    assert prepared.remarks["train"]["shorter than its duration says"]["first"] == ["train-other"]


def small_again(folder: Path) -> Prepared:
    """Prepare the folder anew, with one row that claims more than there is."""
    row = json.dumps({"id": "train-other", "path": "train-other.wav", "text": "yes", "duration": 9.0}) + "\n"
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text(lines[0] + row)
    data = {"path": str(folder), "skip_bad": True}
    return small("ctc_frame_level", folder, folder / "again", views=[{}], data=data).prepared


@pytest.mark.parametrize(
    ("lengths", "skip_bad", "named"),
    [
        ({"train": 0.8}, False, "train-other"),
        ({"valid": 0.8}, True, "valid-other"),
        ({"test": 0.8}, True, "test-other"),
    ],
)
def test_what_a_pretrained_teacher_cannot_hear_is_named_before_training(
    heard: Any, tmp_path: Path, lengths: dict[str, float], skip_bad: bool, named: str
) -> None:
    with pytest.raises(UserError, match=rf"utterance {named} \(.*{named}.wav\): got 0.8 s, wanted at most 0.76 s"):
        heard(**lengths, skip_bad=skip_bad)
    assert not list((tmp_path / "config" / "run").rglob("*.safetensors"))


def test_training_utterances_too_long_for_the_teacher_are_left_out_and_counted(heard: Any) -> None:
    found = heard(train=0.8, skip_bad=True)
    assert [each.id for each in found.corpora["train"].utterances] == ["train-usual"]
    assert found.statistics()[0]["left out"] == "1 too long for the teacher"


def test_how_long_is_too_long_is_a_question_of_the_teacher_and_its_views(heard: Any) -> None:
    slow = [{"student": "speed:0.5", "teacher": "speed:0.5"}]
    with pytest.raises(UserError, match=r"train: utterance train-usual .* wanted at most 0.38 s"):
        heard(views=slow)
    with pytest.raises(UserError, match=r"train: no utterance of 2 in .* is of at most 0.38 s"):
        heard(views=slow, skip_bad=True)
    assert len(heard(train=0.8, teacher={"kind": "bilstm"}).corpora["train"]) == 2
