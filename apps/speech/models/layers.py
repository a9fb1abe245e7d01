"""Layers with a left context and no right one: whole utterances, or step by step with a state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from apps.speech.features import FEATURES
from apps.speech.models.base import Normalise, State


class FrontEnd(nn.Module):
    """Features [B, T, 80] to vectors [B, T / 4, width]: two convolutions of stride 2 over time and mel bins.

    A vector sees its own four features and, over two convolutions, three before them: nothing later. The state is the
    last frame each convolution was given; zeros at the start, as the padding of whole utterances.
    """

    def __init__(self, channels: tuple[int, int], width: int) -> None:
        super().__init__()
        first, second = channels
        self.normalise = Normalise()
        # left context of one frame; the bins are padded on both sides
        self.first = nn.Conv2d(1, first, 3, stride=2, padding=(0, 1))
        self.second = nn.Conv2d(first, second, 3, stride=2, padding=(0, 1))
        self.project = nn.Linear(second * FEATURES // 4, width)
        self.norm = nn.LayerNorm(width)

    def start(self, batch: int) -> State:
        """Return the state at the start."""
        weight = self.project.weight
        return (
            weight.new_zeros(batch, 1, 1, FEATURES),
            weight.new_zeros(batch, self.first.out_channels, 1, FEATURES // 2),
        )

    def forward(self, features: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the vectors and the next state; T is a multiple of 4."""
        given = torch.cat([state[0], self.normalise(features)[:, None]], 2)
        middle = torch.cat([state[1], torch.relu(self.first(given))], 2)
        maps = torch.relu(self.second(middle))
        vectors = self.norm(self.project(maps.transpose(1, 2).flatten(2)))
        return vectors, (given[:, :, -1:], middle[:, :, -1:])


class CausalConvolution(nn.Module):
    """A residual depthwise-separable convolution over the last ``size`` frames: [B, T, D] to [B, T, D]."""

    def __init__(self, width: int, size: int, dropout: float) -> None:
        super().__init__()
        self.size = size
        self.norm = nn.LayerNorm(width)
        self.depthwise = nn.Conv1d(width, width, size, groups=width)
        self.pointwise = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def start(self, batch: int) -> Tensor:
        """Return the state at the start: the frames before the first, all zeros."""
        weight = self.pointwise.weight
        return weight.new_zeros(batch, self.size - 1, weight.shape[0])

    def forward(self, frames: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the frames and the next state."""
        given = torch.cat([state, self.norm(frames)], 1)
        mixed = self.depthwise(given.transpose(1, 2)).transpose(1, 2)
        return frames + self.dropout(self.pointwise(nn.functional.silu(mixed))), given[
            :, given.shape[1] - self.size + 1 :
        ]


def reverse(frames: Tensor, lengths: Tensor) -> Tensor:
    """Return [B, T, D] with the first ``lengths`` int64 [B] frames of each row in reverse order."""
    places = torch.arange(frames.shape[1], device=frames.device)
    order = torch.where(places < lengths[:, None], lengths[:, None] - 1 - places, places)
    return frames.gather(1, order[..., None].expand_as(frames))
