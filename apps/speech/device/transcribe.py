"""Transcribes files, manifests and live audio with an exported folder: what ``kd speech transcribe`` does. No torch."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from apps.speech.audio import Examination, audio_info, blocks, is_beginning
from apps.speech.decode.words import Word
from apps.speech.device.pcm import Pcm
from apps.speech.features import SAMPLE_RATE
from kdcore.config import UserError

if TYPE_CHECKING:
    from apps.speech.data.manifest import Row
    from apps.speech.data.utterance import Utterance
    from apps.speech.device.vad import GateOptions
    from apps.speech.runtime import Decoding, Recognizer, Rule

# files that wait for each process, so that a slow one does not hold the others up
_AHEAD = 8
_BLOCK_SECONDS = 8.0

Key = tuple[str, float | None, float | None, int | str, str | None]


@dataclass(frozen=True)
class Item:
    """A piece of audio: a file, or ``duration`` seconds of it from ``offset``; ``audio`` is its name in the output.

    ``duration`` is as asked, also beyond the end of the file; None goes to the end.
    """

    audio: str
    path: str
    offset: float | None = None
    duration: float | None = None
    channel: int | str = "mix"
    id: str | None = None

    @property
    def key(self) -> Key:
        """What tells it from the other pieces of an output."""
        return self.audio, self.offset, self.duration, self.channel, self.id

    def samples(self) -> Iterator[np.ndarray]:
        """Yield its samples in blocks; errors as ``audio.blocks``."""
        return blocks(self.path, _BLOCK_SECONDS, channel=self.channel, start=self.offset or 0.0, length=self.duration)


@dataclass(frozen=True)
class Transcript:
    """What is said in a piece of audio: words by segment, times from the start of the piece.

    ``remarks`` are what is wrong with the audio (``audio.Examination``), why its words may be.
    """

    item: Item
    segments: tuple[tuple[Word, ...], ...]
    duration: float
    remarks: tuple[str, ...] = ()

    @property
    def words(self) -> list[Word]:
        """All words."""
        return [word for segment in self.segments for word in segment]

    @property
    def text(self) -> str:
        """Their text."""
        return " ".join(word["word"] for word in self.words)

    def row(self) -> dict[str, Any]:
        """Return the row of a JSON-lines output; ``duration`` is what was heard, ``asked_duration`` what was asked."""
        item = self.item
        row: dict[str, Any] = {"audio_filepath": item.audio, "text": self.text, "duration": round(self.duration, 3)}
        row |= {"id": item.id} if item.id is not None else {}
        row |= {"offset": item.offset} if item.offset is not None else {}
        row |= {"asked_duration": item.duration} if item.duration is not None else {}
        row |= {"channel": item.channel} if item.channel != "mix" else {}
        row |= {"remarks": list(self.remarks)} if self.remarks else {}
        return row | {"words": self.words}


@dataclass(frozen=True)
class Setup:
    """What a recogniser is made of, in this process or another; fields as the options of ``runtime.Recognizer``."""

    folder: str
    int8: bool
    threads: int
    decoding: Decoding
    endpoint: tuple[Rule, ...]
    gate: GateOptions | None = None
    remove_offset: bool = False

    def recognizer(self) -> Recognizer:
        """Return the recogniser."""
        from apps.speech.runtime import Recognizer

        return Recognizer(
            self.folder,
            int8=self.int8,
            threads=self.threads,
            decoding=self.decoding,
            endpoint=self.endpoint,
            gate=self.gate,
            remove_offset=self.remove_offset,
        )

    def about(self) -> dict[str, Any]:
        """Return what an output depends on: model and settings, to tell whether it can be gone on with."""
        from kdcore.run import fingerprint

        decoding = self.decoding
        return {
            "model": fingerprint((Path(self.folder) / "kdsuite.json").read_bytes()),
            "int8": self.int8,
            "beam": decoding.width,
            "hot_words": dict(decoding.hot_words),
            "grammar": list(decoding.grammar),
            "lm": fingerprint(decoding.lm.read_bytes()) if decoding.lm else None,
            "lm_weight": decoding.lm_weight,
            "word_score": decoding.word_score,
            "endpoint": [[rule.after_speech, rule.silence, rule.length] for rule in self.endpoint],
            "gate": vars(self.gate) if self.gate else None,
            "remove_offset": self.remove_offset or None,  # as an output that was begun before there was the option
        }


def transcribe(recognizer: Recognizer, item: Item) -> Transcript:
    """Return what is said in a piece of audio; errors as ``audio.blocks``."""
    stream, examination = recognizer.stream(), Examination()
    segments: list[tuple[Word, ...]] = []
    for block in item.samples():
        examination.accept(block)
        segments += [segment.words for segment in stream.accept(block).final]
    segments += [segment.words for segment in stream.finish().final]
    return Transcript(item, tuple(segments), stream.seconds, tuple(examination.remarks()))


def transcribe_all(
    setup: Setup, items: Sequence[Item], jobs: int, make: Callable[[Setup], Recognizer] = Setup.recognizer
) -> Iterator[Transcript | UserError]:
    """Yield the transcripts of pieces in their order, or what is wrong with one; ``jobs`` processes work on them.

    ``make`` makes the first recogniser, in this process, before any audio is read.

    Raises:
        UserError: what is wrong with model or settings.
        OSError: a process died.
    """
    recognizer = make(setup)  # says what is wrong with the settings once, before any process starts
    if min(jobs, len(items)) <= 1:
        yield from (_tried(recognizer, item) for item in items)
        return
    del recognizer
    pool = ProcessPoolExecutor(min(jobs, len(items)), get_context("spawn"), _begin, (setup,))
    waiting: deque[tuple[Item, Future[Transcript | UserError]]] = deque()
    rest = iter(items)
    try:
        while True:
            for item in islice(rest, _AHEAD * jobs - len(waiting)):
                waiting.append((item, pool.submit(_work, item)))
            if not waiting:
                return
            item, future = waiting.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:
                raise OSError(f"a process died while it transcribed {item.audio} or a file after it") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_in_process: list[Recognizer] = []


def _begin(setup: Setup) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process hears it and ends the others
    _in_process[:] = [setup.recognizer()]


def _work(item: Item) -> Transcript | UserError:
    return _tried(_in_process[0], item)


def _tried(recognizer: Recognizer, item: Item) -> Transcript | UserError:
    try:
        return transcribe(recognizer, item)
    except UserError as error:
        return error


def manifest_items(path: Path) -> Iterator[Item | UserError]:
    """Yield the pieces of a JSON-lines manifest, in its order, or what is wrong with a row; texts are not looked at.

    Raises:
        UserError: the manifest cannot be read.
    """
    from apps.speech.data.manifest import Row, collect, manifest_rows

    for row in manifest_rows(path):
        if not isinstance(row, Row):
            yield row
            continue
        unread = replace(row, values={**row.values, "text": None})
        try:
            (utterance,) = collect(iter([unread]), path.parent, path, skip_bad=False).utterances
        except UserError as error:
            yield error
            continue
        yield _item(row, utterance, path.parent)


def _item(row: Row, utterance: Utterance, folder: Path) -> Item | UserError:
    """Return the piece of a checked row: without an offset, a duration that is shorter than the file is its beginning.

    Where it is as long as the file, as in the manifests of NeMo, the piece is the whole file.
    """
    path = os.fspath(folder / utterance.audio)
    offset, channel = utterance.extra.get("offset"), utterance.extra.get("channel")
    duration = None if row.values["duration"] is None else utterance.duration
    if offset is None and duration is not None:
        try:
            shorter = is_beginning(duration, audio_info(path).seconds)
        except UserError as error:
            return error
        offset, duration = (0.0, duration) if shorter else (None, None)
    return Item(
        utterance.audio,
        path,
        offset,
        duration,
        channel if isinstance(channel, int) and not isinstance(channel, bool) else "mix",
        None if row.values["id"] in (None, "") else utterance.id,
    )


def pcm_blocks(
    stream: BinaryIO, *, rate: int = SAMPLE_RATE, channels: int = 1, name: str = "standard input"
) -> Iterator[np.ndarray]:
    """Yield raw 16-bit little-endian samples as they come, float32 [n] at 16 kHz; packets may be of any size.

    Raises:
        UserError: a rate or number of channels that is not taken; the stream ends within a sample.
    """
    pcm = Pcm(rate, channels)
    read = getattr(stream, "read1", stream.read)
    while data := read(1 << 15):
        pcm.feed(data)
        while (samples := pcm.read()) is not None:
            yield samples
    pcm.end()
    while (samples := pcm.read()) is not None:
        yield samples
    if pcm.torn:
        raise UserError(f"{name}: ends within a sample ({pcm.torn}); wanted 16-bit samples of {channels} channels")
