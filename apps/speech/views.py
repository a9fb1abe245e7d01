"""Views: named, seeded transformations of an utterance, so that a teacher may hear another one than its student.

A view is written as steps joined by ``+``: ``speed:0.9``, ``noise:0:10``, ``room:0.4+noise:5:15``. A path with a + in
it is taken for one where it is a folder.

    clean                    nothing
    speed:FACTOR             resampling: shorter and higher above 1, longer and lower below (0.5 to 2)
    tempo:FACTOR             the same voice, faster above 1 and slower below (0.5 to 2)
    noise:LOW:HIGH[:WHAT]    noise at a signal-to-noise ratio drawn between LOW and HIGH dB; WHAT is white, pink, babble
                             (six speech-like noises) or a folder of recordings; without it one of the three, drawn
    room:SECONDS             a simulated room: noise that decays by 60 dB in that time behind the direct sound
    room:FOLDER              a room of a folder of recorded impulse responses
    codec:HERTZ[:mulaw]      a telephone: band limit, 8 kHz and back, with mulaw also 8-bit mu-law
    lowpass:HERTZ            what is above is removed

A teacher may hear another view than its student if frames stay the same: with ``tempo`` both hear the same before it.

The draws are a function of seed and key (the utterance's id) alone: the first ``noise`` of any view draws the same.
Samples that would leave [-1, 1] are scaled as a whole, never clipped. No torch.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from apps.speech.audio import audio_info, read_audio, resample
from apps.speech.data.formats import AUDIO_SUFFIXES
from apps.speech.features import SAMPLE_RATE
from apps.speech.noise import NOISES, active_power, generated_noise
from kdcore.config import UserError, nearest

_LONGEST_RESPONSE = 5.0
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


@dataclass(frozen=True)
class View:
    """Steps in order; none is the clean view."""

    steps: tuple[Step, ...] = ()

    @property
    def name(self) -> str:
        """How the view is written; ``parse_view`` reads it back."""
        return "+".join(step.name for step in self.steps) or "clean"

    @property
    def keeps_frames(self) -> bool:
        """Whether frame t of the view is frame t of the utterance; a changed speed or tempo moves them."""
        return all(step.keeps_frames for step in self.steps)

    @property
    def folders(self) -> list[Path]:
        """The folders of recordings that are heard in it."""
        given = [step.folder for step in self.steps if isinstance(step, Noise | RecordedRoom)]
        return [Path(folder) for folder in given if folder]

    def from_anywhere(self) -> View:
        """Return the view with its folders named so that it can be heard from any folder."""
        steps: list[Step] = []
        for step in self.steps:
            if isinstance(step, Noise) and step.folder:
                step = replace(step, what=os.path.abspath(step.what))
            elif isinstance(step, RecordedRoom):
                step = replace(step, folder=os.path.abspath(step.folder))
            steps.append(step)
        return View(tuple(steps))

    def apply(self, samples: np.ndarray, key: str, seed: int) -> np.ndarray:
        """Return the view float32 [n] of samples float32 [n] in [-1, 1] at 16 kHz.

        Raises:
            ValueError: not one channel of float32.
            UserError: a recording of a folder cannot be read.
        """
        if samples.ndim != 1 or samples.dtype != np.float32:
            raise ValueError(f"samples: wanted float32 [n], got {samples.dtype} {samples.shape}")
        if not len(samples):
            return samples
        for step, generator in self._drawing(key, seed):
            samples = _within(step.apply(samples, generator))
        return samples

    def snr(self, key: str, seed: int) -> float | None:
        """Return the signal-to-noise ratio in dB that ``apply`` draws for the first noise, None without noise."""
        for step, generator in self._drawing(key, seed):
            if isinstance(step, Noise):
                return step.draw(generator)
        return None

    def _drawing(self, key: str, seed: int) -> list[tuple[Step, np.random.Generator]]:
        """Return each step with its generator: of the seed, the key, its kind and how many of that kind came before."""
        pairs, met = [], dict.fromkeys((step.kind for step in self.steps), 0)
        for step in self.steps:
            digest = hashlib.sha256(f"{seed}\0{step.kind}\0{met[step.kind]}\0{key}".encode()).digest()
            pairs.append((step, np.random.default_rng(int.from_bytes(digest[:16], "big"))))
            met[step.kind] += 1
        return pairs


def _within(samples: np.ndarray) -> np.ndarray:
    peak = float(np.abs(samples).max()) if len(samples) else 0.0
    scaled = samples if peak <= 1.0 else samples * (1.0 / np.nextafter(peak, math.inf))
    return np.ascontiguousarray(scaled, np.float32)


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
        return f"{self.kind}:{_written(self.factor)}"


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
        return f"noise:{_written(self.low)}:{_written(self.high)}" + (f":{self.what}" if self.what else "")

    @property
    def folder(self) -> str:
        """The folder of recordings; empty for generated noise."""
        return "" if self.what in NOISES else self.what

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The recordings of the folder; none for generated noise."""
        return _recordings("noise", self.folder) if self.folder else ()

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
        return f"room:{_written(self.rt60)}"

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
        return _recordings("room", self.folder)

    def apply(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        path = self.files[int(generator.integers(len(self.files)))]
        response = read_audio(path, seconds=_LONGEST_RESPONSE).astype(np.float64)
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
        return f"codec:{_written(self.hertz)}" + (":mulaw" if self.mulaw else "")

    def apply(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        narrow = _within(resample(_low_passed(samples, self.hertz), 1, 2))
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
        return f"lowpass:{_written(self.hertz)}"

    def apply(self, samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        return _low_passed(samples, self.hertz)


def _low_passed(samples: np.ndarray, hertz: float) -> np.ndarray:
    from scipy.signal import firwin, oaconvolve

    half = 128
    taps = firwin(2 * half + 1, hertz, window=("kaiser", 5.65), fs=SAMPLE_RATE)
    return oaconvolve(samples.astype(np.float64), taps)[half : half + len(samples)].astype(np.float32)


def _recordings(kind: str, folder: str) -> tuple[Path, ...]:
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


def parse_view(text: str) -> View:
    """Return the view that is written so (see the module).

    Raises:
        UserError: an unknown name (the nearest is named), a missing, surplus or impossible number, a folder without
            audio.
    """
    steps = []
    for part in _parts(text):
        kind, _, rest = part.strip().partition(":")
        if kind not in _STEPS:
            raise UserError(f"view {text!r}: unknown name {kind!r}, {nearest(kind, _STEPS)}")
        step = _STEPS[kind](rest, f"view {part.strip()!r}")
        if step is not None:
            steps.append(step)
    return View(tuple(steps))


def _parts(text: str) -> list[str]:
    """Return the steps of a view as they are written.

    A + ends a step, unless it stands in the path of a folder that is there; the longest such path is taken.
    """
    pieces, parts = text.split("+"), []
    while pieces:
        joined = ["+".join(pieces[:count]) for count in range(len(pieces), 1, -1)]
        part = next((each for each in joined if (folder := _folder(each.strip())) and Path(folder).is_dir()), pieces[0])
        parts.append(part)
        del pieces[: part.count("+") + 1]
    return parts


def _folder(part: str) -> str:
    """Return the folder that a step ends with, as it is written; empty where it has none."""
    kind, _, rest = part.partition(":")
    if kind == "noise":
        rest = rest.partition(":")[2].partition(":")[2]
    return rest if kind in ("noise", "room") else ""


def _number(text: str, where: str, what: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise UserError(f"{where}: {what}: got {text!r}, wanted a number from {low:g} to {high:g}")
    return value


def _written(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _clean(rest: str, where: str) -> None:
    if rest:
        raise UserError(f"{where}: clean has no settings, got {rest!r}")


def _speed(rest: str, where: str) -> Step:
    return Speed(_number(rest, where, "factor", 0.5, 2.0))


def _tempo(rest: str, where: str) -> Step:
    return Tempo(_number(rest, where, "factor", 0.5, 2.0))


def _noise(rest: str, where: str) -> Step:
    low, _, others = rest.partition(":")
    high, colon, what = others.partition(":")
    step = Noise(_number(low, where, "low", -50, 100), _number(high, where, "high", -50, 100), what)
    if step.low > step.high:
        raise UserError(f"{where}: low is {step.low:g} dB, above high, {step.high:g} dB")
    if colon and not what:
        raise UserError(f"{where}: wanted {', '.join(NOISES)} or a folder after the last colon")
    if what not in ("", *NOISES):
        _recordings("noise", what)
    return step


def _room(rest: str, where: str) -> Step:
    try:
        float(rest)
    except ValueError:
        if not rest:
            raise UserError(f"{where}: wanted seconds or a folder of impulse responses") from None
        _recordings("room", rest)
        return RecordedRoom(rest)
    return Room(_number(rest, where, "seconds", 0.02, _LONGEST_RESPONSE))


def _codec(rest: str, where: str) -> Step:
    hertz, colon, coding = rest.partition(":")
    if colon and coding != "mulaw":
        raise UserError(f"{where}: got {coding!r}, wanted mulaw or nothing")
    return Codec(_number(hertz, where, "hertz", 200, 4000), bool(colon))


def _lowpass(rest: str, where: str) -> Step:
    return LowPass(_number(rest, where, "hertz", 200, 7900))


_STEPS: dict[str, Callable[[str, str], Step | None]] = {
    "clean": _clean,
    "speed": _speed,
    "tempo": _tempo,
    "noise": _noise,
    "room": _room,
    "codec": _codec,
    "lowpass": _lowpass,
}
