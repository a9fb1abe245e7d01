from __future__ import annotations

import io

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apps.speech.audio import resample
from apps.speech.server.containers import Ogg, WebM, ogg_checksum, ogg_page
from apps.speech.server.sources import Source, packet_samples, source
from kdcore.config import UserError
from tests.speech.device.exported import noise, spoken
from tests.speech.server.recordings import ogg_opus, packets, webm
from tests.speech.server.served import pcm

RECORDING = ogg_opus(spoken("yes no"))
PACKETS = packets(RECORDING)
WEBM = webm(PACKETS)
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(reader: Source, data: bytes, sizes: list[int]) -> np.ndarray:
    found, at, turn = [np.zeros(0, np.float32)], 0, 0
    while at < len(data):
        reader.feed(data[at : at + sizes[turn % len(sizes)]])
        at, turn = at + sizes[turn % len(sizes)], turn + 1
        while (samples := reader.read()) is not None:
            found.append(samples)
    reader.end()
    while (samples := reader.read()) is not None:
        found.append(samples)
    return np.concatenate(found)


@pytest.mark.parametrize("rate", [8_000, 16_000, 16_001, 44_100, 192_000])
@pytest.mark.parametrize("channels", [1, 3])
def test_pcm_is_what_the_whole_file_would_be(rate: int, channels: int) -> None:
    samples = noise(0.5, 0.2).repeat(rate * channels // 16_000 + 1)[: rate // 2 * channels]
    data = pcm(samples)
    values = np.frombuffer(data, "<i2").reshape(-1, channels).astype(np.float32).mean(axis=1) / np.float32(32768)
    whole = np.clip(resample(values, 16_000, rate), -1, 1)
    found = read(source("pcm", rate, channels), data, [1, 777, 4096, 3])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, whole, atol=1e-6)


def test_half_a_sample_at_the_end_is_said() -> None:
    reader = source("pcm", 16_000, 2)
    assert len(read(reader, bytes(4003), [1000])) == 1000
    assert reader.torn == "3 bytes of a sample"


@pytest.mark.parametrize(
    ("form", "rate", "channels", "what"),
    [("mp3", 16_000, 1, "format"), ("pcm", 7999, 1, "rate"), ("pcm", 192_001, 1, "rate"), ("pcm", 16_000, 33, "chann")],
)
def test_what_is_not_taken(form: str, rate: int, channels: int, what: str) -> None:
    with pytest.raises(UserError, match=f"^{what}"):
        source(form, rate, channels)


def test_the_checksum_is_that_of_libogg() -> None:
    size = 27 + 1 + 19
    page = RECORDING[:size]
    assert ogg_checksum(page[:22] + bytes(4) + page[26:]) == int.from_bytes(page[22:26], "little")
    with pytest.raises(ValueError, match="255"):
        ogg_page([bytes(60_000), bytes(6000)], 0, 0, 0)


@pytest.mark.parametrize("live", [True, False])
def test_opus_comes_out_as_libsndfile_decodes_it_whole(live: bool) -> None:
    whole, rate = soundfile.read(io.BytesIO(RECORDING), dtype="float32")
    whole = resample(np.ascontiguousarray(whole), 16_000, rate)
    for form, data in (("ogg", RECORDING), ("webm", webm(PACKETS, live=live))):
        found = read(source(form), data, [50, 1, 3000])
        # the length of Ogg is that of its packets; libsndfile cuts the padding of the last one
        assert 0 <= len(found) - len(whole) < 1000
        error = np.sqrt(np.mean((found[: len(whole)] - whole) ** 2))
        assert error < 0.02 * np.sqrt(np.mean(whole**2)) + 1e-4


@quick
@given(st.lists(st.integers(1, 700), min_size=1, max_size=8))
def test_packets_do_not_depend_on_the_cuts(sizes: list[int]) -> None:
    for demuxer, data in ((WebM(), WEBM), (Ogg(), RECORDING)):
        found, at, turn = [], 0, 0
        while at < len(data):
            size = sizes[turn % len(sizes)]
            found += demuxer.feed(data[at : at + size])
            at, turn = at + size, turn + 1
        assert found == PACKETS
        assert not demuxer.torn


@quick
@given(st.integers(0, len(WEBM)))
def test_a_cut_recording_gives_the_packets_before_the_cut(cut: int) -> None:
    demuxer = WebM()
    found = list(demuxer.feed(WEBM[:cut]))
    assert found == PACKETS[: len(found)]
    later = list(demuxer.feed(WEBM[cut:]))
    assert found + later == PACKETS


@quick
@given(st.data())
def test_damage_is_refused_or_heard_but_never_a_crash(data: st.DataObject) -> None:
    form, good = data.draw(st.sampled_from([("webm", WEBM[:4000]), ("ogg", RECORDING[:4000])]))
    bad = bytearray(good)
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(bad) - 1), st.integers(0, 255)), max_size=6)):
        bad[place] = value
    try:
        samples = read(source(form), bytes(bad), [997])
    except UserError as error:
        assert str(error).startswith("audio: ") and "\n" not in str(error)
    else:
        assert np.isfinite(samples).all()


@quick
@given(st.binary(max_size=300), st.sampled_from(["webm", "ogg"]))
def test_noise_is_refused(data: bytes, form: str) -> None:
    with pytest.raises(UserError, match="is no"):
        read(source(form), b"x" + data + bytes(30), [64])


def test_what_a_recording_may_not_have() -> None:
    for data, what in (
        (webm(PACKETS, lacing=0x02), "laced"),
        (webm(PACKETS).replace(b"A_OPUS", b"A_AAC0"), "no Opus track"),
        (webm(PACKETS).replace(b"OpusHead\1\1", b"OpusHead\1\6"), "6 channels"),
        (RECORDING.replace(b"OpusHead", b"OpusTail"), "checksum"),
    ):
        with pytest.raises(UserError, match=what):
            read(source("webm" if data[:1] == b"\x1a" else "ogg"), data, [500])


def test_lengths_of_packets_are_those_of_the_standard() -> None:
    assert packet_samples(b"\xf8") == 960  # CELT, 20 ms
    assert packet_samples(b"\xe1\0") == 240  # two of 2.5 ms
    assert packet_samples(b"\x18") == 2880  # SILK, 60 ms
    assert packet_samples(b"\x7b\x06") == 5760  # hybrid, six of 20 ms
    for damaged in (b"\x1b\x03", b"\xfb\0", b"\xfb"):
        with pytest.raises(UserError, match="damaged"):
            packet_samples(damaged)
