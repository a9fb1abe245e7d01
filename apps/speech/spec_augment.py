"""SpecAugment: bands of mel bins and spans of frames are hidden from a student (Park et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SpecAugment:
    """How much is hidden; 0 masks hide nothing."""

    # bands, and the most mel bins one has
    bands: int = 2
    band: int = 20
    # spans a second of audio, the most frames (10 ms) one has, and the most of an utterance they take together
    spans: float = 1.0
    span: int = 15
    share: float = 0.3

    def __post_init__(self) -> None:
        if min(self.bands, self.band, self.spans, self.span) < 0 or not 0 <= self.share <= 1:
            raise ValueError(f"augment: wanted numbers >= 0 and a share in 0..1, got {self}")

    def __call__(self, features: Tensor, lengths: Tensor, fill: Tensor) -> Tensor:
        """Return features [B, T, F] with bands and spans replaced by ``fill`` [F], drawn by torch's generator.

        Shapes: lengths int64 [B].
        """
        rows, frames, bins = features.shape
        hidden = self._masks(torch.full((rows,), bins), self.bands, self.band, bins)[:, None, :]
        if self.spans and self.span:
            most = (lengths.float() * self.share).long()
            count = int((self.spans * lengths.max().item() / 100) + 0.5)
            sizes = torch.rand(rows, max(count, 1)) * (self.span + 1)
            wanted = torch.arange(max(count, 1)) < (self.spans * lengths[:, None].float() / 100 + 0.5).long()
            sizes = (
                (sizes.long() * wanted)
                .cumsum(1)
                .clamp(max=most[:, None])
                .diff(dim=1, prepend=torch.zeros(rows, 1, dtype=torch.long))
            )
            starts = (torch.rand(rows, sizes.shape[1]) * (lengths[:, None] - sizes + 1).float()).long()
            places = torch.arange(frames)
            inside = (places >= starts[..., None]) & (places < (starts + sizes)[..., None])
            hidden = hidden | inside.any(1)[..., None]
        return torch.where(hidden.to(features.device), fill, features)

    @staticmethod
    def _masks(sizes: Tensor, count: int, most: int, length: int) -> Tensor:
        """Return bool [B, length]: true within any of ``count`` random stretches of up to ``most`` places."""
        rows = len(sizes)
        if not count or not most:
            return torch.zeros(rows, length, dtype=torch.bool)
        width = (torch.rand(rows, count) * (min(most, length) + 1)).long()
        start = (torch.rand(rows, count) * (sizes[:, None] - width + 1).float()).long()
        places = torch.arange(length)
        return ((places >= start[..., None]) & (places < (start + width)[..., None])).any(1)
