"""Recurrent models: streaming is the whole, nothing is heard too early, and nobody hears the padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apps.speech.models import model_options, new_model
from apps.speech.models.base import SUBSAMPLING, AcousticModel, StreamingModel, output_lengths
from kdcore.config import UserError

SMALL = {
    "bilstm": {"channels": [2, 3], "width": 12, "hidden": 10, "layers": 2},
    "conv_rnn": {"channels": [2, 3], "width": 12, "hidden": 10, "kernel": 3},
}


def made(kind: str, **options: object) -> AcousticModel:
    torch.manual_seed(0)
    model = new_model(kind, 5, SMALL[kind] | options).eval()
    model.set_statistics(torch.full((80,), -8.0), torch.full((80,), 3.0))
    return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 - 8


def whole(model: AcousticModel, features: Tensor) -> Tensor:
    with torch.no_grad():
        return model(features[None], torch.tensor([len(features)]))[0]


@given(count=st.integers(1, 90), chunk=st.integers(1, 9), cell=st.sampled_from(["lstm", "gru"]))
@settings(max_examples=30, deadline=None)
def test_streaming_equals_the_whole(count, chunk, cell):
    model = made("conv_rnn", cell=cell, chunk=chunk)
    assert isinstance(model, StreamingModel)
    features = noise(count, 80)
    expected = whole(model, features)
    assert expected.shape == (-(-count // 4), 5)
    torch.testing.assert_close(model.stream(features), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_frame_hears_its_own_features_and_none_behind(cell):
    model = made("conv_rnn", cell=cell)
    assert model.look_ahead_ms == 0
    features, frame = noise(80, 80), 9
    before = whole(model, features)
    later, own = features.clone(), features.clone()
    later[SUBSAMPLING * (frame + 1) :] += 1
    own[SUBSAMPLING * (frame + 1) - 1] += 1
    torch.testing.assert_close(whole(model, later)[: frame + 1], before[: frame + 1], atol=0, rtol=0)
    assert (whole(model, later)[frame + 1] - before[frame + 1]).abs().max() > 1e-4
    assert (whole(model, own)[frame] - before[frame]).abs().max() > 1e-4
    torch.testing.assert_close(whole(model, own)[:frame], before[:frame], atol=0, rtol=0)


def test_a_bidirectional_model_hears_the_end_at_the_start():
    model, features = made("bilstm"), noise(80, 80)
    later = features.clone()
    later[-1] += 5
    assert (whole(model, later)[0] - whole(model, features)[0]).abs().max() > 1e-6


@pytest.mark.parametrize(
    ("kind", "options"), [("bilstm", {}), ("conv_rnn", {"cell": "lstm"}), ("conv_rnn", {"cell": "gru"})]
)
def test_an_utterance_is_the_same_in_any_batch(kind, options):
    model = made(kind, **options)
    lengths = torch.tensor([37, 4, 64, 1])
    # what is behind a length is no silence here, and must not be heard
    batch = noise(4, 64, 80)
    with torch.no_grad():
        logits = model(batch, lengths)
    for row, length, count in zip(range(4), lengths, output_lengths(lengths), strict=True):
        torch.testing.assert_close(logits[row, :count], whole(model, batch[row, :length]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", list(SMALL))
def test_statistics_are_those_of_the_features(kind):
    model, features = made(kind), noise(40, 80)
    expected = whole(model, features)
    model.set_statistics(torch.zeros(80), torch.ones(80))
    torch.testing.assert_close(whole(model, (features + 8) / 3), expected, atol=1e-5, rtol=0)
    # a bin that never varies is moved and not blown up
    model.set_statistics(torch.full((80,), -8.0), torch.zeros(80))
    assert (whole(model, features) - expected).abs().max() < 100


@pytest.mark.parametrize(("size", "least", "most"), [("tiny", 0.25, 0.35), ("small", 0.75, 0.85), ("base", 2.6, 3.3)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_sizes(size, least, most, cell):
    assert least < new_model("conv_rnn", 29, {"size": size, "cell": cell}).parameter_count() / 1e6 <= most


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("conv_rn", {}, "did you mean conv_rnn"),
        ("conv_rnn", {"hiden": 3}, "did you mean hidden"),
        ("conv_rnn", {"size": "smal"}, "did you mean small"),
        ("conv_rnn", {"cell": "rnn"}, "cell"),
        ("conv_rnn", {"chunk": 0}, "chunk: got 0, wanted at least 1"),
        ("conv_rnn", {"dropout": 3}, "dropout: got 3.0, wanted 0 to below 1"),
        ("conv_rnn", {"channels": [0, 3]}, "channels: got"),
        ("bilstm", {"layers": 0}, "layers: got 0, wanted at least 1"),
        ("bilstm", {"dropout": -0.1}, "dropout: got -0.1, wanted 0 to below 1"),
        ("bilstm", {"size": "small"}, "but bilstm has no sizes; wanted any of its options: channels, width, hidden"),
    ],
)
def test_what_is_no_option_is_refused(kind, options, message):
    with pytest.raises(UserError, match=message):
        model_options(kind, options)


def test_the_chunk_of_a_model_may_be_changed():
    model, features = made("conv_rnn"), noise(50, 80)
    expected = whole(model, features)
    model.options = replace(model.options, chunk=7)
    torch.testing.assert_close(model.stream(features), expected, atol=1e-4, rtol=0)
