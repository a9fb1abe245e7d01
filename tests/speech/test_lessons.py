"""What a teacher says, kept: against asking it anew, for whole utterances and segments, in views of other lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from apps.speech.decode.nbest import n_best
from apps.speech.lessons import Cuts, NBest, Segmented, TeacherLessons, ViewLessons
from kdcore.losses import cut_at_blanks
from kdcore.run import read_json
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


def test_long_utterances_are_asked_for_a_few_at_a_time(tmp_path: Path) -> None:
    lengths, asked = np.array([400, 8_000, 12_000, 400, *[40] * 40]), list[int]()

    def ask(rows: Sequence[int]) -> dict[str, list[np.ndarray]]:
        asked.append(len(rows))
        return {"log_probs": [np.zeros((-(-int(lengths[row]) // 4), 2), np.float32) for row in rows]}

    made = ViewLessons(lengths, ask, TeacherCache(tmp_path), data="d", teacher="t", classes=2)
    assert len(made.frames["log_probs"]) == sum(-(-lengths // 4))
    # at most four minutes with the padding, and 16 utterances
    assert asked == [2, 2, 16, 16, 8]


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
    both = TeacherLessons([made], n_best=NBest(3, 8), segmented=Segmented(NBest(2, 8), cuts))
    values = both.of(np.array([4, 2]), np.array([0, 0]), 100)
    own = cut_at_blanks(
        torch.from_numpy(made.log_probs(4))[None], torch.tensor([100]), blank=4, threshold=0.9, least=4
    )[0]
    late = values["segments"][0]
    assert len(own) > 2 and late[0, 0] == 0 and int(late.max()) == 100
    assert torch.equal(late[1 : len(own), 0], own[1:, 0] + 2)
    for place, (low, high) in enumerate(own.tolist()):
        expected = n_best(made.log_probs(4)[low:high], 2, beam=8)
        size = int(values["segment.hypothesis_lengths"][0, place, 0])
        assert tuple(values["segment.hypotheses"][0, place, 0, :size].tolist()) == expected[0].ids
    assert (values["segment.log_scores"][1, 1:] == -torch.inf).all()  # the short one has one segment
    # beside them, those of the utterances
    whole = TeacherLessons([made], n_best=NBest(3, 8)).of(np.array([4, 2]), np.array([0, 0]), 100)
    assert whole.keys() == {"hypotheses", "hypothesis_lengths", "log_scores"}
    assert all(torch.equal(values[name], value) for name, value in whole.items())


def test_lists_out_of_range() -> None:
    with pytest.raises(ValueError, match="n_best: wanted"):
        NBest(5, 4)


def test_one_long_recording_costs_what_it_holds(tmp_path: Path) -> None:
    """A list filled up to the longest recording would take as much for each of the short ones."""
    lengths = np.array([40_000] + [40] * 200)

    def ask(rows: object) -> dict[str, list[np.ndarray]]:
        frames = [np.full((int(lengths[row]) // 4, 3), -9.0, np.float32) for row in rows]  # type: ignore[attr-defined]
        for each in frames:
            each[:, 2] = -0.001
            each[5::10, 0], each[5::10, 2] = -0.001, -9.0
        return {"log_probs": frames}

    made = ViewLessons(lengths, ask, TeacherCache(tmp_path), data="d", teacher="t", classes=3)
    cuts = Cuts(least=9, threshold=0.9)
    for lists in (made.hypotheses(NBest(2, 4)), made.segment_hypotheses(NBest(2, 4), cuts)):
        size = sum(file.stat().st_size for file in lists.entry.folder.iterdir())
        assert size < 4 * lengths.sum()  # 200 short ones, each as long as the long one, would be 64 MB
        assert lists[0].lengths[:, 0].sum() == 1000 and lists[200].lengths[0, 0] == 1
    values = TeacherLessons([made], n_best=NBest(2, 4)).of(np.array([3, 7]), np.array([0, 0]), 10)
    assert values["hypotheses"].shape == (2, 2, 2)


def test_a_killed_computation_of_lists_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = lessons(tmp_path / "whole")
    made, _ = lessons(tmp_path / "killed")
    looked: list[int] = []

    def look(self: ViewLessons, row: int, *given: object) -> object:
        looked.append(row)
        if looked == [0, 1, 2]:
            raise InterruptedError
        return plain(self, row, *given)  # type: ignore[arg-type]

    plain = ViewLessons._list
    monkeypatch.setattr(ViewLessons, "_list", look)
    monkeypatch.setattr("apps.speech.lessons._LISTED", 2)
    with pytest.raises(InterruptedError):
        made.segment_hypotheses(NBest(2, 8), Cuts(4, 0.9, 1))
    again, _ = lessons(tmp_path / "killed")
    found = again.segment_hypotheses(NBest(2, 8), Cuts(4, 0.9, 1))
    assert looked == [0, 1, 2, 2, 3, 4]
    expected = whole.segment_hypotheses(NBest(2, 8), Cuts(4, 0.9, 1))
    for row in range(len(LENGTHS)):
        for name in ("segments", "symbols", "lengths", "scores"):
            assert np.array_equal(getattr(found[row], name), getattr(expected[row], name)), (row, name)


def spelled(text: str) -> np.ndarray:
    """Return log-posteriors [T, 3] of frames, each a, b or blank (-)."""
    return np.log(np.array([np.eye(3, dtype=np.float32)["ab-".index(each)] * 0.97 + 0.01 for each in text]))


def test_lists_are_made_of_the_finer_frames_and_frames_of_halves(tmp_path: Path) -> None:
    # in pairs, the blank between two of one symbol is lost, and the order of two within one
    text = "b-b-" + "-" * 12 + "-abab-b-"
    fine = spelled(text)

    def halve(values: np.ndarray) -> np.ndarray:
        return np.log((np.exp(values[0::2]) + np.exp(values[1::2])) / 2)

    def of(finer: bool) -> ViewLessons:
        said = {"log_probs": [fine if finer else halve(fine)]}
        given = {"data": "d", "teacher": "t", "classes": 3, "halved": halve if finer else None}
        return ViewLessons(np.array([2 * len(text)]), lambda rows: said, TeacherCache(tmp_path), **given)  # type: ignore[arg-type]

    made, coarse = of(True), of(False)
    wanted, cuts = NBest(1, 16), Cuts(least=3, threshold=0.9, delay=1)
    np.testing.assert_allclose(made.log_probs(0), halve(fine), atol=2e-3)
    best = made.hypotheses(wanted)[0]
    assert best.symbols[0, 0].tolist() == [1, 1, 0, 1, 0, 1, 1] and best.segments.tolist() == [[0, 12]]
    assert coarse.hypotheses(wanted)[0].symbols[0, 0].tolist() != best.symbols[0, 0].tolist()
    listed = made.segment_hypotheses(wanted, cuts)[0]
    # cut in frames that are taught, as the coarse ones are, a frame late
    assert listed.segments.tolist() == coarse.segment_hypotheses(wanted, cuts)[0].segments.tolist()
    assert listed.segments.tolist() == [[0, 6], [6, 12]]
    assert listed.symbols[0, 0, :2].tolist() == [1, 1] and listed.symbols[1, 0].tolist() == [0, 1, 0, 1, 1]
    values = TeacherLessons([made], posteriors=True, n_best=wanted).of(np.array([0]), np.array([0]), 12)
    assert values["teacher"].shape == (1, 12, 3)
    kinds = {read_json(file)["kind"] for file in tmp_path.glob("*/entry.json")}
    assert len(kinds) == 6 and {"frames", "frames of 20 ms"} < kinds
    with pytest.raises(ValueError, match="layers: got encoder of a teacher whose frames are halved"):
        ViewLessons(
            LENGTHS,
            lambda rows: {},
            TeacherCache(tmp_path),
            data="d",
            teacher="t",
            classes=3,
            layers={"encoder": 2},
            halved=halve,
        )
