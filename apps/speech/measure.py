"""The evaluation of a run: what every model hears on validation and test, greedily and with a language model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from apps.speech import fitting
from apps.speech.calibration import CALIBRATIONS, expected_calibration_error
from apps.speech.config import TeacherConfig
from apps.speech.decode.confidence import Calibration
from apps.speech.decode.greedy import greedy
from apps.speech.decode.words import timed_words
from apps.speech.evaluate import METRICS, UNITS, Scores, compare, score, worst
from apps.speech.latency import (
    summarise,
)
from apps.speech.measurement import DECODINGS, Decoded, Heard, Measurement
from apps.speech.models import pretrained
from apps.speech.models.base import StreamingModel
from apps.speech.models.store import load_model, model_bytes
from apps.speech.pipeline import FOLDS, Cell, Pipeline
from apps.speech.slices import slices
from apps.speech.teachers import Teacher
from kdcore import processes
from kdcore.config import UserError, resolved
from kdcore.run import fingerprint, metric_row, read_json, write_json

# metrics with intervals, and the way of decoding of each
COMPARED = (("wer", "wer"), ("cer", "wer"), ("wer_lm", "wer_lm"))


# raised when the same models and data give other figures
VERSION = 2


def evaluate(pipeline: Pipeline, *, memory: bool = False) -> list[dict[str, Any]]:
    """Measure every model of every seed on validation and test; write metrics, comparisons, slices and examples.

    What was found of a model is kept beside it, and is not measured again while model, teacher and settings stay.
    ``memory`` measures that of each model too (``memory.model_memory``), in a process of its own.
    """
    # these ask all processes; the first one alone does the rest
    _refuse_unfitted(pipeline)
    pipeline.prepared.refuse_changed()
    teachers: dict[int, Teacher] = {}
    for seed in pipeline.config.seeds:
        shared = next(iter(teachers.values()), None) if pipeline.config.teacher.seed is not None else None
        teachers[seed] = shared or pipeline.teach(seed)
    with processes.first_process_first():
        if processes.is_first_process():
            with processes.one_command_makes(pipeline.run.metrics, pipeline.announce):
                return _evaluated(pipeline, Measurement(pipeline, teachers), memory)
    return pipeline.run.read_metrics()


def _refuse_unfitted(pipeline: Pipeline) -> None:
    cells = (cell for seed in pipeline.config.seeds for cell in pipeline.cells(seed))
    for cell in cells:
        if cell.role != "teacher" and not (cell.folder / "model.json").exists():
            raise UserError(f"{cell.folder}: no model here yet; kd speech distill --out {pipeline.run.path} makes it")


def _evaluated(pipeline: Pipeline, measurement: Measurement, memory: bool) -> list[dict[str, Any]]:
    cells = [cell for seed in pipeline.config.seeds for cell in pipeline.cells(seed)]
    evaluation = _Evaluation(measurement, memory)
    found = [evaluation.found(cell) for cell in cells]
    tested: dict[str, dict[str, list[Scores]]] = {name: {} for name in DECODINGS}
    for cell, each in zip(cells, found, strict=True):
        for name, scores in each.scores["test"].items():
            tested[name].setdefault(cell.role, []).append(scores)
    rows = [row for each in found for row in each.rows]
    pipeline.run.write_metrics(rows)
    sliced = [row for each in found for row in each.slices]
    write_json(pipeline.run.path / "slices.json", {"metric": "wer", "slices": sliced})
    write_json(pipeline.run.path / "comparisons.json", _comparisons(pipeline, tested))
    _write_examples(pipeline, tested["wer"])
    pipeline.gather_log()
    return rows


@dataclass(frozen=True)
class _Found:
    """What was found of a cell: its rows of ``metrics.json`` and of ``slices.json``, its errors by part and decoding.

    Of what was found before, those of validation are not read again.
    """

    rows: list[dict[str, Any]]
    slices: list[dict[str, Any]]
    scores: dict[str, dict[str, Scores]]


class _Evaluation:
    """Measures the cells of a run, one after the other; what was found of one before is read."""

    def __init__(self, measurement: Measurement, memory: bool) -> None:
        self.pipeline, self.measurement, self._memory = measurement.pipeline, measurement, memory
        # of the last teacher, by its fingerprint: what it says, and what was found of it, which is so for every seed
        self._taught: tuple[str, dict[str, Heard]] = "", {}
        self._found_of_teacher: tuple[str, _Found] | None = None

    @cached_property
    def _taken(self) -> dict[str, dict[str, int]]:
        return self.measurement.memory() if self._memory else {}

    def found(self, cell: Cell) -> _Found:
        """Return what was found of a cell, now or before."""
        file, key = cell.folder.parent / "evaluation" / f"{cell.role}-{cell.seed}.json", self._key(cell)
        if (known := self._known(cell, file, key)) is not None:
            self.pipeline.announce(f"seed {cell.seed}: {cell.role.replace('_', ' ')} is evaluated already ({file})")
            return known
        self.pipeline.announce(f"seed {cell.seed}: evaluating {cell.role.replace('_', ' ')}")
        found = self._of_teacher(cell) if cell.role == "teacher" else self._measured(cell)
        written = [each for name in ("delay.json", *CALIBRATIONS.values()) if (each := cell.folder / name).exists()]
        for part, of_part in found.scores.items():
            for name, scores in of_part.items():
                written.append(self._scores(cell, part, name))
                scores.save(written[-1])
        files = [os.path.relpath(each, file.parent) for each in written]
        values = {"key": key, "memory": self._memory, "rows": found.rows, "slices": found.slices, "files": files}
        write_json(file, values)  # last: it says that the others are whole
        return found

    def _known(self, cell: Cell, file: Path, key: str) -> _Found | None:
        """Return what was found before, if all of it is there, is whole and of this very model."""
        try:
            known = read_json(file, dict)
            if known["key"] != key or known["memory"] < self._memory:
                return None
            if not all((file.parent / name).exists() for name in known["files"]):
                return None
            paths = {name: self._scores(cell, "test", name) for name in DECODINGS}
            tested = {name: Scores.load(path) for name, path in paths.items() if path.name in known["files"]}
            return _Found(known["rows"], known["slices"], {"test": tested})
        except (FileNotFoundError, UserError, KeyError):
            return None  # it is measured anew

    def _key(self, cell: Cell) -> str:
        config = resolved(self.pipeline.config)
        about = {name: value for name, value in config.items() if name not in ("seeds", "report")}
        parts = [self.measurement.teacher(cell.seed).fingerprint, self.measurement.prepared.fingerprint]
        # of its costs too
        fitted = _fitted(cell, self.pipeline.config.teacher)
        parts += [fingerprint((folder / "model.json").read_bytes()) for folder in fitted]
        if cell.role != "teacher":
            parts.append(fingerprint((cell.folder / "model.safetensors").read_bytes()))
        return fingerprint(cell.role, str(cell.seed), *parts, {**about, "version": VERSION})

    def _scores(self, cell: Cell, part: str, decoding: str) -> Path:
        return cell.folder.parent / "evaluation" / f"{part}-{cell.role}-{decoding}-{cell.seed}.jsonl"

    def _of_teacher(self, cell: Cell) -> _Found:
        """Return what is found of a teacher, which several seeds may share."""
        name = self.measurement.teacher(cell.seed).fingerprint
        if self._found_of_teacher is None or self._found_of_teacher[0] != name:
            self._found_of_teacher = name, self._measured(cell)
        found = self._found_of_teacher[1]
        rows, sliced = ([{**row, "seed": cell.seed} for row in each] for each in (found.rows, found.slices))
        return _Found(rows, sliced, found.scores)

    def _teacher(self, seed: int) -> dict[str, Heard]:
        """Return what the teacher of a seed says of validation and test; the last one's is kept."""
        name = self.measurement.teacher(seed).fingerprint
        if name != self._taught[0]:
            cell = next(each for each in self.pipeline.cells(seed) if each.role == "teacher")
            self._taught = name, {part: self.measurement.hear(cell, part) for part in ("valid", "test")}
        return self._taught[1]

    def _measured(self, cell: Cell) -> _Found:
        measurement, teacher = self.measurement, self._teacher(cell.seed)
        student = cell.role != "teacher"
        heard = {part: measurement.hear(cell, part) for part in ("valid", "test")} if student else teacher
        weights = measurement.tune(heard["valid"])
        decoded = {part: measurement.decoded(part, said, weights) for part, said in heard.items()}
        # what calibrations are judged by is not what they are fitted on
        calibrations = {"valid": {}, "test": measurement.calibrate(cell, decoded["valid"])}
        if student:
            # what an export takes off the times of words
            write_json(cell.folder / "delay.json", {"delay_ms": measurement.lag(heard["valid"], teacher["valid"])})
        rows: list[dict[str, Any]] = []
        scores = {part: {name: each.scores for name, each in of_part.items()} for part, of_part in decoded.items()}
        for part, said in heard.items():
            metrics = _metrics(said, decoded[part], calibrations[part])
            if part == "test" and student:
                metrics |= _delays(measurement, cell, said, teacher["test"])
            given: dict[str, Any] = {
                "lm_weights": list(weights) if weights else None,
                "intervals": _intervals(scores[part]),
            }
            given |= {"notes": _notes(said, cell.role in self._taken), **self._taken.get(cell.role, {})}
            rows.append(_row(measurement, cell, part, metrics, **given))
        about = {"role": cell.role, "model": _label(self.pipeline, cell), "seed": cell.seed}
        return _Found(rows, [{**each, **about} for each in slices(scores["test"]["wer"])], scores)


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
    grown = "what a process grows by to load the model, or all of an ensemble, and hear the longest test utterance"
    return {"real_time_factor": heard.timed, "peak_memory_bytes": grown}


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
    own, folders = cell.stored(), _fitted(cell, teacher)
    fitted = [read_json(folder / "model.json") for folder in folders]
    costs = {name: sum(one[name] for one in fitted) for name in ("train_seconds", "train_cpu_seconds")}
    sizes = [(one["parameters"], model_bytes(folder)) for one, folder in zip(fitted, own, strict=False)]
    members = (teacher.members or [teacher]) if cell.role == "teacher" else []
    sizes += [pretrained.size(each.path) for each in members if each.path]
    parameters, size = map(sum, zip(*sizes, strict=True))
    return {**costs, "parameters": parameters, "bytes": size}


def _fitted(cell: Cell, teacher: TeacherConfig) -> list[Path]:
    """Return the folders of all that was fitted for a cell, those of a teacher's folds behind its own."""
    folds = range(teacher.folds if cell.role == "teacher" else 0)
    return [*cell.stored(), *(cell.folder.with_name(FOLDS) / f"fold-{fold}" for fold in folds)]


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
