"""Who teaches, in which frames: those of Hugging Face models are halved, but for lists of hypotheses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from apps.speech.features import SAMPLE_RATE
from apps.speech.lessons import Cuts, NBest, Segmented, TeacherLessons
from apps.speech.models.base import FRAME_MS
from apps.speech.models.ensemble import Member
from apps.speech.models.huggingface import HuggingFaceCtc, paired
from apps.speech.teachers import Teacher, teacher_lessons

# of 20 ms each: in pairs, the blank between two of one letter is lost
SAID = "heel-l-o--------all---"
SYMBOLS = tuple("aehlo")


class Listener(HuggingFaceCtc):
    """Hears the same in everything."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.classes, self.asked = len(SYMBOLS) + 1, list[int]()

    def batch_log_probs(self, samples: Sequence[np.ndarray | Tensor], frame_ms: int = FRAME_MS) -> list[Tensor]:
        """Return what it always says."""
        self.asked.append(frame_ms)
        places = torch.tensor([SYMBOLS.index(each) if each in SYMBOLS else len(SYMBOLS) for each in SAID])
        said = (torch.eye(len(SYMBOLS) + 1)[places] * 0.97 + 0.005).log()
        return [said if frame_ms == 20 else paired(said) for _ in samples]


def prepared(said: list[str]) -> Any:
    """Return the data of a run of three utterances, as far as teachers look at it."""
    samples = np.zeros(len(SAID) * 20 * SAMPLE_RATE // 1000, np.float32)
    return SimpleNamespace(
        training_parts=["train"],
        fingerprint="data",
        units=SimpleNamespace(blank=len(SYMBOLS)),
        announce=said.append,
        store=lambda parts, view: SimpleNamespace(lengths=np.full(3, 2 * len(SAID))),
        samples=lambda parts, view, rows: [samples for _ in rows],
    )


def made(
    folder: Path, teacher: Teacher, *, n_best: NBest | None = None, segmented: Segmented | None = None
) -> tuple[TeacherLessons, list[str]]:
    said: list[str] = []
    options: dict[str, Any] = {
        "posteriors": True,
        "attention": False,
        "layers": [],
        "n_best": n_best,
        "segmented": segmented,
    }
    return teacher_lessons([(teacher, "clean")], prepared(said), folder, **options), said


def texts(values: dict[str, Tensor]) -> list[str]:
    """Return the first hypothesis of each segment of the first utterance."""
    of = "segment." if "segments" in values else ""
    symbols, lengths = values[f"{of}hypotheses"][0], values[f"{of}hypothesis_lengths"][0]
    if symbols.ndim == 2:
        symbols, lengths = symbols[None], lengths[None]
    return [
        "".join(SYMBOLS[symbol] for symbol in row[0, : int(count[0])].tolist())
        for row, count in zip(symbols, lengths, strict=True)
    ]


def teacher(count: int = 1) -> Teacher:
    return Teacher([Listener() for _ in range(count)], [Member(f"m{index}", SYMBOLS) for index in range(count)])


@pytest.mark.parametrize("count", [1, 2])
def test_double_letters_are_in_the_lists_of_a_hugging_face_teacher(tmp_path: Path, count: int) -> None:
    who = teacher(count)
    rows, views = np.array([0, 2]), np.array([0, 0])
    lessons, said = made(tmp_path, who, n_best=NBest(2, 16))
    values = lessons.of(rows, views, 11)
    assert texts(values) == ["helloal"]  # "all" has no blank between its l
    lessons, _ = made(tmp_path, who, segmented=Segmented(NBest(2, 16), Cuts(least=3, threshold=0.9)))
    assert texts(lessons.of(rows, views, 11))[:2] == ["hello", "al"]
    assert {len(values["teacher"][0]), int(lessons.of(rows, views, 11)["segments"].max())} == {11}
    frames = paired(Listener().batch_log_probs([np.zeros(1)], 20)[0])
    torch.testing.assert_close(values["teacher"][0], frames, atol=5e-3, rtol=0)
    assert not any("40 ms" in text for text in said)
    assert isinstance(who.models[0], Listener) and who.models[0].asked == [20]  # once, for lists and frames


def test_frames_alone_are_asked_for_in_pairs(tmp_path: Path) -> None:
    who = teacher()
    lessons, said = made(tmp_path, who)
    assert lessons.of(np.array([1]), np.array([0]), 11)["teacher"].shape == (1, 11, len(SYMBOLS) + 1)
    assert isinstance(who.models[0], Listener) and who.models[0].asked == [40]
    assert not any("lists" in text for text in said)


def test_beside_a_model_trained_here_lists_are_of_its_frames_and_said_to_be(tmp_path: Path) -> None:
    listener, other = Listener(), nn.Linear(1, 1)
    who = Teacher([listener, other], [Member("a", SYMBOLS), Member("b", SYMBOLS)])  # type: ignore[list-item]
    assert who.mixed and who.frame_ms == 40 and not who.alone(0).mixed and who.alone(0).frame_ms == 20
    lessons, said = made(tmp_path, who, n_best=NBest(2, 16))
    assert lessons.views[0].halved is None
    (text,) = said
    assert text.startswith("teacher: lists of hypotheses are made of frames of 40 ms") and "combine: switched" in text
    assert made(tmp_path, who)[1] == []
    with pytest.raises(ValueError, match="frame_ms: got 20, this teacher has frames of 40 ms"):
        who.ask(prepared([]), "train", "clean", [0], frame_ms=20)
