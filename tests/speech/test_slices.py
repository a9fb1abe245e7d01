"""Slices: their parts, that they add up to the whole, and that the report reads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from apps.speech.data.utterance import Utterance
from apps.speech.evaluate import Scores, score
from apps.speech.slices import slices
from kdcore.config import UserError
from kdcore.report.files import read_run
from kdcore.run import metric_row, write_json


def scores(snr: list[float | None] | None = None) -> Scores:
    texts = ["one", "one two", "one two three", "one two three four", "", "six"]
    heard = ["one", "one too", "one", "one two three four", "x", "six"]
    people = ["anna", "anna", "ben", "ben", "cleo", ""]
    extras = [{} if snr is None or each is None else {"snr": each} for each in snr or [None] * 6]
    items = [
        Utterance(f"u{at}", "", text, float(at), who, extra)
        for at, (text, who, extra) in enumerate(zip(texts, people, extras, strict=True))
    ]
    return score(items, heard)


def axis(rows: list, name: str) -> list:
    return [(row["slice"], row["n"], row["value"]) for row in rows if row["axis"] == name]


def test_speakers_by_name() -> None:
    found = axis(slices(scores()), "speaker")
    assert found == [("not stated", 1, 0.0), ("anna", 2, 1 / 3), ("ben", 2, 2 / 7), ("cleo", 1, None)]


def test_lengths_at_quantiles() -> None:
    found = axis(slices(scores(), n_lengths=3), "length (s)")
    assert found == [("0.0-1.0", 2, 1 / 3), ("2.0-3.0", 2, 2 / 7), ("4.0-5.0", 2, 1.0)]
    assert [n for _, n, _ in axis(slices(scores(), n_lengths=1), "length (s)")] == [6]


def test_ratios_in_steps_of_five() -> None:
    found = axis(slices(scores([-3.0, 0.0, 4.9, 30.0, float("inf"), None])), "SNR (dB)")
    assert [(name, n) for name, n, _ in found] == [
        *(("below 0", 1), ("0-5", 2), ("30 and above", 1), ("clean", 1), ("not stated", 1))
    ]
    assert axis(slices(scores()), "SNR (dB)") == []
    assert axis(slices(scores([float("-inf")] + [None] * 5)), "SNR (dB)")[0][:2] == ("below 0", 1)


def test_the_parts_of_an_axis_are_the_whole() -> None:
    given = scores([1.0, 7.0, 12.0, 40.0, 3.0, 22.0])
    rows = slices(given, "cer")
    for name in ("speaker", "length (s)", "SNR (dB)"):
        assert sum(n for _, n, _ in axis(rows, name)) == len(given)
        labels = [label for label, _, _ in axis(rows, name)]
        assert len(set(labels)) == len(labels)
    assert [row["position"] for row in rows if row["axis"] == "speaker"] == [0, 1, 2, 3]


def test_durations_that_differ_by_less_than_the_label_shows_are_one_slice() -> None:
    items = [Utterance(f"u{at}", "", "one", 1.0 + at / 1000, "anna") for at in range(8)]
    assert axis(slices(score(items, ["one"] * 8)), "length (s)") == [("1.0-1.0", 8, 0.0)]


def test_the_report_reads_them(tmp_path: Path) -> None:
    about = {"role": "student", "model": "tiny", "seed": 0}
    rows = [{**row, **about} for row in slices(scores([1.0] * 6))]
    row = metric_row(domain="speech", recipe="r", split="test", params=1, bytes=1, metrics={"wer": 0.5}, **about)
    write_json(tmp_path / "metrics.json", [row])
    write_json(tmp_path / "slices.json", {"metric": "wer", "slices": rows})
    found = read_run(tmp_path).slices
    assert found is not None and len(found["slices"]) == len(rows)


def test_bad_metric() -> None:
    with pytest.raises(UserError, match="metric"):
        slices(scores(), "bleu")
    assert np.isnan(scores().snrs).all()
