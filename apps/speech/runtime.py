"""An exported recogniser on the device: audio in packets, words as they are said. NumPy and onnxruntime, no torch.

A stream of audio is a ``Stream`` and all streams of a process share a ``Recognizer``. What is heard does not depend on
how the audio is split into packets::

    recognizer = Recognizer("exported")
    for update in recognizer.transcribe(blocks):
        print(update.final, update.partial)
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.speech.decode.confidence import Calibration
from apps.speech.decode.ctc import FRAME_SECONDS
from apps.speech.decode.endpoint import RULES, Rule
from apps.speech.decode.words import Word
from apps.speech.device.decoding import Decoder, Decoding
from apps.speech.device.endpointing import Segment, Segmenter
from apps.speech.device.folder import INPUTS, TOKENS, ExportedFolder
from apps.speech.device.offset import OffsetRemover
from apps.speech.device.spelling import Symbols
from apps.speech.device.vad import Gate, GateOptions
from apps.speech.features import FEATURES, SAMPLE_RATE, TAIL_MS, OnlineFeatures
from kdcore.config import UserError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["Decoding", "Recognizer", "Rule", "Segment", "Stream", "Update"]

# samples of a packet that become features at once: 10 s
_PACKET = 160_000
# seconds before the end of a pause that are heard again by a model that starts afresh, for the onset of a word in them
_AGAIN_SECONDS = 0.48
# onnxruntime starts as many as it is told, needed or not
_MOST_THREADS = 64
# the log-posterior of a symbol in a frame that nobody heard
_UNHEARD = -30.0


State = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Update:
    """What a stream has to say since the last time.

    Attributes:
        final: segments that are finished, never changed afterwards.
        partial: what is heard of the segment that goes on, which may still change.
    """

    final: tuple[Segment, ...]
    partial: str


class Recognizer:
    """An exported folder, ready to listen; threads may share it, a stream belongs to one thread at a time.

    Options:
        folder: what ``kd speech export`` wrote.
        int8: whether to run the model with int8 weights or the one in float32.
        threads: of one step of the network; small models are fastest with 1.
        decoding: what to listen for.
        endpoint: where segments end (``decode.endpoint``); None for one segment, which grows with the audio.
        gate: leave out what nobody speaks in (``apps.speech.device.vad``); None hears everything.
        remove_offset: take a constant offset out of the samples (``apps.speech.device.offset``). sherpa-onnx does not,
            so that it may hear something else in the same audio.

    Raises:
        UserError: the folder as in ``ExportedFolder.open``, what the model is not, or a setting of ``decoding``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        int8: bool = True,
        threads: int = 1,
        decoding: Decoding | None = None,
        endpoint: Sequence[Rule] | None = RULES,
        gate: GateOptions | None = None,
        remove_offset: bool = False,
    ) -> None:
        if not 1 <= threads <= _MOST_THREADS:
            raise UserError(f"threads: got {threads}, wanted 1 to {_MOST_THREADS}")
        self.folder = ExportedFolder.open(folder)
        # files of two exports may be of one size
        self.folder.verify(TOKENS, self.folder.model(int8).name)
        self.symbols = Symbols(self.folder.symbols, self.folder.text)
        decoding = decoding or Decoding()
        given = self.folder.calibration(lexicon=bool(decoding.grammar or decoding.lm))
        calibration = Calibration(given["slope"], given["offset"]) if given else None
        self.decoder = Decoder(self.symbols, decoding, calibration)
        self.endpoint, self.gate, self.remove_offset = endpoint, gate, remove_offset
        self.network = Network(self.folder, int8=int8, threads=threads)

    def stream(self) -> Stream:
        """Return a stream of new audio."""
        return Stream(self)

    def step_many(self, streams: Iterable[Stream]) -> int:
        """Let the network hear one window of every stream that has one; return of how many that was.

        One run for all of them. Streams whose windows are all heard, or were left out by the gate, are passed over;
        ``Stream.take`` then has what they say. With int8 weights streams share the scale of their activations, so that
        what one says may differ in a rare symbol with the company it keeps.
        """
        ready = [stream for stream in streams if stream.ready]
        if ready:
            heard = self.network.step([stream.next_window() for stream in ready], [stream.state for stream in ready])
            for stream, (log_probs, state) in zip(ready, heard, strict=True):
                stream.hear(log_probs, state)
        return len(ready)

    def transcribe(self, blocks: Iterable[np.ndarray]) -> Iterator[Update]:
        """Yield an update for each block of samples and one for the end; memory does not grow with the audio."""
        stream = self.stream()
        for block in blocks:
            yield stream.accept(block)
        yield stream.finish()


class Stream:
    """One stream of audio: ``accept`` packets, then ``finish``.

    A server that steps many streams at once queues instead: ``queue`` (or ``end``), ``Recognizer.step_many`` until no
    stream is ``ready``, and ``take``.
    """

    def __init__(self, recognizer: Recognizer) -> None:
        self._recognizer = recognizer
        network = recognizer.network
        self._offset = OffsetRemover() if recognizer.remove_offset else None
        self._features = OnlineFeatures()
        self._segmenter = Segmenter(recognizer.decoder.search, recognizer.endpoint, delay_ms=recognizer.folder.delay_ms)
        self._gate = Gate(recognizer.gate) if recognizer.gate else None
        shift_seconds = network.shift / 100
        # windows that nobody speaks in, heard only if somebody is about to
        self._quiet: deque[np.ndarray] = deque()
        self._before = math.ceil(round(recognizer.gate.before / shift_seconds, 6)) if recognizer.gate else 0
        self._frames = np.zeros((0, FEATURES), np.float32)
        self._open = np.zeros(0, bool)
        # None for a window that is left out
        self._windows: deque[np.ndarray | None] = deque()
        self.state = network.start()
        # fewer frames than a pause has, or they would be one again
        most = max(0, self._segmenter.shortest_pause - 1) // network.frames
        again = min(math.ceil(round(_AGAIN_SECONDS / shift_seconds, 6)), most)
        # what a new segment's model is to hear again
        self._recent: deque[np.ndarray] = deque(maxlen=again)
        self._final: list[Segment] = []
        # seconds at which the last word that was handed out ends
        self._said = 0.0
        self._samples = 0
        self._ended = False

    @property
    def seconds(self) -> float:
        """The audio so far."""
        return self._samples / SAMPLE_RATE

    @property
    def ready(self) -> int:
        """How many windows wait for the network."""
        self._pass_over()
        return sum(window is not None for window in self._windows)

    def accept(self, samples: np.ndarray) -> Update:
        """Take samples float32 [n] in [-1, 1] at 16 kHz, n >= 0, and return what they add.

        Raises:
            ValueError: other samples (NaN too), or the stream is finished.
        """
        self.queue(samples)
        return self._run()

    def finish(self) -> Update:
        """End the audio and return the rest; ValueError if it is finished."""
        self.end()
        return self._run()

    def queue(self, samples: np.ndarray) -> None:
        """Take samples as ``accept`` does, without hearing them yet."""
        if self._ended:
            raise ValueError("samples: the stream is finished")
        if not isinstance(samples, np.ndarray) or samples.ndim != 1 or samples.dtype != np.float32:
            got = f"{samples.dtype} {samples.shape}" if isinstance(samples, np.ndarray) else type(samples).__name__
            raise ValueError(f"samples: got {got}, wanted float32 [n]")
        if not np.isfinite(samples).all():
            raise ValueError("samples: got NaN or infinity")
        self._samples += len(samples)
        self._queue(self._offset.accept(samples) if self._offset else samples)

    def end(self) -> None:
        """End the audio without hearing the rest yet: silence completes it, as in training, to whole windows."""
        if self._ended:
            raise ValueError("end: the stream is finished")
        self._ended = True
        if not self._samples:
            return
        network = self._recognizer.network
        samples = SAMPLE_RATE // 100
        wanted = -(-(self._samples + SAMPLE_RATE * TAIL_MS // 1000) // samples)
        # a frame is complete once the 25 ms around it are there
        windows = max(0, -(-(wanted - network.window) // network.shift)) + 1
        frames = (windows - 1) * network.shift + network.window + 2
        self._queue(np.zeros(frames * samples - self._samples, np.float32))

    def next_window(self) -> np.ndarray:
        """Return the next window [window, 80] for the network, which is then no longer waiting."""
        window = self._windows.popleft()
        if window is None:
            raise ValueError("window: got one that is left out, wanted one to hear; ask for ready before")
        self._recent.append(window)
        return window

    def hear(self, log_probs: np.ndarray, state: State) -> None:
        """Take the network's answer to the next window, and its state after it.

        Behind a pause the model starts afresh, as it did in training, and hears the end of the pause again.
        """
        self.state = state
        self._final += self._segmenter.accept(log_probs)
        if self._segmenter.paused:
            self.state = self._recognizer.network.start()
            self._segmenter.rewind(len(self._recent) * self._recognizer.network.frames)
            self._windows.extendleft(reversed(self._recent))
            self._recent.clear()

    def take(self) -> Update:
        """Return what is new since the last time, of what the network has heard."""
        self._pass_over()
        if self._ended and not self._windows:
            self._final += self._segmenter.finish()
        # what ends behind the audio waits for what follows it there, since all of it has to find room before
        waits = [segment for segment in self._final if self._ended and self._windows and segment.end >= self.seconds]
        final, self._final = self._final[: len(self._final) - len(waits)], waits
        return Update(self._within(final), self._segmenter.partial())

    def _run(self) -> Update:
        while self._recognizer.step_many([self]):
            continue
        return self.take()

    def _queue(self, samples: np.ndarray) -> None:
        network = self._recognizer.network
        for start in range(0, len(samples), _PACKET):
            new = self._features.accept(samples[start : start + _PACKET])
            opened = self._gate.accept(new) if self._gate else np.ones(len(new), bool)
            self._frames = np.concatenate([self._frames, new])
            self._open = np.concatenate([self._open, opened])
            first = 0
            while first + network.window <= len(self._frames):
                window = self._frames[first : first + network.window]
                self._admit(window, bool(self._open[first : first + network.window].any()))
                first += network.shift
            self._frames, self._open = self._frames[first:], self._open[first:]
        if self._ended:
            self._windows += [None] * len(self._quiet)
            self._quiet.clear()

    def _admit(self, window: np.ndarray, is_open: bool) -> None:
        if is_open:
            self._windows += self._quiet
            self._quiet.clear()
            self._windows.append(window)
            return
        self._quiet.append(window)
        if len(self._quiet) > self._before:
            self._quiet.popleft()
            self._windows.append(None)

    def _pass_over(self) -> None:
        """Say of windows that are left out that nothing is said in them; the model starts afresh behind them."""
        network = self._recognizer.network
        while self._windows and self._windows[0] is None:
            self._windows.popleft()
            self._final += self._segmenter.accept(network.unheard)
            self._recent.clear()
            self.state = network.start()

    def _within(self, segments: Sequence[Segment]) -> tuple[Segment, ...]:
        """Return segments whose words end with the audio: the last symbols may come in the silence behind it.

        A word keeps a frame, or its share of the audio that is left where that is less.
        """
        before = self._said
        self._said = segments[-1].end if segments else before
        if not self._ended or self._said <= self.seconds:
            return tuple(segments)
        # in ms as all times; of less audio than that, which is a whole number of 62.5 us, to 7 places
        self._said = latest = self._samples * 1000 // SAMPLE_RATE / 1000 or self.seconds
        least = min(FRAME_SECONDS, (latest - before) / sum(len(segment.words) for segment in segments))
        found: list[Segment] = []
        for segment in reversed(segments):
            words: list[Word] = []
            for word in reversed(segment.words):
                end = min(word["end"], latest)
                latest = round(max(before, min(word["start"], end - least)), 7)
                words.append({**word, "start": latest, "end": end})
            found.append(Segment.of(words[::-1]))
        return tuple(found[::-1])


class Network:
    """The acoustic model of a folder: windows of features to log-posteriors, many streams in one run.

    ``window`` and ``shift`` are in feature frames: how many one run takes, and how many streams go on by; ``frames`` is
    how many frames of log-posteriors it gives.

    Raises:
        UserError: a file that onnxruntime cannot run, or a model with another interface than SPEECH_EXPORT has it.
    """

    def __init__(self, folder: ExportedFolder, *, int8: bool, threads: int) -> None:
        self.window, self.shift = folder.window_size, folder.chunk_shift
        self.classes = len(folder.symbols) + 1
        self._path = folder.model(int8)
        self._session = _open_session(self._path, threads)
        inputs = self._session.get_inputs()
        if [each.name for each in inputs] != list(INPUTS):
            raise UserError(
                f"{self._path}: has the inputs {', '.join(each.name for each in inputs)}; wanted {', '.join(INPUTS)}"
            )
        self._shapes = [tuple(each.shape[1:]) for each in inputs[2:4]]
        self.frames = self.shift // folder.subsampling_factor
        self.unheard = np.full((self.frames, self.classes), _UNHEARD, np.float32)
        self.unheard[:, -1] = 0.0

    def start(self) -> State:
        """Return the state of a stream at its start."""
        return (*(np.zeros((1, *shape), np.float32) for shape in self._shapes), np.zeros(1, np.int64))

    def step(self, windows: Sequence[np.ndarray], states: Sequence[State]) -> list[tuple[np.ndarray, State]]:
        """Return log-posteriors [T', C] and the next state of each stream, given its window [window, 80]."""
        count = len(windows)
        state = states[0] if count == 1 else [np.concatenate(parts) for parts in zip(*states, strict=True)]
        signal = np.ascontiguousarray(np.stack(windows).transpose(0, 2, 1))
        given = (signal, np.full(count, self.window, np.int64), *state)
        outputs: Any = self._session.run(None, dict(zip(INPUTS, given, strict=True)))
        log_probs, lengths, *after = outputs
        if log_probs.shape[2] != self.classes:
            raise UserError(f"{self._path}: gives {log_probs.shape[2]} classes; tokens.txt has {self.classes}")
        if not np.isfinite(log_probs).all():
            raise UserError(f"{self._path}: gives values that are not finite")
        return [(log_probs[row, : lengths[row]], tuple(part[row : row + 1] for part in after)) for row in range(count)]


def _open_session(path: os.PathLike[str], threads: int) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors only
    try:
        return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions have no base of their own
        raise UserError(f"{os.fspath(path)}: cannot be run: {' '.join(str(error).split())[:200]}") from None
