"""The simulated recordings: what is written, that a seed gives the same bytes, that a killed run leaves no half."""

from __future__ import annotations

import errno
import hashlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_scripts.espeak import Speaker
from data_scripts.simulate_speech import (
    SPLITS,
    VARIANTS,
    _resample,
    coloured_noise,
    mix,
    simulate,
    talkers,
    trim,
)
from data_scripts.speech_grammar import vocabulary
from kdcore.config import UserError
from kdcore.run import read_json

soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed: pip install kdsuite[speech]")
loader = pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed: pip install kdsuite[simulate]")


def lines(folder: Path, split: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def content(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("speech") / "small", utterances=30)


def test_what_is_written(small: Path) -> None:
    assert [len(lines(small, split)) for split in SPLITS] == [24, 3, 3]
    seen = set()
    for split in SPLITS:
        for line in lines(small, split):
            assert list(line) == ["id", "audio_filepath", "text", "duration", "speaker", "snr"]
            info = soundfile.info(small / line["audio_filepath"])
            assert (info.samplerate, info.channels, info.format, info.subtype) == (16000, 1, "FLAC", "PCM_16")
            assert line["duration"] == info.frames / 16000
            assert 0.4 < line["duration"] < 15
            assert set(line["text"].split()) <= vocabulary()
            assert 10 <= line["snr"] <= 30
            seen.add(line["audio_filepath"])
    assert seen == {path.relative_to(small).as_posix() for path in small.rglob("*.flac")}


def test_it_says_that_it_is_simulated(small: Path) -> None:
    about = read_json(small / "dataset.json")
    assert about["simulated"] is True
    assert (about["seed"], about["generator"], about["utterances"]) == (0, "espeak-ng", 30)
    assert set(about["versions"]) == {"espeak-ng", "espeakng-loader", "libsndfile", "numpy", "scipy", "soundfile"}
    for split in SPLITS:
        found = lines(small, split)
        assert about[split]["seconds"] == pytest.approx(sum(line["duration"] for line in found), abs=1e-4)
        assert {about["voices"][line["speaker"]]["split"] for line in found} == {split}


def test_the_same_seed_gives_the_same_bytes(small: Path, tmp_path: Path) -> None:
    again = simulate(tmp_path / "again", utterances=30)
    assert content(again) == content(small)
    other = simulate(tmp_path / "other", utterances=30, seed=1)
    assert not set(content(other).values()) & set(content(small).values())


def test_complete_output_is_kept_and_other_parameters_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = simulate(tmp_path / "out", utterances=3)
    before = content(out)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "espeakng_loader", None)  # nothing is spoken, so it is not missed
        simulate(out, utterances=3)
    assert content(out) == before
    simulate(out, utterances=4, snr=None)
    assert [len(lines(out, split)) for split in SPLITS] == [2, 1, 1]
    assert "snr" not in lines(out, "train")[0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_leaves_nothing_half_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"from data_scripts.simulate_speech import simulate; simulate({str(out)!r}, utterances=50000)"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*.partial/train/*.flac")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists() and list(tmp_path.iterdir())
    simulate(out, utterances=3)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list(out.rglob("*.flac"))) == 3


def test_an_error_while_speaking_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> np.ndarray:
        raise RuntimeError("broken")

    monkeypatch.setattr(Speaker, "speak", fails)
    with pytest.raises(RuntimeError, match="broken"):
        simulate(tmp_path / "out", utterances=3)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"sim000000-.*\.flac: cannot be written: No space left on device"):
        simulate(tmp_path / "out", utterances=3)
    assert list(tmp_path.iterdir()) == []


def test_ninety_voices_of_which_splits_share_none() -> None:
    people = talkers(0)
    assert len(people) == 90 == len({each.name for each in people})
    assert Counter(each.split for each in people) == {"train": 68, "valid": 11, "test": 11}
    variants = {split: {e.voice.name.split("+")[1] for e in people if e.split == split} for split in SPLITS}
    assert sum(map(len, variants.values())) == len(set().union(*variants.values())) == len(VARIANTS) == 60
    with Speaker() as speaker:
        clips = [speaker.speak("yes", each.voice) for each in people]
    assert len({clip.tobytes() for clip in clips}) == 90
    assert all(np.abs(clip.astype(int)).max() > 1000 for clip in clips)
    assert talkers(1) != people == talkers(0)


@settings(max_examples=30, deadline=None)
@given(st.floats(-10, 40), st.integers(0, 1000))
def test_the_noise_has_the_ratio_it_states(snr: float, seed: int) -> None:
    speech = np.sin(np.arange(16000) / 7) * 0.3
    clean = mix(speech, np.random.default_rng(seed), None)
    noisy = mix(speech, np.random.default_rng(seed), snr)
    inside = np.flatnonzero(clean)
    assert inside[0] >= 1600 and len(clean) - inside[-1] > 1600
    assert len(noisy) == len(clean) and np.abs(noisy).max() <= 0.95 + 1e-12
    if np.abs(noisy).max() < 0.95 - 1e-9:  # else both were made softer, so as not to clip
        noise, signal = noisy - clean, clean[inside[0] : inside[-1] + 1]
        assert 10 * np.log10(np.mean(signal**2) / np.mean(noise**2)) == pytest.approx(snr, abs=0.01)


@pytest.mark.parametrize("slope", [0.0, 1.0, 1.5])
def test_the_noise_has_the_colour_it_states(slope: float) -> None:
    from scipy.signal import welch

    noise = coloured_noise(np.random.default_rng(0), 1 << 18, slope)
    assert np.mean(noise**2) == pytest.approx(1.0)
    frequency, power = welch(noise, 16000, nperseg=4096)
    band = (frequency > 100) & (frequency < 7000)
    fitted = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert fitted == pytest.approx(-slope, abs=0.05)


def test_silence_at_the_ends_is_trimmed() -> None:
    sound = np.sin(np.arange(1600) / 5)
    inner = np.concatenate([sound, np.zeros(800), sound])
    padded = np.concatenate([np.zeros(320), inner, np.full(333, 1e-4)])
    assert np.array_equal(trim(padded, 16000), inner)
    assert len(trim(np.zeros(100), 16000)) == 0 == len(trim(np.zeros(0), 16000))


def test_resampling_is_scipys() -> None:
    from scipy.signal import resample_poly

    samples = np.random.default_rng(0).integers(-20000, 20000, 5000).astype(np.int16)
    assert np.allclose(_resample(samples, 22050), resample_poly(samples / 32768.0, 320, 441), atol=1e-12)


def test_the_speech_is_where_its_duration_says(small: Path) -> None:
    for line in lines(small, "train")[:8]:
        samples, _ = soundfile.read(small / line["audio_filepath"])
        edge = np.std(samples[:1600])
        assert 0.01 < np.std(samples) < 0.2
        assert np.std(samples) > 2 * edge  # the first 100 ms are noise alone
        assert 0.1 < line["duration"] / len(line["text"].split()) < 1.9


def test_progress_is_on_stderr_and_says_how_fast(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    simulate(tmp_path / "out", utterances=3, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "Simulated 3 utterances" in err and "times real time" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"utterances": 2}, "utterances: got 2"),
        ({"utterances": 2.5}, "utterances: got 2.5"),
        ({"utterances": True}, "utterances: got True"),
        ({"seed": -1}, "seed: got -1"),
        ({"snr": (20.0, 10.0)}, "snr: got"),
        ({"snr": (float("nan"), 10.0)}, "snr: got"),
    ],
)
def test_bad_parameters(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        simulate(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_own_texts_are_spoken_without_silence_around_them(small: Path, tmp_path: Path) -> None:
    texts = ["seven", "a door  is\topen"]
    folder = simulate(tmp_path / "own", utterances=12, texts=texts, silence=(0.0, 0.0), snr=None)
    found = [line for split in SPLITS for line in lines(folder, split)]
    assert {line["text"] for line in found} == {"seven", "a door is open"}
    for line in found:
        samples, _ = soundfile.read(folder / line["audio_filepath"])
        for end in (samples[:160], samples[-320:]):
            assert np.abs(end).max() > 0.005 * np.abs(samples).max()
    # as before, other parameters replace it and the same keep it
    before = content(folder)
    assert content(simulate(folder, utterances=12, texts=texts, silence=(0.0, 0.0), snr=None)) == before
    assert content(simulate(folder, utterances=12, texts=texts[:1], silence=(0.0, 0.0), snr=None)) != before
    # what was made when there was no choice is what a command without one makes
    assert not {"texts", "silence"} & set(read_json(small / "dataset.json"))


def test_a_text_that_cannot_be_spoken_is_named(tmp_path: Path) -> None:
    for text in ("", "x" * 1001, "ring\x07"):
        with pytest.raises(UserError, match=r"^texts, 2: got .*, wanted 1 to 1000 printable characters"):
            simulate(tmp_path / "own", utterances=3, texts=["one", text])
    with pytest.raises(UserError, match=r"^text '\.': espeak-ng says nothing for it in voice"):
        simulate(tmp_path / "own", utterances=3, texts=["."])
    assert not list(tmp_path.iterdir())


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds files"):
        simulate(tmp_path, utterances=3)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_without_espeak_there_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match="pip install kdsuite"):
        simulate(tmp_path / "out", utterances=3)
    assert list(tmp_path.iterdir()) == []
