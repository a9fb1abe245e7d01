"""Chains of fits: who is whose teacher, and that a teacher is what its generation became and moves no more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kdcore.teaching import (
    DistillationStep,
    Residual,
    Term,
    assistant_chain,
    born_again,
    labels_term,
    residual_assistant,
)
from kdcore.trainer import FitResult
from tests.kdcore.teaching.problems import FAST, accuracy, batch_of, blobs, fit, flat, network, score, trained

DATA, HELD = blobs(120), blobs(90, seed=1)


class Fits:
    """Trains with the one trainer, and keeps what it was given."""

    def __init__(self, epochs: int = 3) -> None:
        self.epochs, self.calls = epochs, []  # type: ignore[var-annotated]

    def __call__(self, model: nn.Module, teacher: nn.Module | None, stage: int) -> FitResult:
        self.calls.append((model, teacher, stage, None if teacher is None else flat(teacher)))
        terms = [labels_term(1.0 if teacher is None else 0.2)]
        if teacher is not None:
            terms.append(Term("soft", "soft_targets", options={"temperature": 2.0}))
        step = DistillationStep(
            model,
            DATA,
            terms,
            teachers=[] if teacher is None else [teacher],
            validate=accuracy(HELD),
            learning=FAST,
        )
        return fit(step, self.epochs)


def test_each_generation_is_taught_by_what_the_one_before_became() -> None:
    fits, made = Fits(), []

    def make(stage: int) -> nn.Module:
        made.append(stage)
        return network(seed=stage, norm=True)

    stages = born_again(make, fits, 2)
    assert made == [0, 1, 2] and len(stages) == 3
    assert [stage for _, _, stage, _ in fits.calls] == [0, 1, 2]
    assert fits.calls[0][1] is None, "the first has labels alone"
    for number in (1, 2):
        _, teacher, _, state = fits.calls[number]
        before = stages[number - 1].model
        assert torch.equal(state, flat(before)), "the trained weights of the generation before"
        assert torch.equal(flat(teacher), state), "and it moved no more"
        assert teacher is not before and not teacher.training
        assert all(not parameter.requires_grad for parameter in teacher.parameters())
        assert all(parameter.requires_grad for parameter in before.parameters()), "that one may still learn"
    assert all(stage.result.epochs == 3 and score(stage.model, HELD) > 0.85 for stage in stages)


def test_a_chain_hands_down_from_large_to_small() -> None:
    fits, teacher = Fits(6), trained(32)
    models = [network(16), network(8), network(4)]
    stages = assistant_chain(models, fits, teacher=teacher)
    assert [stage.model for stage in stages] == models
    assert fits.calls[0][1] is teacher
    assert [flat(models[number]).tolist() for number in (0, 1)] == [call[3].tolist() for call in fits.calls[1:]]
    assert score(models[-1], HELD) > 0.85


def test_an_assistant_learns_what_the_student_leaves() -> None:
    fits, teacher = Fits(5), trained(32)
    student, assistant = network(2, seed=3, norm=True), network(8, seed=4)
    both, stages = residual_assistant(student, assistant, fits, teacher=teacher)
    assert [call[2] for call in fits.calls] == [0, 1] and all(call[1] is teacher for call in fits.calls)
    assert stages[0].model is student and stages[1].model is both
    assert torch.equal(flat(both.student), flat(student)), "the student stood still, batch statistics too"
    inputs = HELD["inputs"]
    torch.testing.assert_close(both.eval()(inputs), student.eval()(inputs) + assistant.eval()(inputs))
    wanted = torch.softmax(teacher(inputs), 1)

    def error(model: nn.Module) -> float:
        return float((torch.softmax(model(inputs), 1) - wanted).square().mean().detach())

    assert error(both) < 0.7 * error(student)


def test_in_a_residual_only_the_assistant_trains() -> None:
    both = Residual(network(norm=True), network(seed=1)).train()
    assert both.assistant.training and not any(module.training for module in both.student.modules())
    before = flat(both.student)
    inputs = DATA["inputs"].clone().requires_grad_()
    both(inputs).square().sum().backward()
    assert torch.equal(flat(both.student), before)
    assert all(parameter.grad is None for parameter in both.student.parameters())
    assert all(parameter.grad is not None for parameter in both.assistant.parameters())
    slope = torch.autograd.grad(both(inputs).sum(), inputs)[0]
    alone = torch.autograd.grad(both.assistant(inputs).sum(), inputs)[0]
    assert not torch.allclose(slope, alone), "an attack sees the whole of what is deployed"
    assert not both.eval().assistant.training


def test_what_does_not_fit_is_named() -> None:
    def nothing(*_: Any) -> FitResult:
        raise AssertionError

    with pytest.raises(ValueError, match=r"generations: wanted at least 1, got 0"):
        born_again(lambda stage: network(), nothing, 0)
    with pytest.raises(ValueError, match=r"models: wanted at least 1, got 0"):
        assistant_chain([], nothing)


def test_a_residual_is_one_student_to_a_step() -> None:
    step = DistillationStep(
        Residual(network(), network(seed=1)), DATA, [labels_term()], validate=accuracy(HELD), learning=FAST
    )
    names = {id(p) for group in step.optimizer().param_groups for p in group["params"]}
    assert names == {id(parameter) for parameter in step.student.assistant.parameters()}  # type: ignore[union-attr]
    assert step(batch_of(step))["cross_entropy"].requires_grad
