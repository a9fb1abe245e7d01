"""The state of a corpus changes with its files, whatever stands beside them."""

from __future__ import annotations

import os
from pathlib import Path

from apps.speech.data.changes import state


def test_links_that_lead_back_or_nowhere_hold_nothing(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "deep").mkdir(parents=True)
    (corpus / "deep" / "one.wav").write_bytes(b"one")
    before = state(corpus)
    (corpus / "loop.wav").symlink_to("loop.wav")
    (corpus / "gone.wav").symlink_to("nowhere.wav")
    (corpus / "deep" / "up").symlink_to(corpus)
    assert state(corpus) == before is not None
    (corpus / "deep" / "one.wav").write_bytes(b"other")
    assert state(corpus) != before


def test_a_file_that_comes_or_goes_is_a_change(tmp_path: Path) -> None:
    (tmp_path / "one.wav").write_bytes(b"one")
    before = state(tmp_path)
    (tmp_path / "two.wav").write_bytes(b"two")
    assert state(tmp_path) != before
    os.remove(tmp_path / "two.wav")
    assert state(tmp_path) == before
    os.remove(tmp_path / "one.wav")
    assert state(tmp_path) is None
