"""What the evaluation says beside error rates: how late words are, intervals by speaker, memory."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from apps.speech.decode.confidence import Calibration
from apps.speech.evaluate import score
from apps.speech.measure import evaluate
from apps.speech.measurement import Decoded, Heard, Measurement, _first
from apps.speech.memory import Listeners, model_memory
from apps.speech.models import new_model
from apps.speech.models.base import StreamingModel
from apps.speech.models.store import load_model, model_bytes, save_model
from apps.speech.pipeline import Cell, Pipeline
from apps.speech.units import Units
from data_scripts.simulate_speech import simulate
from kdcore.config import UserError
from kdcore.report import write_report
from kdcore.run import read_json
from tests.speech.small_runs import small


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """A small run that is trained."""
    folder = tmp_path_factory.mktemp("measured")
    found = small("demo", simulate(folder / "data", utterances=36), folder)
    found.teach(0)
    found.distill(0)
    return found


def test_how_late_a_student_writes_its_words(pipeline: Pipeline) -> None:
    measurement = Measurement(pipeline)
    units = pipeline.prepared.units

    def said(late: int) -> Heard:
        found = []
        for text in pipeline.prepared.texts("valid"):
            path = [symbol for each in units.encode(text) for symbol in (each, units.blank)]
            frames = np.full((len(path) + late, units.blank + 1), -20.0)
            frames[np.arange(late), units.blank] = 0.0
            frames[late + np.arange(len(path)), path] = 0.0
            found.append(frames)
        return Heard(found, 0.0)

    for late in (0, 2, 5):
        assert measurement.lag(said(late), said(0)) == 40 * late
    # a time cannot be earlier than the word
    assert measurement.lag(said(0), said(3)) == 0
    silent = Heard([np.log(np.full((4, units.blank + 1), 1 / (units.blank + 1)))] * len(said(0).log_probs), 0.0)
    assert measurement.lag(silent, said(0)) == 0


def test_waits_are_from_the_teachers_words_to_the_end_of_a_chunk(pipeline: Pipeline) -> None:
    measurement, units = Measurement(pipeline), pipeline.prepared.units
    model, _ = load_model(pipeline.cells(0)[-1].folder)
    texts = pipeline.prepared.texts("valid")

    def said(late: int, words: slice) -> Heard:
        """Return each text's symbols in every third frame from the first on, ``late`` frames later; some words only."""
        found = []
        for text in texts:
            path = [units.blank] * late
            for symbol in units.encode(" ".join(text.split()[words])):
                path += [symbol, units.blank, units.blank]
            frames = np.full((len(path) + 1, units.blank + 1), -20.0)
            frames[np.arange(len(path)), path] = 0.0
            frames[-1, units.blank] = 0.0
            found.append(frames)
        return Heard(found, 0.0)

    whole = slice(None)
    waits = measurement.delays(said(6, whole), said(0, whole), model, "valid")
    # 240 ms, and what is missing to a chunk of 160 ms
    spread = [wait for kind in ("delay", "final") for wait in waits[kind] if wait is not None]
    assert len(spread) > len(texts) and all(239 < wait < 401 for wait in spread)
    assert max(spread) - min(spread) > 39
    assert all(wait is not None and 279 < wait < 441 for wait in waits["first_symbol"])
    # who leaves the last word out is not early: of such utterances nothing is counted
    longer = [len(text.split()) > 1 for text in texts]
    short = measurement.delays(said(6, slice(0, -1)), said(0, whole), model, "valid")
    assert any(longer) and all(wait is None for wait in short["final"])
    assert sum(wait is not None for wait in short["first_symbol"]) == sum(longer)


def test_a_run_without_its_students_is_not_evaluated(pipeline: Pipeline, tmp_path: Path) -> None:
    config = replace(pipeline.config, seeds=[0, 5])
    begun = Pipeline(config, tmp_path / "begun")
    with pytest.raises(UserError, match=r"seeds/0/student_alone: no model here yet; kd speech distill --out"):
        evaluate(begun)
    assert not (tmp_path / "begun" / "seeds").exists()


def test_a_teacher_that_hears_no_noise_has_no_ratio_of_it(tmp_path: Path) -> None:
    views = [{"student": "noise:0:10", "teacher": "clean"}]
    noisy = small("demo", simulate(tmp_path / "data", utterances=36), tmp_path, views=views, test_view="noise:0:10")
    measurement, texts = Measurement(noisy), noisy.prepared.texts("test")
    drawn = measurement.scored("test", texts, "noise:0:10").snrs
    assert ((drawn >= 0) & (drawn <= 10)).all()
    # those of the corpus itself, if any
    assert not ((own := measurement.scored("test", texts, "clean").snrs) == drawn).any() and len(own) == len(drawn)


def test_a_student_is_timed_in_its_chunks_on_one_thread(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[tuple[int, int]] = []
    clock = time.process_time

    def stream(self: StreamingModel, features: torch.Tensor) -> torch.Tensor:
        # takes a minute
        spent.append((len(features), torch.get_num_threads()))
        return torch.zeros(0)

    corpus, store = pipeline.prepared.corpora["test"], pipeline.prepared.store("test", "clean")
    monkeypatch.setattr(time, "process_time", lambda: clock() + 60 * len(spent))
    monkeypatch.setattr(StreamingModel, "stream", stream)
    monkeypatch.setattr("apps.speech.measurement._TIMED", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        student = Measurement(pipeline).hear(pipeline.cells(0)[-1], "test")
        assert torch.get_num_threads() == 2
        teacher = Measurement(pipeline).hear(pipeline.cells(0)[0], "test")
    finally:
        torch.set_num_threads(threads)
    # the first call warms up
    assert [length for length, _ in spent[1:]] == [len(store[row]) for row in range(2)]
    assert {count for _, count in spent} == {1}
    seconds = sum(each.duration for each in corpus.utterances[:2])
    assert student.real_time_factor == pytest.approx(120 / seconds, rel=0.2)
    assert student.timed == "network only, one thread, in chunks of 160 ms"
    assert teacher.timed == "network only, 2 threads together, whole utterances in batches"
    assert teacher.real_time_factor < 1


def test_the_utterances_that_are_timed() -> None:
    assert _first([1.0] * 50) == range(20)
    assert _first([25.0] * 50) == range(2)
    assert _first([100.0, 1.0]) == range(1)
    assert _first([1.0]) == range(1)


def test_each_way_of_decoding_has_its_calibration(pipeline: Pipeline) -> None:
    measurement, cell = Measurement(pipeline), pipeline.cells(0)[-1]
    scores = measurement.scored("valid", pipeline.prepared.texts("valid"), "clean")
    confidences = np.linspace(0.01, 0.99, 200)
    draws = np.random.default_rng(0).random(200)
    sure = Decoded(scores, confidences, draws < confidences)
    unsure = Decoded(scores, confidences, draws < confidences**4)
    found = measurement.calibrate(cell, {"wer": sure, "wer_lm": unsure})
    stored = [read_json(cell.folder / name) for name in ("calibration.json", "calibration_lm.json")]
    assert [Calibration(**each) for each in stored] == [found["wer"], found["wer_lm"]]
    assert found["wer"].apply(0.7) > found["wer_lm"].apply(0.7) + 0.2
    # the one of an earlier evaluation does not stay
    assert set(measurement.calibrate(cell, {"wer": Decoded(scores, confidences, draws > confidences)})) == set()
    assert not any((cell.folder / name).exists() for name in ("calibration.json", "calibration_lm.json"))


def test_calibrations_are_judged_on_other_words_than_they_are_fitted_on(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = {"wer": Calibration(1.0, 0.0), "wer_lm": Calibration(1.0, -2.0)}
    monkeypatch.setattr(Measurement, "calibrate", lambda self, cell, valid: fitted)
    spoken = [np.log(np.full((4, 3), 1 / 3))]
    outcome = np.array([0.9, 0.8, 0.7]), np.array([True, True, False])
    found = Decoded(score(pipeline.prepared.corpora["test"].utterances[:1], ["one"]), *outcome)
    monkeypatch.setattr(Measurement, "hear", lambda self, cell, part: Heard(spoken, 0.5, "said"))
    monkeypatch.setattr(Measurement, "tune", lambda self, heard: (1.0, 0.0))
    monkeypatch.setattr(Measurement, "decoded", lambda self, part, heard, weights: {"wer": found, "wer_lm": found})
    monkeypatch.setattr(Measurement, "lag", lambda self, student, teacher: 0)
    monkeypatch.setattr("apps.speech.measure._delays", lambda *given: {})
    monkeypatch.setattr("apps.speech.measure.VERSION", -1)  # nothing that was found before counts
    rows = evaluate(pipeline)
    for row in rows:
        own = {name for name in row["metrics"] if name.startswith("ece")}
        raw = {"ece_raw", "ece_raw_lm"}
        assert own == (raw if row["split"] == "valid" else raw | {"ece", "ece_lm"})
    assert rows[-1]["metrics"]["ece"] == pytest.approx(rows[-1]["metrics"]["ece_raw"])
    assert rows[-1]["metrics"]["ece_lm"] > rows[-1]["metrics"]["ece"] + 0.01
    assert rows[-1]["notes"] == {"real_time_factor": "said"}


def test_words_of_the_language_model_have_their_confidences(pipeline: Pipeline) -> None:
    measurement, units = Measurement(pipeline), pipeline.prepared.units
    heard = []
    for text in pipeline.prepared.texts("valid"):
        path = [symbol for each in units.encode(text) for symbol in (each, units.blank)]
        frames = np.full((len(path), units.blank + 1), np.log(0.1 / units.blank))
        frames[np.arange(len(path)), path] = np.log(0.9)
        heard.append(frames)
    found = measurement.decoded("valid", Heard(heard, 0.0), (0.0, 0.0))["wer_lm"]
    words = sum(len(text.split()) for text in pipeline.prepared.texts("valid"))
    assert len(found.confidences) == len(found.right) >= 0.9 * words
    assert found.right.sum() == (found.scores.words - found.scores.edits[:, :2].sum(axis=1)).sum() > 0
    assert ((found.confidences > 0) & (found.confidences <= 0.9 + 1e-6)).all()


def test_what_was_found_is_kept_until_a_model_changes(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, heard = evaluate(pipeline), list[str]()
    compared, hear = read_json(pipeline.run.path / "comparisons.json"), Measurement.hear

    def noted(self: Measurement, cell: Cell, part: str) -> Heard:
        heard.append(f"{cell.role} {part}")
        return hear(self, cell, part)

    monkeypatch.setattr(Measurement, "hear", noted)
    assert evaluate(pipeline) == rows and heard == []
    assert read_json(pipeline.run.path / "comparisons.json") == compared
    # killed before the last one was whole
    folder = pipeline.cells(0)[-1].folder
    (folder.parent / "evaluation" / "student-0.json").unlink()
    again = evaluate(pipeline)
    assert heard == ["teacher valid", "teacher test", "student valid", "student test"]
    assert [row["metrics"]["wer"] for row in again] == [row["metrics"]["wer"] for row in rows]
    # one that was fitted again has other costs
    for name in ("student", "student_alone"):
        heard.clear()
        (folder.with_name(name) / "model.json").unlink()
        pipeline.distill(0)
        costs = read_json(folder.with_name(name) / "model.json")["train_seconds"]
        row = next(row for row in evaluate(pipeline) if row["role"] == name)
        assert heard[-1] == f"{name} test" and row["train_seconds"] == costs
    # what is missing or damaged is made again
    for path in (folder / "delay.json", folder.parent / "evaluation" / "test-student-wer-0.jsonl"):
        heard.clear()
        path.unlink()
        assert len(evaluate(pipeline)) == 6 and heard[-1] == "student test" and path.exists()
    (folder.parent / "evaluation" / "student_alone-0.json").write_text("{")
    heard.clear()
    assert evaluate(pipeline, memory=True)[-1]["peak_memory_bytes"] > 0 and len(set(heard)) == 6
    heard.clear()
    assert evaluate(pipeline)[-1]["peak_memory_bytes"] > 0 and heard == []
    weights = load_file(folder / "model.safetensors")
    before = (folder / "model.safetensors").read_bytes()
    save_file({name: value * 1.5 for name, value in weights.items()}, folder / "model.safetensors")
    evaluate(pipeline)
    (folder / "model.safetensors").write_bytes(before)
    assert heard[-1] == "student test" and "student_alone test" not in heard


def test_every_unit_and_metric_has_its_interval(pipeline: Pipeline) -> None:
    rows = evaluate(pipeline, memory=True)
    assert set(rows[-1]["intervals"]) == {"wer", "cer", "wer_lm"}
    assert all(set(each) == {"utterance", "speaker"} for each in rows[-1]["intervals"].values())
    for row in rows:
        for metric, by_unit in row["intervals"].items():
            for low, high in by_unit.values():
                assert (low is None and high is None) or 0 <= low <= row["metrics"][metric] <= high
    page = write_report(pipeline.run.path).read_text(encoding="utf-8")
    assert "Memory, peak" in page and "<small>by speaker [" in page
    assert "real time factor: network only" in page and "peak memory bytes: what a process grows by" in page
    found = read_json(pipeline.run.path / "comparisons.json")
    methods = {(row["metric"], row["b"]["role"], row["by"]) for row in found}
    assert all(f"{row['by']}s" in row["method"] for row in found)
    assert len(found) == len(methods) == 3 * 2 * 2
    assert {metric for metric, _, _ in methods} == {"wer", "cer", "wer_lm"}
    # of the teacher, the student alone and the student, on validation and on test
    taken = {row["role"]: row["peak_memory_bytes"] for row in rows}
    assert len(taken) == 3 and all(1 << 16 < each < 1 << 28 for each in taken.values())
    delay = read_json(pipeline.cells(0)[-1].folder / "delay.json")["delay_ms"]
    assert delay >= 0 and not (pipeline.cells(0)[0].folder / "delay.json").exists()


def test_memory_grows_with_what_is_heard(pipeline: Pipeline, tmp_path: Path) -> None:
    folder = pipeline.cells(0)[-1].folder
    who = Listeners([folder])
    short, long = (model_memory(who, np.zeros((frames, 80), np.float32)) for frames in (100, 200_000))
    assert short + 200_000 * 80 * 4 < long
    with pytest.raises(OSError, match="could not be measured"):
        model_memory(Listeners([tmp_path]), np.zeros((100, 80), np.float32))
    with pytest.raises(ValueError, match="wanted those that pretrained models hear"):
        model_memory(Listeners([], [tmp_path]), np.zeros((100, 80), np.float32))


def test_memory_of_an_ensemble_is_that_of_all_its_members(tmp_path: Path) -> None:
    units = Units.of_characters(["ab"])
    for name, hidden in (("one", 512), ("other", 8)):
        save_model(new_model("bilstm", units.blank + 1, {"hidden": hidden, "layers": 2}), units, tmp_path / name)
    large, little = tmp_path / "one", tmp_path / "other"
    features = np.zeros((10, 80), np.float32)
    alone, both = (model_memory(Listeners(who), features) for who in ([little], [little, large]))
    assert both > alone + model_bytes(large)
