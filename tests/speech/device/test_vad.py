from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.audio import read_audio
from apps.speech.device.vad import Gate, GateOptions
from apps.speech.features import fbank
from kdcore.config import UserError
from tests.speech.device.exported import noise, silence, spoken

AN4 = Path(os.environ.get("KD_DATA", "../shared/data")) / "speech" / "an4"


def opened(samples: np.ndarray, options: GateOptions | None = None) -> np.ndarray:
    return Gate(options).accept(fbank(samples.astype(np.float32)))


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return fbank(np.concatenate([noise(3, 1e-3), spoken("yes no"), noise(3, 1e-3, 1), silence(1)]))


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 900), max_size=8))
def test_any_split_answers_as_the_whole(features: np.ndarray, cuts: list[int]) -> None:
    gate = Gate()
    edges = [0, *sorted(min(cut, len(features)) for cut in cuts), len(features)]
    parts = [gate.accept(features[first:last]) for first, last in pairwise(edges)]
    assert (np.concatenate(parts) == Gate().accept(features)).all()


@pytest.mark.parametrize("level", [0.0, 1e-4, 1e-3, 1e-2])
def test_steady_noise_closes_the_gate_and_a_word_opens_it(level: float) -> None:
    samples = np.concatenate([silence(6), spoken("yes", before=0, after=0), silence(6)])
    samples = samples + noise(20, level)[: len(samples)]
    found = opened(samples)
    word = slice(600, 600 + (len(samples) - 2 * 6 * 16_000) // 160)
    assert not found[480:590].any()
    assert found[word.start + 16 : word.stop].all()  # within the frames that are averaged; before them is heard too
    assert found[word.stop : word.stop + 100].all()  # it holds
    # an outlier of the noise may open it again
    assert found[word.stop + 200 :].mean() < 0.5


def test_warm_up_and_options() -> None:
    assert opened(silence(3)).all()
    assert not opened(silence(3), GateOptions(hold=0.5, warm_up=0)).all()
    assert len(opened(np.zeros(0, np.float32))) == 0
    for name in ("rise", "hold", "before", "warm_up"):
        for value in (-1.0, float("nan"), float("inf")):
            with pytest.raises(UserError, match=f"gate: {name}"):
                GateOptions(**{name: value})
    with pytest.raises(ValueError, match="features"):
        Gate().accept(np.zeros((3, 40), np.float32))


def _loud(samples: np.ndarray) -> np.ndarray:
    """Return bool [T]: frames of 10 ms within 25 dB of the loudest, which nobody would call silence."""
    frames = samples[: len(samples) // 160 * 160].reshape(-1, 160)
    level = 10 * np.log10(np.square(frames).mean(axis=1) + 1e-12)
    return np.asarray(level > np.percentile(level, 98) - 25)


@pytest.mark.parametrize(
    ("gap", "level"),
    [(0.0, 0.0), (5.0, 0.0), (5.0, 1e-3), (1.0, 5e-3)],
    ids=["back to back", "padded", "hiss", "noisy"],
)
def test_speech_is_never_shut_out(gap: float, level: float) -> None:
    if not AN4.is_dir():
        pytest.skip("no AN4 in KD_DATA")
    rows = [json.loads(line) for line in (AN4 / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    clips = [read_audio(AN4 / row["audio_filepath"]) for row in rows[::10]]
    joined = np.concatenate([part for clip in clips for part in (clip, silence(gap))])
    loud = np.concatenate(
        [part for clip in clips for part in (_whole(_loud(clip), clip), np.zeros(round(gap * 100), bool))]
    )
    heard = _heard(opened(joined + noise(len(joined) / 16_000, level)[: len(joined)]), GateOptions().before)
    count = min(len(loud), len(heard))
    assert not (loud[:count] & ~heard[:count]).any()
    if gap > 4:
        assert heard.mean() < 0.85


def _whole(loud: np.ndarray, clip: np.ndarray) -> np.ndarray:
    """Return as many frames as the clip takes of the joined audio, to a frame."""
    return np.pad(loud, (0, round(len(clip) / 160) - len(loud)))


def _heard(found: np.ndarray, before: float) -> np.ndarray:
    """Return the frames that are heard: those for which the gate is open, and what comes before them."""
    heard, reach = found.copy(), round(before * 100)
    for start in np.flatnonzero(found[1:] & ~found[:-1]) + 1:
        heard[max(0, start - reach) : start] = True
    return heard
