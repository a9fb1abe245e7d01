"""Networks that teach themselves: partners of the same class, and two views of one sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.teaching import ClassWiseStep, DataDistortionStep
from tests.kdcore.teaching.problems import FAST, accuracy, batch_of, blobs, fit, improves, kl, loss_of, network

DATA, HELD = blobs(120), blobs(90, seed=1)


def noise(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + 0.3 * torch.randn(inputs.shape, generator=generator)


def class_wise(data: Any = None, **options: Any) -> ClassWiseStep:
    return ClassWiseStep(network(), data or DATA, validate=accuracy(HELD), learning=FAST, **options)


def distorted(**options: Any) -> DataDistortionStep:
    return DataDistortionStep(network(), DATA, validate=accuracy(HELD), learning=FAST, distort=noise, **options)


def test_partners_are_other_rows_of_the_same_class_all_of_them() -> None:
    labels = torch.tensor([0, 1, 1, 1, 2, 2, 1, 0, 4])  # class 3 has none, class 4 one
    data = {"inputs": torch.arange(9.0)[:, None].expand(9, 4).clone(), "labels": labels}
    step, seen = class_wise(data), [set() for _ in range(9)]
    for seed in range(60):
        for batch in step.batches(0, torch.Generator().manual_seed(seed)):
            for row, partner in zip(batch["index"].tolist(), batch["partner"][:, 0].int().tolist(), strict=True):
                seen[row].add(partner)
    assert seen == [{7}, {2, 3, 6}, {1, 3, 6}, {1, 2, 6}, {5}, {4}, {1, 2, 3}, {0}, {8}]


def test_partners_are_a_function_of_the_generator() -> None:
    step = class_wise()
    torch.rand(3)
    assert torch.equal(batch_of(step)["partner"], batch_of(step)["partner"])
    assert not torch.equal(batch_of(step)["partner"], batch_of(step, 1)["partner"])


def test_class_wise_by_hand_and_the_partner_gets_no_gradient() -> None:
    step = class_wise(weight=0.5, temperature=2.0)
    batch = batch_of(step)
    answer, partner = step.student(batch["inputs"]), step.student(batch["partner"]).detach()
    wanted = F.cross_entropy(answer, batch["labels"]) + 0.5 * kl(partner, answer, 2.0).mean()
    found = loss_of(step, batch)
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-5)
    for mine, his in zip(
        torch.autograd.grad(found, list(step.parameters())),
        torch.autograd.grad(wanted.float(), list(step.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(mine, his, rtol=1e-4, atol=1e-5)


def test_two_views_by_hand() -> None:
    step = distorted(weight=0.5, temperature=2.0)
    batch = batch_of(step)
    rows = DATA["inputs"][batch["index"]]
    assert not torch.equal(batch["inputs"], batch["partner"])
    for view in (batch["inputs"], batch["partner"]):
        assert 0.2 < float((view - rows).std()) < 0.4
    one, other = step.student(batch["inputs"]), step.student(batch["partner"])
    labels = (F.cross_entropy(one, batch["labels"]) + F.cross_entropy(other, batch["labels"])) / 2
    wanted = labels + 0.5 * (kl(one, other, 2.0) + kl(other, one, 2.0)).mean() / 2
    torch.testing.assert_close(loss_of(step, batch).double(), wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [class_wise, distorted])
def test_trains(make: Any) -> None:
    improves(make(), HELD)


@pytest.mark.parametrize("make", [class_wise, distorted])
def test_answers_are_more_alike_than_without(make: Any) -> None:
    def apart(weight: float) -> float:
        step = make(weight=weight, temperature=1.0)
        fit(step, 4, patience=0)
        batch = batch_of(step)
        one, other = (step.student.eval()(batch[name]).detach() for name in ("inputs", "partner"))
        return float((torch.softmax(one, 1) - torch.softmax(other, 1)).square().sum(1).mean())

    assert apart(5.0) < apart(0.0)


@pytest.mark.parametrize("make", [class_wise, distorted])
def test_shards_add_up_and_an_empty_one_is_zero(make: Any) -> None:
    step = make().eval()
    batch = batch_of(step)
    parts = [step(step.shard(batch, rank, 2)) for rank in range(2)]
    for name, whole in step(batch).items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole, rtol=1e-4, atol=1e-4)
    nothing = step({name: rows[:0] for name, rows in batch.items()})
    assert {name: value.item() for name, value in nothing.items()} == dict.fromkeys(step.weights, 0.0)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"weight: wanted a number >= 0, got -1"):
        class_wise(weight=-1)
    with pytest.raises(ValueError, match=r"temperature: wanted a finite number > 0, got 0.0"):
        step = distorted(temperature=0.0)
        step(batch_of(step))
