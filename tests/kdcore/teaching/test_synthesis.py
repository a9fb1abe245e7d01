"""Samples out of a teacher alone: the terms by hand, and that they become what the teacher knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdcore.teaching import Learning, Samples, SynthesisStep
from tests.kdcore.teaching.problems import WIDTH, batch_of, blobs, fit, flat, network, trained

TEACHER = trained(norm=True)


def samples(count: int = 30, shape: tuple[int, ...] = (WIDTH,), **options: Any) -> Samples:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Samples(count, shape, **options)


def make(teacher: Any = TEACHER, some: Samples | None = None, classes: int = 3, **options: Any) -> SynthesisStep:
    return SynthesisStep(teacher, some or samples(), classes, **{"steps_per_epoch": 20, **options})


def test_the_teacher_knows_the_samples_better_than_noise() -> None:
    step, before = make(), flat(TEACHER)
    noise = step.validate()
    fit(step, 4, monitor="confidence")
    found = step.validate()
    assert found["accuracy"] > max(0.9, noise["accuracy"]) and found["confidence"] > noise["confidence"] + 0.2
    assert torch.equal(flat(TEACHER), before)
    assert all(parameter.grad is None for parameter in TEACHER.parameters())
    assert step.labels.bincount().tolist() == [10, 10, 10]


def test_the_samples_have_the_statistics_of_the_data() -> None:
    step = make(statistics=10.0)
    before = step(batch_of(step))["statistics"].item()
    fit(step, 6, monitor="confidence", patience=0)
    step.labels[:] = step.labels  # the buffer is the step's own
    assert step(batch_of(step))["statistics"].item() < 0.3 * before


def test_a_student_learns_from_samples_alone() -> None:
    step = make(some=samples(90), statistics=10.0)
    fit(step, 8, monitor="confidence", patience=0)
    inputs = step.student(torch.arange(90)).detach()
    student, held = network(16, seed=3), blobs(90, seed=1)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(student(inputs), step.labels).backward()
        optimizer.step()
    assert float((student(held["inputs"]).argmax(1) == held["labels"]).float().mean()) > 0.8


def test_terms_by_hand() -> None:
    step = make(learning=Learning(batch_size=12, learning_rate=0.05))
    batch = batch_of(step)
    rows = batch["index"]
    assert len(rows) == 12 == step.counts(batch)["statistics"]
    inputs = step.student.values[rows].detach()  # type: ignore[union-attr,index]
    hidden = TEACHER[0](inputs).detach()
    mean, variance = hidden.mean(0), hidden.var(0, unbiased=False)
    norm = TEACHER[1]
    statistics = (mean - norm.running_mean).square().mean() + (variance - norm.running_var).square().mean()
    wanted = {
        "cross_entropy": F.cross_entropy(TEACHER(inputs), rows % 3, reduction="sum"),
        "statistics": 12 * statistics,
        "variation": torch.zeros(()),
        "size": inputs.square().mean(1).sum(),
    }
    torch.testing.assert_close(step(batch), wanted)


class Maps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.layers(inputs)
        return answer


def test_maps_have_a_variation_and_statistics_a_channel() -> None:
    torch.manual_seed(0)
    teacher = Maps().eval()
    step = make(teacher, samples(4, (2, 5, 5)), 2)
    batch = batch_of(step)
    inputs = step.student(batch["index"]).detach()
    down = (inputs[:, :, 1:] - inputs[:, :, :-1]).square().mean((1, 2, 3))
    right = (inputs[:, :, :, 1:] - inputs[:, :, :, :-1]).square().mean((1, 2, 3))
    found = step(batch)
    torch.testing.assert_close(found["variation"], (down + right).sum())
    hidden = teacher.layers[0](inputs).detach()
    mean, variance = hidden.mean((0, 2, 3)), hidden.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(found["statistics"], 4 * (mean.square().mean() + (variance - 1).square().mean()))
    assert all(not module._forward_hooks for module in teacher.modules())


def test_bounded_samples_stay_inside_and_none_of_them_is_stuck() -> None:
    some = samples(200, low=0.0, high=1.0)
    start = some(torch.arange(200)).detach()
    assert float(start.min()) == 0 and float(start.max()) == 1 and float((start == 0).float().mean()) > 0.3
    step = make(some=some)
    fit(step, 3, monitor="confidence", patience=0)
    found = some(torch.arange(200)).detach()
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    moved = (found != start).float()
    assert float(moved[start == 0].mean()) > 0.2, "those that began at a bound may leave it"


def test_every_epoch_has_its_steps_and_visits_all_rows() -> None:
    step = make(some=samples(10), steps_per_epoch=7, learning=Learning(batch_size=4, learning_rate=0.1))
    batches = [batch["index"] for batch in step.batches(0, torch.Generator().manual_seed(0))]
    assert [len(rows) for rows in batches] == [4, 4, 2, 4, 4, 2, 4] and step.batch_count() == 7
    assert torch.cat(batches[:3]).sort().values.tolist() == list(range(10))


def test_a_process_without_rows_adds_nothing() -> None:
    step = make()
    nothing = step({"index": torch.zeros(0, dtype=torch.int64)})
    assert {name: value.item() for name, value in nothing.items()} == dict.fromkeys(step.weights, 0.0)
    torch.stack(list(nothing.values())).sum().backward()


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"teacher: wanted batch normalisation with running statistics"):
        make(trained())
    without = nn.Sequential(nn.BatchNorm1d(WIDTH, track_running_stats=False)).eval()
    with pytest.raises(ValueError, match=r"teacher: wanted batch normalisation with running statistics"):
        make(without)
    with pytest.raises(ValueError, match=r"steps_per_epoch, classes: wanted >= 1 and >= 2, got 0 and 3"):
        make(steps_per_epoch=0)
    with pytest.raises(ValueError, match=r"steps_per_epoch, classes: .* got 20 and 1"):
        make(classes=1)
    with pytest.raises(ValueError, match=r"count: wanted at least 1, got 0"):
        samples(0)
    with pytest.raises(ValueError, match=r"low, high: wanted low < high, got 1.0 and 0.0"):
        samples(low=1.0, high=0.0)
