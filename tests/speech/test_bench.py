"""The benchmarks' own parts: what runs share, and how results are summed up."""

from __future__ import annotations

from pathlib import Path

import pytest

from apps.speech.bench import _share, _summary, run_bench
from data_scripts.simulate_speech import simulate
from kdcore.config import UserError
from tests.speech.small_runs import run, small


def test_runs_share_the_teacher_and_what_it_said(tmp_path: Path) -> None:
    data = simulate(tmp_path / "data", utterances=36)
    first = small("ctc_sequence_level", data, tmp_path / "first")
    rows = run(first)
    _share(first.run.path, tmp_path / "second" / "run")
    second = small("ctc_frame_level", data, tmp_path / "second")
    kept = [
        tmp_path / "second" / "run" / "seeds" / name / "model.safetensors"
        for name in ("shared/teacher", "0/student_alone")
    ]
    before = [file.stat().st_ino for file in kept]
    other = run(second)
    assert [file.stat().st_ino for file in kept] == before
    assert [row["metrics"]["wer"] for row in other[:4]] == [row["metrics"]["wer"] for row in rows[:4]]
    summary = _summary(first, rows)
    assert summary["models"]["student"]["metrics"]["wer"]["mean"] == rows[-1]["metrics"]["wer"]
    assert summary["models"]["student"]["metrics"]["wer"]["sd"] is None
    difference = summary["differences"]["wer against student_alone, by utterance"]
    assert difference["value"] == pytest.approx(rows[-1]["metrics"]["wer"] - rows[3]["metrics"]["wer"])


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wanted some of ctc_sequence_level"):
        run_bench("quality", None, tmp_path, ["ctc_sequnce_level"])
    with pytest.raises(UserError, match="is for bench quality"):
        run_bench("train", None, tmp_path, ["ctc_frame_level"])
