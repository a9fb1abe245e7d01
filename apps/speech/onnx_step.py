"""One step of a streaming model with the inputs and outputs that streaming CTC models have in sherpa-onnx.

There a state is two caches of floats and a counter, all zeros at the start; what a model keeps between steps is packed
into them and means nothing to who carries it. The interface is NeMo's, for cache-aware streaming encoders.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from apps.speech.device.folder import INPUTS
from apps.speech.features import FEATURES, SILENCE
from apps.speech.models import StreamingModel
from apps.speech.models.base import SUBSAMPLING, State

# the state tensors of the front end's convolutions, which every model has first
_FRONT = 2


@dataclass(frozen=True)
class _Part:
    """Where a tensor of the state is: values ``start`` to ``stop`` of a cache, as ``shape`` without the batch axis."""

    start: int
    stop: int
    shape: tuple[int, ...]
    # which axis is the batch
    axis: int


class OnnxStep(nn.Module):
    """Step of a streaming model on packed state: audio_signal [N, 80, window] to log-probabilities [N, frames, C].

    Inputs and outputs are those of ``folder.INPUTS`` and ``folder.OUTPUTS``. The front end's convolutions are kept in
    ``cache_last_time`` [N, 1, 1, E], all else in ``cache_last_channel`` [N, 1, 1, D]. The counter holds the frames
    seen: of a model that hides what is in front of an utterance as the model itself counts them, else all of them.

    Raises:
        ValueError: a state that does not start with zeros, has no batch axis, or more than one counter.
    """

    def __init__(self, model: StreamingModel) -> None:
        super().__init__()
        self.model = unrolled(model).eval()
        self.frames = model.chunk_frames
        self.window = SUBSAMPLING * model.chunk_frames
        states = self.model.start(2), self.model.start(3)
        if any(bool(value.any()) for value in states[0]):
            raise ValueError(f"{model.kind}: starts with a state that is not all zeros, which no cache holds")
        axes = [_batch_axis(two, three) for two, three in zip(*states, strict=True)]
        counters = [place for place, value in enumerate(states[0]) if not value.is_floating_point()]
        if len(counters) > 1 or any(states[0][place].ndim != 1 for place in counters):
            raise ValueError(f"{model.kind}: got counters at {counters} of its state, wanted at most one, of shape [B]")
        self.counter = counters[0] if counters else None
        floats = [place for place in range(len(axes)) if place != self.counter]
        self.time = _parts([(states[0][place], axes[place]) for place in floats[:_FRONT]])
        self.channel = _parts([(states[0][place], axes[place]) for place in floats[_FRONT:]])

    @property
    def channel_size(self) -> int:
        """Values of ``cache_last_channel`` for one stream."""
        return self.channel[-1].stop

    @property
    def time_size(self) -> int:
        """Values of ``cache_last_time`` for one stream."""
        return self.time[-1].stop

    def start(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the caches before the first step."""
        return (
            torch.zeros(batch, 1, 1, self.channel_size),
            torch.zeros(batch, 1, 1, self.time_size),
            torch.zeros(batch, dtype=torch.int64),
        )

    def forward(
        self, audio_signal: Tensor, length: Tensor, channel: Tensor, time: Tensor, seen: Tensor
    ) -> tuple[Tensor, ...]:
        """Return log-probabilities, the frames that count, and the next caches."""
        state = [*_unpack(time, self.time), *_unpack(channel, self.channel)]
        if self.counter is not None:
            state.insert(self.counter, seen)
        logits, after = self.model.step(audio_signal.transpose(1, 2), tuple(state))
        following = list(after)
        count = seen + self.frames if self.counter is None else following.pop(self.counter)
        return (
            torch.log_softmax(logits, 2),
            # of a window that is cut short those that begin in it
            # (which is not below 0: to truncate is one operation, to round down are ten)
            torch.div(length + (SUBSAMPLING - 1), SUBSAMPLING, rounding_mode="trunc"),
            _pack(following[_FRONT:], self.channel),
            _pack(following[:_FRONT], self.time),
            count,
        )

    def metadata(self, vocabulary: int) -> dict[str, str]:
        """Return what sherpa-onnx reads of the file; ``vocabulary`` does not count the blank."""
        values = {
            "window_size": self.window,
            "chunk_shift": self.window,
            "subsampling_factor": SUBSAMPLING,
            "vocab_size": vocabulary,
            **{f"cache_last_channel_dim{axis}": size for axis, size in enumerate((1, 1, self.channel_size), 1)},
            **{f"cache_last_time_dim{axis}": size for axis, size in enumerate((1, 1, self.time_size), 1)},
            "model_type": "EncDecCTCModelBPE",
            "normalize_type": "",
        }
        return {name: str(value) for name, value in values.items()}


def windows(step: OnnxStep, features: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield windows [N, 80, window] of some utterances' features [T, 80] until all end; silence behind each end."""
    longest = max(len(each) for each in features)
    total = -(-longest // step.window) * step.window
    batch = torch.full((len(features), total, FEATURES), SILENCE)
    for row, each in enumerate(features):
        batch[row, : len(each)] = each
    for start in range(0, total, step.window):
        yield batch[:, start : start + step.window].transpose(1, 2).contiguous()


def inputs_of(window: Tensor, caches: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the named inputs of a step."""
    length = torch.full((len(window),), window.shape[2], dtype=torch.int64)
    return dict(zip(INPUTS, (window, length, *caches), strict=True))


def unrolled(model: StreamingModel) -> StreamingModel:
    """Return a copy of a model in operations that onnxruntime is good at.

    GRUs are products frame by frame, of which alone it has int8; convolutions of single channels over time, for which
    it has no fast kernel, are sums.
    """
    made = copy.deepcopy(model)
    for name, layer in list(made.named_modules()):
        if isinstance(layer, nn.GRU):
            made.set_submodule(name, UnrolledGru(layer))
        elif isinstance(layer, nn.Conv1d) and layer.groups == layer.in_channels == layer.out_channels:
            made.set_submodule(name, SummedConvolution(layer))
    return made


class SummedConvolution(nn.Module):
    """A convolution of each channel by itself, ``nn.Conv1d`` with as many groups, as a sum over the kernel."""

    weight: Tensor
    bias: Tensor

    def __init__(self, layer: nn.Conv1d) -> None:
        super().__init__()
        if layer.stride != (1,) or layer.padding != (0,) or layer.dilation != (1,) or layer.bias is None:
            raise ValueError(f"layer: got {layer}, wanted stride 1, a bias, neither padding nor dilation")
        self.register_buffer("weight", layer.weight.detach()[:, 0].T.contiguous())
        self.register_buffer("bias", layer.bias.detach().clone())

    def forward(self, frames: Tensor) -> Tensor:
        """Return [B, D, T - K + 1] of frames [B, D, T]."""
        size = len(self.weight)
        # a constant of the graph, since a step has always as many frames
        places = torch.tensor([[start + place for place in range(size)] for start in range(frames.shape[2] - size + 1)])
        summed = (frames.transpose(1, 2)[:, places] * self.weight).sum(2) + self.bias
        return summed.transpose(1, 2)


class UnrolledGru(nn.Module):
    """A GRU (Cho et al., 2014) as ``nn.GRU`` computes it: the reset gate behind the product."""

    inputs: Tensor
    hidden: Tensor
    input_bias: Tensor
    hidden_bias: Tensor

    def __init__(self, layer: nn.GRU) -> None:
        super().__init__()
        if layer.num_layers != 1 or layer.bidirectional or not layer.batch_first or not layer.bias:
            raise ValueError(f"layer: got {layer}, wanted one direction of one layer, batch first, with biases")
        self.size = layer.hidden_size
        # the right sides of products
        self.register_buffer("inputs", layer.get_parameter("weight_ih_l0").detach().T.contiguous())
        self.register_buffer("hidden", layer.get_parameter("weight_hh_l0").detach().T.contiguous())
        self.register_buffer("input_bias", layer.get_parameter("bias_ih_l0").detach().clone())
        self.register_buffer("hidden_bias", layer.get_parameter("bias_hh_l0").detach().clone())

    def forward(self, frames: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return [B, T, H] of frames [B, T, D], and hidden values [1, B, H]."""
        given = frames @ self.inputs + self.input_bias
        hidden, outputs = state[0], []
        for frame in given.unbind(1):
            # reset and update gates, and the new values
            gates, new = frame.split([2 * self.size, self.size], -1)
            old_gates, old = (hidden @ self.hidden + self.hidden_bias).split([2 * self.size, self.size], -1)
            reset, kept = (gates + old_gates).sigmoid().split(self.size, -1)
            new = (new + reset * old).tanh()
            hidden = new + kept * (hidden - new)
            outputs.append(hidden)
        return torch.stack(outputs, 1), hidden[None]


def _batch_axis(two: Tensor, three: Tensor) -> int:
    """Return the axis along which the states of two and of three streams differ."""
    found = [axis for axis, sizes in enumerate(zip(two.shape, three.shape, strict=True)) if sizes == (2, 3)]
    if len(found) != 1 or found[0] > 1:
        raise ValueError(f"state: got {tuple(two.shape)} and {tuple(three.shape)} for 2 and 3 streams, wanted [B, ...]")
    return found[0]


def _parts(values: Sequence[tuple[Tensor, int]]) -> list[_Part]:
    parts, start = [], 0
    for value, axis in values:
        shape = tuple(size for place, size in enumerate(value.shape) if place != axis)
        stop = start + value[:1].numel() if axis == 0 else start + value[:, :1].numel()
        parts.append(_Part(start, stop, shape, axis))
        start = stop
    return parts


def _unpack(cache: Tensor, parts: Sequence[_Part]) -> State:
    pieces = cache.flatten(1).split([part.stop - part.start for part in parts], 1)
    values = [piece.reshape(-1, *part.shape) for piece, part in zip(pieces, parts, strict=True)]
    # [B, 1, ...] to [1, B, ...]
    return tuple(value.transpose(0, 1) if part.axis else value for value, part in zip(values, parts, strict=True))


def _pack(state: Sequence[Tensor], parts: Sequence[_Part]) -> Tensor:
    values = [value.transpose(0, 1) if part.axis else value for value, part in zip(state, parts, strict=True)]
    return torch.cat([value.flatten(1) for value in values], 1)[:, None, None]
