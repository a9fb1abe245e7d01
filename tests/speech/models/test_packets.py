"""From packets of samples to log-posteriors: however audio is split, and in any chunk, they are those of the whole."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.features import SILENCE, OnlineFeatures, fbank
from apps.speech.models import StreamingModel, new_model

MODELS = {
    "lstm": ("conv_rnn", {"channels": [4, 6], "width": 16, "hidden": 12, "convolutions": 2, "layers": 2, "kernel": 3}),
    "gru": ("conv_rnn", {"channels": [4, 6], "width": 16, "hidden": 12, "layers": 1, "kernel": 5, "cell": "gru"}),
    "convolutions": ("conv_rnn", {"channels": [4, 6], "width": 16, "hidden": 12, "layers": 0, "convolutions": 3}),
    "conformer": (
        "chunked_conformer",
        {"channels": [4, 6], "width": 16, "heads": 2, "blocks": 2, "feed_forward": 12, "kernel": 5, "left_chunks": 3},
    ),
}


def heard(model: StreamingModel, samples: np.ndarray, packets: list[int]) -> torch.Tensor:
    """Return log-posteriors [T', C] to the end of the last chunk, each stepped as soon as its last frame is there."""
    size, online, state = 4 * model.chunk_frames, OnlineFeatures(), model.start(1)
    waiting, said, start = np.zeros((0, 80), np.float32), [], 0
    for packet in [*packets, len(samples)]:
        waiting = np.concatenate([waiting, online.accept(samples[start : start + packet])])
        start += packet
        if start >= len(samples):
            waiting = np.concatenate([waiting, online.finish()])
            waiting = np.concatenate([waiting, np.full((-len(waiting) % size, 80), SILENCE, np.float32)])
        while len(waiting) >= size:
            logits, state = model.step(torch.from_numpy(waiting[None, :size].copy()), state)
            said.append(logits[0])
            waiting = waiting[size:]
        if start >= len(samples):
            break
    return torch.log_softmax(torch.cat(said), 1)


@pytest.mark.parametrize("name", MODELS)
@given(
    count=st.integers(400, 24_000),
    packets=st.lists(st.integers(0, 6_000), max_size=30),
    chunk=st.integers(1, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_any_packets_and_any_chunk_give_what_the_whole_gives(
    name: str, count: int, packets: list[int], chunk: int, seed: int
) -> None:
    torch.manual_seed(0)
    kind, options = MODELS[name]
    model = new_model(kind, 5, options).eval()
    assert isinstance(model, StreamingModel)
    model.set_statistics(torch.full((80,), -8.0), torch.full((80,), 3.0))
    model.options = replace(model.options, chunk=chunk)
    samples = np.random.default_rng(seed).uniform(-0.5, 0.5, count).astype(np.float32)
    features = torch.from_numpy(fbank(samples))
    with torch.no_grad():
        expected = torch.log_softmax(model(features[None], torch.tensor([len(features)]))[0], 1)
        found = heard(model, samples, packets)
    assert len(found) == -(-len(expected) // chunk) * chunk
    torch.testing.assert_close(found[: len(expected)], expected, atol=1e-4, rtol=0)
