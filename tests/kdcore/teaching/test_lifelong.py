"""Learning without forgetting: what old heads are held to, exemplars by herding, and less forgotten than without."""

from __future__ import annotations

import copy
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from kdcore.teaching import Heads, Learning, WithoutForgettingStep, choose_exemplars
from tests.kdcore.teaching.problems import accuracy, batch_of, blobs, fit, flat, kl, loss_of, network

# two tasks on different parts of the space
OLD, OLD_HELD = blobs(150, 3), blobs(90, 3, seed=1)
NEW = blobs(120, 4, seed=3)


@cache
def taught(norm: bool) -> Heads:
    """A narrow body, in which a new task has to make room for itself."""
    model = network(4, norm=norm, seed=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(OLD["inputs"]), OLD["labels"]).backward()
        optimizer.step()
    optimizer.zero_grad()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Heads(model[:-1], {"old": model[-1], "new": nn.Linear(4, 4)})


def two_heads(norm: bool = False) -> Heads:
    """Return a body that knows the old task, and a new head that knows nothing."""
    return copy.deepcopy(taught(norm))


def make(student: Heads | None = None, **options: Any) -> WithoutForgettingStep:
    learning = Learning(batch_size=20, learning_rate=0.05)
    settings = {"new": "new", "validate": accuracy(NEW), "learning": learning, **options}
    return WithoutForgettingStep(student or two_heads(), NEW, **settings)


def old_accuracy(heads: Heads) -> float:
    with torch.no_grad():
        return float((heads.eval()(OLD_HELD["inputs"], "old").argmax(1) == OLD_HELD["labels"]).float().mean())


def test_the_newest_head_answers_unless_another_is_named() -> None:
    heads, inputs = two_heads(), NEW["inputs"]
    answers = heads.all_heads(inputs)
    assert list(answers) == ["old", "new"]
    assert torch.equal(heads(inputs), answers["new"]) and torch.equal(heads(inputs, "old"), answers["old"])
    torch.testing.assert_close(answers["old"], heads.heads["old"](heads.body(inputs)))
    with pytest.raises(ValueError, match=r"task: wanted one of old, new, got 'odl'"):
        heads(inputs, "odl")
    with pytest.raises(ValueError, match=r"heads: wanted at least 1, got 0"):
        Heads(nn.Identity(), {})


def test_terms_by_hand() -> None:
    step = make(memory=OLD["inputs"][:9], weight=0.7, temperature=3.0)
    with torch.no_grad():
        for parameter in step.student.parameters():
            parameter.add_(0.1)
    batch = batch_of(step)
    assert len(batch["memory"]) == 10 and step.counts(batch) == {"cross_entropy": 20, "old_answers": 30}
    inputs = torch.cat([batch["inputs"], batch["memory"]])
    then, now = two_heads()(inputs, "old"), step.student(inputs, "old")
    wanted = F.cross_entropy(step.student(batch["inputs"], "new"), batch["labels"]) + 0.7 * kl(then, now, 3.0).mean()
    torch.testing.assert_close(loss_of(step, batch).double(), wanted.double(), rtol=1e-4, atol=1e-5)


def test_at_the_start_nothing_is_forgotten() -> None:
    step = make().eval()
    assert step(batch_of(step))["old_answers"].item() == pytest.approx(0, abs=1e-4)


def test_forgets_less_than_plain_fine_tuning() -> None:
    kept, plain = two_heads(), two_heads()
    known = old_accuracy(kept)
    fit(make(kept, weight=5.0), 10, patience=0)
    fit(make(plain, weight=0.0), 10, patience=0)
    for heads in (kept, plain):
        assert accuracy(NEW)(heads.eval())["accuracy"] > 0.85, "both learned the new task"
    assert known > 0.85
    assert old_accuracy(kept) > old_accuracy(plain) + 0.1, (known, old_accuracy(kept), old_accuracy(plain))


def test_a_memory_helps_further() -> None:
    memory, without = two_heads(), two_heads()
    fit(make(memory, weight=5.0, memory=OLD["inputs"][:30]), 10, patience=0)
    fit(make(without, weight=5.0), 10, patience=0)

    def drift(heads: Heads) -> float:
        now, then = heads.eval()(OLD_HELD["inputs"], "old"), two_heads().eval()(OLD_HELD["inputs"], "old")
        return float(kl(then, now).mean().detach())

    assert drift(memory) < 0.7 * drift(without)


def test_the_old_network_stands_still_and_is_not_saved() -> None:
    student = two_heads(norm=True)
    step = make(student, memory=OLD["inputs"][:30])
    before = flat(step.before[0])
    fit(step, 2)
    assert torch.equal(flat(step.before[0]), before) and not torch.equal(flat(student), before)
    assert all(parameter.grad is None for parameter in step.before[0].parameters())
    assert not any(module.training for module in step.before[0].modules())
    assert not [name for name in step.state_dict() if "before" in name]


def herding(features: np.ndarray, count: int) -> list[int]:
    """Return iCaRL's algorithm 4, word for word."""
    mean, chosen = features.mean(0), []
    for k in range(1, count + 1):
        best, least = -1, np.inf
        for row in range(len(features)):
            if row not in chosen:
                distance = np.linalg.norm(mean - (features[row] + features[chosen].sum(0)) / k)
                if distance < least - 1e-9:
                    best, least = row, distance
        chosen.append(best)
    return chosen


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_herding_equals_the_slow_algorithm(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # two rows of a class are as near to their mean, so there are four or five
    features, labels = torch.randn(14, 3, generator=generator), torch.arange(14) % 3
    found, wanted = choose_exemplars(features, labels, count).tolist(), []
    for label in labels.unique():
        rows = (labels == label).nonzero()[:, 0]
        order = herding(features[rows].double().numpy(), min(count, len(rows)))
        wanted += [int(rows[row]) for row in order]
    assert found == wanted


def test_herding_of_tiny_sets_by_brute_force() -> None:
    """One exemplar is the best of all; each next one the best there is with those before; no row twice."""
    features = torch.randn(6, 2, generator=torch.Generator().manual_seed(4))
    mean = features.mean(0)

    def distance(rows: tuple[int, ...]) -> float:
        return float((features[list(rows)].mean(0) - mean).norm())

    chosen = tuple(choose_exemplars(features, torch.zeros(6, dtype=torch.int64), 3).tolist())
    for count in (1, 2, 3):
        same = [rows for rows in permutations(range(6), count) if rows[:-1] == chosen[: count - 1]]
        assert chosen[:count] == min(same, key=distance)
    everything = choose_exemplars(features, torch.tensor([0, 0, 0, 7, 7, 7]), 99)
    assert sorted(everything.tolist()) == list(range(6))


@pytest.mark.parametrize(
    ("features", "labels", "per_class", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(4), 0, r"per_class: wanted at least 1, got 0"),
        (torch.zeros(4, 2), torch.zeros(3), 1, r"features, labels: wanted \[N, D\] and \[N\].*got \(4, 2\) and \(3,\)"),
        (torch.zeros(4), torch.zeros(4), 1, r"features, labels: wanted"),
        (torch.zeros(0, 2), torch.zeros(0), 1, r"features, labels: wanted .* N > 0"),
    ],
)
def test_exemplars_of_what_does_not_fit(features: Tensor, labels: Tensor, per_class: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_exemplars(features, labels, per_class)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"new: wanted one of old, new beside an old head, got 'newest'"):
        make(new="newest")
    with pytest.raises(ValueError, match=r"new: wanted one of new beside an old head"):
        make(Heads(nn.Identity(), {"new": nn.Linear(4, 4)}))
    with pytest.raises(ValueError, match=r"memory: wanted rows, or None, got 0 rows"):
        make(memory=OLD["inputs"][:0])
    with pytest.raises(ValueError, match=r"temperature: wanted a finite number > 0, got 0.0"):
        step = make(temperature=0.0)
        step(batch_of(step))


def test_memory_rows_are_shared_out_between_processes() -> None:
    step = make(memory=OLD["inputs"][:30]).eval()
    with torch.no_grad():
        for parameter in step.student.parameters():
            parameter.add_(0.1)
    batch = batch_of(step)
    parts = [step(step.shard(batch, rank, 2)) for rank in range(2)]
    for name, whole in step(copy.copy(batch)).items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole, rtol=1e-4, atol=1e-4)
