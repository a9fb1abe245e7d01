"""What is done to the samples of an utterance in a view: speed, tempo, noise, rooms, lines. No torch.

Each step is given samples float32 [n] at 16 kHz and a generator of its own, and returns as many, or by its pace others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from apps.speech.audio import audio_info, read_audio, resample
from apps.speech.data.formats import AUDIO_SUFFIXES
from apps.speech.features import SAMPLE_RATE
from apps.speech.noise import NOISES, active_power, generated_noise
from kdcore.config import UserError

LONGEST_RESPONSE = 5.0
_TRIES = 200


class Step(Protocol):
    """One transformation; ``kind`` names it, ``name`` is how it is written."""

    @property
    def kind(self) -> str: ...

    @property
    def keeps_frames(self) -> bool: ...

    @property
    def name(self) -> str: ...

    def apply(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray: ...


def within(samples: np.ndarray) -> np.ndarray:
    """Return samples float32 [n], scaled as a whole where one is beyond [-1, 1]."""
    peak = float(np.abs(samples).max()) if len(samples) else 0.0
    scaled = samples if peak <= 1.0 else samples * (1.0 / np.nextafter(peak, math.inf))
    return np.ascontiguousarray(scaled, np.float32)


def written(value: float) -> str:
    """Return a number as it stands in the name of a view."""
    return str(int(value)) if value == int(value) else repr(value)


@dataclass(frozen=True)
class Paced:
    """A step behind which speech is ``factor`` times as fast."""

    factor: float
    kind = ""

    @property
    def keeps_frames(self) -> bool:
        return self.factor == 1.0

    @property
    def name(self) -> str:
        return f"{self.kind}:{written(self.factor)}"


class Speed(Paced):
    """Resampling by ``1 / factor``, as a tape that runs faster."""

    kind = "speed"

    def apply(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        ratio = Fraction(self.factor).limit_denominator(1000)
        return resample(samples, ratio.denominator, ratio.numerator)


class Tempo(Paced):
    """Speech ``factor`` times as fast at the pitch it has, by WSOLA (Verhelst & Roelands, 1993).

    Pieces of 30 ms are overlapped by half, each taken at most 10 ms from its place, where it best goes on what came
    before.
    """

    kind = "tempo"
    _window, _search = 480, 160

    def apply(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        if self.keeps_frames:
            return samples
        count, hop, search = max(1, round(len(samples) / self.factor)), self._window // 2, self._search
        pieces = count // hop + 2
        # place 0 is half a piece and a search before the first sample
        before, after = hop + search, int(pieces * hop * self.factor) + 2 * (self._window + search) - len(samples)
        given = np.pad(samples, (before, max(0, after)))
        window = np.hanning(self._window + 1)[:-1].astype(np.float32)
        heard, start = np.zeros((pieces + 1) * hop, np.float32), search
        for piece in range(pieces):
            if piece:
                place = round(piece * hop * self.factor)
                goes_on = given[start + hop : start + hop + self._window]
                start = place + int(np.correlate(given[place : place + 2 * search + self._window], goes_on).argmax())
            heard[piece * hop : piece * hop + self._window] += window * given[start : start + self._window]
        return heard[hop : hop + count]


@dataclass(frozen=True)
class Noise:
    """Noise at a drawn ratio of the power of the active speech to that of the noise; silence stays as it is."""

    low: float
    high: float
    what: str = ""
    kind = "noise"
    keeps_frames = True

    @property
    def name(self) -> str:
        return f"noise:{written(self.low)}:{written(self.high)}" + (f":{self.what}" if self.what else "")

    @property
    def folder(self) -> str:
        """The folder of recordings; empty for generated noise."""
        return "" if self.what in NOISES else self.what

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The recordings of the folder; none for generated noise."""
        return recordings("noise", self.folder) if self.folder else ()

    def draw(self, generator: np.random.Generator) -> float:
        """Return the ratio in dB, the first draw of a generator."""
        return float(generator.uniform(self.low, self.high))

    def apply(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        snr = self.draw(generator)
        if self.files:
            noise = self._recorded(len(samples), generator)
        else:
            drawn = NOISES[int(generator.integers(len(NOISES)))]
            noise = generated_noise(self.what or drawn, len(samples), generator)
        noise = noise - noise.mean()
        speech, power = active_power(samples), float(np.square(noise).mean())
        if not speech or not power:
            return samples
        return samples + noise * math.sqrt(speech / power / 10 ** (snr / 10))

    def _recorded(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Return a piece of a recording; one that is silent would be no noise, and another is drawn."""
        for _ in range(_TRIES):
            noise = _excerpt(self.files[int(generator.integers(len(self.files)))], count, generator)
            if np.ptp(noise):
                return noise
        raise UserError(f"view {self.name}: {_TRIES} pieces of recordings of {self.folder} are silent; wanted noise")


def _excerpt(path: Path, count: int, generator: np.random.Generator) -> np.ndarray:
    """Return ``count`` samples of a recording from a drawn place, begun again where it ends."""
    seconds = audio_info(path).seconds
    start = generator.uniform(0.0, max(0.0, seconds - max(count / SAMPLE_RATE, 0.01)))
    piece = read_audio(path, start=start, seconds=count / SAMPLE_RATE).astype(np.float64)
    return np.resize(piece, count)


@dataclass(frozen=True)
class Room:
    """A simulated room: decaying noise, 0 to 12 dB below the direct sound in energy (drawn), from 2.5 ms after it.

    The level stays, and so do the frames: the direct sound comes at once.
    """

    rt60: float
    kind = "room"
    keeps_frames = True

    @property
    def name(self) -> str:
        return f"room:{written(self.rt60)}"

    def response(self, generator: np.random.Generator) -> np.ndarray:
        """Return an impulse response float64 [n]; its first sample, 1, is the direct sound."""
        ratio = generator.uniform(0.0, 12.0)
        count = max(2, math.ceil(self.rt60 * SAMPLE_RATE))
        # amplitude falls by 60 dB, a factor of 1000, over rt60
        tail = generator.standard_normal(count) * 1000.0 ** (-np.arange(count) / (self.rt60 * SAMPLE_RATE))
        tail[: SAMPLE_RATE // 400] = 0.0
        tail *= math.sqrt(10 ** (-ratio / 10) / np.square(tail).sum())
        tail[0] = 1.0
        return tail

    def apply(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return _convolved(samples, self.response(generator))


@dataclass(frozen=True)
class RecordedRoom:
    """A room of recorded impulse responses, one drawn; its loudest sample is taken for the direct sound."""

    folder: str
    kind = "room"
    keeps_frames = True

    @property
    def name(self) -> str:
        return f"room:{self.folder}"

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The recordings of the folder."""
        return recordings("room", self.folder)

    def apply(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        path = self.files[int(generator.integers(len(self.files)))]
        response = read_audio(path, seconds=LONGEST_RESPONSE).astype(np.float64)
        response = response[int(np.abs(response).argmax()) :]
        if not response.any():
            raise UserError(f"{path}: is silent; wanted an impulse response")
        return _convolved(samples, response)


def _convolved(samples: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Return samples through a response, as long and as loud as before."""
    from scipy.signal import oaconvolve

    heard = oaconvolve(samples.astype(np.float64), response)[: len(samples)]
    before, after = float(np.square(samples, dtype=np.float64).sum()), float(np.square(heard).sum())
    return heard * math.sqrt(before / after) if after > 0 else samples


@dataclass(frozen=True)
class Codec:
    """A telephone line: low-pass, 8 kHz and back; with ``mulaw`` also 8 bits by mu-law, mu = 255 (ITU-T G.711)."""

    hertz: float
    mulaw: bool = False
    kind = "codec"
    keeps_frames = True

    @property
    def name(self) -> str:
        return f"codec:{written(self.hertz)}" + (":mulaw" if self.mulaw else "")

    def apply(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        narrow = within(resample(_low_passed(samples, self.hertz), 1, 2))
        if self.mulaw:
            packed = np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / math.log(256)
            levels = np.round(packed * 127) / 127
            narrow = (np.sign(levels) * (256 ** np.abs(levels) - 1) / 255).astype(np.float32)
        return resample(narrow, 2, 1)[: len(samples)]


@dataclass(frozen=True)
class LowPass:
    """A linear-phase low-pass without delay: -6 dB at ``hertz``, 60 dB down 250 Hz above it."""

    hertz: float
    kind = "lowpass"
    keeps_frames = True

    @property
    def name(self) -> str:
        return f"lowpass:{written(self.hertz)}"

    def apply(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return _low_passed(samples, self.hertz)


def _low_passed(samples: np.ndarray, hertz: float) -> np.ndarray:
    from scipy.signal import firwin, oaconvolve

    half = 128
    taps = firwin(2 * half + 1, hertz, window=("kaiser", 5.65), fs=SAMPLE_RATE)
    return oaconvolve(samples.astype(np.float64), taps)[half : half + len(samples)].astype(np.float32)


def recordings(kind: str, folder: str) -> tuple[Path, ...]:
    """Return the audio files of a folder, sorted; UserError if there are none, or one cannot be read."""
    root = Path(folder)
    files = tuple(sorted(each for each in root.rglob("*") if each.suffix.lower() in AUDIO_SUFFIXES and each.is_file()))
    if not files:
        raise UserError(f"view {kind}: {folder}: {'holds no audio files' if root.is_dir() else 'is no folder'}")
    for each in files:  # what cannot be read is named now, and not when it is drawn
        about = each.stat()
        _readable(each, about.st_size, about.st_mtime_ns)
    return files


@lru_cache(maxsize=1 << 17)
def _readable(path: Path, size: int, changed: int) -> None:
    """Raise UserError if a file has no header that can be read; each state of it is looked at once."""
    audio_info(path)
