"""An utterance, a corpus of them, and what is done to a corpus before training: splits and checks. No torch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from apps.speech.audio import audio_info, decode_audio, is_beginning, read_audio
from apps.speech.features import FEATURE_SHIFT_MS, SAMPLE_RATE
from apps.speech.text import TextRules
from apps.speech.units import Units, needed_frames
from kdcore.config import UserError
from kdcore.run import fingerprint

SUBSAMPLING = 4  # feature frames to a frame of the acoustic models
# where in a file, a tar shard, an utterance's audio is stored: its name there, its first byte and its length
STORED = ("stored_as", "stored_at", "stored_bytes")
LARGEST_STORED = 1 << 28
# where in a file its bytes may begin
_FURTHEST = 1 << 62
# what sources call the fields of an utterance: never a name in ``extra``
FIELDS = ("id", "audio_filepath", "path", "audio", "text", "duration", "speaker", "speaker_id")
# names in ``extra`` that mean something here
MEANT = ("offset", "channel", "split", "corpus", *STORED)
NAMED = 20  # problems kept by their message; the others are counted


@dataclass(frozen=True)
class Utterance:
    """One piece of audio and what is said in it.

    ``audio`` is the path as given (of a shard too), ``text`` None where nobody wrote it down, ``duration``
    in seconds. ``extra`` holds what else its source says; of that, ``offset`` (s) and ``channel`` (a number) say
    which part of the file it is, ``split`` which part of the corpus.
    """

    id: str
    audio: str
    text: str | None
    duration: float
    speaker: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return the utterance as a row of a JSON-lines manifest."""
        row = {"id": self.id, "audio_filepath": self.audio, "text": self.text, "duration": self.duration}
        row |= {"speaker": self.speaker} if self.speaker else {}
        return row | {name: value for name, value in self.extra.items() if name not in FIELDS}


@dataclass(frozen=True)
class LeftOut:
    """Rows of a source that were left out for one reason: how many, and the first of them.

    ``split`` is what they say they belong to, None where they say nothing.
    """

    reason: str
    split: str | None
    count: int
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """Utterances in the order of their source.

    ``folder`` is what relative audio paths start from; ``left_out`` are the rows of the source that are no utterances.
    """

    utterances: tuple[Utterance, ...]
    folder: Path
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def counts(self) -> dict[str, int]:
        """How many rows were left out, by reason."""
        return by_reason(self.left_out)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the first rows that were left out for each reason."""
        return tuple(problem for each in self.left_out for problem in each.problems)

    @property
    def seconds(self) -> float:
        """The length of all audio."""
        return math.fsum(each.duration for each in self.utterances)

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits in the order they appear; none where the source has no splits."""
        return tuple(dict.fromkeys(each.extra["split"] for each in self.utterances if "split" in each.extra))

    def split(self, *names: str, unnamed: bool = False) -> Corpus:
        """Return the utterances of some splits; what was left out of other splits is not of them.

        With ``unnamed`` those that name no split are of them too.

        Raises:
            UserError: there is no such split; it names those that are there.
        """
        known = self.splits
        for name in names:
            if name not in known:
                raise UserError(f"{self.folder}: has no split {name!r}; there is {', '.join(known) or 'none'}")
        left_out = tuple(each for each in self.left_out if each.split in (*names, None))
        wanted = (*names, None) if unnamed else names
        return replace(self.select(lambda each: each.extra.get("split") in wanted), left_out=left_out)

    def select(self, wanted: Callable[[Utterance], bool]) -> Corpus:
        """Return the utterances for which ``wanted`` is true, in their order.

        ``left_out`` stays whole: nobody knows which of its rows would have been wanted.
        """
        return replace(self, utterances=tuple(each for each in self.utterances if wanted(each)))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with any row, their order and the size of any audio file, not with the folder."""
        sizes = {each.audio: _size(self.path(each)) for each in self.utterances}
        return fingerprint(*(each.row() | {"bytes": sizes[each.audio]} for each in self.utterances))

    @cached_property
    def audio_sizes(self) -> str:
        """16 hex digits that change with the size of any audio file, not with the texts."""
        return fingerprint({each.audio: _size(self.path(each)) for each in self.utterances})

    def path(self, utterance: Utterance) -> Path:
        """Return where the audio of an utterance is."""
        return self.folder / utterance.audio

    def load(self, utterance: Utterance, channel: int | None = None) -> np.ndarray:
        """Return the samples float32 [n] of an utterance at 16 kHz; errors as ``read_audio``.

        Without an offset it is the whole file, or its beginning where that is longer than ``duration``. ``channel`` is
        one of a recording of several that are heard together otherwise.

        Raises:
            UserError: as ``refuse_channel``.
        """
        if channel is not None:
            self.refuse_channel(utterance, channel)
        own = utterance.extra.get("channel")
        if STORED[1] in utterance.extra:
            return _stored(self.path(utterance), utterance)
        if channel is None and isinstance(own, int):
            channel = own
        number: int | str = "mix" if channel is None else channel
        offset = utterance.extra.get("offset")
        if offset is None and not self.begins(utterance):
            return read_audio(self.path(utterance), channel=number)
        return read_audio(self.path(utterance), channel=number, start=offset or 0.0, seconds=utterance.duration)

    def refuse_channel(self, utterance: Utterance, channel: int) -> None:
        """Raise UserError if an utterance is no recording of several channels, this one among them."""
        own, path = utterance.extra.get("channel"), self.path(utterance)
        if STORED[1] in utterance.extra:
            what = "is in a shard, which has one"
        elif isinstance(own, int):
            what = f"says itself that it is {own}"
        elif (count := audio_info(path).channels) <= channel:
            what = f"has {count}, counted from 0"
        else:
            return
        raise UserError(f"{path}: utterance {utterance.id}: wanted channel {channel}, it {what}")

    def begins(self, utterance: Utterance) -> bool:
        """Return whether an utterance is the beginning of a longer file, by its duration alone; errors as ``load``."""
        if STORED[1] in utterance.extra or "offset" in utterance.extra:
            return False
        return is_beginning(utterance.duration, audio_info(self.path(utterance)).seconds)


def utterance_at(corpora: Sequence[Corpus], row: int) -> tuple[Corpus, Utterance]:
    """Return the utterance of a row of some corpora, one after the other, and its corpus; without a walk over them.

    Raises:
        IndexError: there are fewer rows, or a row below 0.
    """
    ends = list(accumulate(map(len, corpora)))
    if not 0 <= row < (ends[-1] if ends else 0):
        raise IndexError(f"row: got {row}, wanted 0 to below {ends[-1] if ends else 0}")
    at = bisect_right(ends, row)
    return corpora[at], corpora[at].utterances[row - ends[at]]


def _stored(path: Path, utterance: Utterance) -> np.ndarray:
    """Return the samples of an utterance that is a member of a shard."""
    name, start, count = (utterance.extra.get(each) for each in STORED)
    where = f"{path}: member {ascii(str(name))[1:-1]}"
    wrong = f"{path}: {utterance.id}: {', '.join(STORED[1:])}: got {start!r}, {count!r}, wanted bytes"
    if type(start) is not int or type(count) is not int:
        raise UserError(wrong)
    if not 0 < count <= LARGEST_STORED or not 0 <= start < _FURTHEST:
        raise UserError(wrong)
    try:
        with open(path, "rb") as handle:
            handle.seek(start)
            data = handle.read(count)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) < count:
        raise UserError(f"{where}: is truncated: {count} bytes are stated, {len(data)} are there")
    return decode_audio(data, where)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # gone since it was read: whoever loads it says so
        return -1


class BadRow(UserError):
    """What is wrong with one utterance of a corpus.

    ``reason`` is the kind of it in a few words, by which it is counted, ``split`` what the utterance says that it
    belongs to, if that can be read.
    """

    def __init__(self, reason: str, message: str, split: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.split = split


class Tally:
    """Raises what is wrong with a row, or, with ``skip_bad``, counts it by reason and keeps the first messages."""

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self._counts: Counter[tuple[str, str | None]] = Counter()
        self._problems: dict[tuple[str, str | None], list[str]] = {}

    @property
    def counts(self) -> dict[str, int]:
        """How many there were, by reason."""
        return by_reason(self.left_out)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """All of them, by reason and split."""
        return tuple(LeftOut(*key, n, tuple(self._problems.get(key, ()))) for key, n in self._counts.items())

    def count(self, reason: str) -> None:
        """Count an utterance that is left out though nothing is wrong with it."""
        self._counts[reason, None] += 1

    def add(self, error: BadRow) -> None:
        """Count a bad row.

        Raises:
            BadRow: the row's own, without ``skip_bad``.
        """
        if not self.skip_bad:
            raise error
        key = error.reason, error.split
        self._counts[key] += 1
        problems = self._problems.setdefault(key, [])
        if len(problems) < NAMED and str(error) not in problems:
            problems.append(str(error))


def by_reason(left_out: Iterable[LeftOut]) -> dict[str, int]:
    """Return how many rows were left out, by reason."""
    counts: Counter[str] = Counter()
    for each in left_out:
        counts[each.reason] += each.count
    return dict(counts)


def of_corpus(utterance: Utterance, reason: str) -> str:
    """Return a reason by which an utterance is counted: under its corpus, where there are several."""
    corpus = utterance.extra.get("corpus")
    return f"{corpus}: {reason}" if isinstance(corpus, str) else reason


def loaded(corpus: Corpus, tally: Tally) -> Iterator[tuple[Utterance, np.ndarray]]:
    """Yield utterances with their samples; audio that cannot be read goes to ``tally`` as "bad audio"."""
    for utterance in corpus.utterances:
        try:
            samples = corpus.load(utterance)
        except UserError as error:
            tally.add(BadRow(of_corpus(utterance, "bad audio"), f"utterance {utterance.id}: {error}"))
            continue
        yield utterance, samples


_NAME_PARTS = "name what validates and tests with --valid and --test (data.valid, data.test)"


def hold_out_speakers(
    corpus: Corpus, *, count: int | None = None, share: float | None = None, seed: int = 0
) -> tuple[Corpus, Corpus]:
    """Return (train, held): ``held`` has all utterances of some speakers and ``train`` none of them.

    Options: ``count`` speakers or a ``share`` of the speakers (rounded, at least one). Which ones depends on the set of
    speakers and the seed, not on the order of the utterances.

    Raises:
        UserError: an utterance without a speaker, or not more speakers than are to be held out; the message names the
            settings that help.
        ValueError: not exactly one of ``count`` and ``share``, or one out of range.
    """
    if (count is None) == (share is None):
        raise ValueError(f"count, share: got {count}, {share}, wanted one of them")
    speakers = sorted({each.speaker for each in corpus.utterances})
    if "" in speakers:
        unnamed = next(each for each in corpus.utterances if not each.speaker)
        raise UserError(
            f"{corpus.path(unnamed)}: utterance {unnamed.id} names no speaker; "
            f"speakers cannot be held out: {_NAME_PARTS}"
        )
    if share is not None and not 0 < share < 1:
        raise ValueError(f"share: got {share}, wanted between 0 and 1")
    wanted = count if count is not None else max(1, round((share or 0.0) * len(speakers)))
    if wanted < 1:
        raise ValueError(f"count: got {wanted}, wanted at least 1")
    if wanted >= len(speakers):
        has = f"{len(speakers)} speaker" + ("s" if len(speakers) != 1 else "")
        fewer = "lower --data.valid_speakers or --data.test_speakers, or " if len(speakers) > 1 else ""
        raise UserError(f"{corpus.folder}: has {has}; {wanted} cannot be held out: {fewer}{_NAME_PARTS}")
    order = np.random.default_rng(seed).permutation(len(speakers))
    held = {speakers[at] for at in order[:wanted]}
    return corpus.select(lambda each: each.speaker not in held), corpus.select(lambda each: each.speaker in held)


def output_frames(samples: int) -> int:
    """Return the frames that an acoustic model has for ``samples`` at 16 kHz: those of the features over 4, up."""
    shift = SAMPLE_RATE * FEATURE_SHIFT_MS // 1000
    return -(-((samples + shift // 2) // shift) // SUBSAMPLING)


class Impossible(NamedTuple):
    """An utterance whose text CTC cannot align: it needs more frames than the audio gives."""

    utterance: Utterance
    needs: int
    has: int

    def __str__(self) -> str:
        seconds = self.utterance.duration
        return f"{self.utterance.id}: its text needs {self.needs} frames, its {seconds:g} s have {self.has}"


def impossible(corpus: Corpus, units: Units, rules: TextRules | None = None) -> list[Impossible]:
    """Return the utterances whose normalised text has more symbols (and blanks between equal ones) than frames.

    Raises:
        UserError: a text with a symbol outside the units; it names the utterance too.
    """
    rules = rules or TextRules()
    found = []
    for utterance in corpus.utterances:
        if utterance.text is None:
            continue
        try:
            needs = needed_frames(units.encode(rules.normalise(utterance.text)))
        except UserError as error:
            raise UserError(f"utterance {utterance.id}: {error}") from None
        has = output_frames(round(utterance.duration * SAMPLE_RATE))
        if needs > has:
            found.append(Impossible(utterance, needs, has))
    return found


def outside_units(utterances: Iterable[Utterance], units: Units, rules: TextRules | None = None) -> dict[str, str]:
    """Return by id what is wrong with the texts that the units cannot spell."""
    rules = rules or TextRules()
    found = {}
    for utterance in utterances:
        try:
            units.encode(rules.normalise(utterance.text or ""))
        except UserError as error:
            found[utterance.id] = str(error)
    return found
