"""Transcribes files, manifests and live audio with an exported folder: what ``kd speech transcribe`` does. No torch."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from apps.speech.audio import audio_info, blocks
from apps.speech.decode.words import Word
from apps.speech.device.live import json_line
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
# what a manifest's duration may fall short of the file and still mean the whole: rounding, a last block
_SAME_SECONDS = 0.05

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
    """What is said in a piece of audio: words by segment, times from the start of the piece."""

    item: Item
    segments: tuple[tuple[Word, ...], ...]
    duration: float

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
        }


def transcribe(recognizer: Recognizer, item: Item) -> Transcript:
    """Return what is said in a piece of audio; errors as ``audio.blocks``."""
    stream = recognizer.stream()
    segments: list[tuple[Word, ...]] = []
    for block in item.samples():
        segments += [segment.words for segment in stream.accept(block).final]
    segments += [segment.words for segment in stream.finish().final]
    return Transcript(item, tuple(segments), stream.seconds)


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
            shorter = duration < audio_info(path).seconds - _SAME_SECONDS
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


class Output:
    """JSON lines in a file that an interrupted batch goes on with: what is there is kept, what is torn is cut off.

    Beside it, ``NAME.settings.json`` says what it was made with.

    Raises:
        UserError: the file is no such output (it names the line), or was made with another model or settings.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self._done: Counter[Key] = Counter()
        if path.is_dir():
            raise UserError(f"--out: {path} is a folder, wanted a file such as {path / 'transcripts.jsonl'}")
        keep = self._read() if path.exists() else 0
        check_settings(path, about, begun=keep > 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = open(path, "ab")  # noqa: SIM115
        self._handle.truncate(keep)

    def _read(self) -> int:
        """Note what is done; return the bytes of whole lines."""
        keep = 0
        with open(self.path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.endswith(b"\n"):
                    if number == 1 and not line.startswith(b'{"audio_filepath"'[: len(line)]):
                        raise UserError(f"{self.path}: line 1: is no row of kd speech transcribe; choose another --out")
                    break
                try:
                    row = json.loads(line)
                    about = (row.get("offset"), row.get("asked_duration"), row.get("channel", "mix"), row.get("id"))
                    self._done[row["audio_filepath"], *about] += 1
                    row["text"], row["words"]
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    raise UserError(
                        f"{self.path}: line {number}: is no row of kd speech transcribe; choose another --out"
                    ) from None
                keep += len(line)
        return keep

    def missing(self, items: Iterable[Item]) -> list[Item]:
        """Return the pieces that were not there when it was opened; one that is wanted twice is there once at most."""
        left = self._done.copy()
        found = []
        for item in items:
            if left[item.key] > 0:
                left[item.key] -= 1
            else:
                found.append(item)
        return found

    def write(self, transcript: Transcript) -> None:
        """Append a row; a reader sees it at once."""
        self._handle.write(json_line(transcript.row()).encode())
        self._handle.flush()

    def close(self) -> None:
        """Write what is left to the disk."""
        os.fsync(self._handle.fileno())
        self._handle.close()


def check_settings(out: Path, about: dict[str, Any], *, begun: bool) -> None:
    """Write the settings of an output beside it, or compare them with those of the begun one.

    Raises:
        UserError: it was made with others; the message names them.
    """
    from kdcore.run import read_json, write_json

    whole = Path(os.path.abspath(out))  # "." has no name of its own
    if not whole.name:
        raise UserError(f"--out: {out} cannot hold an output; wanted a file or folder below it")
    path = whole.with_name(f"{whole.name}.settings.json")
    about = json.loads(json.dumps(about))
    if not begun:
        write_json(path, about)
        return
    try:
        before = read_json(path)
    except (OSError, ValueError):
        before = None
    if not isinstance(before, dict):
        raise UserError(f"{path}: is missing or damaged, so it is not known what {out} was made with; choose another")
    other = [name for name, value in about.items() if before.get(name) != value]
    if other:
        raise UserError(f"{out}: was made with another {', '.join(other)}; choose another --out or remove it")


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


def subtitle_paths(items: Iterable[Item], folder: Path, suffix: str) -> dict[Item, Path]:
    """Return where each piece's subtitles go.

    Raises:
        UserError: two pieces have the same name, or a file is in the folder's place.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out: {folder} is a file; wanted a folder for the {suffix} of several files")
    found: dict[Path, Item] = {}
    for item in items:
        name = Path(item.audio).stem if item.offset is None else f"{Path(item.audio).stem}@{item.offset:g}"
        path = folder / f"{name}{suffix}"
        if path in found:
            raise UserError(f"{item.audio} and {found[path].audio}: both would be written to {path}")
        found[path] = item
    return {item: path for path, item in found.items()}
