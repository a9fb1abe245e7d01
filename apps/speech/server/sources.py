"""What a client sends, in messages of any size, as samples at 16 kHz. What comes out does not depend on the cuts.

Opus is decoded by libsndfile a few packets at a time, each time with those before them, which a decoder needs to find
its state (RFC 7845 asks for 80 ms). No torch.
"""

from __future__ import annotations

import io
import struct
from collections import deque
from typing import Protocol

import numpy as np

from apps.speech.device.pcm import Pcm
from apps.speech.features import SAMPLE_RATE
from apps.speech.server.containers import Demuxer, Ogg, WebM, ogg_page
from kdcore.config import UserError

FORMATS = ("pcm", "webm", "ogg")
# samples at 48 kHz that are decoded at once, and before them to find the decoder's state
_BATCH, _BEFORE = 5760, 4800


class Source(Protocol):
    """Bytes in, samples out: ``feed`` what came, then ``read`` until it returns None; ``end`` before the last reads.

    ``portion`` is how many bytes to feed at once: about half a second.
    """

    portion: int

    def feed(self, data: bytes) -> None:
        """Take bytes; UserError where they are not the format."""

    def end(self) -> None:
        """Nothing more comes."""

    def read(self) -> np.ndarray | None:
        """Return the next samples float32 [n] at 16 kHz, about a second at the most, None if there are none yet."""

    @property
    def torn(self) -> str | None:
        """What is incomplete about the end of the audio, in words."""


def source(form: str, rate: int = SAMPLE_RATE, channels: int = 1) -> Source:
    """Return what reads a format; UserError for a format, rate or number of channels that is not taken."""
    if form == "pcm":
        return Pcm(rate, channels)
    if form not in FORMATS:
        raise UserError(f"format: got {form!r}, wanted {', '.join(FORMATS)}")
    return Opus(WebM() if form == "webm" else Ogg())


class Opus:
    """Opus in a container."""

    portion = 4096

    def __init__(self, demuxer: Demuxer) -> None:
        self._demuxer = demuxer
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._samples = 0
        self._before: deque[tuple[bytes, int]] = deque()
        self._skip: int | None = None
        self._ended = False

    @property
    def torn(self) -> str | None:
        """Whether the container is cut."""
        return "a part of a packet" if self._ended and self._demuxer.torn else None

    def feed(self, data: bytes) -> None:
        """Take bytes."""
        for packet in self._demuxer.feed(data):
            length = packet_samples(packet)
            self._waiting.append((packet, length))
            self._samples += length

    def end(self) -> None:
        """Nothing more comes."""
        self._ended = True

    def read(self) -> np.ndarray | None:
        """Decode the next packets."""
        if not self._waiting or (self._samples < _BATCH and not self._ended):
            return None
        if self._skip is None:
            if self._demuxer.head is None:
                raise ValueError("head: a packet came before the head of its container")
            self._skip = self._demuxer.head.pre_skip // 3
        batch, length = [], 0
        while self._waiting and length < _BATCH:
            batch.append(self._waiting.popleft())
            length += batch[-1][1]
        self._samples -= length
        known = sum(size for _, size in self._before)
        samples = decoded([packet for packet, _ in (*self._before, *batch)], known + length)[known // 3 :]
        self._before.extend(batch)
        while self._before and known + length - self._before[0][1] >= _BEFORE:
            known -= self._before.popleft()[1]
        left_out = min(self._skip, len(samples))
        self._skip -= left_out
        return samples[left_out:]


def packet_samples(packet: bytes) -> int:
    """Return the length of an Opus packet in samples at 48 kHz (RFC 6716, 3.1); UserError where it is damaged."""
    kind, code = packet[0] >> 3, packet[0] & 3
    if kind < 12:
        frame = (480, 960, 1920, 2880)[kind & 3]
    elif kind < 16:
        frame = (480, 960)[kind & 1]
    else:
        frame = 120 << (kind & 3)
    if code == 3 and len(packet) < 2:
        raise UserError("audio: an Opus packet is damaged")
    count = (1, 2, 2, packet[1] & 0x3F if code == 3 else 0)[code]
    if not 0 < frame * count <= 5760:
        raise UserError("audio: an Opus packet is damaged (longer than 120 ms)")
    return frame * count


def decoded(packets: list[bytes], samples: int) -> np.ndarray:
    """Return the samples float32 [samples // 3] at 16 kHz, mono, of packets that are ``samples`` long at 48 kHz."""
    import soundfile

    # a rate of 16 kHz makes libsndfile let Opus itself decode to it; one channel, to mono
    head = b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 0, SAMPLE_RATE, 0, 0)
    file = ogg_page([head], 0, 0, 2) + ogg_page([b"OpusTags" + bytes(8)], 0, 1, 0)
    for place, packet in enumerate(packets):
        last = place == len(packets) - 1
        file += ogg_page([packet], samples if last else -1, 2 + place, 4 if last else 0)
    try:
        with soundfile.SoundFile(io.BytesIO(file)) as handle:
            found = handle.read(samples // 3, dtype="float32", always_2d=True)[:, 0]
    except soundfile.LibsndfileError:
        raise UserError("audio: an Opus packet is damaged") from None
    short = samples // 3 - len(found)
    return np.concatenate([found, np.zeros(short, np.float32)]) if short > 0 else np.ascontiguousarray(found)
