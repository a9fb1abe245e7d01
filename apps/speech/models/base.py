"""What every acoustic model is: features in, CTC logits out, one frame each 40 ms; streaming ones also step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from apps.speech.features import FEATURE_SHIFT_MS, FEATURES, SILENCE
from kdcore.teaching import Term

# feature frames that become one frame of logits
SUBSAMPLING = 4
FRAME_MS = SUBSAMPLING * FEATURE_SHIFT_MS
# layers of a block: its output, and the queries and keys of all heads, side by side (values behind them)
OUTPUT, ATTENTION = "norm", "attention.inputs"

State = tuple[Tensor, ...]


def output_lengths(lengths: Tensor) -> Tensor:
    """Return the frames of logits of so many feature frames: int64, rounded up."""
    return (lengths + SUBSAMPLING - 1) // SUBSAMPLING


def complete(features: Tensor, lengths: Tensor) -> Tensor:
    """Return features [B, T', 80], T' a multiple of 4, with digital silence behind each length.

    What a model says of an utterance then does not depend on what it shares a batch with.
    """
    missing = -features.shape[1] % SUBSAMPLING
    padded = nn.functional.pad(features, (0, 0, 0, missing), value=SILENCE)
    behind = torch.arange(padded.shape[1], device=lengths.device) >= lengths[:, None]
    return padded.masked_fill(behind[..., None], SILENCE)


def check_sizes(options: Any, *names: str) -> None:
    """Check what the options of every model have (``channels``, ``width``, ``dropout``), and the sizes of ``names``.

    Raises:
        ValueError: a size below 1, other than two channels, or a dropout outside [0, 1).
    """
    for name in ("width", *names):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: got {getattr(options, name)}, wanted at least 1")
    if len(options.channels) != 2 or min(options.channels) < 1:
        raise ValueError(f"channels: got {options.channels}, wanted two numbers of at least 1")
    if not 0 <= options.dropout < 1:
        raise ValueError(f"dropout: got {options.dropout}, wanted 0 to below 1")


class AcousticModel(nn.Module):
    """A CTC model: features float32 [B, T, 80] to logits [B, T / 4, C], the blank last.

    Hints take layers by their paths: ``encoder``, the last one, and ``blocks.N.norm`` and ``blocks.N.attention.inputs``
    where the model has blocks.
    """

    kind: ClassVar[str]
    streaming: ClassVar[bool] = False
    # the options the model was made of, as they are stored beside its weights
    options: Any
    classes: int
    # encoder frames to logits
    head: nn.Linear

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Return the logits [B, ceil(T / 4), C] of whole utterances; those of frame t never see beyond a length.

        Shapes: features [B, T, 80], lengths int64 [B] in feature frames. ``output_lengths`` says which frames count.
        """
        raise TypeError(f"{type(self).__name__} does not define forward()")

    def set_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the features' global mean and standard deviation [80], of training data."""
        raise TypeError(f"{type(self).__name__} does not define set_statistics()")

    @property
    def mean(self) -> Tensor:
        """The features' mean [80] that ``set_statistics`` was given: what stands where features are hidden."""
        raise TypeError(f"{type(self).__name__} does not define mean")

    def own_terms(self) -> Sequence[Term]:
        """Return what a model learns beside CTC, of values of the teaching step; nothing for most."""
        return ()

    def own_layers(self) -> tuple[str, ...]:
        """Return the layers whose output ``own_terms`` read, as ``student.LAYER``."""
        return ()

    def width(self, layer: str) -> int:
        """Return the width D of what is compared of a layer's output, its first values: [B, T / 4, D].

        Raises:
            ValueError: the model has no such layer.
        """
        own = int(self.options.width)
        known = {"encoder": self.head.in_features}
        for index in range(len(getattr(self, "blocks", ()))):
            known |= {f"blocks.{index}.{OUTPUT}": own, f"blocks.{index}.{ATTENTION}": 2 * own}
        if layer not in known:
            raise ValueError(f"layer: {self.kind} has no {layer!r}, it has {', '.join(known)}")
        return known[layer]

    def heads(self) -> int:
        """Return how many heads the attention of its blocks has; ValueError where it has no blocks."""
        if not hasattr(self, "blocks"):
            raise ValueError(f"heads: {self.kind} has no attention over frames")
        return int(self.options.heads)

    def reach(self) -> int | None:
        """Return how many frames before its own a frame always attends to; None: all there are."""
        return None

    def label(self) -> str:
        """Return the name of the model in tables: its kind, and its size in millions of weights."""
        return f"{self.kind}-{self.parameter_count() / 1e6:.2f}M"

    def parameter_count(self) -> int:
        """Return the number of weights."""
        return sum(parameter.numel() for parameter in self.parameters())


class StreamingModel(AcousticModel):
    """A model that also works step by step, and then gives what it gives of the whole, to rounding."""

    streaming: ClassVar[bool] = True

    @property
    def chunk_frames(self) -> int:
        """Frames of logits one step makes, of four times as many feature frames."""
        raise TypeError(f"{type(self).__name__} does not define chunk_frames")

    @property
    def look_ahead_ms(self) -> int:
        """Milliseconds of audio behind the start of a frame of 40 ms that its logits may depend on, at most.

        The frame's own 40 ms are not counted, nor the 7.5 ms by which the window of its last feature reaches beyond
        them; what comes in one chunk with it is.
        """
        return (self.chunk_frames - 1) * FRAME_MS

    def start(self, batch: int) -> State:
        """Return the state before the first step."""
        raise TypeError(f"{type(self).__name__} does not define start()")

    def step(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the logits [B, chunk_frames, C] of features [B, 4 * chunk_frames, 80], and the next state."""
        raise TypeError(f"{type(self).__name__} does not define step()")

    @torch.no_grad()
    def stream(self, features: Tensor) -> Tensor:
        """Return the logits [ceil(T / 4), C] of one utterance [T, 80], step by step: for tests and measurements."""
        count = int(output_lengths(torch.tensor(len(features))))
        size = SUBSAMPLING * self.chunk_frames
        whole = nn.functional.pad(features, (0, 0, 0, -len(features) % size), value=SILENCE)
        state, parts = self.start(1), []
        for chunk in whole.split(size):
            logits, state = self.step(chunk[None], state)
            parts.append(logits[0])
        return torch.cat(parts)[:count] if parts else features.new_zeros(0, self.classes)


class Normalise(nn.Module):
    """Features minus their global mean, over their standard deviation."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("scale", torch.ones(FEATURES))

    def set(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the statistics [80]; a bin that never varies is only moved."""
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > 1e-3, 1 / deviation.clamp(min=1e-3), torch.ones_like(deviation)))

    def forward(self, features: Tensor) -> Tensor:
        """Return the normalised features."""
        return (features - self.mean) * self.scale
