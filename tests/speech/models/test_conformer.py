"""Conformers: chunk by chunk is the whole, look-ahead is what is said, and nobody hears the padding."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apps.speech.features import fbank
from apps.speech.models import conformer as module
from apps.speech.models import new_model
from apps.speech.models.base import FRAME_MS, SUBSAMPLING, AcousticModel, output_lengths
from apps.speech.models.conformer import ChunkedConformer, Convolution, Plan, SelfAttention, Span, rotations
from kdcore.config import UserError

SMALL = {"channels": [4, 6], "width": 16, "heads": 2, "blocks": 2, "feed_forward": 12, "kernel": 5}
KINDS = ["conformer", "chunked_conformer"]
# a feature frame hears 7.5 ms behind its own 10: half of a window of 25 ms that is centred on it
WINDOW = 120


def made(kind: str = "chunked_conformer", **options: object) -> AcousticModel:
    torch.manual_seed(0)
    model = new_model(kind, 5, SMALL | options).eval()
    model.set_statistics(torch.full((80,), -8.0), torch.full((80,), 3.0))
    return model


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 - 8


def whole(model: AcousticModel, features: Tensor) -> Tensor:
    with torch.no_grad():
        return model(features[None], torch.tensor([len(features)]))[0]


@given(count=st.integers(1, 150), chunk=st.sampled_from([2, 4, 8]), left=st.integers(1, 5), size=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_streaming_equals_the_whole(count, chunk, left, size):
    model = made(chunk=chunk, left_chunks=left, kernel=size)
    features = noise(count, 80)
    expected = whole(model, features)
    assert expected.shape == (-(-count // 4), 5)
    torch.testing.assert_close(model.stream(features), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [2, 4, 8])
def test_a_model_of_full_size_streams_in_any_chunk(chunk):
    model = new_model("chunked_conformer", 29, {"size": "small"}).eval()
    model.options = replace(model.options, chunk=chunk)
    features = noise(1041, 80)
    expected = whole(model, features)
    # longer than one span and than what is kept of the past
    assert len(expected) > 2 * module.SPAN and len(expected) > model.options.left_chunks * chunk
    torch.testing.assert_close(model.stream(features), expected, atol=1e-4, rtol=0)


def test_steps_of_a_batch_are_those_of_its_rows_and_what_came_before_the_start_is_not_heard():
    model = made(chunk=2, left_chunks=2)
    features = noise(2, 32, 80)
    state = model.start(2)
    # one stream starts when the other is well under way; what its caches hold is no matter
    junk = [each.clone() for each in state]
    for place in range(len(junk) - 1):
        if place > 1 and (place - 2) % 3 != 2:
            junk[place][1] = 50
    state, parts = tuple(junk), []
    for chunk in features.split(8, 1):
        with torch.no_grad():
            logits, state = model.step(chunk, state)
        parts.append(logits)
    assert [each.shape for each in state] == [each.shape for each in model.start(2)]
    assert state[-1].tolist() == [4, 4]
    for row in range(2):
        torch.testing.assert_close(torch.cat(parts, 1)[row], whole(model, features[row]), atol=1e-4, rtol=0)


def test_no_tensor_of_the_state_stands_twice():
    for kind in (made(), made(chunk=2)):
        state = kind.start(1)
        assert len({id(each) for each in state}) == len(state)


@pytest.mark.parametrize("chunk", [2, 4, 8])
def test_it_looks_ahead_as_far_as_it_says(chunk):
    """By features, for every frame of two chunks: nothing behind the chunk, and all of it."""
    model, features = made(chunk=chunk), noise(128, 80)
    assert model.look_ahead_ms == (chunk - 1) * FRAME_MS
    before = whole(model, features)
    for frame in range(chunk, 3 * chunk):
        end = (frame // chunk + 1) * chunk
        later, last = features.clone(), features.clone()
        later[SUBSAMPLING * end :] += 3
        last[SUBSAMPLING * end - 1] += 3
        torch.testing.assert_close(whole(model, later)[: frame + 1], before[: frame + 1], atol=0, rtol=0)
        assert (whole(model, later)[end] - before[end]).abs().max() > 1e-4
        assert (whole(model, last)[frame] - before[frame]).abs().max() > 1e-6


def test_it_looks_ahead_as_far_as_it_says_in_samples():
    model = made(chunk=4)
    generator = np.random.default_rng(0)
    samples = generator.normal(0, 0.1, 16_000).astype(np.float32)
    frame = 8  # the first of its chunk: it looks ahead the furthest
    reach = (frame + 1) * 640 + model.look_ahead_ms * 16 + WINDOW
    features = torch.from_numpy(fbank(samples))
    model.set_statistics(features.mean(0), features.std(0))
    before = whole(model, features)
    for start, same in ((reach, True), (reach - WINDOW - 40, False)):
        changed = samples.copy()
        changed[start:] = generator.normal(0, 0.3, len(samples) - start)
        got = whole(model, torch.from_numpy(fbank(changed)))
        assert torch.equal(got[: frame + 1], before[: frame + 1]) is same


def test_it_looks_back_as_far_as_its_chunks():
    model, features = made(chunk=2, left_chunks=2, blocks=1, kernel=1), noise(64, 80)
    before = whole(model, features)
    # frame 12 attends to those from 8; the front end hears three features before them
    for first, same in ((4 * 8 - 3, True), (4 * 8 - 2, False)):
        changed = features.clone()
        changed[:first] += 3
        assert torch.equal(whole(model, changed)[12], before[12]) is same


@pytest.mark.parametrize("kind", KINDS)
def test_an_utterance_is_the_same_in_any_batch(kind):
    model = made(kind)
    lengths = torch.tensor([37, 4, 131, 1, 0])
    batch = noise(5, 131, 80)
    with torch.no_grad():
        logits = model(batch, lengths)
    assert logits.shape == (5, 33, 5) and logits.isfinite().all()
    for row, length, count in zip(range(4), lengths, output_lengths(lengths), strict=False):
        torch.testing.assert_close(logits[row, :count], whole(model, batch[row, :length]), atol=1e-5, rtol=0)


def test_a_model_of_full_context_hears_the_end_at_the_start():
    model, features = made("conformer"), noise(80, 80)
    later = features.clone()
    later[-1] += 5
    assert (whole(model, later)[0] - whole(model, features)[0]).abs().max() > 1e-6


def test_chunks_are_drawn_in_training_alone():
    model, features = made(chunk=4, chunks=[2, 4, 8], dropout=0.0), noise(2, 64, 80)
    lengths = torch.tensor([64, 50])

    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [model(features, lengths).detach() for _ in range(8)]

    model.train()
    first = drawn(3)
    for one, other in zip(first, drawn(3), strict=True):
        assert torch.equal(one, other)
    expected = []
    for chunk in (2, 4, 8):
        fixed = made(chunk=chunk, dropout=0.0)
        expected.append(fixed(features, lengths).detach())
    places = {next(at for at, each in enumerate(expected) if torch.allclose(each, one, atol=1e-5)) for one in first}
    assert len(places) > 1
    model.eval()
    assert all(torch.equal(one, expected[1]) for one in drawn(4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_that_of_the_statistics(kind):
    assert torch.equal(made(kind).mean, torch.full((80,), -8.0))


def test_every_weight_is_trained():
    for kind in KINDS:
        model = made(kind, dropout=0.0).train()
        model(noise(2, 48, 80), torch.tensor([48, 30])).square().sum().backward()
        assert [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()] == []


def test_attention_is_that_of_the_formula():
    """One frame after another, with the rotary formula on complex numbers (Su et al., 2021), in float64."""
    torch.manual_seed(0)
    layer, frames = SelfAttention(8, 2, 0.0).double(), torch.randn(1, 6, 8, dtype=torch.float64)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    got, _ = layer(frames, None, Plan(*rotations(6, 4, frames), [Span(0, 6, 0, 6, mask)]))
    queries, keys, values = (layer.inputs(layer.norm(frames))[0] @ torch.eye(24, dtype=torch.float64)).chunk(3, -1)
    rows = []
    for at in range(6):
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            query = torch.complex(*queries[at, head].chunk(2))
            scores = []
            for other in range(at + 1):
                key = torch.complex(*keys[other, head].chunk(2))
                turn = torch.tensor([complex(math.cos(a), math.sin(a)) for a in (at - other, (at - other) / 100)])
                scores.append((query * turn.to(query) * key.conj()).real.sum() / 2)
            heads.append(torch.stack(scores).softmax(0) @ values[: at + 1, head])
        rows.append(layer.output(torch.cat(heads)))
    torch.testing.assert_close(got[0], torch.stack(rows), atol=1e-6, rtol=0)


def test_the_convolution_is_that_of_the_formula():
    torch.manual_seed(0)
    for size, behind in ((5, 0), (5, 2), (1, 0)):
        layer, frames = Convolution(4, size, behind, 0.0).eval(), torch.randn(1, 7, 4)
        got, tail = layer(frames, None, None)
        value, gate = layer.gated(layer.norm(frames))[0].chunk(2, -1)
        given_ = value * torch.sigmoid(gate)
        for at in range(7):
            total = layer.depthwise.bias.clone()
            for tap in range(size):
                place = at - (size - 1 - behind) + tap
                if 0 <= place < 7:
                    total = total + layer.depthwise.weight[:, 0, tap] * given_[place]
            expected = layer.output(nn.functional.silu(layer.middle(total)))
            torch.testing.assert_close(got[0, at], expected, atol=1e-5, rtol=0)
        assert tail.shape == (1, size - 1 - behind, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "least", "most"), [("tiny", 0.25, 0.35), ("small", 0.75, 0.85), ("base", 2.6, 3.3)])
def test_sizes(kind, size, least, most):
    assert least < new_model(kind, 29, {"size": size}).parameter_count() / 1e6 <= most


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("chunked_conformer", {"chunk": 0}, "chunk: got 0"),
        ("chunked_conformer", {"left_chunks": 0}, "left_chunks: got 0"),
        ("chunked_conformer", {"chunks": [2, 0]}, "chunks: got"),
        ("chunked_conformer", {"heads": 5}, "width: got 96, wanted a multiple of twice the 5 heads"),
        ("chunked_conformer", {"left": 3}, "did you mean left_chunks"),
        ("conformer", {"kernel": 4}, "kernel: got 4, wanted an odd number"),
        ("conformer", {"dropout": 1.0}, "dropout: got 1.0"),
        ("conformer", {"channels": [0, 3]}, "channels: got"),
        ("conformer", {"chunk": 4}, "unknown setting 'chunk'"),
    ],
)
def test_what_is_no_option_is_refused(kind, options, message):
    with pytest.raises(UserError, match=message):
        new_model(kind, 29, options)


def test_a_step_is_a_graph_of_fixed_shapes():
    """It exports with nothing to decide at run time, and the exported step says the same, with caches filled."""
    model = made(chunk=2, left_chunks=2)
    assert isinstance(model, ChunkedConformer)

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, features: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            return model.step(features, state)

    exported = torch.export.export(Step(), (noise(1, 8, 80), model.start(1))).module()
    state = model.start(1)
    for chunk in noise(1, 40, 80).split(8, 1):
        expected, following = model.step(chunk, state)
        got, kept = exported(chunk, state)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(kept, following, atol=1e-5, rtol=0)
        state = following
