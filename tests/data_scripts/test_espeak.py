"""The engine: the same request gives the same samples whatever was said before, and what is wrong is said."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_scripts.espeak import Speaker, Voice
from kdcore.config import UserError

loader = pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed: pip install kdsuite[simulate]")


@pytest.fixture(scope="module")
def speaker() -> Iterator[Speaker]:
    with Speaker() as running:
        yield running


def test_samples(speaker: Speaker) -> None:
    samples = speaker.speak("nine three", Voice("en-us"))
    assert samples.dtype == np.int16 and samples.ndim == 1
    assert speaker.sample_rate == 22050 and speaker.version[0].isdigit()
    assert 0.5 < len(samples) / speaker.sample_rate < 2
    assert 1000 < np.abs(samples).max() < 32767


def test_a_clip_does_not_depend_on_those_before(speaker: Speaker) -> None:
    one, two = Voice("en-us+f3", rate=130), Voice("en-gb-x-rp+m2", pitch=70)
    first = speaker.speak("enter seven", one)
    speaker.speak("a quite different sentence, spoken between the two", two)
    assert np.array_equal(speaker.speak("enter seven", one), first)
    with Speaker() as other:
        assert np.array_equal(other.speak("enter seven", one), first)


def test_random_voices_are_the_same_in_every_engine(speaker: Speaker) -> None:
    voices = [Voice(f"en-us+{variant}", gap=4) for variant in ("f2", "f3", "f5", "Alicia", "victor")]
    first = [speaker.speak("nine three b c q twenty", voice) for voice in voices]
    time.sleep(1.1)  # espeak-ng seeds their flutter by the second
    with Speaker() as other:
        for voice, clip in zip(voices, first, strict=True):
            assert np.array_equal(other.speak("nine three b c q twenty", voice), clip), voice.name


def test_settings_act(speaker: Speaker) -> None:
    base = speaker.speak("one two three", Voice("en-us"))
    assert len(speaker.speak("one two three", Voice("en-us", rate=100))) > 1.3 * len(base)
    assert len(speaker.speak("one two three", Voice("en-us", gap=20))) > 1.2 * len(base)
    louder = speaker.speak("one two three", Voice("en-us", volume=100))
    assert np.abs(louder).max() > 1.5 * np.abs(base).max()
    for other in (Voice("en-us", pitch=90), Voice("en-us", range=0), Voice("en-gb-scotland"), Voice("en-us+f2")):
        assert not np.array_equal(speaker.speak("one two three", other), base)


def test_phonemes_are_read(speaker: Speaker) -> None:
    voice = Voice("en-us")
    letter = speaker.speak("a", voice)  # alone it is the letter; within a sentence it would be the article
    assert np.array_equal(speaker.speak("[['eI]]", voice), letter)
    assert len(speaker.speak("b [['eI]] c", voice)) > 1.1 * len(speaker.speak("b a c", voice))


@pytest.mark.parametrize(
    ("voice", "message"),
    [
        (Voice("klingon-2"), "no voice 'klingon-2'"),
        (Voice("en-us+nobody"), "no voice 'en-us\\+nobody'"),
        (Voice("en-us+../../../secret"), "no voice"),
        (Voice("en-us", rate=79), "rate: got 79, wanted 80 to 450"),
        (Voice("en-us", pitch=101), "pitch: got 101, wanted 0 to 100"),
    ],
)
def test_what_is_out_of_range_is_refused(speaker: Speaker, voice: Voice, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        speaker.speak("one", voice)
    assert len(speaker.speak("one", Voice("en-us")))  # the engine goes on


def test_an_engine_that_dies_is_an_error() -> None:
    running = Speaker()
    os.kill(running._process.pid, signal.SIGKILL)
    running._process.wait()
    with pytest.raises(RuntimeError, match="has ended"):
        running.speak("one", Voice("en-us"))
    running.close()
    with pytest.raises(RuntimeError, match="closed"):
        running.speak("one", Voice("en-us"))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"^simulated speech is spoken by espeak-ng: pip install kdsuite\[simulate\]$"):
        Speaker()


def test_a_library_that_does_not_load_is_the_users_to_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "libespeak.so"
    broken.write_text("not a library")
    monkeypatch.setattr(loader, "get_library_path", lambda: str(broken))
    with pytest.raises(UserError, match=r"espeak-ng does not start: .*libespeak\.so"):
        Speaker()


def test_the_module_needs_the_standard_library_only() -> None:
    code = (
        "import sys, data_scripts.espeak; print(sorted({'numpy', 'torch', 'soundfile', 'kdcore'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
