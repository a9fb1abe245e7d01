"""Rows of several corpora, one after the other: found without a walk over the corpora."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from apps.speech.data.utterance import Corpus, Utterance, utterance_at
from apps.speech.features import SAMPLE_RATE, with_tail
from apps.speech.prepared import Prepared


class Unwalked(tuple[Utterance, ...]):
    """Utterances that refuse to be gone through: of a large corpus that takes seconds."""

    __slots__ = ()

    def __iter__(self) -> Iterator[Utterance]:
        raise AssertionError("walked over the corpus")


def corpora(folder: Path) -> list[Corpus]:
    names = [["a", "b", "c"], [], ["d"], ["e", "f"]]
    return [Corpus(Unwalked([Utterance(n, f"{n}.wav", n, 0.1) for n in part]), folder) for part in names]


def test_rows_are_those_of_all_corpora_in_their_order(tmp_path: Path) -> None:
    parts = corpora(tmp_path)
    assert [utterance_at(parts, row)[1].id for row in range(6)] == list("abcdef")
    assert [utterance_at(parts, row)[0] is parts[at] for row, at in ((2, 0), (3, 2), (5, 3))] == [True] * 3
    for row in (-1, 6):
        with pytest.raises(IndexError, match=f"row: got {row}, wanted 0 to below 6"):
            utterance_at(parts, row)
    with pytest.raises(IndexError):
        utterance_at([], 0)


def test_samples_of_some_rows_do_not_walk_over_the_corpora(tmp_path: Path) -> None:
    audio = {name: np.full(800 + at, 0.1, np.float32) for at, name in enumerate("abcdef")}
    for name, samples in audio.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    parts = {f"part{at}": corpus for at, corpus in enumerate(corpora(tmp_path))}
    units: Any = SimpleNamespace(blank=1)
    found = Prepared(tmp_path, parts, units, {}).samples(list(parts), "clean", [4, 0, 3])
    for name, samples in zip("ead", found, strict=True):
        np.testing.assert_array_equal(samples, with_tail(audio[name]))
