"""The general step: what terms see, what moves and what does not, and exact resume with schedules."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.checkpoint import load_state
from kdcore.run import read_log
from kdcore.teaching import DistillationStep, Learning, Schedule, Term, frozen, labels_term, switched_on, warm_up
from tests.kdcore.teaching.problems import (
    FAST,
    accuracy,
    batch_of,
    blobs,
    fit,
    flat,
    improves,
    kl,
    loss_of,
    network,
    score,
    trained,
)

DATA, HELD = blobs(120), blobs(90, seed=1)


class Projected(nn.Module):
    """A hint with a projection: mean over values of (W student - teacher)^2."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        self.project = nn.Linear(student, teacher, bias=False)

    def forward(self, student: Tensor, teacher: Tensor, *, reduction: str = "mean") -> Tensor:
        rows = (self.project(student) - teacher.detach()).square().mean(1)
        return rows.sum()


def make(student: Any = None, teachers: Any = None, data: Any = None, **options: Any) -> DistillationStep:
    terms = options.pop("terms", None) or [labels_term(0.5), Term("soft", "soft_targets", options={"temperature": 2.0})]
    return DistillationStep(
        network() if student is None else student,
        DATA if data is None else data,
        terms,
        teachers=[trained()] if teachers is None else teachers,
        validate=accuracy(HELD),
        learning=FAST,
        **options,
    )


def test_terms_see_rows_answers_and_taps() -> None:
    teachers = [trained(), network(5, seed=9).eval()]
    step = make(teachers=teachers, student_taps={"feature": "2:in"}, teacher_taps={"hidden": "0"})
    batch = batch_of(step)
    found = step.values(batch)
    taps = {"student.feature", "teacher.hidden", "teacher1.hidden"}
    assert set(found) == {"index", "inputs", "labels", "student", "teacher", "teacher1"} | taps
    assert torch.equal(found["inputs"], DATA["inputs"][batch["index"]])
    for number, teacher in enumerate(teachers):
        assert torch.equal(found[f"teacher{number or ''}"], teacher(batch["inputs"]))
        assert torch.equal(found[f"teacher{number or ''}.hidden"], teacher[0](batch["inputs"]))
    assert torch.equal(found["student.feature"], step.student[:2](batch["inputs"]))  # type: ignore[index]
    asked = step.values({**batch, "inputs": batch["inputs"].clone().requires_grad_()})
    assert asked["student"].requires_grad and not any(asked[name].requires_grad for name in ("teacher", "teacher1"))


def test_the_loss_is_cross_entropy_plus_tempered_divergence() -> None:
    step, batch = make(), batch_of(make())
    student, teacher = step.student(batch["inputs"]), step.teachers[0](batch["inputs"])
    wanted = 0.5 * F.cross_entropy(student, batch["labels"]) + kl(teacher, student, 2.0).mean()
    torch.testing.assert_close(loss_of(step, batch).double(), wanted.double())


def test_an_epoch_visits_every_row_once_in_a_new_order() -> None:
    step = make()
    orders = []
    for seed in (0, 1):
        batches = list(step.batches(0, torch.Generator().manual_seed(seed)))
        assert [len(batch["index"]) for batch in batches] == [16] * 7 + [8]
        assert len(batches) == step.batch_count()
        orders.append(torch.cat([batch["index"] for batch in batches]))
        assert orders[-1].sort().values.tolist() == list(range(120))
    assert not torch.equal(*orders)


def test_trains_and_leaves_the_teacher_as_it_was() -> None:
    teacher = trained(norm=True)
    before = copy.deepcopy(teacher.state_dict())
    step = make(network(norm=True), [teacher])
    assert not [name for name in step.state_dict() if "teacher" in name], "teachers are no part of the checkpoint"
    improves(step, HELD)
    torch.testing.assert_close(dict(teacher.state_dict()), dict(before), rtol=0, atol=0)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules()), "step.train() must not reach it"


def test_a_student_without_labels_follows_its_teacher() -> None:
    teacher = trained()
    step = make(teachers=[teacher], data={"inputs": DATA["inputs"]}, terms=[Term("soft", "soft_targets")])
    fit(step, 8)
    agreed = (step.student.eval()(HELD["inputs"]).argmax(1) == teacher(HELD["inputs"]).argmax(1)).float().mean()
    assert float(agreed) > 0.9


def test_losses_with_weights_are_trained() -> None:
    hint = Term("hint", Projected(8, 16), inputs={"student": "student.feature", "teacher": "teacher.feature"})
    step = make(terms=[labels_term(), hint], student_taps={"feature": "2:in"}, teacher_taps={"feature": "2:in"})
    before = step.terms.losses["hint"].project.weight.clone()  # type: ignore[attr-defined]
    first = float(step(batch_of(step))["hint"].detach())
    improves(step, HELD)
    assert not torch.equal(before, step.terms.losses["hint"].project.weight)  # type: ignore[attr-defined]
    assert float(step(batch_of(step))["hint"].detach()) < 0.7 * first


def test_a_term_that_begins_later_alone_trains_nothing_before() -> None:
    """Not even an error: there is always a graph to go backward through."""
    step = make(terms=[Term("soft", "soft_targets", weight=switched_on(1.0, 1))])
    before = flat(step.student)
    fit(step, 1)
    assert torch.equal(before, flat(step.student))
    fit(step, 2)
    assert not torch.equal(before, flat(step.student))


def test_logged_terms_follow_the_schedule(tmp_path: Path) -> None:
    step = make(terms=[labels_term(), Term("soft", "soft_targets", weight=switched_on(1.0, 2))])
    fit(step, 3, folder=tmp_path)
    logged = [event["terms"]["soft"] for event in read_log(tmp_path / "log.jsonl")]
    assert logged[:2] == [0.0, 0.0] and logged[2] > 0


class Interrupted(DistillationStep):
    """Stops like a killed process before batch ``fail_at``, counted over all epochs."""

    fail_at, made = -1, 0

    def batches(self, epoch: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
        for batch in super().batches(epoch, generator):
            self.made += 1
            if self.made == self.fail_at:
                raise InterruptedError
            yield batch


def scheduled(fail_at: int = -1) -> Interrupted:
    """Dropout, batch norm, a hint with weights, and two schedules that move in every epoch."""
    hint = Term(
        "hint",
        Projected(8, 16),
        inputs={"student": "student.feature", "teacher": "teacher.feature"},
        weight=Schedule(1.0, 0.0, "cosine", epochs=4),
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        hint.loss.project.reset_parameters()  # type: ignore[union-attr]
    step = Interrupted(
        network(norm=True, dropout=0.3),
        DATA,
        [labels_term(), Term("soft", "soft_targets", weight=warm_up(2.0, 3)), hint],
        teachers=[trained(norm=True)],
        student_taps={"feature": "4:in"},
        teacher_taps={"feature": "3:in"},
        validate=accuracy(HELD),
        learning=Learning(batch_size=45, learning_rate=Schedule(0.02, 0.002, "cosine", epochs=4)),
    )
    step.fail_at = fail_at
    return step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    fit(scheduled(), 4, folder=folder, checkpoint_seconds=1e9)
    return folder


@pytest.mark.parametrize("fail_at", [5, 6, 7])
def test_resumed_inside_an_epoch_with_schedules_to_the_bit(whole: Path, tmp_path: Path, fail_at: int) -> None:
    """Three batches an epoch: 5 and 6 are inside epoch 1, where no weight is as at an end; 7 begins epoch 2."""
    with pytest.raises(InterruptedError):
        fit(scheduled(fail_at), 4, folder=tmp_path, checkpoint_seconds=0)
    held = load_state(tmp_path / "last.safetensors")
    assert held["progress"]["epoch"] * 3 + held["progress"]["batch"] == fail_at - 1
    fit(scheduled(), 4, folder=tmp_path, checkpoint_seconds=1e9)
    one, other = (load_state(folder / "last.safetensors") for folder in (whole, tmp_path))
    for part in ("module", "optimizer", "random"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert one["module"]["terms.epoch"] == 3
    logs = [[event["terms"] for event in read_log(folder / "log.jsonl")] for folder in (whole, tmp_path)]
    assert logs[0] == logs[1]


def test_the_learning_rate_follows_its_schedule(whole: Path) -> None:
    """The last of four epochs has three quarters of the way behind it."""
    groups = load_state(whole / "last.safetensors")["optimizer"]["param_groups"]
    expected = 0.02 + (0.002 - 0.02) * (1 - math.cos(math.pi * 3 / 4)) / 2
    assert [group["lr"] for group in groups] == [pytest.approx(expected, rel=1e-12)]


def test_teacher_in_training_mode_warns_once() -> None:
    teacher = network(norm=True)
    with pytest.warns(UserWarning, match="teacher was in training mode; it is put into evaluation mode") as caught:
        step = make(teachers=[teacher])
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(batch_of(step))
        frozen(teacher)
    with pytest.warns(UserWarning, match="old network was in training mode"):
        frozen(network(), "old network")


def test_nan_of_a_teacher_is_told_with_the_count() -> None:
    class Broken(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            answer = torch.zeros(len(inputs), 3)
            answer[0, 1] = answer[2, 2] = torch.nan
            return answer

    step = make(teachers=[trained(), Broken().eval()])
    with pytest.raises(ValueError, match=r"teacher1: 2 of 48 values are NaN"):
        step(batch_of(step))


def test_data_that_does_not_fit_is_named() -> None:
    rows = {"inputs": torch.zeros(4, 4), "labels": torch.zeros(3, dtype=torch.int64)}
    for data in (rows, {"labels": torch.zeros(3)}, {"inputs": torch.zeros(0, 4)}):
        with pytest.raises(ValueError, match=r"data: wanted inputs and others of one length > 0, got \{"):
            make(data=data)
    with pytest.raises(ValueError, match=r"^soft: teacher: wanted shape \(16, 3\), got \(16, 5\)"):
        step = make(teachers=[network(classes=5).eval()])
        step(batch_of(step))


def test_a_student_that_cannot_learn_is_told_of() -> None:
    model = network().eval()
    with pytest.raises(ValueError, match=r"student: wanted weights that learn, got none"):
        make(model, [model]).optimizer()


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"learning_rate": 0.0}, {"weight_decay": float("nan")}])
def test_learning_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"learning: wanted .*got .*{next(iter(wrong))}="):
        Learning(**wrong)


def test_the_best_weights_are_left_in_the_student() -> None:
    step = make()
    result = fit(step, 4)
    assert score(step.student, HELD) == pytest.approx(result.best_metrics["accuracy"])
