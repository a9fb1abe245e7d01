"""Pruned channels that stay out, and cross distillation block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kdcore.teaching import CrossDistillationStep, finish_pruning, prune_channels, remaining_parameters
from tests.kdcore.teaching.problems import FAST, accuracy, batch_of, blobs, fit, flat, kl, score, trained

FEW, HELD = blobs(40, seed=4), blobs(90, seed=1)


def blocks(hidden: int = 16) -> nn.Sequential:
    """A taught network of two hidden layers as blocks."""
    teacher = trained(hidden)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        middle = nn.Linear(hidden, hidden)
        with torch.no_grad():
            middle.weight.copy_(torch.eye(hidden) + 0.05 * torch.randn(hidden, hidden))
            middle.bias.zero_()
    return nn.Sequential(
        nn.Sequential(teacher[0], teacher[1]), nn.Sequential(middle, nn.ReLU()), nn.Sequential(teacher[2])
    ).eval()


TEACHER = blocks()


def test_the_weakest_channels_go_with_their_bias_and_the_classes_stay() -> None:
    before = flat(TEACHER)
    pruned = prune_channels(TEACHER, 0.25)
    assert torch.equal(flat(TEACHER), before) and not hasattr(TEACHER[0][0], "weight_mask")  # type: ignore[index]
    for number in (0, 1):
        whole, layer = TEACHER[number][0], pruned[number][0]  # type: ignore[index]
        weakest = whole.weight.norm(dim=1).argsort()[:4].tolist()
        gone = (layer.weight == 0).all(1)
        assert sorted(gone.nonzero()[:, 0].tolist()) == sorted(weakest)
        assert not layer.bias[gone].any()
        torch.testing.assert_close(layer.weight[~gone], whole.weight[~gone])
        torch.testing.assert_close(layer.bias[~gone], whole.bias[~gone])
    torch.testing.assert_close(pruned[2][0].weight, TEACHER[2][0].weight)  # type: ignore[index]


def test_parameters_are_counted_exactly() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    assert remaining_parameters(model) == 4 * 8 + 8 + 8 * 3 + 3
    assert remaining_parameters(prune_channels(model, 0.5)) == 4 * 4 + 4 + 8 * 3 + 3
    assert remaining_parameters(prune_channels(model, 0.0)) == remaining_parameters(model)
    assert remaining_parameters(prune_channels(model, 0.99)) == 4 + 1 + 8 * 3 + 3, "one channel is always left"
    maps = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Flatten(), nn.Linear(4, 2))
    pruned = prune_channels(maps, 0.5)
    assert remaining_parameters(pruned) == 2 * 2 * 9 + 4 * 2 + 2
    weakest = maps[0].weight.flatten(1).norm(dim=1).argsort()[:2].tolist()  # type: ignore[union-attr,operator]
    assert sorted((pruned[0].weight == 0).flatten(1).all(1).nonzero()[:, 0].tolist()) == sorted(weakest)


def make(student: Any = None, **options: Any) -> CrossDistillationStep:
    return CrossDistillationStep(
        prune_channels(TEACHER, 0.5) if student is None else student,
        {"inputs": FEW["inputs"]},
        teacher=TEACHER,
        validate=accuracy(HELD),
        learning=FAST,
        **options,
    )


def test_pruned_channels_stay_zero_after_training_and_the_mask_becomes_permanent() -> None:
    step, before = make(), flat(TEACHER)
    student = step.student
    gone = [(student[number][0].weight == 0).all(1) for number in (0, 1)]  # type: ignore[index]
    kept = [student[number][0].weight.detach().clone() for number in (0, 1)]  # type: ignore[index]
    fit(step, 5)
    answers = student.eval()(HELD["inputs"])
    for number, channels in enumerate(gone):
        layer = student[number][0]  # type: ignore[index]
        assert channels.sum() == 8 and not layer.weight[channels].any() and not layer.bias[channels].any()
        assert not torch.equal(layer.weight, kept[number]), "the others learned"
    assert torch.equal(flat(TEACHER), before)
    assert all(parameter.grad is None for parameter in TEACHER.parameters())
    assert finish_pruning(student) is student
    assert not [name for name in student.state_dict() if "mask" in name or "orig" in name]
    torch.testing.assert_close(student(HELD["inputs"]), answers)
    again = prune_channels(student, 0.5)
    assert torch.equal((again[0][0].weight == 0).all(1), gone[0]), "those that are out are the weakest"  # type: ignore[index]


def test_few_unlabelled_rows_mend_what_pruning_broke() -> None:
    step = make()

    def apart(model: nn.Module) -> float:
        return float(kl(TEACHER(HELD["inputs"]), model.eval()(HELD["inputs"])).mean().detach())

    before, right = apart(step.student), score(step.student, HELD)
    fit(step, 15, patience=0)
    assert apart(step.student) < 0.5 * before
    assert score(step.student, HELD) >= max(0.85, right)


@pytest.mark.parametrize("mixing", [1.0, 0.7, 0.0])
def test_terms_by_hand(mixing: float) -> None:
    step = make(mixing=mixing, temperature=2.0)
    batch = batch_of(step)
    clean = own = batch["inputs"]
    correction, imitation = 0.0, 0.0
    for block, twin in zip(TEACHER, step.student, strict=True):
        for_student, for_teacher = mixing * clean + (1 - mixing) * own, mixing * own + (1 - mixing) * clean
        correction += float((block(for_student) - twin(for_student)).square().mean(1).sum().detach())
        imitation += float((block(for_teacher) - twin(for_teacher)).square().mean(1).sum().detach())
        clean, own = block(clean), twin(for_teacher)
    found = step(batch)
    assert found["correction"].item() == pytest.approx(correction, rel=1e-4)
    assert found["imitation"].item() == pytest.approx(imitation, rel=1e-4)
    torch.testing.assert_close(found["soft_targets"].double(), kl(clean, own, 2.0).sum(), rtol=1e-4, atol=1e-4)
    assert step.weights == {"correction": 0.5, "imitation": 0.5, "soft_targets": 1.0}


def test_correction_trains_each_block_by_itself_and_imitation_all_before_it() -> None:
    step = make()
    batch = batch_of(step)
    first, last = step.student[0][0].weight_orig, step.student[2][0].weight  # type: ignore[index]
    assert not torch.autograd.grad(step(batch)["correction"], last)[0].any(), "it is the teacher's, so it errs nowhere"
    with torch.no_grad():
        last.add_(0.1)
    terms = step(batch)
    own = (step.student[0](batch["inputs"]) - TEACHER[0](batch["inputs"])).square().mean(1).sum()
    wanted = torch.autograd.grad(own, first)[0]
    torch.testing.assert_close(torch.autograd.grad(terms["correction"], first, retain_graph=True)[0], wanted)
    assert not torch.allclose(torch.autograd.grad(terms["imitation"], first, retain_graph=True)[0], wanted)
    assert torch.autograd.grad(terms["correction"], last)[0].any()


def test_a_frozen_teacher_has_a_pruned_copy_that_learns() -> None:
    make()
    assert not any(parameter.requires_grad for parameter in TEACHER.parameters())
    assert all(parameter.requires_grad for parameter in prune_channels(TEACHER, 0.5).parameters())


def test_what_does_not_fit_is_named() -> None:
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"share: wanted 0 <= share < 1, got"):
            prune_channels(TEACHER, share)
    with pytest.raises(ValueError, match=r"model: wanted a hidden convolution or linear layer, got 1 layer"):
        prune_channels(nn.Sequential(nn.Linear(4, 3)), 0.5)
    with pytest.raises(ValueError, match=r"student: wanted 3 blocks as the teacher has, got 2"):
        make(TEACHER[:2])
    for wrong in ({"correction": 1.1}, {"mixing": -0.1}, {"soft": -1.0}):
        with pytest.raises(ValueError, match=r"correction, mixing, soft: wanted 0..1, 0..1, >= 0, got"):
            make(**wrong)
