"""The evaluation of a run: what every model hears on validation and test, greedily and with a language model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps.speech import fitting
from apps.speech.calibration import CALIBRATIONS, expected_calibration_error, word_outcomes
from apps.speech.config import TeacherConfig
from apps.speech.data.batches import neighbours
from apps.speech.decode.confidence import Calibration
from apps.speech.decode.ctc import Hypothesis
from apps.speech.decode.greedy import greedy
from apps.speech.decode.lexicon import WordDecoder
from apps.speech.decode.ngram import write_arpa
from apps.speech.decode.words import Word, timed_words
from apps.speech.evaluate import METRICS, UNITS, Scores, compare, score, worst
from apps.speech.latency import (
    ComputeTime,
    emission_delays,
    finalisation_latency,
    first_symbol_latency,
    real_time_factor,
    summarise,
)
from apps.speech.memory import model_memory
from apps.speech.models import pretrained
from apps.speech.models.base import FRAME_MS, StreamingModel
from apps.speech.models.store import load_model, model_bytes
from apps.speech.pipeline import FOLDS, Cell, Pipeline
from apps.speech.slices import slices
from apps.speech.views import parse_view
from kdcore import processes
from kdcore.config import UserError
from kdcore.run import metric_row, read_json, write_json

# the ways a transcript is made
DECODINGS = ("wer", "wer_lm")
# metrics with intervals, and the way of decoding of each
COMPARED = (("wer", "wer"), ("cer", "wer"), ("wer_lm", "wer_lm"))
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
    """Measures the models of a run; the language model is of the training texts, its weights chosen on validation."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.prepared = pipeline, pipeline.prepared
        self.config = pipeline.config

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
        timed, frame_ms = f"network only, {_threads()}, whole utterances in batches", FRAME_MS
        if cell.role == "teacher":
            teacher = self.pipeline.teach(cell.seed)
            found: dict[int, np.ndarray] = {}
            frame_ms = teacher.frame_ms
            with ComputeTime() as spent:
                for rows in neighbours(store.lengths, 0, len(store)):
                    said = teacher.ask(self.prepared, part, heard, rows, frame_ms=frame_ms)["log_probs"]
                    found.update(zip(rows, said, strict=True))
        else:
            model, _ = load_model(cell.folder)
            with ComputeTime() as spent:
                found = dict(fitting.all_log_probs(model, store))
            if isinstance(model, StreamingModel):
                # posteriors are those of streaming, but many utterances at once cost far less than one step by step
                first = _first(durations)
                durations = [durations[row] for row in first]
                spent = ComputeTime(fitting.streaming_seconds(model, [store[row] for row in first]))
                timed = f"network only, one thread, in chunks of {model.chunk_frames * FRAME_MS} ms"
        said = [found[row] for row in range(len(store))]
        return Heard(said, real_time_factor(spent.seconds, sum(durations)), timed, frame_ms, heard)

    def memory(self) -> dict[str, dict[str, int]]:
        """Return by role what the first seed's model takes to hear the longest utterance of the test part.

        Models that are not stored in the run (pretrained ones, ensembles) are left out.
        """
        store = self.prepared.store("test", self.config.test_view)
        longest = np.array(store[int(store.lengths.argmax())])
        cells = [each for each in self.pipeline.cells(self.config.seeds[0]) if (each.folder / "model.json").exists()]
        return {each.role: {"peak_memory_bytes": model_memory(each.folder, longest)} for each in cells}

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


def evaluate(pipeline: Pipeline, *, memory: bool = False) -> list[dict[str, Any]]:
    """Measure every model of every seed on validation and test; write metrics, comparisons, slices and examples.

    ``memory`` measures that of each model too (``memory.model_memory``), in a process of its own.
    """
    with processes.first_process_first():
        return _evaluated(pipeline, memory) if processes.is_first_process() else pipeline.run.read_metrics()


def _evaluated(pipeline: Pipeline, memory: bool) -> list[dict[str, Any]]:
    for cell in (cell for seed in pipeline.config.seeds for cell in pipeline.cells(seed)):
        if cell.role != "teacher" and not (cell.folder / "model.json").exists():
            raise UserError(f"{cell.folder}: no model here yet; kd speech distill --out {pipeline.run.path} makes it")
    measurement = Measurement(pipeline)
    taken = measurement.memory() if memory else {}
    rows: list[dict[str, Any]] = []
    tested: dict[str, dict[str, list[Scores]]] = {name: {} for name in DECODINGS}
    sliced: list[dict[str, Any]] = []
    for seed in pipeline.config.seeds:
        teacher: dict[str, Heard] | None = None
        for cell in pipeline.cells(seed):
            pipeline.announce(f"seed {seed}: evaluating {cell.role.replace('_', ' ')}")
            heard = {part: measurement.hear(cell, part) for part in ("valid", "test")}
            teacher = heard if cell.role == "teacher" else teacher
            weights = measurement.tune(heard["valid"])
            decoded = {part: measurement.decoded(part, said, weights) for part, said in heard.items()}
            # what calibrations are judged by is not what they are fitted on
            calibrations = {"valid": {}, "test": measurement.calibrate(cell, decoded["valid"])}
            if cell.role != "teacher" and teacher is not None:
                # what an export takes off the times of words
                write_json(cell.folder / "delay.json", {"delay_ms": measurement.lag(heard["valid"], teacher["valid"])})
            for part, said in heard.items():
                found = {name: each.scores for name, each in decoded[part].items()}
                metrics = _metrics(said, decoded[part], calibrations[part])
                if part == "test" and cell.role != "teacher" and teacher is not None:
                    metrics |= _delays(measurement, cell, said, teacher["test"])
                rows.append(
                    _row(
                        measurement,
                        cell,
                        part,
                        metrics,
                        lm_weights=list(weights) if weights else None,
                        intervals=_intervals(found),
                        notes=_notes(said, cell.role in taken),
                        **taken.get(cell.role, {}),
                    )
                )
                for name, scores in found.items():
                    scores.save(cell.folder.parent / "evaluation" / f"{part}-{cell.role}-{name}-{seed}.jsonl")
                    if part == "test":
                        tested[name].setdefault(cell.role, []).append(scores)
                if part == "test":
                    about = {"role": cell.role, "model": _label(pipeline, cell), "seed": seed}
                    sliced += [{**each, **about} for each in slices(found["wer"])]
    pipeline.run.write_metrics(rows)
    write_json(pipeline.run.path / "slices.json", {"metric": "wer", "slices": sliced})
    write_json(pipeline.run.path / "comparisons.json", _comparisons(pipeline, tested))
    _write_examples(pipeline, tested["wer"])
    pipeline.gather_log()
    return rows


def _metrics(heard: Heard, decoded: Mapping[str, Decoded], calibrations: Mapping[str, Calibration]) -> dict[str, float]:
    """Return error rates, how far confidences are from shares of right words, and the network's real-time factor."""
    values = dict(decoded["wer"].scores.values)
    if "wer_lm" in decoded:
        values["wer_lm"] = decoded["wer_lm"].scores.wer
    for name, each in decoded.items():
        if len(each.confidences):
            suffix = name.removeprefix("wer")
            values[f"ece_raw{suffix}"] = expected_calibration_error(each.confidences, each.right)
            if name in calibrations:
                calibrated = [calibrations[name].apply(confidence) for confidence in each.confidences]
                values[f"ece{suffix}"] = expected_calibration_error(calibrated, each.right)
    return values | {"real_time_factor": heard.real_time_factor}


def _notes(heard: Heard, memory: bool) -> dict[str, str]:
    """Return what the report says of figures that have to be explained, by name."""
    if not memory:
        return {"real_time_factor": heard.timed}
    grown = "what a process grows by to load the model and hear the longest test utterance whole, one thread"
    return {"real_time_factor": heard.timed, "peak_memory_bytes": grown}


def _first(durations: Sequence[float]) -> range:
    """Return the utterances that a streaming model is timed on: the first ones, at least one."""
    seconds = np.cumsum(durations[:_TIMED])
    return range(max(1, int((seconds <= _TIMED_SECONDS).sum())))


def _threads() -> str:
    """Return how many threads torch works with, all of whose time is counted."""
    threads = torch.get_num_threads()
    return "one thread" if threads == 1 else f"{threads} threads together"


def _delays(measurement: Measurement, cell: Cell, student: Heard, teacher: Heard) -> dict[str, float]:
    """Return how long words wait to appear, in ms: median and 90th percentile of each kind of wait."""
    model, _ = load_model(cell.folder)
    if not isinstance(model, StreamingModel):
        return {}
    values: dict[str, float] = {}
    for kind, waits in measurement.delays(student, teacher, model, "test").items():
        found = summarise(waits)
        values |= {f"{kind}_ms_{name}": value for name in ("p50", "p90") if (value := found[name]) is not None}
    return values


def _row(
    measurement: Measurement,
    cell: Cell,
    part: str,
    metrics: Mapping[str, float],
    **more: Any,
) -> dict[str, Any]:
    about = _about(cell, measurement.config.teacher)
    return metric_row(
        domain="speech",
        recipe=measurement.config.recipe,
        model=_label(measurement.pipeline, cell),
        role=cell.role,
        seed=cell.seed,
        split=part,
        params=about["parameters"],
        bytes=about["bytes"],
        metrics=metrics,
        train_seconds=about["train_seconds"],
        train_cpu_seconds=about["train_cpu_seconds"],
        **more,
    )


def _about(cell: Cell, teacher: TeacherConfig) -> dict[str, Any]:
    """Return size and cost of a model; of an ensemble those of all its members, and what a teacher's folds cost.

    A pretrained one has a size; what it cost is not known here.
    """
    mine = cell.role == "teacher"
    folders = [cell.folder] if (cell.folder / "model.json").exists() else sorted(cell.folder.glob("member-*"))
    folders = [folder for folder in folders if (folder / "model.json").exists()]
    others = [cell.folder.with_name(FOLDS) / f"fold-{fold}" for fold in range(teacher.folds if mine else 0)]
    fitted = [read_json(folder / "model.json") for folder in (*folders, *others)]
    costs = {name: sum(one[name] for one in fitted) for name in ("train_seconds", "train_cpu_seconds")}
    sizes = [(one["parameters"], model_bytes(folder)) for one, folder in zip(fitted, folders, strict=False)]
    sizes += [pretrained.size(each.path) for each in (teacher.members or [teacher]) if mine and each.path]
    parameters, size = map(sum, zip(*sizes, strict=True))
    return {**costs, "parameters": parameters, "bytes": size}


def _label(pipeline: Pipeline, cell: Cell) -> str:
    """Return what a model is called; a teacher that is not tested as the students are, or has others teach, says so."""
    if (cell.folder / "model.json").exists():
        label = str(read_json(cell.folder / "model.json")["label"])
    else:
        label = "ensemble" if cell.folder.exists() else "pretrained"
    if cell.role == "teacher" and pipeline.config.teacher.folds:
        label += f", teaching by {pipeline.config.teacher.folds} folds"
    view = pipeline.config.tested_view(cell.role)
    return label if view == pipeline.config.test_view else f"{label}, {view}"


def _comparisons(pipeline: Pipeline, tested: Mapping[str, Mapping[str, Sequence[Scores]]]) -> list[dict[str, Any]]:
    """Return the paired differences of the student to the others, with intervals over utterances, speakers and seeds.

    Those over utterances come first: they are what the report's table has.
    """
    labels = {cell.role: _label(pipeline, cell) for cell in pipeline.cells(pipeline.config.seeds[0])}
    rows = []
    for metric, decoding in COMPARED:
        by_role = tested[decoding]
        for by in UNITS:
            for other in ("student_alone", "teacher"):
                if "student" not in by_role or other not in by_role or not _known(by_role["student"][0], by):
                    continue
                fields = compare(by_role["student"], by_role[other], METRICS[metric == "cer"], by=by).as_dict()
                fields["difference"] = fields.pop("value")
                sides = {side: {"role": role, "model": labels[role]} for side, role in (("a", "student"), ("b", other))}
                rows.append({"metric": metric, "split": "test", "by": by, **sides, **fields})
    return rows


def _known(scores: Scores, by: str) -> bool:
    """Return whether the units are there: every utterance names its speaker, and there are several."""
    return by == "utterance" or (all(scores.speakers) and len(set(scores.speakers)) > 1)


def _intervals(decoded: Mapping[str, Scores]) -> dict[str, dict[str, list[float | None]]]:
    """Return the 95 % intervals of a model's own rates by metric and unit, [None, None] where there is none."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for metric, decoding in COMPARED:
        if decoding in decoded:
            scores, rate = decoded[decoding], METRICS[metric == "cer"]
            each = {by: scores.interval(rate, by=by) for by in UNITS if _known(scores, by)}
            found[metric] = {by: [estimate.low, estimate.high] for by, estimate in each.items()}
    return found


def _write_examples(pipeline: Pipeline, tested: Mapping[str, Sequence[Scores]]) -> None:
    """Write the student's worst test utterances of the first seed, each with its alignment."""
    found = worst(tested["student"][0], 10)
    blocks = [
        {"title": f"{each['id']}: {each['errors']} of {each['words']} words", "text": each["alignment"]}
        for each in found
    ]
    write_json(pipeline.run.path / "examples.json", {"title": "The student's worst utterances", "blocks": blocks})


def shown_utterance(pipeline: Pipeline) -> str:
    """Return one test utterance as the deployed student hears it: of median length, with its alignment and times."""
    model, units = load_model(pipeline.run.path / "student")
    corpus = pipeline.prepared.corpora["test"]
    order = sorted(range(len(corpus)), key=lambda row: corpus.utterances[row].duration)
    row = order[len(order) // 2]
    store = pipeline.prepared.store("test", pipeline.config.test_view)
    log_probs = fitting.ask(model, [store[row]])["log_probs"][0]
    heard, utterance = greedy(log_probs), corpus.utterances[row]
    scores = score([utterance], [units.decode(heard.ids)], pipeline.config.data.text)
    times = "  ".join(
        f"{word['word']} {word['start']:.2f}-{word['end']:.2f}" for word in timed_words(heard, units.symbols)
    )
    return (
        f"{utterance.id} ({utterance.duration:.1f} s), as the student hears it:\n{scores.alignments[0].show()}\n{times}"
    )
