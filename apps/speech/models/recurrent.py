"""Recurrent CTC models: a bidirectional LSTM that teaches, and convolutions with a causal recurrence that stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from apps.speech.models.base import AcousticModel, State, StreamingModel, check_sizes, complete, output_lengths
from apps.speech.models.layers import CausalConvolution, FrontEnd, reverse

Cell = Literal["lstm", "gru"]


@dataclass(frozen=True)
class BiLstmOptions:
    """The size of a bidirectional LSTM."""

    # of the two convolutions of the front end
    channels: tuple[int, int] = (16, 32)
    # of the front end's vectors
    width: int = 256
    # of each direction
    hidden: int = 256
    layers: int = 3
    dropout: float = 0.3

    def __post_init__(self) -> None:
        check_sizes(self, "hidden", "layers")


class BiLstm(AcousticModel):
    """Convolutions, then LSTMs in both directions (Graves and Schmidhuber, 2005): it hears the whole utterance."""

    kind: ClassVar[str] = "bilstm"

    def __init__(self, classes: int, options: BiLstmOptions) -> None:
        super().__init__()
        self.options, self.classes = options, classes
        self.front = FrontEnd(options.channels, options.width)
        sizes = [options.width, *[2 * options.hidden] * (options.layers - 1)]
        self.forwards = nn.ModuleList(nn.LSTM(size, options.hidden, batch_first=True) for size in sizes)
        self.backwards = nn.ModuleList(nn.LSTM(size, options.hidden, batch_first=True) for size in sizes)
        self.dropout = nn.Dropout(options.dropout)
        self.encoder = nn.LayerNorm(2 * options.hidden)
        self.head = nn.Linear(2 * options.hidden, classes)

    @property
    def mean(self) -> Tensor:
        """The features' mean."""
        return self.front.normalise.mean

    def set_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the features' statistics."""
        self.front.normalise.set(mean, deviation)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Return the logits."""
        frames, _ = self.front(complete(features, lengths), self.front.start(len(features)))
        counts = output_lengths(lengths)
        for ahead, back in zip(self.forwards, self.backwards, strict=True):
            frames = self.dropout(frames)
            # reversed within its length, so that no direction begins in the padding
            behind = reverse(back(reverse(frames, counts))[0], counts)
            frames = torch.cat([ahead(frames)[0], behind], 2)
        logits: Tensor = self.head(self.encoder(self.dropout(frames)))
        return logits


@dataclass(frozen=True)
class ConvRnnOptions:
    """The size of a streaming recurrent model."""

    channels: tuple[int, int] = (16, 24)
    width: int = 176
    # residual convolutions over the last ``kernel`` frames, before the recurrence
    convolutions: int = 2
    kernel: int = 7
    cell: Cell = "lstm"
    hidden: int = 208
    # recurrent layers; 0 leaves convolutions alone
    layers: int = 2
    dropout: float = 0.1
    # frames a step: 40 ms each
    chunk: int = 4

    def __post_init__(self) -> None:
        if self.cell not in get_args(Cell):
            raise ValueError(f"cell: got {self.cell!r}, wanted one of {', '.join(get_args(Cell))}")
        check_sizes(self, "kernel", "hidden", "chunk")
        if min(self.layers, self.convolutions) < 0 or not self.layers + self.convolutions:
            raise ValueError(f"layers, convolutions: got {self.layers} and {self.convolutions}, wanted one of them")


class ConvRnn(StreamingModel):
    """Causal convolutions, then LSTM or GRU layers (or none): no frame waits for a later one, whatever the chunk."""

    kind: ClassVar[str] = "conv_rnn"

    def __init__(self, classes: int, options: ConvRnnOptions) -> None:
        super().__init__()
        self.options, self.classes = options, classes
        self.front = FrontEnd(options.channels, options.width)
        self.convolutions = nn.ModuleList(
            CausalConvolution(options.width, options.kernel, options.dropout) for _ in range(options.convolutions)
        )
        cell = nn.LSTM if options.cell == "lstm" else nn.GRU
        sizes = [options.width, *[options.hidden] * (options.layers - 1)][: options.layers]
        self.recurrent = nn.ModuleList(cell(size, options.hidden, batch_first=True) for size in sizes)
        self.dropout = nn.Dropout(options.dropout)
        width = options.hidden if options.layers else options.width
        self.encoder = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    @property
    def chunk_frames(self) -> int:
        """Frames of logits one step makes."""
        return self.options.chunk

    @property
    def look_ahead_ms(self) -> int:
        """0: what is in one chunk with a frame but behind it is not looked at."""
        return 0

    @property
    def mean(self) -> Tensor:
        """The features' mean."""
        return self.front.normalise.mean

    def set_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the features' statistics."""
        self.front.normalise.set(mean, deviation)

    def start(self, batch: int) -> State:
        """Return the state: the front end's, one a convolution, and hidden (and cell) values of each layer."""
        count = self.options.layers * (2 if self.options.cell == "lstm" else 1)
        # a tensor each: those that are one object become one input of an exported step
        values = [self.head.weight.new_zeros(1, batch, self.options.hidden) for _ in range(count)]
        tails = [convolution.start(batch) for convolution in self.convolutions]  # type: ignore[operator]
        return (*self.front.start(batch), *tails, *values)

    def step(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the logits of some features, and the next state."""
        frames, kept = self.front(features, state[:2])
        rest, new = list(state[2:]), list(kept)
        for convolution in self.convolutions:
            frames, tail = convolution(frames, rest.pop(0))
            new.append(tail)
        for layer in self.recurrent:
            frames = self.dropout(frames)
            if self.options.cell == "lstm":
                frames, values = layer(frames, (rest.pop(0), rest.pop(0)))
                new += values
            else:
                frames, value = layer(frames, rest.pop(0))
                new.append(value)
        return self.head(self.encoder(self.dropout(frames))), tuple(new)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Return the logits."""
        return self.step(complete(features, lengths), self.start(len(features)))[0]
