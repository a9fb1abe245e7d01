"""Several teachers as one: averages against a plain loop, weights, and what does not go together."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apps.speech.models.ensemble import Ensemble, Member, average, confidence, error_weights
from kdcore.config import UserError

AB = ("a", "b")


def posteriors(batch: int, time: int, classes: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, time, classes, generator=generator) * scale).log_softmax(-1)


def member(name: str, **options: object) -> Member:
    return Member(name, **({"symbols": AB} | options))  # type: ignore[arg-type]


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=4).filter(lambda each: sum(each) > 1e-3),
    scale=st.sampled_from([0.1, 3.0, 300.0]),
)
@settings(max_examples=40, deadline=None)
def test_average_is_the_log_of_the_mean_of_probabilities(weights, scale):
    given_ = [posteriors(2, 5, 4, seed, scale) for seed in range(len(weights))]
    got = average(given_, torch.tensor(weights))
    shares = np.array(weights) / sum(weights)
    expected = sum(share * np.exp(each.double().numpy()) for share, each in zip(shares, given_, strict=True))
    np.testing.assert_allclose(got.exp().numpy(), expected, atol=1e-6)
    torch.testing.assert_close(got.logsumexp(-1), torch.zeros(2, 5), atol=1e-5, rtol=0)


def test_weights_may_be_of_each_utterance_and_no_gradient_goes_to_a_teacher():
    first, second = posteriors(2, 5, 4, 0), posteriors(2, 5, 4, 1).requires_grad_()
    got = average([first, second], torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    torch.testing.assert_close(got[0], first[0])
    torch.testing.assert_close(got[1], second[1].detach())
    assert not got.requires_grad


def test_impossible_symbols_stay_so():
    sure = torch.tensor([[[0.0, -math.inf, -math.inf]]])
    got = average([sure, sure], torch.tensor([1.0, 1.0]))
    assert got.exp().tolist() == [[[1.0, 0.0, 0.0]]] and not got.isnan().any()


@pytest.mark.parametrize(
    ("shapes", "weights", "message"),
    [
        ([], [], "log_probs: got"),
        ([(1, 2, 3), (1, 3, 3)], [1, 1], r"got \[\[1, 2, 3\], \[1, 3, 3\]\]"),
        ([(2, 3)], [1], "log_probs: got"),
        ([(2, 2, 3)], [1, 1], r"weights: got \[2\], wanted \[1\] or \[1, 2\]"),
        ([(1, 2, 3)] * 2, [1, -1], "wanted at least 0"),
        ([(1, 2, 3)] * 2, [0, 0], "not all 0"),
        ([(1, 2, 3)] * 2, [1, math.nan], "wanted at least 0"),
    ],
)
def test_what_cannot_be_averaged_is_refused(shapes, weights, message):
    with pytest.raises(ValueError, match=message):
        average([torch.zeros(shape) for shape in shapes], torch.tensor(weights, dtype=torch.float32))


def test_error_weights():
    torch.testing.assert_close(error_weights([0.1, 0.2]), torch.tensor([2 / 3, 1 / 3]))
    # one without an error counts as one of a tenth of a percent
    torch.testing.assert_close(error_weights([0.0, 0.001, 0.002]), torch.tensor([0.4, 0.4, 0.2]))
    with pytest.raises(ValueError, match="wanted word error rates"):
        error_weights([-0.1])


def test_confidence_is_of_the_frames_that_speak():
    rows = torch.tensor(
        [
            [[0.6, 0.3, 0.1], [0.0, 0.01, 0.99], [0.1, 0.8, 0.1], [0.99, 0.01, 0.0]],
            [[0.1, 0.1, 0.8], [0.25, 0.25, 0.5], [0.9, 0.1, 0.0], [0.9, 0.1, 0.0]],
            [[0.9, 0.1, 0.0]] * 4,
        ]
    )
    got = confidence(rows.log(), torch.tensor([3, 2, 0]))
    torch.testing.assert_close(got, torch.tensor([math.sqrt(0.6 * 0.8), math.sqrt(0.8 * 0.5), 1.0]))


def test_an_ensemble_weighs_by_what_it_is_told():
    given_, lengths = [posteriors(2, 6, 3, seed) for seed in range(2)], torch.tensor([6, 4])
    members = [member("one", error=0.1), member("two", error=0.3)]
    torch.testing.assert_close(Ensemble(members).log_probs(given_, lengths), average(given_, torch.tensor([0.5, 0.5])))
    torch.testing.assert_close(
        Ensemble(members, "error").log_probs(given_, lengths), average(given_, torch.tensor([0.75, 0.25]))
    )
    sure = torch.stack([confidence(each, lengths) for each in given_])
    torch.testing.assert_close(Ensemble(members, "confidence").log_probs(given_, lengths), average(given_, sure))
    assert (sure[0] / sure[1] - 1).abs().max() > 0.01


@pytest.mark.parametrize(
    ("members", "by", "message"),
    [
        ([], "equal", "no teachers"),
        ([member("one"), member("one")], "equal", "'one' stands there twice"),
        ([member("one"), member("two", symbols=("a", "c"))], "equal", "two has other units than one: symbol 1 is 'c'"),
        ([member("one"), member("two", symbols=("a",))], "equal", "1 symbols, wanted 2"),
        ([member("one"), member("two", frame_ms=20)], "equal", "frames of 20 ms, one of 40 ms"),
        ([member("one")], "wer", "by: got 'wer', wanted one of equal, error, confidence"),
        ([member("one", error=0.1), member("two")], "error", "two: error: got None"),
        ([member("one", error=math.nan)], "error", "one: error: got nan"),
    ],
)
def test_teachers_that_do_not_go_together_are_refused(members, by, message):
    with pytest.raises(UserError, match=message):
        Ensemble(members, by)


def test_what_is_given_is_of_the_members():
    ensemble = Ensemble([member("one"), member("two")])
    with pytest.raises(ValueError, match="of 1, wanted of 2 teachers"):
        ensemble.log_probs([torch.zeros(1, 2, 3)], torch.tensor([2]))
    with pytest.raises(ValueError, match=r"got \[3, 4\] classes, wanted 3 of each"):
        ensemble.log_probs([torch.zeros(1, 2, 3), torch.zeros(1, 2, 4)], torch.tensor([2]))
