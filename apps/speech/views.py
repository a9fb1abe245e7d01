"""Views: named, seeded transformations of an utterance, so that a teacher may hear another one than its student.

A view is written as steps joined by ``+``: ``speed:0.9``, ``noise:0:10``, ``room:0.4+noise:5:15``. A path with a + in
it is taken for one where it is a folder.

    clean                    nothing
    channel:NUMBER           one channel of a recording of several, from 0, before all else; without it, the mean of all
    speed:FACTOR             resampling: shorter and higher above 1, longer and lower below (0.5 to 2)
    tempo:FACTOR             the same voice, faster above 1 and slower below (0.5 to 2)
    noise:LOW:HIGH[:WHAT]    noise at a signal-to-noise ratio drawn between LOW and HIGH dB; WHAT is white, pink, babble
                             (six speech-like noises) or a folder of recordings; without it one of the three, drawn
    room:SECONDS             a simulated room: noise that decays by 60 dB in that time behind the direct sound
    room:FOLDER              a room of a folder of recorded impulse responses
    codec:HERTZ[:mulaw]      a telephone: band limit, 8 kHz and back, with mulaw also 8-bit mu-law
    lowpass:HERTZ            what is above is removed

A teacher may hear another view than its student if frames stay the same: with ``tempo`` both hear the same before it.
So many microphones teach one (``clean`` and ``channel:0``), or the one at the mouth another far off that was recorded
beside it.

The draws are a function of seed and key (the utterance's id) alone: the first ``noise`` of any view draws the same.
Samples that would leave [-1, 1] are scaled as a whole, never clipped. No torch.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from apps.speech.data.utterance import Corpus, Utterance
from apps.speech.noise import NOISES
from apps.speech.view_steps import (
    LONGEST_RESPONSE,
    Codec,
    LowPass,
    Noise,
    RecordedRoom,
    Room,
    Speed,
    Step,
    Tempo,
    recordings,
    within,
)
from kdcore.config import UserError, nearest

_CHANNEL = "channel"
# as a file of audio has at most
_MOST_CHANNELS = 1024


@dataclass(frozen=True)
class View:
    """Steps in order, of one channel or the mean of all; none is the clean view."""

    steps: tuple[Step, ...] = ()
    channel: int | None = None

    @property
    def name(self) -> str:
        """How the view is written; ``parse_view`` reads it back."""
        source = [] if self.channel is None else [f"{_CHANNEL}:{self.channel}"]
        return "+".join([*source, *(step.name for step in self.steps)]) or "clean"

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
        return View(tuple(steps), self.channel)

    def hear(self, corpus: Corpus, utterance: Utterance, seed: int) -> np.ndarray:
        """Return the view float32 [n] of an utterance of a corpus; errors as ``Corpus.load`` and ``apply``."""
        return self.apply(corpus.load(utterance, self.channel), utterance.id, seed)

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
            samples = within(step.apply(samples, generator))
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


def parse_view(text: str) -> View:
    """Return the view that is written so (see the module).

    Raises:
        UserError: an unknown name (the nearest is named), a missing, surplus or impossible number, a folder without
            audio.
    """
    steps: list[Step] = []
    channel: int | None = None
    for place, part in enumerate(_parts(text)):
        kind, _, rest = part.strip().partition(":")
        where = f"view {part.strip()!r}"
        if kind == _CHANNEL:
            if place:
                raise UserError(f"view {text!r}: {kind} comes first, once")
            channel = _channel(rest, where)
            continue
        if kind not in _STEPS:
            raise UserError(f"view {text!r}: unknown name {kind!r}, {nearest(kind, (_CHANNEL, *_STEPS))}")
        if (step := _STEPS[kind](rest, where)) is not None:
            steps.append(step)
    return View(tuple(steps), channel)


def _channel(rest: str, where: str) -> int:
    if not (rest.isascii() and rest.isdigit() and int(rest) < _MOST_CHANNELS):
        raise UserError(f"{where}: got {rest!r}, wanted the number of a channel, from 0, below {_MOST_CHANNELS}")
    return int(rest)


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
        recordings("noise", what)
    return step


def _room(rest: str, where: str) -> Step:
    try:
        float(rest)
    except ValueError:
        if not rest:
            raise UserError(f"{where}: wanted seconds or a folder of impulse responses") from None
        recordings("room", rest)
        return RecordedRoom(rest)
    return Room(_number(rest, where, "seconds", 0.02, LONGEST_RESPONSE))


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
