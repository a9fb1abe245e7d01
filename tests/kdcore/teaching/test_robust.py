"""Attacks that stay in their ball and fool, students that hold against them, and defensive temperatures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.teaching import (
    AdversariallyRobustStep,
    DefensiveStep,
    DistillationStep,
    Learning,
    Tempered,
    attack,
    labels_term,
)
from tests.kdcore.teaching.problems import (
    FAST,
    accuracy,
    batch_of,
    blobs,
    fit,
    flat,
    kl,
    loss_of,
    network,
    score,
    trained,
)

DATA, HELD = blobs(120), blobs(90, seed=1)
TEACHER = trained()


def fooled(model: nn.Module, **options: Any) -> Tensor:
    settings = {"radius": 0.8, "low": None, "high": None, **options}
    return attack(model, HELD["inputs"], HELD["labels"], **settings)


@given(st.floats(0.01, 3), st.integers(1, 4), st.booleans(), st.sampled_from([(None, None), (-1.0, 1.0), (0.0, None)]))
@settings(max_examples=20, deadline=None)
def test_stays_in_the_ball_and_in_the_bounds(radius: float, steps: int, start: bool, bounds: Any) -> None:
    low, high = bounds
    inputs = HELD["inputs"] if low is None else HELD["inputs"].clamp(low, high)
    moved = attack(TEACHER, inputs, HELD["labels"], radius=radius, steps=steps, low=low, high=high, random_start=start)
    assert float((moved - inputs).abs().max()) <= radius * (1 + 1e-5) + 1e-6
    assert low is None or float(moved.min()) >= low
    assert high is None or float(moved.max()) <= high
    assert not moved.requires_grad and moved.shape == inputs.shape


def test_raises_the_loss_more_with_more_steps_and_room() -> None:
    def loss(inputs: Tensor) -> float:
        return float(F.cross_entropy(TEACHER(inputs), HELD["labels"]).detach())

    clean = loss(HELD["inputs"])
    one, ten = (loss(fooled(TEACHER, steps=steps, random_start=False)) for steps in (1, 10))
    random = loss(HELD["inputs"] + 0.8 * (2 * torch.randint(2, HELD["inputs"].shape) - 1))
    assert clean < loss(fooled(TEACHER, radius=0.2)) < ten
    assert ten >= one - 1e-6 and ten > 1.5 * random, "better than noise of the same size"


def test_one_step_is_the_sign_of_the_gradient() -> None:
    inputs = HELD["inputs"].clone().requires_grad_()
    F.cross_entropy(TEACHER(inputs), HELD["labels"], reduction="sum").backward()
    assert inputs.grad is not None
    wanted = HELD["inputs"] + 0.8 * inputs.grad.sign()  # a step of 2.5 radii is cut to one
    torch.testing.assert_close(fooled(TEACHER, steps=1, random_start=False), wanted)


def test_leaves_the_model_the_inputs_and_their_gradients_alone() -> None:
    model, inputs = network(norm=True), HELD["inputs"].clone()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model.eval()
    before = flat(model)
    with torch.no_grad():
        attack(model, inputs, HELD["labels"], radius=0.5, low=None, high=None)
    assert torch.equal(flat(model), before) and torch.equal(inputs, HELD["inputs"])
    assert model[0].weight.grad.eq(1).all() and model[4 - 1].weight.grad is None
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(fooled(model, radius=0.0), HELD["inputs"])


@pytest.mark.parametrize("wrong", [{"radius": -0.1}, {"radius": float("nan")}, {"steps": 0}])
def test_attacks_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"radius, steps: wanted radius >= 0 and steps >= 1, got"):
        fooled(TEACHER, **wrong)


def robust(student: Any = None, teacher: Any = None, **options: Any) -> AdversariallyRobustStep:
    settings = {"radius": 0.8, "low": None, "high": None, "steps": 3, **options}
    return AdversariallyRobustStep(
        student or network(16), DATA, teacher=teacher or TEACHER, validate=accuracy(HELD), learning=FAST, **settings
    )


def test_terms_by_hand() -> None:
    step = robust(soft=0.7, temperature=2.0)
    batch = batch_of(step)
    torch.manual_seed(3)
    found = loss_of(step, batch)
    torch.manual_seed(3)
    moved = attack(step.student, batch["inputs"], batch["labels"], **step.attack)  # type: ignore[arg-type]
    clean, attacked = step.student(batch["inputs"]), step.student(moved)
    soft = kl(TEACHER(batch["inputs"]), attacked, 2.0).mean()
    wanted = 0.3 * F.cross_entropy(clean, batch["labels"]) + 0.7 * soft
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=1e-4)


def test_the_attack_moves_no_statistics_and_every_module_keeps_its_mode() -> None:
    step = robust(network(norm=True), steps=5)
    step.train()
    step.student[1].eval()  # type: ignore[index,operator]
    before = flat(step.student)
    step(batch_of(step))
    assert torch.equal(flat(step.student), before), "a batch norm that stands still stands still"
    assert not step.student[1].training and step.student[0].training  # type: ignore[index,union-attr]
    step.student[1].train()  # type: ignore[index,operator]
    step(batch_of(step))
    assert int(step.student[1].num_batches_tracked) == 1, "one pass of training, not one an attack"  # type: ignore[index]
    step.eval()
    step(batch_of(step))
    assert not step.student.training


def test_holds_better_than_a_student_of_clean_rows() -> None:
    plain, held = network(16), network(16)
    fit(DistillationStep(plain, DATA, [labels_term()], validate=accuracy(HELD), learning=FAST), 8, patience=0)
    teacher = copy.deepcopy(TEACHER)
    fit(robust(held, teacher, radius=1.2, soft=0.9), 8, patience=0)
    assert torch.equal(flat(teacher), flat(TEACHER))
    assert score(held, HELD) > 0.85

    def attacked(model: nn.Module) -> float:
        torch.manual_seed(0)
        moved = fooled(model.eval(), radius=1.2, steps=10)
        return float(F.cross_entropy(model(moved), HELD["labels"]).detach())

    assert attacked(held) < attacked(plain)


def defensive(temperature: float = 10.0, **options: Any) -> DefensiveStep:
    teachers = options.pop("teachers", [TEACHER])
    learning = Learning(batch_size=16, learning_rate=0.05)
    return DefensiveStep(
        network(16),
        {"inputs": DATA["inputs"]},
        temperature=temperature,
        teachers=teachers,
        validate=accuracy(HELD),
        learning=learning,
    )


def test_divided_in_training_and_not_after() -> None:
    model, inputs = network(), DATA["inputs"]
    tempered = Tempered(model, 20.0)
    torch.testing.assert_close(tempered.train()(inputs), model(inputs) / 20)
    torch.testing.assert_close(tempered.eval()(inputs), model(inputs))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=r"temperature: wanted a number > 0, got"):
            Tempered(model, temperature)


def test_the_student_is_held_to_the_teachers_tempered_answer() -> None:
    for teacher in (TEACHER, Tempered(copy.deepcopy(TEACHER), 10.0).eval()):
        step = defensive(teachers=[teacher])
        batch = batch_of(step.train())
        mine, his = step.student.network(batch["inputs"]), TEACHER(batch["inputs"])  # type: ignore[operator,union-attr]
        wanted = kl(his / 10, mine / 10).mean()
        torch.testing.assert_close(loss_of(step, batch).double(), wanted, rtol=1e-4, atol=1e-6)


def test_a_defensive_student_learns_without_labels() -> None:
    step = defensive(3.0)
    fit(step, 8)
    assert score(step.student, HELD) > 0.85
    with pytest.raises(ValueError, match=r"teachers: wanted 1, got 2"):
        defensive(teachers=[TEACHER, TEACHER])


def test_shares_of_the_teacher_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"soft: wanted 0..1, got 1.1"):
        robust(soft=1.1)
