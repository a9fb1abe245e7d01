"""SpecAugment: what is hidden, how much, and that it repeats."""

from __future__ import annotations

import pytest
import torch

from apps.speech.spec_augment import SpecAugment

LENGTHS = torch.tensor([300, 120])
FILL = torch.full((80,), -3.0)


def masked(augment: SpecAugment, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return augment(torch.zeros(2, 300, 80), LENGTHS, FILL) == -3.0


def test_bands_reach_over_all_frames_and_spans_over_all_bins() -> None:
    hidden = masked(SpecAugment(bands=2, band=20, spans=0, span=0))
    assert torch.equal(hidden, hidden[:, :1].expand_as(hidden)) and hidden.any()
    hidden = masked(SpecAugment(bands=0, band=0, spans=2.0, span=15))
    assert torch.equal(hidden, hidden[..., :1].expand_as(hidden)) and hidden.any()


def test_spans_stay_inside_an_utterance_and_below_their_share() -> None:
    augment = SpecAugment(bands=0, band=0, spans=10.0, span=40, share=0.25)
    for seed in range(50):
        frames = masked(augment, seed)[..., 0]
        assert not frames[1, 120:].any()
        assert (frames.sum(1) <= LENGTHS * 0.25).all()


def test_no_masks_change_nothing_and_a_seed_repeats() -> None:
    features = torch.randn(2, 300, 80)
    assert torch.equal(SpecAugment(bands=0, spans=0)(features, LENGTHS, FILL), features)
    assert torch.equal(masked(SpecAugment(), 3), masked(SpecAugment(), 3))
    assert not torch.equal(masked(SpecAugment(), 3), masked(SpecAugment(), 4))


@pytest.mark.parametrize("wrong", [{"bands": -1}, {"span": -1}, {"share": 1.5}])
def test_options_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="augment: wanted"):
        SpecAugment(**wrong)  # type: ignore[arg-type]
