"""The data of a run says what it left out, what no model can write, and whether its source has changed since."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apps.speech.features import TAIL_MS
from apps.speech.prepared import Prepared
from data_scripts.simulate_speech import simulate
from tests.speech.small_runs import small


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Some seconds of simulated speech."""
    return simulate(tmp_path / "data", utterances=24)


def change(file: Path, row: int, **fields: Any) -> str:
    """Change a row of a manifest and return its id."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[row] |= fields
    file.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return str(rows[row]["id"])


def prepared(data: Path, folder: Path, **changes: Any) -> tuple[Prepared, list[str]]:
    """Return the data of a run and what was said on the way, but for progress."""
    pipeline, said = small("demo", data, folder, **changes), list[str]()
    pipeline.announce = said.append
    return pipeline.prepared, said


def test_a_source_that_changes_is_named(data: Path, tmp_path: Path) -> None:
    first, said = prepared(data, tmp_path)
    assert not any("changed" in text for text in said)
    again, said = prepared(data, tmp_path)
    assert again.fingerprint == first.fingerprint and said == []
    change(data / "train.jsonl", 0, text="go")
    kept, said = prepared(data, tmp_path)
    assert kept.fingerprint == first.fingerprint
    (text,) = said
    assert text.startswith(f"{data}: has changed since {tmp_path / 'run'} read it") and "another --out" in text


def test_what_no_model_can_write_is_counted_where_it_is_tested(data: Path, tmp_path: Path) -> None:
    outside = change(data / "test.jsonl", 0, text="Ünïcode 学")
    words = " ".join(json.loads((data / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"].split())
    short = change(data / "valid.jsonl", 0, text=" ".join([words] * 40))
    found, _ = prepared(data, tmp_path)
    rows = {row["part"]: row for row in found.statistics()}
    assert rows["test"]["remarks"] == f"1 text outside the units ({outside})"
    assert rows["valid"]["remarks"] == f"1 longer text than frames ({short})"
    assert rows["train"]["remarks"] == "good" and rows["test"]["left out"] == "none"


def test_a_text_may_be_too_long_in_one_view_alone(data: Path, tmp_path: Path) -> None:
    found, said = prepared(data, tmp_path)
    store = found.store("train", "clean")
    frames = int(-(-store.lengths[3] // 4)) - TAIL_MS // 40
    # as many symbols, no two alike in a row, as the recording has frames
    spelled = ("ab" * frames)[:frames]
    known = set("".join(text or "" for text in found.texts("train")))
    letters = sorted(known - {" "})[:2]
    name = change(data / "train.jsonl", 3, text=spelled.replace("a", letters[0]).replace("b", letters[1]))
    found, said = prepared(data, tmp_path / "other")
    assert list(found.training(["clean"]).rows) == list(range(len(found.corpora["train"])))
    said.clear()
    kept = found.training(["clean", "speed:1.5"]).rows
    assert 3 not in kept and len(kept) == len(found.corpora["train"]) - 1
    assert f"left out, longer text than frames in view speed:1.5: 1 (first {name})" in said
    assert np.array_equal(kept, found.training(["speed:1.5", "clean"]).rows)
