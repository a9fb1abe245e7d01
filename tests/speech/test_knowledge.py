"""Ways of teaching: their terms against the losses they stand for, and what they need."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apps.speech.config import KnowledgeConfig
from apps.speech.knowledge import KNOWLEDGE, Pair, delayed_spikes, knowledge_options, needs, terms
from apps.speech.lessons import Cuts, NBest, Segmented
from kdcore import losses
from kdcore.config import UserError
from kdcore.teaching.terms import Terms

LENGTHS = torch.tensor([9, 6])


class Layers:
    """Layers of one width, and attention of some heads."""

    def __init__(self, width: int, heads: int) -> None:
        self._width, self._heads = width, heads

    def width(self, layer: str) -> int:
        return self._width

    def heads(self) -> int:
        return self._heads

    def reach(self) -> int | None:
        return None


BOTH = Pair(4, Layers(6, 1), Layers(7, 1))


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 9, 5), torch.randn(2, 9, 5)


def test_frame_is_kdcores_loss_with_its_options() -> None:
    student, teacher = pair()
    given = {"delay": 1, "window": 2, "temperature": 2.0, "blank_threshold": 0.6, "blank_weight": 0.1}
    made = Terms(terms("frame", given, 3.0, BOTH))
    got = made({"student": student, "teacher": teacher, "lengths": LENGTHS})["frame"]
    torch.testing.assert_close(got, losses.frame_ctc(student, teacher, LENGTHS, blank=4, reduction="sum", **given))
    assert made.weights == {"frame": 3.0}


def test_spikes_are_wanted_after_the_delay() -> None:
    teacher = torch.full((1, 6, 3), -9.0)
    teacher[..., 2] = 9.0
    teacher[0, 1] = torch.tensor([9.0, -9.0, -9.0])
    late = teacher.roll(2, 1)
    lengths = torch.tensor([6])
    values = [float(delayed_spikes(each, teacher, lengths, delay=2, blank=2)) for each in (late, teacher)]
    assert values[0] == pytest.approx(-1.0, abs=1e-3) and values[1] == pytest.approx(0.0, abs=1e-3)


def test_needs_are_those_of_all() -> None:
    wanted = needs({"sequence": {"count": 2, "beam": 8}, "frame": {}, "hint": {}})
    assert wanted.posteriors and wanted.student_layers == wanted.teacher_layers == ("encoder",)
    assert wanted.n_best == NBest(2, 8) and wanted.segmented is None
    both = needs({"segment": {"least": 5, "delay": 1}, "sequence": {"count": 2}})
    assert both.segmented == Segmented(NBest(4, 16), Cuts(5, 0.95, 1)) and both.n_best == NBest(2, 16)


def test_unknown_names_and_options_are_told() -> None:
    with pytest.raises(UserError, match=r"unknown 'sequnce'.*sequence"):
        knowledge_options("sequnce", {})
    with pytest.raises(UserError, match=r"knowledge\.frame\.options"):
        knowledge_options("frame", {"dealy": 1})
    with pytest.raises(UserError, match="beam: got 4, wanted at least the count of hypotheses, 9"):
        needs({"sequence": {"count": 9, "beam": 4}})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *((name, {"delay": -1}, "delay: got -1, wanted 0 or more") for name in sorted(set(KNOWLEDGE) - {"sequence"})),
        ("frame", {"delay": 160}, "delay: got 160, wanted at most 50: it counts frames of 40 ms"),
        *((name, {"temperature": 0}, "temperature: got 0.0, wanted") for name in ("frame", "sequence", "segment")),
        ("frame", {"temperature": float("inf")}, "temperature: got inf, wanted a finite number above 0"),
        ("frame", {"window": -1}, "window: got -1, wanted 0 or more"),
        ("frame", {"monotone": True}, "monotone: got true with window 0"),
        ("frame", {"blank_threshold": 2.0}, "blank_threshold: got 2.0, wanted a probability"),
        ("frame", {"blank_weight": -1.0}, "blank_weight: got -1.0, wanted a finite weight >= 0"),
        ("attention", {"window": -1}, "window: got -1, wanted 0 or more"),
        ("sequence", {"count": 0}, "count: got 0, wanted 1 or more"),
        ("segment", {"beam": 3}, "beam: got 3, wanted at least the count of hypotheses, 4"),
        ("segment", {"least": 0}, "least: got 0, wanted 1 or more"),
        ("segment", {"threshold": 1.0}, "threshold: got 1.0, wanted a probability below 1"),
        ("guided", {"form": "probabilty"}, "form"),
        ("layers", {"progress": -1}, "progress: got -1, wanted 0 or more"),
        ("layers", {"student": [-1]}, "wanted blocks counted from 0"),
        ("layers", {"attention": -0.5}, "attention: got -0.5, wanted a finite share >= 0"),
    ],
)
def test_options_out_of_range_are_told_with_what_was_wanted(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as refused:
        knowledge_options(name, options)
    assert str(refused.value).startswith(f"knowledge.{name}.options: ") and message in str(refused.value)


@pytest.mark.parametrize("name", sorted(KNOWLEDGE))
def test_every_way_makes_a_term(name: str) -> None:
    made = terms(name, {}, 0.5, BOTH)
    assert [each.name.removesuffix("_0") for each in made] == [name]
    assert Terms(made).weights == {made[0].name: 0.5}


def test_layers_come_from_the_bottom_each_with_its_projection() -> None:
    given = {"student": [0, 1], "teacher": [1, 3], "progress": 4}
    made = Terms(terms("layers", given, 2.0, BOTH))
    assert made.weights == {"layers_0": 2.0, "layers_1": 0.0}
    made.begin_epoch(4)
    assert made.weights == {"layers_0": 2.0, "layers_1": 2.0}
    wanted = needs({"layers": given})
    assert wanted.student_layers == ("blocks.0.norm", "blocks.1.norm") and wanted.teacher_layers == (
        "blocks.1.norm",
        "blocks.3.norm",
    )
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 9, 6), torch.randn(2, 9, 7)
    values = {f"student.blocks.{n}.norm": student for n in (0, 1)} | {
        f"teacher.blocks.{n}.norm": teacher for n in (1, 3)
    }
    found = made({**values, "lengths": LENGTHS})
    project = made.losses["layers_1"].project  # type: ignore[union-attr]
    apart = (project(student) - teacher).pow(2).mean(2) / 2
    expected = apart[0].mean() + apart[1, :6].mean()
    torch.testing.assert_close(found["layers_1"], expected)
    with pytest.raises(UserError, match="as many blocks of both"):
        knowledge_options("layers", {"student": [0], "teacher": [0, 1]})


def test_attention_is_a_share_of_its_pair() -> None:
    given = {"student": [0, 1], "teacher": [1, 3], "progress": 2, "attention": 0.5}
    made = Terms(terms("layers", given, KnowledgeConfig(weight=6.0, fade=3).schedule, BOTH))
    weights = []
    for epoch in range(4):
        made.begin_epoch(epoch)
        weights.append([made.weights[name] for name in ("layers_0_attention", "layers_1_attention")])
    assert weights == [[3.0, 0.0], [2.0, 0.0], [1.0, 3.0], [0.0, 2.0]]
    wanted = needs({"layers": given})
    assert wanted.student_layers == tuple(f"blocks.{n}.{part}" for n in (0, 1) for part in ("norm", "attention.inputs"))
    assert wanted.teacher_layers == tuple(f"blocks.{n}.{part}" for n in (1, 3) for part in ("norm", "attention.inputs"))


def test_a_weight_that_falls() -> None:
    given = KnowledgeConfig(weight=6.0, fade=3)
    frame, *_ = terms("frame", {}, given.schedule, BOTH)
    assert [frame.schedule.at(epoch) for epoch in range(5)] == [6.0, 4.0, 2.0, 0.0, 0.0]
    first, second = terms("layers", {"student": [0, 1], "teacher": [1, 3], "progress": 2}, given.schedule, BOTH)
    assert [first.schedule.at(epoch) for epoch in range(4)] == [6.0, 4.0, 2.0, 0.0]
    # each pair has the fall for itself, from its beginning
    assert [second.schedule.at(epoch) for epoch in range(6)] == [0.0, 0.0, 6.0, 4.0, 2.0, 0.0]
    assert KnowledgeConfig(weight=6.0).schedule.at(100) == 6.0
