"""Several teachers as one: averages by hand and by scipy, on scales that differ, with items excluded."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, zscore
from torch import Tensor

from kdcore.config import UserError
from kdcore.losses import soft_targets
from kdcore.teaching import TeacherEnsemble, average_scores, average_soft_targets, blend_weights, normalise_scores

MODES = ["none", "zscore", "rank", "softmax"]
seeds = st.integers(0, 2**31)
law = settings(max_examples=25, deadline=None)


def scores(seed: int = 0, rows: int = 3, items: int = 8) -> Tensor:
    return torch.randn(rows, items, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_are_scaled_to_one() -> None:
    assert blend_weights(None, 4) == (0.25,) * 4
    assert blend_weights([1, 3], 2) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("weights", "n", "message"),
    [
        (None, 0, r"teachers: wanted at least 1, got 0"),
        ([1.0], 2, r"weights: wanted 2 \(one a teacher\), got 1"),
        ([1.0, -0.5], 2, r"weights: wanted finite numbers >= 0.*-0.5"),
        ([0.0, 0.0], 2, r"weights: wanted finite numbers >= 0, one of them > 0"),
        ([math.nan, 1.0], 2, r"weights: wanted finite numbers"),
        ([math.inf, 1.0], 2, r"weights: wanted finite numbers"),
    ],
)
def test_bad_weights_are_named(weights: list[float] | None, n: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        blend_weights(weights, n)


def test_plain_average_by_hand() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 10.0]])
    assert average_scores([a, b]).tolist() == [[2.0, 6.0]]
    assert average_scores([a, b], weights=[3, 1]).tolist() == [[1.5, 4.0]]
    assert a.tolist() == [[1.0, 2.0]], "the inputs stay as they are"


@given(seed=seeds)
@law
def test_zscore_and_rank_equal_scipy(seed: int) -> None:
    values = scores(seed).round(decimals=0)  # ties
    values[:, 0] += 0.5  # no constant row
    got = normalise_scores(values, "zscore")
    torch.testing.assert_close(got, torch.from_numpy(zscore(values.numpy(), axis=1)))
    got = normalise_scores(values, "rank")
    torch.testing.assert_close(got, torch.from_numpy((rankdata(values.numpy(), axis=1) - 1) / 7))


@pytest.mark.parametrize("mode", ["zscore", "rank"])
@given(seed=seeds, scale=st.floats(0.01, 1000), shift=st.floats(-1000, 1000))
@law
def test_the_scale_of_a_teacher_does_not_matter(mode: str, seed: int, scale: float, shift: float) -> None:
    a, b = scores(seed), scores(seed + 1)
    want = average_scores([a, b], normalise=mode)
    got = average_scores([a * scale + shift, b], normalise=mode)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", MODES)
def test_order_of_the_teachers_does_not_matter(mode: str) -> None:
    a, b, c = scores(0), scores(1), scores(2)
    want = average_scores([a, b, c], weights=[1, 2, 3], normalise=mode)
    torch.testing.assert_close(average_scores([c, a, b], weights=[3, 1, 2], normalise=mode), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1e6, 1e-20])
def test_a_constant_row_says_nothing(dtype: torch.dtype, value: float) -> None:
    constant = torch.full((2, 7), value, dtype=dtype)
    assert torch.equal(normalise_scores(constant, "zscore"), torch.zeros(2, 7, dtype=dtype))
    assert torch.equal(normalise_scores(constant, "rank"), torch.full((2, 7), 0.5, dtype=dtype))


@pytest.mark.parametrize("mode", ["none", "zscore", "rank"])
def test_excluded_items_stay_out_and_out_of_the_statistics(mode: str) -> None:
    values = scores()
    keep = torch.tensor([True, True, False, True, False, True, True, True])
    got = normalise_scores(values.masked_fill(~keep, -torch.inf), mode)
    torch.testing.assert_close(got[:, keep], normalise_scores(values[:, keep], mode))
    assert (got[:, ~keep] == -torch.inf).all()
    blended = average_scores([values, values.masked_fill(~keep, -torch.inf)], normalise=mode)
    assert (blended[:, ~keep] == -torch.inf).all() and blended[:, keep].isfinite().all()
    everything = torch.full((1, 4), -torch.inf)
    assert torch.equal(normalise_scores(everything, mode), everything)


def test_softmax_gives_a_mixture_of_probabilities() -> None:
    a, b = scores(0), scores(1)
    got = average_scores([a, b], weights=[1, 3], normalise="softmax")
    torch.testing.assert_close(got, a.softmax(1) / 4 + b.softmax(1) * 3 / 4)
    torch.testing.assert_close(got.log(), average_soft_targets([a, b], weights=[1, 3]))


def test_a_teacher_of_weight_zero_is_left_out() -> None:
    broken = torch.full((3, 8), torch.nan, dtype=torch.float64)
    assert torch.equal(average_scores([scores(), broken], weights=[1, 0]), scores())
    assert average_soft_targets([scores(), broken], weights=[1, 0]).isfinite().all()


@given(seed=seeds, temperature=st.floats(0.3, 10))
@law
def test_mixture_of_tempered_distributions(seed: int, temperature: float) -> None:
    teachers = [scores(seed + i) * 3 for i in range(3)]
    got = average_soft_targets(teachers, weights=[1, 2, 1], temperature=temperature)
    want = sum(w * (t / temperature).softmax(1) for w, t in zip((0.25, 0.5, 0.25), teachers, strict=True))
    torch.testing.assert_close(got.exp(), want)
    # As the docstring says: T times the result is a teacher whose tempered distribution is the mixture.
    student = scores(seed + 9)
    loss = soft_targets(student, temperature * got, temperature=temperature, reduction="none")
    log_q = (student / temperature).log_softmax(1)
    torch.testing.assert_close(loss, temperature**2 * (want * (want.log() - log_q)).sum(1))


def test_mixture_stays_finite_where_a_probability_underflows() -> None:
    sharp = torch.tensor([[1000.0, 0.0, -1000.0]])
    got = average_soft_targets([sharp, sharp])
    torch.testing.assert_close(got, torch.tensor([[0.0, -1000.0, -2000.0]]))


@pytest.mark.parametrize("mode", MODES)
def test_the_ensemble_is_the_average_of_its_teachers(mode: str) -> None:
    table = [scores(0, rows=10), scores(1, rows=10) * 100]
    ensemble = TeacherEnsemble([lambda users, t=t: t[users] for t in table], weights=[1, 2], normalise=mode)
    users = torch.tensor([4, 1, 7])
    want = average_scores([t[users] for t in table], weights=[1, 2], normalise=mode)
    torch.testing.assert_close(ensemble(users), want)


def test_the_ensemble_asks_each_teacher_once_without_gradient() -> None:
    layer = torch.nn.Linear(2, 3)
    calls: list[str] = []

    def first(values: Tensor, *, k: int) -> Tensor:
        calls.append("first")
        assert k == 5 and not torch.is_grad_enabled()
        return layer(values)

    def never(values: Tensor, *, k: int) -> Tensor:
        calls.append("never")
        return layer(values)

    got = TeacherEnsemble([first, never], weights=[2.0, 0.0], normalise="none")(torch.ones(1, 2), k=5)
    assert calls == ["first"] and not got.requires_grad
    torch.testing.assert_close(got, layer(torch.ones(1, 2)).detach())


def test_what_does_not_fit_is_named() -> None:
    a, b = scores(), scores(items=7)
    with pytest.raises(UserError, match=r"scores: wanted shape \(3, 8\) of every teacher, got \(3, 7\)"):
        average_scores([a, b])
    with pytest.raises(UserError, match=r"scores: wanted shape \(3, 8\) of every teacher, got \(3, 7\)"):
        average_soft_targets([a, b])
    with pytest.raises(UserError, match=r"scores: wanted shape \(3, 8\) of every teacher, got \(3, 7\)"):
        TeacherEnsemble([lambda: a, lambda: b])()
    with pytest.raises(UserError, match=r"teachers: wanted at least 1, got 0"):
        average_scores([])
    with pytest.raises(UserError, match=r"normalise: wanted one of none, zscore, rank, softmax, got 'minmax'"):
        average_scores([a], normalise="minmax")
    with pytest.raises(UserError, match=r"normalise: .*got 'minmax'"):
        TeacherEnsemble([lambda: a], normalise="minmax")
    with pytest.raises(UserError, match=r"scores: wanted floating \[B, N\], got torch.int64 \(3, 8\)"):
        average_scores([a.long()])
    with pytest.raises(UserError, match=r"temperature: wanted a finite number > 0, got 0"):
        average_soft_targets([a], temperature=0)
