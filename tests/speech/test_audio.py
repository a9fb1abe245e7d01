"""Audio of every kind is read as it is, block by block as whole, and what is damaged is named."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.speech.audio import Examination, audio_info, blocks, decode_audio, examine, read_audio, resample
from kdcore.config import UserError
from tests.speech.peers import import_torchaudio

AN4 = Path(os.environ.get("KD_DATA", "../shared/data")) / "speech" / "an4"


def tone(rate: int, seconds: float = 1.0, hertz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def inner_error(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference away from the ends, where a filter sees zeros."""
    assert abs(len(got) - len(wanted)) <= 1
    return float(np.abs(got[600:-600] - wanted[600 : len(got) - 600]).max())


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 12_345, 192_000])
def test_a_tone_keeps_its_phase_at_any_rate(tmp_path: Path, rate: int) -> None:
    soundfile.write(tmp_path / "a.wav", tone(rate), rate, subtype="FLOAT")
    samples = read_audio(tmp_path / "a.wav")
    assert samples.dtype == np.float32 and samples.ndim == 1
    assert inner_error(samples, tone(16000)) < 3e-4


def test_what_lies_above_the_band_is_removed() -> None:
    for hertz in (8300, 10_000, 15_900):
        assert np.abs(resample(tone(32_000, hertz=hertz), 1, 2)[200:-200]).max() < 1e-4
    assert np.abs(resample(tone(32_000, hertz=7300), 1, 2)[200:-200]).max() == pytest.approx(0.4, rel=1e-2)


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        ("wav", "PCM_U8", 1e-2),
        ("wav", "PCM_16", 1e-4),
        ("wav", "PCM_24", 1e-6),
        ("wav", "PCM_32", 1e-6),
        ("wav", "DOUBLE", 1e-6),
        ("wav", "ULAW", 2e-2),
        ("flac", "PCM_16", 1e-4),
        ("ogg", "VORBIS", 2e-2),
        ("mp3", None, 2e-2),
        ("sph", "PCM_16", 1e-4),
        ("aiff", "PCM_16", 1e-4),
    ],
)
def test_every_format_and_width(tmp_path: Path, suffix: str, subtype: str | None, tolerance: float) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(16000), 16000, subtype=subtype, format="NIST" if suffix == "sph" else None)
    assert inner_error(read_audio(path), tone(16000)) < tolerance
    info = audio_info(path)
    assert (info.rate, info.channels) == (16000, 1) and info.seconds == pytest.approx(1.0, abs=0.1)


def test_channels_are_mixed_or_picked(tmp_path: Path) -> None:
    many = np.stack([tone(16000) * (number / 32) for number in range(32)], axis=1)
    soundfile.write(tmp_path / "a.wav", many, 16000, subtype="FLOAT")
    assert audio_info(tmp_path / "a.wav").channels == 32
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), many.mean(axis=1), atol=1e-6)
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", channel=7), many[:, 7])
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", channel="0"), many[:, 0])
    with pytest.raises(UserError, match=r"a\.wav: has no channel 32; it has 32"):
        read_audio(tmp_path / "a.wav", channel=32)
    with pytest.raises(UserError, match="'mix' or a number"):
        read_audio(tmp_path / "a.wav", channel="left")


def test_a_part(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, 16000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", noise, 16000, subtype="FLOAT")
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", start=0.25, seconds=0.5), noise[4000:12000])
    np.testing.assert_array_equal(read_audio(tmp_path / "a.wav", start=0.75, seconds=9), noise[12000:])
    with pytest.raises(UserError, match=r"begins at 1\.5 s, but is only 1 s long"):
        read_audio(tmp_path / "a.wav", start=1.5)


@settings(max_examples=20, deadline=None)
@given(
    rate=st.sampled_from([8000, 16000, 22050, 44100, 48000, 12345]),
    seconds=st.floats(0.001, 0.7),
    length=st.integers(40, 9000),
    size=st.integers(1, 5000),
)
def test_blocks_put_together_are_the_whole(
    tmp_path_factory: pytest.TempPathFactory, rate: int, seconds: float, length: int, size: int
) -> None:
    path = tmp_path_factory.mktemp("blocks") / "a.wav"
    soundfile.write(path, np.random.default_rng(length).uniform(-0.7, 0.7, length), rate, subtype="FLOAT")
    with pytest.MonkeyPatch.context() as patch:
        whole = read_audio(path)
        patch.setattr("apps.speech.audio._BLOCK_VALUES", size)  # decoded in small pieces too
        pieces = list(blocks(path, seconds))
    assert all(len(piece) == round(seconds * 16000) for piece in pieces[:-1])
    assert 0 < len(pieces[-1]) <= round(seconds * 16000)
    assert abs(len(whole) - length * 16000 / rate) <= 1
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_a_long_file_is_read_in_blocks_and_refused_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 16000, 1, "PCM_16") as handle:
        for _ in range(40):
            handle.write(np.zeros(1 << 16, np.float32))
    monkeypatch.setattr("apps.speech.audio.LONGEST_SECONDS", 60.0)
    with pytest.raises(UserError, match=r"long\.flac: is longer than 1 minutes; read it in parts or in blocks"):
        read_audio(path)
    assert sum(map(len, blocks(path, 10.0))) == 40 << 16


def damaged(folder: Path) -> dict[str, Path]:
    whole = {}
    for suffix in ("wav", "flac", "ogg", "aiff", "au", "sph", "mp3"):
        whole[suffix] = folder / f"whole.{suffix}"
        soundfile.write(whole[suffix], tone(16000, 3), 16000, format="NIST" if suffix == "sph" else None)
    files = {"missing": folder / "missing.wav", "folder": folder}
    for suffix, path in whole.items():
        files[f"half {suffix}"] = folder / f"half.{suffix}"
        files[f"half {suffix}"].write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for name, data in (("empty.wav", b""), ("text.wav", b"hello\n" * 200), ("header.wav", b"RIFF"), ("x.raw", b"ab")):
        (folder / name).write_bytes(data)
        files[name] = folder / name
    soundfile.write(folder / "none.wav", np.zeros(0), 16000)
    wrong = tone(16000)
    wrong[500] = np.nan
    soundfile.write(folder / "nan.wav", wrong, 16000, subtype="FLOAT")
    soundfile.write(folder / "loud.wav", tone(16000) * 32768, 16000, subtype="FLOAT")
    soundfile.write(folder / "slow.wav", tone(16000), 3)
    return files | {name: folder / f"{name}.wav" for name in ("none", "nan", "loud", "slow")}


def test_damaged_files_are_named_with_the_reason(tmp_path: Path) -> None:
    reasons = {
        "missing": "does not exist",
        "folder": "is a folder",
        "half wav": "is truncated: the header states 96000 bytes",
        "half aiff": "is truncated",
        "half au": "is truncated",
        "half sph": "is truncated: the header states 48000 samples",
        "half mp3": "is truncated",
        "empty.wav": "is empty",
        "text.wav": "cannot be read as audio",
        "none": "has no samples",
        "nan": "NaN or infinite",
        "loud": "must be in",
        "slow": "has 3 samples a second",
    }
    for name, path in damaged(tmp_path).items():
        with pytest.raises(UserError) as caught:
            read_audio(path)
        message = str(caught.value)
        assert str(path) in message and "\n" not in message and reasons.get(name, "") in message, (name, message)
        with pytest.raises(UserError):
            list(blocks(path, 0.5))


@pytest.mark.parametrize("codec", ["VORBIS", "OPUS"])
def test_an_ogg_file_ends_with_its_last_page(codec: str, tmp_path: Path) -> None:
    path = tmp_path / "whole.ogg"
    samples = np.random.default_rng(0).normal(0, 0.1, 16_000 * 20).astype(np.float32)
    soundfile.write(path, samples, 16_000, format="OGG", subtype=codec)
    data = path.read_bytes()
    pages = [match.start() for match in re.finditer(rb"OggS\0", data)]
    assert len(pages) > 4 and abs(len(read_audio(path)) - len(samples)) < 1600
    (tmp_path / "tail.ogg").write_bytes(data + b"TAG" + bytes(125))  # as players write behind it
    np.testing.assert_array_equal(read_audio(tmp_path / "tail.ogg"), read_audio(path))
    for size in (pages[-2], pages[-2] + 20, pages[-1] - 1, pages[-1], pages[-1] + 10, len(data) - 1):
        (tmp_path / "cut.ogg").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut\.ogg: is truncated: no last page of Ogg"):
            read_audio(tmp_path / "cut.ogg")


def test_a_header_without_a_length(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(16000), 16000, subtype="PCM_16")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4  # as a program writes that cannot go back
    (tmp_path / "pipe.wav").write_bytes(data)
    np.testing.assert_array_equal(read_audio(tmp_path / "pipe.wav"), read_audio(tmp_path / "a.wav"))
    soundfile.write(tmp_path / "a.flac", tone(16000), 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    (tmp_path / "pipe.flac").write_bytes(data)
    with pytest.raises(UserError, match=r"pipe\.flac: states no length"):
        read_audio(tmp_path / "pipe.flac")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(["WAV", "FLAC", "OGG"]))
def test_a_changed_byte_gives_audio_or_a_user_error(data: st.DataObject, suffix: str) -> None:
    stream = io.BytesIO()
    soundfile.write(stream, tone(16000, 0.2), 16000, format=suffix)
    raw = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, min(len(raw), 400) - 1))] = data.draw(st.integers(0, 255))
    try:
        samples = decode_audio(bytes(raw[: data.draw(st.integers(0, len(raw)))]), "x")
    except UserError as error:
        assert str(error).startswith("x: ")
    else:
        assert np.isfinite(samples).all() and np.abs(samples).max() <= 1.0 and len(samples)


def test_examine_names_what_is_wrong() -> None:
    speech = tone(16000) * np.linspace(0.1, 1, 16000, dtype=np.float32)
    assert examine(speech) == []
    assert examine(np.zeros(100, np.float32)) == ["silence (digital)"]
    assert examine(speech * 1e-3) == ["silence (peak -68 dB)"]
    assert examine(np.clip(speech * 4, -1, 1))[0].startswith("clipping")
    assert examine(speech + np.float32(0.1)) == ["DC offset of +10.0 % of full scale"]
    assert examine(np.full(500, 0.25, np.float32)) == ["DC offset of +25.0 % of full scale", "silence (digital)"]
    assert examine(np.zeros(0, np.float32)) == ["no samples"]


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 4000), max_size=20),
    gain=st.sampled_from([0.0, 1e-4, 0.3, 30.0]),
    offset=st.sampled_from([0.0, 0.02, -0.3]),
    limit=st.sampled_from([1.0, 0.985]),
)
def test_packets_are_examined_as_the_whole(cuts: list[int], gain: float, offset: float, limit: float) -> None:
    loud = np.linspace(0, 1, 4000, dtype=np.float32)  # the peak, and with it what is clipped, is known at the end only
    samples = np.clip(gain * loud * tone(4000) + offset, -1, limit).astype(np.float32)
    examination = Examination()
    for part in np.split(samples, sorted(cuts)):
        examination.accept(part)
    assert examination.remarks() == examine(samples)
    assert any("clipping" in each for each in examine(samples)) == (gain == 30.0)


def test_an_examination_keeps_no_samples() -> None:
    examination = Examination()
    for _ in range(3):
        examination.accept(np.ones(1 << 20, np.float32))
    # a view would keep the packet that it is of
    arrays = [
        value if value.base is None else value.base for value in vars(examination).values() if hasattr(value, "base")
    ]
    assert sum(each.nbytes for each in arrays) < 1 << 16


@pytest.mark.skipif(not AN4.is_dir(), reason="KD_DATA has no speech/an4")
def test_an4_is_read_as_stored() -> None:
    for path in sorted(AN4.glob("test/*/*.flac"))[::15]:
        stored, _ = soundfile.read(path, dtype="float32")
        np.testing.assert_array_equal(read_audio(path), stored)
        assert examine(stored) == []


def test_against_torchaudio() -> None:
    torch = pytest.importorskip("torch")
    functional = import_torchaudio().functional
    samples = np.random.default_rng(0).standard_normal(4410).cumsum().astype(np.float32) / 100
    reference = functional.resample(
        torch.from_numpy(samples), 44100, 16000, lowpass_filter_width=64, rolloff=0.96,
        resampling_method="sinc_interp_kaiser", beta=7.857,
    ).numpy()  # fmt: skip
    assert np.abs(resample(samples, 160, 441) - reference)[:1600].max() < 2e-3


def test_reading_needs_no_torch() -> None:
    modules = "audio, text, units, views; import apps.speech.data.formats, apps.speech.data.shards"
    code = f"from apps.speech import {modules}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
