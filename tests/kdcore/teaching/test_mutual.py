"""Peers that teach each other: the papers' losses by hand, who gets a gradient from whom, and training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kdcore.teaching import DiversePeersStep, MutualLearningStep, Peers
from tests.kdcore.teaching.problems import FAST, accuracy, batch_of, blobs, fit, kl, loss_of, network, score

DATA, HELD = blobs(120), blobs(90, seed=1)


def peers(count: int) -> list[Any]:
    return [network(8 + number, seed=number) for number in range(count)]


def mutual(count: int = 3, **options: Any) -> MutualLearningStep:
    return MutualLearningStep(peers(count), DATA, validate=accuracy(HELD), learning=FAST, **options)


def diverse(count: int = 4, **options: Any) -> DiversePeersStep:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiversePeersStep(peers(count), DATA, classes=3, validate=accuracy(HELD), learning=FAST, **options)


def test_two_peers_are_the_papers_formula() -> None:
    step = mutual(2)
    batch = batch_of(step)
    one, two = (network(batch["inputs"]) for network in step.student.networks)  # type: ignore[union-attr,operator]
    labels = batch["labels"]
    first = F.cross_entropy(one, labels) + kl(two, one).mean()
    second = F.cross_entropy(two, labels) + kl(one, two).mean()
    torch.testing.assert_close(loss_of(step, batch).double(), (first + second).double(), rtol=1e-5, atol=1e-5)


def test_more_peers_are_a_mean_over_the_others_at_a_temperature() -> None:
    step = mutual(3, weight=0.4, temperature=2.0)
    batch = batch_of(step)
    answers = step.student.all_answers(batch["inputs"])  # type: ignore[operator]
    wanted = torch.zeros((), dtype=torch.float64)
    for i, mine in enumerate(answers):
        others = [kl(other, mine, 2.0).mean() for j, other in enumerate(answers) if j != i]
        wanted = wanted + F.cross_entropy(mine, batch["labels"]).double() + 0.4 * sum(others) / 2
    torch.testing.assert_close(loss_of(step, batch).double(), wanted, rtol=1e-5, atol=1e-5)
    assert step.counts(batch) == {"cross_entropy": 16, "peers": 16}


def gradients(values: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    return [torch.zeros(1) if g is None else g for g in torch.autograd.grad(values, inputs, allow_unused=True)]


def test_a_peer_is_pulled_to_the_others_and_the_others_not_to_it() -> None:
    step = mutual(2)
    answers = [torch.randn(5, 3, requires_grad=True) for _ in range(2)]
    found = gradients(step.lessons(answers), answers)
    for mine, other, gradient in ((0, 1, found[0]), (1, 0, found[1])):
        # the closed form of the gradient of KL(other || mine) alone
        wanted = torch.softmax(answers[mine], 1) - torch.softmax(answers[other], 1)
        torch.testing.assert_close(gradient, wanted.detach(), atol=1e-6, rtol=1e-5)


def test_alike_peers_have_nothing_to_teach() -> None:
    answers = [torch.randn(5, 3)] * 3
    assert float(mutual(3).lessons(answers)) == pytest.approx(0, abs=1e-5)
    assert float(diverse(3).lessons(answers).detach()) == pytest.approx(0, abs=1e-4)


def test_diverse_peers_by_hand() -> None:
    step = diverse(4, temperature=2.0)
    answers = [3 * torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    wanted = 0.0
    for row in range(6):
        said = torch.stack([each[row] for each in answers[1:]]).double()
        tempered = torch.softmax(said / 2.0, 1)
        with torch.no_grad():
            query, key = (layer.weight.double() @ said.T for layer in (step.query, step.key))
        attention = torch.softmax(query.T @ key, 1)
        for peer in range(3):
            target = sum(attention[peer, other] * tempered[other] for other in range(3))
            wanted += float((target * (target / tempered[peer]).log()).sum()) * 4
        leader = torch.softmax(answers[0][row].double() / 2.0, 0)
        group = tempered.mean(0)
        wanted += float((group * (group / leader).log()).sum()) * 4
    assert float(step.lessons(answers).detach()) == pytest.approx(wanted, rel=1e-4)


def test_in_diverse_peers_only_the_attention_learns_through_the_targets() -> None:
    step = diverse(4)
    answers = [torch.randn(6, 3, requires_grad=True) for _ in range(4)]
    weights = [step.query.weight, step.key.weight]
    found = gradients(step.lessons(answers), [*answers, *weights])
    assert all(gradient.any() for gradient in found)
    # the leader is followed by nobody: its gradient is that of its own divergence from the group
    mean = torch.stack([torch.softmax(each / 3.0, 1) for each in answers[1:]]).mean(0)
    wanted = 3.0 * (torch.softmax(answers[0] / 3.0, 1) - mean)
    torch.testing.assert_close(found[0], wanted.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [mutual, diverse])
def test_trains_all_and_deploys_the_first(make: Any) -> None:
    step = make()
    first = step.student.networks[0]
    assert torch.equal(step.student(HELD["inputs"]), first(HELD["inputs"]))
    fit(step, 5)
    assert all(score(each, HELD) > 0.85 for each in step.student.networks)


def test_peers_agree_more_than_without_lessons() -> None:
    def apart(weight: float) -> float:
        step = mutual(2, weight=weight)
        fit(step, 4, patience=0)
        one, two = (each.eval()(HELD["inputs"]) for each in step.student.networks)  # type: ignore[union-attr,operator]
        return float((kl(one, two) + kl(two, one)).mean().detach())

    assert apart(3.0) < 0.5 * apart(0.0)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"networks: wanted at least 2 peers, got 1"):
        Peers(peers(1))
    with pytest.raises(ValueError, match=r"networks: wanted a leader and at least 2 peers, got 2"):
        diverse(2)
    with pytest.raises(ValueError, match=r"temperature: wanted a finite number > 0, got 0.0"):
        step = mutual(temperature=0.0)
        step(batch_of(step))
