"""Recommender losses: the probabilities they stand for, counted or enumerated; the samplers against exact chances."""

from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from kdcore.losses import (
    DistillationExperts,
    annealed_temperature,
    bpr,
    collaborative_distillation,
    pointwise_bce,
    position_weights,
    ranking_discrepancy_weights,
    ranking_distillation,
    relaxed_ranking,
    sample_interesting,
    student_guided_positions,
    student_guided_probabilities,
    teacher_guided_positions,
)

seeds = st.integers(0, 2**31)
law = settings(max_examples=25, deadline=None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


# Base losses.


def test_bpr_by_hand() -> None:
    assert bpr(torch.tensor([2.0]), torch.tensor([0.5])).item() == pytest.approx(math.log(1 + math.exp(-1.5)))
    assert bpr(torch.zeros(3), torch.zeros(3, 4)).item() == pytest.approx(math.log(2))
    # It must not saturate where 1 - sigmoid would: the gradient at a badly wrong pair is the full one.
    positive = torch.tensor([-200.0], requires_grad=True)
    bpr(positive, torch.tensor([200.0])).backward()
    assert positive.grad.item() == -1


def test_bpr_averages_the_valid_negatives() -> None:
    positive, negative = normal(3), normal(3, 4, seed=1)
    mask = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    got = bpr(positive, negative.masked_fill(~mask, torch.nan), mask=mask, reduction="none")
    want = [bpr(positive[b].expand(int(mask[b].sum())), negative[b, mask[b]]) for b in (0, 2)]
    torch.testing.assert_close(got, torch.stack([want[0], torch.zeros_like(want[0]), want[1]]))
    torch.testing.assert_close(bpr(positive, negative.masked_fill(~mask, torch.nan), mask=mask), sum(want) / 2)


def test_pointwise_bce_equals_torch() -> None:
    scores, labels = normal(5, 6), (normal(5, 6, seed=1) > 0).double()
    want = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    torch.testing.assert_close(pointwise_bce(scores, labels, reduction="none"), want.sum(1))
    torch.testing.assert_close(pointwise_bce(scores.flatten(), labels.flatten()), want.mean())


def test_pointwise_bce_keeps_its_digits_when_the_score_is_right_and_large() -> None:
    got = pointwise_bce(torch.tensor([30.0, -30.0]), torch.tensor([1.0, 0.0]), reduction="none")
    torch.testing.assert_close(got, torch.full((2,), math.exp(-30)), rtol=1e-5, atol=0)


# Ranking distillation.


def test_position_weights_by_hand() -> None:
    raw = [math.exp(-r / 2.0) for r in (1, 2, 3)]
    assert position_weights(3, 2.0).tolist() == pytest.approx([x / sum(raw) for x in raw])
    assert position_weights(1, 5.0).tolist() == [1.0]
    torch.testing.assert_close(position_weights(400, 0.5).sum(), torch.tensor(1.0))
    assert position_weights(4, 1e9).tolist() == pytest.approx([0.25] * 4)


@given(seed=seeds, mu=st.floats(0.01, 1), first_rank=st.integers(0, 1), n_items=st.integers(1, 5000))
@law
def test_discrepancy_weights_equal_counting(seed: int, mu: float, first_rank: int, n_items: int) -> None:
    # Rounded scores, so that ties occur: a tied item is not above.
    listed, sample = normal(4, 5, seed=seed).round(decimals=1), normal(4, 30, seed=seed + 1).round(decimals=1)
    got = ranking_discrepancy_weights(listed.requires_grad_(), sample, n_items=n_items, mu=mu, first_rank=first_rank)
    assert not got.requires_grad and got.dtype == torch.float32
    for b in range(4):
        for r in range(5):
            above = sum(s > listed[b, r].item() for s in sample[b].tolist())
            rank = (n_items - 1) * above // 30
            want = max(0.0, math.tanh(mu * (rank - (r + first_rank))))
            assert got[b, r].item() == pytest.approx(want, abs=1e-6)


def test_an_item_ranked_as_well_as_by_the_teacher_gets_no_weight() -> None:
    sample = torch.zeros(1, 10)
    assert ranking_discrepancy_weights(torch.ones(1, 3), sample, n_items=100).tolist() == [[0, 0, 0]]
    low = ranking_discrepancy_weights(-torch.ones(1, 3), sample, n_items=100)
    assert low.tolist() == [pytest.approx([math.tanh(9.9), math.tanh(9.8), math.tanh(9.7)])]


def test_ranking_distillation_is_linear_in_its_weights() -> None:
    scores, weights = normal(4, 5), normal(4, 5, seed=2).abs().requires_grad_()
    once = ranking_distillation(scores, weights=weights)
    torch.testing.assert_close(ranking_distillation(scores, weights=3 * weights), 3 * once)
    assert not once.requires_grad, "the weights are constants"
    only_first = ranking_distillation(scores, weights=torch.tensor([1.0, 0, 0, 0, 0]), reduction="none")
    torch.testing.assert_close(only_first, -F.logsigmoid(scores[:, 0]))
    with pytest.raises(ValueError, match=r"weights: wanted shape \(5,\) or \(4, 5\), got \(4,\)"):
        ranking_distillation(scores, weights=torch.ones(4))


# Collaborative distillation.


def test_collaborative_distillation_tempers_the_targets_only() -> None:
    student, teacher = normal(4, 6), normal(4, 6, seed=1) * 3
    got = collaborative_distillation(student, teacher, temperature=2.5)
    want = F.binary_cross_entropy_with_logits(student, torch.sigmoid(teacher / 2.5), reduction="none").sum(1).mean()
    torch.testing.assert_close(got, want)


@given(seed=seeds)
@law
def test_collaborative_distillation_is_smallest_at_the_teacher(seed: int) -> None:
    student, teacher = normal(4, 6, seed=seed), normal(4, 6, seed=seed + 1)
    best = collaborative_distillation(teacher, teacher, reduction="none")
    torch.testing.assert_close(best, torch.distributions.Bernoulli(logits=teacher).entropy().sum(1))
    assert (collaborative_distillation(student, teacher, reduction="none") >= best).all()


def test_student_guided_probabilities_by_hand() -> None:
    got = student_guided_probabilities(torch.tensor([[0, 5, 9]]), torch.tensor([[10, 5, 3]]), mu=0.1)
    assert got.tolist() == [pytest.approx([math.tanh(1.0), 0.0, 0.0])]


def test_student_guided_positions_follow_the_probabilities() -> None:
    teacher_rank = torch.arange(5).expand(40000, 5)
    student_rank = torch.tensor([3, 1, 12, 2, 30]).expand(40000, 5)
    positions, mask = student_guided_positions(teacher_rank, student_rank, 1, mu=0.05, generator=seeded())
    weights = [math.tanh(0.05 * x) for x in (3, 0, 10, 0, 26)]
    share = torch.bincount(positions[:, 0], minlength=5) / 40000
    assert mask.all()
    assert share.tolist() == pytest.approx([w / sum(weights) for w in weights], abs=0.01)


def test_student_guided_positions_mark_the_filling() -> None:
    teacher_rank = torch.arange(4).repeat(2, 1)
    student_rank = torch.tensor([[9, 1, 2, 3], [0, 1, 2, 3]])
    positions, mask = student_guided_positions(teacher_rank, student_rank, 3, mu=0.1, generator=seeded())
    assert mask.sum(1).tolist() == [1, 0]
    assert positions[0][mask[0]].tolist() == [0]
    assert all(len(set(row)) == 3 for row in positions.tolist())


# Relaxed ranking.


@given(seed=seeds)
@law
def test_relaxed_ranking_is_a_probability(seed: int) -> None:
    # exp(-loss) is the chance that a Plackett-Luce draw starts with that list: over all lists it sums to 1.
    scores = normal(5, seed=seed) * 2
    for k in (1, 3, 5):
        lists = torch.tensor(list(permutations(range(5), k)))
        rest = torch.tensor([[i for i in range(5) if i not in row] for row in lists.tolist()], dtype=torch.int64)
        losses = relaxed_ranking(scores[lists], scores[rest.reshape(len(lists), 5 - k)], reduction="none")
        assert (-losses).exp().sum().item() == pytest.approx(1)


@given(seed=seeds)
@law
def test_relaxed_ranking_does_not_order_the_uninteresting(seed: int) -> None:
    interesting, uninteresting = normal(3, 4, seed=seed), normal(3, 6, seed=seed + 1)
    order = torch.randperm(6, generator=seeded(seed))
    want = relaxed_ranking(interesting, uninteresting)
    torch.testing.assert_close(relaxed_ranking(interesting, uninteresting[:, order]), want)
    ordered = interesting.sort(1, descending=True).values
    assert relaxed_ranking(ordered, uninteresting) <= want + 1e-12, "the right order costs least"


def test_relaxed_ranking_pushes_the_list_above_the_rest() -> None:
    interesting, uninteresting = torch.zeros(1, 5, requires_grad=True), torch.zeros(1, 20, requires_grad=True)
    optimizer = torch.optim.SGD([interesting, uninteresting], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        relaxed_ranking(interesting, uninteresting).backward()
        optimizer.step()
    assert (interesting.diff(dim=1) < 0).all(), "in the teacher's order"
    assert interesting.min() > uninteresting.max()
    assert uninteresting.std() < 1e-5


def test_relaxed_ranking_does_not_overflow() -> None:
    interesting = torch.tensor([[500.0, -500.0, 90.0]], requires_grad=True)
    value = relaxed_ranking(interesting, torch.tensor([[100.0, -1000.0]]))
    value.backward()
    assert value.item() == pytest.approx(600 + 10, abs=1e-3)
    assert interesting.grad.isfinite().all()


def test_a_masked_tail_with_nothing_uninteresting() -> None:
    scores = normal(2, 5).requires_grad_()
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    got = relaxed_ranking(scores, torch.empty(2, 0, dtype=torch.float64), mask=mask)
    torch.testing.assert_close(got, relaxed_ranking(scores[:, :2], scores[:, 2:3]))
    with torch.autograd.set_detect_anomaly(True):  # no NaN on the way either
        relaxed_ranking(scores, torch.empty(2, 0, dtype=torch.float64), mask=mask).backward()
    assert scores.grad[:, :3].isfinite().all() and torch.equal(scores.grad[:, 3:], torch.zeros_like(scores[:, 3:]))


# Samplers.


def exact_inclusion(n: int, k: int, temperature: float) -> list[float]:
    """The chance that each rank is in the list, by enumeration of all draws without replacement."""
    weights = [math.exp(-rank / temperature) for rank in range(n)]
    chance = [0.0] * n
    for draw in permutations(range(n), k):
        probability, left = 1.0, sum(weights)
        for rank in draw:
            probability *= weights[rank] / left
            left -= weights[rank]
        for rank in draw:
            chance[rank] += probability
    return chance


@pytest.mark.parametrize("sampler", [sample_interesting, teacher_guided_positions])
def test_sampler_has_the_exact_chances(sampler: type(sample_interesting)) -> None:
    drawn = sampler(60000, 6, 3, 2.0, seeded())
    share = torch.bincount(drawn.flatten(), minlength=6) / 60000
    assert share.tolist() == pytest.approx(exact_inclusion(6, 3, 2.0), abs=0.01)


@given(seed=seeds, n_list=st.integers(1, 60), temperature=st.floats(0.01, 1e4), data=st.data())
@law
def test_sampled_positions_are_ascending_and_distinct(
    seed: int, n_list: int, temperature: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, n_list))
    drawn = sample_interesting(7, n_list, k, temperature, seeded(seed))
    assert drawn.shape == (7, k) and drawn.dtype == torch.int64
    assert (drawn.diff(dim=1) > 0).all() and drawn.min() >= 0 and drawn.max() < n_list
    assert torch.equal(drawn, sample_interesting(7, n_list, k, temperature, seeded(seed)))


def test_sampling_none_takes_the_top_of_the_list() -> None:
    drawn = sample_interesting(2, 50, 3, 10.0, seeded(), sampling="none")
    assert drawn.tolist() == [[0, 1, 2], [0, 1, 2]]
    drawn[0, 0] = 7
    assert drawn[1, 0] == 0, "rows must not share memory"


# Distillation experts.


def test_annealed_temperature() -> None:
    assert annealed_temperature(0, 10) == 1.0
    assert annealed_temperature(5, 10) == pytest.approx(1e-5)
    assert annealed_temperature(10, 10) == pytest.approx(1e-10)
    assert annealed_temperature(1, 2, start=4.0, end=1.0) == pytest.approx(2.0)


def experts(seed: int = 0, m: int = 6) -> DistillationExperts:
    torch.manual_seed(seed)
    return DistillationExperts(4, 7, n_experts=m)


@pytest.mark.parametrize("temperature", [1.0, 1e-5, 1e-10])
def test_experts_stay_finite_when_cold(temperature: float) -> None:
    module = experts()
    student = torch.randn(20000, 4, generator=seeded()).requires_grad_()
    teacher = torch.randn(20000, 7, generator=seeded(1)) * 50
    value = module(student, teacher, temperature=temperature, generator=seeded(2))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_the_cold_gate_picks_experts_with_the_chances_of_the_gate() -> None:
    module = experts()
    teacher = torch.randn(1, 7, generator=seeded()).expand(30000, 7)
    z = module.selection(teacher, temperature=1e-10, generator=seeded(1))
    assert torch.equal(z.max(1).values, torch.ones(30000))
    torch.testing.assert_close(z.mean(0), module.gate(teacher[0]).softmax(0), rtol=0, atol=0.012)


def test_the_noise_comes_from_the_generator_and_leaves_in_evaluation() -> None:
    module = experts()
    student, teacher = torch.randn(8, 4, generator=seeded()), torch.randn(8, 7, generator=seeded(1))

    def value(seed: int) -> float:
        return module(student, teacher, temperature=0.5, generator=seeded(seed)).item()

    assert value(1) == value(1) != value(2)
    module.eval()
    assert value(1) == value(2)
    torch.testing.assert_close(
        module.selection(teacher, temperature=0.5), (module.gate(teacher).log_softmax(1) / 0.5).softmax(1)
    )


def test_the_gate_does_not_round_under_autocast() -> None:
    module = experts().eval()
    teacher = torch.randn(500, 7, generator=seeded())
    want = module.selection(teacher, temperature=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module.selection(teacher, temperature=1e-3)
    assert torch.equal(got, want)


def test_gradients_of_the_experts_and_the_gate() -> None:
    module = DistillationExperts(2, 3, n_experts=2).double()
    student, teacher = normal(3, 2), normal(3, 3, seed=1)
    names, values = zip(*module.named_parameters(), strict=True)

    def function(*parameters: Tensor) -> Tensor:
        inputs = {"temperature": 0.8, "generator": seeded(3)}
        parameters_by_name = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, parameters_by_name, (student, teacher), inputs)

    assert torch.autograd.gradcheck(function, values)


def test_experts_start_like_linear_layers() -> None:
    module = DistillationExperts(40, 60, n_experts=8)
    assert module.second.abs().max() <= 50**-0.5
    assert module.second.std().item() == pytest.approx(50**-0.5 / math.sqrt(3), rel=0.05)
    assert module.first.weight.abs().max() <= 40**-0.5


def test_experts_learn_a_teacher_the_student_can_explain() -> None:
    module = experts(m=3)
    student = torch.randn(256, 4, generator=seeded())
    teacher = torch.tanh(student @ torch.randn(4, 7, generator=seeded(1)))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    generator, first = seeded(2), 0.0
    for step in range(150):
        loss = module(student, teacher, temperature=annealed_temperature(step, 150), generator=generator)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.25 * first


def test_out_of_range_options_are_named() -> None:
    module = experts()
    wrong: list[tuple[str, object]] = [
        (r"n: wanted at least 1, got 0", lambda: position_weights(0)),
        (r"lam: wanted a finite number > 0, got 0", lambda: position_weights(3, 0)),
        (r"k: wanted 1..5 .*got 6", lambda: sample_interesting(2, 5, 6, 1.0, seeded())),
        (r"temperature: .*got 0", lambda: sample_interesting(2, 5, 3, 0.0, seeded())),
        (r"sampling: .*got 'top'", lambda: sample_interesting(2, 5, 3, 1.0, seeded(), sampling="top")),
        (
            r"student_sample: wanted shape \(2, Q >= 1\), got \(2, 0\)",
            lambda: ranking_discrepancy_weights(torch.zeros(2, 3), torch.zeros(2, 0), n_items=9),
        ),
        (
            r"k: wanted 1..3 .*got 4",
            lambda: student_guided_positions(torch.zeros(1, 3), torch.zeros(1, 3), 4, mu=0.1, generator=seeded()),
        ),
        (r"mu: .*got 0", lambda: student_guided_probabilities(torch.zeros(1, 3), torch.zeros(1, 3), mu=0)),
        (r"epoch: wanted 0..5, got 6", lambda: annealed_temperature(6, 5)),
        (r"n_experts: wanted at least 1, got 0", lambda: DistillationExperts(2, 2, n_experts=0)),
        (
            r"student: wanted shape \(2, 4\), got \(2, 7\)",
            lambda: module(torch.zeros(2, 7), torch.zeros(2, 7), temperature=1.0),
        ),
        (r"temperature: .*got 0", lambda: module(torch.zeros(2, 4), torch.zeros(2, 7), temperature=0.0)),
        (r"negative: wanted 2 rows", lambda: bpr(torch.zeros(2), torch.zeros(3))),
        (r"uninteresting: wanted 2 rows", lambda: relaxed_ranking(torch.zeros(2, 3), torch.zeros(3, 3))),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
