"""What the evaluation says beside error rates: how late words are, intervals by speaker, memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apps.speech.measure import Heard, Measurement, evaluate
from apps.speech.memory import model_memory
from apps.speech.pipeline import Pipeline
from data_scripts.simulate_speech import simulate
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


def test_every_unit_and_metric_has_its_interval(pipeline: Pipeline) -> None:
    rows = evaluate(pipeline, memory=True)
    assert set(rows[-1]["intervals"]) == {"wer", "cer"}
    assert all(set(each) == {"utterance", "speaker"} for each in rows[-1]["intervals"].values())
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
    short, long = (model_memory(folder, np.zeros((frames, 80), np.float32)) for frames in (100, 200_000))
    assert short + 200_000 * 80 * 4 < long
    with pytest.raises(OSError, match="could not be measured"):
        model_memory(tmp_path, np.zeros((100, 80), np.float32))
