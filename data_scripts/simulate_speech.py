"""The embedded default recordings: commands, digits and spelled words, spoken by 90 voices of espeak-ng.

Synthetic speech is far easier to recognise than people are; what it is for is to try the whole way, from manifest to
streaming student, anywhere and offline, and to add to real recordings. ``dataset.json`` says that it is simulated.

The same seed gives the same bytes: every clip is spoken by a fresh engine (``espeak``) and has a random stream of its
own, so that utterance 5 does not depend on utterance 4.
"""

from __future__ import annotations

import functools
import io
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from data_scripts.espeak import Speaker, Voice
from data_scripts.prepared import is_prepared, preparing
from data_scripts.speech_grammar import sentence, spoken
from kdcore.config import UserError

VERSION = 1  # of the generator: raised when the same parameters give other sentences, voices or noise
SAMPLE_RATE = 16_000
SPLITS = ("train", "valid", "test")
ACCENTS = ("en-us", "en-us-nyc", "en-gb-x-rp", "en-gb-scotland", "en-029")
# espeak-ng's variants that pass for people; of near twins (Gene and Gene2) one
VARIANTS = (
    *("Alex", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Henrique", "Hugo", "Jacky", "Lee"),
    *("Marco", "Mario", "Michael", "Mike", "Nguyen", "RicishayMax", "Storm", "anika", "antonio", "aunty", "belinda"),
    *("boris", "ed", "edward", "f1", "f2", "f3", "f4", "f5", "grandma", "grandpa", "gustave", "ian", "iven", "john"),
    *(
        "linda",
        "m1",
        "m2",
        "m3",
        "m4",
        "m5",
        "m6",
        "m7",
        "m8",
        "marcelo",
        "max",
        "michel",
        "miguel",
        "norbert",
        "pablo",
    ),
    *("paul", "pedro", "quincy", "robert", "shelby", "steph", "travis", "victor"),
)
VOICES = 90
_STREAM_VOICES, _STREAM_SENTENCES, _STREAM_CLIPS = 0, 1, 2
SILENCE_SECONDS = (0.1, 0.5)  # before and after the speech
_LEVEL_DB = (-32.0, -18.0)  # of the speech, below full scale
_MOST_SILENCE, _LONGEST_TEXT = 60.0, 1000
_QUIET = 0.01  # of the loudest 10 ms: what counts as silence at the ends


@dataclass(frozen=True)
class Talker:
    """One simulated person; no two of different splits share an espeak-ng variant, whatever pitch it is set to."""

    name: str
    split: str
    voice: Voice


@dataclass(frozen=True)
class Clips:
    """What is said and how it sounds, beside the voices: as the parameters of ``simulate``."""

    seed: int
    snr: tuple[float, float] | None
    silence: tuple[float, float]
    texts: tuple[str, ...]


def simulate(
    folder: str | Path,
    *,
    utterances: int = 600,
    seed: int = 0,
    snr: tuple[float, float] | None = (10.0, 30.0),
    silence: tuple[float, float] = SILENCE_SECONDS,
    texts: Sequence[str] = (),
    progress: bool = False,
) -> Path:
    """Write simulated recordings to ``folder`` and return it; complete output of the same parameters is kept.

    Files: ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl`` (id, audio_filepath within the folder, text, duration in
    seconds, speaker, snr in dB), FLAC files of 16 kHz, and ``dataset.json`` with ``"simulated": true``, the seed, the
    voices and the versions of what made them. A tenth of the utterances each are for validation and test, by speakers
    of their own. The folder is written beside its place and renamed when complete.

    Options:
        snr: range of the signal-to-noise ratio, drawn for each utterance; None adds no noise (and writes no snr).
        silence: range of the seconds before and behind the speech, drawn for each utterance.
        texts: sentences, of which each utterance is one, drawn; those of the grammar if there are none.
        progress: shows a bar, and at the end how fast it went.

    Raises:
        UserError: a parameter is out of range, espeak-ng says nothing for a text, ``folder`` holds other files, or
            ``espeakng-loader`` is not installed.
    """
    clips = Clips(seed, snr, silence, tuple(" ".join(text.split()) for text in texts))
    record = _record(utterances, clips)
    if is_prepared(Path(folder), record):
        return Path(folder)
    started, computed, seconds = time.monotonic(), _computing_seconds(), 0.0
    console = Console(stderr=True)
    with Speaker() as speaker, preparing(Path(folder), record) as (temporary, details):
        people = talkers(seed)
        details["voices"] = {each.name: {"split": each.split, **asdict(each.voice)} for each in people}
        details["versions"] = _versions(speaker)
        for split, indices in _shares(utterances).items():
            own = [each for each in people if each.split == split]
            work: Iterable[int] = indices
            if progress:
                work = track(
                    indices, f"Speaking {split}", console=console, disable=not console.is_terminal, transient=True
                )
            lines = [_write_utterance(temporary, speaker, own, index, clips) for index in work]
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            (temporary / f"{split}.jsonl").write_text(text, encoding="utf-8")
            details[split] = {"utterances": len(lines), "seconds": round(sum(line["duration"] for line in lines), 4)}
            seconds += details[split]["seconds"]
    if progress:
        took, computed = time.monotonic() - started, _computing_seconds() - computed
        what = f"{utterances:,} utterances, {seconds / 60:.1f} minutes of speech, in {took:.1f} s"
        speed = f"{computed:.1f} s of one core: {seconds / computed:.0f} times real time"
        console.print(f"Simulated {what} ({speed})", highlight=False, soft_wrap=True)
    return Path(folder)


def talkers(seed: int) -> list[Talker]:
    """Return the 90 voices of a seed: 60 variants of espeak-ng, half of them at two settings of accent, pitch and rate.

    A ninth of the variants each are for validation and for test.
    """
    generator = np.random.default_rng([seed, _STREAM_VOICES])
    order = generator.permutation(len(VARIANTS))
    people = []
    for number in range(VOICES):
        position = number % len(VARIANTS)
        variant = VARIANTS[order[position]]
        voice = Voice(
            name=f"{ACCENTS[generator.choice(len(ACCENTS), p=(0.5, 0.1, 0.2, 0.1, 0.1))]}+{variant}",
            rate=int(generator.integers(115, 191)),
            pitch=int(generator.integers(35, 66)),
            range=int(generator.integers(30, 71)),
            gap=int(generator.integers(0, 9)),
        )
        split = {0: "test", 1: "valid"}.get(position % 9, "train")
        people.append(Talker(f"voice{number:02d}", split, voice))
    return people


def trim(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    """Return float samples [n] without the silence at their ends, in steps of 10 ms; silence has none left."""
    step = sample_rate // 100
    blocks = np.pad(samples, (0, -len(samples) % step)).reshape(-1, step)
    loudness = np.sqrt(np.mean(np.square(blocks), axis=1))
    loud = np.flatnonzero(loudness > _QUIET * loudness.max(initial=0.0))
    return samples[loud[0] * step : (loud[-1] + 1) * step] if len(loud) else samples[:0]


def coloured_noise(generator: np.random.Generator, count: int, slope: float) -> np.ndarray:
    """Return noise float64 [count] of power 1, with a spectrum that falls as frequency^-``slope``: 0 white, 1 pink."""
    import scipy.fft

    size = scipy.fft.next_fast_len(max(count, 2), real=True)
    spectrum = scipy.fft.rfft(generator.standard_normal(size))
    # below 50 Hz flat: a steep noise would otherwise be a slow wander that no microphone passes on
    floor = max(50.0 * size / SAMPLE_RATE, 1.0)
    spectrum *= np.maximum(np.arange(len(spectrum)), floor) ** (-slope / 2)
    spectrum[0] = 0
    noise = scipy.fft.irfft(spectrum, size)[:count]
    return noise / np.sqrt(np.mean(np.square(noise)))


def mix(
    speech: np.ndarray,
    generator: np.random.Generator,
    snr: float | None,
    silence: tuple[float, float] = SILENCE_SECONDS,
) -> np.ndarray:
    """Return ``speech`` [n] at a level drawn at random, between stretches of silence, in noise at ``snr`` dB.

    The ratio is of the power of the speech from its first to its last sound to the power of the noise.
    """
    before, after = (round(SAMPLE_RATE * generator.uniform(*silence)) for _ in range(2))
    power = np.sqrt(np.mean(np.square(speech)))
    level = 10 ** (generator.uniform(*_LEVEL_DB) / 20)
    signal = np.pad(speech * (level / power), (before, after))
    if snr is not None:
        noise = coloured_noise(generator, len(signal), slope=generator.uniform(0, 1.5))
        signal += noise * level * 10 ** (-snr / 20)
    return signal * min(1.0, 0.95 / np.abs(signal).max())


def _write_utterance(folder: Path, speaker: Speaker, people: list[Talker], index: int, clips: Clips) -> dict[str, Any]:
    """Write one recording and return its line of the manifest; utterances go round the people in turn."""
    import soundfile

    drawing = np.random.default_rng([clips.seed, _STREAM_SENTENCES, index])
    text = clips.texts[drawing.integers(len(clips.texts))] if clips.texts else sentence(drawing)
    generator = np.random.default_rng([clips.seed, _STREAM_CLIPS, index])
    person = people[index % len(people)]
    ratio = None if clips.snr is None else round(float(generator.uniform(*clips.snr)), 1)
    # of the grammar's sentences, some words are letters and not what they look like
    said = speaker.speak(text if clips.texts else spoken(text), person.voice)
    speech = trim(_resample(said, speaker.sample_rate), SAMPLE_RATE)
    if len(speech) == 0:
        raise UserError(f"text {text!r}: espeak-ng says nothing for it in voice {person.voice.name}")
    samples = np.round(mix(speech, generator, ratio, clips.silence) * 32767).astype(np.int16)
    name = f"sim{index:06d}-{person.name}"
    path = folder / person.split / f"{name}.flac"
    path.parent.mkdir(exist_ok=True)
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    try:
        path.write_bytes(encoded.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    line: dict[str, Any] = {"id": name, "audio_filepath": f"{person.split}/{path.name}", "text": text}
    line |= {"duration": len(samples) / SAMPLE_RATE, "speaker": person.name}
    return line | ({} if ratio is None else {"snr": ratio})


def _resample(samples: np.ndarray, sample_rate: int) -> np.ndarray:
    from scipy.signal import resample_poly

    ratio = np.gcd(SAMPLE_RATE, sample_rate)
    up, down = SAMPLE_RATE // ratio, sample_rate // ratio
    return resample_poly(samples / 32768.0, up, down, window=_filter(int(up), int(down)))


@functools.cache
def _filter(up: int, down: int) -> np.ndarray:
    """Return the low-pass filter of the resampling (scipy's default), designed once and not for every clip."""
    from scipy.signal import firwin

    longest = max(up, down)
    return firwin(20 * longest + 1, 1 / longest, window=("kaiser", 5.0))


def _computing_seconds() -> float:
    """Return the processor time of this process and of the children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _shares(utterances: int) -> dict[str, range]:
    """Return the numbers of the utterances of each split."""
    part = max(1, round(utterances / 10))
    train = utterances - 2 * part
    return {"train": range(train), "valid": range(train, train + part), "test": range(train + part, utterances)}


def _record(utterances: int, clips: Clips) -> dict[str, Any]:
    """Return what decides the data, checked."""
    seed, snr, silence = clips.seed, clips.snr, clips.silence
    if isinstance(utterances, bool) or not isinstance(utterances, int) or not 3 <= utterances < 1_000_000:
        raise UserError(f"utterances: got {utterances!r}, wanted a whole number from 3 (one a split) to 999,999")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed: got {seed!r}, wanted a whole number from 0")
    if snr is not None and not (len(snr) == 2 and -60 <= snr[0] <= snr[1] <= 100):
        raise UserError(f"snr: got {snr!r}, wanted two numbers in dB, the smaller first, from -60 to 100")
    if not (len(silence) == 2 and 0 <= silence[0] <= silence[1] <= _MOST_SILENCE):
        raise UserError(f"silence: got {silence!r}, wanted two numbers of seconds, from 0 to {_MOST_SILENCE:g}")
    for number, text in enumerate(clips.texts, 1):
        if not 0 < len(text) <= _LONGEST_TEXT or not text.isprintable():
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise UserError(f"texts, {number}: got {shown!r}, wanted 1 to {_LONGEST_TEXT} printable characters")
    record: dict[str, Any] = {
        "name": "simulated-speech",
        "simulated": True,
        "generator": "espeak-ng",
        "generator_version": VERSION,
    }
    record |= {"seed": seed, "utterances": utterances, "snr": None if snr is None else [float(x) for x in snr]}
    # only where they are not what they were before there was a choice: what is there already stays
    record |= {"silence": [float(x) for x in silence]} if silence != SILENCE_SECONDS else {}
    return record | ({"texts": list(clips.texts)} if clips.texts else {})


def _versions(speaker: Speaker) -> dict[str, str]:
    import soundfile

    packages = {name: metadata.version(name) for name in ("espeakng-loader", "numpy", "scipy", "soundfile")}
    return {"espeak-ng": speaker.version, "libsndfile": str(soundfile.__libsndfile_version__), **packages}
