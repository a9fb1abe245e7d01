"""Several teachers: weights against their formulas, mixtures, and a step for every strategy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from torch import Tensor

from kdcore.losses import soft_targets
from kdcore.teaching import (
    SeveralTeachersStep,
    Term,
    agreement_weights,
    confidence_weights,
    easiest,
    labels_term,
    mixture,
)
from tests.kdcore.teaching.problems import FAST, accuracy, batch_of, blobs, fit, improves, kl, network, trained

DATA, HELD = blobs(120), blobs(90, seed=1)
law = settings(max_examples=25, deadline=None)


def logits(seed: int = 0, teachers: int = 3, rows: int = 5, classes: int = 4, scale: float = 2.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, classes, generator=generator) for _ in range(teachers)]


@given(st.integers(0, 10**6), st.integers(2, 4), st.sampled_from([0.1, 1.0, 30.0]))
@law
def test_confidence_with_labels_is_the_papers_formula(seed: int, teachers: int, scale: float) -> None:
    said = logits(seed, teachers, scale=scale)
    labels = torch.tensor([0, 1, 2, 3, 0])
    errors = np.stack([-log_softmax(each.double().numpy(), 1)[np.arange(5), labels.numpy()] for each in said])
    wanted = (1 - softmax(errors, 0)) / (teachers - 1)
    found = confidence_weights(said, labels)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


@given(st.integers(0, 10**6))
@law
def test_confidence_without_labels_goes_by_entropy(seed: int) -> None:
    said = logits(seed)
    p = np.stack([softmax(each.double().numpy(), 1) for each in said])
    np.testing.assert_allclose(confidence_weights(said), softmax((p * np.log(p)).sum(2), 0), atol=1e-6)


@given(st.integers(0, 10**6))
@law
def test_agreement_is_a_softmax_of_minus_the_divergence_from_the_mean(seed: int) -> None:
    said = logits(seed)
    p = np.stack([softmax(each.double().numpy(), 1) for each in said])
    mean = p.mean(0)
    wanted = softmax(-(mean * np.log(mean / p)).sum(2), 0)
    np.testing.assert_allclose(agreement_weights(said), wanted, atol=1e-6)


def test_an_outlier_counts_less_and_the_surest_more() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.1, 0.0, 0.0]])
    assert agreement_weights([sure, sure, sure.roll(1, 1)])[2] < 0.1
    assert confidence_weights([sure, unsure])[0] > 0.7
    assert confidence_weights([sure, unsure], torch.tensor([1]))[0] < 0.01, "sure, but wrong"
    assert confidence_weights([sure]).tolist() == [[1.0]]
    excluded = torch.tensor([[2.0, -math.inf, 0.0]])
    assert bool(confidence_weights([excluded, excluded]).isfinite().all())


@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 4.0]))
@law
def test_a_mixture_is_the_mean_of_the_tempered_probabilities(seed: int, temperature: float) -> None:
    said = logits(seed)
    weights = torch.from_numpy(softmax(np.random.default_rng(seed).normal(size=(3, 5)), 0)).float()
    found = mixture(said, weights, temperature)
    p = np.stack([softmax(each.double().numpy() / temperature, 1) for each in said])
    wanted = (weights.double().numpy()[:, :, None] * p).sum(0)
    np.testing.assert_allclose(torch.softmax(found / temperature, 1), wanted, atol=1e-6)
    student = logits(seed + 1, 1)[0]
    q = log_softmax(student.double().numpy() / temperature, 1)
    divergence = temperature**2 * (wanted * (np.log(wanted) - q)).sum(1)
    got = soft_targets(student, found, temperature=temperature, reduction="none")
    np.testing.assert_allclose(got, divergence, rtol=1e-4, atol=1e-5)


def test_a_mixture_of_one_teacher_is_that_teacher() -> None:
    a, b = logits(teachers=2)
    weights = torch.tensor([[0.0], [1.0]]).expand(2, 5)
    found = mixture([a.requires_grad_(), b], weights, 2.0)
    torch.testing.assert_close(torch.log_softmax(found, 1), torch.log_softmax(b, 1))
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("weights", "temperature", "message"),
    [
        (torch.full((3, 5), 1 / 3), 0.0, r"temperature: wanted a number > 0, got 0.0"),
        (torch.full((3, 5), 1 / 3), math.nan, r"temperature: wanted a number > 0, got nan"),
        (torch.full((2, 5), 0.5), 1.0, r"weights: wanted shape \(3, 5\), got \(2, 5\)"),
        (torch.full((3, 5), 0.3), 1.0, r"weights: wanted numbers >= 0 that sum to 1 a row, got sums 0.9"),
        (torch.tensor([[-1.0], [1.0], [1.0]]).expand(3, 5), 1.0, r"weights: wanted numbers >= 0"),
        (torch.full((3, 5), math.nan), 1.0, r"weights: wanted numbers >= 0 .*got sums nan"),
    ],
)
def test_mixtures_that_are_none_are_refused(weights: Tensor, temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture(logits(), weights, temperature)


def test_teachers_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"teachers: wanted at least 1, got 0"):
        agreement_weights([])
    with pytest.raises(ValueError, match=r"teachers: wanted logits \[B, C\] of one shape, got \[\(5, 3\), \(5, 4\)\]"):
        confidence_weights([torch.zeros(5, 4), torch.zeros(5, 3)])


@pytest.mark.parametrize(("share", "wanted"), [(0.0, [1]), (0.5, [1, 3]), (0.6, [1, 3]), (1.0, [0, 1, 2, 3])])
def test_the_easiest_rows(share: float, wanted: list[int]) -> None:
    assert easiest(torch.tensor([3.0, 0.0, 2.0, 0.0]), share).nonzero()[:, 0].tolist() == wanted
    with pytest.raises(ValueError, match=r"share: wanted 0..1, got 1.5"):
        easiest(torch.zeros(2), 1.5)


def make(strategy: Any = "average", *, mask: bool = False, teachers: Any = None, **options: Any) -> SeveralTeachersStep:
    temperature = options.setdefault("temperature", 2.0)
    soft = Term(
        "soft", "soft_targets", options={"temperature": temperature or 1.0}, inputs={"mask": "easy"} if mask else {}
    )
    return SeveralTeachersStep(
        network(),
        DATA,
        [labels_term(0.2), soft],
        strategy=strategy,
        teachers=[trained(), trained(seed=8), network(5, seed=9).eval()] if teachers is None else teachers,
        validate=accuracy(HELD),
        learning=FAST,
        **options,
    )


@pytest.mark.parametrize("strategy", ["average", "random", "confidence", "agreement", "curriculum"])
def test_every_strategy_trains(strategy: str) -> None:
    step = make(strategy, mask=strategy == "curriculum", epochs=3)
    before = [each.state_dict() for each in step.teachers]
    improves(step, HELD)
    for teacher, state in zip(step.teachers, before, strict=True):
        torch.testing.assert_close(dict(teacher.state_dict()), dict(state), rtol=0, atol=0)


def test_average_is_taught_the_mean_of_what_the_teachers_say() -> None:
    step = make()
    batch = batch_of(step)
    p = torch.stack([torch.softmax(each(batch["inputs"]) / 2.0, 1) for each in step.teachers]).mean(0)
    wanted = kl(2.0 * p.log(), step.student(batch["inputs"]), 2.0).sum()
    torch.testing.assert_close(step(batch)["soft"].double(), wanted, rtol=1e-4, atol=1e-4)


def test_random_follows_one_teacher_a_batch_and_all_in_an_epoch() -> None:
    step = make("random")
    followed = []
    for batch in step.batches(0, torch.Generator().manual_seed(0)):
        found = torch.softmax(step.values(batch)["teacher"], 1)
        fits = [torch.allclose(found, torch.softmax(t(batch["inputs"]), 1), atol=1e-5) for t in step.teachers]
        assert sum(fits) == 1
        followed.append(fits.index(True))
        for rank in range(2):
            assert set(step.shard(batch, rank, 2)["drawn"].tolist()) == {followed[-1]}, "whichever process"
    assert len(set(followed)) > 1
    again = [int(batch["drawn"][0]) for batch in step.batches(0, torch.Generator().manual_seed(0))]
    assert again == followed, "a function of the generator alone"


def test_the_curriculum_begins_with_what_the_teachers_are_sure_of() -> None:
    step = make("curriculum", mask=True, first_share=0.25, epochs=3)
    shares = []
    for epoch in range(5):
        step.begin_epoch(epoch, torch.Generator())
        shares.append(float(step.share))
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    step.begin_epoch(1, torch.Generator())
    batch = batch_of(step)
    p = torch.stack([torch.softmax(each(batch["inputs"]), 1) for each in step.teachers])
    entropy = -(p * p.log()).sum(2).mean(0)
    easy = batch["easy"]
    assert int(easy.sum()) == 8 == step.counts(batch)["soft"] and step.counts(batch)["cross_entropy"] == 16
    assert entropy[easy].max() <= entropy[~easy].min()
    found, answers = step(batch)["soft"], step.student(batch["inputs"])
    mixed = 2.0 * torch.stack([torch.softmax(each(batch["inputs"]) / 2.0, 1) for each in step.teachers]).mean(0).log()
    torch.testing.assert_close(found.double(), kl(mixed, answers, 2.0)[easy].sum(), rtol=1e-4, atol=1e-4)


def test_two_processes_would_sum_to_what_one_does() -> None:
    for strategy in ("random", "curriculum", "confidence"):
        step = make(strategy, mask=strategy == "curriculum")
        step.eval()
        batch = batch_of(step)
        parts = [step(step.shard(batch, rank, 2)) for rank in range(2)]
        for name, whole in step(batch).items():
            torch.testing.assert_close(parts[0][name] + parts[1][name], whole, rtol=1e-4, atol=1e-4)


def test_confidence_goes_by_the_labels_where_there_are_some() -> None:
    wrong = trained()
    wrong[2].bias.data.copy_(wrong[2].bias + torch.tensor([0.0, 0.0, 100.0]))  # sure of one class, whatever it sees
    step = make("confidence", teachers=[trained(), wrong], temperature=1.0)
    batch = batch_of(step)
    others = batch["labels"] != 2
    found = torch.softmax(step.values(batch)["teacher"], 1)[others]
    assert float(found[:, 2].mean()) < 0.1
    blind = {name: rows for name, rows in batch.items() if name != "labels"}
    assert float(torch.softmax(step.values(blind)["teacher"], 1)[others][:, 2].mean()) > 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "vote"}, r"strategy: wanted one of average, random, .*, got 'vote'"),
        ({"teachers": [trained(rows=6)]}, r"teachers: wanted at least 2, got 1"),
        ({"first_share": 0.0}, r"first_share, epochs: wanted 0..1 and at least 1, got 0.0 and 1"),
        ({"epochs": 0}, r"first_share, epochs: .*got 0.3 and 0"),
        ({"temperature": 0.0}, r"temperature: wanted a number > 0, got 0.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_random_goes_on_where_it_was() -> None:
    one, two = make("random"), make("random")
    fit(one, 2)
    torch.rand(5)
    fit(two, 2)
    for a, b in zip(one.student.parameters(), two.student.parameters(), strict=True):
        assert torch.equal(a, b)
