"""Conformers (Gulati et al., 2020): one that hears the whole utterance and teaches, one that works chunk by chunk.

Both differ from the paper in two things. Positions are rotary (Su et al., 2021): they depend on distances alone, as
the paper's relative ones, so that a chunk can be worked with its own positions and no counter that grows; they cost
no weights, and the attention stays one fused product. And what the paper normalises over the batch is normalised
within each frame, so that an utterance is worked the same in any batch and in any chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from apps.speech.features import SILENCE
from apps.speech.models.base import (
    SUBSAMPLING,
    AcousticModel,
    State,
    StreamingModel,
    check_sizes,
    complete,
    output_lengths,
)
from apps.speech.models.layers import FrontEnd

# frames whose attention is worked at once: what a long utterance needs grows with its length, not with its square
SPAN = 128


class Span(NamedTuple):
    """Queries ``start`` to ``end`` attend to the keys ``first`` to ``last`` that the mask (True) lets them."""

    start: int
    end: int
    first: int
    last: int
    mask: Tensor


class Plan(NamedTuple):
    """Who attends to whom, the same in every block: cosines and sines [K, D / 2 heads] of the keys, and spans."""

    cosines: Tensor
    sines: Tensor
    spans: list[Span]


def rotations(count: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [count, size / 2] of the angles by which places turn pairs of a head's values."""
    # float64: in float32 an angle of some thousands is off by more than streaming may differ from the whole
    places = torch.arange(count, dtype=torch.float64, device=like.device)
    steps = 10_000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64, device=like.device) / size)
    angles = places[:, None] * steps
    return angles.cos().float(), angles.sin().float()


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Return [B, H, T, D] with the pair (i, i + D / 2) of each frame turned by its place's angle i."""
    first, second = heads.chunk(2, -1)
    turned = torch.cat([first * cosines - second * sines, first * sines + second * cosines], -1)
    return turned.type_as(heads)


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotary positions, its normalisation before it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, frames: Tensor, cache: tuple[Tensor, Tensor] | None, plan: Plan
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return what is added to the frames [B, T, D], and the keys and values [B, K, D], those of the cache in front.

        Keys are kept as they are before they are turned: their places are counted from the first key of each call.
        """
        queries, keys, values = self.inputs(self.norm(frames)).chunk(3, -1)
        if cache is not None:
            keys, values = torch.cat([cache[0], keys], 1), torch.cat([cache[1], values], 1)
        before = keys.shape[1] - frames.shape[1]
        turned = rotate(self._split(queries), plan.cosines[before:], plan.sines[before:])
        places = rotate(self._split(keys), plan.cosines, plan.sines)
        contents = self._split(values)
        parts = [
            nn.functional.scaled_dot_product_attention(
                turned[:, :, start:end], places[:, :, first:last], contents[:, :, first:last], attn_mask=mask
            )
            for start, end, first, last, mask in plan.spans
        ]
        mixed = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
        return self.dropout(self.output(mixed.transpose(1, 2).flatten(2))), (keys, values)

    def _split(self, frames: Tensor) -> Tensor:
        """Return [B, T, D] as [B, H, T, D / H]."""
        return frames.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Convolution(nn.Module):
    """The Conformer's convolution over the ``size`` frames that end ``behind`` frames after each: gated, depthwise."""

    def __init__(self, width: int, size: int, behind: int, dropout: float) -> None:
        super().__init__()
        self.before, self.behind = size - 1 - behind, behind
        self.norm = nn.LayerNorm(width)
        self.gated = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, size, groups=width)
        self.middle = nn.LayerNorm(width)
        self.output = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, frames: Tensor, tail: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what is added to the frames [B, T, D], and the last frames the depthwise convolution was given.

        ``tail`` [B, before, D] is what it was given last, none at the start; frames that are not ``valid`` [B, T] count
        as what is there before and behind an utterance: zeros.
        """
        given = nn.functional.glu(self.gated(self.norm(frames)), -1)
        if valid is not None:
            given = given.masked_fill(~valid[..., None], 0)
        if tail is None:
            given = nn.functional.pad(given, (0, 0, self.before, self.behind))
        else:
            given = torch.cat([tail, given], 1)
        mixed = self.middle(self.depthwise(given.transpose(1, 2)).transpose(1, 2))
        added = self.dropout(self.output(nn.functional.silu(mixed)))
        return added, given[:, given.shape[1] - self.before :]


class FeedForward(nn.Sequential):
    """Two layers over each frame, [B, T, D] to [B, T, D]."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__(
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, width),
            nn.Dropout(dropout),
        )


# keys, values and the convolution's tail
BlockState = tuple[Tensor, Tensor, Tensor]


class Block(nn.Module):
    """Half a feed-forward, attention, convolution, the other half, all residual; normalised at its end."""

    def __init__(self, options: ConformerOptions | ChunkedConformerOptions, behind: int) -> None:
        super().__init__()
        width, dropout = options.width, options.dropout
        self.first = FeedForward(width, options.feed_forward, dropout)
        self.attention = SelfAttention(width, options.heads, dropout)
        self.convolution = Convolution(width, options.kernel, behind, dropout)
        self.second = FeedForward(width, options.feed_forward, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, frames: Tensor, state: BlockState | None, plan: Plan, valid: Tensor | None = None
    ) -> tuple[Tensor, BlockState]:
        """Return the frames [B, T, D], and all keys and values and the convolution's tail."""
        frames = frames + 0.5 * self.first(frames)
        added, (keys, values) = self.attention(frames, None if state is None else state[:2], plan)
        frames = frames + added
        added, tail = self.convolution(frames, None if state is None else state[2], valid)
        frames = frames + added
        return self.norm(frames + 0.5 * self.second(frames)), (keys, values, tail)


def _check(options: ConformerOptions | ChunkedConformerOptions, *names: str) -> None:
    """Raise ValueError for sizes that no model has."""
    check_sizes(options, "heads", "blocks", "feed_forward", "kernel", *names)
    if options.width % (2 * options.heads):
        raise ValueError(f"width: got {options.width}, wanted a multiple of twice the {options.heads} heads")


@dataclass(frozen=True)
class ConformerOptions:
    """The size of a Conformer that hears the whole utterance."""

    # of the two convolutions of the front end
    channels: tuple[int, int] = (16, 32)
    width: int = 176
    heads: int = 4
    blocks: int = 6
    # values between the two layers of a feed-forward
    feed_forward: int = 352
    # frames the convolution sees, as many before as behind
    kernel: int = 15
    dropout: float = 0.1

    def __post_init__(self) -> None:
        _check(self)
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel: got {self.kernel}, wanted an odd number")


class Conformer(AcousticModel):
    """A Conformer whose frames attend to all of their utterance."""

    kind: ClassVar[str] = "conformer"

    def __init__(self, classes: int, options: ConformerOptions) -> None:
        super().__init__()
        self.options, self.classes = options, classes
        self.front = FrontEnd(options.channels, options.width)
        self.blocks = nn.ModuleList(Block(options, options.kernel // 2) for _ in range(options.blocks))
        self.dropout = nn.Dropout(options.dropout)
        self.encoder = nn.LayerNorm(options.width)
        self.head = nn.Linear(options.width, classes)

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
        count = frames.shape[1]
        valid = torch.arange(count, device=frames.device) < output_lengths(lengths)[:, None]
        # an utterance without frames attends to one, since a softmax over nothing is not a number
        heard = valid.clone()
        heard[:, :1] = True
        tables = rotations(count, self.options.width // self.options.heads, frames)
        plan = Plan(*tables, [Span(0, count, 0, count, heard[:, None, None])])
        frames = self.dropout(frames)
        for block in self.blocks:
            frames, _ = block(frames, None, plan, valid)
        logits: Tensor = self.head(self.encoder(frames))
        return logits


@dataclass(frozen=True)
class ChunkedConformerOptions:
    """The size of a streaming Conformer."""

    channels: tuple[int, int] = (16, 32)
    width: int = 96
    heads: int = 4
    blocks: int = 5
    feed_forward: int = 224
    # frames the convolution sees: its own and those before
    kernel: int = 9
    dropout: float = 0.1
    # frames a step, of 40 ms each; a trained model may be given another
    chunk: int = 4
    # chunks before its own that a frame attends to
    left_chunks: int = 16
    # in training each batch is worked in chunks of one of these, drawn at random; none: of ``chunk``
    chunks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check(self, "chunk", "left_chunks")
        if any(chunk < 1 for chunk in self.chunks):
            raise ValueError(f"chunks: got {self.chunks}, wanted numbers of at least 1")


class ChunkedConformer(StreamingModel):
    """A Conformer whose frames attend to their chunk and ``left_chunks`` before it; its convolutions look back only.

    No weight depends on the chunk: ``model.options = replace(model.options, chunk=8)`` makes a trained model work in
    others, and it then looks as far ahead, and back, as they reach. One that is trained with several ``chunks`` does so
    without a loss to speak of (Zhang et al., 2020). Behind an utterance is digital silence, to the end of its chunk.
    """

    kind: ClassVar[str] = "chunked_conformer"

    def __init__(self, classes: int, options: ChunkedConformerOptions) -> None:
        super().__init__()
        self.options, self.classes = options, classes
        self.front = FrontEnd(options.channels, options.width)
        self.blocks = nn.ModuleList(Block(options, 0) for _ in range(options.blocks))
        self.dropout = nn.Dropout(options.dropout)
        self.encoder = nn.LayerNorm(options.width)
        self.head = nn.Linear(options.width, classes)

    @property
    def chunk_frames(self) -> int:
        """Frames of logits one step makes."""
        return self.options.chunk

    def reach(self) -> int:
        """Return how many frames before its own a frame attends to in the smallest chunks it is trained with."""
        return self.options.left_chunks * min(self.options.chunks or (self.options.chunk,))

    @property
    def mean(self) -> Tensor:
        """The features' mean."""
        return self.front.normalise.mean

    def set_statistics(self, mean: Tensor, deviation: Tensor) -> None:
        """Set the features' statistics."""
        self.front.normalise.set(mean, deviation)

    def start(self, batch: int) -> State:
        """Return the state: the front end's, three a block (keys, values, convolution), and the frames seen.

        Shapes: keys and values [B, left_chunks * chunk, D], convolution [B, kernel - 1, D]; frames seen int64 [B], at
        most as many as there are keys: what stands in front of them is no frame, and is not attended to.
        """
        options, weight = self.options, self.head.weight
        kept = options.left_chunks * options.chunk
        # no tensor stands twice: an export takes one that does for one input
        each = [
            weight.new_zeros(batch, count, options.width)
            for _ in range(options.blocks)
            for count in (kept, kept, options.kernel - 1)
        ]
        seen = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return (*self.front.start(batch), *each, seen)

    def step(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the logits of one chunk, and the next state."""
        options, seen = self.options, state[-1]
        frames, new = self.front(features, state[:2])
        kept, chunk = options.left_chunks * options.chunk, options.chunk
        heard = torch.arange(kept + chunk, device=seen.device) >= kept - seen[:, None]
        tables = rotations(kept + chunk, options.width // options.heads, frames)
        plan = Plan(*tables, [Span(0, chunk, 0, kept + chunk, heard[:, None, None])])
        frames = self.dropout(frames)
        for index, block in enumerate(self.blocks):
            frames, (keys, values, tail) = block(frames, state[2 + 3 * index : 5 + 3 * index], plan)
            new = (*new, keys[:, chunk:], values[:, chunk:], tail)
        return self.head(self.encoder(frames)), (*new, (seen + chunk).clamp(max=kept))

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Return the logits; in training, of chunks of a size drawn by torch's own generator."""
        options, chunk = self.options, self.options.chunk
        if self.training and options.chunks:
            chunk = options.chunks[int(torch.randint(len(options.chunks), ()))]
        missing = -features.shape[1] % (SUBSAMPLING * chunk)
        padded = complete(nn.functional.pad(features, (0, 0, 0, missing), value=SILENCE), lengths)
        frames, _ = self.front(padded, self.front.start(len(features)))
        plan = _chunks(frames, chunk, options.left_chunks, options.width // options.heads)
        frames = self.dropout(frames)
        for block in self.blocks:
            frames, _ = block(frames, None, plan)
        count = int(output_lengths(torch.tensor(features.shape[1])))
        logits: Tensor = self.head(self.encoder(frames[:, :count]))
        return logits


def _chunks(frames: Tensor, chunk: int, left: int, size: int) -> Plan:
    """Return the plan of an utterance in which chunks of frames attend to themselves and ``left`` before."""
    count, spans = frames.shape[1], []
    places = torch.arange(count, device=frames.device) // chunk
    width = max(SPAN // chunk, 1) * chunk
    for start in range(0, count, width):
        end, first = min(start + width, count), max(start - left * chunk, 0)
        behind = places[start:end, None] - places[first:end]
        spans.append(Span(start, end, first, end, (behind >= 0) & (behind <= left)))
    return Plan(*rotations(count, size, frames), spans)
