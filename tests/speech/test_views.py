"""Views do what they are called, draw from seed and key alone, and stay in range."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.audio import read_audio
from apps.speech.data.utterance import Corpus, Utterance
from apps.speech.noise import active_power
from apps.speech.view_steps import Noise, Room
from apps.speech.views import View, parse_view
from kdcore.config import UserError
from tests.speech.spectra import band

AN4 = Path(os.environ.get("KD_DATA", "../shared/data")) / "speech" / "an4"
GENERATED = [
    *("clean", "speed:0.9", "tempo:1.3", "noise:0:10", "noise:5:5:babble"),
    *("room:0.4", "codec:3400:mulaw", "lowpass:2000"),
]
EXTREME = ["speed:2", "tempo:0.5", "noise:-20:-20:white", "room:0.05"]


def speech(seconds: float = 2.0, level: float = 0.5) -> np.ndarray:
    """Bursts of a chord, 200 ms each, with pauses between them, as words."""
    time = np.arange(round(seconds * 16000)) / 16000
    wave = sum(np.sin(2 * np.pi * hertz * time) for hertz in (150, 450, 1100, 2600, 5200)) / 5
    return (level * wave * (np.sin(2 * np.pi * 2.5 * time) > 0)).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("clean", "clean"),
        ("speed:0.90", "speed:0.9"),
        ("tempo:1.50", "tempo:1.5"),
        ("noise:0:10", "noise:0:10"),
        ("noise:-2.5:10.0:pink", "noise:-2.5:10:pink"),
        ("room:0.35 + codec:3400:mulaw", "room:0.35+codec:3400:mulaw"),
        ("clean+lowpass:4000", "lowpass:4000"),
        ("channel:1", "channel:1"),
        ("channel:0+speed:0.90", "channel:0+speed:0.9"),
    ],
)
def test_names_come_back(text: str, name: str) -> None:
    view = parse_view(text)
    assert view.name == name and parse_view(name) == view


@given(factor=st.floats(0.5, 2.0), low=st.floats(-50, 100), high=st.floats(-50, 100), rt60=st.floats(0.02, 5.0))
def test_any_number_comes_back(factor: float, low: float, high: float, rt60: float) -> None:
    low, high = sorted((low, high))
    name = f"speed:{factor!r}+noise:{low!r}:{high!r}+room:{rt60!r}"
    view = parse_view(name)
    assert parse_view(view.name) == view and parse_view(view.name).name == view.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nois:0:10", "unknown name 'nois', did you mean noise"),
        ("", "unknown name ''"),
        ("room:0.4+nois:0:10", "unknown name 'nois', did you mean noise"),
        ("room: 1e-1+nois:0:10", "unknown name 'nois', did you mean noise"),
        ("noise:0:10:pink+rom:1", "unknown name 'rom', did you mean room"),
        ("speed:0.9+channel:0", "channel comes first, once"),
        ("channel:0+channel:1", "channel comes first, once"),
        ("channel:one", "got 'one', wanted the number of a channel, from 0"),
        ("channel:1024", "got '1024', wanted the number of a channel"),
        ("chanel:1", "unknown name 'chanel', did you mean channel"),
        ("speed:3", "factor: got '3', wanted a number from 0.5 to 2"),
        ("speed", "factor: got ''"),
        ("tempo:0.1", "factor: got '0.1', wanted a number from 0.5 to 2"),
        ("speed:nan", "factor: got 'nan'"),
        ("noise:5", "high: got ''"),
        ("noise:10:5", "low is 10 dB, above high, 5 dB"),
        ("noise:0:5:", "after the last colon"),
        ("noise:0:5:/nowhere", "/nowhere: is no folder"),
        ("room:", "wanted seconds or a folder"),
        ("room:0", "seconds: got '0'"),
        ("room:/nowhere", "/nowhere: is no folder"),
        ("codec:5000", "hertz: got '5000', wanted a number from 200 to 4000"),
        ("codec:3400:opus", "got 'opus', wanted mulaw"),
        ("lowpass:9000", "hertz"),
        ("clean:1", "clean has no settings"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_view(text)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", GENERATED)
def test_the_draw_is_a_function_of_seed_and_key(name: str) -> None:
    view, samples = parse_view(name), speech()
    first = view.apply(samples, "a", 0)
    np.testing.assert_array_equal(first, parse_view(name).apply(samples.copy(), "a", 0))
    drawn = any(kind in name for kind in ("noise", "room"))
    assert np.array_equal(first, view.apply(samples, "b", 0)) is not drawn
    assert np.array_equal(first, view.apply(samples, "a", 1)) is not drawn
    assert view.keeps_frames is (name not in ("speed:0.9", "tempo:1.3"))
    assert not view.keeps_frames or len(first) == len(samples)


def test_the_first_noise_draws_the_same_in_every_view() -> None:
    ratios = {parse_view(name).snr("a", 3) for name in ("noise:0:20", "room:0.3+noise:0:20", "noise:0:20+noise:0:20")}
    assert len(ratios) == 1 and None not in ratios and parse_view("room:0.3").snr("a", 3) is None
    noises = parse_view("noise:0:20+noise:0:20")
    once = parse_view("noise:0:20").apply(speech(), "a", 3)
    assert not np.array_equal(noises.apply(speech(), "a", 3), once)


@settings(max_examples=60, deadline=None)
@given(
    name=st.lists(
        st.sampled_from([*GENERATED, *EXTREME]),
        min_size=1,
        max_size=4,
    ),
    count=st.integers(0, 3000),
    shape=st.sampled_from(["zeros", "ones", "square", "noise", "impulse"]),
    seed=st.integers(0, 3),
)
def test_any_view_of_any_samples_is_finite_and_in_range(name: list[str], count: int, shape: str, seed: int) -> None:
    samples = {
        "zeros": np.zeros(count),
        "ones": np.ones(count),
        "square": np.sign(np.sin(np.arange(count) / 5)),
        "noise": np.random.default_rng(seed).uniform(-1, 1, count),
        "impulse": np.eye(1, count, count // 2).ravel() if count else np.zeros(0),
    }[shape].astype(np.float32)
    view = parse_view("+".join(name))
    heard = view.apply(samples, "key", seed)
    assert heard.dtype == np.float32 and heard.ndim == 1 and np.isfinite(heard).all()
    assert not len(heard) or np.abs(heard).max() <= 1.0
    assert not view.keeps_frames or len(heard) == count


@pytest.mark.parametrize("what", ["white", "pink", "babble"])
@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
def test_the_ratio_asked_for_is_the_one_achieved(what: str, snr: float) -> None:
    samples = speech()
    heard = parse_view(f"noise:{snr}:{snr}:{what}").apply(samples, "a", 0).astype(np.float64)
    # the mixture may be scaled: whatever the noise left of the speech gives the scale
    alone = Noise(snr, snr, what).apply(samples, parse_view(f"noise:{snr}:{snr}:{what}")._drawing("a", 0)[0][1])
    scale = heard[1000] / alone[1000]
    noise = heard / scale - samples
    spoken = samples[samples != 0].astype(np.float64)
    assert 10 * np.log10(np.square(spoken).mean() / np.square(noise).mean()) == pytest.approx(snr, abs=0.1)
    assert parse_view(f"noise:{snr}:{snr}:{what}").snr("a", 0) == snr


def test_drawn_ratios_fill_their_range() -> None:
    view = parse_view("noise:0:10")
    ratios = np.array([view.snr(str(key), 0) for key in range(2000)], float)
    assert ratios.min() >= 0 and ratios.max() <= 10
    assert np.histogram(ratios, 5, (0, 10))[0].min() > 320  # 400 each


def test_silence_stays_silent() -> None:
    silence = np.zeros(32000, np.float32)
    np.testing.assert_array_equal(parse_view("noise:0:0").apply(silence, "a", 0), silence)


def test_speed_shortens_and_raises() -> None:
    time = np.arange(16000) / 16000
    tone = (0.5 * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)
    for factor in (0.9, 1.1, 1.25):
        heard = parse_view(f"speed:{factor}").apply(tone, "a", 0)
        assert abs(len(heard) - 16000 / factor) <= 1
        wanted = 0.5 * np.sin(2 * np.pi * 1000 * factor * np.arange(len(heard)) / 16000)
        assert np.abs(heard - wanted)[300:-300].max() < 1e-3
    assert parse_view("speed:1").keeps_frames


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.3, 1.7])
def test_tempo_shortens_and_keeps_the_pitch(factor: float) -> None:
    time = np.arange(32000) / 16000
    view = parse_view(f"tempo:{factor}")
    for hertz in (110, 440, 1234.5):
        heard = view.apply((0.5 * np.sin(2 * np.pi * hertz * time)).astype(np.float32), "a", 0)
        assert len(heard) == round(32000 / factor)
        assert band(heard, hertz - 12, hertz + 12) > 0.98
        # and as loud, without gaps
        levels = np.sqrt(np.square(heard[800 : len(heard) // 800 * 800 - 800].reshape(-1, 800)).mean(1))
        np.testing.assert_allclose(levels, 0.5 / np.sqrt(2), rtol=0.1)
    # what is said comes in its order, in its share of the time: bursts of 200 ms with as long between them
    loud = np.abs(view.apply(speech(4.0), "a", 0)) > 0.02
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.convolve(loud, np.ones(400), "same") > 4, [0]]).astype(int)))
    lengths = (edges[1::2] - edges[::2]) / 16000
    assert len(lengths) == 10
    np.testing.assert_allclose(lengths, 0.2 / factor + 0.025, atol=0.03)
    assert parse_view("tempo:1").keeps_frames
    np.testing.assert_array_equal(parse_view("tempo:1").apply(speech(), "a", 0), speech())


@pytest.mark.parametrize("rt60", [0.2, 0.5, 1.0])
def test_a_room_decays_in_its_time(rt60: float) -> None:
    """The slope of the backward integral (Schroeder, 1965), from -5 to -25 dB of the tail."""
    slopes, ratios = [], []
    for seed in range(8):
        response = Room(rt60).response(np.random.default_rng(seed))
        tail = response[40:]
        decay = 10 * np.log10(np.cumsum(np.square(tail)[::-1])[::-1] / np.square(tail).sum())
        used = (decay <= -5) & (decay >= -25)
        slopes.append(-60 / np.polyfit(np.flatnonzero(used) / 16000, decay[used], 1)[0])
        ratios.append(-10 * np.log10(np.square(response[1:]).sum()))
        assert response[0] == 1 and not response[1:40].any()
    assert np.mean(slopes) == pytest.approx(rt60, rel=0.05)
    assert min(ratios) >= -1e-6 and max(ratios) <= 12 + 1e-6


def test_a_room_keeps_time_and_level() -> None:
    samples = speech(level=0.1)
    heard = parse_view("room:0.4").apply(samples, "a", 0)
    assert np.square(heard).sum() == pytest.approx(np.square(samples).sum(), rel=1e-4)
    lag = np.correlate(heard[:8000], samples[:8000], "full").argmax() - 7999
    assert lag == 0


def test_codec_and_lowpass_limit_the_band() -> None:
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, 32000).astype(np.float32)
    for name, edge in (("codec:3400", 3400), ("lowpass:2000", 2000), ("codec:4000", 4000)):
        heard = parse_view(name).apply(samples, "a", 0)
        assert band(heard, edge + 300, 8001) < 1e-4
        kept = np.square(np.abs(np.fft.rfft(heard - samples)))[: 2 * (edge - 400)]
        assert kept.sum() < 1e-3 * np.square(np.abs(np.fft.rfft(samples)))[: 2 * (edge - 400)].sum()
    plain, packed = (parse_view(name).apply(samples, "a", 0) for name in ("codec:3400", "codec:3400:mulaw"))
    ratio = 10 * np.log10(np.square(plain).sum() / np.square(packed - plain).sum())
    assert 30 < ratio < 45  # G.711 has about 38 dB


def test_folders_of_noises_and_rooms(tmp_path: Path) -> None:
    hum = (0.5 * np.sin(2 * np.pi * 50 * np.arange(8000) / 8000)).astype(np.float32)
    (tmp_path / "n" / "deep").mkdir(parents=True)
    soundfile.write(tmp_path / "n" / "deep" / "hum.flac", hum, 8000)
    view = parse_view(f"noise:10:10:{tmp_path / 'n'}")
    assert parse_view(view.name) == view
    noise = view.apply(speech(3.0, 0.2), "a", 0) - speech(3.0, 0.2)  # longer than the recording
    assert band(noise, 40, 60) > 0.9
    response = np.zeros(4000)
    response[[100, 900]] = 1, 0.5  # the direct sound comes late in the recording
    (tmp_path / "r").mkdir()
    soundfile.write(tmp_path / "r" / "a.wav", response * 0.9, 16000)
    view = parse_view(f"room:{tmp_path / 'r'}")
    assert parse_view(view.name) == view and view.keeps_frames
    impulse = np.zeros(2000, np.float32)
    impulse[10] = 0.5
    heard = view.apply(impulse, "a", 0)
    assert np.abs(heard).argmax() == 10 and heard[810] / heard[10] == pytest.approx(0.5, abs=1e-3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no audio files"):
        parse_view(f"room:{tmp_path / 'empty'}")
    soundfile.write(tmp_path / "r" / "a.wav", np.zeros(100), 16000)
    with pytest.raises(UserError, match=r"a\.wav: is silent"):
        view.apply(impulse, "a", 0)


def test_one_channel_of_a_recording_of_several(tmp_path: Path) -> None:
    one, other = speech(1.0, 0.4), speech(1.0, 0.1)[::-1]
    soundfile.write(tmp_path / "both.wav", np.stack([one, other], 1), 16_000, subtype="FLOAT")
    utterance = Utterance("a", "both.wav", "yes", 1.0)
    corpus = Corpus((utterance,), tmp_path)

    def heard(view: str, row: Utterance = utterance) -> np.ndarray:
        return parse_view(view).hear(corpus, row, 0)

    np.testing.assert_array_equal(heard("channel:0"), one)
    np.testing.assert_array_equal(heard("channel:1"), other)
    np.testing.assert_allclose(heard("clean"), (one + other) / 2, atol=1e-7)
    speed = parse_view("speed:1.1").apply(np.ascontiguousarray(other), "a", 0)
    np.testing.assert_array_equal(heard("channel:1+speed:1.1"), speed)
    with pytest.raises(UserError, match=r"both\.wav: utterance a: wanted channel 2, it has 2, counted from 0"):
        heard("channel:2")
    with pytest.raises(UserError, match=r"both\.wav: utterance a: wanted channel 1, it says itself that it is 0"):
        heard("channel:1", replace(utterance, extra={"channel": 0}))
    with pytest.raises(UserError, match="is in a shard, which has one"):
        heard("channel:0", replace(utterance, extra={"stored_as": "a.flac", "stored_at": 0, "stored_bytes": 5}))


def test_wrong_samples() -> None:
    for samples in (np.zeros(5), np.zeros((2, 5), np.float32)):
        with pytest.raises(ValueError, match="wanted float32"):
            View().apply(samples, "a", 0)


@pytest.mark.skipif(not AN4.is_dir(), reason="KD_DATA has no speech/an4")
def test_an4_in_noise() -> None:
    for path in sorted(AN4.glob("test/*/*.flac"))[::20]:
        samples = read_audio(path)
        heard = parse_view("noise:100:100:white").apply(samples, path.stem, 0)
        np.testing.assert_allclose(heard, samples, atol=1e-4)
        noisy = parse_view("noise:5:5:white").apply(samples, path.stem, 0).astype(np.float64)
        scale = noisy @ samples / (samples.astype(np.float64) @ samples)
        noise = noisy / scale - samples
        assert 10 * np.log10(active_power(samples) / np.square(noise).mean()) == pytest.approx(5, abs=0.1)


def test_a_folder_may_have_a_plus_in_its_path_and_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cafe+bar" / "to+day"
    folder.mkdir(parents=True)
    soundfile.write(folder / "one.wav", np.full(1600, 0.1), 16000)
    monkeypatch.chdir(folder.parent)
    view = parse_view("speed:0.9+room:to+day+noise:0:5:to+day+codec:3400")
    kinds = [step.kind for step in view.steps]
    assert kinds == ["speed", "room", "noise", "codec"] and view.folders == [Path("to+day")] * 2
    away = view.from_anywhere()
    assert away == parse_view(f"speed:0.9+room:{folder}+noise:0:5:{folder}+codec:3400") == parse_view(away.name)
    with pytest.raises(UserError, match="unknown name 'spead', did you mean speed"):
        parse_view("noise:0:5:to+day+spead:0.9")
    # where both are folders it is the longer one
    for name in ("rain", "rain+clean"):
        shutil.copytree(folder, Path(name))
    assert parse_view("room:rain+clean").folders == [Path("rain+clean")]
    monkeypatch.chdir("rain+clean")
    assert parse_view(parse_view("room:.+speed:0.9").from_anywhere().name).folders == [folder.parent / "rain+clean"]
