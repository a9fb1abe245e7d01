from __future__ import annotations

import numpy as np
import pytest

from apps.speech.decode.ctc import ctc_log_probability
from apps.speech.decode.nbest import n_best
from tests.speech.decode.made import Characters, an4_texts, enumerate_all, noisy, posteriors


@pytest.mark.parametrize("seed", range(12))
def test_a_wide_beam_finds_the_true_n_best(seed: int) -> None:
    rng = np.random.default_rng(seed)
    log_probs = noisy(int(rng.integers(1, 7)), int(rng.integers(2, 5)), rng, scale=1.0)
    expected = sorted(enumerate_all(log_probs).items(), key=lambda item: -item[1])[:5]
    found = n_best(log_probs, 5, beam=5000, threshold=1e4)
    assert [hypothesis.ids for hypothesis in found] == [ids for ids, _ in expected]
    assert [hypothesis.score for hypothesis in found] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_real_texts_are_found_with_exact_scores() -> None:
    units, rng = Characters(), np.random.default_rng(1)
    for text in an4_texts("train")[:20]:
        ids = units.encode(text)
        log_probs = posteriors(ids, 29, rng)
        found = n_best(log_probs, 4)
        assert len(found) == len({hypothesis.ids for hypothesis in found}) == 4
        assert tuple(ids) in {hypothesis.ids for hypothesis in found}
        for hypothesis in found:
            assert hypothesis.score == pytest.approx(ctc_log_probability(log_probs, hypothesis.ids))
            assert np.all(np.diff(hypothesis.frames) > 0)
            assert hypothesis.probabilities == pytest.approx(np.exp(log_probs[list(hypothesis.frames), hypothesis.ids]))
        scores = [hypothesis.score for hypothesis in found]
        assert scores == sorted(scores, reverse=True)


def test_the_first_symbol_is_never_lost() -> None:
    for symbol in range(3):
        log_probs = np.log(np.full((1, 4), 0.01, np.float32))
        log_probs[0, symbol] = np.log(0.97)
        assert n_best(log_probs, 1)[0].ids == (symbol,)


def test_certain_posteriors_and_no_frames() -> None:
    log_probs = np.full((3, 3), -np.inf, np.float32)
    log_probs[[0, 1, 2], [0, 2, 1]] = 0.0
    found = n_best(log_probs, 4)
    assert [hypothesis.ids for hypothesis in found] == [(0, 1)]
    assert found[0].score == pytest.approx(0.0)
    assert n_best(np.zeros((0, 3), np.float32), 2)[0].ids == ()


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="got 0, 16"):
        n_best(noisy(2, 3, np.random.default_rng(0)), 0)
    with pytest.raises(ValueError, match="NaN"):
        n_best(np.full((2, 3), np.nan, np.float32), 1)
