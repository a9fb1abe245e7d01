"""What a model in training hears: other voices, what is hidden, how much, and that it repeats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.speech.augment import Augment, warped
from apps.speech.features import SAMPLE_RATE, SILENCE, fbank

LENGTHS = torch.tensor([300, 120])
FILL = torch.full((80,), -3.0)


def masked(augment: Augment, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return augment(torch.zeros(2, 300, 80), LENGTHS, FILL) == -3.0


def test_bands_reach_over_all_frames_and_spans_over_all_bins() -> None:
    hidden = masked(Augment(bands=2, band=20, spans=0, span=0))
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden)) and hidden.any()
    hidden = masked(Augment(bands=0, band=0, spans=2.0, span=15))
    assert torch.equal(hidden, hidden[..., :1].expand_as(hidden)) and hidden.any()


def test_spans_stay_inside_an_utterance_and_below_their_share() -> None:
    augment = Augment(bands=0, band=0, spans=10.0, span=40, share=0.25)
    for seed in range(50):
        frames = masked(augment, seed)[..., 0]
        assert not frames[1, 120:].any()
        assert (frames.sum(1) <= LENGTHS * 0.25).all()


def test_no_masks_change_nothing_and_a_seed_repeats() -> None:
    features = torch.randn(2, 300, 80)
    assert torch.equal(Augment(bands=0, spans=0)(features, LENGTHS, FILL), features)
    assert torch.equal(masked(Augment(), 3), masked(Augment(), 3))
    assert not torch.equal(masked(Augment(), 3), masked(Augment(), 4))


def tone(hertz: float) -> torch.Tensor:
    """Features [1, T, 80] of half a second of a sine."""
    time = np.arange(SAMPLE_RATE // 2) / SAMPLE_RATE
    return torch.from_numpy(fbank((0.3 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)))[None]


@pytest.mark.parametrize("hertz", [440.0, 900.0, 2000.0, 5000.0])
@pytest.mark.parametrize("factor", [0.85, 0.95, 1.1, 1.15])
def test_a_warped_tone_has_its_peak_where_the_tone_of_the_other_frequency_has_it(hertz: float, factor: float) -> None:
    found = warped(tone(hertz), torch.tensor([factor]))[0, 20].argmax()
    assert abs(int(found) - int(tone(hertz / factor)[0, 20].argmax())) <= 1


def test_a_factor_of_one_changes_nothing_and_each_row_has_its_own() -> None:
    features = torch.randn(2, 30, 80).cumsum(2)
    both = warped(features, torch.tensor([1.0, 1.1]))
    torch.testing.assert_close(both[0], features[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(both[1:], warped(features[1:], torch.tensor([1.1])))
    assert not torch.allclose(both[1], features[1], atol=0.1)


def test_level_and_tilt_are_decibels_within_their_bounds_and_leave_silence() -> None:
    features = torch.full((200, 3, 80), -2.0)
    features[:, 0] = SILENCE
    torch.manual_seed(0)
    louder = 10 / np.log(10) * (Augment(level=6.0, bands=0, spans=0)(features, LENGTHS, FILL)[:, 1] + 2.0)
    assert torch.allclose(louder, louder[:, :1].expand_as(louder), atol=1e-4)
    assert -6 <= louder.min() < -5 and 5 < louder.max() <= 6
    heard = Augment(tilt=3.0, bands=0, spans=0)(features, LENGTHS, FILL)
    tilted = 10 / np.log(10) * (heard[:, 1] + 2.0)
    torch.testing.assert_close(tilted[:, 0], -tilted[:, 79], rtol=0, atol=1e-4)
    assert 2.5 < tilted.max() <= 3.0001
    assert (heard[:, 0] == SILENCE).all()


@pytest.mark.parametrize(
    "wrong", [{"warp": 0.6}, {"level": -1}, {"tilt": float("nan")}, {"bands": -1}, {"span": -1}, {"share": 1.5}]
)
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="augment: wanted"):
        Augment(**wrong)  # type: ignore[arg-type]
