from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from apps.speech.device.offset import CUTOFF_HZ, OffsetRemover
from apps.speech.features import SILENCE, fbank
from apps.speech.runtime import Recognizer
from tests.speech.device.exported import export_tones, noise, spoken


def removed(samples: np.ndarray) -> np.ndarray:
    return OffsetRemover().accept(samples)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export that mishears what has energy in the lowest mel bin, where an offset is and its recordings had none."""
    folder = export_tones(tmp_path_factory.mktemp("exported") / "tones")
    for name in ("model.onnx", "model.int8.onnx"):
        model = onnx.load(folder / name)
        for each in model.graph.initializer:
            value = numpy_helper.to_array(each).copy()
            if each.name == "bins":
                value[0, :-1] -= 2.0
            elif each.name == "threshold":
                value[:-1] += 2.0 * SILENCE
            each.CopyFrom(numpy_helper.from_array(value, each.name))
        (folder / name).write_bytes(model.SerializeToString(deterministic=True))
    about = json.loads((folder / "kdsuite.json").read_text(encoding="utf-8"))
    for name in about["files"]:
        data = (folder / name).read_bytes()
        about["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    (folder / "kdsuite.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def text(recognizer: Recognizer, samples: np.ndarray) -> str:
    updates = recognizer.transcribe(np.split(samples, range(700, len(samples), 700)))
    return " ".join(segment.text for update in updates for segment in update.final)


@pytest.mark.parametrize("offset", [0.1, -0.3])
def test_shifted_audio_says_what_it_says_unshifted(folder: Path, offset: float) -> None:
    samples = spoken("yes no")
    shifted = samples + np.float32(offset)
    plain, without = Recognizer(folder), Recognizer(folder, remove_offset=True)
    assert text(plain, samples) == "yes no" != text(plain, shifted)
    assert text(without, shifted) == text(without, samples) == "yes no"


def test_a_constant_is_nothing_and_changes_no_feature() -> None:
    assert np.abs(removed(np.full(20_000, 0.1, np.float32))).max() < 1e-12
    samples = noise(1.0, level=0.05)
    np.testing.assert_allclose(fbank(removed(samples + np.float32(0.25))), fbank(removed(samples)), atol=1e-2)
    # what is above the lowest bins stays
    np.testing.assert_allclose(fbank(removed(samples))[:, 8:], fbank(samples)[:, 8:], atol=0.3)


def test_against_the_recursion() -> None:
    samples = noise(0.7, level=0.2) + np.float32(0.1)
    kept, mean, wanted = np.exp(-2 * np.pi * CUTOFF_HZ / 16_000), float(samples[0]), []
    for sample in samples.tolist():
        mean = kept * mean + (1 - kept) * sample
        wanted.append(sample - mean)
    np.testing.assert_allclose(removed(samples), wanted, atol=1e-6)


@pytest.mark.parametrize(("hertz", "gain"), [(CUTOFF_HZ, 2**-0.5), (100.0, 0.981), (1000.0, 1.0)])
def test_how_much_of_a_tone_is_left(hertz: float, gain: float) -> None:
    wave = (0.5 * np.sin(2 * np.pi * hertz * np.arange(32_000) / 16_000)).astype(np.float32)
    assert np.abs(removed(wave)[16_000:]).max() / 0.5 == pytest.approx(gain, abs=0.01)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 20_000), max_size=12))
def test_any_split_gives_the_same(cuts: list[int]) -> None:
    samples = noise(1.25, level=0.2) + np.float32(0.2)
    remover = OffsetRemover()
    parts = [remover.accept(part) for part in np.split(samples, sorted(cuts))]
    np.testing.assert_array_equal(np.concatenate(parts), removed(samples))
