"""One student for the classes of several teachers: who is asked, what is taught, and a common space."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from kdcore.teaching import AmalgamationStep, CommonFeatures, most_confident
from kdcore.teaching.amalgamation import union_of
from tests.kdcore.teaching.problems import FAST, accuracy, batch_of, blobs, fit, loss_of, network, score

CLASSES = [[0, 1], [2, 3, 4]]
DATA, HELD = blobs(250, 5, spread=0.5), blobs(100, 5, seed=1, spread=0.5)


def teacher_of(classes: list[int], seed: int) -> Any:
    """Return a teacher that knows only some of the classes, and is unsure of rows of others."""
    model = network(16, len(classes), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    own = sum((DATA["labels"] == each for each in classes), torch.zeros(250, dtype=torch.bool))
    place = torch.tensor([classes.index(int(each)) if int(each) in classes else -1 for each in DATA["labels"]])
    for _ in range(80):
        log_p = torch.log_softmax(model(DATA["inputs"] + 0.1 * torch.randn(250, 4, generator=generator)), 1)
        optimizer.zero_grad()
        (-log_p[own].gather(1, place[own][:, None]).mean() - 0.5 * log_p[~own].mean()).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def teachers() -> list[Any]:
    return [teacher_of(classes, seed) for seed, classes in enumerate(CLASSES)]


def make(teachers: list[Any], student: Any = None, **options: Any) -> AmalgamationStep:
    return AmalgamationStep(
        network(16, 5) if student is None else student,
        {"inputs": DATA["inputs"]},
        teachers=teachers,
        classes=options.pop("classes", CLASSES),
        validate=accuracy(HELD),
        learning=FAST,
        **options,
    )


def test_the_surest_by_entropy_over_its_greatest() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = [2 * torch.randn(40, len(classes), generator=generator) for classes in CLASSES]
    chosen, entropies = most_confident(logits, CLASSES)
    wanted = np.stack(
        [entropy(torch.softmax(each.double(), 1).numpy(), axis=1) / np.log(each.shape[1]) for each in logits]
    )
    np.testing.assert_allclose(entropies, wanted, atol=1e-6)
    assert chosen.tolist() == wanted.argmin(0).tolist()
    assert 5 < int(chosen.sum()) < 35, "both are chosen somewhere"
    assert entropies.min() >= 0 and entropies.max() <= 1 + 1e-6


def test_many_classes_are_no_disadvantage_and_excluded_ones_no_nan() -> None:
    unsure = [torch.zeros(1, 2), torch.tensor([[3.0] + [0.0] * 9])]
    chosen, found = most_confident(unsure, [range(2), range(10)])
    assert chosen.tolist() == [1] and found[0, 0] == pytest.approx(1.0)
    assert most_confident([torch.tensor([[0.0, -torch.inf, 1.0]])], [range(3)])[1].isfinite().all()


def test_the_terms_are_the_divergence_from_the_chosen_teacher_on_the_union(teachers: list[Any]) -> None:
    """KL over the whole union of a target that is the teacher's within its classes and 0 outside = within + between."""
    temperature = 2.0
    step = make(teachers, temperature=temperature)
    batch = batch_of(step)
    student = torch.log_softmax(step.student(batch["inputs"]).double() / temperature, 1).detach()
    answers = [teacher(batch["inputs"]).detach() for teacher in teachers]
    wanted = 0.0
    for row in range(16):
        told = [entropy(torch.softmax(each[row].double(), 0)) / np.log(each.shape[1]) for each in answers]
        number = int(np.argmin(told))
        p = torch.softmax(answers[number][row].double() / temperature, 0)
        wanted += float((p * (p.log() - student[row, CLASSES[number]])).sum()) * temperature**2
    assert float(loss_of(step, batch).detach()) * 16 == pytest.approx(wanted, rel=1e-4)


def test_the_student_learns_all_classes_without_a_label(teachers: list[Any]) -> None:
    step = make(teachers)
    assert score(step.student, HELD) < 0.6
    before = [each.state_dict() for each in teachers]
    fit(step, 6)
    assert score(step.student, HELD) > 0.85
    for teacher, state in zip(teachers, before, strict=True):
        torch.testing.assert_close(dict(teacher.state_dict()), dict(state), rtol=0, atol=0)


def test_common_features_by_hand() -> None:
    torch.manual_seed(0)
    common = CommonFeatures(6, [3, 5], 4)
    student, teachers = (
        torch.randn(7, 6, requires_grad=True),
        [torch.randn(7, width, requires_grad=True) for width in (3, 5)],
    )
    aligned, rebuilt = common(student, teachers)
    found = [0.0, 0.0]
    for number, teacher in enumerate(teachers):
        shared = common.teachers[number](teacher)
        found[0] += float((common.student(student) - shared).square().mean(1).sum().detach()) / 2
        found[1] += float((common.back[number](shared) - teacher).square().mean(1).sum().detach()) / 2
    assert (float(aligned.detach()), float(rebuilt.detach())) == pytest.approx(tuple(found), rel=1e-5)
    (aligned + rebuilt).backward()
    assert student.grad is not None and student.grad.any()
    assert all(teacher.grad is None for teacher in teachers)
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in common.parameters())


def test_a_common_space_is_learned_beside(teachers: list[Any]) -> None:
    taps = {"feature": "2:in"}
    step = make(teachers, common=CommonFeatures(16, [16, 16], 8), student_taps=taps, teacher_taps=taps)
    batch = batch_of(step)
    before = {name: float(value.detach()) for name, value in step(batch).items()}
    assert set(before) == {"within", "between", "common_features", "rebuilding"}
    fit(step, 5)
    assert score(step.student, HELD) > 0.85
    after = {name: float(value.detach()) for name, value in step(batch).items()}
    assert after["rebuilding"] < 0.7 * before["rebuilding"]
    assert all(parameter.grad is None for teacher in teachers for parameter in teacher.parameters())


def test_a_process_without_rows_adds_nothing(teachers: list[Any]) -> None:
    step = make(teachers)
    nothing = step({name: rows[:0] for name, rows in batch_of(step).items()})
    assert {name: value.item() for name, value in nothing.items()} == {"within": 0.0, "between": 0.0}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], r"classes: wanted 2 or more distinct classes a teacher, got \[\]"),
        ([[0, 1], []], r"classes: wanted 2 or more"),
        ([[0, 1], [2]], r"classes: wanted 2 or more .*\[2\]"),
        ([[0, 1, 1]], r"classes: wanted 2 or more distinct"),
        ([[0, 1], [3, 4]], r"classes: wanted every class of 0..3 with some teacher, got \[0, 1, 3, 4\]"),
    ],
)
def test_sets_of_classes_that_do_not_fit(sets: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        union_of(sets)
    assert union_of([[2, 0], [1, 2]]) == 3


def test_what_does_not_fit_is_named(teachers: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"classes: wanted one set a teacher \(2\), got 1"):
        make(teachers, classes=[[0, 1]])
    with pytest.raises(ValueError, match=r"common: wanted a common space and the taps 'feature'"):
        make(teachers, common=CommonFeatures(16, [16, 16], 8))
    with pytest.raises(ValueError, match=r"student: wanted logits of 5 classes, got 3"):
        make(teachers, network())(batch_of(make(teachers)))
    with pytest.raises(ValueError, match=r"logits: wanted 3 classes, got 2"):
        most_confident([torch.zeros(1, 2)], [[0, 1, 2]])
    with pytest.raises(ValueError, match=r"logits: wanted one set of classes a teacher, got 2 for 1"):
        most_confident([torch.zeros(1, 2)], CLASSES)
    with pytest.raises(ValueError, match=r"temperature: wanted a finite number > 0, got 0.0"):
        make(teachers, temperature=0.0)(batch_of(make(teachers)))
