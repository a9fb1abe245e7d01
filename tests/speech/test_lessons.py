"""What a teacher says, kept: against asking it anew, for whole utterances and segments, in views of other lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from apps.speech.decode.nbest import n_best
from apps.speech.lessons import Cuts, NBest, TeacherLessons, ViewLessons
from kdcore.losses import cut_at_blanks
from kdcore.teacher_cache import TeacherCache

CLASSES = 5
LENGTHS = np.array([41, 160, 8, 97, 400])


def said(row: int, scale: float) -> np.ndarray:
    """Return made-up log-posteriors with stretches of blank."""
    random = np.random.default_rng(row)
    frames = -(-int(LENGTHS[row]) // 4)
    logits = random.normal(0, 3, (frames, CLASSES)) * scale
    logits[np.arange(frames) % 20 > 9, CLASSES - 1] += 30
    return torch.log_softmax(torch.tensor(logits), 1).float().numpy()


def lessons(folder: Path, scale: float = 1.0, hidden: int = 0) -> tuple[ViewLessons, list[int]]:
    asked: list[int] = []

    def ask(rows: object) -> dict[str, list[np.ndarray]]:
        chosen = list(rows)  # type: ignore[call-overload]
        asked.extend(chosen)
        found = {"log_probs": [said(row, scale) for row in chosen]}
        return found | {"encoder": [np.full((len(each), hidden), each.max()) for each in found["log_probs"]]}

    made = ViewLessons(
        LENGTHS,
        ask,
        TeacherCache(folder),
        data="data",
        teacher=f"teacher{scale}",
        classes=CLASSES,
        layers={"encoder": hidden} if hidden else {},
    )
    return made, asked


def test_posteriors_are_the_teachers_and_asked_for_once(tmp_path: Path) -> None:
    made, asked = lessons(tmp_path)
    for row in range(len(LENGTHS)):
        np.testing.assert_allclose(made.log_probs(row), said(row, 1.0), atol=2e-2)
    assert sorted(asked) == list(range(len(LENGTHS)))
    again, unasked = lessons(tmp_path)
    assert again.log_probs(3).shape == (25, CLASSES) and unasked == []


def test_an_utterance_cut_by_a_block_is_whole(tmp_path: Path) -> None:
    made, _ = lessons(tmp_path)
    whole = np.concatenate([said(row, 1.0) for row in range(len(LENGTHS))])
    for start, stop in ((0, 5), (5, 60), (11, 12), (60, len(whole))):
        found = made._frames(start, stop)["log_probs"]
        np.testing.assert_allclose(found.astype(np.float32), whole[start:stop], atol=2e-2)


def test_values_of_a_batch(tmp_path: Path) -> None:
    one, other = (lessons(tmp_path, scale, hidden=2)[0] for scale in (1.0, 0.5))
    rows, views = np.array([3, 0, 4]), np.array([0, 1, 1])
    frames = 100
    values = TeacherLessons([one, other], posteriors=True, n_best=NBest(3, 16)).of(rows, views, frames)
    assert values["teacher"].shape == (3, frames, CLASSES) and values["teacher.encoder"].shape == (3, frames, 2)
    np.testing.assert_allclose(values["teacher"][1, :11], said(0, 0.5), atol=2e-2)
    assert not values["teacher"][1, 11:].any()
    for place, (row, scale) in enumerate(((3, 1.0), (0, 0.5), (4, 0.5))):
        expected = n_best((one if scale == 1.0 else other).log_probs(row), 3, beam=16)
        for rank, hypothesis in enumerate(expected):
            size = int(values["hypothesis_lengths"][place, rank])
            assert tuple(values["hypotheses"][place, rank, :size].tolist()) == hypothesis.ids
            assert float(values["log_scores"][place, rank]) == pytest.approx(hypothesis.score, rel=1e-4)


def test_segments_cover_an_utterance_and_have_their_own_lists(tmp_path: Path) -> None:
    made, _ = lessons(tmp_path)
    cuts = Cuts(least=4, threshold=0.9, delay=2)
    values = TeacherLessons([made], n_best=NBest(2, 8), cuts=cuts).of(np.array([4, 2]), np.array([0, 0]), 100)
    own = cut_at_blanks(
        torch.from_numpy(made.log_probs(4))[None], torch.tensor([100]), blank=4, threshold=0.9, least=4
    )[0]
    late = values["segments"][0]
    assert len(own) > 2 and late[0, 0] == 0 and int(late.max()) == 100
    assert torch.equal(late[1 : len(own), 0], own[1:, 0] + 2)
    for place, (low, high) in enumerate(own.tolist()):
        expected = n_best(made.log_probs(4)[low:high], 2, beam=8)
        size = int(values["hypothesis_lengths"][0, place, 0])
        assert tuple(values["hypotheses"][0, place, 0, :size].tolist()) == expected[0].ids
    assert (values["log_scores"][1, 1:] == -torch.inf).all()  # the short one has one segment


def test_lists_out_of_range() -> None:
    with pytest.raises(ValueError, match="n_best: wanted"):
        NBest(5, 4)
