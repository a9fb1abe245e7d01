"""What the models of a run hear, greedily and with a language model, how sure they are of it, and when they say it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from apps.speech import fitting
from apps.speech.calibration import CALIBRATIONS, word_outcomes
from apps.speech.data.batches import neighbours
from apps.speech.decode.confidence import Calibration
from apps.speech.decode.ctc import Hypothesis
from apps.speech.decode.greedy import greedy
from apps.speech.decode.lexicon import WordDecoder
from apps.speech.decode.ngram import write_arpa
from apps.speech.decode.words import Word, timed_words
from apps.speech.evaluate import Scores, score
from apps.speech.latency import (
    ComputeTime,
    emission_delays,
    finalisation_latency,
    first_symbol_latency,
    real_time_factor,
    summarise,
)
from apps.speech.memory import Listeners, model_memory
from apps.speech.models.base import FRAME_MS, StreamingModel
from apps.speech.models.store import load_model
from apps.speech.pipeline import Cell, Pipeline
from apps.speech.spool import Spool
from apps.speech.teachers import Teacher
from apps.speech.views import parse_view
from kdcore.run import write_json

# the ways a transcript is made
DECODINGS = ("wer", "wer_lm")
# utterances of a part that a streaming model is timed on, and their seconds at most
_TIMED, _TIMED_SECONDS = 20, 60.0


@dataclass(frozen=True)
class Heard:
    """What a model says of a part: log-posteriors [T', C] of every utterance by frames of ``frame_ms``, and its cost.

    ``real_time_factor`` is seconds of one core per second of audio, of what ``timed`` says; ``view`` is what it heard.
    """

    log_probs: list[np.ndarray]
    real_time_factor: float
    timed: str = ""
    frame_ms: int = FRAME_MS
    view: str = "clean"

    def words(self, path: Hypothesis, symbols: Sequence[str], words: Sequence[str] | None = None) -> list[Word]:
        """Return the words of what was decoded of an utterance, with times and confidences."""
        return timed_words(path, symbols, words=words, frame_seconds=self.frame_ms / 1000)


@dataclass(frozen=True)
class Decoded:
    """What one way of decoding makes of a part: its errors, the words' confidences, and whether each is right, [M]."""

    scores: Scores
    confidences: np.ndarray
    right: np.ndarray


class Measurement:
    """Measures the models of a run; the language model is of the training texts, its weights chosen on validation.

    ``teachers`` are those of some seeds, where they are there already.
    """

    def __init__(self, pipeline: Pipeline, teachers: Mapping[int, Teacher] | None = None) -> None:
        self.pipeline, self.prepared = pipeline, pipeline.prepared
        self.config, self._teachers = pipeline.config, dict(teachers or {})

    def teacher(self, seed: int) -> Teacher:
        """Return the teacher of a seed, which is loaded once."""
        if seed not in self._teachers:
            self._teachers[seed] = self.pipeline.teach(seed)
        return self._teachers[seed]

    @cached_property
    def language_model(self) -> Path:
        """The n-gram model of the training texts."""
        file = self.pipeline.run.path / "lm.arpa"
        if not file.exists():
            write_arpa(file, [text for text in self.prepared.texts("train") if text], self.config.decode.order)
        return file

    @cached_property
    def words(self) -> list[str]:
        """The words of the training texts: the lexicon."""
        return sorted({word for text in self.prepared.texts("train") for word in text.split()})

    def hear(self, cell: Cell, part: str) -> Heard:
        """Return what the model of a cell says of a part.

        A streaming model is timed in its chunks on the first utterances, any other one on all of them, whole.
        """
        heard = self.config.tested_view(cell.role)
        store = self.prepared.store(part, heard)
        durations = [each.duration for each in self.prepared.corpora[part].utterances]
        spool = Spool(self.pipeline.run.path, len(store))
        timed, frame_ms = f"network only, {_threads()}, whole utterances in batches", FRAME_MS
        if cell.role == "teacher":
            teacher = self.teacher(cell.seed)
            frame_ms = teacher.frame_ms
            with ComputeTime() as spent:
                for rows in neighbours(store.lengths, 0, len(store)):
                    said = teacher.ask(self.prepared, part, heard, rows, frame_ms=frame_ms)["log_probs"]
                    for row, log_probs in zip(rows, said, strict=True):
                        spool.put(row, log_probs)
        else:
            model, _ = load_model(cell.folder)
            with ComputeTime() as spent:
                for row, log_probs in fitting.all_log_probs(model, store):
                    spool.put(row, log_probs)
            if isinstance(model, StreamingModel):
                # posteriors are those of streaming, but many utterances at once cost far less than one step by step
                first = _first(durations)
                durations = [durations[row] for row in first]
                spent = ComputeTime(fitting.streaming_seconds(model, [store[row] for row in first]))
                timed = f"network only, one thread, in chunks of {model.chunk_frames * FRAME_MS} ms"
        return Heard(spool.arrays(), real_time_factor(spent.seconds, sum(durations)), timed, frame_ms, heard)

    def memory(self) -> dict[str, dict[str, int]]:
        """Return by role what the first seed's model takes to hear the longest utterance of the test part.

        Of an ensemble it is that of all its members.
        """
        view, found = self.config.test_view, {}
        store = self.prepared.store("test", view)
        longest = int(store.lengths.argmax())
        for cell in self.pipeline.cells(self.config.seeds[0]):
            teacher = self.config.teacher
            members = (teacher.members or [teacher]) if cell.role == "teacher" else []
            pretrained = [Path(each.path) for each in members if each.path]
            who = Listeners(cell.stored(), pretrained, self.pipeline.run.path / "data")
            samples = self.prepared.samples("test", view, [longest])[0] if pretrained else None
            if who.stored or pretrained:
                taken = model_memory(who, np.array(store[longest]), samples)
                found[cell.role] = {"peak_memory_bytes": taken}
        return found

    def decoder(self, lm_weight: float, word_score: float) -> WordDecoder:
        """Return a decoder of lexicon words under the language model."""
        return WordDecoder(
            self.prepared.units,
            self.words,
            lm=str(self.language_model),
            lm_weight=lm_weight,
            word_score=word_score,
            beam=self.config.decode.beam,
        )

    def scored(self, part: str, texts: Sequence[str], heard: str) -> Scores:
        """Return the errors of one text an utterance; where the view that was heard adds noise, its ratio is drawn."""
        view, utterances = parse_view(heard), list(self.prepared.corpora[part].utterances)
        for place, each in enumerate(utterances):
            if (snr := view.snr(each.id, 0)) is not None:
                utterances[place] = replace(each, extra={**each.extra, "snr": snr})
        return score(utterances, texts, self.config.data.text)

    def greedy(self, part: str, heard: Heard) -> Decoded:
        """Return what best paths give."""
        paths = [greedy(each) for each in heard.log_probs]
        words = [heard.words(path, self.prepared.units.symbols) for path in paths]
        return self._decoded(part, heard, [self.prepared.units.decode(path.ids) for path in paths], words)

    def with_lm(self, part: str, heard: Heard, weights: tuple[float, float]) -> Decoded:
        """Return what lexicon and language model give."""
        decoder, symbols = self.decoder(*weights), self.prepared.units.symbols
        best = [found[0] if (found := decoder.decode(each)) else None for each in heard.log_probs]
        words = [heard.words(each.symbols, symbols, each.words) if each else [] for each in best]
        return self._decoded(part, heard, [" ".join(each.words) if each else "" for each in best], words)

    def _decoded(self, part: str, heard: Heard, texts: Sequence[str], words: Sequence[Sequence[Word]]) -> Decoded:
        references = [self.config.data.text.normalise(text) for text in self.prepared.texts(part)]
        return Decoded(self.scored(part, texts, heard.view), *word_outcomes(zip(words, references, strict=True)))

    def decoded(self, part: str, heard: Heard, weights: tuple[float, float] | None) -> dict[str, Decoded]:
        """Return what each way of decoding gives."""
        found = {"wer": self.greedy(part, heard)}
        return found if weights is None else {**found, "wer_lm": self.with_lm(part, heard, weights)}

    def tune(self, heard: Heard) -> tuple[float, float] | None:
        """Return the weights of language model and words with the least errors on validation; None without a model."""
        if not self.config.decode.order:
            return None
        grid = [(lm, word) for lm in self.config.decode.lm_weights for word in self.config.decode.word_scores]
        errors: dict[tuple[float, float], float] = {}
        for weights in grid:
            errors[weights] = self.with_lm("valid", heard, weights).scores.wer
            if len(errors) % 5 == 0 and len(errors) < len(grid):  # minutes for a model that is sure of nothing
                self.pipeline.announce(f"weights of the language model tried: {len(errors)} of {len(grid)}")
        return min(grid, key=errors.__getitem__)

    def calibrate(self, cell: Cell, valid: Mapping[str, Decoded]) -> dict[str, Calibration]:
        """Return a calibration of each way of decoding, by validation; a student's are kept beside its weights.

        There is none where nothing was heard, or words are not right more often where the model is surer.
        """
        found = {}
        for name, decoded in valid.items():
            with contextlib.suppress(ValueError):
                found[name] = Calibration.fit(decoded.confidences, decoded.right)
        if cell.role != "teacher":
            for name, file in CALIBRATIONS.items():
                (cell.folder / file).unlink(missing_ok=True)  # of an earlier evaluation
                if name in found:
                    write_json(cell.folder / file, {"scale": found[name].scale, "offset": found[name].offset})
        return found

    def lag(self, student: Heard, teacher: Heard) -> int:
        """Return by how many ms the student's words end behind the teacher's on validation, the median, at least 0."""
        symbols = self.prepared.units.symbols
        late: list[float | None] = []
        references = [self.config.data.text.normalise(text) for text in self.prepared.texts("valid")]
        for own, theirs, reference in zip(student.log_probs, teacher.log_probs, references, strict=True):
            words = [{**word, "emitted": word["end"]} for word in student.words(greedy(own), symbols)]
            said: list[Word] = teacher.words(greedy(theirs), symbols)
            late += [each.delay_ms for each in emission_delays(words, said, reference)]
        return max(0, round(summarise(late)["p50"] or 0))

    def delays(self, student: Heard, teacher: Heard, model: StreamingModel, part: str) -> dict[str, list[float | None]]:
        """Return how long a part's words wait for the student, in ms, by the times of the teacher's best path.

        ``delay``: each right word from its end until it appears; ``first_symbol``: each utterance from the start of its
        first word until anything appears; ``final``: from the end of its last word until that appeared, where both
        heard it right: who leaves it out is not early.
        """
        symbols = self.prepared.units.symbols
        found: dict[str, list[float | None]] = {"delay": [], "first_symbol": [], "final": []}
        # what ends within a chunk is known when the chunk is complete
        chunk = model.chunk_frames * FRAME_MS / 1000

        def known(seconds: float) -> float:
            return math.ceil(round(seconds / chunk, 6)) * chunk

        references = [self.config.data.text.normalise(text) for text in self.prepared.texts(part)]
        for own, theirs, reference in zip(student.log_probs, teacher.log_probs, references, strict=True):
            best = greedy(own)
            words = [{**word, "emitted": known(word["end"])} for word in student.words(best, symbols)]
            said: list[Word] = teacher.words(greedy(theirs), symbols)
            first = known((best.frames[0] + 1) * FRAME_MS / 1000) if best.frames else None
            found["delay"] += [each.delay_ms for each in emission_delays(words, said, reference)]
            found["first_symbol"].append(first_symbol_latency(words, said, first_symbol=first))
            last = [each[-1]["word"] for each in (words, said) if each] + reference.split()[-1:]
            right = len(last) == 3 and len(set(last)) == 1
            found["final"].append(finalisation_latency(words, said) if right else None)
        return found


def _first(durations: Sequence[float]) -> range:
    """Return the utterances that a streaming model is timed on: the first ones, at least one."""
    seconds = np.cumsum(durations[:_TIMED])
    return range(max(1, int((seconds <= _TIMED_SECONDS).sum())))


def _threads() -> str:
    """Return how many threads torch works with, all of whose time is counted."""
    threads = torch.get_num_threads()
    return "one thread" if threads == 1 else f"{threads} threads together"
