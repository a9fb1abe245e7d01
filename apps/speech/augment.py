"""What a model in training hears of an utterance, drawn anew each time: another voice, with stretches hidden.

The voice: vocal tract length perturbation (Jaitly and Hinton, 2013), loudness and tilt of the spectrum. What is hidden:
bands of mel bins and spans of frames (SpecAugment, Park et al., 2019). Frames keep their places, so that what a teacher
says of them stays true. What is validated and tested is never changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from apps.speech.features import FEATURES, SAMPLE_RATE, SILENCE

_NEPER_A_DB = math.log(10) / 10  # features are natural logarithms of power


@dataclass(frozen=True)
class Augment:
    """How far voices are changed and how much is hidden; 0 changes and hides nothing."""

    # the most frequencies are stretched or shrunk, as by another vocal tract: 0.1 by up to 10 %
    warp: float = 0.0
    # the most the level rises or falls, in dB
    level: float = 0.0
    # the most the spectrum is tilted: by so many dB up at one end and down at the other
    tilt: float = 0.0
    # bands, and the most mel bins one has
    bands: int = 2
    band: int = 20
    # spans a second of audio, the most frames (10 ms) one has, and the most of an utterance they take together
    spans: float = 1.0
    span: int = 15
    share: float = 0.3

    def __post_init__(self) -> None:
        numbers = (self.level, self.tilt, self.bands, self.band, self.spans, self.span)
        if not all(0 <= each < math.inf for each in numbers) or not 0 <= self.share <= 1 or not 0 <= self.warp <= 0.5:
            raise ValueError(f"augment: wanted numbers >= 0, a share in 0..1 and a warp in 0..0.5, got {self}")

    def __call__(self, features: Tensor, lengths: Tensor, fill: Tensor) -> Tensor:
        """Return features [B, T, 80] of other voices, bands and spans replaced by ``fill`` [80]; by torch's generator.

        Shapes: lengths int64 [B].
        """
        features, lengths = self._voiced(features), lengths.cpu()  # what is drawn is drawn there, whatever the device
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

    def _voiced(self, features: Tensor) -> Tensor:
        """Return the features as another speaker over another line might have given them."""
        rows = len(features)
        if self.warp:
            features = warped(features, 1 + self.warp * _symmetric(rows).to(features.device))
        if self.level or self.tilt:
            slope = torch.linspace(-1, 1, FEATURES)
            change = _NEPER_A_DB * (
                self.level * _symmetric(rows)[:, None] + self.tilt * _symmetric(rows)[:, None] * slope
            )
            louder = (features + change[:, None].to(features.device)).clamp_min(SILENCE)
            features = torch.where(features > SILENCE, louder, features)  # digital silence stays silent
        return features

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


def _symmetric(rows: int) -> Tensor:
    """Return float [B] of -1..1."""
    return 2 * torch.rand(rows) - 1


def warped(features: Tensor, factors: Tensor) -> Tensor:
    """Return features [B, T, 80] whose bins hear what is at ``factors`` [B] times their frequency, interpolated.

    A factor above 1 lowers formants, as a longer vocal tract does. Above the highest bin its value is repeated.
    """
    bins = features.shape[2]
    top = _mel(torch.tensor(SAMPLE_RATE / 2))
    # the middles of the bins are equally far from each other on the mel scale, half the sampling rate is the last edge
    middles = _hertz(torch.arange(1, bins + 1) * top / (bins + 1)).to(features.device)
    places = (_mel(middles * factors[:, None]) * (bins + 1) / top - 1).clamp(0, bins - 1)
    low = places.long().clamp(max=bins - 2)
    share = (places - low)[:, None].to(features.dtype).expand_as(features)
    below, above = (features.gather(2, at[:, None].expand_as(features)) for at in (low, low + 1))
    return torch.lerp(below, above, share)


def _mel(hertz: Tensor) -> Tensor:
    """Return mels of Slaney's scale: linear to 1000 Hz, 15 mel, then 27 mel for each factor of 6.4."""
    return torch.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * torch.log(hertz.clamp_min(1) / 1000) / math.log(6.4))


def _hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
